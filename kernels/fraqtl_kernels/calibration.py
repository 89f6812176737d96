"""The constants of a layer from keys, queries and values of a few texts: plain statistics, no search.

Per KV head: the centre is the mean of ordinary keys, the sink centre that of keys far from their median,
and the exponents even out RoPE pairs. What each of them gives is measured by `fraqtl-bench quantiser`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.constants import LARGEST_EXPONENT, LayerConstants
from fraqtl_kernels.formats import KVFormat, VectorFormat

SINK_DISTANCE = 3.0  # times the median distance from the median key: no ordinary key is as far
_TINY = 1e-6


def calibrate(format: KVFormat, key: Tensor, query: Tensor, value: Tensor) -> LayerConstants:
    """The constants with which `format` stores the keys and values of a layer.

    key, value: (tokens, KV heads, D). query: (tokens, query heads, D). All as attention receives
    them, after RoPE, floating point, of at least one token. Returns fp32 and int8 tensors on the device of `key`.
    """
    key, query, value = (x.float() for x in (key, query, value))
    key_scale = static_scale(key, format.k) if format.k.static else None
    value_scale = static_scale(value, format.v) if format.v.static else None
    if not format.k.centred:
        return LayerConstants(key_scale=key_scale, value_scale=value_scale)
    is_sink = far_from_the_median(key)
    centre = mean_of(key, ~is_sink)
    exponent = pair_exponents((key - centre).masked_fill(is_sink[..., None], 0), query)
    sink_centre = torch.where(is_sink.any(0)[:, None], mean_of(key, is_sink), centre)
    has_sinks = bool(is_sink.any())
    return LayerConstants(centre, exponent, sink_centre if has_sinks else None, key_scale, value_scale)


def static_scale(x: Tensor, vector: VectorFormat) -> Tensor:
    """Symmetric steps of every channel, max|x| / (2^(bits-1) - 1). x: (tokens, KV heads, D) -> (KV heads, D)."""
    return (x.abs().amax(0) / (vector.edge - 1)).clamp_min(_TINY)


def far_from_the_median(key: Tensor) -> Tensor:
    """Which keys (tokens, KV heads, D) are sinks: (tokens, KV heads) bool."""
    distance = (key - key.median(0).values).norm(dim=-1)
    return distance > SINK_DISTANCE * distance.median(0).values


def mean_of(key: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the chosen tokens, (KV heads, D); zero where none is. chosen: (tokens, KV heads) bool."""
    total = (key * chosen[..., None]).sum(0)
    return total / chosen.sum(0).clamp_min(1)[:, None]


def pair_exponents(key: Tensor, query: Tensor) -> Tensor:
    """log2 of the factors that keys are divided by, (KV heads, D) int8, equal within a RoPE pair (i, i + D/2).

    Behind a rotation the error of k / f is spread evenly, so the mean squared error of q·k is in proportion to
    Σ_i f_i² m_q,i² · Σ_j m_k,j² / f_j², with the root mean squares m of a pair. By Cauchy-Schwarz it is least for
    f = sqrt(m_k / m_q). A common factor changes nothing, so the geometric mean is made 1 before rounding.
    """
    group = query.shape[1] // key.shape[1]
    m_k = _pair_mean_square(key)
    m_q = _pair_mean_square(query).unflatten(0, (-1, group)).mean(1)
    log_factor = (m_k.clamp_min(_TINY**2) / m_q.clamp_min(_TINY**2)).log2() / 4
    exponent = (log_factor - log_factor.mean(-1, keepdim=True)).round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return exponent.repeat(1, 2).to(torch.int8)


def _pair_mean_square(x: Tensor) -> Tensor:
    """(tokens, heads, D) -> (heads, D/2)"""
    low, high = x.square().mean(0).chunk(2, -1)
    return (low + high) / 2
