"""`--kv-budget BITS`: a format for every layer within a budget, searched at the first start and kept for the next.

The search is `fraqtl-bench quality --quick --budget BITS`, in a process of its own: the server never imports the lab,
and what the lab loads is gone before the engine starts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from filelock import FileLock

from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_serve.cli.model_config import read_layer_kinds
from fraqtl_serve.cli.model_states import STATE_LAYERS
from fraqtl_vllm.start import progress

SEARCH = 2  # another number makes every profile that was found before unknown
PROFILE = "fraqtl-profile.json"
NOTES = "notes.jsonl"  # what each layer costs, which takes nearly all of a search and is the same for every budget
COMMAND = (sys.executable, "-m", "fraqtl_bench", "quality")
OPTIONS = ("--quick", "--methods", "fp16", "--measures", "perplexity", "--no-figures")
IDENTIFYING = ("*.json", "*.safetensors", "*.bin")


def add_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--kv-budget",
        type=_bits,
        metavar="BITS",
        help="find a format for every layer at the first start: together, they take this many bits a number at most",
    )


def _bits(text: str) -> float:
    try:
        bits = float(text)
    except ValueError:
        bits = 0.0
    if not 0 < bits <= 16:
        raise argparse.ArgumentTypeError(f"must be a number of bits above 0 and up to 16, such as 4, not {text!r}")
    return bits


def find_profile(model: str, budget: float, *, quiet: bool) -> Path:
    """The profile of this model and budget; searched now if there is none. Raises ConfigError or UnsupportedError.

    model: a folder or a Hugging Face id. budget: bits a dimension, scales included. quiet: a search shows no progress.
    """
    _check(model)
    notes_of = f"notes of {version('fraqtl-serve')}"  # another version's lab may measure otherwise
    folder, of_model = (cache_folder() / _key(model, about) for about in (f"{budget:g}", notes_of))
    profile = folder / PROFILE
    for each in (folder, of_model):
        each.mkdir(parents=True, exist_ok=True)
    with FileLock(of_model / "lock"):  # a second server that starts meanwhile waits, and finds what this one found
        if profile.is_file():
            progress.say(f"formats of single layers for {budget:g} bits as found before: {profile}")
        else:
            progress.say(f"searching formats of single layers for {budget:g} bits; the next start finds them")
            _search(model, budget, folder, of_model / NOTES, quiet=quiet)
            progress.say(f"formats of single layers found: {profile}")
    return profile


def _check(model: str) -> None:
    """Before minutes are spent on it: what the engine would refuse when they are over."""
    from fraqtl_serve._vllm import current_platform
    from fraqtl_vllm.layer_formats import IN_HYBRIDS, UNLIKE_WINDOWS

    if not current_platform.is_cpu():
        raise UnsupportedError(
            "--kv-budget is searched on a CPU only yet: give --kv-profile the file that fraqtl-bench quality MODEL "
            "--budget BITS writes"
        )
    kinds = set(read_layer_kinds(model))
    if kinds & STATE_LAYERS:
        raise UnsupportedError(IN_HYBRIDS)
    if len(kinds) > 1:
        raise UnsupportedError(UNLIKE_WINDOWS)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fraqtl-serve/budget, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fraqtl-serve" / "budget"


def _key(model: str, about: str) -> str:
    """A hash of what a file `about` the model follows from; of a folder, the names, sizes and times of its files."""
    digest = hashlib.sha256(f"{SEARCH} {about} {model}".encode())
    folder = Path(model)
    if folder.is_dir():
        digest.update(str(folder.resolve()).encode())
        for file in sorted(path for pattern in IDENTIFYING for path in folder.glob(pattern)):
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _search(model: str, budget: float, folder: Path, notes: Path, *, quiet: bool) -> None:
    """Writes the profile, and what is done to `notes` for the next try. Raises ConfigError with the lab's sentence."""
    command = [*COMMAND, model, "--budget", f"{budget:g}", *OPTIONS, "--out", str(folder), "--notes", str(notes)]
    shown = subprocess.DEVNULL if quiet or not sys.stderr.isatty() else sys.stderr
    with subprocess.Popen(command, stdout=shown, stderr=subprocess.PIPE, text=True) as lab, _ended_with_us(lab):
        _, said = lab.communicate()
    if lab.returncode:
        last = (said.strip().splitlines() or [f"the search ended with code {lab.returncode}"])[-1]
        raise ConfigError(f"--kv-budget {budget:g}: {last.removeprefix('fraqtl-bench: ')}")


@contextmanager
def _ended_with_us(lab: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever ends this start, a signal included, ends the search, too. What it has found so far is kept."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if lab.poll() is None:
            lab.kill()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt("terminated")  # which `serve` takes for a SIGTERM, as vLLM says it
