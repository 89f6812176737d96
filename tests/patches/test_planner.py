"""Plans against vLLM's own: what it counts when it starts with such layers, and in which memory it refuses to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_kv_cache_capacity
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import FORMATS
from fraqtl_vllm._vllm import get_kv_cache_configs
from fraqtl_vllm.accounting import planner, pool

DEMO = Path(__file__).parents[2] / "fraqtl_serve" / "demo_model"
MEMORY = 300 << 20
LENGTH = 8192


def layer(format_name: str, heads: int = 2, head_size: int = 64, window: int = 0) -> Any:
    """A layer's spec as our backend hands it to vLLM."""
    content = FORMATS[format_name].bytes_per_token(head_size)
    of: dict[str, Any] = {"block_size": 16, "num_kv_heads": heads, "head_size": head_size}
    of |= {"dtype": torch.uint8, "state_content_bytes": content}
    return SlidingWindowSpec(sliding_window=window, **of) if window else FullAttentionSpec(**of)


STRUCTURES: dict[str, list[dict[str, int]]] = {
    "uniform": [{}] * 6,
    "one in six sees everything": [{"window": 512} if i % 6 != 5 else {} for i in range(18)],
    "the last group is not full": [{"window": 512} if i % 6 != 5 else {} for i in range(20)],
    "half and half": [{"window": 1024 * (i % 2)} for i in range(10)],
    "windows only": [{"window": 100}] * 5,
    "two windows": [{"window": 100 + 400 * (i % 2)} for i in range(8)],
    "KV heads differ": [{"heads": 1 << (i % 3)} for i in range(7)],
    "KV heads and head sizes differ": [{"heads": 1 + i % 3, "head_size": 64 << (i % 2)} for i in range(6)],
    "full layers have more heads": [{"window": 512, "heads": 2} if i % 3 else {"heads": 4} for i in range(9)],
    "full layers have longer heads": [{"window": 512} if i % 3 else {"head_size": 128} for i in range(9)],
    "as in Gemma 4": [{"window": 512, "head_size": 256} if i % 6 != 5 else {"head_size": 512} for i in range(12)],
}
every_structure = pytest.mark.parametrize("layers", STRUCTURES.values(), ids=STRUCTURES.keys())


def specs(format_name: str, layers: list[dict[str, int]]) -> dict[str, Any]:
    return {f"layers.{i}": layer(format_name, **of) for i, of in enumerate(layers)}


@pytest.fixture
def config() -> Any:
    made = EngineArgs(str(DEMO), enforce_eager=True, max_model_len=LENGTH).create_engine_config()
    made.cache_config.kv_cache_layout = "LBHNC"
    made.scheduler_config.max_num_batched_tokens = 2048
    return made


def started(config: Any, ranks: list[dict[str, Any]], memory: list[int]) -> tuple[list[KVCacheConfig], int, float]:
    """vLLM's pools, and the tokens and sequences of its log line."""
    pools = get_kv_cache_configs(config, ranks, memory)
    return pools, *get_kv_cache_capacity(config, generate_scheduler_kv_cache_config(pools))


@every_structure
@pytest.mark.parametrize("kv_format", ["k4v4", "k8v8", "bf16"])
def test_pool_and_baseline_are_what_vllm_counts(config: Any, layers: list[dict[str, int]], kv_format: str) -> None:
    packed = specs(kv_format, layers)
    pools, tokens, concurrency = started(config, [packed], [MEMORY])
    said = pool.numbers(config, [packed], pools)
    assert (said["blocks"], said["tokens"], said["concurrency"]) == (pools[0].num_blocks, tokens, concurrency)
    assert MEMORY - said["block_bytes"] < said["blocks"] * said["block_bytes"] <= MEMORY

    plain, tokens, concurrency = started(config, [specs("bf16", layers)], [said["blocks"] * said["block_bytes"]])
    assert (said["baseline_blocks"], said["baseline_tokens"]) == (plain[0].num_blocks, tokens)
    assert said["baseline_concurrency"] == concurrency


