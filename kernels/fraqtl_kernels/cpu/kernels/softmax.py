"""Rows of scores between the two products of attention, eight at a time, compiled.

Arrays are float32, contiguous, and WIDTH numbers longer than what is in them: what lies behind may be read, and is
left as it is.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from fraqtl_kernels.cpu.kernels.lanes import (
    WIDTH,
    exp,
    first_of,
    fma,
    larger,
    largest,
    load,
    load_float16,
    magnitude,
    splat,
    store,
    total,
    where_negative,
)


@njit(cache=True, nogil=True)
def load_scales(address, count, scales, at):
    """scales[at:] <- fp16 numbers in memory. count: a multiple of WIDTH, or what is behind them may be read."""
    for n in range(0, count, WIDTH):
        store(scales, at + n, load_float16(address + 2 * n))


@njit(cache=True, nogil=True)
def scale_scores(scores, count, zero, score_bias, outlier_bias, scales):
    """Products with codes become scores: (x - zero) · |scale| + score_bias, and + outlier_bias where a scale's sign bit
    is set."""
    less, biased, biased_outlier = splat(-zero), splat(score_bias), splat(score_bias + outlier_bias)
    for n in range(0, count, WIDTH):
        x, scale = load(scores, n), load(scales, n)
        found = fma(x + less, magnitude(scale), where_negative(scale, biased_outlier, biased))
        store(scores, n, first_of(count - n, found, x))


@njit(cache=True, nogil=True)
def highest(scores, first, after, m_i):
    """The largest of `m_i` and scores[first:after], NaN left out."""
    found = splat(m_i)
    for n in range(first, after, WIDTH):
        found = larger(first_of(after - n, load(scores, n), found), found)
    return largest(found)


@njit(cache=True, nogil=True, error_model="numpy")
def share_of_keys(sinks, head, m, m_i, l_i):
    """The weights of all keys of a query together: l_i / (l_i + e^(sink - m_i)).

    sinks: (KV heads, query heads of each), or (KV heads, 0): then the share is 1. m_i: in the sinks' own terms, the
    constants of all scores included.
    """
    if sinks.shape[1] == 0:
        return np.float32(1)
    return l_i / (l_i + np.exp(sinks[head, m] - m_i))


@njit(cache=True, nogil=True)
def weigh(scores, first, after, m_i, scales, weights):
    """weights[n] <- e^(scores[n] - m_i) · |scales[n]| for n = first .. after - 1, 0 in the rest of the last eight.

    Returns the sums without and with the scales.
    """
    nothing = splat(np.float32(0))
    less, sums, scaled_sums = splat(-m_i), nothing, nothing
    for n in range(first, after, WIDTH):
        weight = first_of(after - n, exp(load(scores, n) + less), nothing)
        scaled = first_of(after - n, weight * magnitude(load(scales, n)), nothing)
        sums, scaled_sums = sums + weight, scaled_sums + scaled
        store(weights, n, scaled)
    return total(sums), total(scaled_sums)
