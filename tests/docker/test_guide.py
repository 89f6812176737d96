"""The guides to containers and to several GPUs say only what is there."""

from __future__ import annotations

import argparse
import re

from fraqtl_serve.cli.serve import build_parser
from tests.docker.dockerfiles import CPU, ROOT, Dockerfile

GUIDES = ROOT / "docs/guides"
SECTION = (GUIDES / "containers.md").read_text(encoding="utf-8")


def serve_flags() -> set[str]:
    [commands] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return {flag for action in commands.choices["serve"]._actions for flag in action.option_strings}


def test_flags_for_several_gpus_are_those_of_vllm() -> None:
    table = (GUIDES / "several-gpus.md").read_text(encoding="utf-8")
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
