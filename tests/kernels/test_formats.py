import pytest
import torch

from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_kernels.formats import FORMATS, HEAD_SIZES, check_head_size, get_format

BYTES_AT_128 = {"bf16": 512, "fp16": 512, "k8v8": 260, "k8v4": 196, "k4v4": 132, "k4v4-channel": 128, "k4v2": 106}


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
    for size in HEAD_SIZES:
        check_head_size(size)
    with pytest.raises(UnsupportedError, match=r"head size 72 is not supported.*64, 80, 96, 128, 256"):
        check_head_size(72)


def test_midpoint_grid_is_symmetric() -> None:
    vector = FORMATS["k4v4"].k
    codes = torch.arange(vector.levels + 1) - vector.midpoint
    assert torch.equal(codes, -codes.flip(0))
