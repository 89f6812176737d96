"""Constants from statistics: each against what was planted in the keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fraqtl_kernels import reference
from fraqtl_kernels.calibration import solve as calibration
from fraqtl_kernels.calibration.importance import Importance
from fraqtl_kernels.calibration.solve import (
    LEAST_SHRINKAGE,
    calibrate,
    far_from_the_median,
    query_hessian,
    static_scale,
    weighted_covariance,
)
from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.formats import CPU_HEAD_SIZES, FORMATS
from fraqtl_kernels.rotation import hadamard
from tests.kernels.transforms import random_constants

K4V4 = FORMATS["k4v4"]


def test_a_bias_becomes_the_center() -> None:
    bias = torch.randn(2, 64) * 20
    found = calibrate(K4V4, torch.randn(400, 2, 64) + bias, torch.randn(10, 4, 64), torch.randn(400, 2, 64))
    assert found.key.transform is not None and (found.key.transform.center - bias).abs().max() < 0.3
    assert found.key.outlier_center is None and found.key.scale is None


def test_sinks_have_a_center_of_their_own_and_leave_the_rest_alone() -> None:
    key, outlier = torch.randn(400, 2, 64), torch.randn(64) * 30
    query = torch.randn(100, 2, 64)
    without = calibrate(K4V4, key, query, key)
    key[::100, 1] += outlier
    found = calibrate(K4V4, key, query, key)
    assert found.key.outlier_center is not None
    assert found.key.transform is not None and without.key.transform is not None
    assert (found.key.outlier_center[1] - outlier).abs().max() < 2
    assert torch.equal(found.key.outlier_center[0], found.key.transform.center[0])
    assert found.key.transform.center.abs().max() < 0.3
    assert torch.equal(found.key.transform.basis[0], without.key.transform.basis[0])
    assert far_from_the_median(key).nonzero().tolist() == [[0, 1], [100, 1], [200, 1], [300, 1]]


def planted(tokens: int, size: int, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (tokens, 1, D) with these deviations along random axes, and the axes (D, D), as rows."""
    axes = torch.linalg.qr(torch.randn(size, size)).Q
    return ((torch.randn(tokens, size) * deviation) @ axes)[:, None], axes


def error_of(x: Tensor, constants: LayerConstants) -> float:
    """Mean squared error of values (tokens, 1, D), stored and read."""
    codes, scale = reference.encode_values(x, K4V4.v, constants)
    z = reference.dequantize(codes, scale, K4V4.v)
    back = reference.unrotate(z, K4V4.v) if constants.value.transform is None else constants.value.transform.undo(z)
    return (back - x).square().mean().item()


def test_the_error_follows_the_geometric_mean_of_the_deviations() -> None:
    """Whose square is 0.21 times the mean square here; ranges that feedback widens cost the rest."""
    deviation = torch.logspace(0.75, -0.75, 64)
    x, _ = planted(4000, 64, deviation)
    constants = calibrate(K4V4, x, x, x)
    gain = error_of(x, constants) / error_of(x, IDENTITY)
    ideal = (deviation.log().mean().exp() ** 2 / deviation.square().mean()).item()
    assert ideal < gain < 1.35 * ideal


def test_feedback_is_half_of_it() -> None:
    x, _ = planted(4000, 64, torch.logspace(0.75, -0.75, 64))
    found = calibrate(K4V4, x, x, x)
    assert found.value.transform is not None
    feedback = torch.zeros_like(found.value.transform.feedback)
    without = LayerConstants.of(value=replace(found.value.transform, feedback=feedback))
    assert error_of(x, without) > 2 * error_of(x, found)


def test_directions_that_the_model_ignores_are_stored_coarsely() -> None:
    """A fifth of the cost, though the values themselves lose more."""
    axes = torch.linalg.qr(torch.randn(64, 64)).Q
    value = torch.randn(4000, 1, 64)
    hessian = axes.T @ torch.diag(torch.tensor([64.0] * 8 + [1 / 64] * 56)) @ axes
    even = Importance(torch.ones(4000, 1), torch.ones(4000, 1))
    known = replace(even, direction=hessian[None])
    lost = {}
    for name, importance in (("even", even), ("known", known)):
        constants = calibrate(K4V4, value, value, value, importance)
        assert constants.value.transform is not None
        codes, scale = reference.encode_values(value, K4V4.v, constants)
        error = (constants.value.transform.undo(reference.dequantize(codes, scale, K4V4.v)) - value)[:, 0]
        lost[name] = (error.square().sum(-1).mean().item(), ((error @ hessian) * error).sum(-1).mean().item())
    assert lost["known"][1] < 0.5 * lost["even"][1] and lost["known"][0] > lost["even"][0]


