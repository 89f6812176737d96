from __future__ import annotations

import math
import os
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.platforms
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.block_table import ComputeSlotMappingKernel

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm import names, plugin
from fraqtl_vllm.platform import cpu_platform
from fraqtl_vllm.platform.cpu_platform import CpuWithoutNativeOps, compute_slot_mapping, replace_kernels
from fraqtl_vllm.platform.native_ops import draw_tokens

ours_only = pytest.mark.skipif(
    not isinstance(current_platform, CpuWithoutNativeOps), reason="vLLM runs on another platform here"
)


# ---- slot mapping


@pytest.mark.parametrize("block_size", [16, 32, 48])
@pytest.mark.parametrize("seed", range(5))
def test_slots_of_random_batches(seed: int, block_size: int) -> None:
    rng = random.Random(seed)
    queries = [rng.choice([0, 1, 1, 2, 17, 60]) for _ in range(6)]
    before = [rng.randrange(200) for _ in queries]
    num_tokens, max_tokens = sum(queries), sum(queries) + rng.choice([0, 1, 40])
    table = torch.tensor([[rng.randrange(1, 5000) for _ in range(20)] for _ in range(9)], dtype=torch.int32)
    expected = []
    for row, (start, count) in enumerate(zip(before, queries, strict=True)):
        for position in range(start, start + count):
            block = int(table[row][position // block_size])
            expected.append(block * block_size + position % block_size)
    expected += [-1] * (max_tokens - num_tokens)

    starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
    positions = [p for start, count in zip(before, queries, strict=True) for p in range(start, start + count)]
    slots = torch.full((max_tokens + 3,), 77)
    compute_slot_mapping(
        num_tokens,
        max_tokens,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(positions, dtype=torch.int64),
        table,
        table.stride(0),
        slots,
        block_size,
        1,
        0,
        1,
        -1,
        1024,
    )
    assert slots.tolist() == [*expected, 77, 77, 77]


def test_slots_of_block_numbers_beyond_32_bits() -> None:
    table = torch.tensor([[2**31 - 1]], dtype=torch.int32)
    slots = torch.zeros(1, dtype=torch.int64)
    compute_slot_mapping(1, 1, torch.tensor([0, 1]), torch.tensor([15]), table, 1, slots, 16, 1, 0, 1, -1, 1024)
    assert slots.tolist() == [34359738367]


def test_slot_mapping_takes_the_arguments_of_vllms_kernel() -> None:
    kernel = ComputeSlotMappingKernel.kernel
    names = list(kernel.arg_names) if hasattr(kernel, "arg_names") else list(kernel.__code__.co_varnames[:13])
    assert names[:13] == [
        "num_tokens",
        "max_num_tokens",
        "query_start_loc_ptr",
        "positions_ptr",
        "block_table_ptr",
        "block_table_stride",
        "slot_mapping_ptr",
        "KV_CACHE_BLOCK_SIZE",
        "TOTAL_CP_WORLD_SIZE",
        "TOTAL_CP_RANK",
        "CP_KV_CACHE_INTERLEAVE_SIZE",
        "PAD_ID",
        "BLOCK_SIZE",
    ]


# ---- sampling


def test_equal_seeds_give_equal_tokens() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)).expand(50, -1)
    seeds = torch.arange(50) * 7919
    tokens = draw_tokens(logits, seeds)
    assert (tokens.dtype, tokens.shape) == (torch.int64, (50,))
    assert torch.equal(tokens, draw_tokens(logits, seeds))
    # A row's token is its own seed's, whatever else is in the batch.
    assert torch.equal(tokens.flip(0), draw_tokens(logits, seeds.flip(0)))
    assert len(set(tokens.tolist())) > 25


