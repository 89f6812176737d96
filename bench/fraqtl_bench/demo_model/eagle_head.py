"""Train an EAGLE head for the demo model, and write it as vLLM reads one.

    python -m fraqtl_bench.demo_model.eagle_head OUT --steps 400

A head is one decoder layer (Li et al., 2024, arXiv 2401.15077). From the model's last hidden state at a position and
the token that follows, it guesses the next hidden state, of which the model's own output layer makes a draft:

    out_i = layer(W [embedding(x_(i+1)), h_i]),   draft of x_(i+2) = argmax(output(out_i))

It learns the model's own distribution there, and the hidden state: its guess takes that one's place in the next draft.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fraqtl_bench.demo_model.corpus import Corpus, standard_library_prose
from fraqtl_bench.demo_model.train import make_batch
from fraqtl_bench.quantizer.capture import demo_model

LENGTHS = (128, 256, 512)
HIDDEN_WEIGHT = 0.5  # of the error of the hidden state beside that of the distribution


class EagleHead(nn.Module):
    """(..., T, H) hidden states and embeddings of the tokens that follow -> (..., T, H) guessed next hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = LlamaDecoderLayer(config, 0)
        self.layer.input_layernorm = nn.Identity()  # as EAGLE has it
        self.rotary = model.model.rotary_emb

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        x = self.fc(torch.cat([embedded, hidden], -1))
        positions = torch.arange(x.shape[1])[None]
        guessed: Tensor = self.layer(x, position_embeddings=self.rotary(x, positions), attention_mask=None)
        return guessed

    def tensors(self) -> dict[str, Tensor]:
        layer = {f"layers.0.{name}": weight for name, weight in self.layer.state_dict().items()}
        return {"fc.weight": self.fc.weight.data, **layer}


def step_loss(model: Any, head: EagleHead, ids: Tensor) -> Tensor:
    """ids: (B, T) of text."""
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
        hidden, target = found.hidden_states[-1], found.logits.float().log_softmax(-1)
        embedded = model.get_input_embeddings()(ids)
    guessed = head(hidden[:, :-1], embedded[:, 1:])[:, :-1]
    drafted = model.lm_head(guessed).float().log_softmax(-1)
    wanted, known = target[:, 1:-1], (ids[:, 2:] != 0)[..., None]  # padding is 0
    divergence = (wanted.exp() * (wanted - drafted) * known).sum() / known.sum()
    distance = (F.smooth_l1_loss(guessed, hidden[:, 1:-1], reduction="none") * known).sum() / known.sum()
    return divergence + HIDDEN_WEIGHT * distance / hidden.shape[-1]


def train(out: Path, steps: int, step_tokens: int = 4096, lr: float = 3e-3, seed: int = 0) -> list[float]:
    """Write config.json and model.safetensors to `out`. Returns the loss of every step."""
    torch.manual_seed(seed)
    source = demo_model()
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    corpus = Corpus(Tokenizer.from_file(str(source / "tokenizer.json")), standard_library_prose())
    rng = random.Random(seed)
    head = EagleHead(model)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        length = rng.choice(LENGTHS)
        loss = step_loss(model, head, make_batch(corpus, rng, step_tokens // length, length).ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    save(out, head, source)
    return losses


def save(out: Path, head: EagleHead, source: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({name: x.contiguous() for name, x in head.tensors().items()}, out / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    losses = train(args.out, args.steps)
    print(f"loss {losses[0]:.3f} at first, {sum(losses[-10:]) / len(losses[-10:]):.3f} in the end")


if __name__ == "__main__":
    main()
