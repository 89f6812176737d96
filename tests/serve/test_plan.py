"""`fraqtl-serve plan`, against vLLM's own count of blocks and users."""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from fraqtl_kernels.errors import FraqtlError
from fraqtl_kernels.formats import FORMATS
from fraqtl_serve.cli.main import main
from fraqtl_serve.cli.model_config import read_shape
from fraqtl_serve.cli.plan import memory
from fraqtl_serve.cli.sizing import LayerKind, ModelShape, StateKind, fit, plan
from fraqtl_vllm._vllm import get_kv_cache_configs
from fraqtl_vllm.config import FraqtlConfig

DEMO = Path(__file__).parents[2] / "fraqtl_serve" / "demo_model"
GIB = 1 << 30
LLAMA = ModelShape("llama", 32, 8, 128, 131072)


def run(*arguments: str) -> Any:
    main(["plan", *arguments])


@pytest.fixture(scope="module")
def vllm_config() -> Any:
    config = EngineArgs(str(DEMO), enforce_eager=True).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"
    config.scheduler_config.async_scheduling = True
    return config


def vllm_count(
    config: Any, shape: ModelShape, kv_format: str, available: int, context: int, batched_tokens: int
) -> tuple[int, float]:
    """(blocks, sequences of the whole context) as vLLM has them when it starts with this memory."""
    config.model_config.max_model_len, config.scheduler_config.max_num_batched_tokens = context, batched_tokens
    of: dict[str, Any] = {"block_size": 16, "num_kv_heads": shape.kv_heads, "head_size": shape.head_size}
    of |= {"dtype": torch.uint8, "state_content_bytes": FORMATS[kv_format].bytes_per_token(shape.head_size)}
    window = shape.windowed_layers
    specs = {
        f"layers.{i}": SlidingWindowSpec(sliding_window=shape.window, **of) if i < window else FullAttentionSpec(**of)
        for i in range(shape.layers)
    }
    [pool] = get_kv_cache_configs(config, [specs], [available])
    return pool.num_blocks, get_kv_cache_capacity(config, pool)[1]


@pytest.mark.parametrize("kv_format", ["bf16", "k8v4", "k4v4"])
@pytest.mark.parametrize(
    ("layers", "kv_heads", "head_size", "windowed", "window"),
    [
        (32, 8, 128, 0, 0),
        (12, 2, 64, 12, 100),  # windows only
        (62, 16, 128, 52, 1024),  # one in six sees everything, as in Gemma 3; the last group is not full
        (26, 4, 256, 13, 4096),  # half and half, as in Gemma 2
        (25, 8, 64, 12, 128),  # nearly so: the smaller kind is filled up
    ],
)
def test_vllm_counts_the_same(
    vllm_config: Any, layers: int, kv_heads: int, head_size: int, windowed: int, window: int, kv_format: str
) -> None:
    shape = ModelShape("m", layers, kv_heads, head_size, 1 << 20, window, windowed)
    for context, batched_tokens in ((1000, 8192), (40960, 1024)):
        blocks, concurrency = vllm_count(vllm_config, shape, kv_format, 30 * GIB, context, batched_tokens)
        found = fit(shape, FORMATS[kv_format], 30 * GIB, context=context, batched_tokens=batched_tokens)
        assert found.blocks == blocks
        assert found.concurrency == pytest.approx(concurrency)


def test_windows_without_asynchronous_scheduling() -> None:
    """Gemma-3-270M in 256 MiB on a CPU: what vLLM said when it started there, 133,790 tokens and 16.33 sequences."""
    shape = ModelShape("gemma", 18, 1, 256, 32768, 512, 15)
    options: dict[str, Any] = {"context": 8192, "batched_tokens": 2048}
    found = fit(shape, FORMATS["k4v4"], 256 << 20, **options, async_scheduling=False)
    assert (found.blocks, found.tokens, round(found.concurrency, 2)) == (21509, 133_790, 16.33)
    assert fit(shape, FORMATS["k4v4"], 256 << 20, **options).tokens == 90_036  # two steps of tokens more a window


