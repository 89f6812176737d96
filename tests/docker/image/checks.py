"""What a running image is held to. Each check returns its figures, or raises AssertionError with what was otherwise."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tests.docker.image.chats import Stream, chat, tokens_per_second
from tests.docker.image.docker_cli import Container, Docker

READY_SECONDS = 300
STOP_SECONDS = 15
ENDLESS = 8000  # tokens
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
ANYBODY = ("--user", "12345:0", "--pids-limit", "512", "--memory", "6g")
# As an empty volume that Kubernetes mounts for a pod: root's, and writable for its group.
EMPTY_CACHE = ("--tmpfs", "/cache:uid=0,gid=0,mode=2775")

# Run inside. The images have no ps, kill or find, but Python.
PROCESS = """
import json
fields = dict(line.split(":", 1) for line in open("/proc/1/status"))
print(json.dumps({name: fields[name].split() for name in ("Uid", "Gid", "CapEff", "CapBnd", "NoNewPrivs")}))
"""
KILL_ENGINE = """
import os, pathlib
names = {p.parent.name: p.read_bytes() for p in pathlib.Path("/proc").glob("[0-9]*/cmdline")}
[pid] = [int(pid) for pid, name in names.items() if name.startswith(b"VLLM::EngineCore")]
os.kill(pid, 9)
"""
COMPILED = """
import json, pathlib
began = pathlib.Path("/proc/1").stat().st_mtime
times = [p.stat().st_mtime for p in pathlib.Path("/cache/numba").rglob("*") if p.is_file()]
print(json.dumps({"kernel_files": len(times), "of_them_compiled_at_start": sum(t > began for t in times)}))
"""
WRITES = """
import json, pathlib
def takes_writes(folder):
    try:
        pathlib.Path(folder, "x").write_text("x")
    except OSError:
        return False
    return True
print(json.dumps({f: takes_writes(f) for f in ("/", "/opt/venv", "/usr/lib", "/home", "/cache", "/tmp", "/dev/shm")}))
"""


@dataclass(frozen=True)
class Setting:
    docker: Docker
    image: str
    port: int

    def container(self, *options: str) -> AbstractContextManager[Container]:
        return self.docker.container(self.image, *options, port=self.port, seconds=READY_SECONDS)


def answers(container: Container) -> dict[str, Any]:
    """A chat request from outside, answered by the demo model out of a packed cache."""
    said = chat(container.url)
    text = said["choices"][0]["message"]["content"]
    assert text.strip(), f"the answer is empty: {said}"
    assert said["fraqtl"]["kv_format"] == "k4v4", f"no report of a packed cache: {said}"
    return {"model": said["model"], "answer": text, "kv_ratio": said["fraqtl"]["ratio"]}


def user_is_not_root(container: Container) -> dict[str, Any]:
    process = json.loads(container.python(PROCESS))
    assert "0" not in process["Uid"], f"a user id is 0: {process}"
    return {"uid": int(process["Uid"][0]), "gid": int(process["Gid"][0])}


def kernels_are_compiled(container: Container) -> dict[str, Any]:
    """Nothing that was compiled while the image was built is compiled again."""
    found: dict[str, Any] = json.loads(container.python(COMPILED))
    assert found["kernel_files"] and not found["of_them_compiled_at_start"], f"compiled anew: {found}"
    return found


def is_healthy(container: Container) -> dict[str, Any]:
    status, said = container.health_command()
    assert status == 0, f"the health command ended with {status}: {said}"
    verdict = container.wait_for_health("healthy", 60)
    assert verdict == "healthy", f"Docker calls it {verdict}"
    return {"health_command": status, "docker_says": verdict}


def end(container: Container, seconds: float) -> dict[str, Any]:
    return {"seconds_to_end": round(seconds, 2), "exit_code": container.state["ExitCode"]}


def stop_finishes_a_stream(container: Container) -> dict[str, Any]:
    """A stream that would go on for some three seconds is read to its end although `docker stop` comes at its start."""
    speed = tokens_per_second(container.url)
    stream = Stream(container.url, tokens=max(16, min(ENDLESS, int(3 * speed))))
    stream.wait_for_lines(3)
    before = len(stream.lines)
    seconds = container.stop()
    result = {**stream.result(), "tokens_per_second": round(speed, 1), "events_before_stop": before}
    result |= {"events": len(stream.lines), **end(container, seconds)}
    assert result["done"] and result["finish_reason"] == "length", f"the stream was cut: {result}"
    assert result["tokens_sent"] == result["tokens_asked"] and before < stream.tokens, f"not what was asked: {result}"
    assert seconds < STOP_SECONDS and result["exit_code"] == 0, f"not a clean end: {result}"
    return result


def stop_cuts_an_endless_stream(container: Container) -> dict[str, Any]:
    stream = Stream(container.url, tokens=ENDLESS)
    stream.wait_for_lines(3)
    seconds = container.stop()
    result = {**end(container, seconds), "finish_reason": stream.result()["finish_reason"]}
    assert seconds < STOP_SECONDS and result["exit_code"] == 0, f"not a clean end: {result}"
    return result


def ends_when_its_engine_is_killed(container: Container) -> dict[str, Any]:
    """The health command says so as long as there is a container to run it in, and then there is none."""
    container.python(KILL_ENGINE)
    began = time.monotonic()
    said = []
    while container.state["Running"] and time.monotonic() < began + 60:
        status, words = container.health_command()
        if container.state["Running"]:
            said.append((status, words))
    result = {**end(container, time.monotonic() - began), "health_commands": [status for status, _ in said]}
    result["said"] = said[-1][1] if said else None
    assert not container.state["Running"], f"the container still runs: {result}"
    return result


def is_ill_when_it_outlives_its_engine(container: Container) -> dict[str, Any]:
    container.python(KILL_ENGINE)
    began = time.monotonic()
    while (found := container.health_command())[0] == 0 and time.monotonic() < began + 30:
        time.sleep(0.2)
    assert found[0] != 0, "the health command never noticed"
    verdict = container.wait_for_health("unhealthy", 90)
    assert verdict == "unhealthy", f"Docker calls it {verdict}"
    return {"health_command": found[0], "said": found[1], "docker_says": verdict}


def is_confined(container: Container) -> dict[str, Any]:
    """No capability, no way to one, and no writing but to cache, /tmp and shared memory."""
    process = json.loads(container.python(PROCESS))
    assert process["Uid"][0] == "12345" and process["Gid"][0] == "0", f"another user: {process}"
    assert int(process["CapEff"][0], 16) == int(process["CapBnd"][0], 16) == 0, f"capabilities: {process}"
    assert process["NoNewPrivs"] == ["1"], f"new privileges: {process}"
    writes = json.loads(container.python(WRITES))
    allowed = sorted(folder for folder, takes in writes.items() if takes)
    assert allowed == ["/cache", "/dev/shm", "/tmp"], f"takes writes: {allowed}"
    return {"uid": 12345, "gid": 0, "capabilities": 0, "writable": allowed}
