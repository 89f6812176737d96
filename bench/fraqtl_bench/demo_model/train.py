"""Train the demo model and write it as a Hugging Face checkpoint.

    python -m fraqtl_bench.demo_model.train --out DIR --minutes 60

The quality lab's three other models are made alike, so that they differ in how their heads are grouped only:

    OPTIONS="--hidden 128 --heads 8 --steps 800 --step-tokens 4096 --longest 1024 --lr 4e-3 --log-every 100 --threads 1"
    python -m fraqtl_bench.demo_model.train --out mha --kv-heads 8 $OPTIONS
    python -m fraqtl_bench.demo_model.train --out gqa4 --kv-heads 2 $OPTIONS
    python -m fraqtl_bench.demo_model.train --out gqa8 --kv-heads 1 $OPTIONS

Reading a fact back from a long context needs two steps of attention, one that looks
at the previous token and one that looks up where the same words stood before. They
form late by themselves, so while `--guidance` lasts a cross-entropy on the attention
of four heads points at the right positions; it fades out and the model ends on
plain next-token prediction. Contexts grow from 256 to `--longest` tokens meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fraqtl_bench.demo_model.corpus import Corpus, Sample, standard_library_prose
from fraqtl_bench.demo_model.model import DemoConfig, DemoModel
from fraqtl_bench.demo_model.tokenizer import save_tokenizer, train_tokenizer

COPY_HEADS = ((2, 0), (3, 2))  # (layer, query head): attend to the place where the next token was said
PREVIOUS_HEADS = ((0, 0), (1, 2))  # attend to the previous token
GUIDED_ROWS = 192  # queries a step on which each guided head is scored


@dataclass
class Batch:
    ids: Tensor  # (B, L)
    answer: Tensor  # (B, L) bool
    source: Tensor  # (B, L), -1 where the token was not said before


def make_batch(corpus: Corpus, rng: random.Random, size: int, length: int) -> Batch:
    samples: list[Sample] = [corpus.sample(rng, length) for _ in range(size)]
    return Batch(
        torch.tensor([s.ids for s in samples]),
        torch.tensor([s.answer for s in samples]),
        torch.tensor([s.source for s in samples]),
    )


def language_loss(model: DemoModel, hidden: Tensor, batch: Batch, answer_weight: float) -> Tensor:
    targets = batch.ids[:, 1:]
    logits = model.logits(hidden[:, :-1]).float()
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    weight = torch.where(batch.answer[:, 1:], answer_weight, 1.0) * (targets != 0)
    return (each * weight).sum() / weight.sum()


def attention_loss(q: Tensor, k: Tensor, head: int, rows: Tensor, targets: Tensor) -> Tensor:
    """-log of the attention that query `rows` (R, 2: sequence, position) of one head give to key `targets` (R)."""
    group = q.shape[1] // k.shape[1]
    queries = q[rows[:, 0], head, rows[:, 1]].float()
    keys = k[:, head // group].float()
    scores = torch.einsum("rd,rld->rl", queries, keys[rows[:, 0]]) / q.shape[-1] ** 0.5
    future = torch.arange(keys.shape[1])[None] > rows[:, 1:]
    return F.cross_entropy(scores.masked_fill(future, -math.inf), targets)


def guidance_loss(attention: list[tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
    limit = GUIDED_ROWS if batch.ids.shape[1] <= 1024 else GUIDED_ROWS // 3
    said = (batch.source[:, 1:] >= 0).nonzero()
    said = said[torch.randperm(len(said))[:limit]]
    rows = torch.stack(
        [torch.randint(batch.ids.shape[0], (limit // 2,)), torch.randint(1, batch.ids.shape[1], (limit // 2,))], 1
    )
    loss = torch.zeros(())
    for layer, head in PREVIOUS_HEADS:
        loss = loss + attention_loss(*attention[layer], head, rows, rows[:, 1] - 1)
    if len(said):
        targets = batch.source[said[:, 0], said[:, 1] + 1]
        for layer, head in COPY_HEADS:
            loss = loss + attention_loss(*attention[layer], head, said, targets)
    return loss


@torch.no_grad()
def recall_accuracy(model: DemoModel, corpus: Corpus, length: int, questions: int, seed: int) -> float:
    """Share of recall samples whose first asked value has all digits predicted (teacher forcing)."""
    rng = random.Random(seed)
    right = 0
    for _ in range(questions):
        sample = corpus.recall(rng, length)
        at = [i for i, s in enumerate(sample.source) if s >= 0][:4]
        hidden, _ = model(torch.tensor([sample.ids[: at[-1] + 1]]))
        picks = model.logits(hidden[0, [i - 1 for i in at]]).argmax(-1).tolist()
        right += picks == [sample.ids[i] for i in at]
    return right / questions


def pick_length(rng: random.Random, progress: float, longest: int) -> int:
    """Short contexts first; the last half of the time mixes all lengths."""
    if progress < 0.25:
        return 256
    if progress < 0.45:
        return rng.choice((256, 512, 512, 1024))
    choices = [256, 512, 1024, 1024, 2048, 2048, 4096]
    return min(longest, rng.choice(choices if progress > 0.6 else choices[:-1]))


def _progress(args: argparse.Namespace, step: int, seconds: float) -> float:
    """How much of the training is done, by steps if their number is given, else by time."""
    return step / args.steps if args.steps else seconds / (args.minutes * 60)


def make_optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices; AdamW for embeddings, an output layer of its own, and the rest."""
    parameters = list(model.named_parameters())
    is_matrix = {n: p.dim() == 2 and "embed" not in n and "lm_head" not in n for n, p in parameters}
    return [
        torch.optim.Muon(
            [p for n, p in parameters if is_matrix[n]], lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([p for n, p in parameters if not is_matrix[n]], lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    args.out.mkdir(parents=True, exist_ok=True)
    prose = standard_library_prose()
    config = DemoConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 5 // 2,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
    )
    tokenizer = train_tokenizer(prose, config.vocab_size)
    save_tokenizer(tokenizer, args.out, config.max_length)
    corpus, rng = Corpus(tokenizer, prose), random.Random(args.seed)
    model = DemoModel(config)
    optimizers = make_optimizers(model, args.lr)
    log: list[dict[str, float]] = []
    start, step, tokens = time.monotonic(), 0, 0
    while (progress := _progress(args, step, time.monotonic() - start)) < 1:
        length = pick_length(rng, progress, args.longest)
        batch = make_batch(corpus, rng, max(1, args.step_tokens // length), length)
        guidance = max(0.0, 1 - progress / args.guidance)
        scale = min(1.0, (step + 1) / 50) * min(1.0, (1 - progress) / 0.4)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scale
        with torch.autocast("cpu", torch.bfloat16):
            hidden, attention = model(batch.ids)
            loss = language_loss(model, hidden, batch, args.answer_weight)
            total = loss + 0.25 * guidance * guidance_loss(attention, batch) if guidance else loss
        for optimizer in optimizers:
            optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step, tokens = step + 1, tokens + batch.ids.numel()
        if step % args.log_every == 0:
            entry = {"step": step, "minutes": (time.monotonic() - start) / 60, "tokens": tokens, "loss": loss.item()}
            entry |= {"total": total.item(), "gradient_norm": norm.item(), "length": length}
            for n in [n for n in (256, 1024, 4096) if n <= args.longest]:
                entry[f"recall_{n}"] = recall_accuracy(model, corpus, n, 16, seed=1000 + step)
            log.append(entry)
            print(json.dumps({k: round(v, 3) for k, v in entry.items()}), flush=True)
            torch.save(model.state_dict(), args.out / "last.pt")
    special = corpus.special
    model.export(args.out, bos=special["<|bos|>"], eos=special["<|end|>"], pad=special["<|pad|>"])
    (args.out / "last.pt").unlink(missing_ok=True)
    arguments = {k: v.name if isinstance(v, Path) else str(v) for k, v in vars(args).items()}
    report: dict[str, Any] = {"config": asdict(config), "arguments": arguments}
    report |= {"steps": step, "tokens": tokens, "minutes": (time.monotonic() - start) / 60, "log": log}
    lengths = [n for n in (256, 512, 1024, 2048, 4096) if n <= args.longest]
    report["recall"] = {n: recall_accuracy(model, corpus, n, 100, seed=7) for n in lengths}
    (args.out / "training.json").write_text(json.dumps(report, indent=1))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and training.json")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, default=0, help="end after this many steps instead")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=2, help="KV heads (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--step-tokens", type=int, default=8192)
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--guidance", type=float, default=0.5, help="share of the time over which it fades out")
    parser.add_argument("--answer-weight", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=0, help="0: one a core")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    report = train(parser.parse_args())
    print(json.dumps(report["recall"]))


if __name__ == "__main__":
    main()
