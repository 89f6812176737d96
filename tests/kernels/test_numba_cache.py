"""The package's kernels where Numba can write nothing: an installation and a home that are read-only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fraqtl_kernels

pytestmark = pytest.mark.slow

ASK = """
import json
import fraqtl_kernels.cpu
from fraqtl_kernels.numba_cache import kernel_cache
found = kernel_cache()
print(json.dumps([str(found.folder), found.is_temporary, fraqtl_kernels.__file__]))
"""


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A copy of the package in which no cache folder can be made: a file has its name (a user may be root)."""
    package = tmp_path / "site" / "fraqtl_kernels"
    shutil.copytree(Path(fraqtl_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").touch()
    return package.parent


def ask(site: Path, code: str = ASK, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "HOME")}
    home = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache", "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**kept, **home, **environment}, cwd=site
    )


def test_a_temporary_folder_has_to_do_and_that_is_said_once(sealed: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    done = ask(sealed, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 0, done.stderr
    folder, is_temporary, where = json.loads(done.stdout)
    assert Path(where).is_relative_to(sealed)
    assert is_temporary and folder == str(tmp_path / "tmp" / f"fraqtl-numba-{os.getuid()}")
    assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert done.stderr.count("no folder for Numba's compiled kernels can be written") == 1
    again = ask(sealed, TMPDIR=str(tmp_path / "tmp"))
    assert json.loads(again.stdout)[0] == folder  # kernels that were compiled are found again


def test_a_folder_that_others_can_write_is_not_trusted(sealed: Path, tmp_path: Path) -> None:
    trap = tmp_path / "tmp" / f"fraqtl-numba-{os.getuid()}"
    trap.mkdir(parents=True)
    trap.chmod(0o777)
    folder, _, _ = json.loads(ask(sealed, TMPDIR=str(tmp_path / "tmp")).stdout)
    assert folder != str(trap) and Path(folder).parent == tmp_path / "tmp"


def test_a_folder_of_the_users_own_is_taken(sealed: Path, tmp_path: Path) -> None:
    done = ask(sealed, NUMBA_CACHE_DIR=str(tmp_path / "mine"))
    folder, is_temporary, _ = json.loads(done.stdout)
    assert Path(folder).is_relative_to(tmp_path / "mine") and not is_temporary
    assert done.stderr == ""


def test_doctor_calls_it_a_problem(sealed: Path, tmp_path: Path) -> None:
    """In this checkout, with the kernels of the sealed copy in front."""
    others = [path for path in sys.path if path and not path.endswith("/kernels")]
    site = os.pathsep.join([str(sealed), *others])
    code = "from fraqtl_serve.cli.main import main; main(['doctor'])"
    done = ask(sealed, code, PYTHONPATH=site, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "problem: no folder for Numba's compiled kernels can be written, so they are kept in" in done.stderr
    assert "set NUMBA_CACHE_DIR to a folder that stays" in done.stderr


CALL = """
import inspect
from fraqtl_kernels.cpu.layers import norm
found = [f for _, f in inspect.getmembers(norm) if hasattr(f, "_cache")]
assert found
print({str(f._cache._cache_file._source_stamp) for f in found})
"""


def test_a_change_in_another_file_makes_kernels_compile_again(sealed: Path, tmp_path: Path) -> None:
    """Callers have their callees' code in them, wherever those stand."""
    before = ask(sealed, CALL, TMPDIR=str(tmp_path))
    assert before.returncode == 0, before.stderr
    assert ask(sealed, CALL, TMPDIR=str(tmp_path)).stdout == before.stdout
    other = sealed / "fraqtl_kernels" / "cpu" / "layers" / "bits.py"
    times = other.stat()
    other.write_text(other.read_text().replace("import", "import  ", 1))
    os.utime(other, (times.st_atime, times.st_mtime))
    assert ask(sealed, CALL, TMPDIR=str(tmp_path)).stdout != before.stdout