@every_structure
def test_the_least_memory_and_the_longest_sequence(config: Any, layers: list[dict[str, int]]) -> None:
    packed = [specs("k4v4", layers)]
    need = planner.memory_for_one(config, packed)
    get_kv_cache_configs(config, packed, need)
    with pytest.raises(ValueError, match="KV cache is needed"):
        get_kv_cache_configs(config, packed, [need[0] - 1])
    memory = [need[0] * 3 // 4]
    longest = planner.longest_sequence(config, packed, memory)
    assert 0 < longest < LENGTH
    config.model_config.max_model_len = longest
    get_kv_cache_configs(config, packed, memory)
    config.model_config.max_model_len = longest + 1
    with pytest.raises(ValueError, match="KV cache is needed"):
        get_kv_cache_configs(config, packed, memory)


def test_less_than_a_sequence_can_be_planned(config: Any) -> None:
    uniform = [specs("bf16", [{}] * 4)]
    half = planner.plan(config, uniform, [LENGTH * 4 * 512 // 2])
    assert (half.tokens, half.concurrency) == (LENGTH // 2, 0.5)
    nothing = planner.plan(config, uniform, [100])
    assert (nothing.blocks, nothing.tokens, nothing.concurrency) == (0, 0, 0)
    assert planner.longest_sequence(config, uniform, [100]) == 0


def test_ranks_hold_parts_of_the_same_blocks(config: Any) -> None:
    packed = specs("k4v4", [{}] * 4)
    pools, tokens, _ = started(config, [packed, packed], [MEMORY, MEMORY // 2])
    said = pool.numbers(config, [packed, packed], pools)
    assert said["block_bytes"] == 2 * 4 * 2 * 16 * 68
    assert said["blocks"] == MEMORY // 2 // (4 * 2 * 16 * 68)
    assert said["tokens"] == tokens
    assert said["baseline_block_bytes"] == 2 * 4 * 2 * 16 * 256


def test_layers_that_lie_on_two_stages(config: Any) -> None:
    """Pipeline stages of unequal length: the one with the larger blocks decides how many there are."""
    packed = specs("k4v4", STRUCTURES["one in six sees everything"])
    stages = [dict(list(packed.items())[:12]), dict(list(packed.items())[12:])]
    plain = [planner.unpacked(stage, torch.bfloat16) for stage in stages]
    pools, tokens, _ = started(config, stages, [MEMORY, MEMORY])
    said = pool.numbers(config, stages, pools)
    assert said["tokens"] == tokens
    _, tokens, _ = started(config, plain, [t.kv_cache_tensors[0].size for t in pools])
    assert said["baseline_tokens"] == tokens


def test_an_override_of_the_blocks_is_ours_alone(config: Any) -> None:
    """The baseline has the same memory, not the same number of blocks."""
    packed = specs("k4v4", [{}] * 4)
    config.cache_config.num_gpu_blocks_override = 1000
    pools, _, _ = started(config, [packed], [MEMORY])
    said = pool.numbers(config, [packed], pools)
    assert (said["blocks"], said["baseline_blocks"]) == (1000, 1000 * 68 // 256)


# ---- what a block of a group takes

PADDED = replace(layer("k4v4"), page_size_padded=4096)


def of_groups(*groups: Any) -> KVCacheConfig:
    """A pool of groups, each the specs of its layers."""
    made = []
    for specs_of_layers in groups:
        names = {f"layers.{i}": spec for i, spec in enumerate(specs_of_layers)}
        alike = len(set(specs_of_layers)) == 1
        spec = specs_of_layers[0] if alike else UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=names)
        made.append(KVCacheGroupSpec(list(names), spec))
    return KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=made)


def sizes(*groups: Any, ranks: int = 1, dtype: Any = None) -> list[int]:
    return planner.group_block_bytes([of_groups(*groups)] * ranks, dtype)


def test_packed_bytes_of_a_block() -> None:
    # 2 heads · 16 tokens · 68 bytes = 2176, over 3 layers.
    assert sizes([layer("k4v4")] * 3) == [6528]


def test_ranks_add_up() -> None:
    assert sizes([layer("k4v4")] * 3, ranks=4) == [26112]
    assert sizes([layer("k4v4")] * 3, ranks=4, dtype=torch.bfloat16) == [98304]


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, 8192), (torch.float16, 8192), (torch.float32, 16384)])
def test_baseline_is_in_the_models_dtype(dtype: torch.dtype, expected: int) -> None:
    # 2 heads · 16 tokens · (64 + 64) numbers
    assert sizes([layer("k4v4")], dtype=dtype) == [expected]


def test_groups_of_full_and_sliding_window_attention() -> None:
    both = [layer("k4v4")], [layer("k4v4", window=128)] * 5
    assert sizes(*both) == [2176, 10880]
    assert sizes(*both, dtype=torch.bfloat16) == [8192, 40960]


def test_padding_counts_in_the_pool_and_not_in_the_baseline() -> None:
    assert sizes([PADDED] * 2) == [8192]
    assert sizes([PADDED] * 2, dtype=torch.float16) == [16384]


def test_layers_with_other_numbers_of_heads_count_each_by_its_own() -> None:
    unlike = [layer("k4v4", heads=2), layer("k4v4", heads=1)]
    assert sizes(unlike) == [2176 + 1088]
    assert sizes(unlike, dtype=torch.bfloat16) == [8192 + 4096]


def test_stages_have_layers_of_their_own() -> None:
    """Pipeline parallelism: the same group, other layers, one rank without any."""
    first, second = of_groups([layer("k4v4")] * 3), of_groups([layer("k4v4")] * 2)
    without = KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec([], layer("k4v4"))])
    assert planner.group_block_bytes([first, second, without]) == [5 * 2176]


