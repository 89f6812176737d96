"""How blocks of hybrid models are cut, against vLLM's own planner and its own alignment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_kernels.formats import FORMATS
from fraqtl_vllm import hybrids
from fraqtl_vllm._vllm import get_kv_cache_configs
from fraqtl_vllm.accounting import planner, pool

GIB = 1 << 30
LENGTH = 131072
# Qwen3.5-27B: 16 of 64 layers attend, 4 KV heads of 256; 48 heads of 128 x 128 in float32, and their convolution.
STATE = ((3, 10240), (48, 128, 128)), (torch.bfloat16, torch.float32)
STATE_BYTES = 3 * 10240 * 2 + 48 * 128 * 128 * 4


def specs(kv_format: str, attending: int = 16, states: int = 48, heads: int = 4, mode: str = "align") -> dict[str, Any]:
    content = FORMATS[kv_format].bytes_per_token(256)
    full = FullAttentionSpec(
        block_size=16, num_kv_heads=heads, head_size=256, dtype=torch.uint8, state_content_bytes=content
    )
    state = MambaSpec(shapes=STATE[0], dtypes=STATE[1], block_size=LENGTH, mamba_cache_mode=mode)
    return {f"states.{i}": state for i in range(states)} | {f"layers.{i}": full for i in range(attending)}


@pytest.fixture(autouse=True)
def _planned_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fraqtl_vllm.platform.cpu_platform.STATE_FAMILIES", ("qwen3_next",))


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return engine_config(tmp_path)


class Plain:
    """A backend as vLLM's alignment asks it: blocks of any multiple of 16, nothing packed."""

    @staticmethod
    def customize_spec(spec: Any) -> Any:
        return spec

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[Any]:
        return [MultipleOf(16)]


def engine_config(folder: Path, **changes: Any) -> Any:
    """vLLM's configuration for a Qwen3-Next with real proportions, from its config.json alone."""
    described = {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "max_position_embeddings": LENGTH,
        "dtype": "bfloat16",
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(described))
    made = EngineArgs(
        str(folder), skip_tokenizer_init=True, enforce_eager=True, mamba_ssm_cache_dtype="float32"
    ).create_engine_config()
    made.cache_config.kv_cache_layout = hybrids.LAYOUT
    return made


def planned(config: Any, cut: dict[str, Any]) -> Any:
    [made] = get_kv_cache_configs(config, [cut], [20 * GIB])
    return made


@pytest.mark.parametrize(("attending", "states"), [(16, 48), (8, 40), (4, 36), (1, 3), (2, 6), (24, 24), (3, 1)])
@pytest.mark.parametrize("kv_format", ["k8v8", "k4v4", "k4v2"])
def test_a_block_holds_tokens_or_states_and_little_else(
    config: Any, kv_format: str, attending: int, states: int
) -> None:
    made = planned(config, cut := hybrids.cut(specs(kv_format, attending, states)))
    block = made.kv_cache_tensors[0].block_stride
    tokens = next(spec.block_size for name, spec in cut.items() if name.startswith("layers"))
    assert block == tokens * attending * 4 * FORMATS[kv_format].bytes_per_token(256)  # attention without padding
    groups = [g for g in made.kv_cache_groups if g.layer_names[0].startswith("states")]
    assert len(groups) <= max(hybrids.MOST_STATE_GROUPS, 1)
    padding = len(groups) * block - states * STATE_BYTES
    assert 0 <= padding <= 0.06 * states * STATE_BYTES + block % STATE_BYTES


def test_blocks_as_we_cut_them_against_pages_of_one_size(config: Any) -> None:
    """What the cut is for: at vLLM's layout a block of the packed model has 3,088 tokens."""
    ours, stock = hybrids.cut(specs("k4v4")), hybrids.cut_as_vllm_does(specs("k4v4"))
    blocks = {}
    for name, one, layout in (("ours", ours, hybrids.LAYOUT), ("stock", stock, hybrids.PLAIN_LAYOUT)):
        config.cache_config.kv_cache_layout = layout
        blocks[name] = planned(config, one).kv_cache_tensors[0], one["layers.0"].block_size
    assert (blocks["ours"][1], blocks["stock"][1]) == (592, 3088)


