"""The CUDA half in Triton's interpreter: metadata, decode, prompts behind a prefix, refusals.

Flash attention itself is vLLM's and needs a GPU; here a plain one stands in for it, with the same arguments.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction
from vllm.config import DeviceConfig, SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

from fraqtl_kernels import reference
from fraqtl_kernels.constants import IDENTITY
from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import FORMATS, KVFormat, VectorFormat
from fraqtl_kernels.gpu.operands import calibrated_bytes
from fraqtl_kernels.gpu.plan import plan_decode
from fraqtl_kernels.gpu.tuning import Tuning
from fraqtl_vllm import _vllm
from fraqtl_vllm.attention import cuda as cuda_attention
from fraqtl_vllm.attention import cuda_prefill
from fraqtl_vllm.attention.cuda_buffers import Buffers
from tests.kernels.conftest import PagedBatch, make_batch, relative_error
from tests.kernels.gpu.conftest import DEVICE, one_thread  # noqa: F401
from tests.kernels.transforms import only_center, random_constants
from tests.patches.test_support import make_model

HEADS, KV_HEADS, SIZE = 4, 2, 64
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a stand-in for what vLLM does on the GPU itself")


@pytest.fixture(autouse=True)
def worker() -> Iterator[None]:
    """What a worker makes before its model, and layers ask for: vLLM's manager of workspaces."""
    init_workspace_manager(CPU)
    yield
    reset_workspace_manager()


def plain_flash(scale: float, window: int | None, soft_cap: float | None, sinks: Tensor | None = None) -> Any:
    """What vLLM's flash attention computes, in float64: causal masks aligned to the last key. sinks: beside the keys,
    which none stands for in the stand-in."""

    def flash(q: Tensor, k: Tensor, v: Tensor, call: cuda_prefill.DevicePass, out: Tensor | None) -> Any:
        output = torch.empty_like(q) if out is None else out
        lse = torch.empty(q.shape[1], q.shape[0])
        starts, keys = call.query_start.tolist(), call.key_start.tolist()
        assert max(b - a for a, b in pairwise(starts)) == call.max_query_len
        for r in range(len(starts) - 1):
            a, b, c, d = starts[r], starts[r + 1], keys[r], keys[r + 1]
            group = q.shape[1] // k.shape[1]
            key, value = (x[c:d].double().repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[a:b].double(), key) * scale
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            if call.plan.causal:
                last = torch.arange(b - a)[:, None] + (d - c) - (b - a)
                seen = torch.arange(d - c) <= last
                if window is not None:
                    seen &= torch.arange(d - c) > last - window
                scores = scores.masked_fill(~seen, -torch.inf)
            sink = scores.new_empty(*scores.shape[:2], 0)
            if sinks is not None:
                sink = sinks.double()[:, None, None].expand(*scores.shape[:2], 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., : d - c]
            output[a:b] = torch.einsum("hqk,khd->qhd", weights, value).to(output.dtype)
            lse[:, a:b] = scores.logsumexp(-1).float()
        return output, lse

    return flash


def make_config(
    dtype: torch.dtype = torch.bfloat16, settings: dict[str, Any] | None = None, speculation: int | None = None
) -> VllmConfig:
    scheduler = SchedulerConfig.default_factory(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256)
    config = VllmConfig(
        additional_config={"fraqtl": settings or {}},
        device_config=DeviceConfig(device="cpu"),
        scheduler_config=scheduler,
    )
    config.model_config = make_model(dtype=dtype, max_model_len=256, head_size=SIZE)
    if speculation:
        config.speculative_config = SimpleNamespace(
            method="ngram",
            num_speculative_tokens=speculation,
            parallel_drafting=False,
            rejection_sample_method="standard",
        )
    return config


def make_layer(
    monkeypatch: pytest.MonkeyPatch,
    *,
    workspace: int = 96,
    settings: dict[str, Any] | None = None,
    speculation: int | None = None,
    **options: Any,
) -> cuda_attention.Impl:
    scale = SIZE**-0.5
    window, soft_cap = options.get("sliding_window"), options.get("logits_soft_cap")
    monkeypatch.setattr(cuda_prefill, "flash_attention", lambda *_: plain_flash(scale, window, soft_cap))
    monkeypatch.setattr(cuda_prefill, "WORKSPACE_BYTES", 4 * KV_HEADS * SIZE * workspace)
    with set_current_vllm_config(make_config(settings=settings, speculation=speculation)):
        return cuda_attention.Impl(HEADS, SIZE, scale, KV_HEADS, **options)