@every_structure
def test_a_group_takes_no_more_than_a_block_of_the_pool(config: Any, layers: list[dict[str, int]]) -> None:
    """And the widest takes all of it, as does the only one."""
    packed = specs("k4v4", layers)
    pools, _, _ = started(config, [packed], [MEMORY])
    widest = max(planner.group_block_bytes(pools))
    assert [widest] == list(planner.describe(config, pools).rank_block_bytes)


@pytest.mark.parametrize("kv_format", ["k4v4", "k8v8", "k4v2"])
@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (16, 4)])
def test_gemma_4_loses_no_memory_to_padding(config: Any, heads: tuple[int, int], kv_format: str) -> None:
    """KV heads of layers with a window, and of the others. As many more tokens fit as bytes are fewer."""
    window, full = {"window": 512, "head_size": 256, "heads": heads[0]}, {"head_size": 512, "heads": heads[1]}
    packed = specs(kv_format, [full if i % 6 == 5 else window for i in range(30)])
    pools, _, _ = started(config, [packed], [4 * MEMORY])
    assert all(group.kv_cache_spec.page_size_padded is None for group in pools[0].kv_cache_groups)
    said = pool.numbers(config, [packed], pools)
    ratio = FORMATS[kv_format].ratio(512)
    assert ratio == FORMATS[kv_format].ratio(256)
    assert said["tokens"] / said["baseline_tokens"] == pytest.approx(ratio, rel=0.03)


# ---- where nothing fits


def ours(config: Any, **settings: Any) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config.attention_config.backend = AttentionBackendEnum["FRAQTL"]
    config.additional_config = {"fraqtl": settings}
    return config


def planned(config: Any, memory: int, layers: list[dict[str, int]] = STRUCTURES["uniform"]) -> Any:
    return pool.plan_pools(get_kv_cache_configs, config, [specs("k4v4", layers)], [memory])


NEED = (LENGTH // 16 + 1) * 6 * 2 * 16 * 68


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({"kv_cache_memory_bytes": 4 << 20}, f"--kv-cache-memory-bytes is {4 << 20}"),
        ({"kv_cache_memory_bytes": None}, f"--gpu-memory-utilization 0.5 leaves {4 << 20}"),
    ],
)
def test_too_little_memory(config: Any, settings: dict[str, Any], given: str) -> None:
    vars(config.cache_config).update(settings, gpu_memory_utilization=0.5)
    with pytest.raises(ConfigError) as error:
        planned(ours(config), 4 << 20)
    said = str(error.value)
    assert said.startswith(f"the longest sequence (--max-model-len), {LENGTH} tokens, takes {NEED} bytes of KV memory")
    assert f"but {given}: give --kv-cache-memory-bytes {NEED}, or --max-model-len " in said
    assert planned(config, NEED)
    config.model_config.max_model_len = int(said.split()[-1])
    assert planned(config, 4 << 20)


