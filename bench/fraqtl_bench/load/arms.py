"""Arms by name: a server of ours per format, stock vLLM per cache dtype, or a server that already runs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx

from fraqtl_bench import server
from fraqtl_bench.load.schema import Settings
from fraqtl_bench.server import STOCK_SERVER, Server
from fraqtl_kernels.errors import FraqtlError, one_of
from fraqtl_kernels.formats import FORMATS

STOCK = tuple(f"vllm:{dtype}" for dtype in ("auto", "fp8", "int4_per_token_head", "turboquant_4bit_nc", "nvfp4"))
OURS = ("fraqtl_serve", "serve")
ENDING_SECONDS = 10.0
ERROR_LINE = re.compile(r"(?:^|\s)(?:fraqtl-serve: |[\w.]*(?:Error|Exception): )\S.*")
SAYS_NOTHING = ("Engine core initialization failed", "EngineDeadError", "JSONDecodeError")


class ArmError(FraqtlError):
    """An arm that can't run, or can't go on; its text is the reason that the report gives."""


@dataclass(frozen=True)
class Arm:
    """How to get at a server: `url` of a running one, else what to start."""

    name: str
    url: str | None = None
    module: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    plugins: bool = True

    @property
    def command(self) -> str:
        return self.url or " ".join(["python", "-m", *self.module, *self.arguments])

    @contextmanager
    def serving(self) -> Iterator[Target]:
        """The server, ready. Raises ArmError if it doesn't get there."""
        if self.url is not None:
            yield Target(self.name, self.url)
            return
        started = server.start(
            *self.arguments, module=self.module, environment={} if self.plugins else {"VLLM_PLUGINS": ""}
        )
        try:
            try:
                server.wait_until_ready(started)
            except RuntimeError as error:
                why = last_error(started.log) or str(error).splitlines()[0]
                raise ArmError(f"its server did not start: {why}") from error
            yield Target(self.name, started.url, started)
        finally:
            server.stop(started)
        server.remove_log(started)  # not reached if anything went wrong


@dataclass(frozen=True)
class Target:
    """A server that answers, or did."""

    arm: str
    url: str
    started: Server | None = None

    def check_alive(self, client: httpx.Client) -> None:
        """Raises ArmError if the server has ended or its engine is dead."""
        self.check_ended(0)
        try:
            status = client.get(f"{self.url}/health").status_code
        except httpx.TimeoutException:
            return  # busy: only one that refuses is gone
        except httpx.TransportError as error:
            self.check_ended()
            raise ArmError(f"no server answers at {self.url} any more ({type(error).__name__})") from error
        if status != 200:
            raise ArmError(f"its server answers /health with {status}{self.last_words()}")

    def check_ended(self, seconds: float = ENDING_SECONDS) -> None:
        """Raises ArmError if the process ends within so many seconds: it stops listening before it does."""
        if self.started is None:
            return
        with suppress(subprocess.TimeoutExpired):
            status = self.started.process.wait(seconds)
            raise ArmError(f"its server ended with exit status {status}{self.last_words()}")

    def last_words(self) -> str:
        said = last_error(self.started.log) if self.started else None
        return f": {said}" if said else ""


def last_error(log: str) -> str | None:
    """The sentence in a log that says why: the last line with an error in it that isn't only a consequence."""
    found = [hit.group().strip() for hit in map(ERROR_LINE.search, log.splitlines()) if hit]
    telling = [line for line in found if not any(words in line for words in SAYS_NOTHING)]
    return (telling or found)[-1] if found else None


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is no arm."""
    for name in names:
        if name not in (*FORMATS, *STOCK):
            raise one_of("arm", name, (*FORMATS, *STOCK))


def arms_of(settings: Settings) -> list[Arm]:
    """The arms of a run, in order; all get the same model, memory and flags."""
    if settings.urls:
        return [Arm(name, url=url) for name, url in settings.urls.items()]
    same = [*_memory(settings), *settings.server_args]
    arms = []
    for name in settings.arms:
        if name in STOCK:
            own = (settings.model or _demo_model(), "--kv-cache-dtype", name.removeprefix("vllm:"), *same)
            arms.append(Arm(name, module=STOCK_SERVER, arguments=own, plugins=False))
        else:
            model_given = [settings.model] if settings.model else []
            arms.append(Arm(name, module=OURS, arguments=(*model_given, "--kv-format", name, *same)))
    return arms


def _demo_model() -> str:
    from fraqtl_bench.quantizer.capture import demo_model  # imports torch, which other arms don't need

    return str(demo_model())


def _memory(settings: Settings) -> list[str]:
    if settings.kv_memory_bytes is not None:
        return ["--kv-cache-memory-bytes", str(settings.kv_memory_bytes)]
    if settings.gpu_memory_utilization is not None:
        return ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
    return []
