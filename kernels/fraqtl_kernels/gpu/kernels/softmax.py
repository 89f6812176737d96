"""Softmax over tiles of keys: soft-capped scores, running sums, sink logits.

Scores are in units of log2: weights are powers of two, exp2(score - running maximum) (Milakov & Gimelshein,
arXiv 1805.02867).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def cap_scores(scores, soft_cap):
    """cap · tanh(s / cap) in units of log2, with tanh(x) = 1 - 2 / (exp(2x) + 1)."""
    return soft_cap * LOG2E * (1 - 2 / (tl.exp2(scores * (2 * LOG2E / soft_cap)) + 1))


@triton.jit
def in_first_column(x, SHAPE: tl.constexpr):
    """(ROWS,) sums as `add_weights` keeps them."""
    if SHAPE.DEFERRED:
        return tl.where(tl.arange(0, SHAPE.TILE)[None, :] == 0, x[:, None], 0.0)
    else:
        return x


@triton.jit
def add_weights(l_i, alpha, weights, SHAPE: tl.constexpr):
    """The running sum over tiles, decayed, with the weights of a tile added: a column of the tile each if DEFERRED."""
    if SHAPE.DEFERRED:
        return l_i * alpha[:, None] + weights
    else:
        return l_i * alpha + tl.sum(weights, 1)


@triton.jit
def add_sink_logits(sink_logits, head, m_i, l_i, SHAPE: tl.constexpr):
    """The softmax sum with exp(sink logit) of the row's query head added. sink_logits: (query heads,)."""
    ROWS: tl.constexpr = SHAPE.ROWS
    sink_logit = tl.load(sink_logits + head * SHAPE.GROUP + tl.arange(0, ROWS) % SHAPE.GROUP).to(tl.float32) * LOG2E
    return l_i + tl.exp2(tl.minimum(sink_logit - m_i, 126.0))
