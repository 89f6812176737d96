"""The sizing table of docs/operations.md is what `fraqtl-serve plan` prints, and so is its result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fraqtl_serve.plan import read_shapes
from fraqtl_serve.sizing import plan

ROOT = Path(__file__).parents[1]
COMMAND = "fraqtl-serve plan --models bench/sizing_models.json --kv-memory 20GiB --context 16384 --json"
COLUMNS = ("bf16", "k8v8", "k4v4", "k4v2")


def saved() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "bench" / "results" / "sizing.json").read_text())
    return found


def test_result_file_is_what_the_command_prints() -> None:
    shapes = read_shapes(ROOT / "bench" / "sizing_models.json")
    now = [plan(shape, 20 << 30, context=16384) for shape in shapes]
    for old, new in zip(saved(), now, strict=True):
        names = [row["name"] for row in old["formats"]]  # a format that is new since then is no contradiction
        assert old == {**new, "formats": [row for row in new["formats"] if row["name"] in names]}


def table_row(planned: dict[str, Any]) -> str:
    model = planned["model"]
    rows = {row["name"]: row for row in planned["formats"]}
    shape = f"{model['layers']} x {model['kv_heads']} x {model['head_size']}"
    if model["windowed_layers"]:
        shape += f", {model['windowed_layers']} see {model['window']:,}"
    cells = [f"{rows[name]['tokens']:,} ({rows[name]['users']})" for name in COLUMNS]
    return f"| {model['name']} | {shape} | {' | '.join(cells)} |"


def test_table_in_the_docs() -> None:
    docs = (ROOT / "docs" / "operations.md").read_text()
    section = docs.split("## Sizing")[1].split("\n## ")[0]
    assert COMMAND in section
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    assert lines[0] == "| model | layers x KV heads x head size | " + " | ".join(f"`{name}`" for name in COLUMNS) + " |"
    assert lines[1:] == [table_row(planned) for planned in saved()]
