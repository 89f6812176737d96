"""Prepare everything that a GPU host without a network needs, as parts small enough to be copied one by one.

    python -m fraqtl_bench.gpu.bundle FOLDER [--host-python PYTHON] [--only PART ...]

    project.tar.gz      this tree, without results and pictures: unpack it by hand, the scripts are in it
    fraqtl_serve-*.whl  the project as vLLM finds plugins
    flash-attn3.tar.xz  FlashAttention 3, which loads without the rest of vLLM
    triton-cache.tar.xz the kernels of a first run, compiled (with --host-python: a Python with the host's versions)
    tools.tar.xz        pytest and what prints tables, used where the host has none
    deps, vllm, kernels vLLM and what it needs; large parts are cut into pieces NAME.00, NAME.01 ...

FOLDER also gets SHA256SUMS, by which `fraqtl_bench.gpu.parts` unpacks them. Packages are picked for Python 3.12 on
x86-64 Linux, whatever runs this. Needs pip with setuptools, git and a package index.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from fraqtl_bench.gpu.parts import CACHE, SUMS, TOOLS
from fraqtl_bench.gpu.schedule import ROOT

PIECE = 26  # MiB, so that two pieces travel with a tree in a transfer of 64
LARGEST = 64
LOCKS = ("test.txt", "cuda.txt")
TOOL_PACKAGES = (
    *("pytest", "pytest-xdist", "pytest-timeout", "execnet", "pluggy", "iniconfig", "packaging", "pygments"),
    *("rich", "markdown-it-py", "mdurl", "httpx", "httpcore", "h11", "anyio", "idna", "certifi"),
)
LEFT_OUT = ("docs/images/*", "bench/results/*", "docker/lock/*")  # of the tree, but for
KEPT = ("bench/results/cpu/texts*.json", "bench/results/aot/*")
# Large, and not needed on one Hopper GPU; vLLM goes on without
DROPPED = (
    *("bin/*", "*/__pycache__/*", "pycountry/locales/*", "mistral_common/data/*"),
    *("vllm/vllm-rs", "vllm/_qutlass_C.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so"),
    *("vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", "vllm/third_party/fmha_sm100/*", "vllm/third_party/deep_gemm/*"),
)
# A file belongs to the first part with a pattern that it matches
VLLM_PARTS = {
    "flash-attn3": ("vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so", "vllm/vllm_flash_attn/flash_attn_interface.py"),
    "kernels": ("vllm/_C_stable_libtorch.abi3.so",),
    "vllm": ("vllm/*", "vllm-*"),
    "deps": ("*",),
}
PARTS = ("project", "wheel", CACHE, TOOLS, *VLLM_PARTS)


def matches(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path.as_posix(), pattern) for pattern in patterns)


def tree_files(root: Path) -> list[Path]:
    """What is in git or new and not ignored, less what a GPU host has no use for; relative paths."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = [Path(name) for name in names if name and (root / name).is_file()]
    return [path for path in paths if matches(path, KEPT) or not matches(path, LEFT_OUT)]


def pack(archive: Path, root: Path, files: Sequence[Path]) -> Path:
    """Files of a folder as .tar.gz or .tar.xz; the same files make the same archive."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(archive, "w:xz", preset=9) if archive.suffix == ".xz" else tarfile.open(archive, "w:gz") as tar:
        for path in sorted(files):
            tar.add(root / path, path.as_posix(), filter=anonymous)
    return archive


def pack_folder(archive: Path, root: Path) -> Path:
    return pack(archive, root, [p.relative_to(root) for p in root.rglob("*") if p.is_file()])


def pins(names: Iterable[str], folder: Path = ROOT / "docker" / "lock") -> list[str]:
    """`name==version` of packages, by the project's lock files."""

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.sub(r"\[.*\]", "", name)).lower()

    versions = {}
    for lock in LOCKS:
        for line in (folder / lock).read_text().splitlines():
            if "==" in line:
                name, version = line.split("==")
                versions[plain(name)] = version
    if missing := [name for name in names if plain(name) not in versions]:
        sys.exit(f"{folder} has no {', '.join(missing)}")
    return [f"{name}=={versions[plain(name)]}" for name in names]


