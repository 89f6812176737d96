"""From measured lines to the table of launch shapes that the launcher reads (`fraqtl_kernels.gpu.tuned`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from fraqtl_bench.gpu.lines import usable
from fraqtl_bench.kernels.shapes import Shape
from fraqtl_bench.tune.variants import Variant

Line = dict[str, Any]


def best(lines: Sequence[Line]) -> str | None:
    """The variant with the least geometric mean of its times, each relative to the fastest of its shape, of those that
    were measured on most shapes; None if none was."""
    fastest: dict[str, float] = {}
    for line in lines:
        fastest[line["shape"]] = min(line["median_ms"], fastest.get(line["shape"], float("inf")))
    relative: dict[str, dict[str, float]] = {}
    for line in lines:
        relative.setdefault(line["name"], {})[line["shape"]] = line["median_ms"] / fastest[line["shape"]]
    most = max((len(by_shape) for by_shape in relative.values()), default=0)
    complete = {name: geometric_mean(found.values()) for name, found in relative.items() if len(found) == most}
    return min(complete, key=lambda name: complete[name], default=None)


def choose(lines: Sequence[Line], multiprocessors: int) -> list[dict[str, Any]]:
    """Entries of the table: for each format, head size and number of rows the best launch shape for batches with
    fewer requests x KV heads than multiprocessors, which must be split, and for all larger ones."""
    from fraqtl_kernels.gpu.constexprs import rows_for

    classes: dict[tuple[str, int, int, int | None], list[Line]] = {}
    for line in usable(lines):
        shape = Shape.parse(line["shape"])
        few = shape.batch * shape.kv_heads < multiprocessors
        rows = rows_for(shape.query_heads // shape.kv_heads)
        key = (line["format"], shape.head_size, rows, multiprocessors - 1 if few else None)
        classes.setdefault(key, []).append(line)
    entries = []
    for (format, head_size, rows, most_heads), found in classes.items():
        name = best(found)
        assert name is not None
        entry = {"format": format, "head_size": head_size, "rows": rows, "most_heads": most_heads}
        variant = Variant.parse(name)
        tuning = variant.tuning()
        entries.append(entry | {"tuning": {field: getattr(tuning, field) for field, _ in variant.launch}})
    return entries


def write(path: Path, gpu: str, entries: list[dict[str, Any]]) -> None:
    """Put the entries of a GPU into a table, in the place of those for the same formats, head sizes and rows."""
    from fraqtl_kernels.gpu import tuned

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return entry["format"], entry["head_size"], entry["rows"]

    gpus = json.loads(path.read_text())["gpus"] if path.exists() else {}
    replaced = {key(entry) for entry in entries}
    gpus[gpu] = [entry for entry in gpus.get(gpu, []) if key(entry) not in replaced] + entries
    content = {"schema_version": tuned.SCHEMA_VERSION, "gpus": gpus}
    tuned.parse(content, str(path))  # nothing is written that the launcher wouldn't read
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
