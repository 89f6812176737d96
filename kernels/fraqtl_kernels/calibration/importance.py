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

from fraqtl_kernels.threads import in_parallel

ROWS = 128  # queries at a time


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
    sink_logits: Tensor | None = None,
    projection: Tensor | None = None,
) -> tuple[Tensor, Importance]:
    """Attention within every sequence: float32 like query.

    query: (tokens, query heads, D), key, value: (tokens, KV heads, D), sequences of equal length one after another.
    sink_logits: (query heads,), of a key with a value of zero. projection: (query heads, D, D), W W^T of every head, if
    it is known.
    """
    split = (x.unflatten(0, (sequences, -1)).unbind() for x in (query, key, value))
    rows: list[tuple[Tensor, Tensor, Tensor]] = list(zip(*split, strict=True))

    def attend_row(row: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return _sequence(*row, scale, window, soft_cap, sink_logits)

    attended = in_parallel(attend_row, rows) if query.device.type == "cpu" else [attend_row(row) for row in rows]
    out, query_weights, value_weights = (torch.cat(parts) for parts in zip(*attended, strict=True))
    by_group = value_weights.unflatten(1, (key.shape[1], -1))  # (tokens, KV heads, query heads a KV head)
    direction = None
    if projection is not None:
        direction = torch.einsum("hg,hgij->hij", by_group.sum(0), projection.to(out).unflatten(0, by_group.shape[1:]))
    return out, Importance(query_weights, by_group.sum(-1), direction)


def _sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (T, query heads, D) and the factors of queries and values, (T, query heads), of one sequence.

    Queries go in rows of `ROWS`, each against the keys that its last one sees and its first one has not lost to the
    window: so no more scores are made than about half of them, and a row's stay in the processor's cache.
    """
    tokens, heads, size = query.shape
    kv_heads = key.shape[1]
    q = (query.float() * scale).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # (KV heads, query heads of it, T, D)
    k, v = key.float().permute(1, 2, 0).contiguous(), value.float().transpose(0, 1).contiguous()
    # |v_j - o_i|² is written out, so that no (queries, keys, D) tensor is needed: |v_j|² and 1 become columns of v
    norm = v.square().sum(-1, keepdim=True)
    wide = torch.cat([v, norm, torch.ones_like(norm)], -1)
    out = torch.empty(kv_heads, heads // kv_heads, tokens, size, dtype=v.dtype, device=v.device)
    query_weights = torch.empty(kv_heads, heads // kv_heads, tokens, dtype=v.dtype, device=v.device)
    value_weights = torch.zeros_like(query_weights)
    position = torch.arange(tokens, device=v.device)
    for begin in range(0, tokens, ROWS):
        end = min(begin + ROWS, tokens)
        first = 0 if window is None else max(0, begin - window + 1)
        distance = position[begin:end, None] - position[first:end]
        unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = (q[:, :, begin:end].flatten(1, 2) @ k[..., first:end]).unflatten(1, (-1, end - begin))
        if soft_cap:
            scores = scores.div_(soft_cap).tanh_().mul_(soft_cap)
        weights = _weights(scores.masked_fill_(unseen, -torch.inf), sink_logits)
        attended = (weights.flatten(1, 2) @ v[:, first:end]).unflatten(1, (-1, end - begin))
        squares = weights.square_()
        moment, of_norm, total = (
            (squares.flatten(1, 2) @ wide[:, first:end]).unflatten(1, (-1, end - begin)).split([size, 1, 1], -1)
        )
        of_scores = (
            of_norm - 2 * (attended * moment).sum(-1, keepdim=True) + total * attended.square().sum(-1, keepdim=True)
        )
        out[:, :, begin:end], query_weights[:, :, begin:end] = attended, of_scores.squeeze(-1)
        value_weights[:, :, first:end] += squares.sum(-2)
    out, query_weights, value_weights = (x.flatten(0, 1).transpose(0, 1) for x in (out, query_weights, value_weights))
    return out, query_weights.clamp_min(0), value_weights


def _weights(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """The softmax of scores (KV heads, query heads of each, queries, keys), beside a sink if there is one."""
    if sink_logits is None:
        return scores.softmax(-1)
    sink = sink_logits.to(scores).view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1].contiguous()
