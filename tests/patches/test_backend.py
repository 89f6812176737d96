from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, SlidingWindowSpec
from vllm.v1.serial_utils import run_method
from vllm.v1.worker.worker_base import WorkerWrapperBase

from fraqtl_kernels import cpu
from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import CPU_HEAD_SIZES, FORMATS
from fraqtl_vllm import config, workers
from fraqtl_vllm.attention import cpu as cpu_attention
from fraqtl_vllm.attention.backend import FraqtlBackend
from fraqtl_vllm.attention.turns import Turn
from fraqtl_vllm.calibration.recorder import Recorder

# Bytes per (token, KV head), key and value and scales, at head sizes 64, 80, 96, 128, 256 and 512.
BYTES = {
    "bf16": (256, 320, 384, 512, 1024, 2048),
    "fp16": (256, 320, 384, 512, 1024, 2048),
    "k8v8": (132, 164, 196, 260, 516, 1032),
    "k8v4": (100, 124, 148, 196, 388, 776),
    "k4v4": (68, 84, 100, 132, 260, 520),
}
SIZES = (64, 80, 96, 128, 256, 512)


@pytest.mark.parametrize(
    ("name", "head_size", "content"),
    [(name, size, n) for name, row in BYTES.items() for size, n in zip(SIZES, row, strict=True)],
)
def test_bytes_of_a_spec(name: str, head_size: int, content: int) -> None:
    stock = FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=head_size, dtype=torch.bfloat16)
    with set_current_vllm_config(make_config({"fraqtl": {"kv_format": name}})):
        spec = FraqtlBackend.customize_spec(stock)
    assert spec.page_size_bytes == 32 * 3 * content
    assert (spec.dtype, spec.state_content_bytes) == (torch.uint8, content)
    assert (spec.block_size, spec.num_kv_heads, spec.head_size) == (32, 3, head_size)
    assert stock.state_content_bytes is None


def test_an_estimate_without_a_configuration() -> None:
    """vLLM compares pages of several dtypes so, whatever is served."""
    stock = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    assert FraqtlBackend.customize_spec(stock).state_content_bytes == 68


def test_sliding_window_stays_in_the_spec() -> None:
    stock = SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=128)
    with set_current_vllm_config(make_config()):
        spec = FraqtlBackend.customize_spec(stock)
    assert isinstance(spec, SlidingWindowSpec)
    assert (spec.sliding_window, spec.page_size_bytes) == (128, 2176)


def test_what_vllm_asks_the_backend() -> None:
    assert FraqtlBackend.get_name() == "FRAQTL"
    assert AttentionBackendEnum["FRAQTL"].get_class() is FraqtlBackend
    assert FraqtlBackend.get_impl_cls() is cpu_attention.Impl
    assert FraqtlBackend.get_builder_cls() is cpu_attention.MetadataBuilder
    assert FraqtlBackend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,)
    assert FraqtlBackend.get_supported_head_sizes() == [64, 80, 96, 128, 256, 512] == list(CPU_HEAD_SIZES)
    (sizes,) = FraqtlBackend.get_supported_kernel_block_sizes()
    assert isinstance(sizes, MultipleOf) and sizes.base == 16
    assert FraqtlBackend.forward_includes_kv_cache_update is False
    assert (
        FraqtlBackend.supports_sliding_window()
        and FraqtlBackend.supports_sink()
        and FraqtlBackend.supports_kv_connector()
    )
    assert FraqtlBackend.supported_dtypes == [torch.float16, torch.bfloat16, torch.float32]


def make_config(additional_config: Any = None) -> VllmConfig:
    return VllmConfig(additional_config=additional_config or {}, device_config=DeviceConfig(device="cpu"))


def make_layer(additional_config: Any = None, **options: Any) -> cpu_attention.Impl:
    with set_current_vllm_config(make_config(additional_config)):
        return cpu_attention.Impl(**{"num_heads": 4, "head_size": 64, "scale": 0.125, "num_kv_heads": 2, **options})


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_formats_of_two_engines_in_a_process_stay_apart(order: tuple[int, int]) -> None:
    """Whoever's layers were built last: a worker is asked for specs under its own configuration."""
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    names, content = ("k8v8", "k4v4"), (132, 68)
    layers = [make_layer(additional_config={"fraqtl": {"kv_format": name}}) for name in names]
    assert [layer.kv_format for layer in layers] == [FORMATS[name] for name in names]
    workers.install()
    for engine in order:
        wrapper = WorkerWrapperBase()
        wrapper.vllm_config = make_config({"fraqtl": {"kv_format": names[engine]}})
        worker: Any = SimpleNamespace(
            get_kv_cache_spec=lambda: {"layer": FraqtlBackend.customize_spec(spec)}, model_runner=None
        )
        wrapper.worker = worker
        specs: Any = run_method(wrapper, "get_kv_cache_spec", (), {})  # as executors call it
        assert specs["layer"].state_content_bytes == content[engine]


def test_a_process_parses_its_settings_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    parse = config.FraqtlConfig
    monkeypatch.setattr(config, "FraqtlConfig", lambda **section: made.append(section) or parse(**section))
    config._parse.cache_clear()
    for _ in range(3):
        make_layer(additional_config={"fraqtl": {"kv_format": "k8v4", "calibration": False}})
    assert made == [{"kv_format": "k8v4", "calibration": False}]


