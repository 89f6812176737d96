"""Tries families one after the other, each in processes of its own."""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e import forks
from tests.e2e.families.models import FAMILIES
from tests.e2e.families.row import Row

if TYPE_CHECKING:
    from tests.e2e.families.serve import Run

VERSIONS = ("vllm", "transformers")


def try_families(names: list[str], *, quick: bool) -> dict[str, Row]:
    logs, began = Path(tempfile.mkdtemp(prefix="fraqtl-families-")), time.monotonic()
    print(f"logs are in {logs}", file=sys.stderr)
    rows = {}
    for name in names:
        rows[name] = try_family(name, logs / f"{name}.log", quick=quick)
        print(f"{time.monotonic() - began:4.0f} s  {line(name, rows[name])}", file=sys.stderr)
    return rows


def try_family(name: str, log: Path, *, quick: bool) -> Row:
    """Serves it in one process, judges in another; either may crash."""
    family, began = FAMILIES[name], time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"fraqtl-{name}-") as folder:
        try:
            run = forks.in_process(log, _serve, name, Path(folder), quick)
            row = forks.in_process(log, _judge, name, Path(folder), run)
        except forks.ProcessError as error:
            row = Row(family.title, problems=[str(error)])
    row.seconds, row.day = round(time.monotonic() - began, 1), datetime.now(UTC).date().isoformat()
    row.versions = {name: version(name) for name in VERSIONS}
    return row


def _serve(name: str, folder: Path, quick: bool) -> Run:
    from tests.e2e.families.serve import serve

    return serve(FAMILIES[name], folder, quick=quick, say=lambda text: forks.say(f"        {name}: {text}"))


def _judge(name: str, folder: Path, run: Run) -> Row:
    from tests.e2e.families.judge import judge

    forks.say(f"        {name}: transformers")
    return judge(FAMILIES[name], folder, run)


def line(name: str, row: Row) -> str:
    """One line for the end."""
    if row.problems:
        what = f"FAILED: {'; '.join(row.problems)}"
    elif row.refused:
        what = f"refused: {row.refused}"
    else:
        fits = f", {row.served.tokens / row.served.tokens_with_bf16:.2f}x the tokens" if row.served else ""
        errors = ", ".join(f"{kv_format} {result.error:.2g}" for kv_format, result in row.formats.items())
        what = f"served{fits}; errors: {errors}"
    return f"{name}: {what} ({row.seconds:.0f} s)"
