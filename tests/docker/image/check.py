"""Build the images, run them, and write down what they did.

    python -m tests.docker.image.check --out bench/results/cpu/image.json

Wants this project's packages and a Docker engine; run.sh brings one where there is none. Builds
docker/Dockerfile.cpu, runs it as users and as platforms do, then with docker/compose.yaml. Builds the GPU's Dockerfile
from a stand-in for the official image, the CPU image's own packages, and runs that on the CPU, too. Prints a line for
each check; its status is 1 if one failed. Groups of checks that passed before, on the same images, are taken from the
file of the results: a run that was stopped goes on. Delete that file to make all anew.

pip's settings are taken over from the environment: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_TRUSTED_HOST, PIP_CERT, and
PIP_FIND_LINKS, which may be a folder here: it is served to the build on the loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fraqtl_bench import results
from fraqtl_bench.server import free_port
from tests.docker.image import checks
from tests.docker.image.chats import chat
from tests.docker.image.checks import ANYBODY, EMPTY_CACHE, HARDENED, Setting
from tests.docker.image.docker_cli import Docker, DockerError
from tests.docker.image.report import Found, Report, fail

ROOT = Path(__file__).parents[3]
CPU_IMAGE = "fraqtl-serve:cpu"
PROJECT = "fraqtl-check"
GPU_IMAGE, BUILD, STAND_IN = (f"{PROJECT}:{name}" for name in ("gpu", "build", "base"))
# What the GPU's base brings: the packages as the CPU image's build has them, without ours.
STAND_IN_FILE = f"FROM {BUILD}\nRUN python3 -m ensurepip && python3 -m pip uninstall -y fraqtl-serve\n"
WHEELS_PORT = 18573  # always the same if it is free: to BuildKit another address is another build
PORT_FILE = 'services:\n  server:\n    ports: !override ["127.0.0.1:{port}:8000"]\n'


@contextmanager
def build_options() -> Iterator[list[str]]:
    """Build arguments for pip's settings in the environment. The network is the host's, where the wheels are served."""
    options = ["--network", "host"]
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST"):
        if os.environ.get(name):
            options += ["--build-arg", f"{name}={os.environ[name]}"]
    if os.environ.get("PIP_CERT"):
        options += ["--secret", f"id=certificates,src={os.environ['PIP_CERT']}"]
    links = os.environ.get("PIP_FIND_LINKS", "")
    if not Path(links).is_dir() or not links:
        yield options + (["--build-arg", f"PIP_FIND_LINKS={links}"] if links else [])
        return
    server = serve_folder(links)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield [*options, "--build-arg", f"PIP_FIND_LINKS=http://127.0.0.1:{server.server_port}/"]
    finally:
        server.shutdown()
        server.server_close()


def serve_folder(folder: str) -> ThreadingHTTPServer:
    handler = partial(QuietHandler, directory=folder)
    try:
        return ThreadingHTTPServer(("127.0.0.1", WHEELS_PORT), handler)
    except OSError:
        return ThreadingHTTPServer(("127.0.0.1", 0), handler)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def build_cpu(docker: Docker, logs: Path) -> float:
    """The CPU image, and its first stage, which the stand-in for the GPU's base starts from; seconds of the first."""
    common = ["--file", str(ROOT / "docker/Dockerfile.cpu"), str(ROOT)]
    with build_options() as options:
        seconds = docker.build(*options, "--tag", CPU_IMAGE, *common, log=logs / "cpu.log")
        docker.build(*options, "--target", "build", "--tag", BUILD, *common, log=logs / "build.log")
    return seconds


def build_gpu(docker: Docker, logs: Path) -> float:
    docker.build("--network", "none", "--tag", STAND_IN, "-", log=logs / "base.log", stdin=STAND_IN_FILE)
    options = ["--network", "none", "--build-arg", f"BASE={STAND_IN}", "--tag", GPU_IMAGE]
    return docker.build(*options, str(ROOT), log=logs / "gpu.log")


def build(report: Report, name: str, docker: Docker, image: str, make: Callable[[], float]) -> bool:
    """Build `image` and note its unpacked size, and its base's; one that is in the cache is none to wait for."""
    try:
        seconds = round(make())
    except DockerError as error:
        return report.run(f"{name}: builds", partial(fail, error))

    def size() -> Found:
        whole = docker.inspect(image)
        base = docker.inspect(whole["Config"]["Labels"]["org.opencontainers.image.base.name"])
        bytes_ = {"image_bytes": whole["Size"], "base_bytes": base["Size"]}
        return {"build_seconds": seconds, **bytes_, "base_is_official": bool(base["RepoDigests"])}

    return report.group(name, docker.image_id(image), lambda: report.run(f"{name}: builds", size))


