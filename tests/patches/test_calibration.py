"""Calibration without an engine: the prompt, the recorder, and files that are not what they should be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fraqtl_kernels.calibration.importance import attend
from fraqtl_kernels.calibration.prompt import CHUNKS, SEQUENCES, positions, token_rows
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.formats import FORMATS
from fraqtl_vllm import _vllm
from fraqtl_vllm.calibration import files, prompt
from fraqtl_vllm.calibration.projection import projections
from fraqtl_vllm.calibration.recorder import Recorder
from tests.kernels.transforms import random_constants

KEY = "0123456789abcdef" * 4


def constants() -> dict[str, LayerConstants]:
    return {"layers.0": random_constants(2, 64)[0], "layers.1": LayerConstants.of(key_scale=torch.randn(2, 64))}


def same(a: dict[str, LayerConstants], b: dict[str, LayerConstants]) -> bool:
    def flat(x: LayerConstants) -> dict[str, Any]:
        return {part: tensor.tolist() for part, tensor in x.tensors().items()}

    return a.keys() == b.keys() and all(flat(a[name]) == flat(b[name]) for name in a)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(files.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING)
    caplog.set_level(logging.WARNING, logger=files.logger.name)  # whatever a test before this one asked of it
    return caplog


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path, saved = files.path_of(str(tmp_path / "new"), KEY), constants()
    assert files.load(path, KEY) is None
    assert files.save(path, KEY, saved)
    found = files.load(path, KEY)
    assert found is not None and same(found, saved)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "can't be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "can't be read"),
        (lambda path: path.write_bytes(b"no such header" * 40), "can't be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55"), "corrupt"),
    ],
)
def test_damaged_files_are_named_and_not_used(
    tmp_path: Path, log: pytest.LogCaptureFixture, damage: Any, message: str
) -> None:
    path = files.path_of(str(tmp_path), KEY)
    files.save(path, KEY, constants())
    damage(path)
    assert files.load(path, KEY) is None
    assert message in log.text and str(path) in log.text and "calibrating anew" in log.text


def test_the_file_of_another_model_is_not_used(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    path = files.path_of(str(tmp_path), KEY)
    files.save(path, KEY[::-1], constants())
    assert files.load(path, KEY) is None
    assert "belongs to another model" in log.text


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    assert not files.save(files.path_of(str(tmp_path / "file"), KEY), KEY, constants())
    assert "every start repeats it" in log.text


def test_the_key_changes_with_weights_format_rank_and_context() -> None:
    def key(weight: float = 0.5, kv_format: str = "k4v4", rank: int = 0, context: int = 1024) -> str:
        model = torch.nn.Linear(300, 7, dtype=torch.bfloat16)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 2100).view(7, 300))
            model.weight[0, 0] = weight
            model.bias.zero_()
        config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=context, dtype=torch.bfloat16))
        return files.make_key(model, kv_format, rank, config)  # type: ignore[arg-type]

    keys = [key(), key(weight=0.25), key(kv_format="k4v2"), key(rank=1), key(context=2048)]
    assert len(set(keys)) == len(keys) and key() == keys[0]


def model_config(**changes: Any) -> Any:
    config = {"max_model_len": 500, "uses_mrope": False, "skip_tokenizer_init": True, "get_vocab_size": lambda: 97}
    return SimpleNamespace(**{**config, **changes})


@pytest.mark.parametrize("max_seq_len", [600, 1000, 8192, 131072])
def test_the_prompt_covers_the_context(max_seq_len: int) -> None:
    made = prompt.make_prompt(model_config(max_model_len=max_seq_len))
    positions = made.positions.view(made.sequences, -1)
    assert made.ids.shape == made.positions.shape and made.ids.max() < 97
    assert (positions[:, :64] == torch.arange(64)).all() and (positions[:, ::64] <= max_seq_len - 64).all()
    assert positions.max() == max_seq_len - 1 and (positions[0].diff() == 1).all()
    starts = positions[:, ::64].flatten().unique()
    steps = starts.diff()
    assert (steps[starts[1:] < 900] <= 64).all()  # no gap where most requests are
    assert (steps <= 64 + starts[:-1] * 0.6).all()


@pytest.mark.parametrize("length", [64, 128, 256, 512, 1024])
def test_shorter_sequences_cover_the_context_too(length: int) -> None:
    """Of one length as many places as of another, from the first to the last."""
    found = positions(8192, length)
    assert found.shape == (SEQUENCES, length) and (found[0] == torch.arange(length)).all()
    assert (found[:, : length // CHUNKS] == torch.arange(length // CHUNKS)).all() and found.max() == 8191
    starts = found[1:, :: length // CHUNKS].flatten().unique()
    assert len(starts) == 3 * (CHUNKS - 1) + 1 and (found[:, 1:] > found[:, :-1]).all()


def test_the_prompt_fits_short_contexts_and_mrope() -> None:
    made = prompt.make_prompt(model_config(max_model_len=10, uses_mrope=True))
    assert made.ids.shape == (10 * made.sequences,) and made.positions.shape == (3, 10 * made.sequences)
    assert made.positions.max() == 9


def test_rows_start_with_other_texts_and_have_one_first_token() -> None:
    rows = token_rows([[1, 10 + i, 20 + i] for i in range(8)], 9, first_token=1)
    assert rows[0] == [1, 10, 20, 11, 21, 12, 22, 13, 23] and rows[3] == [1, 16, 26, 17, 27, 10, 20, 11, 21]
    assert token_rows([[1, 2]] * 4, 5, first_token=None)[2] == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (3, None), (None, 5.0)])
def test_the_recorders_attention(window: int | None, soft_cap: float | None) -> None:
    """Against every row of every sequence by itself; a layer that shares keys sees those of the other one."""
    query, key, value = torch.randn(14, 4, 64), torch.randn(14, 2, 64), torch.randn(14, 2, 64)
    options, projection = {"scale": 0.2, "window": window, "soft_cap": soft_cap}, torch.randn(4, 64, 64)
    recorder = Recorder(dict.fromkeys("ab", FORMATS["k4v4"]), 2, {"a": projection @ projection.mT}, ["a"])
    out = recorder.attend("a", None, query, key, value, **options)
    shared = recorder.attend("b", "a", query, torch.empty(0), torch.empty(0), **options)
    assert torch.equal(out, shared) and recorder.constants.keys() == {"a"}
    _, importance = attend(query, key, value, sequences=2, projection=recorder.projections["a"], **options)
    expected_constants = calibrate(FORMATS["k4v4"], key, query, value, importance)
    assert same({"a": recorder.constants["a"]}, {"a": expected_constants})
    for token in range(14):
        first = max(token - token % 7, token - window + 1 if window else 0)
        for head in range(4):
            scores = key[first : token + 1, head // 2] @ query[token, head] * 0.2
            scores = scores if soft_cap is None else soft_cap * (scores / soft_cap).tanh()
            expected = scores.softmax(0) @ value[first : token + 1, head // 2]
            assert torch.allclose(out[token, head], expected, atol=1e-5)


class Attention(torch.nn.Module):
    """As vLLM's layer tells of itself: four query heads of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.impl = SimpleNamespace(num_heads=4, head_size=64)