def test_axes_that_queries_ignore_are_stored_coarsely() -> None:
    axes = torch.linalg.qr(torch.randn(64, 64)).Q
    key = torch.randn(4000, 1, 64)
    query = (torch.randn(4000, 1, 64) * torch.tensor([8.0] * 8 + [1 / 8] * 56)) @ axes
    constants = calibrate(K4V4, key, query, key)
    assert constants.key.transform is not None
    codes, scale = reference.encode_keys(key, K4V4.k, constants)
    error = constants.restore_keys(reference.dequantize(codes, scale, K4V4.k), scale.signbit()) - key
    seen, unseen = (error @ axes.T).square().mean((0, 1)).split([8, 56])
    assert unseen.mean() > 8 * seen.mean()


def test_independent_channels_keep_their_pairs() -> None:
    """Noise of few tokens is shrunk away: what is left mixes nothing, so the feedback of equal channels is zero."""
    x = torch.randn(300, 1, 64)
    found = calibrate(K4V4, x, torch.randn(300, 2, 64), x)
    assert found.key.transform is not None and found.value.transform is not None
    assert found.key.transform.feedback.abs().max() < 0.5 and found.value.transform.feedback.abs().max() < 0.5
    correlated = torch.randn(300, 1, 64)
    correlated[..., :32] += 3 * correlated[..., 32:]
    found = calibrate(K4V4, correlated, torch.randn(300, 2, 64), correlated)
    assert found.key.transform.feedback is not None and found.key.transform.feedback.float().norm(dim=-1).mean() > 1


def test_matrices_are_exact_in_both_16_bit_dtypes_and_inverse() -> None:
    x = torch.randn(500, 2, 64) * torch.logspace(-2, 2, 64) + 3
    found = calibrate(K4V4, x, x, x)
    for transform in (found.key.transform, found.value.transform):
        assert transform is not None
        for matrix in (transform.basis, transform.inverse, transform.feedback):
            assert torch.equal(matrix.half().float(), matrix.float()) and matrix.dtype == torch.bfloat16
        back = transform.undo(transform.apply(x.double()))
        assert (back - x).norm() / x.norm() < 5e-3


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_few_tokens_and_dead_channels_are_enough(tokens: int) -> None:
    x = torch.randn(tokens, 2, 64)
    x[..., 5] = x[..., 37] = 0
    found = calibrate(K4V4, x, x, x)
    assert all(t.isfinite().all() for t in found.tensors().values())
    other = torch.randn(50, 2, 64)
    codes, scale = reference.encode_values(other, K4V4.v, found)
    assert found.value.transform is not None
    assert (found.value.transform.undo(reference.dequantize(codes, scale, K4V4.v)) - other).norm() / other.norm() < 0.5


def test_preparing_and_restoring_are_inverse_and_keep_the_products() -> None:
    key, query = torch.randn(30, 2, 64, dtype=torch.float64), torch.randn(2, 3, 64, dtype=torch.float64)
    constants, _, _ = random_constants(2, 64)
    assert constants.key.transform is not None and constants.key.outlier_center is not None
    z, is_outlier = constants.key.transform.apply(key), torch.rand(30, 2) < 0.5
    moved = (constants.key.outlier_center - constants.key.transform.center) * is_outlier[..., None]
    assert torch.allclose(constants.restore_keys(z, is_outlier), key + moved)
    scores = torch.einsum("hqd,nhd->hqn", constants.prepare_queries(query), z)
    exact = torch.einsum("hqd,nhd->hqn", query, key - constants.key.transform.center.double())
    assert torch.allclose(scores, exact)


def correlated(heads: int, size: int) -> Tensor:
    """Positive definite (heads, D, D) float64, far from a diagonal."""
    factor = torch.randn(heads, size, 2 * size, dtype=torch.float64)
    return factor @ factor.mT


@pytest.mark.parametrize("tied", [False, True])
def test_covariances_against_their_definition(tied: bool) -> None:
    """In float64, with the noise of every element by itself; one channel is a thousand times as large as the rest."""
    x, weight = torch.randn(300, 2, 64) @ torch.randn(64, 64) + 1, torch.rand(300, 2)
    x[..., 7] *= 1000
    weight_share = weight.double() / weight.double().sum(0)
    outer = torch.einsum("thi,thj->thij", x.double(), x.double())
    mean = torch.einsum("th,thij->hij", weight_share, outer)
    noise = torch.einsum("th,thij->hij", weight_share, outer.square()) - mean.square()
    variance = mean.diagonal(dim1=1, dim2=2)
    if tied:
        variance = variance.unflatten(-1, (2, 32)).mean(1, keepdim=True).expand(-1, 2, -1).flatten(1)
    target = torch.diag_embed(variance)
    shrinkage = (noise.sum((1, 2)) * weight_share.square().sum(0) / (mean - target).square().sum((1, 2))).clamp(
        LEAST_SHRINKAGE, 1
    )[:, None, None]
    ridge = 1e-5 * variance.mean(-1)[:, None, None] * torch.eye(64)
    expected = (1 - shrinkage) * mean + shrinkage * target + ridge
    unit = expected.diagonal(dim1=1, dim2=2).rsqrt()
    off = (weighted_covariance(x, weight, tied=tied) - expected) * unit[:, :, None] * unit[:, None]
    assert off.abs().max() < 1e-4


