"""Adaptive bits: which server format for which layer, under a budget of bits per dimension.

What each layer costs in each format while all others stay fp16 (`sensitivity.py`) is measured on a search text, from
the calibration split, so that the test text stays unseen. The costs of layers are taken to add up; then the best
allocation is found exactly by dynamic programming over bytes. What it gives is measured on the held-out windows
beside the uniform formats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fraqtl_bench.quality import texts
from fraqtl_bench.quality.fitted import Fitted, fit
from fraqtl_bench.quality.lab import Lab
from fraqtl_bench.quality.methods import BASELINE, parse
from fraqtl_bench.quality.schema import Allocation
from fraqtl_bench.quality.score import perplexity
from fraqtl_bench.quality.sensitivity import sensitivity
from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import FORMATS

PROFILE_VERSION = 1  # what fraqtl_serve reads, which bench doesn't import: a test goes from one to the other


def candidates(head_size: int) -> dict[str, int]:
    """Bytes per (token, KV head) of the server's quantized formats."""
    return {name: f.bytes_per_token(head_size) for name, f in FORMATS.items() if f.is_quantized}


def bits_per_dim(total_bytes: float, layers: int, head_size: int) -> float:
    return total_bytes * 8 / (layers * 2 * head_size)


def allocate(cost: Mapping[str, Sequence[float]], size: Mapping[str, int], limit: int) -> list[str]:
    """The format of every layer with the least summed cost and at most `limit` bytes in all.

    cost: format -> per layer. size: format -> bytes. Exact: the best of every reachable
    number of bytes, layer by layer.
    Raises ConfigError if even the smallest format is too large.
    """
    layers = len(next(iter(cost.values())))
    best: dict[int, tuple[float, tuple[str, ...]]] = {0: (0.0, ())}
    for layer in range(layers):
        reached: dict[int, tuple[float, tuple[str, ...]]] = {}
        for used, (total, chosen) in best.items():
            for name in cost:
                at = used + size[name]
                entry = (total + cost[name][layer], (*chosen, name))
                if at <= limit and entry[0] < reached.get(at, (math.inf,))[0]:
                    reached[at] = entry
        best = reached
    if not best:
        smallest = min(size, key=lambda name: size[name])
        raise ConfigError(f"the budget is below {smallest}, the smallest format: give more")
    return list(min(best.values())[1])


def check_budget(budget: float, head_size: int) -> None:
    """Raises ConfigError if no format is small enough."""
    sizes = candidates(head_size)
    name = min(sizes, key=lambda n: sizes[n])
    least = bits_per_dim(sizes[name], 1, head_size)
    if budget < least:
        raise ConfigError(
            f"a budget of {budget:g} bits per dimension is below the smallest format: {name} takes {least:g} "
            f"at head size {head_size}"
        )


def search(lab: Lab, budget: float, search_tokens: int) -> Allocation:
    """Find and measure the allocation for one model."""
    size, layers = lab.subject.head_size, lab.subject.layers
    check_budget(budget, size)
    sizes = candidates(size)
    fitted = {name: fit(parse(name), lab.samples) for name in (BASELINE, *sizes)}
    windows = _search_windows(lab, search_tokens)
    cost = sensitivity(lab, windows, fitted[BASELINE], {name: fitted[name] for name in sizes})
    limit = math.floor(budget * layers * 2 * size / 8)
    chosen = allocate(cost, sizes, limit)
    mixed = Fitted(fitted[BASELINE].method, tuple(fitted[name].layers[i] for i, name in enumerate(chosen)))
    held_out = list(lab.windows())
    uniform = {
        name: _perplexity(lab, "window", held_out, fitted[name])
        for name in sizes
        if sizes[name] * layers <= limit or name in chosen
    }
    affordable = [name for name in uniform if sizes[name] * layers <= limit]
    best = min(affordable, key=lambda name: uniform[name])
    return Allocation(
        budget=budget,
        bits_per_dim=bits_per_dim(sum(sizes[name] for name in chosen), layers, size),
        formats=chosen,
        sensitivity=cost,
        perplexity=_perplexity(lab, f"mixed {' '.join(chosen)}", held_out, mixed),
        best_uniform=best,
        best_uniform_bits=bits_per_dim(sizes[best], 1, size),
        best_uniform_perplexity=uniform[best],
        uniform=uniform,
        search_tokens=sum(w.scored for w in windows),
        held_out_tokens=sum(w.scored for w in held_out),
    )


def _search_windows(lab: Lab, tokens: int) -> list[texts.Window]:
    """Windows of the calibration split, behind the tokens that calibrated."""
    s, tokenizer = lab.settings, lab.subject.tokenizer
    stream = texts.token_stream(tokenizer, texts.pieces(s.calibration, "calibration", s.seed, tokenizer))
    own = list(islice(stream, s.calibration_tokens + tokens))[s.calibration_tokens :]
    if len(own) < 2:
        raise ConfigError(f"the calibration text {s.calibration!r} is too short to search on: give a longer one")
    return list(texts.windows(own, s.window, s.window - len(lab.bos), None, lab.bos))


def _perplexity(lab: Lab, key: str, windows: Sequence[texts.Window], fitted: Fitted) -> float:
    found = []
    for window in windows:
        found.append(lab.scored(f"{key} {window.index}", window.ids, window.first, fitted))
        lab.ticker.tick("budget", key)
    return perplexity(found)


def profile(model: str, head_size: int, allocation: Allocation) -> dict[str, Any]:
    """`fraqtl-profile.json`: which format each layer's cache has. The schema is in docs/reference/quality-lab.md."""
    return {
        "schema_version": PROFILE_VERSION,
        "model": model,
        "head_size": head_size,
        "bits_per_dim": allocation.bits_per_dim,
        "layers": [
            {"layer": i, "kv_format": name, "k_bits": FORMATS[name].k.bits, "v_bits": FORMATS[name].v.bits}
            for i, name in enumerate(allocation.formats)
        ],
        "held_out": {
            "perplexity": allocation.perplexity,
            "uniform": allocation.best_uniform,
            "uniform_perplexity": allocation.best_uniform_perplexity,
            "tokens": allocation.held_out_tokens,
        },
    }


def write_profile(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
