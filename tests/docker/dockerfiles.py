"""The Dockerfiles, parsed, and the rules that they keep."""

from __future__ import annotations

import json
import re
from io import BytesIO
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
GPU, CPU = ROOT / "Dockerfile", ROOT / "docker/Dockerfile.cpu"

LOOPBACK = re.compile(r"https?://127\.0\.0\.1\b")
URL = re.compile(r"\b(?:https?|ftp|git)://")
CLIENTS = re.compile(r"\b(?:curl|wget)\b")
PIP_INSTALL = re.compile(r"\bpip\b[^&|;]*\binstall\b[^&|;]*")


class Dockerfile:
    """Instructions as (name, value), comments left out, continued lines joined."""

    def __init__(self, text: str) -> None:
        parsed = DockerfileParser(fileobj=BytesIO(text.encode())).structure
        self.instructions = [(i["instruction"], i["value"]) for i in parsed if i["instruction"] != "COMMENT"]
        starts = [n for n, (name, _) in enumerate(self.instructions) if name == "FROM"]
        self.final = self.instructions[starts[-1] :]

    def last(self, name: str) -> str | None:
        """The value of the last such instruction of the image's own stage."""
        return next((value for instruction, value in reversed(self.final) if instruction == name), None)

    def values(self, name: str) -> list[str]:
        return [value for instruction, value in self.instructions if instruction == name]

    def health_command(self) -> list[str]:
        return exec_form((self.last("HEALTHCHECK") or "").partition("CMD ")[2])


def exec_form(value: str) -> list[str]:
    """A command given as a JSON list; empty if it is none."""
    try:
        command = json.loads(value)
    except ValueError:
        return []
    return command if isinstance(command, list) else []


def names_a_registry(image: str) -> bool:
    """Docker takes what stands before the first slash for a host if it has a dot, a colon or is localhost."""
    first, slash, _ = image.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == "localhost")


def problems(text: str) -> list[str]:  # noqa: C901 (one rule after another)
    """What breaks our rules, as one sentence each."""
    file = Dockerfile(text)
    found = []
    if not re.fullmatch(r"[1-9][0-9]*:0", file.last("USER") or ""):
        found.append("USER is not a number other than 0, with group 0")
    if not file.health_command():
        found.append("HEALTHCHECK is missing, or not in exec form")
    if CLIENTS.search(file.last("HEALTHCHECK") or ""):
        found.append("HEALTHCHECK wants a program that a slim image lacks")
    if exec_form(file.last("ENTRYPOINT") or "")[:2] != ["fraqtl-serve", "serve"]:
        found.append("ENTRYPOINT is not fraqtl-serve serve in exec form, so arguments or signals get lost")
    if file.last("CMD") is not None:
        found.append("CMD would go when somebody gives arguments")
    if file.values("ADD"):
        found.append("ADD fetches and unpacks: use COPY")
    if any(URL.search(LOOPBACK.sub("", value)) for _, value in file.instructions):
        found.append("an address is built in")
    bases = [value.partition("=")[2] for value in file.values("ARG") if value.startswith("BASE=")]
    if len(bases) != 1 or names_a_registry(bases[0]):
        found.append("ARG BASE is missing, or names a registry")
    if any(value.split()[0] != "${BASE}" for value in file.values("FROM")):
        found.append("a stage doesn't start from BASE")
    installs = [install for run in file.values("RUN") for install in PIP_INSTALL.findall(run)]
    if not installs or any("--no-deps" not in install for install in installs):
        found.append("pip install without --no-deps may replace torch")
    if exec_form(file.last("VOLUME") or "") != ["/cache"]:
        found.append("VOLUME /cache is missing")
    labels = file.last("LABEL") or ""
    if any(f"org.opencontainers.image.{name}=" not in labels for name in ("title", "licenses", "version", "revision")):
        found.append("a label is missing")
    return found