def test_queries_of_a_kv_head_count_together() -> None:
    query = torch.randn(50, 6, 64) * torch.tensor([1.0, 2, 3, 40, 50, 60])[:, None]
    weight = torch.rand(50, 6)
    found = query_hessian(query, Importance(weight, torch.ones(50, 2)), 2)
    for head in range(2):
        own = slice(3 * head, 3 * head + 3)
        alone = query_hessian(query[:, own], Importance(weight[:, own], torch.ones(50, 1)), 1)
        torch.testing.assert_close(found[head], alone[0])


def test_a_basis_multiplies_volumes_by_one_and_evens_costs_and_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the module's docstring says of z, B and F, of matrices that are not rounded."""
    covariance, hessian = correlated(2, 64), correlated(2, 64)
    exact: dict[str, Tensor] = {}

    def keep(center: Tensor, basis: Tensor, feedback: Tensor) -> None:
        exact.update(basis=basis, feedback=feedback)

    monkeypatch.setattr(calibration, "make_transform", keep)
    calibration.solve_transform(torch.zeros(2, 64), covariance, hessian)
    basis, feedback = exact["basis"], exact["feedback"]
    torch.testing.assert_close(torch.linalg.slogdet(basis).logabsdet, torch.zeros(2, dtype=torch.float64))
    ranges = (basis.mT @ covariance @ basis).diagonal(dim1=1, dim2=2)
    # Rounding leaves r_2 of the second half; of the first r_1 - r_2 F
    error = torch.eye(64, dtype=torch.float64).repeat(2, 1, 1)
    error[:, 32:, :32] = -feedback
    inverse = error @ torch.linalg.inv(basis)
    costs = inverse @ hessian @ inverse.mT
    ideal = torch.linalg.eigvals(covariance @ hessian).real.log().mean(-1).exp().sqrt()
    for found in (ranges, costs.diagonal(dim1=1, dim2=2)):
        torch.testing.assert_close(found, found.mean(-1, keepdim=True).expand_as(found))
    # The least that pairs allow is the geometric mean, if all products of pairs were alike
    assert (costs.diagonal(dim1=1, dim2=2).mean(-1) > 0.99 * ideal).all()
    assert (costs.diagonal(dim1=1, dim2=2).mean(-1) < 1.3 * ideal).all()
    assert costs[:, 32:, :32].abs().max() < 1e-9 * costs.abs().max()


def test_static_scales_reach_the_largest_value() -> None:
    x = torch.randn(50, 2, 64)
    assert torch.equal(static_scale(x, FORMATS["k4v4-channel"].k) * 7, (x.abs().amax(0) / 7) * 7)
    found = calibrate(FORMATS["k4v4-channel"], x, x, x * 2)
    assert found.key.scale is not None and found.value.scale is not None and found.key.transform is None
    assert torch.allclose(found.value.scale, 2 * found.key.scale)


@pytest.mark.parametrize("size", CPU_HEAD_SIZES)
def test_eight_bits_get_centers_and_a_rotation(size: int) -> None:
    bias, outlier = 20 * torch.randn(2, 2, size), 30 * torch.randn(size)
    key, value = torch.randn(400, 2, size) + bias[0], torch.randn(400, 2, size) + bias[1]
    key[::100, 1] += outlier
    found = calibrate(FORMATS["k8v8"], key, torch.randn(10, 4, size), value)
    assert found.key.outlier_center is not None
    assert (found.key.outlier_center[1] - bias[0, 1] - outlier).abs().max() < 3
    for transform, center in ((found.key.transform, bias[0]), (found.value.transform, bias[1])):
        assert transform is not None and transform.feedback is None
        assert (transform.center - center).abs().max() < 0.4
        assert torch.equal(transform.basis.sign().double(), hadamard(size).sign().expand(2, -1, -1))
        assert transform.basis.abs().unique().numel() == 1
        back = transform.undo(transform.apply(key.double()))
        assert (back - key).norm() / key.norm() < 1e-4


def test_a_bias_costs_eight_bits_nothing() -> None:
    """The steps follow what keys differ by, and not what they have in common."""
    key = torch.randn(400, 2, 64)
    errors = []
    for bias in (0, 100 * torch.randn(2, 64)):
        constants = calibrate(FORMATS["k8v8"], key + bias, torch.randn(10, 4, 64), key)
        codes, scale = reference.encode_keys((key + bias).double(), FORMATS["k8v8"].k, constants)
        assert scale is not None
        z = reference.dequantize(codes, scale, FORMATS["k8v8"].k, torch.float64)
        errors.append((constants.restore_keys(z, scale.signbit()) - key - bias).norm() / key.norm())
    assert errors[1] < 1.05 * errors[0] < 0.01


def test_formats_without_calibration_get_nothing() -> None:
    x = torch.randn(5, 2, 64)
    assert calibrate(FORMATS["bf16"], x, x, x).tensors() == {}
