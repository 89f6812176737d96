"""Which quantized checkpoints are served, by configurations that vLLM reads from their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CacheConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm.checkpoint import asked_cache_dtype
from fraqtl_vllm.platform.cpu_platform import CpuWithoutNativeOps
from fraqtl_vllm.support import check_supported
from tests.e2e.random_models import FP8_CACHE
from tests.patches.test_support import make_config, make_model

DEMO = Path(__file__).parents[2] / "fraqtl_serve" / "demo_model"
ours_only = pytest.mark.skipif(
    not isinstance(current_platform, CpuWithoutNativeOps), reason="vLLM runs on another platform here"
)


def group(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    of_linear = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": inputs}
    groups = {"config_groups": {"group_0": of_linear}, "ignore": ["lm_head"]}
    return {"quant_method": "compressed-tensors", "format": form, **groups, **more}


TOKEN = {"strategy": "token", "symmetric": True, "dynamic": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
FP8_TOKEN, INT8_TOKEN = {"num_bits": 8, "type": "float", **TOKEN}, {"num_bits": 8, "type": "int", **TOKEN}
FP8_STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}


def configured(folder: Path, scheme: dict[str, Any], **more: Any) -> Any:
    """vLLM's configuration of the demo model with this in its config.json."""
    shutil.copytree(DEMO, folder / "model")
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": scheme} | more))
    return EngineArgs(str(folder / "model"), enforce_eager=True, max_model_len=512).create_engine_config()


@ours_only
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("auto_awq", {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}),
        ("auto_gptq", {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}),
        ("compressed-tensors", group("pack-quantized", INT4)),
        ("compressed-tensors", group("int-quantized", INT8, INT8_TOKEN)),
        ("compressed-tensors", group("float-quantized", FP8, FP8_STATIC)),
        ("compressed-tensors", group("float-quantized", FP8 | {"strategy": "tensor"}, FP8_TOKEN)),
        ("fp8", {"quant_method": "fp8", "activation_scheme": "dynamic"}),
        ("modelopt", MODELOPT),
    ],
)
def test_weights_that_nothing_multiplies(name: str, scheme: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights quantized by .* not here: choose a checkpoint in bfloat16") as error:
        configured(tmp_path, scheme)
    assert f"weights quantized by {name} need operators" in str(error.value)


@ours_only
@pytest.mark.parametrize(
    "scheme",
    [
        group("float-quantized", FP8, FP8_TOKEN),
        group("float-quantized", FP8, FP8_TOKEN, kv_cache_scheme=FP8_CACHE),
        {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": FP8_CACHE},
    ],
)
def test_weights_that_are_served(scheme: dict[str, Any], tmp_path: Path) -> None:
    config = configured(tmp_path, scheme)
    assert asked_cache_dtype(config) == ("fp8" if "kv_cache_scheme" in scheme else None)


def of_modelopt(cache_dtype: Any, **asks: Any) -> Any:
    """As vLLM is configured where it has operators for the weights."""
    hf_config = SimpleNamespace(quantization_config=MODELOPT | asks)
    return make_config(model_config=make_model(hf_config=hf_config), cache_config=CacheConfig(cache_dtype=cache_dtype))


@pytest.mark.parametrize("asks", [{"kv_cache_quant_algo": "FP8"}, {"kv_cache_scheme": FP8_CACHE}])
def test_an_fp8_cache_of_modelopt(asks: dict[str, Any]) -> None:
    asked = asked_cache_dtype(of_modelopt("auto", **asks))
    assert asked in ("fp8", "fp8_e4m3")
    check_supported(of_modelopt(asked, **asks))
    for other in ("fp8_e5m2", "int4_per_token_head"):  # somebody said so
        with pytest.raises(UnsupportedError, match=f"--kv-cache-dtype {other}: it stores its own formats"):
            check_supported(of_modelopt(other, **asks))


def test_an_fp8_cache_that_nobody_but_the_user_asks_for() -> None:
    with pytest.raises(UnsupportedError, match="--kv-cache-dtype fp8: it stores its own formats"):
        check_supported(of_modelopt("fp8"))
