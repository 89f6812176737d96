"""The constants of a layer from keys, queries and values of a few texts: plain statistics, no search.

Per KV head: the center is the mean of ordinary vectors, the outlier center that of keys far from their median, and the
basis follows from two matrices: S, the covariance of what is stored, and G, which says what an error e costs, e G e^T.
For keys G is the mean of q^T q over queries, for values what the model's output projection makes of e. Queries and
values are weighted by how much their errors matter (`importance.py`). What each of this gives is measured by
`fraqtl-bench quantizer`.

**The basis.** In y = x G^½ an error costs its square. Let s_1 >= .. >= s_D be the standard deviations of y along its
principal axes. D codes of 4 bits, or 3, spent evenly, cost in proportion to the mean of s_i²; at best, with more bits
where s is large, to the geometric mean. Instead of other numbers of bits, axis i is paired with axis D+1-i. Let a >= b
be their deviations and u, v the two coordinates, each divided by its own. Turned by c = sqrt(b / (a + b)),
s = sqrt(a / (a + b)),

    z_1 = c u + s v,   z_2 = c v - s u,      error² = ab · ((e_1 - f e_2)² + e_2²),   f = (a - b) / sqrt(ab).

So if z_2 is rounded first and what that leaves, times -f, is added to z_1 before it is rounded too, both errors
cost ab: the geometric mean of a² and b², with codes of equal size. That is Babai's rounding in the lattice that
the codes span, and the pairing makes the diagonal of its triangular factor even. All z_1 make the first half of a
vector, all z_2 the second; each half is rotated (Hadamard), so that no coordinate decides the scale of the vector,
and -f becomes the matrix F.

**8 and 2 bits.** There the center is what counts: it takes away biases of keys, which would make the steps coarse, and
what values have in common. The basis is a Hadamard matrix.

**Few tokens.** Covariances are shrunk towards their diagonal (for keys and queries the mean of each RoPE pair, which
doesn't depend on positions), by as much as their own noise says: Ledoit and Wolf, "A well-conditioned estimator
for large-dimensional covariance matrices" (2004). Independent channels end at a diagonal basis.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fraqtl_kernels.calibration.importance import Importance
from fraqtl_kernels.constants import LayerConstants, Transform, make_transform, sixteen_bits
from fraqtl_kernels.formats import KVFormat, VectorFormat
from fraqtl_kernels.rotation import hadamard

OUTLIER_DISTANCE = 3.0  # times the median distance from the median key: no ordinary key is as far
LARGEST_RATIO = 64.0  # of two paired deviations: more would push codes off the grid
LEAST_SHRINKAGE = 0.02
QUERY_FLOOR, VALUE_FLOOR = 0.1, 0.3  # what importance counts at least, in units of its mean
DIRECTION_FLOOR = 0.1  # and what every direction of a value does
Solver = Callable[[Tensor, Tensor, Tensor], Transform]
_RIDGE = 1e-5  # of the mean variance, for channels that never move
_TINY = 1e-6


def calibrate(
    format: KVFormat,
    key: Tensor,
    query: Tensor,
    value: Tensor,
    importance: Importance | None = None,
    *,
    solve: Solver | None = None,
) -> LayerConstants:
    """The constants with which `format` stores the keys and values of a layer.

    key, value: (tokens, KV heads, D). query: (tokens, query heads, D). All as attention receives them, after RoPE,
    floating point, of at least one token. importance: all queries and values are alike without it. solve: in the
    place of `solve_transform`, for comparisons. Returns fp32 and bf16 tensors on the device of `key`.
    """
    solve = solve or solve_transform
    key, query, value = (x.float() for x in (key, query, value))
    outlier_center = None
    key_transform = value_transform = None
    if format.k.calibrated:
        is_outlier = far_from_the_median(key)
        center = mean_of(key, (~is_outlier).float())
        if format.k.has_feedback:
            covariance = weighted_covariance(key - center, (~is_outlier).float(), tied=True)
            key_transform = solve(center, covariance, query_hessian(query, importance, key.shape[1]))
        else:
            key_transform = rotation_about(center)
        if is_outlier.any():
            outlier_center = torch.where(is_outlier.any(0)[:, None], mean_of(key, is_outlier.float()), center)
    if format.v.calibrated:
        weight = torch.ones_like(value[..., 0]) if importance is None else floored(importance.value, VALUE_FLOOR)
        center = mean_of(value, weight)
        if format.v.has_feedback:
            covariance = weighted_covariance(value - center, weight, tied=False)
            value_transform = solve(center, covariance, value_hessian(covariance, importance))
        else:
            value_transform = rotation_about(center)
    return LayerConstants.of(
        key_transform,
        value_transform,
        outlier_center,
        static_scale(key, format.k) if format.k.static else None,
        static_scale(value, format.v) if format.v.static else None,
    )


def query_hessian(query: Tensor, importance: Importance | None, kv_heads: int) -> Tensor:
    """G: (KV heads, D, D) float64. query: (tokens, query heads, D)."""

    def by_kv_head(x: Tensor) -> Tensor:
        """(tokens, query heads, ...) -> (tokens x query heads a KV head, KV heads, ...)"""
        return x.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(0, 1)

    weight = torch.ones_like(query[..., 0]) if importance is None else importance.query
    return weighted_covariance(by_kv_head(query), floored(by_kv_head(weight), QUERY_FLOOR), tied=True)


def value_hessian(covariance: Tensor, importance: Importance | None) -> Tensor:
    """G of values, like their covariance `covariance`: (KV heads, D, D) float64; the identity where nothing is
    known."""
    square = torch.eye(covariance.shape[-1]).to(covariance).expand_as(covariance)
    if importance is None or importance.direction is None:
        return square
    hessian = importance.direction.to(covariance)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(_TINY**2)[:, None, None]
    return (1 - DIRECTION_FLOOR) * hessian / mean + DIRECTION_FLOOR * square


def floored(weight: Tensor, floor: float) -> Tensor:
    """Weights (tokens, heads) in units of their mean, and some more for all."""
    return weight / weight.mean(0).clamp_min(_TINY**2) + floor


def static_scale(x: Tensor, vector: VectorFormat) -> Tensor:
    """Symmetric steps of every channel, max|x| / (2^(bits-1) - 1). x: (tokens, KV heads, D) -> (KV heads, D)."""
    return (x.abs().amax(0) / (vector.edge - 1)).clamp_min(_TINY)


def far_from_the_median(key: Tensor) -> Tensor:
    """Which keys (tokens, KV heads, D) are outliers: (tokens, KV heads) bool."""
    distance = (key - key.median(0).values).norm(dim=-1)
    return distance > OUTLIER_DISTANCE * distance.median(0).values


def mean_of(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over tokens, (KV heads, D); zero where all weights are. weight: (tokens, KV heads)."""
    total = (x * weight[..., None]).sum(0)
    return total / weight.sum(0).clamp_min(_TINY)[:, None]


