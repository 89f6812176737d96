"""Causal attention of the calibration prompt, and how much the errors of each query's scores and of each value matter.

With weights p_ij, an error d_j of the scores changes the output o_i by Σ_j p_ij (v_j - o_i) d_j, to first order, and
an error e_j of the values changes it by Σ_j p_ij e_j. Errors of different keys are independent, so their mean squares
add up with the factors

    of the scores of query i:  Σ_j p_ij² |v_j - o_i|²        of value j:  Σ_i p_ij²

The model goes on with the outputs of all heads times a matrix. With W_h the rows of it that head h meets, an error e
of its output costs |e W_h|² = e W_h W_h^T e^T, and one of the values that times the sum of p_ij², added up over the
heads that share them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Importance:
    """query: (tokens, query heads). value: (tokens, KV heads). fp32, at least 0, of any unit.

    direction: (KV heads, D, D), an error e of a value costs e G e^T; None: its square.
    """

    query: Tensor
    value: Tensor
    direction: Tensor | None = None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sequences: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    projection: Tensor | None = None,
) -> tuple[Tensor, Importance]:
    """Attention within every sequence: float32 like query.

    query: (tokens, query heads, D), key, value: (tokens, KV heads, D), sequences of equal length one after another.
    projection: (query heads, D, D), W W^T of every head, if it is known.
    """
    rows = zip(*(x.unflatten(0, (sequences, -1)) for x in (query, key, value)), strict=True)
    # One by one, for the memory that scores of all query heads take
    found = [_sequence(q, k, v, scale, window, soft_cap) for q, k, v in rows]
    out, of_queries, of_values = (torch.cat(parts) for parts in zip(*found, strict=True))
    by_group = of_values.unflatten(1, (key.shape[1], -1))  # (tokens, KV heads, query heads a KV head)
    direction = None
    if projection is not None:
        direction = torch.einsum("hg,hgij->hij", by_group.sum(0), projection.to(out).unflatten(0, by_group.shape[1:]))
    return out, Importance(of_queries, by_group.sum(-1), direction)


def _sequence(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, soft_cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.float().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = weights @ v
    squares = weights.square()
    # |v_j - o_i|² written out, so that no (queries, keys, D) tensor is needed
    of_queries = squares @ v.square().sum(-1, keepdim=True) - 2 * (out * (squares @ v)).sum(-1, keepdim=True)
    of_queries = of_queries.squeeze(-1) + squares.sum(-1) * out.square().sum(-1)
    return out.transpose(0, 1), of_queries.clamp_min(0).T, squares.sum(-2).T
