"""Lines of a start: who gets them, and when."""

from __future__ import annotations

import gc
import logging
import re
import sys
import time

import pytest

from fraqtl_vllm.start import garbage, progress


class Terminal:
    """A stderr that says it is one."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(progress.SWITCH, f"{time.time() - 2:.3f}")


def test_a_line_says_since_when(asked: None, capsys: pytest.CaptureFixture[str]) -> None:
    progress.say("loading")
    printed = capsys.readouterr()
    assert re.fullmatch(r"\[  2\.\d s\] loading\n", printed.err)
    assert printed.out == ""


def test_nobody_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(progress.SWITCH, raising=False)
    monkeypatch.setattr(progress.logger, "propagate", True)
    monkeypatch.setattr(progress, "logger", logging.getLogger("outside.of.vllm"))
    with caplog.at_level(logging.INFO):
        progress.say("loading")
    assert (capsys.readouterr().err, caplog.messages) == ("", ["loading"])


def test_once_a_process(asked: None, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        progress.say_once("this text of this test")
    assert capsys.readouterr().err.count("this text") == 1


def test_only_the_first_rank_speaks(
    asked: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        progress.say(f"rank {rank}")
    assert capsys.readouterr().err.endswith("] rank 0\n")


def test_what_is_fast_is_not_mentioned(asked: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.if_slow("compiling", seconds=0.5):
        pass
    time.sleep(0.6)
    assert capsys.readouterr().err == ""
    with progress.if_slow("compiling", seconds=0.05):
        time.sleep(0.4)
    assert capsys.readouterr().err.count("compiling") == 1


def test_counting_on_a_terminal(asked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.counted("calibrating, layer", 30) as done:
        for layer in range(1, 31):
            done(layer)
    shown = terminal.text.split("\r")
    assert shown[1].endswith("calibrating, layer: 0 of 30")
    assert shown[-1].endswith("calibrating, layer: 30 of 30\n") and terminal.text.count("\n") == 1


def test_counting_into_a_file(asked: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress.counted("calibrating, layer", 3) as done:
        done(1)
        monkeypatch.setattr(progress, "SECONDS_BETWEEN", 0.0)
        done(2)
        done(3)
    lines = [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["calibrating, layer", "calibrating, layer: 2 of 3"]


def test_collections_are_as_usual_again() -> None:
    before = gc.get_threshold()
    garbage.collect_rarely()
    try:
        assert gc.isenabled() and gc.get_threshold() > garbage.USUAL
    finally:
        garbage.collect_as_usual()
    assert gc.get_threshold() == garbage.USUAL == before