def weighted_covariance(x: Tensor, weight: Tensor, *, tied: bool) -> Tensor:
    """Weighted mean of x^T x over tokens, shrunk towards a diagonal: (heads, D, D) float64.

    x: (tokens, heads, D). weight: (tokens, heads). tied: the diagonal is averaged over each pair (i, i + D/2).
    With t_ij the target and m_ij = mean of x_i x_j, the share of the target is Σ Var(m_ij) / Σ (m_ij - t_ij)².
    """
    x, weight = x.double(), weight.double()
    weight = weight / weight.sum(0).clamp_min(_TINY)
    mean = torch.einsum("th,thi,thj->hij", weight, x, x)
    squares = torch.einsum("th,thi,thj->hij", weight, x.square(), x.square())
    noise = (squares - mean.square()) * weight.square().sum(0)[:, None, None]
    variance = mean.diagonal(dim1=1, dim2=2)
    if tied:
        variance = variance.unflatten(-1, (2, -1)).mean(1).repeat(1, 2)
    target = torch.diag_embed(variance)
    shrinkage = noise.sum((1, 2)) / (mean - target).square().sum((1, 2))
    shrinkage = shrinkage.nan_to_num(1.0, posinf=1.0).clamp(LEAST_SHRINKAGE, 1.0)[:, None, None]
    ridge = _RIDGE * variance.mean(-1)[:, None, None] + _TINY**2
    return (1 - shrinkage) * mean + shrinkage * target + ridge * torch.eye(x.shape[-1]).to(mean)


def rotation_about(center: Tensor) -> Transform:
    """A center, and nothing else but the rotation that a format without calibration has. center: (heads, D)."""
    size = center.shape[-1]
    # Of all numbers of 8 digits that whose inverse, as rounded, is the best: 1 where D is a power of two
    entries = torch.arange(128, 256) / 128
    error = (sixteen_bits(1 / (size * entries)).double() * size * entries - 1).abs()
    basis = hadamard(size).sign() * entries[error.argmin()]
    return make_transform(center, basis.to(center.device).expand(center.shape[0], -1, -1))


def solve_transform(center: Tensor, covariance: Tensor, hessian: Tensor) -> Transform:
    """Basis and feedback of the module's docstring. center: (heads, D). covariance, hessian: S and G, (heads, D, D)."""
    half = covariance.shape[-1] // 2
    values, axes = torch.linalg.eigh(hessian)
    root = (axes * values.sqrt()[:, None]) @ axes.mT  # G^½
    variance, axes = torch.linalg.eigh(root @ covariance @ root)
    variance, axes = variance.flip(-1), axes.flip(-1)
    deviation = variance.clamp_min(0).sqrt()
    a = deviation[:, :half]
    b = torch.maximum(deviation.flip(-1)[:, :half], a / LARGEST_RATIO)
    u, v = (root @ axes[..., :half] / a[:, None]), (root @ axes.flip(-1)[..., :half] / b[:, None])
    cosine, sine = (b / (a + b)).sqrt()[:, None], (a / (a + b)).sqrt()[:, None]
    # A pair's error is worth sqrt(ab): scaling z by its root divides the remaining inequality between range and cost
    even = (a * b).pow(0.25)[:, None]
    rotation = hadamard(half).to(covariance)
    basis = torch.cat([(cosine * u + sine * v) * even @ rotation, (cosine * v - sine * u) * even @ rotation], -1)
    basis = basis / torch.linalg.slogdet(basis).logabsdet.div(2 * half).exp()[:, None, None]
    feedback = rotation.T @ torch.diag_embed((b - a) / (a * b).sqrt()) @ rotation
    return make_transform(center, basis, feedback)
