"""Tries families one after the other.

Their processes are forked from one that has imported vLLM and transformers already, which takes long enough once.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tests.e2e.families.models import FAMILIES
from tests.e2e.families.row import Row

if TYPE_CHECKING:
    from tests.e2e.families.serve import Run

T = TypeVar("T")
IMPORTED = ["vllm.entrypoints.llm", "transformers", "tests.e2e.families.judge"]
VERSIONS = ("vllm", "transformers")
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def try_families(names: list[str], *, quick: bool) -> dict[str, Row]:
    os.environ.update(ENVIRONMENT)
    os.environ.pop("TRITON_INTERPRET", None)  # of the kernel tests, which may run this
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    logs, began = Path(tempfile.mkdtemp(prefix="fraqtl-families-")), time.monotonic()
    print(f"logs are in {logs}", file=sys.stderr)
    rows = {}
    for name in names:
        rows[name] = try_family(name, context, logs / f"{name}.log", quick=quick)
        print(f"{time.monotonic() - began:4.0f} s  {line(name, rows[name])}", file=sys.stderr)
    return rows


def try_family(name: str, context: ForkServerContext, log: Path, *, quick: bool) -> Row:
    """Serves it in one process, judges in another; either may crash."""
    family, began = FAMILIES[name], time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"fraqtl-{name}-") as folder:
        try:
            run = _in_process(context, log, _serve, name, Path(folder), quick)
            row = _in_process(context, log, _judge, name, Path(folder), run)
        except BrokenProcessPool:
            row = Row(family.title, problems=[f"its process died, see {log}"])
    row.seconds, row.day = round(time.monotonic() - began, 1), datetime.now(UTC).date().isoformat()
    row.versions = {name: version(name) for name in VERSIONS}
    return row


def _in_process(context: ForkServerContext, log: Path, function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments) in a process of its own, whose output goes to the log."""
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_logged, log, function, arguments).result()


def _logged(log: Path, function: Callable[..., T], arguments: Sequence[Any]) -> T:
    terminal = os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return function(partial(_say, terminal), *arguments)


def _serve(say: Callable[[str], None], name: str, folder: Path, quick: bool) -> Run:
    from tests.e2e.families.serve import serve

    return serve(FAMILIES[name], folder, quick=quick, say=lambda text: say(f"{name}: {text}"))


def _judge(say: Callable[[str], None], name: str, folder: Path, run: Run) -> Row:
    from tests.e2e.families.judge import judge

    say(f"{name}: transformers")
    return judge(FAMILIES[name], folder, run)


def _say(terminal: int, text: str) -> None:
    os.write(terminal, f"        {text}\n".encode())


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
