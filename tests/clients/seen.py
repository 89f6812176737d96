"""Where a client's objects show the memory report, and the line that each script prints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from importlib.metadata import version
from inspect import isclass, ismodule, isroutine
from typing import Any

MODEL = "fraqtl-demo"
QUESTION = "The code for apple is 4821. The code for lemon is 7310.\nWhat is the code for apple?"
ANSWER = "The code for apple is 4821."

OURS = re.compile(r"fraqtl|kv_cache|.*x-fraqtl-kv(-saved)?-bytes", re.IGNORECASE)
IN_TEXT = re.compile(r'"(fraqtl|kv_cache)\\*":|x-fraqtl-kv', re.IGNORECASE)  # JSON that was not parsed, or not yet
SPREAD = ("__dict__", "__pydantic_extra__")
"""Attributes whose content reads as the object's own."""
DEPTH = 12


def places(thing: Any) -> list[str]:
    """Paths to the report in any object: attributes, private ones too, keys, items ([]), and text that holds it."""
    return sorted(set(_places(thing, "", DEPTH)))


def _places(thing: Any, at: str, depth: int) -> Iterator[str]:
    if isinstance(thing, bytes):
        thing = thing.decode(errors="replace")
    if isinstance(thing, str):
        yield from [f"{at} (text)"] * bool(IN_TEXT.search(thing))
    elif depth:
        for name, value in _inside(thing):
            path = at + ("" if name in SPREAD else name if name == "[]" or not at else f".{name}")
            if OURS.fullmatch(name) and value is not None:
                yield path
            else:
                yield from _places(value, path, depth - 1)


def _inside(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, Mapping):
        yield from ((str(key), value) for key, value in thing.items())
    elif isinstance(thing, Sequence | Set):
        yield from (("[]", item) for item in thing)
    elif not (isclass(thing) or isroutine(thing) or ismodule(thing)):
        slots = [getattr(kind, "__slots__", ()) for kind in type(thing).__mro__]
        names = {name for group in slots for name in ([group] if isinstance(group, str) else group)}
        yield from ((name, getattr(thing, name)) for name in sorted(names - {"__dict__"}) if hasattr(thing, name))
        yield from getattr(thing, "__dict__", {}).items()


def only_last(chunks: Sequence[Any]) -> bool:
    """The report stands in the last chunk and in no other."""
    return [bool(places(chunk)) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def tell(package: str, **shown: list[str]) -> None:
    """One line for run.sh: the version, and where the report was found."""
    print(json.dumps({"package": package, "version": version(package), **shown}), flush=True)