def install(target: Path, requirements: Sequence[str]) -> None:
    """Wheels for the host's Python, whatever this one is."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)] + ["manylinux2014_x86_64"]
    options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--implementation", "cp", "--python-version", "3.12"]
    options += [f"--platform={platform}" for platform in platforms]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        str(target),
    ]
    subprocess.run([*command, *options, *requirements], check=True)


def make_project(out: Path, scratch: Path) -> list[Path]:
    return [pack(out / "project.tar.gz", ROOT, tree_files(ROOT))]


def make_wheel(out: Path, scratch: Path) -> list[Path]:
    source = scratch / "source"
    for path in tree_files(ROOT):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True)
    return sorted(out.glob("fraqtl_serve-*.whl"))


def make_tools(out: Path, scratch: Path) -> list[Path]:
    folder = scratch / TOOLS
    install(folder, pins(TOOL_PACKAGES))
    return [pack_folder(out / f"{TOOLS}.tar.xz", folder)]


def make_cache(out: Path, scratch: Path, python: str, most: str | None) -> list[Path]:
    """Compiled by another Python, with the host's versions, over this source."""
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "patches", "bench"))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(scratch / CACHE)}
    environment.pop("TRITON_INTERPRET", None)
    command = [python, "-m", "fraqtl_bench.gpu.precompile", *(["--most", most] if most else [])]
    subprocess.run(command, env=environment, check=True)
    return [pack_folder(out / f"{CACHE}.tar.xz", scratch / CACHE)]


def make_vllm(out: Path, scratch: Path, wanted: Sequence[str]) -> list[Path]:
    site = scratch / "site"
    if set(wanted) == {"flash-attn3"}:
        names = ["vllm"]
    else:
        listed = (ROOT / "bench/gpu_packages.txt").read_text().splitlines()
        names = [line for line in listed if line and not line.startswith("#")]
    install(site, pins(names))
    parts: dict[str, list[Path]] = {name: [] for name in VLLM_PARTS}
    for path in (p.relative_to(site) for p in site.rglob("*") if p.is_file()):
        if not matches(path, DROPPED):
            parts[next(name for name, patterns in VLLM_PARTS.items() if matches(path, patterns))].append(path)
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(pack, out / f"{name}.tar.xz", site, parts[name]) for name in VLLM_PARTS if name in wanted]
        return [job.result() for job in jobs]


def cut(part: Path, piece: int) -> list[Path]:
    """The part, or its pieces in its place if it is larger than one. piece: bytes."""
    if part.stat().st_size <= piece:
        return [part]
    data, pieces = part.read_bytes(), []
    for number, start in enumerate(range(0, len(data), piece)):
        pieces.append(part.with_name(f"{part.name}.{number:02}"))
        pieces[-1].write_bytes(data[start : start + piece])
    part.unlink()
    return pieces


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder, which is made anew")
    parser.add_argument("--host-python", help="a Python 3.12 with the host's torch and Triton, to compile kernels with")
    parser.add_argument("--most", help="compile only so many, to rehearse")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--piece", type=int, default=PIECE, help="MiB (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 < args.piece <= LARGEST:
        parser.error(f"--piece: 1 to {LARGEST} MiB")
    start, out = time.monotonic(), args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    made: list[Path] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name, make in (("project", make_project), ("wheel", make_wheel), (TOOLS, make_tools)):
            made += make(out, scratch) if name in args.only else []
        if CACHE in args.only and args.host_python:
            made += make_cache(out, scratch, args.host_python, args.most)
        if wanted := [name for name in VLLM_PARTS if name in args.only]:
            made += make_vllm(out, scratch, wanted)
    # The tree is unpacked by hand, before there is anything to unpack it with
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in made if p.name != "project.tar.gz"]
    (out / SUMS).write_text("".join(sums))
    for part in made:
        for piece in cut(part, args.piece << 20):
            print(f"{piece.name:40} {piece.stat().st_size / 2**20:5.1f} MiB")
    print(f"made in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
