from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_serve.cli.start_errors import explain, noted_reasons, start_is_over
from fraqtl_vllm.start import reasons


class Picky(BaseModel):
    value: int

    @field_validator("value")
    @classmethod
    def _refuse(cls, value: int) -> int:
        raise UnsupportedError("the packed KV cache does not support this")


def explained(error: BaseException) -> str:
    """What is said about an exception that was raised while another part of vLLM gave up."""
    try:
        try:
            raise error
        except BaseException as cause:
            raise RuntimeError("Engine process failed\nto start") from cause
    except RuntimeError as outer:
        sentence = explain(outer, argparse.Namespace(port=8123))
    assert "\n" not in sentence
    return sentence


def test_our_own_error_speaks_for_itself() -> None:
    assert explained(UnsupportedError("head size 72 is not supported")) == "head size 72 is not supported"


def test_our_own_error_inside_pydantics() -> None:
    with pytest.raises(ValidationError) as error:
        Picky(value=1)
    assert explained(error.value) == "the packed KV cache does not support this"


def test_pydantics_own_error() -> None:
    with pytest.raises(ValidationError) as error:
        Picky(value="many")  # type: ignore[arg-type]
    assert explained(error.value).startswith("value: input should be a valid integer, ")
    assert explained(error.value).endswith(", and 'many' was given")


def test_port_in_use() -> None:
    taken = OSError(errno.EADDRINUSE, "Address already in use")
    assert explained(taken) == "port 8123 is taken: choose another with --port"


def test_other_os_errors_are_not_about_the_port() -> None:
    assert "port" not in explained(OSError(errno.EACCES, "Permission denied"))


def engine_that_did_not_start(codes: str = "{'EngineCore': 1}") -> str:
    error = RuntimeError(f"Engine core initialization failed. See root cause above. Failed core proc(s): {codes}")
    return explain(error, argparse.Namespace())


def test_engine_that_did_not_say_why() -> None:
    said = "the engine did not start; the reason stands in its log above (FRAQTL_TRACEBACK=1 shows where)"
    assert engine_that_did_not_start() == said
    with noted_reasons():
        assert engine_that_did_not_start() == said


def test_engine_that_said_why() -> None:
    with noted_reasons():
        reasons.note(UnsupportedError("the packed KV cache does not support this"), "vllm.v1.engine.core")
        assert engine_that_did_not_start() == "the packed KV cache does not support this"
    assert reasons.VARIABLE not in os.environ


def test_engine_that_was_killed() -> None:
    with noted_reasons():
        assert engine_that_did_not_start("{'EngineCore': -9}").startswith("a process of the engine was killed while it")
        assert engine_that_did_not_start("{'EngineCore': -11}").startswith("the engine's process was ended by SIGSEGV")
        lost = Exception("WorkerProc initialization failed due to an exception in a background process.")
        reasons.note(lost, "vllm.v1.engine.core")
        assert engine_that_did_not_start().startswith("a process of the engine was killed while it started")


def test_reasons_are_not_asked_for_once_the_start_is_over() -> None:
    with noted_reasons():
        path = Path(os.environ[reasons.VARIABLE])
        assert path.is_file()
        start_is_over()
        assert not path.exists()


def test_nowhere_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(OSError()))
    with noted_reasons():
        assert reasons.VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyError("x"), "RuntimeError: Engine process failed (FRAQTL_TRACEBACK=1 shows where)"),
        (ValueError(""), "RuntimeError: Engine process failed (FRAQTL_TRACEBACK=1 shows where)"),
    ],
)
def test_unknown_errors(error: Exception, sentence: str) -> None:
    assert explained(error) == sentence


def test_error_without_a_message() -> None:
    sentence = explain(IndexError(" \n"), argparse.Namespace())
    assert sentence == "IndexError: no message (FRAQTL_TRACEBACK=1 shows where)"


def test_chain_that_bites_its_tail() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    assert explain(first, argparse.Namespace()) == "ValueError: first (FRAQTL_TRACEBACK=1 shows where)"