def test_layer_without_options() -> None:
    layer = make_layer(num_kv_heads=None, logits_soft_cap=0.0)
    assert (layer.num_kv_heads, layer.soft_cap, layer.sliding_window) == (4, None, None)
    assert layer.kv_format is FORMATS["k4v4"]


def test_profiling_run_attends_nothing() -> None:
    query, output = torch.ones(3, 4, 64), torch.full((3, 4, 64), torch.nan)
    out = make_layer().forward(None, query, query, query, torch.empty(0), None, output)
    assert out is output
    assert torch.equal(out, torch.zeros(3, 4, 64))


def test_layers_that_share_pages_read_them_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Residuals of a step go to whoever attends its pages, and are forgotten where nobody else does."""
    own, other, alone = make_layer(), make_layer(kv_sharing_target_layer_name="own"), make_layer()
    layers = {name: SimpleNamespace(layer_name=name, impl=impl) for name, impl in (("own", own), ("alone", alone))}
    monkeypatch.setattr(cpu_attention, "get_forward_context", lambda: SimpleNamespace(no_compile_layers=layers))
    query, key, value = torch.randn(20, 4, 64), *torch.randn(2, 20, 2, 64).unbind()
    plan = cpu.plan_attention([0, 20], [20])
    metadata = cpu_attention.Metadata(torch.tensor([[1, 2]]), torch.arange(16, 36), plan, plan, ())
    outputs = []
    for impl in (own, alone):
        pool = torch.zeros(3, 2, 16, 68, dtype=torch.uint8)
        impl.do_kv_cache_update(None, key, value, pool, torch.arange(16, 36))
        name = "own" if impl is own else "alone"
        outputs.append(impl.forward(layers[name], query, key, value, pool, metadata, torch.empty_like(query)))
    shared = SimpleNamespace(layer_name="other", impl=other)
    outputs.append(other.forward(shared, query, key, value, pool, metadata, torch.empty_like(query)))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert own.residuals is not None and alone.residuals is None


@pytest.mark.parametrize("window", [None, 8])
def test_sinks_are_read_once_they_are_loaded(window: int | None) -> None:
    """vLLM builds a layer with an empty parameter. A prompt and a token after it, against plain softmax."""
    sinks = torch.nn.Parameter(torch.full((4,), torch.nan, dtype=torch.bfloat16))
    impl = make_layer({"fraqtl": {"kv_format": "fp16"}}, sinks=sinks, sliding_window=window)
    sinks.data.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    impl.process_weights_after_loading(torch.float32)
    query, (key, value) = torch.randn(21, 4, 64), torch.randn(2, 21, 2, 64).half().float().unbind()
    pool, table = torch.zeros(3, 2, 16, 256, dtype=torch.uint8), torch.tensor([[1, 2]], dtype=torch.int32)
    layer, outputs = SimpleNamespace(layer_name="own", impl=impl), []
    for first, last in ((0, 20), (20, 21)):
        plan, slots = cpu.plan_attention([0, last - first], [last]), torch.arange(16 + first, 16 + last)
        step = Turn(0, torch.arange(1), cpu.StepPlan(torch.tensor([last]), table, slots))
        turns = (step,) if last - first == 1 else ()
        metadata = cpu_attention.Metadata(table, slots, plan, plan.longer_than(1), turns)
        new = query[first:last], key[first:last], value[first:last]
        impl.do_kv_cache_update(None, *new[1:], pool, slots)
        outputs.append(impl.forward(layer, *new, pool, metadata, torch.empty_like(new[0])))
    expected = attention_with_sinks(query, key, value, sinks.detach().float(), window)
    torch.testing.assert_close(torch.cat(outputs), expected)
    impl.recorder = Recorder({"own": FORMATS["k4v4"]}, sequences=1)
    calibrated = impl.forward(layer, query, key, value, torch.empty(0), None, torch.empty_like(query))
    torch.testing.assert_close(calibrated, expected)


def attention_with_sinks(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", query * 0.125, key.repeat_interleave(2, 1))
    distance = torch.arange(len(query))[:, None] - torch.arange(len(key))
    scores = scores.masked_fill((distance < 0) | (distance >= (window or 1 << 30)), -torch.inf)
    beside = sinks[:, None, None].expand(*scores.shape[:2], 1)
    weights = torch.cat([scores, beside], -1).softmax(-1)[..., :-1]
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, 1))


def test_a_layer_has_as_many_sinks_as_query_heads() -> None:
    with pytest.raises(ValueError, match=r"4 query heads need as many sinks, not \(8,\)"):
        make_layer(sinks=torch.zeros(8))


def test_raw_prompt_keys_need_a_gpu() -> None:
    make_layer(additional_config={"fraqtl": {"prefill_keys": "packed"}})
    with pytest.raises(UnsupportedError, match="prefill_keys 'raw' needs a GPU: on the CPU choose 'packed'"):
        make_layer(additional_config={"fraqtl": {"prefill_keys": "raw"}})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"head_size": 72}, "head size 72 is not supported: the packed cache takes 64, 80, 96, 128, 256, 512"),
        ({"alibi_slopes": [0.5]}, "the packed KV cache does not support ALiBi models"),
        (
            {"attn_type": AttentionType.ENCODER_ONLY},
            "the packed KV cache does not support encoder_only attention, only decoders",
        ),
    ],
)
def test_refused_layers(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        make_layer(**options)
    assert str(error.value) == sentence
