"""Where Numba keeps compiled kernels: a folder that it can write to, whatever the installation is like.

Numba takes NUMBA_CACHE_DIR, else the package's own `__pycache__`, else the user's cache folder, and refuses to decorate
a function where none of them can be written: a read-only installation and no home. Then a temporary folder has to do.

What is there is used again while no source of this package has changed. By itself Numba looks at the file of the
function only, and would go on with a caller that has an older function of another file compiled into it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import caching

from fraqtl_kernels.errors import ConfigError

PACKAGE = Path(__file__).parent
logger = logging.getLogger("fraqtl_kernels")


@dataclass(frozen=True)
class KernelCache:
    folder: Path
    is_temporary: bool
    """Whether Numba found no place of its own: the next start may have to compile again."""

    def __str__(self) -> str:
        if not self.is_temporary:
            return str(self.folder)
        return (
            f"no folder for Numba's compiled kernels can be written, so they are kept in {self.folder}: "
            "set NUMBA_CACHE_DIR to a folder that stays, or the next start may compile them anew"
        )


@cache
def kernel_cache() -> KernelCache:
    """The folder, made to work if it must be. Called before a kernel is decorated. Raises ConfigError without any."""
    _stamp_by_all_sources()
    folder = _numbas_choice()
    if folder is not None:
        return KernelCache(folder, is_temporary=False)
    try:
        temporary = _private_folder()
    except OSError as error:
        raise ConfigError(
            f"Numba's kernels can't be kept anywhere ({error}): set NUMBA_CACHE_DIR to a folder that can be written"
        ) from None
    # Numba has read the variable already; processes that are started from here have not.
    os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = str(temporary)
    found = KernelCache(temporary, is_temporary=True)
    logger.warning("%s", found)
    return found


def _stamp_by_all_sources() -> None:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    stamp, numbas = digest.hexdigest(), caching._SourceFileBackedLocatorMixin.get_source_stamp

    def of_package(locator: Any) -> Any:
        return stamp if PACKAGE in Path(locator._py_file).parents else numbas(locator)

    caching._SourceFileBackedLocatorMixin.get_source_stamp = of_package


def _numbas_choice() -> Path | None:
    try:
        return Path(numba.njit(cache=True)(_probe)._cache.cache_path)
    except RuntimeError:  # "no locator available"
        return None


def _private_folder() -> Path:
    """One of this user alone: whoever can write there can have their code run."""
    folder = Path(tempfile.gettempdir()) / f"fraqtl-numba-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="fraqtl-numba-"))
    return folder


def _probe() -> None:
    """Decorated to ask Numba, never compiled."""
