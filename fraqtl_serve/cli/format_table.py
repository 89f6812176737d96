"""`fraqtl-serve formats`: the KV-cache formats and what they cost."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from fraqtl_kernels.formats import DEFAULT_FORMAT, FORMATS, VectorFormat


def rows(head_size: int) -> list[dict[str, Any]]:
    """One row a format, all figures from the descriptors that the engine uses."""
    return [
        {
            "name": f.name,
            "default": f.name == DEFAULT_FORMAT,
            "k": describe(f.k),
            "v": describe(f.v),
            "bytes_per_token_and_head": f.bytes_per_token(head_size),
            "ratio": round(f.ratio(head_size), 3),
            "purpose": f.purpose,
        }
        for f in FORMATS.values()
    ]


def describe(vector: VectorFormat) -> str:
    """A vector format in words."""
    if vector.raw_dtype is not None:
        return str(vector.raw_dtype).removeprefix("torch.")
    words = [f"INT{vector.bits}"]
    words += ["calibrated"] if vector.calibrated else ["rotated"] * vector.rotated
    words.append(
        "scale a channel" if vector.static else "scale a token" if vector.groups == 1 else f"{vector.groups} scales"
    )
    return ", ".join(words)


def print_formats(head_size: int, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"head_size": head_size, "formats": rows(head_size)}, indent=2))
        return
    table = Table(title=f"KV-cache formats at head size {head_size} (* default)")
    for column, justify in (("name", "left"), ("K", "left"), ("V", "left"), ("bytes", "right"), ("ratio", "right")):
        table.add_column(column, justify=justify, no_wrap=column == "name")  # type: ignore[arg-type]
    table.add_column("for")
    for row in rows(head_size):
        name = row["name"] + ("*" if row["default"] else "")
        size, ratio = str(row["bytes_per_token_and_head"]), f"{FORMATS[row['name']].ratio(head_size):.2f}"
        table.add_row(name, row["k"], row["v"], size, ratio, row["purpose"])
    Console().print(table, "bytes: per token and KV head, key and value together; ratio: against 16 bits")