class Block(torch.nn.Module):
    """An attention layer, and linear layers beside it under names that say nothing."""

    def __init__(self, *linear: torch.nn.Module) -> None:
        super().__init__()
        self.attention = Attention()
        self.others = torch.nn.Linear(256, 256)
        for number, layer in enumerate(linear):
            self.add_module(f"x{number}", layer)


@pytest.fixture
def row_parallel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], Any]]:
    """Makes vLLM's own linear layers, with random weights and a bias."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)

    def make(inputs: int, outputs: int) -> Any:
        layer = _vllm.RowParallelLinear(inputs, outputs, disable_tp=True)
        for weight in layer.parameters():
            torch.nn.init.normal_(weight.data)
        layer.quant_method.process_weights_after_loading(layer)
        return layer

    with set_current_vllm_config(VllmConfig()):
        yield make


def test_the_output_projection_is_found_by_what_it_is(row_parallel: Callable[[int, int], Any]) -> None:
    linear = row_parallel(256, 96)
    expected = linear.weight.detach().T.unflatten(0, (4, 64))
    block = Block(row_parallel(192, 96), linear)
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), block)
    found = projections(model, {"model.layers.7.self_attn.attn": block.attention}, torch.float32)
    torch.testing.assert_close(found["model.layers.7.self_attn.attn"], expected @ expected.mT, rtol=1e-4, atol=1e-2)


def test_weights_that_are_not_what_the_kernel_multiplies_by_are_not_believed(
    row_parallel: Callable[[int, int], Any],
) -> None:
    """As of layers that keep scales elsewhere, order their weights for a kernel, or have thrown them away."""
    linear = row_parallel(256, 96)
    matrix = linear.weight.detach().clone()
    expected = matrix.T.unflatten(0, (4, 64))
    linear.quant_method = SimpleNamespace(apply=lambda layer, x, bias: x @ matrix.T)
    block = Block(linear)
    for weight in (matrix / 3, matrix.flip(0), torch.empty(0), (matrix * 9).to(torch.int8), matrix):
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        found = projections(block, {"a": block.attention}, torch.float32)
        torch.testing.assert_close(found["a"], expected @ expected.mT, rtol=1e-4, atol=1e-2)


def test_a_recorder_tells_of_every_layer() -> None:
    recorder, told = Recorder(dict.fromkeys("abc", FORMATS["k4v4"]), 1), []
    recorder.on_layer = told.append
    for layer in "abc":
        recorder.attend(layer, None, *torch.randn(3, 5, 2, 64), scale=1.0, window=None, soft_cap=None)
    assert told == [1, 2, 3]
    assert not recorder._keys  # nobody shares them, and they are half a gigabyte of a model of 8B


def test_an_output_projection_that_is_not_certain_is_left_out(
    row_parallel: Callable[[int, int], Any], log: pytest.LogCaptureFixture
) -> None:
    infinite = row_parallel(256, 96)
    infinite.weight.data[3, 5] = torch.inf
    log.set_level(logging.INFO, logger=files.logger.name)
    for linear in ([], [row_parallel(192, 96)], [row_parallel(256, 96), row_parallel(256, 96)], [infinite]):
        block = Block(*linear)
        assert projections(block, {"a": block.attention}, torch.float32) == {}
    assert log.text.count("The output projection of 1 layers is not known") == 4
