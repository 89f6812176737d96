from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, Field, ValidationError, field_validator

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm.start import reasons


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "reasons"
    path.touch()
    monkeypatch.setenv(reasons.VARIABLE, str(path))
    return path


def caught(cause: BaseException, outer: BaseException | None = None) -> BaseException:
    """The exception as it arrives, inside another one if it is given."""
    try:
        if outer is None:
            raise cause
        try:
            raise cause
        except BaseException as inner:
            raise outer from inner
    except BaseException as error:
        return error


class Picky(BaseModel):
    value: int

    @field_validator("value")
    @classmethod
    def _refuse(cls, value: int) -> int:
        raise UnsupportedError("not with this value")


def test_ours_speak_for_themselves_wherever_they_are_in_the_chain() -> None:
    assert reasons.known(caught(UnsupportedError("no sinks"), RuntimeError("Worker failed"))) == "no sinks"
    with pytest.raises(ValidationError) as error:
        Picky(value=1)
    assert reasons.known(error.value) == "not with this value"


def test_a_checkpoint_without_a_head() -> None:
    from vllm.config import speculative

    assert "Unsupported speculative method: '{self.method}'" in Path(speculative.__file__).read_text()
    said = reasons.known(caught(NotImplementedError("Unsupported speculative method: 'mtp'")))
    assert said == (
        "this checkpoint has no head for multi-token prediction that vLLM knows: choose another method in "
        "--speculative-config, such as ngram"
    )


def test_an_operator_that_is_missing() -> None:
    with pytest.raises(AttributeError) as error:
        torch.ops.fraqtl_nothing.gelu_newer(1)
    said = reasons.known(caught(error.value, RuntimeError("Worker failed")))
    assert said is not None and said.startswith("the model needs the operator fraqtl_nothing.gelu_newer, which this")


def test_memory_that_ran_out() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    said = reasons.known(error.value)
    assert said is not None and said.startswith("memory ran out when 1,152,921,504,606,846,976 bytes more were asked")
    for other in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")):
        said = reasons.known(other)
        assert said is not None and said.startswith("memory ran out: choose a smaller model, or give less with --kv-")


class Sized(BaseModel):
    block_size: int = Field(gt=0)


def test_an_option_is_named_with_what_was_given() -> None:
    with pytest.raises(ValidationError) as error:
        Sized(block_size=-16)
    assert reasons.known(error.value) == "block_size: input should be greater than 0, and '-16' was given"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"architectures": ["RwkvForCausalLM"]},
            "this vLLM has no code for RwkvForCausalLM: choose another model",
        ),
        (
            {"model_type": "nobody"},
            "this installation of transformers doesn't know the model type 'nobody': choose another model",
        ),
        (
            {"linear_num_value_heads": "four"},
            "config.json of this model can't be used (Field 'linear_num_value_heads' expected int, got str (value: "
            "'four')): take the model's original one",
        ),
        (
            {"layer_types": ["linear_attention"]},
            "config.json of this model can't be used (`num_hidden_layers` (4) must be equal to the number of "
            "`layer_types` (1)): take the model's original one",
        ),
        (
            {"layer_types": None, "full_attention_interval": 0},
            "config.json of this model can't be used (ZeroDivisionError: integer modulo by zero): take the model's "
            "original one",
        ),
    ],
)
def test_a_config_that_makes_no_sense(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    config = {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "num_hidden_layers": 4, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception) as error:
        EngineArgs(str(tmp_path), skip_tokenizer_init=True).create_model_config()
    assert reasons.known(error.value) == sentence


def test_the_same_error_elsewhere_is_no_config() -> None:
    assert reasons.known(caught(ZeroDivisionError("integer modulo by zero"))) is None


def test_a_package_that_the_model_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks at a model in another process and says no more than that it failed."""
    from vllm.model_executor.models import ModelRegistry

    class Config(BaseModel):
        model: str

        @field_validator("model")
        @classmethod
        def _inspect(cls, model: str) -> str:
            ModelRegistry._raise_for_unsupported([model])
            return model

    (tmp_path / "lacking.py").write_text("import package_that_nobody_has\n")
    (tmp_path / "broken.py").write_text("raise RuntimeError('no good')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    for name, said in (
        (
            "lacking",
            "vLLM's code of Lacking needs the package package_that_nobody_has, which is not installed: install ",
        ),
        ("broken", "vLLM's code of Broken can't be loaded: RuntimeError: no good"),
    ):
        ModelRegistry.register_model(name.title(), f"{name}:Model")
        with pytest.raises(ValidationError) as error:
            Config(model=name.title())
        assert "failed to be inspected" in str(error.value)
        assert (reasons.known(error.value) or "").startswith(said)


def test_others_are_their_first_line() -> None:
    error = caught(ValueError("no quant\nlong story"))
    assert reasons.known(error) is None
    assert reasons.sentence(error) == "ValueError: no quant"
    assert reasons.sentence(KeyError()) == "KeyError: no message"
    assert reasons.sentence(caught(ValueError("why"), RuntimeError(""))) == "ValueError: why"


def log(name: str, error: BaseException, level: int = logging.ERROR) -> None:
    logger = logging.getLogger(name)
    logger.log(level, "failed", exc_info=(type(error), error, None))


@pytest.fixture
def taking_notes(file: Path) -> Any:
    before = logging.getLogger("vllm").handlers[:]
    reasons.install()
    reasons.install()
    logger = logging.getLogger("vllm")
    assert len(logger.handlers) == len(before) + 1
    yield file
    logger.handlers[:] = before


def test_the_reason_that_says_most_is_shown(taking_notes: Path) -> None:
    assert reasons.read(taking_notes) is None
    log("vllm.triton_utils.importing", ImportError("no Triton"))  # vLLM lives with that
    assert reasons.read(taking_notes) == "ImportError: no Triton"
    log("vllm.v1.engine.core", RuntimeError("a worker failed"))
    assert reasons.read(taking_notes) == "RuntimeError: a worker failed"
    log("vllm.v1.executor.multiproc_executor", ValueError("weights are broken"))
    log("vllm.v1.executor.multiproc_executor", ConnectionError("the other rank is gone"))
    assert reasons.read(taking_notes) == "ValueError: weights are broken"
    log("vllm.platforms", UnsupportedError("tried and left"))
    assert reasons.read(taking_notes) == "ValueError: weights are broken"
    log("vllm.v1.engine.core", UnsupportedError("no sinks"))
    assert reasons.read(taking_notes) == "no sinks"


def test_what_is_no_error_is_no_reason(taking_notes: Path) -> None:
    log("vllm.v1.engine.core", ValueError("never mind"), logging.WARNING)
    logging.getLogger("vllm.v1.engine.core").error("no exception")
    assert taking_notes.read_text() == ""


def test_nothing_is_noted_once_the_start_is_over(taking_notes: Path) -> None:
    taking_notes.unlink()
    log("vllm.v1.engine.core", ValueError("later"))
    assert not taking_notes.exists()
    assert reasons.read(taking_notes) is None


def test_without_a_server_that_asks_no_handler_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(reasons.VARIABLE, raising=False)
    before = logging.getLogger("vllm").handlers[:]
    reasons.install()
    assert logging.getLogger("vllm").handlers == before


def test_a_file_that_is_broken_has_no_reason(file: Path) -> None:
    file.write_text(json.dumps([0, "x"]) + "\n{")
    assert reasons.read(file) is None
