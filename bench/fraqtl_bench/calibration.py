"""`fraqtl-bench calibration`: how many tokens of the built-in prompt do the constants of a format need?

For each number of tokens, the prompt that servers calibrate with runs through the model at the positions that servers
give it, and a text is scored with the cache stored through the constants found. Positions are `near`, 0, 1, .., and
`far`, the first 64 tokens there and the others at the end of the model's context, where constants that have only seen
early positions lose. No residuals, as in `fraqtl-bench quality`.

With `--server` it starts a server that has no constants yet instead, and tells how long that took to make them.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fraqtl_bench import results
from fraqtl_bench.projection import output_projection
from fraqtl_bench.quality import texts
from fraqtl_bench.quality.cache import logits
from fraqtl_bench.quality.codecs import LayerSample
from fraqtl_bench.quality.fitted import Fitted, fit
from fraqtl_bench.quality.methods import parse
from fraqtl_bench.quality.models import Subject, load
from fraqtl_bench.quality.watch import Seen, watching
from fraqtl_bench.server import running
from fraqtl_kernels.calibration.importance import attend
from fraqtl_kernels.calibration.prompt import SEQUENCES, positions, texts_in_tokens, token_rows
from fraqtl_kernels.errors import ConfigError, UnsupportedError

EXACT = "fp16"
PLACES = ("near", "far")
FIRST = 64  # tokens that stay at the beginning
SERVER_CONTEXT = 4096  # tokens
EMULATION = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")  # variables that make an older processor
ROWS = 128  # of log-probabilities at a time


@torch.inference_mode()
def prompt_samples(subject: Subject, tokens: int, longest: int) -> list[LayerSample]:
    """What a server of context `longest` sees of every layer in a built-in prompt of `tokens` tokens, all sequences."""
    places = positions(longest, tokens // SEQUENCES)
    rows = token_rows(texts_in_tokens(subject.tokenizer), places.shape[1], subject.tokenizer.bos_token_id)
    seen: dict[int, list[Seen]] = defaultdict(list)
    with watching(subject.model, lambda found: seen[found.layer].append(found)):
        for row, place in zip(rows, places, strict=True):
            ids = torch.tensor([row])
            # Without a mask transformers takes a jump of positions for the beginning of another text
            mask = torch.ones_like(ids)
            subject.model(ids, position_ids=place[None], attention_mask=mask, use_cache=False, logits_to_keep=1)
    return [_sample(seen.pop(layer)) for layer in sorted(seen)]


def _sample(passes: Sequence[Seen]) -> LayerSample:
    first = passes[0]
    query, key, value = (torch.cat([getattr(s, name) for s in passes], 1) for name in ("query", "key", "value"))
    _, importance = attend(
        *(x.transpose(0, 1) for x in (query, key, value)),
        sequences=len(passes),
        scale=first.scale,
        window=first.window,
        soft_cap=first.soft_cap,
        projection=output_projection(first.module, query.shape[-1]),
    )
    return LayerSample(query, key, value, importance)


@dataclass
class Losses:
    """Sums over scored tokens. loss: -log p, of the exact model too. divergence: of its distribution from this one."""

    loss: float = 0.0
    exact: float = 0.0
    squares: float = 0.0  # of the differences of the two
    divergence: float = 0.0
    tokens: int = 0

    def add(self, targets: Tensor, exact: Tensor, found: Tensor) -> None:
        """targets (n,) ids, exact and found (n, vocabulary) logits."""
        for wanted, own, other in zip(targets.split(ROWS), exact.split(ROWS), found.split(ROWS), strict=True):
            sure, guess = own.log_softmax(-1), other.log_softmax(-1)
            self.divergence += float((sure.exp() * (sure - guess)).sum(dtype=torch.float64))
            at_exact, at_found = (-x.gather(1, wanted[:, None]).double() for x in (sure, guess))
            self.loss, self.exact = self.loss + float(at_found.sum()), self.exact + float(at_exact.sum())
            self.squares += float((at_found - at_exact).square().sum())
        self.tokens += len(targets)

    def row(self) -> dict[str, float]:
        """perplexity; increase: of it, as a share; standard_error: of that, over tokens; divergence: nats a token."""
        difference = (self.loss - self.exact) / self.tokens
        variance = max(0.0, self.squares / self.tokens - difference**2)
        return {
            "perplexity": math.exp(self.loss / self.tokens),
            "increase": math.expm1(difference),
            "standard_error": math.sqrt(variance / self.tokens),
            "divergence": self.divergence / self.tokens,
            "tokens": self.tokens,
        }


def far(tokens: int, longest: int) -> Tensor:
    """(tokens,) positions: the first at the beginning of the context, the others at its end."""
    first = min(FIRST, tokens)
    return torch.cat([torch.arange(first), torch.arange(longest - (tokens - first), longest)])


def measure(
    subject: Subject, windows: Sequence[texts.Window], methods: dict[str, Fitted], longest: int
) -> dict[str, dict[str, dict[str, float]]]:
    """By place and method the figures of `Losses.row`."""
    found: dict[str, dict[str, Losses]] = {place: defaultdict(Losses) for place in PLACES}
    for window in track(windows, description=subject.name):
        count = len(window.ids) - 1
        targets = torch.tensor(window.ids[window.first :])
        for place, where in zip(PLACES, (torch.arange(count), far(count, longest)), strict=True):
            exact = logits(subject.model, window.ids[:-1], None, window.scored, where).float()
            found[place][EXACT].add(targets, exact, exact)
            for name, fitted in methods.items():
                rows = logits(subject.model, window.ids[:-1], fitted.layers, window.scored, where).float()
                found[place][name].add(targets, exact, rows)
    return {place: {name: losses.row() for name, losses in by_name.items()} for place, by_name in found.items()}


def table(name: str, found: dict[str, dict[str, dict[str, float]]]) -> Table:
    made = Table(title=f"{name}: {next(iter(found['near'].values()))['tokens']} scored tokens")
    for column in ("prompt tokens", *(f"{place}: {x}" for place in PLACES for x in ("PPL", "increase", "KL"))):
        made.add_column(column, justify="right")
    for method in found["near"]:
        rows = (found[place][method] for place in PLACES)
        cells = ((f"{r['perplexity']:.3f}", f"{r['increase']:+.2%}", f"{r['divergence']:.4f}") for r in rows)
        made.add_row(method, *(cell for part in cells for cell in part))
    return made


def server_seconds(args: argparse.Namespace) -> float:
    """Seconds of calibration, by the log of a server with an empty cache folder. Raises FraqtlError if it has none."""
    with tempfile.TemporaryDirectory(prefix="fraqtl-calibration-") as cache:
        options = ["--kv-format", args.kv_format, "--kv-calibration-cache", cache, "--kv-cache-memory-bytes", "512M"]
        with running(args.model, *options, "--max-model-len", str(args.context or SERVER_CONTEXT)) as server:
            found = re.search(r"KV cache calibrated in ([\d.]+) s.*from the built-in prompt", server.log)
    if found is None:
        raise UnsupportedError(f"the server did not calibrate {args.kv_format}: give a calibrated format such as k4v4")
    return float(found[1])


def run(args: argparse.Namespace) -> None:
    if args.server:
        took = server_seconds(args)
        print(f"{args.model}: calibrated in {took:g} s")
        if args.out:
            environment = {name: os.environ[name] for name in EMULATION if name in os.environ}
            settings = {"model": Path(args.model).name, "kv_format": args.kv_format, "environment": environment}
            results.save(args.out, {**settings, "calibration_seconds": took})
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    for tokens in args.prompt_tokens:
        if tokens < SEQUENCES:
            raise ConfigError(f"--prompt-tokens {tokens} is too few: give {SEQUENCES} or more, one a sequence")
    subject = load(args.model, None, "cpu")
    longest = args.context or subject.max_length
    if not args.window <= longest <= subject.max_length:
        raise ConfigError(
            f"--context {longest} is not possible: give {args.window} (the window) to {subject.max_length}"
        )
    pieces = texts.token_stream(subject.tokenizer, texts.pieces(args.text, "test", 0, subject.tokenizer))
    bos = texts.begins_with_bos(subject.tokenizer)
    windows = list(texts.windows(islice(pieces, args.tokens), args.window, args.window, args.tokens, bos))
    if not windows:
        raise ConfigError(f"text {args.text!r} is too short: nothing in it can be scored")
    method = parse(args.kv_format)
    methods: dict[str, Fitted] = {}
    seconds: dict[str, float] = {}
    for tokens in args.prompt_tokens:
        start = time.perf_counter()
        methods[str(tokens)] = fit(method, prompt_samples(subject, tokens, longest))
        seconds[str(tokens)] = round(time.perf_counter() - start, 2)
    found = measure(subject, windows, methods, longest)
    Console().print(table(subject.name, found))
    if args.out:
        settings = {"model": subject.name, "kv_format": args.kv_format, "text": Path(args.text).name}
        settings |= {"window": args.window, "context": longest, "dtype": "float32"}
        results.save(args.out, {**settings, "lab_seconds": seconds, "prompt_tokens": found})


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "calibration", help="perplexity against the tokens of the calibration prompt", description=__doc__
    )
    parser.add_argument("model", metavar="MODEL", help="folder, Hub name or `demo`")
    parser.add_argument("--text", default=texts.GENERATED, help="as of `quality` (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], metavar="N")
    parser.add_argument("--kv-format", default="k4v4", help="(default: %(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="tokens a window (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, help="of the server, in tokens (default: the model's; with --server 4096)"
    )
    parser.add_argument("--server", action="store_true", help="measure the seconds at the start of a server instead")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.set_defaults(run=run)
