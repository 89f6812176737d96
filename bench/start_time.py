#!/usr/bin/env python3
"""How long `make serve` takes to its first answer: in an empty clone with empty caches, and once more after that.

    python3 bench/start_time.py --model smollm2 --name smollm2 --out bench/results/cpu/start

Needs git, make and Python's standard library only: there is no environment yet. Writes OUT/NAME.json and the two
logs, every line with the seconds since `make` was called. What pip says of its indexes is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUESTIONS = {
    "fraqtl-demo": "The code for apple is 4821. The code for tiger is 1357.\nWhat is the code for apple?",
    "smollm2": "What is the capital of France?",
}
LEFT_OUT = re.compile(r"Looking in (indexes|links):")
LIMIT_SECONDS = 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="as for make serve (default: the demo model)")
    parser.add_argument("--name", default="fraqtl-demo", help="the name under which it is served, and of the files")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fraqtl-start-") as folder:
        clone = Path(folder) / "fraqtl-serve"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True)
        environment = fresh_environment(Path(folder))
        runs = {}
        for name in ("first", "second"):
            load = os.getloadavg()[0]
            runs[name], log = run(clone, environment, args.model, args.name)
            runs[name]["load_before"] = round(load, 2)
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{args.name}.{name}.log").write_text(log.replace(folder, "/tmp"), encoding="utf-8")
            print(name, runs[name], flush=True)
    result = {
        "command": f"python3 bench/start_time.py --model '{args.model}' --name {args.name} --out {args.out}",
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu_name(),
        "runs": runs,
    }
    (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def fresh_environment(folder: Path) -> dict[str, str]:
    """The caller's, with every cache in `folder`, and without what would make it find other sources."""
    dropped = {"PYTHONPATH", "VIRTUAL_ENV", "NUMBA_CACHE_DIR", "VLLM_LOGGING_LEVEL"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {
        "PIP_CACHE_DIR": str(folder / "pip"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "HF_HOME": str(folder / "huggingface"),
    }


def run(clone: Path, environment: dict[str, str], model: str, name: str) -> tuple[dict[str, object], str]:
    """`make serve` until it has answered once: seconds and the answer, and what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start, lines = time.monotonic(), list[str]()
    command = ["make", "serve", f"PORT={port}", *([f"MODEL={model}"] if model else [])]
    process = subprocess.Popen(
        command,
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if not LEFT_OUT.match(line):
                lines.append(f"{time.monotonic() - start:7.1f} {line}")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        text = None
        while text is None:
            if process.poll() is not None or time.monotonic() - start > LIMIT_SECONDS:
                raise SystemExit("".join(lines[-40:]) + f"\nno answer; make ended with {process.returncode}")
            time.sleep(0.1)
            text = ask(port, name)
        seconds = time.monotonic() - start
        time.sleep(1)  # for the last lines of the start
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
        reader.join(5)
    return {"seconds_to_first_answer": round(seconds, 1), "lines_printed": len(lines), "answer": text}, "".join(lines)


def ask(port: int, name: str) -> str | None:
    body = {"model": name, "temperature": 0, "max_tokens": 32}
    body["messages"] = [{"role": "user", "content": QUESTIONS.get(name, QUESTIONS["smollm2"])}]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as answer:
            content: str = json.load(answer)["choices"][0]["message"]["content"]
            return content
    except (urllib.error.URLError, OSError):
        return None


def cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
