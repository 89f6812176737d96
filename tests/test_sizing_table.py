"""The result file of the sizing table is what `fraqtl-serve plan` prints; docs/results/capacity.md is made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fraqtl_serve.cli.plan import read_shapes
from fraqtl_serve.cli.sizing import plan

ROOT = Path(__file__).parents[1]


def saved() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "bench" / "results" / "sizing.json").read_text())
    return found


def test_result_file_is_what_the_command_prints() -> None:
    shapes = read_shapes(ROOT / "bench" / "sizing_models.json")
    now = [plan(shape, 20 << 30, context=16384) for shape in shapes]
    for old, new in zip(saved(), now, strict=True):
        names = [row["name"] for row in old["formats"]]  # a format that is new since then is no contradiction
        assert old == {**new, "formats": [row for row in new["formats"] if row["name"] in names]}
