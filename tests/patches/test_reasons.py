from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError, field_validator

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