@pytest.mark.parametrize("apart", [1, 100, 300])
def test_frequencies_are_those_of_softmax(apart: int) -> None:
    """apart: tokens from one that can be drawn to the next. Sums are looked up in chunks of 256."""
    weights = [1, 2, 3, 4, 10, 20, 60]
    draws = 20_000
    logits = torch.full((7 * apart,), -math.inf)
    logits[::apart] = torch.tensor(weights, dtype=torch.float32).log() + 3  # softmax is blind to the constant
    tokens = torch.cat([draw_tokens(logits.expand(1000, -1), x) for x in torch.arange(draws).split(1000)])
    assert (tokens % apart == 0).all()
    counts = torch.bincount(tokens // apart, minlength=7).tolist()
    statistic = sum((n - draws * w / 100) ** 2 / (draws * w / 100) for n, w in zip(counts, weights, strict=True))
    assert statistic < 22.46  # chi-square with 6 degrees of freedom exceeds it once in a thousand


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((500, 2000), -math.inf)
    logits[:, [3, 1999]] = 0.0
    tokens = draw_tokens(logits, torch.arange(500)).tolist()
    assert set(tokens) == {3, 1999}


@ours_only
def test_native_ops_are_there() -> None:
    CpuWithoutNativeOps.import_kernels()
    CpuWithoutNativeOps.import_kernels()  # vLLM calls it again in every worker
    logits = torch.tensor([[0.0, 5.0, 1.0], [9.0, 5.0, 1.0]])
    assert torch.ops._C.greedy_argmax(logits).tolist() == [1, 0]
    masked = logits.masked_fill(logits < 5, -math.inf)
    assert torch.ops._C.fused_gumbel_argmax(masked[:1], torch.tensor([4])).tolist() == [1]
    assert torch.ops._C.init_cpu_memory_env([0]) is None


# ---- the platform


STAND_IN = "fraqtl_vllm.platform.cpu_platform.CpuWithoutNativeOps"
CUDA, CPU, ZEN = (
    f"vllm.platforms.{name}" for name in ("cuda.CudaPlatform", "cpu.CpuPlatform", "zen_cpu.ZenCpuPlatform")
)


def missing() -> None:
    raise ModuleNotFoundError("No module named 'vllm.driver'")


@pytest.mark.parametrize(
    ("found", "ours"),
    [
        ([None, None], STAND_IN),
        ([CUDA, None], None),
        ([None, "vllm.platforms.rocm.RocmPlatform"], None),
        ([None, CPU], "fraqtl_vllm.platform.native_cpu_platform.NativeCpu"),
        ([None, ZEN], "fraqtl_vllm.platform.native_cpu_platform.NativeZenCpu"),
        ([CUDA, CPU], None),  # vLLM refuses to choose
        ([missing, None], STAND_IN),  # a finder that fails found nothing, for vLLM, too
        ([missing, CPU], "fraqtl_vllm.platform.native_cpu_platform.NativeCpu"),
    ],
)
def test_platform_that_fits(monkeypatch: pytest.MonkeyPatch, found: list[Any], ours: str | None) -> None:
    finders = {str(i): f if callable(f) else (lambda f=f: f) for i, f in enumerate(found)}
    monkeypatch.setattr(vllm.platforms, "builtin_platform_plugins", finders)
    assert plugin.platform() == ours
    assert AttentionBackendEnum["FRAQTL"].get_path() == "fraqtl_vllm.attention.backend.FraqtlBackend"
    if ours is not None:
        resolve_obj_by_qualname(ours)


def test_our_platforms_stand_in_place_of_vllms_that_exist() -> None:
    for theirs, ours in names.IN_PLACE_OF.items():
        assert issubclass(resolve_obj_by_qualname(ours), resolve_obj_by_qualname(theirs))


def test_registering_twice_is_harmless() -> None:
    plugin.register()
    plugin.register()
    assert list(AttentionBackendEnum.__members__).count("FRAQTL") == 1


def choose(backend: str | None) -> str:
    selected = None if backend is None else SimpleNamespace(name=backend)
    chosen: str = CpuWithoutNativeOps.get_attn_backend_cls(selected, SimpleNamespace())
    return chosen


@pytest.mark.parametrize("backend", [None, "FRAQTL"])
def test_attention_is_always_ours(backend: str | None) -> None:
    assert choose(backend) == "fraqtl_vllm.attention.backend.FraqtlBackend"


def test_attention_that_needs_a_gpu_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"^--attention-backend FLASH_ATTN needs a GPU: .* choose FRAQTL$"):
        choose("FLASH_ATTN")


@ours_only
@pytest.mark.parametrize(("given", "used"), [(None, 16), (48, 48)])
def test_configuration(given: int | None, used: int) -> None:
    from vllm.config import CacheConfig, VllmConfig

    cache: dict[str, Any] = {} if given is None else {"block_size": given}
    config = VllmConfig(cache_config=CacheConfig(**cache))
    assert config.cache_config.block_size == used
    assert config.attention_config.backend is AttentionBackendEnum["FRAQTL"]
    assert config.compilation_config.custom_ops == ["none"]
    assert config.parallel_config.distributed_executor_backend == "uni"


# ---- cores


@pytest.mark.parametrize(
    ("cores", "ranks", "bound"),
    [
        ({0, 1}, 2, "0|1"),
        ({2, 3, 5, 7}, 2, "2,3|5,7"),
        ({0, 1, 2, 3, 4}, 2, "0,1|2,3"),
        ({0, 1, 2}, 4, "0|1|2|0"),  # fewer cores than ranks: they share
    ],
)
def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, cores: set[int], ranks: int, bound: str) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: cores)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    cpu_platform._bind_ranks_to_cores(ranks)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == bound


def test_cores_that_the_user_chose_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3|4-7")
    cpu_platform._bind_ranks_to_cores(2)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0-3|4-7"


@ours_only
def test_a_kernel_is_replaced_beside_modules_that_vllm_stumbles_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba, once imported: its llvmlite has an object that has every attribute, so a second engine could not start."""
    import llvmlite.binding  # noqa: F401
    from vllm.triton_utils import dispatcher

    name = "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel"
    monkeypatch.setattr(ComputeSlotMappingKernel, "kernel", ComputeSlotMappingKernel.kernel)  # put back afterwards
    replace_kernels.cache_clear()
    with pytest.raises(AttributeError, match="_lib_fn_wrapper"):
        dispatcher.register_kernels({name: compute_slot_mapping})
    CpuWithoutNativeOps.register_triton_kernel_overrides()
    first = ComputeSlotMappingKernel.kernel
    assert isinstance(first, dispatcher.KernelOverride)
    assert dispatcher.sys is sys
    CpuWithoutNativeOps.register_triton_kernel_overrides()  # for the next engine of this process
    assert ComputeSlotMappingKernel.kernel is first
