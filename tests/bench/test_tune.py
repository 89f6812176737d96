"""`fraqtl-bench tune`: what is chosen from lines, and a small run in Triton's interpreter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from fraqtl_bench.cli import main
from fraqtl_bench.kernels.arms import UnavailableError
from fraqtl_bench.tune import SHAPES, table
from fraqtl_bench.tune.variants import FIRST, Variant, second
from fraqtl_kernels.errors import ConfigError
from tests.kernels.gpu.conftest import DEVICE, one_thread  # noqa: F401

pytest.importorskip("triton")

FAST, SLOW = "tile=64,warps=2,stages=5", "tile=128,warps=4,stages=5"


def line(shape: str, name: str, ms: float, error: float = 1e-3) -> dict[str, Any]:
    variant = Variant.parse(name)
    found = {"kind": "variant", "shape": shape, "name": name, "format": "k4v4", "served": variant.is_served}
    return found | {"median_ms": ms, "kernel_error": error}


def test_names_and_variants_are_the_same() -> None:
    for text in (*FIRST, "tile=1,warps=2,stages=3,block_size=64,calibrated=0,dtype=fp16"):
        assert Variant.parse(text).name == text
    assert [v.is_served for v in second(Variant.parse(FAST))] == [True, True, False, False, False]
    for wrong in ("tile", "tile=x", "tile=1,dtype=fp8"):
        with pytest.raises(argparse.ArgumentTypeError):
            Variant.parse(wrong)


def test_a_launcher_that_lacks_something_says_so() -> None:
    with pytest.raises(UnavailableError, match="the launcher takes no turbo: choose of tile, warps, stages"):
        Variant.parse("tile=128,warps=4,stages=5,turbo=1").tuning()


def test_the_best_is_chosen_by_class_of_shape() -> None:
    """1 x 8 heads must be split over 132 multiprocessors, 64 x 8 need not."""
    few, many = "1x8192x32x8x128", "64x2048x32x8x128"
    lines = [line(few, FAST, 1.0), line(few, SLOW, 2.0), line(many, FAST, 3.0), line(many, SLOW, 2.5)]
    lines += [
        line(few, "tile=32,warps=1,stages=5", 0.1, error=0.5),  # wrong
        line(few, "tile=32,warps=1,stages=5,dtype=fp16", 0.1),  # not what a server stores
        {"kind": "baseline", "shape": few, "name": "bf16@16", "median_ms": 0.1},
        {"kind": "variant", "shape": few, "name": "tile=8", "served": True, "skipped": "does not compile"},
    ]
    entries = table.choose(lines, 132)
    assert [(e["most_heads"], e["tuning"]["tile"]) for e in entries] == [(131, 64), (None, 128)]
    assert all((e["format"], e["head_size"], e["rows"]) == ("k4v4", 128, 16) for e in entries)


def test_the_best_was_measured_on_most_shapes() -> None:
    """Otherwise a variant that only ran where it is fast would win."""
    lines = [line("a", FAST, 1.0), line("a", SLOW, 1.1), line("b", SLOW, 1.0)]
    assert table.best(lines) == SLOW
    assert table.best([*lines, line("b", FAST, 1.05)]) == FAST
    assert table.best([]) is None


def test_a_table_keeps_what_was_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    entry = {"format": "k4v4", "head_size": 128, "rows": 16, "most_heads": None}
    other = {**entry, "format": "k8v8", "tuning": {"tile": 32, "warps": 1, "stages": 5}}
    old, new = ({**entry, "tuning": {"tile": tile, "warps": 4, "stages": 5}} for tile in (64, 128))
    table.write(path, "one", [old, other])
    table.write(path, "two", [old])
    table.write(path, "one", [new])
    assert json.loads(path.read_text())["gpus"] == {"one": [other, new], "two": [old]}
    with pytest.raises(ConfigError, match="turbo"):
        table.write(path, "one", [{**entry, "tuning": {"turbo": 1}}])
    assert json.loads(path.read_text())["gpus"]["one"] == [other, new]


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="in Triton's interpreter")
def test_a_run_leaves_lines_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, chosen = tmp_path / "lines.jsonl", tmp_path / "tuned.json"
    arguments = ["--device", "cpu", "--shapes", "1x33x2x1x64", "--repeats", "1", "--out", str(lines)]
    main(["tune", *arguments, "--variants", "tile=32,warps=1,stages=1", "turbo=1", "--table", str(chosen)])
    found = [json.loads(text) for text in lines.read_text().splitlines()]
    assert [entry["kind"] for entry in found] == ["machine", "baseline", "variant", "variant", *["variant"] * 5]
    assert found[1]["name"] == "bf16@16" and found[2]["kernel_error"] < 1e-2 and found[2]["bytes"] == 33 * 68
    assert "takes no turbo" in found[3]["skipped"]
    assert [entry["launch"].get("min_tiles") for entry in found[4:6]] == [1, 4]
    assert all("median_ms" in entry for entry in found[6:])  # other pages, no calibration, fp16
    (entry,) = json.loads(chosen.read_text())["gpus"]["Triton's interpreter"]
    assert entry["tuning"]["tile"] == 32

    with lines.open("a") as file:
        file.write('{"kind": "variant", "shape"')  # a run that was killed while it wrote
    again = tmp_path / "again.json"
    main(["tune", "--lines", str(lines), "--table", str(again)])
    assert again.read_text() == chosen.read_text()
    assert "best so far: tile=32" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="in Triton's interpreter")
def test_nothing_starts_after_its_time(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    main(["tune", "--device", "cpu", "--seconds", "0", "--shapes", SHAPES[0], "--out", str(lines)])
    found = [json.loads(text) for text in lines.read_text().splitlines()]
    assert len(found) == 2 + len(FIRST) and {entry.get("skipped") for entry in found[1:]} == {"no time left"}


def test_wrong_arguments_end_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "lines").write_text("")
    for arguments, sentence in (
        (["--device", "cpu"], "--device cpu runs in Triton's interpreter: set TRITON_INTERPRET=1"),
        (["--lines", str(tmp_path / "lines")], "no line says which machine it is from"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["tune", *arguments])
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err
