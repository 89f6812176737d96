"""The lines that `fraqtl-bench tune` writes. Needs nothing but Python, so that nobody waits for torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LARGEST_ERROR = 1e-2  # of the kernel: what bf16 outputs are rounded by, and some more
Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """All whole lines of a file; a run that was killed may have left half of one."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def usable(lines: Iterable[Line]) -> list[Line]:
    """Lines of variants that could be served, ran, and were right."""
    return [
        line
        for line in lines
        if line["kind"] == "variant" and line["served"] and "median_ms" in line and line["kernel_error"] < LARGEST_ERROR
    ]
