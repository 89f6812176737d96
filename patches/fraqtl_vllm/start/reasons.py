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
import traceback
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from fraqtl_kernels.errors import FraqtlError

VARIABLE = "FRAQTL_START_REASONS"
"""The environment variable with the path of the file. It is there while the server starts, and then removed."""

OURS, WORKER, ENGINE, OTHER = range(4)
"""How much a reason says: one of our own, a worker's, its engine's (which may only have lost a worker), any other."""

_MISSING_OP = re.compile(r"'_OpNamespace' '(\w+)' object has no attribute '(\w+)'")
_NOT_INSPECTED = re.compile(r"Model architectures \['(\w+)'.* failed to be inspected")
_NOT_IN_VLLM = re.compile(r"Model architectures \['(\w+)'.*\] are not supported")
_NOT_IN_TRANSFORMERS = re.compile(r"model type `([^`]*)` but Transformers does not recognize")
_REFUSED_BY_TRANSFORMERS = "StrictDataclass"
"""How the names of errors begin with which transformers refuses a config."""
_CONFIG_CODE = re.compile(r"/configuration_\w+\.py$|/transformers_utils/|/vllm/config/")
_MISREAD = (ArithmeticError, AttributeError, LookupError, TypeError)
"""What code raises that doesn't check what it was given."""
_NO_HEAD = "Unsupported speculative method: 'mtp'"
"""What vLLM says of a checkpoint in which it finds no head that drafts."""
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
            return _of_validation(cause)
        if type(cause).__name__.startswith(_REFUSED_BY_TRANSFORMERS):
            return _of_config(text.strip().splitlines()[-1].strip().partition("Error: ")[2] or text.splitlines()[0])
        if match := _MISSING_OP.search(text):
            return (
                f"the model needs the operator {match[1]}.{match[2]}, which this installation of vLLM does not have: "
                "choose a checkpoint in 16 bits, another model, or a build of vLLM for this machine"
            )
        if _NO_HEAD in text:
            return (
                "this checkpoint has no head for multi-token prediction that vLLM knows: choose another method in "
                "--speculative-config, such as ngram"
            )
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(text):
            amount = _NO_MEMORY.search(text)
            return (
                "memory ran out"
                + (f" when {int(amount[1]):,} bytes more were asked for" if amount else "")
                + ": choose a smaller model, or give less with --kv-cache-memory-bytes, --max-model-len, "
                "--max-num-batched-tokens or --gpu-memory-utilization"
            )
        if isinstance(cause, _MISREAD) and _is_of_config(cause):
            return _of_config(sentence(cause))
    return None


def _of_config(why: str) -> str:
    return f"config.json of this model can't be used ({why}): take the model's original one"


def _is_of_config(error: BaseException) -> bool:
    """Whether it was raised where a model's config is read."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(_CONFIG_CODE.search(frame.filename) for frame in frames[-2:])


def _of_validation(error: ValidationError) -> str:
    first = error.errors()[0]
    said = str(first["msg"]).removeprefix("Value error, ")
    if match := _NOT_IN_VLLM.search(said):
        return f"this vLLM has no code for {match[1]}: choose another model"
    if match := _NOT_IN_TRANSFORMERS.search(said):
        return f"this installation of transformers doesn't know the model type {match[1]!r}: choose another model"
    if first["type"] != "value_error" and first["loc"]:
        return f"{first['loc'][-1]}: {said[:1].lower()}{said[1:]}, and {str(first['input'])[:40]!r} was given"
    return _missing_package(said) or said


def _missing_package(said: str) -> str | None:
    """One sentence where vLLM could not look at a model because a package is not there; vLLM's own names none."""
    match = _NOT_INSPECTED.search(said)
    if match is None:
        return None
    from fraqtl_vllm import _vllm  # not before vLLM has failed: most starts need none of it here

    try:
        _vllm.import_model(match[1])
    except ModuleNotFoundError as error:
        return (
            f"vLLM's code of {match[1]} needs the package {error.name}, which is not installed: install one that fits "
            "this torch, or choose another model"
        )
    except Exception as error:  # whatever that code raises
        return f"vLLM's code of {match[1]} can't be loaded: {sentence(error)}"
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
