"""What production makes of codes, against the oracle's own words for it."""

from __future__ import annotations

import pytest
import torch

from fraqtl_kernels import codec, reference
from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import CPU_HEAD_SIZES, FORMATS, VectorFormat

VECTORS = list(dict.fromkeys(x for format in FORMATS.values() for x in (format.k, format.v) if not x.is_raw))


def random_codes(vector: VectorFormat, size: int) -> torch.Tensor:
    return torch.randint(0, vector.levels + 1, (5, 3, size), dtype=torch.uint8)


@pytest.mark.parametrize("size", CPU_HEAD_SIZES)
@pytest.mark.parametrize("vector", VECTORS, ids=str)
def test_codes_and_their_bytes(vector: VectorFormat, size: int) -> None:
    codes = random_codes(vector, size)
    packed = codec.pack(codes, vector)
    assert torch.equal(packed, reference.pack(codes, vector)) and packed.shape[-1] == size * vector.bits // 8
    assert torch.equal(codec.unpack(packed, vector), codes)
    assert torch.equal(reference.unpack(packed, vector), codes)


@pytest.mark.parametrize("size", CPU_HEAD_SIZES)
@pytest.mark.parametrize("vector", VECTORS, ids=str)
def test_codes_as_numbers(vector: VectorFormat, size: int) -> None:
    codes = random_codes(vector, size)
    scale = torch.randn(5, 3, *([vector.groups] if vector.groups > 1 else [])).half()
    expected = reference.dequantize(codes, scale, vector, torch.float64)
    torch.testing.assert_close(codec.dequantize(codes, scale, vector).double(), expected, rtol=1e-6, atol=0)
    x = torch.randn(5, 3, size)
    back = codec.unrotate(codec.rotate(x, vector), vector)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        codec.rotate(x, vector), reference.rotate(x.double(), vector).float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("vector", [x for x in VECTORS if x.static], ids=str)
def test_static_steps(vector: VectorFormat) -> None:
    x, step = 4 * torch.randn(50, 3, 64), torch.rand(3, 64) + 0.1
    x[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert torch.equal(codec.quantize_static(x, step, vector), reference.quantize_static(x, step, vector))
    with pytest.raises(ConfigError, match="needs calibration"):
        codec.quantize_static(x, None, vector)
