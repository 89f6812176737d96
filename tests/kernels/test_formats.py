from typing import Any

import pytest
import torch

from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_kernels.formats import CPU_HEAD_SIZES, FORMATS, VectorFormat, check_head_size, get_format

BYTES_AT_128 = {
    "bf16": 512,
    "fp16": 512,
    "k8v8": 260,
    "k8v4": 196,
    "k4v4": 132,
    "k4v4-channel": 128,
    "k4v3": 116,
    "k3v3": 100,
    "k4v2": 106,
}


def test_bytes_of_every_format_at_head_size_128() -> None:
    assert {name: f.bytes_per_token(128) for name, f in FORMATS.items()} == BYTES_AT_128


def test_ratio_of_the_default_format() -> None:
    assert get_format("k4v4").ratio(64) == pytest.approx(256 / 68)
    assert get_format("k4v4").ratio(128) == pytest.approx(512 / 132)
    assert get_format("bf16").ratio(80) == 1


def test_unknown_format_lists_the_valid_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown KV format 'int3': choose one of bf16, fp16, .*k4v4"):
        get_format("int3")


def test_head_sizes() -> None:
    for size in CPU_HEAD_SIZES:
        check_head_size(size)
    with pytest.raises(UnsupportedError, match=r"head size 72 is not supported.*64, 80, 96, 128, 256, 512"):
        check_head_size(72)


def test_a_head_of_512_takes_as_much_as_two_of_256() -> None:
    """So that pages of both fill one pool."""
    assert {name: f.bytes_per_token(512) / f.bytes_per_token(256) for name, f in FORMATS.items()} == dict.fromkeys(
        FORMATS, 2
    )
    for f in FORMATS.values():
        needed = f.k.bytes(512) + f.v.bytes(512)
        assert needed <= f.bytes_per_token(512) < 1.026 * needed


def test_midpoint_grid_is_symmetric() -> None:
    vector = FORMATS["k4v4"].k
    codes = torch.arange(vector.levels + 1) - vector.midpoint
    assert torch.equal(codes, -codes.flip(0))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 5},
        {"bits": 16},
        {"bits": 8, "raw_dtype": torch.bfloat16},
        {"bits": 16, "raw_dtype": torch.float32},
        {"bits": 16, "raw_dtype": torch.float16, "rotated": True},
        {"bits": 8, "calibrated": True},
        {"bits": 4, "calibrated": True},
        {"bits": 4, "static": True, "rotated": True},
        {"bits": 4, "static": True, "has_residual": True},
        {"bits": 2, "groups": 3},
        {"bits": 4, "rotated": True, "calibrated": True, "groups": 2},
        {"bits": 3, "rotated": True, "groups": 2},
    ],
)
def test_a_vector_that_no_kernel_reads_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no kernel reads VectorFormat\(bits=\d+.*codes have 2, 3, 4 or 8 bits"):
        VectorFormat(**options)
