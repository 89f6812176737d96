"""The table of measured launch shapes: what is read, what is taken, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import FORMATS
from fraqtl_kernels.gpu import tuned
from fraqtl_kernels.gpu.plan import plan_decode
from fraqtl_kernels.gpu.tuning import Tuning
from fraqtl_kernels.pages import PageLayout

LAYOUT = PageLayout(FORMATS["k4v4"], 128, 16)


def entry(most_heads: int | None, tile: int) -> dict[str, Any]:
    tuning = {"tile": tile, "warps": 4, "stages": 5, "registers": 255}
    return {"format": "k4v4", "head_size": 128, "rows": 16, "most_heads": most_heads, "tuning": tuning}


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({"schema_version": 1, "gpus": {"some GPU": rows}}))
    return str(path)


def test_the_smallest_entry_that_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.VARIABLE, write(tmp_path, [entry(None, 256), entry(131, 64), entry(16, 32)]))
    found = [tuned.tuned(LAYOUT, 16, heads, "some GPU") for heads in (8, 16, 17, 131, 132, 4000)]
    assert [t and t.tile for t in found] == [32, 32, 64, 64, 256, 256]
    assert found[0] == Tuning(32, 4, 5, 255)
    assert tuned.tuned(LAYOUT, 32, 8, "some GPU") is None
    assert tuned.tuned(PageLayout(FORMATS["k8v8"], 128, 16), 16, 8, "some GPU") is None
    assert tuned.tuned(PageLayout(FORMATS["k4v4"], 64, 16), 16, 8, "some GPU") is None
    assert tuned.tuned(LAYOUT, 16, 8, "another GPU") is None


def test_without_a_gpu_or_a_table_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "current_gpu", lambda: None)
    assert tuned.tuned(LAYOUT, 16, 8) is None
    monkeypatch.setattr(tuned, "SHIPPED", Path("absent"))
    tuned.table.cache_clear()
    assert tuned.tuned(LAYOUT, 16, 8, "some GPU") is None
    tuned.table.cache_clear()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tuning": {"tile": 128, "warps": 4}}, "a tuning lacks stages"),
        ({"tuning": {"tile": 128, "warps": 4, "stages": 5, "turbo": 1}}, "a tuning has turbo: choose of "),
        ({"batch": 3}, "an entry has batch: choose of format, head_size, most_heads, rows, tuning"),
    ],
)
def test_what_is_wrong_is_named(
    change: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tuned.VARIABLE, write(tmp_path, [entry(None, 64) | change]))
    with pytest.raises(ConfigError, match=sentence):
        tuned.tuned(LAYOUT, 16, 8, "some GPU")


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    for text, sentence in (
        ("{", "can't be read"),
        ("[]", "schema_version is None"),
        ('{"schema_version": 2}', "is 2, this version reads 1"),
    ):
        broken.write_text(text)
        tuned.table.cache_clear()
        with pytest.raises(ConfigError, match=sentence):
            tuned.table(str(broken))
    with pytest.raises(ConfigError, match=r"FRAQTL_DECODE_TUNING: the table .*absent can't be read"):
        tuned.table(str(tmp_path / "absent"))


def test_the_table_that_is_shipped_can_be_read() -> None:
    tuned.table.cache_clear()
    assert isinstance(tuned.table(None), dict)


def test_the_launcher_takes_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.VARIABLE, write(tmp_path, [entry(None, 256), entry(16, 32)]))
    monkeypatch.setattr(tuned, "current_gpu", lambda: "some GPU")
    batch = {"queries": 1, "query_heads": 32, "kv_heads": 8, "max_seq_len": 1 << 17, "num_sms": 132}
    tiles = [plan_decode(LAYOUT, requests=n, **batch).tuning.tile for n in (1, 2, 3)]
    assert tiles == [32, 32, 256]
