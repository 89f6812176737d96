"""Constants from statistics: each against what was planted in the keys."""

from __future__ import annotations

import torch

from fraqtl_kernels.calibration import calibrate, far_from_the_median, pair_exponents, static_scale
from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.formats import FORMATS

K4V4 = FORMATS["k4v4"]


def test_a_bias_becomes_the_centre() -> None:
    bias = torch.randn(2, 64) * 20
    found = calibrate(K4V4, torch.randn(400, 2, 64) + bias, torch.randn(10, 4, 64), torch.randn(400, 2, 64))
    assert found.key_centre is not None and (found.key_centre - bias).abs().max() < 0.3
    assert found.sink_centre is None and found.key_scale is None


def test_sinks_have_a_centre_of_their_own_and_leave_the_other_alone() -> None:
    key, sink = torch.randn(400, 2, 64), torch.randn(64) * 30
    key[::100, 1] += sink
    found = calibrate(K4V4, key, torch.randn(10, 2, 64), key)
    assert found.sink_centre is not None and found.key_centre is not None and found.key_exponent is not None
    assert (found.sink_centre[1] - sink).abs().max() < 2
    assert torch.equal(found.sink_centre[0], found.key_centre[0])
    assert found.key_centre.abs().max() < 0.3 and found.key_exponent.abs().max() == 0
    assert far_from_the_median(key).nonzero().tolist() == [[0, 1], [100, 1], [200, 1], [300, 1]]


def test_exponents_are_the_balanced_power_of_two() -> None:
    key, query = torch.randn(2000, 1, 64), torch.randn(2000, 3, 64)
    key[..., [5, 5 + 32]] *= 16  # sqrt(16) = 2^2
    query[..., [9, 9 + 32]] /= 64  # sqrt(64) = 2^3
    found = pair_exponents(key, query)[0]
    assert found.dtype == torch.int8 and torch.equal(found[:32], found[32:])
    assert found[5] == 2 and found[9] == 3 and found[[0, 1, 2, 3]].abs().max() == 0


def test_preparing_and_restoring_are_inverse_and_keep_the_products() -> None:
    key, query = torch.randn(30, 2, 64, dtype=torch.float64), torch.randn(2, 3, 64, dtype=torch.float64)
    constants = LayerConstants(torch.randn(2, 64), torch.randint(-7, 8, (2, 64), dtype=torch.int8), torch.randn(2, 64))
    prepared, no_sink = constants.prepare_keys(key), torch.zeros(30, 2, dtype=torch.bool)
    assert torch.allclose(constants.restore_keys(prepared, no_sink), key)
    scores = torch.einsum("hqd,nhd->hqn", constants.prepare_queries(query), prepared)
    exact = torch.einsum("hqd,nhd->hqn", query, key - constants.key_centre.double())  # type: ignore[union-attr]
    assert torch.allclose(scores, exact)
    assert IDENTITY.prepare_keys(key) is key


def test_static_scales_reach_the_largest_value() -> None:
    x = torch.randn(50, 2, 64)
    assert torch.equal(static_scale(x, FORMATS["k4v4-channel"].k) * 7, (x.abs().amax(0) / 7) * 7)
    found = calibrate(FORMATS["k4v4-channel"], x, x, x * 2)
    assert found.key_scale is not None and found.value_scale is not None and found.key_centre is None
    assert torch.allclose(found.value_scale, 2 * found.key_scale)


def test_formats_without_calibration_get_nothing() -> None:
    x = torch.randn(5, 2, 64)
    assert calibrate(FORMATS["k8v8"], x, x, x) == IDENTITY
