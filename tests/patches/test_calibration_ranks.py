"""Engines that start at once: one calibrates, the others wait for it, and nobody for ever."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from fraqtl_vllm import _vllm
from fraqtl_vllm.calibration import ranks
from fraqtl_vllm.calibration.ranks import one_engine_at_a_time


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(world_size=1, rank_in_group=0)
    monkeypatch.setattr(_vllm, "get_world_group", lambda: group)


def test_a_second_engine_waits_for_the_first(tmp_path: Path) -> None:
    folder, order, begun = tmp_path / "new", [], threading.Event()

    def second() -> None:
        begun.set()
        with one_engine_at_a_time(folder) as has_waited:
            order.append(("second", has_waited))

    with one_engine_at_a_time(folder) as has_waited:
        thread = threading.Thread(target=second)
        thread.start()
        begun.wait()
        thread.join(3 * ranks.POLL)
        order.append(("first", has_waited))
    thread.join()
    assert order == [("first", False), ("second", True)]
    assert list(folder.iterdir()) == []


def test_nobody_waits_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks.logger, "propagate", True)
    monkeypatch.setattr(_vllm.init_logger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING, logger=ranks.logger.name)  # whatever a test before this one asked of it
    with one_engine_at_a_time(tmp_path), one_engine_at_a_time(tmp_path, longest=0.2) as has_waited:
        assert has_waited
    assert f"Another process has kept {tmp_path} locked" in caplog.text


def test_a_folder_that_cannot_be_made_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file"
    with one_engine_at_a_time(folder / "x") as first, one_engine_at_a_time(folder / "x") as second:
        assert not first and not second