def test_layers_that_differ_are_planned_together() -> None:
    """16 tokens of 3 layers with 2 heads of 64 and of one with a head of 128 are a block: (3 · 2 · 68 + 132) · 16."""
    shape = ModelShape("m", 3, 2, 64, 4096, others=(LayerKind(1, 1, 128),))
    found = fit(shape, FORMATS["k4v4"], GIB, context=4096)
    assert found.block_bytes == (3 * 2 * 68 + 132) * 16
    assert (found.blocks, found.tokens) == (GIB // found.block_bytes, GIB // found.block_bytes * 16)


def test_worked_out_by_hand() -> None:
    # A token of k4v4 takes 8 heads · 132 bytes in each of 32 layers: 33,792 bytes, 540,672 a block.
    planned = plan(LLAMA, 20 * GIB, context=32768)
    rows = {row["name"]: row for row in planned["formats"]}
    assert rows["k4v4"]["block_bytes"] == 540_672
    assert rows["k4v4"]["blocks"] == 20 * GIB // 540_672 == 39_718
    assert rows["k4v4"]["tokens"] == 39_718 * 16
    assert rows["k4v4"]["users"] == 39_718 // 2048 == 19
    assert (rows["bf16"]["tokens"], rows["bf16"]["users"], rows["bf16"]["tokens_vs_baseline"]) == (163_840, 5, 1.0)
    assert rows["k4v4"]["tokens_vs_baseline"] == 3.88


def test_a_draft_model_is_in_the_same_blocks() -> None:
    """SmolLM2-135M with a draft of its own shape in 256 MiB on a CPU: what a server with the two said."""
    smollm2 = ModelShape("smollm2", 30, 3, 64, 2048)
    found = fit(smollm2, FORMATS["k4v4"], 256 << 20, context=2048, draft=smollm2)
    assert found.block_bytes == 30 * 3 * 16 * (68 + 132)
    assert (found.blocks, found.tokens) == (932, 14_912)
    plain = fit(smollm2, FORMATS["bf16"], 256 << 20, context=2048, draft=smollm2)
    assert plain.block_bytes == 30 * 3 * 16 * 2 * 256  # drafts are no smaller than the model's own


def test_a_draft_model_on_ranks_and_beside_formats_of_single_layers() -> None:
    """LLAMA: 32 layers of 8 KV heads of 128. The draft model's layers are in k8v8 whatever those of the model are."""
    planned = plan(LLAMA, GIB, context=4096, draft=LLAMA, ranks=4, own=FraqtlConfig(kv_layers={0: "bf16"}))
    rows = {row["name"]: row["block_bytes"] for row in planned["formats"]}
    assert rows["k4v4"] == 16 * 2 * 32 * (132 + 260)
    assert rows["k4v4+bf16"] == 16 * 2 * (31 * 132 + 512 + 32 * 260)
    with pytest.raises(FraqtlError, match="3 ranks"):
        plan(LLAMA, GIB, context=4096, draft=LLAMA, ranks=3)


def test_draft_models_that_are_not_served() -> None:
    gemma = ModelShape("gemma", 18, 1, 256, 32768, 512, 15)
    with pytest.raises(FraqtlError, match="layers of the two models have unlike windows"):
        plan(LLAMA, GIB, context=4096, draft=gemma)


def test_a_state_after_every_draft() -> None:
    """A random Qwen3-Next of 8 layers in 64 MiB on a CPU: what engines with and without n-grams said."""
    sizes = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 32, "head_v_dim": 32, "conv_kernel_size": 4}
    shape = ModelShape("tiny", 2, 2, 64, 4096, states=StateKind(6, "delta", sizes, ("bfloat16", "float32")))
    options = {"context": 960, "async_scheduling": False}
    found = fit(shape, FORMATS["k4v4"], 64 << 20, drafts=4, **options)
    assert (found.block_size, found.blocks, found.tokens, found.state_bytes) == (80, 3084, 61_680, 718_848)
    # The running one, one after each draft, and that of the prefix cache; of four tokens more in the convolution.
    assert found.state_bytes == 6 * (1 + 4 + 1) * (4 * 32 * 32 * 4 + (3 + 4) * 256 * 2)
    assert fit(shape, FORMATS["k4v4"], 64 << 20, **options).state_bytes == 6 * 2 * (4 * 32 * 32 * 4 + 3 * 256 * 2)