def make_builder(config: VllmConfig | None = None) -> cuda_attention.MetadataBuilder:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.uint8)
    return cuda_attention.MetadataBuilder(spec, ["layer"], config or make_config(), CPU)


def common(batch: PagedBatch, query_start: list[int] | None = None) -> CommonAttentionMetadata:
    """What a model runner says of a batch. Padding requests have length 0."""
    start = torch.tensor(query_start or batch.query_start.tolist(), dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=batch.seq_lens.int(),
        seq_lens_cpu_upper_bound=batch.seq_lens.int(),
        num_reqs=len(batch.seq_lens),
        num_actual_tokens=int(start[-1]),
        max_query_len=int(start.diff().max()),
        max_seq_len=int(batch.seq_lens.max()),
        block_table_tensor=batch.block_table,
        slot_mapping=torch.zeros(int(start[-1]), dtype=torch.int64),
    )


def mixed_batch(format_name: str = "k4v4", **options: Any) -> tuple[PagedBatch, Tensor, Tensor]:
    """Two decodes, two fresh prompts, chunks behind a short and a long prefix; their raw keys and values."""
    seq_lens, queries = (40, 17, 9, 21, 53, 200), (1, 1, 9, 21, 20, 13)
    batch = make_batch(
        format_name,
        kv_heads=KV_HEADS,
        group=HEADS // KV_HEADS,
        seq_lens=seq_lens,
        queries=queries,
        dtype=torch.bfloat16,
        seed=3,
        **options,
    )
    raw = [
        torch.cat([x[r, n - q : n] for r, (n, q) in enumerate(zip(seq_lens, queries, strict=True))])
        for x in (batch.key, batch.value)
    ]
    return batch, raw[0], raw[1]


