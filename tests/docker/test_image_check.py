"""The parts of tests/docker/image that need no Docker engine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
import pytest

from tests.docker.image.check import build_options
from tests.docker.image.docker_cli import Docker, DockerError
from tests.docker.image.report import Report

SCRIPTS = sorted((Path(__file__).parent / "image").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_can_be_read(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["start"], ["stop"], ["restart", "/tmp"]])
def test_engine_says_how_it_is_called(arguments: list[str]) -> None:
    script = next(path for path in SCRIPTS if path.name == "engine.sh")
    done = subprocess.run([str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("engine.sh: ")


def test_report_keeps_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()

    def fails() -> dict[str, int]:
        raise AssertionError("a user id is 0")

    assert report.run("good", lambda: {"status": 0}) and not report.run("bad", fails)
    assert report.failed == 1
    assert [(row["check"], row["passed"]) for row in report.checks] == [("good", True), ("bad", False)]
    assert report.checks[0]["status"] == 0 and "a user id is 0" in report.checks[1]["error"]
    assert capsys.readouterr().out.splitlines() == ["ok   good: status 0", "FAIL bad: AssertionError: a user id is 0"]


def test_groups_that_passed_on_this_image_are_kept() -> None:
    made: list[str] = []

    def run(report: Report, image: str, *, passes: bool) -> bool:
        def check() -> dict[str, int]:
            made.append(image)
            assert passes
            return {"status": 0}

        return report.group("stop", image, lambda: report.run("stop: ends", check))

    saved: list[dict[str, object]] = []
    assert not run(Report(save=saved.extend), "a", passes=False)
    assert run(Report(saved, saved.extend), "a", passes=True)
    assert run(again := Report(saved[1:]), "a", passes=False) and again.checks == saved[1:]
    assert not run(Report(saved[1:]), "b", passes=False)
    assert made == ["a", "a", "b"]
    assert [row["passed"] for row in saved] == [False, True]


def test_command_that_fails_says_why() -> None:
    with pytest.raises(DockerError, match=r"ended with 2:\n.*/not/there"):
        Docker("ls").run("/not/there")


def test_settings_of_pip_are_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_CERT", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    with build_options() as options:
        assert options == ["--network", "host"]
    (tmp_path / "torch-1-py3-none-any.whl").write_text("x")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CERT", "/certificates.crt")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with build_options() as options:
        assert "PIP_INDEX_URL=http://127.0.0.1:9/simple" in options
        assert "id=certificates,src=/certificates.crt" in options
        [links] = [o.partition("=")[2] for o in options if o.startswith("PIP_FIND_LINKS=")]
        assert "torch-1-py3-none-any.whl" in httpx.get(links).text
    with pytest.raises(httpx.ConnectError):
        httpx.get(links)
