"""`fraqtl-bench`: arguments and result files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fraqtl_bench import results
from fraqtl_bench.cli import main
from fraqtl_bench.recall import make_text


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


def test_wrong_arguments_end_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["recall", "--formats", "int3"])
    assert ended.value.code == 2
    assert "fraqtl-bench: unknown KV format 'int3': choose one of bf16" in capsys.readouterr().err


def test_result_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        results.save(path, {"not": object()})
    assert path.read_text() == "old"
