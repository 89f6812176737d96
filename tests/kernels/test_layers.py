"""The CPU's layers against the same formulas in float64."""

import pytest
import torch

from fraqtl_kernels.cpu.layers import linear as linear_module
from fraqtl_kernels.cpu.layers import mxfp4 as mxfp4_module
from fraqtl_kernels.cpu.layers.gate import GELU_TANH, SILU, gate
from fraqtl_kernels.cpu.layers.linear import FEW_ROWS, WideLinear
from fraqtl_kernels.cpu.layers.mxfp4 import MXFP4Linear
from fraqtl_kernels.cpu.layers.norm import PARALLEL_NUMBERS, RMSNorm
from fraqtl_kernels.cpu.layers.rotary import RotaryEmbedding

F = torch.nn.functional
# One rounding of the result: half a unit in the last place, relative to the number itself
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 3e-6}
ROWS = (1, 7, PARALLEL_NUMBERS // 192 + 3)


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, relative to the number or to a hundredth of the largest one."""
    floor = expected.abs().max() / 100
    return float(((found.double() - expected).abs() / expected.abs().clamp_min(floor)).max().nan_to_num(torch.inf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(192, 64), (33, 100), (5, 7), (1500, 300)])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, FEW_ROWS, FEW_ROWS + 1, 70])
def test_linear(dtype: torch.dtype, shape: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "PANEL_BYTES", 1 << 16)  # several panels, the last one shorter
    weight, x = torch.randn(shape).to(dtype), torch.randn(rows, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype)
    linear = WideLinear(weight)
    expected = x.double() @ weight.double().T
    assert worst(linear(x), expected) < 2 * TOLERANCE[dtype]
    assert worst(linear(x, bias), expected + bias.double()) < 2 * TOLERANCE[dtype]
    apart = torch.randn(rows, shape[1] + 5).to(dtype)[:, :-5]
    assert worst(linear(apart), apart.double() @ weight.double().T) < 2 * TOLERANCE[dtype]
    assert torch.equal(linear(x[None]), linear(x)[None])


def test_linear_has_no_rows_and_keeps_nan() -> None:
    linear = WideLinear(torch.randn(8, 16).bfloat16())
    assert linear(torch.empty(0, 16).bfloat16()).shape == (0, 8)
    for rows in (2, FEW_ROWS + 1):
        x = torch.randn(rows, 16).bfloat16()
        x[1, 3] = torch.nan
        found = linear(x)
        assert found[1].isnan().all() and not found[0].isnan().any()


def test_a_row_of_few_does_not_depend_on_the_others() -> None:
    """In groups of four, that is: what is left of them takes another loop, whose sums have another order."""
    weight, x = torch.randn(96, 200).bfloat16(), torch.randn(16, 200).bfloat16()
    linear = WideLinear(weight)
    together = linear(x)
    for start in range(0, 16, 4):
        assert torch.equal(linear(x[start : start + 4]), together[start : start + 4])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(192, 64), (33, 96), (1500, 320)])
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_mxfp4_linear(rows: int, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mxfp4_module, "PANEL_BYTES", 1 << 16)  # several panels, the last one shorter
    codes = torch.randint(0, 256, (shape[0], shape[1] // 2))
    scales = torch.randint(124, 130, (shape[0], shape[1] // 32))
    # By the standard: a sign, two bits of exponent, one of mantissa, whose leading one is hidden but for exponent 0.
    halves = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    exponent, mantissa = (halves >> 1) & 3, (halves & 1) / 2
    magnitude = torch.where(exponent == 0, mantissa, (1 + mantissa) * 2.0 ** (exponent - 1))
    weight = torch.where(halves < 8, magnitude, -magnitude) * (2.0 ** (scales - 127)).repeat_interleave(32, -1)
    linear = MXFP4Linear(codes.byte(), scales.byte())
    x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0])
    expected = x.double() @ weight.double().T
    limit = 2 * TOLERANCE[dtype] + 1e-4  # of the last, what float32 sums of large and small weights lose
    if rows:
        assert worst(linear(x), expected) < limit
        assert worst(linear(x, bias), expected + bias.double()) < limit
    assert linear(x).shape == expected.shape


def test_an_mxfp4_scale_may_be_nan_or_tiny() -> None:
    codes, scales = torch.full((3, 16), 0x42).byte(), torch.tensor([[255], [0], [200]]).byte()
    found = MXFP4Linear(codes, scales)(torch.ones(1, 32))
    assert found[0, 0].isnan() and found[0, 1] == 48 * 2.0**-127 and found[0, 2] == 48 * 2.0**73


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_norm(dtype: torch.dtype, rows: int) -> None:
    x, residual = (torch.randn(rows, 192).to(dtype) for _ in range(2))
    weight = torch.randn(192).to(dtype)

    def expected(values: torch.Tensor, gain: float = 0.0) -> torch.Tensor:
        wide = values.double()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * (weight.double() + gain)

    assert worst(RMSNorm(weight, 1e-5)(x), expected(x)) < TOLERANCE[dtype]
    assert worst(RMSNorm(weight, 1e-5, gain=1.0)(x), expected(x, 1.0)) < TOLERANCE[dtype]
    total = x.double() + residual.double()
    before = x.clone(), residual.clone()
    found, added = RMSNorm(weight, 1e-5)(x, residual)
    assert worst(found, expected(total)) < TOLERANCE[dtype] and worst(added, total) < TOLERANCE[dtype]
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    in_place = RMSNorm(weight, 1e-5, in_place=True)(x, residual)
    assert torch.equal(in_place[0], found) and torch.equal(in_place[1], added)
    assert in_place[0].data_ptr() == x.data_ptr() and in_place[1].data_ptr() == residual.data_ptr()


def test_norm_of_heads_inside_other_rows_and_without_weight() -> None:
    rows = torch.randn(5, 40, 64).bfloat16()[:, 3:20]
    wide = rows.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    assert worst(RMSNorm(None, 1e-6)(rows), expected) < TOLERANCE[torch.bfloat16]
    mixed = RMSNorm(torch.full((64,), 3.0), 1e-6)(rows)  # float32 weights in a bfloat16 model
    assert mixed.dtype == torch.bfloat16 and worst(mixed, 3 * expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_gates(dtype: torch.dtype, rows: int) -> None:
    x = (torch.randn(rows, 2 * 192) * 4).to(dtype)
    x[0, :3] = torch.tensor([-200.0, 200.0, 0.0])
    first, second = x.double().chunk(2, -1)
    assert worst(gate(x, SILU), F.silu(first) * second) < 2 * TOLERANCE[dtype]
    assert worst(gate(x, GELU_TANH), F.gelu(first, approximate="tanh") * second) < 2 * TOLERANCE[dtype]
    assert torch.equal(gate(x[None], SILU), gate(x, SILU)[None])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "rotated"), [(1, 64), (7, 32), (300, 64)])
def test_rotary(dtype: torch.dtype, rows: int, rotated: int, interleaved: bool) -> None:
    table, positions = torch.randn(100, rotated).to(dtype), torch.randint(0, 100, (rows,))
    joined = torch.randn(rows, (9 + 3 + 3) * 64).to(dtype)
    query, key, value = joined.split([9 * 64, 3 * 64, 3 * 64], -1)

    def expected(x: torch.Tensor) -> torch.Tensor:
        heads = x.double().view(rows, -1, 64).clone()
        cosines, sines = table[positions].double()[:, None].chunk(2, -1)
        part = heads[..., :rotated]
        a, b = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
        turned = a * cosines - b * sines, b * cosines + a * sines
        joint = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        return torch.cat([joint, heads[..., rotated:]], -1).flatten(1)

    want = expected(query), expected(key)
    before = value.clone()
    embedding = RotaryEmbedding(table, 64, interleaved=interleaved)
    alone, none = embedding(positions, query.clone())
    found = embedding(positions, query, key)
    assert none is None and torch.equal(alone, found[0])
    assert worst(found[0], want[0]) < TOLERANCE[dtype] and worst(found[1], want[1]) < TOLERANCE[dtype]
    assert torch.equal(value, before) and found[0].data_ptr() == query.data_ptr()