def test_the_command_line_takes_a_draft_model(capsys: pytest.CaptureFixture[str]) -> None:
    run("--model-config", str(DEMO), "--draft-model", str(DEMO), "--kv-memory", "1GiB")
    assert "; drafts by demo_model: 4 layers" in capsys.readouterr().out


def test_every_format_has_a_row() -> None:
    assert [row["name"] for row in plan(LLAMA, GIB, context=4096)["formats"]] == list(FORMATS)


def test_ranks_share_the_heads() -> None:
    one, four, sixteen = (plan(LLAMA, GIB, context=4096, ranks=n)["formats"][-1]["block_bytes"] for n in (1, 4, 16))
    assert (one, sixteen) == (4 * four, four // 2)  # with more ranks than heads, heads are kept twice
    with pytest.raises(FraqtlError, match="8 KV heads can't be shared by 3 ranks"):
        plan(LLAMA, GIB, context=4096, ranks=3)


def test_memory_too_small_for_one_block() -> None:
    planned = plan(LLAMA, 1000, context=4096)
    assert {row["tokens"] for row in planned["formats"]} == {0}
    assert {row["tokens_vs_baseline"] for row in planned["formats"]} == {None}


def test_sizes() -> None:
    assert [memory(text) for text in ("20GiB", "1.5 gb", "512MiB", "100", "2 TB")] == [
        20 * GIB,
        1_500_000_000,
        512 << 20,
        100,
        2 * 10**12,
    ]
    for wrong in ("", "20G", "GiB", "-1GB", "20 apples"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
            memory(wrong)


# ---- configurations


def config_file(folder: Path, **config: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_demo_model() -> None:
    expected = ModelShape("demo_model", 4, 2, 64, 8192)
    assert read_shape(str(DEMO)) == read_shape(str(DEMO / "config.json")) == expected


def test_defaults_of_a_family_that_its_configuration_leaves_out(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "num_hidden_layers": 62, "num_key_value_heads": 16, "head_dim": 128}
    shape = read_shape(config_file(tmp_path, model_type="gemma3", text_config={**text, "sliding_window": 1024}))
    assert (shape.layers, shape.kv_heads, shape.head_size) == (62, 16, 128)
    assert (shape.window, shape.windowed_layers, shape.context) == (1024, 52, 131072)


def test_a_window_that_is_not_used(tmp_path: Path) -> None:
    shape = read_shape(config_file(tmp_path, model_type="qwen2", sliding_window=4096, use_sliding_window=False))
    assert (shape.window, shape.windowed_layers) == (0, 0)


def test_layers_that_share_the_cache_of_others_take_none(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 4 + ["full_attention"]
    numbers = {"num_hidden_layers": 10, "num_key_value_heads": 2, "num_attention_heads": 8, "head_dim": 256}
    numbers |= {"sliding_window": 512, "layer_types": 2 * kinds, "max_position_embeddings": 32768}
    shape = read_shape(config_file(tmp_path, model_type="of-tomorrow", num_kv_shared_layers=5, **numbers))
    assert (shape.layers, shape.windowed_layers, shape.window) == (5, 4, 512)


def test_layers_that_see_everything_may_be_of_another_size(tmp_path: Path) -> None:
    numbers = {"num_hidden_layers": 6, "num_key_value_heads": 8, "num_attention_heads": 16, "head_dim": 128}
    numbers |= {"sliding_window": 512, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
    numbers |= {"num_global_key_value_heads": 2, "global_head_dim": 256, "max_position_embeddings": 8192}
    shape = read_shape(config_file(tmp_path, model_type="of-tomorrow", **numbers))
    assert (shape.layers, shape.kv_heads, shape.head_size, shape.windowed_layers) == (5, 8, 128, 5)
    assert shape.others == (LayerKind(1, 2, 256),)


def test_a_number_of_heads_for_every_layer(tmp_path: Path) -> None:
    numbers = {"num_hidden_layers": 5, "num_attention_heads": 16, "head_dim": 64, "max_position_embeddings": 2048}
    shape = read_shape(config_file(tmp_path, model_type="of-tomorrow", num_kv_heads=[4, 4, 4, 8, 8], **numbers))
    assert (shape.layers, shape.kv_heads, shape.others) == (3, 4, (LayerKind(2, 8, 64),))
    with pytest.raises(FraqtlError, match="num_key_value_heads is no number for every layer"):
        read_shape(config_file(tmp_path, model_type="of-tomorrow", num_kv_heads=[4, 4], **numbers))


def test_blocks_that_were_searched_for(tmp_path: Path) -> None:
    """Nemotron-NAS: a block's attention says how many query heads share a KV head, or that there is none."""
    blocks = [{"attention": {"n_heads_in_group": n, "no_op": n is None}, "ffn": {}} for n in (8, 8, None, 16, 8)]
    numbers = {"num_hidden_layers": 5, "num_attention_heads": 64, "head_dim": 128, "num_key_value_heads": None}
    numbers |= {"max_position_embeddings": 131072}
    shape = read_shape(config_file(tmp_path, model_type="nemotron-nas", block_configs=blocks, **numbers))
    assert (shape.layers, shape.kv_heads, shape.others) == (3, 8, (LayerKind(1, 4, 128),))
    with pytest.raises(FraqtlError, match="num_key_value_heads is no number for every layer"):
        read_shape(config_file(tmp_path, model_type="nemotron-nas", block_configs=[{"ffn": {}}] * 5, **numbers))


def test_a_family_that_nobody_knows(tmp_path: Path) -> None:
    numbers = {"n_layer": 10, "n_head": 16, "n_head_kv": 4, "n_embd": 1024, "n_positions": 512}
    shape = read_shape(config_file(tmp_path, model_type="of-tomorrow", **numbers))
    assert (shape.layers, shape.kv_heads, shape.head_size, shape.context) == (10, 4, 64, 512)
    assert read_shape(config_file(tmp_path, model_type="of-tomorrow", multi_query=True, **numbers)).kv_heads == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "deepseek_v3", "num_hidden_layers": 3}, "does not support MLA models"),
        ({"model_type": "x", "layer_types": ["linear_attention"], "n_layer": 1}, "layers of type linear_attention"),
        ({"model_type": "x", "n_head": 4}, "num_hidden_layers is missing: give --layers"),
        ({"model_type": "x", "n_layer": 4, "n_head": 4, "n_positions": 9}, "no head_dim and no hidden_size"),
        ({"model_type": "x", "n_layer": 4, "n_head": 4, "head_dim": 48, "n_positions": 9}, "head size 48 is not supp"),
    ],
)
def test_configurations_that_cannot_be_planned(config: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(FraqtlError, match=said):
        read_shape(config_file(tmp_path, **config))


# ---- the command


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    run("--model-config", str(DEMO), "--kv-memory", "1GiB", "--context", "4096")
    out = capsys.readouterr().out
    assert out.startswith("demo_model: 4 layers, 2 KV heads, head size 64; 1 GiB of KV memory")
    assert "users at 4,096" in out
    cells = {
        row[0]: row[1:] for line in out.splitlines() if len(row := [c.strip() for c in line.split("│")[1:-1]]) == 5
    }
    assert set(cells) == set(FORMATS)
    assert cells["k4v4"] == ["8,704", f"{GIB // 8704 * 16:,}", str(GIB // 8704 // 256), "3.76"]


def test_a_list_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: dict[str, Any] = {"name": "m", "layers": 3, "kv_heads": 2, "head_size": 64, "context": 4096}
    model["others"] = [{"layers": 1, "kv_heads": 1, "head_size": 128, "window": 100}]
    file = tmp_path / "models.json"
    file.write_text(json.dumps([model]))
    run("--models", str(file), "--kv-memory", "1GiB")
    said = capsys.readouterr().out
    assert (
        "m: 3 layers, 2 KV heads, head size 64; 1 layers with a window of 100, 1 KV heads, head size 128; 1 GiB" in said
    )


def test_json_of_bare_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    run("--layers", "32", "--kv-heads", "8", "--head-size", "128", "--context", "32768", "--json")
    planned = json.loads(capsys.readouterr().out)
    assert planned["formats"] == plan(LLAMA, 20 * GIB, context=32768)["formats"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name a model in one way"),
        (("--model-config", "x", "--layers", "3"), "name a model in one way"),
        (("--layers", "3"), "bare numbers need all of --layers, --kv-heads, --head-size and --context"),
        (("--model-config", "/no/config.json"), "/no/config.json does not exist: give a model's config.json"),
        (("--models", "/no/list.json"), "/no/list.json can't be read: No such file or directory"),
        (("--model-config", str(DEMO), "--kv-memory", "lots"), "'lots' is no size"),
        (("--model-config", str(DEMO), "--tensor-parallel-size", "3"), "2 KV heads can't be shared by 3 ranks"),
        (("--model-config", str(DEMO), "--context", "-1"), "the context must be at least 1 token, not -1"),
        (("--model-config", str(DEMO), "--draft-tokens", "-1"), "--draft-tokens -1: give 0 or more"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_vllm_logs_afterwards_as_before(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "level", logging.INFO)
    run("--layers", "2", "--kv-heads", "2", "--head-size", "64", "--context", "512")
    assert (logger.level, os.environ.get("VLLM_LOGGING_LEVEL")) == (logging.INFO, None)


def test_models_that_cannot_be_downloaded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit):
        run("--model-config", "nobody/nothing")
    err = capsys.readouterr().err
    assert err.startswith("fraqtl-serve: no config.json of nobody/nothing: ") and err.count("\n") == 1


def test_formats_of_single_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ("--layers", "4", "--kv-heads", "2", "--head-size", "64", "--context", "8192", "--json")
    run(*numbers, "--kv-layers", "0,-1=k8v8")
    [*_, mixed] = json.loads(capsys.readouterr().out)["formats"]
    assert (mixed["name"], mixed["block_bytes"]) == ("k4v4+k8v8", 2 * 16 * (2 * 68 + 2 * 132))
    layers = [{"layer": i, "kv_format": name} for i, name in enumerate(["k4v2", "k4v2", "k4v4", "k4v2"])]
    (tmp_path / "profile.json").write_text(json.dumps({"schema_version": 1, "layers": layers}))
    run(*numbers, "--kv-profile", str(tmp_path / "profile.json"))
    [*_, found] = json.loads(capsys.readouterr().out)["formats"]
    bytes_of = {name: FORMATS[name].bytes_per_token(64) for name in ("k4v2", "k4v4")}
    assert found["block_bytes"] == 2 * 16 * (3 * bytes_of["k4v2"] + bytes_of["k4v4"])


def test_formats_of_layers_that_are_not_alike() -> None:
    shape = ModelShape("windows", 4, 2, 64, 8192, window=128, windowed_layers=3)
    with pytest.raises(FraqtlError, match="for models whose layers all attend alike"):
        plan(shape, GIB, context=8192, own=FraqtlConfig(kv_layers={0: "k8v8"}))
