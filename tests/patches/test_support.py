"""Every configuration that is refused, and its sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, ParallelConfig, VllmConfig
from vllm.platforms import current_platform

from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_kernels.gpu.plan import MAX_QUERIES
from fraqtl_vllm import _vllm, layer_formats
from fraqtl_vllm.speculation import NOT_TRIED
from fraqtl_vllm.stores.support import use_packed_spec
from fraqtl_vllm.support import check_supported

PREFIX = "the packed KV cache does not support "


def make_model(model_type: str = "llama", head_size: int = 64, config: Any = None, **kind: Any) -> Any:
    """What vLLM's ModelConfig says about a model: an ordinary decoder, but for what `kind` changes."""
    ordinary = {
        "use_mla": False,
        "is_encoder_decoder": False,
        "is_attention_free": False,
        "is_hybrid": False,
        "attn_type": "decoder",
        "using_transformers_backend": lambda: False,
    }
    text_config = AutoConfig.for_model(model_type) if config is None else config
    return SimpleNamespace(hf_text_config=text_config, get_head_size=lambda: head_size, **{**ordinary, **kind})


def make_config(**parts: Any) -> Any:
    """A configuration that is served, but for what `parts` changes."""
    served = {
        "cache_config": CacheConfig(),
        "parallel_config": ParallelConfig(),
        "model_config": make_model(),
        "speculative_config": None,
        "kv_transfer_config": None,
        "lora_config": None,
        "quant_config": None,
        "additional_config": {},
    }
    return SimpleNamespace(**{**served, **parts})


def refusal(**parts: Any) -> str:
    with pytest.raises(UnsupportedError) as error:
        check_supported(make_config(**parts))
    sentence = str(error.value)
    assert sentence.startswith(PREFIX)
    assert "\n" not in sentence
    return sentence.removeprefix(PREFIX)


def test_ordinary_configuration_is_served() -> None:
    check_supported(make_config())
    check_supported(make_config(model_config=None))
    check_supported(make_config(parallel_config=ParallelConfig(tensor_parallel_size=2)))


@pytest.mark.parametrize("dtype", ["fp8", "int4_per_token_head", "turboquant_4bit_nc"])
def test_stock_cache_formats(dtype: Any) -> None:
    assert refusal(cache_config=CacheConfig(cache_dtype=dtype)) == (
        f"--kv-cache-dtype {dtype}: it stores its own formats, "
        "choose one with --kv-format and leave --kv-cache-dtype out"
    )


def test_the_models_own_dtype_may_be_named() -> None:
    """What is stored is what --kv-format says; on vLLM 0.33 such a flag must name the model's dtype anyway."""
    for dtype, other in (("bfloat16", "float16"), ("float16", "bfloat16")):
        parts: Any = {"cache_config": CacheConfig(cache_dtype=dtype)}
        check_supported(make_config(model_config=make_model(dtype=getattr(torch, dtype)), **parts))
        assert refusal(model_config=make_model(dtype=getattr(torch, other)), **parts) == (
            f"--kv-cache-dtype {dtype} for a model in {other}: leave it out, or add --dtype {dtype}"
        )


def test_layers_with_another_dtype() -> None:
    said = refusal(cache_config=CacheConfig(kv_cache_dtype_skip_layers=["sliding_window"]))
    assert said == "--kv-cache-dtype-skip-layers: name layers and their formats with --kv-layers"


def speculation(method: str = "ngram", **options: Any) -> Any:
    return SimpleNamespace(**{"method": method, "rejection_sample_method": "standard", **options})


@pytest.fixture
def on_a_bare_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use_platform(monkeypatch, serves_drafts=True)


def use_platform(monkeypatch: pytest.MonkeyPatch, cuda: bool = False, **others: Any) -> None:
    platform = SimpleNamespace(is_cuda=lambda: cuda, is_cpu=lambda: not cuda, **others)
    monkeypatch.setattr(_vllm, "current_platform", platform, raising=False)