def test_baseline_is_cut_as_vllm_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the function that vLLM calls when it starts, with a backend that packs nothing."""
    config = engine_config(tmp_path)
    config.cache_config.block_size = 16
    monkeypatch.setattr(Platform, "_find_non_ssm_backends", classmethod(lambda cls, config: [Plain]))
    Platform._align_hybrid_block_size(config, Plain)
    plain = planner.unpacked(specs("k4v4"), torch.bfloat16)
    assert plain["layers.0"].block_size == config.cache_config.block_size
    assert plain["states.0"].page_size_bytes == config.cache_config.mamba_page_size_padded
    assert plain["layers.0"].page_size_bytes == plain["states.0"].page_size_bytes


@pytest.mark.parametrize("kv_format", ["k4v4", "k8v8", "bf16"])
def test_pool_and_baseline_are_what_vllm_counts(config: Any, kv_format: str) -> None:
    from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_kv_cache_capacity

    def counted(specs_of_one: dict[str, Any], layout: str, memory: int) -> tuple[Any, int, float]:
        config.cache_config.kv_cache_layout = layout
        made = get_kv_cache_configs(config, [specs_of_one], [memory])
        return made, *get_kv_cache_capacity(config, generate_scheduler_kv_cache_config(made))

    is_packed = kv_format != "bf16"
    one = (hybrids.cut if is_packed else hybrids.cut_as_vllm_does)(specs(kv_format))
    made, tokens, concurrency = counted(one, hybrids.LAYOUT if is_packed else hybrids.PLAIN_LAYOUT, 20 * GIB)
    said = pool.numbers(config, [one], made)
    assert (said["tokens"], said["concurrency"]) == (tokens, concurrency)
    memory = said["blocks"] * said["block_bytes"]
    _, tokens, concurrency = counted(hybrids.cut_as_vllm_does(specs("bf16")), hybrids.PLAIN_LAYOUT, memory)
    assert (said["baseline_tokens"], said["baseline_concurrency"]) == (tokens, concurrency)
    # Of one sequence: 131,072 tokens in 16 layers, each state twice
    assert said["attention_bytes"] == LENGTH * 16 * 4 * FORMATS[kv_format].bytes_per_token(256)
    assert said["baseline_attention_bytes"] == LENGTH * 16 * 4 * 1024
    assert said["state_bytes"] == 2 * 48 * STATE_BYTES
    assert said["padding_bytes"] < 0.02 * (said["attention_bytes"] + said["state_bytes"])


def test_a_block_size_of_the_users(config: Any) -> None:
    layers = hybrids.layers_of(specs("k4v4").values())
    assert layers is not None
    hybrids.check_block_size(208, layers)
    with pytest.raises(ConfigError) as error:
        hybrids.check_block_size(192, layers)
    assert str(error.value) == (
        f"--block-size 192: a block of this hybrid model also has to hold a state of {STATE_BYTES} bytes: "
        "give a multiple of 16 from 208 on, or leave it out"
    )


def test_refused_before_a_model_is_built(tmp_path: Path) -> None:
    config = engine_config(tmp_path)
    hybrids.check(config)
    config.cache_config.block_size, config.cache_config.user_specified_block_size = 64, True
    with pytest.raises(ConfigError, match=r"^--block-size 64: a block of this hybrid model also has to hold a state"):
        hybrids.check(config)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"linear_num_value_heads": 0}, "describes states of no size"),
        ({"layer_types": ["linear_attention"] * 64}, "has no layer that attends"),
        (
            {"linear_num_key_heads": 7},
            "has linear_num_value_heads 48, which must be a multiple of linear_num_key_heads 7",
        ),
        ({"linear_key_head_dim": None}, "does not say how large its states are (TypeError: "),
    ],
)
def test_a_corrupt_config(tmp_path: Path, broken: dict[str, Any], said: str) -> None:
    config = engine_config(tmp_path)
    vars(config.model_config.hf_text_config).update(broken)
    with pytest.raises(ConfigError) as error:
        hybrids.check(config)
    assert str(error.value).startswith("config.json of this hybrid model ") and said in str(error.value)
    assert str(error.value).endswith(": take the model's original one")


def test_models_of_one_kind_are_left_alone() -> None:
    attention = {name: spec for name, spec in specs("k4v4").items() if name.startswith("layers")}
    assert hybrids.cut(attention) is attention and hybrids.cut_as_vllm_does(attention) is attention


def test_windows_in_hybrids_are_refused() -> None:
    window = SlidingWindowSpec(
        block_size=16, num_kv_heads=4, head_size=256, dtype=torch.uint8, state_content_bytes=260, sliding_window=512
    )
    with pytest.raises(UnsupportedError, match=r"hybrid models with sliding windows yet$"):
        hybrids.cut({**specs("k4v4"), "window": window})
