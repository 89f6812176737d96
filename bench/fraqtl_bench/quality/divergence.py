"""How far the next token's distribution moves from that of the same model with a 16-bit cache.

Perplexity asks for one token of each distribution, and its gains hide losses. These look at all of it:

- KL divergence, KL(16-bit ‖ stored), in nats: its mean, and percentiles, since rare large ones are what users see
- total variation, half the sum of the differences of the probabilities: at most this share of sampled tokens changes
- agreement: how often the most probable token stays the same
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fraqtl_bench.quality.schema import ContextDivergence, DivergenceSummary
from fraqtl_bench.quality.score import ROWS_AT_ONCE
from fraqtl_bench.quality.uncertainty import standard_error

SHORTEST = 128  # contexts up to this length are one class; the next ones are twice as long each


@dataclass(frozen=True)
class Divergence:
    """Of the scored tokens of a window, one number each.

    context: how many tokens the first distribution was given; each following one was given one more. kl: in nats.
    total_variation: 0 to 1. same: whether both find the same token the most probable.
    """

    context: int
    kl: list[float]
    total_variation: list[float]
    same: list[bool]


def compare(rows: Tensor, reference: Tensor, context: int) -> Divergence:
    """rows, reference: (n, vocabulary) logits of the stored and of the 16-bit cache. context: as in `Divergence`."""
    kl, variation, same = [], [], []
    for some, exact in zip(rows.split(ROWS_AT_ONCE), reference.split(ROWS_AT_ONCE), strict=True):
        logs, wanted = some.float().log_softmax(-1), exact.float().log_softmax(-1)
        p = wanted.exp()
        kl.append((p * (wanted - logs)).nan_to_num(0.0).sum(-1).clamp_min(0.0))  # 0 · (-inf + inf) is nothing
        variation.append((p - logs.exp()).abs().sum(-1) / 2)
        same.append(logs.argmax(-1) == wanted.argmax(-1))
    return Divergence(context, torch.cat(kl).tolist(), torch.cat(variation).tolist(), torch.cat(same).tolist())


def summarize(windows: Sequence[Divergence]) -> DivergenceSummary:
    """Over all tokens, and by the length of their context."""
    kl = torch.tensor([x for w in windows for x in w.kl], dtype=torch.float64)
    return DivergenceSummary(
        **_means(windows),
        kl_p99=float(kl.quantile(0.99)),
        kl_p999=float(kl.quantile(0.999)),
        by_context=[ContextDivergence(up_to=up_to, **_means(parts)) for up_to, parts in _by_context(windows)],
    )


def _means(windows: Sequence[Divergence]) -> dict[str, Any]:
    counts = [len(w.kl) for w in windows]
    found: dict[str, Any] = {"tokens": sum(counts)}
    for name, of in (("kl", "kl"), ("total_variation", "total_variation"), ("agreement", "same")):
        sums = [float(sum(getattr(w, of))) for w in windows]
        found[name] = sum(sums) / sum(counts)
        found[f"{name}_error"] = standard_error(sums, counts)
    return found


def _class_of(context: int) -> int:
    """The longest context of the class that `context` is in."""
    return SHORTEST if context <= SHORTEST else 1 << (context - 1).bit_length()


def _by_context(windows: Iterable[Divergence]) -> Iterator[tuple[int, list[Divergence]]]:
    found: dict[int, list[Divergence]] = {}
    for w in windows:
        classes = [_class_of(w.context + i) for i in range(len(w.kl))]
        for up_to, places in groupby(range(len(classes)), classes.__getitem__):
            first, *others = places
            part = slice(first, first + 1 + len(others))
            cut = Divergence(w.context + first, w.kl[part], w.total_variation[part], w.same[part])
            found.setdefault(up_to, []).append(cut)
    yield from sorted(found.items())