def test_speculative_decoding_by_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    use_platform(monkeypatch, cuda=True)
    for drafts in (None, 1, MAX_QUERIES - 1):
        asked = speculation(num_speculative_tokens=drafts)
        check_supported(make_config(speculative_config=asked))
        check_supported(make_config(speculative_config=asked, use_v2_model_runner=True))  # a GPU's default
    said = refusal(speculative_config=speculation(num_speculative_tokens=MAX_QUERIES))
    assert said == "8 drafts a step on a GPU yet: choose num_speculative_tokens from 1 to 7"
    use_platform(monkeypatch)  # vLLM's own of a CPU build
    said = refusal(speculative_config=speculation())
    assert said == "speculative decoding on vLLM's CPU builds yet: leave --speculative-config out"


@pytest.mark.usefixtures("on_a_bare_cpu")
def test_speculative_decoding() -> None:
    check_supported(make_config(speculative_config=speculation()))
    said = refusal(speculative_config=speculation("medusa"))
    assert said == "speculative decoding by medusa yet: choose one of ngram, draft_model, eagle, eagle3, mtp"
    synthetic = speculation(rejection_sample_method="synthetic")
    assert refusal(speculative_config=synthetic) == "rejection_sample_method synthetic: choose standard"
    for ranks in ({"tensor_parallel_size": 2}, {"data_parallel_size": 2}):
        check_supported(make_config(speculative_config=speculation(), parallel_config=ParallelConfig(**ranks)))
    said = refusal(speculative_config=speculation(), parallel_config=ParallelConfig(pipeline_parallel_size=2))
    assert said == (
        "speculative decoding with pipeline parallelism yet: "
        "use --tensor-parallel-size, or leave --speculative-config out"
    )
    said = refusal(speculative_config=speculation(), use_v2_model_runner=True)
    assert said == "speculative decoding with vLLM's second model runner yet: set VLLM_USE_V2_MODEL_RUNNER=0"


@pytest.mark.usefixtures("on_a_bare_cpu")
def test_speculation_of_hybrid_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fraqtl_vllm.hybrids.check", lambda config: None)  # which reads a whole config.json
    config = SimpleNamespace(model_type="qwen3_next")
    model = make_model(config=config, is_hybrid=True)
    check_supported(make_config(speculative_config=speculation(), model_config=model))
    head = speculation("mtp", draft_model_config=make_model(config=config))
    check_supported(make_config(speculative_config=head, model_config=model))
    said = refusal(speculative_config=speculation("eagle", draft_model_config=make_model()), model_config=model)
    assert said == (
        "speculative decoding of hybrid models by eagle yet: choose ngram or mtp, or leave --speculative-config out"
    )
    mamba = make_model(config=SimpleNamespace(model_type="falcon_h1"), is_hybrid=True)
    said = refusal(speculative_config=speculation(), model_config=mamba)
    assert said == "speculative decoding of falcon_h1 models on a CPU yet: leave --speculative-config out"
    use_platform(monkeypatch, cuda=True)
    check_supported(make_config(speculative_config=speculation(num_speculative_tokens=3), model_config=mamba))


@pytest.mark.usefixtures("on_a_bare_cpu")
@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3", "mtp"])
def test_draft_models(method: str) -> None:
    def drafted_by(model: Any, **options: Any) -> Any:
        return speculation(method, draft_model_config=model, **options)

    model = make_model()
    check_supported(make_config(speculative_config=drafted_by(model)))
    for option in NOT_TRIED:
        said = refusal(speculative_config=drafted_by(model, **{option: "something"}))
        assert said == f'{option} in --speculative-config: leave "{option}" out'
    said = refusal(speculative_config=drafted_by(model), lora_config=object())
    assert said == "draft models with LoRA yet: leave --speculative-config out"
    said = refusal(speculative_config=drafted_by(make_model(is_hybrid=True)))
    assert said == "hybrid models as draft models yet: leave --speculative-config out"
    assert refusal(speculative_config=drafted_by(make_model(head_size=72))).startswith("this draft model: head size 72")


LEAVE_OUT = "leave --kv-transfer-config and --kv-offloading-* out"


def offloading(name: str = "OffloadingConnector", module: str | None = None, **extra: Any) -> Any:
    return KVTransferConfig(
        kv_connector=name, kv_role="kv_both", kv_connector_module_path=module, kv_connector_extra_config=extra
    )


