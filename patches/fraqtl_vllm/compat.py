"""Which versions of vLLM are served, and how something of vLLM's is replaced at run time.

vLLM has entry points for backends, platforms, schedulers and workers. What they don't reach is replaced, and only
through a `Hook`: a wrapper lives in the module that needs it, and its hook stands in a list, with what breaks without
it, the place in vLLM, and when it can go. The lists are `fraqtl_vllm.hooks` and `fraqtl_serve.engine.hooks`. Tests look
for every symptom in the vLLM that is installed. Where one is gone they fail: then the hook is to be looked at, and
mostly to be deleted. Nothing of vLLM is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from types import MethodType
from typing import Any

SUPPORTED_VERSIONS = ("0.32", "0.33")
"""Minor versions of vLLM, oldest first, with all their patch releases."""
DEFAULT_VERSION = "0.32.0"
"""What the lock files, the images and the whole test suite have."""


def minor(version: str) -> str:
    """Of vLLM's version the part that decides where its names are: "0.33" of "0.33.1+cpu"."""
    return ".".join(version.split(".")[:2])


def not_supported(version: str) -> str | None:
    """One sentence for a vLLM that this code was not written for, or None."""
    if minor(version) in SUPPORTED_VERSIONS:
        return None
    supported = " and ".join(f"{one}.x" for one in SUPPORTED_VERSIONS)
    return (
        f"fraqtl-serve works with vLLM {supported}, but {version} is installed: pip install 'vllm=={DEFAULT_VERSION}'"
    )


@dataclass(frozen=True)
class Symptom:
    """A place in vLLM's source that shows why a hook is there."""

    place: str
    """A module, or `module:name` of what is in it."""
    has: tuple[str, ...] = ()
    """Pieces of its source. One that is gone: vLLM does it in another way now."""
    lacks: tuple[str, ...] = ()
    """What would be there if vLLM did it by itself."""


@dataclass(frozen=True)
class Hook:
    """Something of vLLM's that is replaced, or added."""

    target: str
    """`Class.attribute`, or `module.attribute`."""
    user: str
    """The module with the replacement."""
    without: str
    """What breaks without it."""
    until: str
    """What vLLM must have for it to go."""
    symptoms: tuple[Symptom, ...]
    upstream: str = ""
    """vLLM's issue about it, if there is one."""
    only: str = ""
    """The one version that needs it, where others don't."""

    @property
    def attribute(self) -> str:
        return self.target.rpartition(".")[2]

    def wrap(self, owner: Any, make: Callable[[Any], Callable[..., Any]]) -> None:
        """Replace a method or function of `owner` by `make(original)`; for one owner once."""
        original = getattr(owner, self.attribute)
        done: tuple[Hook, ...] = getattr(original, "fraqtl_hooks", ())
        if self in done:
            return
        replacement: Any = update_wrapper(make(original), original)
        replacement.fraqtl_hooks = (*done, self)
        is_class_method = isinstance(owner, type) and isinstance(original, MethodType)
        setattr(owner, self.attribute, staticmethod(replacement) if is_class_method else replacement)

    def put(self, owner: Any, value: Any) -> None:
        """Set the attribute of `owner`, whatever it was."""
        setattr(owner, self.attribute, value)

    @contextmanager
    def put_for_now(self, owner: Any, value: Any) -> Iterator[None]:
        """`put`, and back again."""
        original = getattr(owner, self.attribute)
        self.put(owner, value)
        try:
            yield
        finally:
            self.put(owner, original)
