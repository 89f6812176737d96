"""The section "Containers" of docs/operations.md says only what is there."""

from __future__ import annotations

import argparse
import json
import re

from fraqtl_serve.serve import build_parser
from tests.docker.dockerfiles import CPU, ROOT, Dockerfile

GUIDE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
RESULT = json.loads((ROOT / "bench/results/cpu/image.json").read_text(encoding="utf-8"))
SECTION = GUIDE.split("\n## Containers\n", 1)[1].split("\n## ", 1)[0]


def serve_flags() -> set[str]:
    [commands] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return {flag for action in commands.choices["serve"]._actions for flag in action.option_strings}


def test_flags_for_several_gpus_are_those_of_vllm() -> None:
    table = SECTION.split("### More GPUs", 1)[1]
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", table)) - {"--network", "--shm-size"}  # Docker's
    assert len(flags) > 10 and flags <= serve_flags()


def test_files_named_are_there() -> None:
    for path in set(re.findall(r"(?<![\w/])(?:tests/|bench/)?(?:docker|results)/[\w./-]*[\w]", SECTION)):
        assert (ROOT / path).exists(), path


def test_build_arguments_and_the_drain_are_those_of_the_image() -> None:
    image = Dockerfile(CPU.read_text())
    arguments = {value.partition("=")[0] for value in image.values("ARG")}
    assert set(re.findall(r"PIP_\w+", SECTION)) <= arguments
    [seconds] = re.findall(r"finish for (\d+) seconds \(`--shutdown-timeout \1`\)", SECTION)
    assert f'"--shutdown-timeout", "{seconds}"' in (image.last("ENTRYPOINT") or "")


def test_figures_are_those_of_the_result_file() -> None:
    rows = {row["check"]: row for row in RESULT["checks"]}
    assert RESULT["failed"] == 0 and f"{len(rows)} checks, none failed" in SECTION
    cpu, gpu = rows["CPU image: builds"], rows["GPU image on a stand-in: builds"]
    for size in ("image_bytes", "base_bytes"):
        assert f"{cpu[size] / 1e9:.2f} GB" in SECTION
    assert f"{(gpu['image_bytes'] - gpu['base_bytes']) / 1e6:.0f} MB" in SECTION
    assert f"the stream of {rows['nothing given: stop finishes a stream']['tokens_sent']} tokens" in SECTION
    stops = [row["seconds_to_end"] for name, row in rows.items() if ": stop " in name]
    assert len(stops) >= 4 and f"{max(stops):.1f} s later at the latest" in SECTION
    killed = rows["engine killed: ends when its engine is killed"]
    assert f"{killed['seconds_to_end']:.1f} s later the container has ended" in SECTION
