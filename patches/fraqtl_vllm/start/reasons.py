"""Why a process of the engine did not start, told to the process that the user started.

vLLM writes the exception into the log of the process that it ends, and the one in front only hears that it ended. So
every process of an engine notes what vLLM logs as the end of its start, as a sentence, in the file that the environment
names; `fraqtl_serve` puts its name there and shows the sentence last.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from fraqtl_kernels.errors import FraqtlError

VARIABLE = "FRAQTL_START_REASONS"
"""The environment variable with the path of the file. It is there while the server starts, and then removed."""

OURS, WORKER, ENGINE, OTHER = range(4)
"""How much a reason says: one of our own, a worker's, its engine's (which may only have lost a worker), any other."""

_MISSING_OP = re.compile(r"'_OpNamespace' '(\w+)' object has no attribute '(\w+)'")
_NO_MEMORY = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, what caused it, what caused that, and so on."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def known(error: BaseException) -> str | None:
    """One sentence for an exception that we raised or understand."""
    for cause in chain(error):
        text = str(cause)
        if isinstance(cause, FraqtlError):
            return text
        if isinstance(cause, ValidationError):
            return str(cause.errors()[0]["msg"]).removeprefix("Value error, ")
        if match := _MISSING_OP.search(text):
            return (
                f"the model needs the operator {match[1]}.{match[2]}, which this installation of vLLM does not have: "
                "choose a checkpoint in 16 bits, another model, or a build of vLLM for this machine"
            )
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(text):
            amount = _NO_MEMORY.search(text)
            return (
                "memory ran out"
                + (f" when {int(amount[1]):,} bytes more were asked for" if amount else "")
                + ": choose a smaller model, or give less with --kv-cache-memory-bytes, --max-model-len, "
                "--max-num-batched-tokens or --gpu-memory-utilization"
            )
    return None


def sentence(error: BaseException) -> str:
    """One line for any exception: the first line of the first in its chain that says something."""
    for cause in chain(error):
        lines = str(cause).strip().splitlines()
        if lines:
            return f"{type(cause).__name__}: {lines[0]}"
    return f"{type(error).__name__}: no message"


class Note(logging.Handler):
    """Writes down the exceptions that vLLM logs as errors."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and record.levelno >= logging.ERROR:
            note(error, record.name)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        """A start that fails must not fail of this, too."""


def note(error: BaseException, logger: str) -> None:
    """Add a reason to the file, unless the start is over."""
    said = known(error)
    if not logger.startswith(("vllm.v1.engine", "vllm.v1.executor")):
        weight = OTHER  # perhaps an error that vLLM lives with
    elif said is not None:
        weight = OURS
    else:
        weight = WORKER if logger.startswith("vllm.v1.executor") else ENGINE
    path = Path(os.environ.get(VARIABLE, os.devnull))
    if path.is_file():
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([weight, said or sentence(error)]) + "\n")


def read(path: Path) -> str | None:
    """The reason that says most, of all that were noted; the first of its kind."""
    try:
        noted = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    return str(min(noted, key=lambda reason: reason[0])[1]) if noted else None


def install() -> None:
    """Take notes in this process, if it belongs to a server that wants to know. Called where it loads plugins."""
    logger = logging.getLogger("vllm")
    if VARIABLE in os.environ and not any(isinstance(handler, Note) for handler in logger.handlers):
        logger.addHandler(Note(logging.ERROR))