def test_memory_and_folders_behind_it_are_served() -> None:
    check_supported(make_config(kv_transfer_config=offloading()))
    check_supported(make_config(kv_transfer_config=offloading(spec_name="CPUOffloadingSpec")))
    tiers = [{"type": "fs", "root_dir": "/somewhere"}]
    check_supported(
        make_config(kv_transfer_config=offloading(spec_name="TieringOffloadingSpec", secondary_tiers=tiers))
    )
    check_supported(make_config(cache_config=CacheConfig(kv_offloading_size=1)))


def test_blocks_are_copied_and_named_by_us() -> None:
    config = make_config(kv_transfer_config=offloading(spec_name="CPUOffloadingSpec", cpu_bytes_to_use=1))
    use_packed_spec(config)
    extra = config.kv_transfer_config.kv_connector_extra_config
    module = "fraqtl_vllm.stores.spec"
    assert extra == {"spec_name": "PackedOffloadingSpec", "spec_module_path": module, "cpu_bytes_to_use": 1}
    check_supported(config)  # as a worker sees it
    by_size = make_config(cache_config=CacheConfig(kv_offloading_size=1))
    use_packed_spec(by_size)
    assert by_size.kv_transfer_config.kv_connector_extra_config["spec_module_path"] == module
    without = make_config()
    use_packed_spec(without)
    assert without.kv_transfer_config is None


@pytest.mark.parametrize("name", ["NixlConnector", "MultiConnector", "LMCacheMPConnector"])
def test_other_connectors(name: str) -> None:
    said = refusal(kv_transfer_config=offloading(name))
    assert said == f"the KV connector {name}: choose OffloadingConnector, or {LEAVE_OUT}"


def test_connectors_that_offloading_flags_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    lmcache = CacheConfig(kv_offloading_size=1, kv_offloading_backend="lmcache")
    assert refusal(cache_config=lmcache).startswith("the KV connector LMCacheMPConnector: choose ")
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    simple = CacheConfig(kv_offloading_size=1)
    assert refusal(cache_config=simple).startswith("the KV connector SimpleCPUOffloadConnector (its copies ")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ExampleConnector", "it stores the first chunk of a prompt only, and loading it ends the engine"),
        ("LMCacheConnectorV1", "it has no copies for a CPU, and stores nothing"),
        ("SimpleCPUOffloadConnector", "its copies need CUDA"),
    ],
)
def test_connectors_that_were_tried_in_vain(name: str, why: str) -> None:
    said = refusal(kv_transfer_config=offloading(name))
    assert said == f"the KV connector {name} ({why}): choose OffloadingConnector, or {LEAVE_OUT}"


def test_settings_of_the_offloading_connector() -> None:
    module = offloading("OffloadingConnector", module="some.package")
    assert refusal(kv_transfer_config=module) == (
        f"KV connectors of other packages such as OffloadingConnector: choose OffloadingConnector, or {LEAVE_OUT}"
    )
    assert refusal(kv_transfer_config=offloading(spec_name="MySpec")) == (
        'the offloading spec MySpec: choose CPUOffloadingSpec or TieringOffloadingSpec, or leave "spec_name" out'
    )
    assert refusal(kv_transfer_config=offloading(canonical_layout=True)) == (
        'blocks in the canonical layout, which takes pages apart: leave "canonical_layout" out'
    )
    for tier in ({"type": "obj"}, "obj"):
        assert refusal(kv_transfer_config=offloading(secondary_tiers=[{"type": "fs"}, tier])) == (
            'secondary tiers of type obj: choose "fs", a folder of files'
        )


