"""`fraqtl-bench`: arguments and result files."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fraqtl_bench import results
from fraqtl_bench.cli import main
from fraqtl_bench.recall import Question, by_depth, make_questions, make_text


class WordTokenizer:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[str]:
        return text.split()


def test_recall_texts_fill_the_context_and_hold_their_codes() -> None:
    prose = ["This sentence stands for prose of some length.", "Another one."]
    for context in (100, 1000):
        text, codes = make_text(random.Random(context), prose, WordTokenizer(), context)
        assert context - 60 < len(text.split()) <= context - 24
        assert codes
        for name, code in codes.items():
            assert text.count(f"The code for {name} is {code}.") == 1


def test_recall_asks_about_all_of_a_long_text() -> None:
    questions = make_questions(WordTokenizer(), 20_000, 60, 30, seed=0, prose=[], texts_at_once=2)
    assert len({question.prompt.split("\n")[0] for question in questions}) == 2
    for question in questions:
        place = question.prompt.index(f" is {question.answer}.") / len(question.prompt)
        assert abs(question.depth - place) < 0.01
    asked = by_depth(questions, [True] * 60)
    assert min(part["questions"] for part in asked) > 0, "names ran out before the end"
    assert [part["right"] for part in asked] == [part["questions"] for part in asked]


def test_recall_by_depth_counts_each_part_by_itself() -> None:
    questions = [Question("", "", depth) for depth in (0.0, 0.19, 0.2, 0.99)]
    assert by_depth(questions, [True, False, True, True]) == [
        {"questions": 2, "right": 1},
        {"questions": 1, "right": 1},
        {"questions": 0, "right": 0},
        {"questions": 0, "right": 0},
        {"questions": 1, "right": 1},
    ]


def test_wrong_arguments_end_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["recall", "--formats", "int3"])
    assert ended.value.code == 2
    assert "fraqtl-bench: unknown KV format 'int3': choose one of bf16" in capsys.readouterr().err


def test_ctrl_c_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fraqtl_bench.recall.running", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["recall", "--formats", "k4v4"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "fraqtl-bench: interrupted\n"


def test_result_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        results.save(path, {"not": object()})
    assert path.read_text() == "old"


@pytest.mark.slow
def test_a_command_that_is_told_to_stop_stops_its_server(tmp_path: Path) -> None:
    """`timeout` sends SIGTERM: a server of a benchmark must not stay behind, least of all on a GPU."""
    script = (
        "from fraqtl_bench import server, recall\n"
        "from fraqtl_bench.cli import main\n"
        "server.wait_until_ready = lambda s: print('PID', s.process.pid, flush=True) or __import__('time').sleep(60)\n"
        "recall.running = lambda *a: server.running(module=('timeit', '-s', 'import time', 'time.sleep(60)', '--'))\n"
        "main(['recall', '--formats', 'k4v4'])\n"
    )
    command = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    line = next(line for line in command.stdout if line.startswith("PID"))
    pid = int(line.split()[1])
    os.kill(pid, 0)
    command.terminate()
    assert command.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
