"""When a fork server is started for the engine, and what the forked process takes over."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from fraqtl_serve import warm_engine
from fraqtl_serve._vllm import engine_utils


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (warm_engine.OFF, "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(warm_engine, "_early", None)
    monkeypatch.setattr(engine_utils, "get_mp_context", engine_utils.get_mp_context)
    yield


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments of the servers that were started; none really is. This machine has two cores and no GPU."""
    found: list[dict[str, str]] = []
    monkeypatch.setattr(forkserver, "ensure_running", lambda: found.append(dict(os.environ)))
    monkeypatch.setattr(warm_engine.atexit, "register", lambda function: None)
    monkeypatch.setattr(warm_engine.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(warm_engine.shutil, "which", lambda name: None)
    monkeypatch.setattr(warm_engine.Path, "exists", lambda path: False)
    return found


def arguments(**values: int) -> Namespace:
    sizes = {"data_parallel_size": 1, "tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    return Namespace(**{**sizes, "headless": False, **values})


def test_server_gets_what_is_read_at_import(started: list[dict[str, str]]) -> None:
    before = dict(os.environ)
    warm_engine.begin()
    [environment] = started
    assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert "libgomp" in environment["LD_PRELOAD"]
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", [warm_engine.OFF, "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_ENABLE_V1_MULTIPROCESSING"])
def test_not_where_the_user_chose(started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    warm_engine.begin()
    assert started == []


def test_not_beside_a_gpu(started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_engine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    warm_engine.begin()
    assert started == []


def test_not_on_one_core(started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_engine.os, "sched_getaffinity", lambda pid: {0})
    warm_engine.begin()
    assert started == []


def test_a_library_of_the_users_is_preloaded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/opt/libiomp5.so")
    assert warm_engine.preloaded() == "/opt/libiomp5.so"
    monkeypatch.setenv("LD_PRELOAD", "/opt/libtcmalloc.so")
    given, torchs = warm_engine.preloaded().split(":")
    assert given == "/opt/libtcmalloc.so" and Path(torchs).is_file()


def test_the_preloaded_library_is_that_of_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM's own CPU platform sets it while it makes a configuration."""
    from vllm.engine.arg_utils import EngineArgs

    from fraqtl_serve.serve import DEMO_MODEL

    monkeypatch.setenv("LD_PRELOAD", "")
    expected = warm_engine.preloaded()
    for name in (*warm_engine.EARLY, "NUMEXPR_MAX_THREADS", "VLLM_DISABLE_SHARED_EXPERTS_STREAM"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # taken back afterwards
    EngineArgs(model=str(DEMO_MODEL), attention_backend="FRAQTL", enforce_eager=True).create_engine_config()
    assert os.environ["LD_PRELOAD"] == expected
    assert {name: os.environ[name] for name in warm_engine.EARLY} == warm_engine.EARLY


def test_vllm_gets_it(started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    warm_engine.begin()
    warm_engine.offer(arguments())
    monkeypatch.setenv("LD_PRELOAD", started[0]["LD_PRELOAD"])
    assert issubclass(engine_utils.get_mp_context().Process, multiprocessing.context.ForkServerProcess)
    stopped: list[bool] = []
    monkeypatch.setattr(warm_engine, "stop", lambda: stopped.append(True))
    monkeypatch.setenv("LD_PRELOAD", "/another/library.so")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    assert isinstance(engine_utils.get_mp_context(), multiprocessing.context.SpawnContext)
    assert stopped == [True]


def test_where_no_server_can_be_started(started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise OSError("no folder for a socket")

    monkeypatch.setattr(forkserver, "ensure_running", fails)
    before = engine_utils.get_mp_context
    warm_engine.begin()
    warm_engine.offer(arguments())
    assert engine_utils.get_mp_context is before


def test_several_engines_are_spawned(started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[bool] = []
    monkeypatch.setattr(warm_engine, "stop", lambda: stopped.append(True))
    warm_engine.begin()
    before = engine_utils.get_mp_context
    for name in ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size"):
        warm_engine.offer(arguments(**{name: 2}))
    assert stopped == [True] * 3 and engine_utils.get_mp_context is before


def test_environment_is_there_before_the_arguments() -> None:
    """In another process, since it replaces the environment there."""
    code = (
        "import os, pickle, sys; from fraqtl_serve.warm_engine import _Surroundings; "
        "os.environ.clear(); pickle.loads(bytes.fromhex(sys.argv[1])); print(os.environ['OF_THE_PARENT'])"
    )
    os.environ["OF_THE_PARENT"] = "here"
    try:
        pickled = pickle.dumps(warm_engine._Surroundings()).hex()
    finally:
        del os.environ["OF_THE_PARENT"]
    done = subprocess.run([sys.executable, "-c", code, pickled], capture_output=True, text=True, check=True)
    assert done.stdout == "here\n"
