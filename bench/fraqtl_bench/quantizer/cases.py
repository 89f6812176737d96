"""The inputs of the ablation: keys, queries and values made like known trouble, or captured from a model.

Synthetic heads: keys and queries are Gaussian before RoPE (theta 1,000,000), a case changes them there,
and values are Gaussian. The calibration sample covers positions 0..511, the measured one 0..1023 with
other random numbers, so constants must hold for tokens and positions they were not made from.

Softmax is made realistically peaked: queries are scaled, in both samples by the same number, until an
exact attention row of the measured sample spreads over 16 keys on average (exp of the mean entropy).
Captured queries stay as they are.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fraqtl_kernels.calibration.importance import Importance

CALIBRATION_TOKENS = 512
TOKENS = 1024
QUERIES = 256
ATTENDED_KEYS = 16
ROPE_THETA = 1_000_000.0
HEADS = 2  # a synthetic case is the mean over this many heads
SINKS = 4
BIAS = 20.0


@dataclass(frozen=True)
class Sample:
    """Keys and values (T, D) after RoPE, queries (n, D) and which keys each sees (n, T).

    query_weight: (n,), value_weight: (T,), value_direction: (D, D), see
    `fraqtl_kernels.calibration.importance`; None: all alike.
    """

    key: Tensor
    value: Tensor
    query: Tensor
    seen: Tensor
    query_weight: Tensor | None = None
    value_weight: Tensor | None = None
    value_direction: Tensor | None = None

    @property
    def by_head(self) -> tuple[Tensor, Tensor, Tensor, Importance | None]:
        """Key, query, value and importance as `fraqtl_kernels.calibration.solve.calibrate` takes them, for one head."""
        importance = None
        if self.query_weight is not None and self.value_weight is not None:
            direction = None if self.value_direction is None else self.value_direction[None]
            importance = Importance(self.query_weight[:, None], self.value_weight[:, None], direction)
        return self.key[:, None], self.query[:, None], self.value[:, None], importance

    def scores(self, key: Tensor | None = None) -> Tensor:
        """q·k / sqrt(D), -inf where not seen: (n, T). With `key` in the place of the sample's own."""
        scores = self.query @ (self.key if key is None else key).T / math.sqrt(self.key.shape[-1])
        return scores.masked_fill(~self.seen, -math.inf)


@dataclass(frozen=True)
class Head:
    """One KV head: the sample to calibrate on and the sample to measure."""

    calibration: Sample
    measured: Sample


@dataclass(frozen=True)
class Case:
    name: str
    head_size: int
    heads: tuple[Head, ...]
    family: str


def causal(tokens: int, queries: int) -> Tensor:
    """Which keys the last `queries` of `tokens` positions see: (queries, tokens)."""
    return torch.arange(tokens) <= torch.arange(tokens - queries, tokens)[:, None]


def rope(x: Tensor, positions: Tensor, theta: float = ROPE_THETA) -> Tensor:
    """x (T, D) turned by position · theta^(-2i/D) in every pair (i, i + D/2) (Su et al., 2021)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half) / half)
    low, high = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


@dataclass
class Raw:
    """A synthetic sample before RoPE, for a case to change, and the vectors that it adds after RoPE."""

    key: Tensor
    query: Tensor
    value: Tensor


Change = Callable[[Raw, torch.Generator], None]


def outliers(channels: int, times: float, hidden: bool) -> Change:
    """`channels` random key channels are `times` as large; if hidden, the queries are as much smaller there."""

    def change(raw: Raw, head: torch.Generator) -> None:
        chosen = torch.randperm(raw.key.shape[-1], generator=head)[:channels]
        raw.key[:, chosen] *= times
        if hidden:
            raw.query[:, chosen] /= times

    return change


def bias(raw: Raw, head: torch.Generator) -> None:
    """A constant of size 20 with random signs on the slowest eighth of the RoPE pairs, as in Qwen2."""
    half = raw.key.shape[-1] // 2
    slow = torch.arange(half - half // 8, half)
    slow = torch.cat([slow, slow + half])
    raw.key[:, slow] += BIAS * torch.randn(len(slow), generator=head).sign()


def tails(raw: Raw, head: torch.Generator) -> None:
    """Student's t with 3 degrees of freedom, scaled to variance 1: Gaussian / sqrt(chi² / 3) / sqrt(3)."""
    for x in (raw.key, raw.value):
        chi = sum(torch.randn(x.shape, generator=head).square() for _ in range(3))
        x /= torch.as_tensor(chi).sqrt().clamp_min(1e-3)