def test_engines_without_connectors() -> None:
    given = {"kv_transfer_config": offloading()}
    several = "KV connectors with pipeline or data parallelism yet: use --tensor-parallel-size, or " + LEAVE_OUT
    for parallel in (ParallelConfig(pipeline_parallel_size=2), ParallelConfig(data_parallel_size=2)):
        assert refusal(parallel_config=parallel, **given) == several
    assert refusal(additional_config={"fraqtl": {"kv_layers": {0: "k8v8"}}}, **given) == (
        f"KV connectors with formats of single layers yet: {LEAVE_OUT}"
    )
    assert refusal(lora_config=object(), **given) == (
        f"KV connectors with LoRA: blocks in a store know an adapter's name only, {LEAVE_OUT}"
    )
    windows = make_model("gemma2", sliding_window=32)
    assert refusal(model_config=windows, **given) == f"KV connectors for models with sliding windows yet: {LEAVE_OUT}"
    assert refusal(model_config=make_model(is_hybrid=True), **given) == (
        f"KV connectors for hybrid models, whose states they would have to carry, too: {LEAVE_OUT}"
    )


def test_connectors_where_they_were_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert refusal(kv_transfer_config=offloading()) == f"KV connectors on a GPU yet: {LEAVE_OUT}"


def test_context_parallelism() -> None:
    decode = ParallelConfig(tensor_parallel_size=2, decode_context_parallel_size=2)
    prefill = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=2)
    for parallel in (decode, prefill):
        assert refusal(parallel_config=parallel) == "context parallelism: use --tensor-parallel-size"


@pytest.mark.parametrize("asked", [{"enable_dbo": True}, {"ubatch_size": 2}], ids=str)
def test_micro_batches(asked: dict[str, Any]) -> None:
    sentence = "two micro-batches at once: leave --enable-dbo and --ubatch-size out"
    assert refusal(parallel_config=ParallelConfig(**asked)) == sentence


def test_block_sizes() -> None:
    assert refusal(cache_config=CacheConfig(block_size=24)) == "--block-size 24: it must be a multiple of 16"
    check_supported(make_config(cache_config=CacheConfig(block_size=48)))
    # A size that vLLM chose itself is not the user's to mend: the platform sets it afterwards.
    chosen = CacheConfig()
    chosen.block_size = 24
    check_supported(make_config(cache_config=chosen))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            make_model("deepseek_v3", use_mla=True),
            "MLA models such as this deepseek_v3: their cache is compressed by design",
        ),
        (
            make_model("t5", is_encoder_decoder=True),
            "encoder-decoder models such as this t5: cross attention keeps no packed blocks",
        ),
        (
            make_model("mamba", is_attention_free=True),
            "models without attention such as this mamba: they keep no KV cache",
        ),
        (
            make_model("bert", attn_type="encoder_only"),
            "encoder models such as this bert: they keep no KV cache",
        ),
        (
            make_model(
                config=SimpleNamespace(model_type="bamba", layer_types=["linear_attention", "full_attention"]),
                using_transformers_backend=lambda: True,
            ),
            "hybrid models such as this bamba, for which vLLM has no code of its own",
        ),
        (make_model("bloom"), "ALiBi models such as this bloom"),
        (make_model("mpt"), "ALiBi models such as this mpt"),
        (make_model(config=SimpleNamespace(model_type="baichuan")), "ALiBi models such as this baichuan"),
        (make_model(config=AutoConfig.for_model("falcon", alibi=True)), "ALiBi models such as this falcon"),
        (
            make_model(head_size=72),
            "this model: head size 72 is not supported: the packed cache takes 64, 80, 96, 128, 256, 512",
        ),
    ],
)
def test_models(model: Any, sentence: str) -> None:
    assert refusal(model_config=model) == sentence


def test_falcon_without_alibi_is_served() -> None:
    check_supported(make_config(model_config=make_model(config=AutoConfig.for_model("falcon", alibi=False))))


def test_attention_types_that_vllm_gives_as_an_enum() -> None:
    decoder, encoder = SimpleNamespace(value="decoder"), SimpleNamespace(value="encoder_only")
    check_supported(make_config(model_config=make_model(attn_type=decoder)))
    assert refusal(model_config=make_model(attn_type=encoder)).startswith("encoder models")


def test_our_own_section_is_read_first() -> None:
    with pytest.raises(ConfigError, match="unknown key 'typo'"):
        check_supported(make_config(additional_config={"fraqtl": {"typo": 1}}, speculative_config=object()))


