"""Launch shapes of decoding that were measured, by GPU: a table that `fraqtl-bench tune` writes.

`tuned.json` beside this file, or the file that FRAQTL_DECODE_TUNING names:

    {"schema_version": 1, "gpus": {"NAME AS torch.cuda.get_device_name SAYS IT": [
        {"format": "k4v4", "head_size": 128, "rows": 16, "most_heads": 131, "tuning": {"tile": 128, "warps": 4, ...}},
        {"format": "k4v4", "head_size": 128, "rows": 16, "most_heads": null, "tuning": {...}}]}}

rows: of a query tile, see `constexprs.rows_for`. most_heads: up to how many requests x KV heads the entry holds, null:
any number; the smallest that fits is taken. That is all that is known of a batch when its CUDA graph is captured.
tuning: the fields of `Tuning`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.gpu.tuning import Tuning
from fraqtl_kernels.pages import PageLayout

SCHEMA_VERSION = 1
VARIABLE = "FRAQTL_DECODE_TUNING"
SHIPPED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    format: str
    head_size: int
    rows: int
    most_heads: int | None
    tuning: Tuning

    def fits(self, layout: PageLayout, rows: int, heads: int) -> bool:
        key = (self.format, self.head_size, self.rows)
        return key == (layout.format.name, layout.head_size, rows) and (self.most_heads or heads) >= heads


Table = dict[str, tuple[Entry, ...]]


def tuned(layout: PageLayout, rows: int, heads: int, gpu: str | None = None) -> Tuning | None:
    """The measured launch shape for a batch, None if nobody measured one.

    heads: requests x KV heads of the batch. gpu: its name (default: of the current one, if any).
    Raises ConfigError if the table can't be read.
    """
    gpu = gpu or current_gpu()
    if gpu is None:
        return None
    fitting = [e for e in table(os.environ.get(VARIABLE)).get(gpu, ()) if e.fits(layout, rows, heads)]
    fitting.sort(key=lambda e: (e.most_heads is None, e.most_heads))
    return fitting[0].tuning if fitting else None


@cache
def current_gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@cache
def table(path: str | None) -> Table:
    """The table in a file, by GPU; None: the one that is shipped, which may be absent."""
    if path is None:
        return parse(json.loads(SHIPPED.read_text()), str(SHIPPED)) if SHIPPED.exists() else {}
    try:
        return parse(json.loads(Path(path).read_text()), path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{VARIABLE}: the table {path} can't be read: {error}") from error


def parse(content: Any, name: str) -> Table:
    """Raises ConfigError, with the name of the table, if something is missing or unknown."""
    version = content.get("schema_version") if isinstance(content, Mapping) else None
    if version != SCHEMA_VERSION:
        raise ConfigError(f"{name}: schema_version is {version}, this version reads {SCHEMA_VERSION}")
    return {gpu: tuple(_entry(row, name) for row in rows) for gpu, rows in content.get("gpus", {}).items()}


def _entry(row: Mapping[str, Any], name: str) -> Entry:
    _check_names(row, Entry, f"{name}: an entry")
    _check_names(row["tuning"], Tuning, f"{name}: a tuning")
    return Entry(**{**row, "tuning": Tuning(**row["tuning"])})


def _check_names(found: Mapping[str, Any], wanted: Any, what: str) -> None:
    known = {f.name for f in fields(wanted)}
    needed = {f.name for f in fields(wanted) if f.default is MISSING}
    if unknown := sorted(set(found) - known):
        raise ConfigError(f"{what} has {', '.join(unknown)}: choose of {', '.join(sorted(known))}")
    if missing := sorted(needed - set(found)):
        raise ConfigError(f"{what} lacks {', '.join(missing)}")