def benign(raw: Raw, head: torch.Generator) -> None:
    """Gaussian keys, queries and values."""


def add_sinks(sample: Sample, times: float, head: torch.Generator) -> Sample:
    """The first 4 keys get `times` the norm in one direction and values of a tenth.

    Queries have a constant share of that direction which lifts a sink's score by three standard
    deviations of ordinary scores, so that sinks take part in most rows and rule few.
    """
    size = sample.key.shape[-1]
    direction = torch.nn.functional.normalize(torch.randn(size, generator=head), dim=0)
    key, value = sample.key.clone(), sample.value.clone()
    key[:SINKS] += times * math.sqrt(size) * direction
    value[:SINKS] /= 10
    query = sample.query - torch.outer(sample.query @ direction, direction) + 3 / times * direction
    return replace(sample, key=key, value=value, query=query)


def attended_keys(sample: Sample) -> float:
    """exp of the mean entropy of the exact attention rows."""
    log_weights = sample.scores().log_softmax(-1)
    entropy = -(log_weights.exp() * log_weights.clamp_min(-1e9)).sum(-1)
    return math.exp(entropy.mean().item())


def peakedness(sample: Sample) -> float:
    """The number that queries are multiplied by so that rows spread over `ATTENDED_KEYS` keys (bisection)."""
    low, high = 1e-4, 1e4
    for _ in range(40):
        middle = math.sqrt(low * high)
        wide = attended_keys(replace(sample, query=sample.query * middle)) > ATTENDED_KEYS
        low, high = (middle, high) if wide else (low, middle)
    return math.sqrt(low * high)


def _sample(tokens: int, size: int, change: Change, seed: int, head_seed: int) -> Sample:
    """Random numbers from `seed`; what belongs to the head (its channels) from `head_seed`."""
    generator = torch.Generator().manual_seed(seed)
    key, query, value = (torch.randn(n, size, generator=generator) for n in (tokens, QUERIES, tokens))
    raw = Raw(key, query, value)
    change(raw, torch.Generator().manual_seed(seed + 1 if change is tails else head_seed))
    positions = torch.arange(tokens)
    key, query = rope(raw.key, positions), rope(raw.query, positions[-QUERIES:])
    return Sample(key, raw.value, query, causal(tokens, QUERIES))


def synthetic_head(size: int, change: Change, sinks: float, seed: int) -> Head:
    first, second = (
        _sample(tokens, size, change, seed + i, seed) for i, tokens in ((2, CALIBRATION_TOKENS), (4, TOKENS))
    )
    if sinks:
        first, second = (add_sinks(s, sinks, torch.Generator().manual_seed(seed)) for s in (first, second))
    times = peakedness(second)
    return Head(*(replace(s, query=s.query * times) for s in (first, second)))


def synthetic_cases(sizes: tuple[int, ...], seed: int) -> Iterator[Case]:
    """Every synthetic case at every head size; a case's numbers depend on nothing but `seed` and its name."""
    changes: dict[str, tuple[str, Change, float]] = {
        "gaussian": ("gaussian", benign, 0),
        "heavy tails": ("heavy tails", tails, 0),
        "bias": ("bias", bias, 0),
        "sinks 10x": ("sinks", benign, 10),
        "sinks 30x": ("sinks", benign, 30),
    }
    for hidden in (False, True):
        for channels in (1, 2, 4):
            for times in (8, 16, 30):
                name = f"{channels} outlier{'s' if channels > 1 else ''} {times}x{' hidden' if hidden else ''}"
                changes[name] = ("hidden outliers" if hidden else "outliers", outliers(channels, times, hidden), 0)
    for size in sizes:
        for name, (family, change, sinks) in changes.items():
            start = zlib.crc32(f"{seed} {name} {size}".encode()) * 100
            heads = (synthetic_head(size, change, sinks, start + 10 * h) for h in range(HEADS))
            yield Case(f"{name}, D={size}", size, tuple(heads), family)