def expected(batch: PagedBatch, layer: cuda_attention.Impl, *, raw: bool, center: Tensor | None = None) -> Tensor:
    """Attention written out over what the pages hold; `raw`: but over the chunks' own keys and values as given."""
    planes, layout = batch.layout.planes(batch.pool), batch.layout
    constants = IDENTITY if center is None else only_center(center)
    stored = [
        reference.stored_keys(planes, layout.format.k, constants),
        reference.stored_values(planes, layout.format.v),
    ]
    flash = plain_flash(layer.scale, layer.sliding_window, layer.soft_cap, layer.sinks)
    rows = []
    for r, n in enumerate(batch.seq_lens.tolist()):
        a, b = batch.query_start[r : r + 2].tolist()
        token = torch.arange(n)
        key, value = (x[batch.block_table[r, token // 16].long(), :, token % 16] for x in stored)
        if b - a == 1 and layer.kv_format.has_residual:
            residual = reference.page_residuals(batch.pool, layout, batch.block_table[r], n, constants)
            key, value = key + residual[0], value + residual[1]
        if raw and b - a > 1:
            key[n - (b - a) :] = batch.key[r, n - (b - a) : n].double()
            value[n - (b - a) :] = batch.value[r, n - (b - a) : n].double()
        call: Any = SimpleNamespace(
            query_start=torch.tensor([0, b - a]),
            key_start=torch.tensor([0, n]),
            max_query_len=b - a,
            plan=SimpleNamespace(causal=True),
        )
        rows.append(flash(batch.query[a:b].double(), key, value, call, None)[0])
    return torch.cat(rows)


def attend(layer: cuda_attention.Impl, batch: PagedBatch, key: Tensor, value: Tensor) -> Tensor:
    metadata = make_builder().build(0, common(batch))
    output = torch.full_like(batch.query, torch.nan)
    out = layer.forward(None, batch.query, key, value, batch.pool, metadata, output)
    assert out is output
    return out


SINKS = torch.tensor([-1.0, 1.0, 3.0, 4.0], dtype=torch.bfloat16)
VARIANTS = [
    {},
    {"logits_soft_cap": 5.0},
    {"sliding_window": 30},
    {"sinks": SINKS},
    {"sinks": SINKS, "sliding_window": 30},
]
IDS = ["plain", "soft cap", "window", "sinks", "sinks and window"]


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
@pytest.mark.parametrize("format_name", ["k4v4", "bf16"])
def test_mixed_batch(monkeypatch: pytest.MonkeyPatch, format_name: str, options: dict[str, Any]) -> None:
    """A workspace of 96 keys cuts the prefix of 187 into pieces; windows and soft caps reach across them."""
    layer = make_layer(monkeypatch, settings={"kv_format": format_name}, **options)
    batch, key, value = mixed_batch(format_name)
    plans = [p.plan for p in make_builder().build(0, common(batch)).prefills.passes(96, layer.sliding_window, CPU)]
    assert any(p.joined for p in plans) is ("sliding_window" not in options)
    out = attend(layer, batch, key, value)
    assert relative_error(out, expected(batch, layer, raw=True)) < 1e-2
    if format_name != "bf16":  # the raw keys of the chunks are what was attended, not the packed ones
        assert relative_error(out, expected(batch, layer, raw=False)) > 2e-2


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
def test_mixed_batch_over_packed_keys(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    layer = make_layer(monkeypatch, settings={"prefill_keys": "packed"}, **options)
    assert not hasattr(layer, "workspace")
    assert not layer.kv_format.has_residual  # a chunk's own residuals are not to be had there
    batch, key, value = mixed_batch()
    out = attend(layer, batch, key.fill_(torch.nan), value.fill_(torch.nan))
    assert relative_error(out, expected(batch, layer, raw=False)) < 1e-2


@pytest.mark.parametrize("options", [{}, {"sinks": SINKS}], ids=["plain", "sinks"])
def test_lse_agrees_with_a_key_center(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """A large constant on every key: without it on the prefix, pieces and chunk would be weighed wrongly. A sink is
    compared with it, too."""
    layer = make_layer(monkeypatch, **options)
    batch, key, value = mixed_batch()
    center = torch.randn(KV_HEADS, SIZE) * 4
    constants = only_center(center)
    batch.key += center.bfloat16()
    key = key + center.bfloat16()
    for r, n in enumerate(batch.seq_lens.tolist()):
        token = torch.arange(n)
        slots = batch.block_table[r, token // 16].long() * 16 + token % 16
        reference.write(batch.pool, batch.layout, batch.key[r, :n], batch.value[r, :n], slots, constants)
    layer.use_constants(constants)
    wanted = expected(batch, layer, raw=True, center=center)
    assert relative_error(attend(layer, batch, key, value), wanted) < 2e-2
    layer.operands = replace(layer.operands, key=replace(layer.operands.key, own_center=None))
    assert relative_error(attend(layer, batch, key, value), wanted) > 0.1


def test_what_a_cached_prefix_needs_is_compiled_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch like those of serving, which reads the pool and changes nothing in it."""
    layer = make_layer(monkeypatch)
    batch, key, value = mixed_batch()
    before, launches = batch.pool.clone(), []
    dequantize = cuda_prefill.dequantize

    def spy(*arguments: Any) -> None:
        pool, layout, *_, operands = arguments
        launches.append((pool.stride(), layout, arguments[-3].stride(), arguments[-3].dtype, operands))
        dequantize(*arguments)

    monkeypatch.setattr(cuda_prefill, "dequantize", spy)
    layer.warm_up(batch.pool)
    assert len(launches) == 1 and torch.equal(batch.pool, before)
    attend(layer, batch, key, value)
    assert len(launches) > 1 and all(launch == launches[0] for launch in launches)
    make_layer(monkeypatch, settings={"prefill_keys": "packed"}).warm_up(batch.pool)  # has no workspace
    layer.warm_up(torch.empty(0))  # nor a cache here


def test_the_matrices_of_calibration_are_counted_before_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer holds their bytes from the start and gives them up when they come, or when serving begins without."""
    layer = make_layer(monkeypatch)
    assert layer.reserved is not None
    transform, _, _ = random_constants(KV_HEADS, SIZE)
    held = layer.reserved.numel()
    layer.use_constants(transform)
    matrices = {
        x.data_ptr(): x
        for stream in (layer.operands.key, layer.operands.value)
        for part in (stream, stream.in_bytes, stream.in_words)
        for x in vars(part).values()
        if isinstance(x, Tensor) and x.dim() == 3
    }
    assert layer.reserved is None
    assert held == sum(x.numel() * x.element_size() for x in matrices.values())
    uncalibrated = make_layer(monkeypatch)
    uncalibrated.warm_up(torch.empty(0))
    assert uncalibrated.reserved is None


@pytest.mark.parametrize("name", ["k8v8", "k4v2", "k4v4-channel"])
def test_a_layer_is_given_a_format_of_its_own(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """After it was built, when its number is known, and before there is a pool."""
    layer, format = make_layer(monkeypatch), FORMATS[name]
    layer.use_format(format)
    assert layer.reserved is not None and layer.reserved.numel() == calibrated_bytes(format, SIZE, KV_HEADS)
    assert layer.layout(mixed_batch(name)[0].pool).format == format
    batch, key, value = mixed_batch(name)
    layer.use_constants(batch.constants)
    others = torch.randn(2, 9, KV_HEADS, SIZE).bfloat16().unbind()  # than those that are there
    pool, wanted = batch.pool.clone(), batch.pool.clone()
    slots = batch.block_table[2, :1].long() * 16 + torch.arange(9)
    layer.do_kv_cache_update(None, *others, pool, slots)
    reference.write(wanted, batch.layout, *others, slots, batch.constants)
    changed = wanted != batch.pool
    assert changed.any() and torch.equal(pool[~changed], wanted[~changed])
    wrong = float((pool != wanted)[changed].float().mean())
    assert wrong < 0.01 if format.needs_calibration else wrong == 0  # static scales round some numbers the other way
    decoded = batch.attention(2, residuals=batch.page_residuals(2))
    assert relative_error(attend(layer, batch, key, value)[:2], decoded) < 1e-2
    plan = layer.plan(batch.layout, 8, 1)
    assert plan.scratch_floats(SIZE) <= layer.buffers.scratch.numel()


def test_packed_keys_take_residuals_from_every_format(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(monkeypatch, settings={"prefill_keys": "packed"})
    layer.use_format(FORMATS["k4v2"])
    assert layer.kv_format == FORMATS["k4v2"].without_residual


def test_write_goes_to_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(monkeypatch)
    batch, _, _ = mixed_batch()
    pool, wanted = batch.pool.clone(), batch.pool.clone()
    key, value = torch.randn(2, 5, KV_HEADS, SIZE).bfloat16().unbind()
    slots = torch.tensor([3, 40, -1, 17])  # padded: fewer slots than tokens
    layer.do_kv_cache_update(None, key, value, pool, slots)
    reference.write(wanted, batch.layout, key[:4], value[:4], slots)
    assert torch.equal(pool, wanted)
    layer.do_kv_cache_update(None, key, value, torch.empty(0), slots)  # profiling: no cache yet


@pytest.mark.parametrize("queries", [1, 3])
def test_a_captured_launch_serves_smaller_batches(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    """What a graph keeps: the metadata and plan of its size. Then lengths change, and the last requests are padding."""
    layer = make_layer(monkeypatch)
    builder = make_builder(make_config(speculation=queries - 1))
    batch = make_batch(
        "k4v4", kv_heads=KV_HEADS, group=2, seq_lens=(130, 77, 16, 3), queries=(queries,) * 4, dtype=torch.bfloat16
    )
    said = common(batch)
    captured = builder.build_for_cudagraph_capture(said)
    assert captured.prefills is None and captured.decodes == 4 and captured.queries == queries
    output = torch.full_like(batch.query, torch.nan)
    layer.forward(None, batch.query, batch.query, batch.query, batch.pool, captured, output)
    assert relative_error(output, expected(batch, layer, raw=False)) < 1e-2
    # The runner now fills the same buffers for a batch of two.
    said.seq_lens.copy_(torch.tensor([77, 130, 0, 0]))
    said.query_start_loc.copy_(torch.tensor([0, queries, 2 * queries, 2 * queries, 2 * queries]))
    said.block_table_tensor.copy_(batch.block_table[[1, 0, 3, 2]])
    output.fill_(torch.nan)
    layer.forward(None, batch.query, batch.query, batch.query, batch.pool, captured, output)
    batch.seq_lens, batch.query_start = said.seq_lens[:2].long(), said.query_start_loc[:3].long()
    batch.block_table = said.block_table_tensor
    assert relative_error(output[: 2 * queries], expected(batch, layer, raw=False)) < 1e-2
    assert output[2 * queries :].isnan().all()


class NothingButViews(TorchDispatchMode):
    """Fails on an operation of torch that waits for the device, allocates or launches: what may be left is a view."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        assert returns and all(r.alias_info and not r.alias_info.is_write for r in returns), (
            f"{func} in a captured step"
        )
        return func(*args, **(kwargs or {}))


def launches_of(step: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a step launches: grids and arguments, tensors by address and strides."""
    launched: list[Any] = []

    def record(self: Any, *, grid: Any, warmup: bool, **arguments: Any) -> None:
        said = {n: (x.data_ptr(), x.shape, x.stride()) if isinstance(x, Tensor) else x for n, x in arguments.items()}
        launched.append((self.fn.__name__, grid, said))

    with monkeypatch.context() as patch, NothingButViews():
        patch.setattr(InterpretedFunction, "run", record)
        step()
    return launched


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_a_captured_step_is_nothing_but_launches(
    monkeypatch: pytest.MonkeyPatch, transposed: bool, queries: int
) -> None:
    """No waiting, no allocation, and the same launches whatever the lengths on the device are."""
    tuning = Tuning(16, 1, 5, transposed=transposed)
    monkeypatch.setattr(cuda_attention, "plan_decode", partial(plan_decode, tuning=tuning))
    layer = make_layer(monkeypatch, speculation=queries - 1)
    batch = make_batch(
        "k4v4", kv_heads=KV_HEADS, group=2, seq_lens=(130, 77, 16), queries=(queries,) * 3, dtype=torch.bfloat16
    )
    layer.plan(layer.layout(batch.pool), 3, queries)  # the first step of a size, before its capture
    metadata = make_builder(make_config(speculation=queries - 1)).build_for_cudagraph_capture(common(batch))
    key = torch.zeros(len(batch.query), KV_HEADS, SIZE, dtype=torch.bfloat16)
    slots, output = torch.zeros(len(batch.query), dtype=torch.int64), torch.empty_like(batch.query)

    def step() -> None:
        layer.do_kv_cache_update(None, key, key, batch.pool, slots)
        layer.forward(None, batch.query, key, key, batch.pool, metadata, output)

    first = launches_of(step, monkeypatch)
    attention = ["prepare_kernel", "attend_columns_kernel"] if transposed else ["attend_kernel"]
    assert [name for name, *_ in first] == ["write_kernel", *attention, "combine_kernel"]
    metadata.seq_lens.copy_(torch.tensor([1, 0, 130]))
    assert launches_of(step, monkeypatch) == first
    with pytest.raises(AssertionError, match="in a captured step"), NothingButViews():
        batch.seq_lens.max().item()


def test_what_the_builder_promises() -> None:
    spec = make_builder().kv_cache_spec
    for speculation, support, threshold in (
        (None, AttentionCGSupport.UNIFORM_BATCH, 1),
        (7, AttentionCGSupport.UNIFORM_BATCH, 8),
        (8, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, 8),
    ):
        config = make_config(speculation=speculation)
        assert cuda_attention.MetadataBuilder.get_cudagraph_support(config, spec) is support
        assert cuda_attention.MetadataBuilder.get_varlen_cudagraph_max_query_len(config, spec) == threshold
        assert make_builder(config).reorder_batch_threshold == threshold


def test_batches_are_split() -> None:
    batch, _, _ = mixed_batch()
    metadata = make_builder().build(0, common(batch))
    assert (metadata.decodes, metadata.queries, metadata.max_query_len) == (2, 1, 21)
    assert [chunk.row for chunk in metadata.prefills.chunks] == [2, 3, 4, 5]
    assert metadata.block_table is batch.block_table
    passes = metadata.prefills.passes(96, None, CPU)
    assert metadata.prefills.passes(96, None, CPU) is passes  # planned and uploaded once for all layers


def test_scratch_holds_every_batch_and_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "plan_decode", partial(plan_decode, tuning=Tuning(16, 1, 5)))
    layer, other = make_layer(monkeypatch), make_layer(monkeypatch)
    assert layer.buffers is other.buffers and layer.workspace is other.workspace
    scratch = layer.buffers.scratch
    batch, _, _ = mixed_batch()
    for requests in range(1, 9):
        plan = layer.plan(batch.layout, requests, 1)
        assert plan is layer.plan(batch.layout, requests, 1)
        assert plan.scratch_floats(SIZE) <= scratch.numel() > 0
    wide = make_layer(monkeypatch, workspace=64, sliding_window=100)
    assert wide.workspace is layer.workspace
    assert wide.workspace.tokens == 64 + 99  # of a chunk and its window: more than the bytes allow for
    assert wide.buffers.scratch is scratch  # whose address graphs keep
    init_workspace_manager(CPU)
    assert make_layer(monkeypatch).buffers is not layer.buffers  # of another worker


def test_scratch_grows_for_the_layer_that_needs_most() -> None:
    buffers = Buffers.of_worker(CPU)
    for floats, held in ((60, 60), (100, 100), (80, 100)):
        buffers.reserve_scratch(floats)
        assert buffers.scratch.shape == (held,) and buffers.scratch.dtype == torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype", "sentence"),
    [
        (
            (7, 5),
            torch.float16,
            "the packed KV cache needs a GPU of compute capability 8.0 or later (Ampere), this one has 7.5",
        ),
        (
            (9, 0),
            torch.float32,
            "the packed KV cache does not support float32 models on a GPU: choose --dtype bfloat16 or float16",
        ),
    ],
)
def test_refused_gpus(capability: tuple[int, int], dtype: torch.dtype, sentence: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        cuda_attention.check_gpu(capability, dtype)
    assert str(error.value) == sentence
    cuda_attention.check_gpu((8, 0), torch.bfloat16)


def test_float32_models_are_refused_where_layers_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(torch.float32)
    with set_current_vllm_config(config), pytest.raises(UnsupportedError, match="float32 models on a GPU"):
        cuda_attention.Impl(HEADS, SIZE, 0.125, KV_HEADS)


def test_static_formats_can_run_before_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM captures graphs on trial, to see how much memory they take, before it calibrates."""
    layer = make_layer(monkeypatch, settings={"kv_format": "k4v4-channel"})
    batch = make_batch("k4v4-channel", kv_heads=KV_HEADS, group=2, seq_lens=(40,), queries=(1,), dtype=torch.bfloat16)
    output = torch.full_like(batch.query, torch.nan)
    layer.forward(None, batch.query, None, None, batch.pool, make_builder().build(0, common(batch)), output)
    assert output.isfinite().all()
    assert batch.constants.key.scale is not None
    layer.use_constants(batch.constants)
    layer.forward(None, batch.query, None, None, batch.pool, make_builder().build(0, common(batch)), output)
    assert relative_error(output, batch.attention()) < 1e-2


def test_formats_without_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        FORMATS, "k2v2", KVFormat("k2v2", VectorFormat(2), VectorFormat(2), "keys that no kernel reads")
    )
    with pytest.raises(UnsupportedError) as error:
        make_layer(monkeypatch, settings={"kv_format": "k2v2"})
    assert str(error.value).startswith("the format k2v2 has no GPU kernels yet: choose one of bf16, fp16, k8v8")


def test_no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vllm, "get_flash_attn_version", lambda **_: None, raising=False)
    with pytest.raises(UnsupportedError) as error:
        cuda_prefill.flash_attention(64, 0.125, None, None)
    assert str(error.value).startswith("vLLM has no flash attention for this GPU, which prompts need: attend their")


def parameters(file: str, function: str) -> set[str]:
    """Of a function of vLLM, read from its source: the module can't be imported without a GPU."""
    source = (Path(vllm.__file__).parent / file).read_text()
    (found,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == function)
    return {argument.arg for argument in found.args.args}


def test_what_flash_attention_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM's own signature: a name that it doesn't know would fail on a GPU only."""
    told: dict[str, Any] = {}

    def record(**arguments: Any) -> tuple[str, str, str]:
        assert set(arguments) <= parameters("vllm_flash_attn/flash_attn_interface.py", "flash_attn_varlen_func")
        told.update(arguments)
        return "out", "log sums", "more"

    def version(**arguments: Any) -> int:
        assert set(arguments) <= parameters("v1/attention/backends/fa_utils.py", "get_flash_attn_version")
        return 3

    monkeypatch.setattr(_vllm, "get_flash_attn_version", version, raising=False)
    monkeypatch.setattr(_vllm, "flash_attn_varlen_func", record, raising=False)
    batch, _, _ = mixed_batch()
    passes = make_builder().build(0, common(batch)).prefills.passes(96, None, CPU)
    x = torch.zeros(1)
    windowed = cuda_prefill.flash_attention(64, 0.125, 30, 5.0)
    assert windowed(x, x, x, passes[0], None) == ("out", "log sums")
    assert (told["window_size"], told["softcap"], told["fa_version"], told["causal"]) == ([29, 0], 5.0, 3, True)
    assert told["return_softmax_lse"] is True and told["cu_seqlens_k"].dtype == torch.int32
    piece = next(p for p in passes if not p.plan.causal)
    cuda_prefill.flash_attention(64, 0.125, None, None)(x, x, x, piece, x)
    assert (told["window_size"], told["softcap"], told["causal"]) == ([-1, -1], 0.0, False)
