"""`fraqtl-bench`: arguments, result files, and a small real run of `kernels`."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest

from fraqtl_bench import results
from fraqtl_bench.cli import main
from fraqtl_bench.kernels import Shape, bytes_read
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


def test_shapes() -> None:
    assert Shape.parse("8x4096x32x8x128") == Shape(8, 4096, 32, 8, 128)
    for wrong in ("8x4096", "a", "1x2x3x4x5x6"):
        with pytest.raises(argparse.ArgumentTypeError, match="give batch x context"):
            Shape.parse(wrong)


def test_bytes_that_a_decode_step_must_read() -> None:
    shape = Shape(2, 1000, 32, 8, 128)
    assert bytes_read("sdpa-bf16", shape) == 2 * 1000 * 8 * 512
    assert bytes_read("k4v4", shape) == 2 * 1000 * 8 * 132


def test_kernels_run_and_write_what_they_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "kernels.json"
    arguments = ["--grid", "1x64x4x2x64", "--repeats", "2", "--working-set", "1", "--max-sets", "2", "--out", str(out)]
    main(["kernels", *arguments])
    found = json.loads(out.read_text())
    assert found["schema_version"] == results.SCHEMA_VERSION
    assert found["machine"]["cores"] >= 1 and found["packages"]["torch"]
    arms = found["kernels"]["1x64x4x2x64"]
    assert set(arms) == {"sdpa-bf16", "bf16", "fp16", "k8v8", "k8v4", "k4v4"}
    assert all(0 < arm["relative_error"] < 1e-2 and arm["median_ms"] > 0 for arm in arms.values())
    assert "sdpa-bf16" in capsys.readouterr().out


def test_wrong_arguments_end_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["recall", "--formats", "int3"])
    assert ended.value.code == 2
    assert "fraqtl-bench: unknown KV format 'int3': choose one of bf16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["kernels", "--grid", "1x64x5x2x64"])
    assert "must be a multiple of the KV heads" in capsys.readouterr().err


def test_result_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        results.save(path, {"not": object()})
    assert path.read_text() == "old"