def compose_files(docker: Docker) -> Found:
    """Both compose files, resolved by compose itself."""
    cpu = ["--file", str(ROOT / "docker/compose.yaml")]
    services = docker.run("compose", *cpu, "config", "--services").split()
    docker.run("compose", *cpu, "config", "--quiet")
    docker.run("compose", *cpu, "--file", str(ROOT / "docker/compose.gpu.yaml"), "config", "--quiet", MODEL="a/model")
    return {"services": sorted(services)}


def compose_server(docker: Docker) -> Found:
    """The server alone: the other services' images can't be had everywhere."""
    port = free_port()
    command = ["compose", "--project-name", PROJECT, "--file", str(ROOT / "docker/compose.yaml"), "--file", "-"]
    override = PORT_FILE.format(port=port)
    try:
        docker.run(*command, "up", "--detach", "--no-build", "--wait", "server", stdin=override)
        response = chat(f"http://127.0.0.1:{port}")
        docker.run(*command, "stop", "server", stdin=override)
        [code] = docker.run(
            "ps", "--all", "--filter", f"label=com.docker.compose.project={PROJECT}", "--format", "{{.Status}}"
        ).splitlines()
    finally:
        docker.run(*command, "down", "--volumes", stdin=override)
    assert "Exited (0)" in code, f"it ended so: {code}"
    return {"answer": response["choices"][0]["message"]["content"], "end": code.partition(")")[0] + ")"}


def run_all(docker: Docker, report: Report, logs: Path) -> None:
    if not build(report, "CPU image", docker, CPU_IMAGE, partial(build_cpu, docker, logs)):
        return
    cpu = Setting(docker, CPU_IMAGE, free_port())
    with docker.network():
        plain = (checks.answers, checks.user_is_not_root, checks.kernels_are_compiled, checks.is_healthy)
        report.run_in(cpu, "nothing given", checks=(*plain, checks.stop_finishes_a_stream))
        report.run_in(cpu, "endless stream", checks=(checks.stop_cuts_an_endless_stream,))
        report.run_in(cpu, "engine killed", checks=(checks.is_healthy, checks.ends_when_its_engine_is_killed))
        outlive = ("--env", "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH=1")
        ill = (checks.is_healthy, checks.is_ill_when_it_outlives_its_engine)
        report.run_in(cpu, "engine killed, server told to stay", *outlive, checks=ill)
        confined = (checks.answers, checks.is_confined, checks.is_healthy, checks.stop_finishes_a_stream)
        report.run_in(cpu, "hardened, any user", *HARDENED, *ANYBODY, checks=confined)
        report.run_in(cpu, "hardened, empty volume", *HARDENED, *ANYBODY, *EMPTY_CACHE, checks=confined)
    image = docker.image_id(CPU_IMAGE)
    report.group(
        "compose's files", image, lambda: report.run("compose's files: are valid", partial(compose_files, docker))
    )
    report.group("compose", image, lambda: report.run("compose: serves", partial(compose_server, docker)))
    if not build(report, "GPU image on a stand-in", docker, GPU_IMAGE, partial(build_gpu, docker, logs)):
        return
    gpu = Setting(docker, GPU_IMAGE, free_port())
    with docker.network():
        confined = (checks.answers, checks.is_confined, checks.is_healthy, checks.stop_finishes_a_stream)
        report.run_in(gpu, "GPU image on a CPU", *HARDENED, *ANYBODY, checks=confined)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--docker", default="docker", help="the command `docker` (default: the one in PATH)")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("--logs", type=Path, help="folder for the logs of the builds (default: a temporary one)")
    args = parser.parse_args()
    docker = Docker(args.docker)
    try:
        engine = docker.run("version", "--format", "{{.Server.Version}}")
    except (OSError, RuntimeError):
        sys.exit(f"check.py: no Docker engine answers {args.docker}: tests/docker/image/run.sh brings one")
    logs = args.logs or Path(tempfile.mkdtemp(prefix="fraqtl-image-"))
    logs.mkdir(parents=True, exist_ok=True)

    def save(rows: list[Found]) -> None:
        # run.sh names the engine that it brought by a folder that is gone afterwards.
        docker_flag = "" if args.docker == "docker" else "--docker FOLDER/docker "
        command = f"python -m tests.docker.image.check {docker_flag}--out {args.out}"
        failed = sum(not row["passed"] for row in rows)
        found = {"command": command, "docker": engine, "failed": failed, "checks": rows}
        results.save(args.out, found)

    earlier = json.loads(args.out.read_text())["checks"] if args.out and args.out.exists() else []
    report = Report(earlier, save) if args.out else Report()
    run_all(docker, report, logs)
    print(f"{len(report.checks) - report.failed} passed, {report.failed} failed")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
