"""The parts that are taken along to a GPU host without a network, unpacked there into one folder.

A part is a .tar.xz or a wheel; a large one comes as pieces, NAME.00, NAME.01 ..., in any order and over several
transfers. `SHA256SUMS` beside them says what each whole part must be. Needs nothing but Python.

    python -m fraqtl_bench.gpu.parts FOLDER [--site FOLDER]
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

SITE = Path(tempfile.gettempdir()) / "fraqtl-site"
SUMS = "SHA256SUMS"
TOOLS, CACHE = "tools", "triton-cache"  # parts that are no packages: folders of their own below the site
NEEDED_TOOLS = ("pytest", "xdist", "pytest_timeout", "rich", "httpx")


def prepare(folder: Path, site: Path) -> list[str]:
    """Unpack what is new and whole; the names of all parts that are there. Exits with a sentence if one is broken."""
    start = time.monotonic()
    stamps, pieces = site / ".parts", site / ".pieces"
    for made in (stamps, pieces):
        made.mkdir(parents=True, exist_ok=True)
    for piece in sorted(folder.glob("*.[0-9][0-9]")):
        shutil.copy(piece, pieces)
    for line in (folder / SUMS).read_text().splitlines():
        digest, name = line.split()
        stamp = stamps / name
        if stamp.exists() and stamp.read_text() == digest:
            continue
        if stamp.exists():
            sys.exit(f"{site} holds another build of {name}: remove that folder first")
        part = _whole(folder, pieces, name, digest)
        if part is not None:
            _unpack(part, site)
            stamp.write_text(digest)  # last: an interrupted run does it again
    here = sorted(stamp.name for stamp in stamps.iterdir())
    print(f"unpacked in {time.monotonic() - start:.1f} s: {', '.join(here)}", flush=True)
    return here


def _whole(folder: Path, pieces: Path, name: str, digest: str) -> Path | None:
    """The part as one file with the right sum, if all of it has come."""
    part = folder / name
    if part.exists():
        if _digest(part) != digest:
            sys.exit(f"{part} is not what {SUMS} says: copy it again")
        return part
    found = sorted(pieces.glob(f"{name}.[0-9][0-9]"))
    if not found:
        return None
    joined = pieces / name
    with joined.open("wb") as out:
        for piece in found:
            out.write(piece.read_bytes())
    if _digest(joined) == digest:
        for piece in found:
            piece.unlink()
        return joined
    print(f"{name}: {len(found)} pieces so far, more to come")
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unpack(part: Path, site: Path) -> None:
    if part.suffix == ".whl":
        with zipfile.ZipFile(part) as wheel:
            wheel.extractall(site)
        return
    target = site
    for own in (TOOLS, CACHE):
        if part.name.startswith(own):
            target = site / own
    with tarfile.open(part) as tar:
        tar.extractall(target, filter="data")


def compile_python(site: Path) -> None:
    """vLLM imports thousands of modules in several processes: compile them once, on every core. Packages ship
    templates that don't compile; that is harmless."""
    compileall.compile_dir(site, quiet=2, workers=0)


def environment(site: Path) -> dict[str, str]:
    """What processes need to see the parts. The source that runs stays in front of the site, the host's own packages
    in front of the tools."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if not site.exists():
        return {}
    paths.append(str(site))
    tools = site / TOOLS
    if tools.exists() and not all(find_spec(name) for name in NEEDED_TOOLS):
        paths.append(str(tools))
    found = {"PYTHONPATH": os.pathsep.join(paths)}
    if (site / CACHE).exists():
        found["TRITON_CACHE_DIR"] = str(site / CACHE)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--site", type=Path, default=SITE)
    arguments = parser.parse_args()
    prepare(arguments.folder, arguments.site)
    compile_python(arguments.site)