def test_models_are_asked_what_vllm_answers() -> None:
    """The names that `make_model` stands for."""
    asked = ("use_mla", "is_encoder_decoder", "is_attention_free", "is_hybrid", "attn_type", "get_head_size")
    asked += ("using_transformers_backend",)
    assert [name for name in asked if not hasattr(ModelConfig, name)] == []
    assert "hf_text_config" in ModelConfig.__dataclass_fields__


@pytest.mark.skipif(
    type(current_platform).__name__ != "CpuWithoutNativeOps", reason="another platform checks the configuration here"
)
def test_refused_while_vllm_builds_its_configuration() -> None:
    with pytest.raises(ValidationError, match="--block-size 24: it must be a multiple of 16"):
        VllmConfig(cache_config=CacheConfig(block_size=24))


STATIC = {"additional_config": {"fraqtl": {"kv_format": "k4v4-channel"}}}


def lora(batched_tokens: int, context: int = 4096) -> dict[str, Any]:
    model = make_model()
    model.max_model_len = context
    scheduler = SimpleNamespace(max_num_batched_tokens=batched_tokens)
    return {"lora_config": object(), "model_config": model, "scheduler_config": scheduler}


def test_static_scales_where_nothing_can_be_calibrated() -> None:
    assert refusal(**lora(2047), **STATIC) == (
        "KV format k4v4-channel with LoRA and --max-num-batched-tokens 2047 (give 2048 or more): its static scales "
        "can't be calibrated"
    )
    check_supported(make_config(**lora(2047)))  # k4v4 does without


@pytest.mark.parametrize(
    "parts",
    [
        lora(2048),
        lora(512, context=128),
        {"parallel_config": ParallelConfig(pipeline_parallel_size=2, distributed_executor_backend="mp")},
        {"parallel_config": ParallelConfig(data_parallel_size=2)},
    ],
    ids=["LoRA", "LoRA and a short context", "pipeline", "data"],
)
def test_static_scales_are_calibrated_everywhere_else(parts: dict[str, Any]) -> None:
    check_supported(make_config(**parts, **STATIC))


def decoder_of(layers: int, **config: Any) -> Any:
    return make_model(config=AutoConfig.for_model("llama", num_hidden_layers=layers, **config))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kv_layers": {4: "k8v8"}}, "kv_layers names layer 4: the model has 4, give 0 to 3"),
        ({"kv_layers": {-5: "k8v8"}}, "kv_layers names layer -5: the model has 4, give 0 to 3"),
        (
            {"kv_layers": {3: "k8v8", -1: "k4v2"}},
            "kv_layers gives layer 3 two formats: leave one of them out",
        ),
        (
            {"kv_layers": {0: "k8v8"}, "kv_layer_count": 30},
            "the KV profile is for 30 layers and the model has 4: make a profile of it with "
            "fraqtl-bench quality MODEL --budget BITS",
        ),
    ],
)
def test_formats_of_layers_that_the_model_has_not(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_supported(make_config(model_config=decoder_of(4), additional_config={"fraqtl": settings}))
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        ({}, "k4v4"),
        ({0: "k8v8", -1: "k8v8", 2: "k8v4"}, "k8v8+k4v4+k8v4"),
        (dict.fromkeys(range(4), "k8v8"), "k8v8"),  # no layer has the default
        ({0: "bf16", 1: "bf16", 2: "bf16", 3: "fp16"}, "bf16+fp16"),
    ],
)
def test_reports_name_the_formats_that_layers_have(layers: dict[int, str], name: str) -> None:
    config = make_config(model_config=decoder_of(4), additional_config={"fraqtl": {"kv_layers": layers}})
    check_supported(config)
    assert layer_formats.name_of(config) == name


def test_formats_of_layers_where_vllm_would_pad_pages() -> None:
    ours = {"fraqtl": {"kv_layers": {0: "k8v8"}}}
    kinds = ["sliding_attention", "full_attention"] * 2
    windows = decoder_of(4, layer_types=kinds)
    assert refusal(model_config=windows, additional_config=ours) == (
        "formats of single layers in models with windows on some layers only yet: give one --kv-format for all layers"
    )
    check_supported(make_config(model_config=decoder_of(4, layer_types=kinds[:1] * 4), additional_config=ours))
