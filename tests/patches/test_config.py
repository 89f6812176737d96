from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import FORMATS
from fraqtl_vllm.config import FraqtlConfig, read_config


# vLLM also takes an object of the user's own class in the place of the dictionary.
@pytest.mark.parametrize("given", [{}, None, {"other": {"kv_format": "k8v8"}}, object(), {"fraqtl": {}}])
def test_default(given: Any) -> None:
    assert read_config(given).kv_format == "k4v4"


def test_format_by_name() -> None:
    config = read_config({"fraqtl": {"kv_format": "k8v4"}, "other": 1})
    assert config.kv_format == "k8v4"
    assert config.format is FORMATS["k8v4"]


def test_formats_of_single_layers() -> None:
    config = read_config({"fraqtl": {"kv_layers": {"0": "k8v8", "-1": "bf16", "3": "k4v4"}}})
    assert [each.name for each in config.by_layer(6)] == ["k8v8", *["k4v4"] * 4, "bf16"]
    assert config.format_name == "k4v4+k8v8+bf16" and config.format is FORMATS["k4v4"]
    bare = read_config({"fraqtl": {"kv_layers": {"0": "k8v8"}, "residual": False}})
    assert not any(vector.has_residual for each in bare.formats for vector in (each.k, each.v))
    assert any(vector.has_residual for each in config.formats for vector in (each.k, each.v))


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"kv_layers": {"0": "int3"}}, "unknown KV format 'int3': choose one of bf16, fp16, "),
        ({"kv_layers": {"first": "k8v8"}}, "--additional-config: fraqtl.kv_layers.first"),
        ({"kv_layers": {"0": "k4v4-channel"}, "calibration": False}, "KV format k4v4-channel needs calibration: leave"),
        ({"kv_fromat": "k4v4"}, "--additional-config: unknown key 'kv_fromat' in \"fraqtl\": choose one of kv_format"),
        ({"kv_format": "int3"}, "unknown KV format 'int3': choose one of bf16, fp16, "),
        ({"kv_format": 4}, "--additional-config: fraqtl.kv_format: Input should be a valid string"),
        ({"kv_format": None}, "--additional-config: fraqtl.kv_format: Input should be a valid string"),
        (
            {"prefill_keys": "cooked"},
            "--additional-config: fraqtl.prefill_keys: Input should be 'raw' or 'packed'",
        ),
        ("k4v4", "--additional-config: \"fraqtl\" must be an object, not 'k4v4'"),
        (None, '--additional-config: "fraqtl" must be an object, not None'),
    ],
)
def test_refusals(section: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config({"fraqtl": section})
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_settings_do_not_change() -> None:
    config = FraqtlConfig(kv_format="k8v8")
    with pytest.raises(ValidationError, match="frozen"):
        config.kv_format = "k4v4"
