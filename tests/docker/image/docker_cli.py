"""The `docker` command, and one container of ours with what can be asked of it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

NETWORK = "fraqtl-check"  # of our own: an engine without a default bridge has no other to publish ports from


class DockerError(RuntimeError):
    """A docker command ended with another status than 0."""


@dataclass(frozen=True)
class Docker:
    program: str

    def run(self, *arguments: str, stdin: str | None = None, **environment: str) -> str:
        """What `docker ARGUMENTS` prints; raises DockerError with the end of its log."""
        env = {**os.environ, **environment}
        done = subprocess.run([self.program, *arguments], input=stdin, env=env, capture_output=True, text=True)
        if done.returncode:
            raise DockerError(f"docker {' '.join(arguments[:4])} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return done.stdout.strip()

    def status(self, *arguments: str) -> tuple[int, str]:
        """Exit status, and stdout and stderr together."""
        done = subprocess.run([self.program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout

    def build(self, *arguments: str, log: Path, stdin: str | None = None) -> float:
        """Build with the log in a file; seconds that it took."""
        began = time.monotonic()
        command = [self.program, "build", "--progress", "plain", *arguments]
        with log.open("w") as out:
            done = subprocess.run(command, input=stdin, stdout=out, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise DockerError(f"docker build ended with {done.returncode}:\n{log.read_text()[-4000:]}")
        return time.monotonic() - began

    def inspect(self, name: str) -> Any:
        return json.loads(self.run("inspect", name))[0]

    def image_id(self, name: str) -> str:
        return str(self.inspect(name)["Id"])

    @contextmanager
    def network(self) -> Iterator[None]:
        self.run("network", "create", NETWORK)
        try:
            yield
        finally:
            self.run("network", "rm", NETWORK)

    @contextmanager
    def container(self, image: str, *options: str, port: int, seconds: float) -> Iterator[Container]:
        """A container of `image` with its port published on the loopback, once it is ready; deleted at the end."""
        began = time.monotonic()
        publish = ["--network", NETWORK, "--publish", f"127.0.0.1:{port}:8000"]
        container = Container(self, self.run("run", "--detach", *publish, *options, image), f"http://127.0.0.1:{port}")
        try:
            container.wait_until_ready(seconds)
            container.start_seconds = time.monotonic() - began
            yield container
        finally:
            self.run("rm", "--force", "--volumes", container.id)


@dataclass
class Container:
    docker: Docker
    id: str
    url: str
    start_seconds: float = 0.0

    @property
    def state(self) -> Any:
        return self.docker.inspect(self.id)["State"]

    def log(self) -> str:
        return self.docker.status("logs", self.id)[1]

    def python(self, code: str) -> str:
        """What a piece of Python prints inside, as the container's own user."""
        return self.docker.run("exec", self.id, "python3", "-c", code)

    def health_command(self) -> tuple[int, str]:
        """Run the image's HEALTHCHECK inside; its exit status and the last line of what it says."""
        kind, *command = self.docker.inspect(self.id)["Config"]["Healthcheck"]["Test"]
        if kind != "CMD":
            raise DockerError(f"HEALTHCHECK is not in exec form but {kind}")
        status, output = self.docker.status("exec", self.id, *command)
        return status, (output.strip().splitlines() or [""])[-1]

    def wait_until_ready(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._answers():
            if not self.state["Running"]:
                raise DockerError(f"the container ended with {self.state['ExitCode']}:\n{self.log()[-4000:]}")
            if time.monotonic() > end:
                raise DockerError(f"the container was not ready after {seconds:g} s:\n{self.log()[-4000:]}")
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_for_health(self, wanted: str, seconds: float) -> str:
        """Docker's own verdict, once it is `wanted`, else what it was at the end."""
        end = time.monotonic() + seconds
        while (found := self.state["Health"]["Status"]) != wanted and time.monotonic() < end:
            time.sleep(1)
        return str(found)

    def wait_for_end(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self.state["Running"] and time.monotonic() < end:
            time.sleep(0.2)
        return not self.state["Running"]

    def stop(self) -> float:
        """`docker stop` with its usual ten seconds; how long the container took to end."""
        began = time.monotonic()
        self.docker.run("stop", self.id)
        return time.monotonic() - began
