"""An engine that has imported torch and vLLM by the time it is wanted.

vLLM starts its engine, once the configuration is known, as a new process, which imports everything that the API server
has just imported. Here Python's own fork server (`multiprocessing`) begins to import in the first moment of a start,
on another core, and forks the engine when vLLM asks for it. Only for one engine on a CPU: processes that use a GPU
must not be forked, and more engines have more processes than there are cores.

The forked process takes over the environment that the API server has by then. What a library reads of it as it is
loaded must be there before: `EARLY` and the OpenMP library that vLLM preloads.
"""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import os
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

OFF = "FRAQTL_COLD_ENGINE"  # set: start the engine as vLLM does
IMPORTS = "fraqtl_serve.engine_imports"
PRELOAD = "LD_PRELOAD"
EARLY = {  # what vLLM's CPU platform sets, and torch reads when it is imported
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_early: dict[str, str] | None = None  # the environment of the fork server, if there is one


def begin() -> None:
    """Start the fork server, where it will help. The rest of the start goes on meanwhile."""
    global _early
    users_choice = {OFF, "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_ENABLE_V1_MULTIPROCESSING"} & os.environ.keys()
    has_gpu = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    if users_choice or has_gpu or sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        return
    early = {**os.environ, **EARLY, PRELOAD: preloaded()}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([IMPORTS])
    with suppress(OSError), _environment(early):  # no folder for its socket, say: then as vLLM does it
        forkserver.ensure_running()
        _early = early
        atexit.register(stop)


def preloaded() -> str:
    """LD_PRELOAD as vLLM's CPU platform will set it: torch's own OpenMP library comes after what the user has."""
    given = os.environ.get(PRELOAD, "")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or any(name in given for name in ("libomp", "libgomp", "libiomp")):
        return given
    folder = Path(spec.origin).parent
    found = [
        str(file) for place in (folder.parent / "torch.libs", folder / "lib") for file in place.glob("libgomp*.so*")
    ]
    return ":".join(filter(None, [given, *found[:1]]))


def offer(args: Namespace) -> None:
    """Have vLLM fork its engine from the server that `begin` started, or end that server if it can't be used."""
    from fraqtl_serve._vllm import current_platform, engine_utils

    if _early is None:
        return
    several = args.data_parallel_size > 1 or args.tensor_parallel_size > 1 or args.pipeline_parallel_size > 1
    if several or not current_platform.is_cpu() or args.headless:
        stop()
        return
    spawning: Callable[[], Any] = engine_utils.get_mp_context

    def get_mp_context() -> Any:
        usual = spawning()
        if os.environ.get(PRELOAD, "") == (_early or {}).get(PRELOAD):
            return _WarmContext()
        stop()  # vLLM has preloaded more than we thought of: the engine must be a new process after all
        return usual

    engine_utils.get_mp_context = get_mp_context


def stop() -> None:
    """End the fork server, if it runs: it may still be importing, and would see only then that nobody needs it."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    _take_over(values)
    try:
        yield
    finally:
        _take_over(before)


def _take_over(values: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


class _Surroundings:
    """Unpickled, it has replaced the environment of the process by that of the one that pickled it."""

    def __reduce__(self) -> tuple[Callable[[dict[str, str]], None], tuple[dict[str, str]]]:
        return _take_over, (dict(os.environ),)


def _new(surroundings: None, kind: type[_WarmProcess]) -> _WarmProcess:
    return kind.__new__(kind)


class _WarmProcess(ForkServerProcess):
    """Its environment is unpickled first: what its arguments import may look into it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (_Surroundings(), type(self)), self.__dict__


class _WarmContext(ForkServerContext):
    Process = _WarmProcess
