"""Teacher forcing: how probable a model finds given tokens, and whether it would have said them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fraqtl_bench.quality.cache import logits
from fraqtl_bench.quality.fitted import FittedLayer
from fraqtl_bench.quality.uncertainty import standard_error

ROWS_AT_ONCE = 256  # of logits that are turned to float32 together


@dataclass(frozen=True)
class Score:
    """nll: negative log-likelihood of `tokens` tokens, in nats. right: whether each was the most probable one.

    As every method stores each token by itself, `right` says that greedy decoding would give these tokens.
    """

    nll: float
    tokens: int
    right: bool

    @property
    def perplexity(self) -> float:
        return perplexity([self])


def perplexity(scores: Iterable[Score]) -> float:
    """exp of the mean negative log-likelihood of a token; infinite if it overflows."""
    scores = list(scores)
    mean = sum(s.nll for s in scores) / sum(s.tokens for s in scores)
    return math.exp(mean) if mean < 700 else math.inf


def compare_perplexity(scores: Sequence[Score], baseline: Sequence[Score]) -> tuple[float, float | None]:
    """Perplexity minus that of the baseline on the same windows, and its standard error, by the same text of both."""
    found = perplexity(scores)
    gained = [a.nll - b.nll for a, b in zip(scores, baseline, strict=True)]
    error = standard_error(gained, [s.tokens for s in scores])
    return found - perplexity(baseline), None if error is None else found * error


def score(model: Any, ids: Sequence[int], first: int, layers: Sequence[FittedLayer] | None) -> Score:
    """Score the tokens ids[first:], each given all before it, with the cache in `layers` (None: untouched)."""
    rows = logits(model, ids[:-1], layers, len(ids) - first)
    return score_rows(rows, torch.tensor(list(ids[first:]), device=rows.device))


def score_rows(rows: Tensor, targets: Tensor) -> Score:
    """rows (n, vocabulary) of logits, each for the token of `targets` (n,)."""
    nll, right = 0.0, True
    for some, wanted in zip(rows.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
        logs = some.float().log_softmax(-1)
        nll -= float(logs.gather(-1, wanted[:, None]).double().sum())
        right = right and bool((logs.argmax(-1) == wanted).all())
    return Score(nll, len(targets), right)