def test_too_little_memory_by_the_environment(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    config.cache_config.kv_cache_memory_bytes = 1 << 30
    config.model_config.max_model_len = 1 << 22
    with pytest.raises(ConfigError, match=f"but VLLM_CPU_KVCACHE_SPACE=1 gives {1 << 30}: give"):
        planned(ours(config), 1 << 30)


def test_too_few_blocks(config: Any) -> None:
    config.cache_config.num_gpu_blocks_override = 100
    with pytest.raises(ConfigError) as error:
        planned(ours(config), MEMORY)
    wanted = LENGTH // 16 + 1
    assert f"--num-gpu-blocks-override 100 makes it {100 * 6 * 2 * 16 * 68}" in str(error.value)
    assert f"give --num-gpu-blocks-override {wanted}, or --max-model-len {99 * 16}" in str(error.value)
    config.cache_config.num_gpu_blocks_override = wanted
    assert planned(config, MEMORY)


def test_not_even_a_block(config: Any) -> None:
    config.cache_config.kv_cache_memory_bytes = 1000
    with pytest.raises(ConfigError, match=f"is 1000: give --kv-cache-memory-bytes {NEED}$"):
        planned(ours(config), 1000)


def test_other_refusals_of_vllm_stay(config: Any) -> None:
    def refuse(*_: Any) -> Any:
        raise ValueError("layers of no known kind")

    with pytest.raises(ValueError, match="layers of no known kind"):
        pool.plan_pools(refuse, ours(config), [specs("k4v4", [{}])], [MEMORY])


def test_other_backends_are_left_alone(config: Any) -> None:
    config.attention_config.backend = None
    [made] = planned(config, MEMORY)
    assert not hasattr(made, pool.NOTE)
    with pytest.raises(ValueError, match="KV cache is needed"):
        planned(config, 4 << 20)


def test_memory_that_nobody_chose_grows_to_one_sequence(config: Any) -> None:
    config.cache_config.kv_cache_memory_bytes = 1 << 20
    [made] = planned(ours(config, kv_memory_fits_context=True), 1 << 20)
    assert made.num_blocks == LENGTH // 16 + 1
    assert config.cache_config.kv_cache_memory_bytes == NEED
    [made] = planned(config, MEMORY)
    assert made.num_blocks == MEMORY // (6 * 2 * 16 * 68)  # enough is left as it is


def test_memory_grows_to_half_of_what_is_free(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    free = SimpleNamespace(available_memory=6 << 20)
    monkeypatch.setattr("fraqtl_vllm._vllm.get_memory_node_info", lambda node: free, raising=False)
    with pytest.raises(ConfigError, match=f"half of the free memory is {3 << 20}: give --kv-cache-memory-bytes {NEED}"):
        planned(ours(config, kv_memory_fits_context=True), 1 << 20)


# ---- states of hybrid models

STATE = MambaSpec(shapes=((10, 8),), dtypes=(torch.float32,), block_size=16, page_size_padded=512)


def test_states_are_counted_apart() -> None:
    both = [of_groups([STATE] * 3, [layer("k4v4")] * 2)] * 2
    assert planner.group_block_bytes(both) == [0, 8704]
    assert planner.group_block_bytes(both, torch.bfloat16) == [0, 32768]
    assert planner.group_block_bytes(both, states=True) == [3072, 0]


def test_blocks_that_lie_one_after_the_other_count_whole() -> None:
    """Of 5,000 bytes here, of which the layers of a group need less."""
    both = of_groups([STATE] * 3, [layer("k4v4")] * 2)
    size = 5000 * both.num_blocks
    both.kv_cache_tensors = [
        KVCacheTensor(size, group.layer_names, layer_stride=1, block_stride=5000) for group in both.kv_cache_groups
    ]
    assert planner.group_block_bytes([both]) == [0, 5000]
    assert planner.group_block_bytes([both], states=True) == [5000, 0]
    assert planner.group_block_bytes([both], torch.bfloat16) == [0, 16384]
