"""The two runs on a lent GPU, without one: clocks, archives, verdicts, parts, and rehearsals of the scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fraqtl_bench import tune
from fraqtl_bench.gpu import bundle, engine, first, parts, verdict
from fraqtl_bench.gpu.schedule import ROOT, Outcome, Run, Step, descendants
from tests.kernels.gpu.conftest import DEVICE

WRITE = "import sys; open(sys.argv[1], 'w').write('found')"


def report(outcomes: Sequence[Outcome]) -> str:
    return " ".join(f"{o.name}:{o.status}" for o in outcomes)


def shell(name: str, text: str, limit: float = 20, must_pass: bool = False) -> Step:
    return Step(name, limit, ("sh", "-c", text), must_pass)


def archived(out: Path) -> dict[str, str]:
    with tarfile.open(out / "results.tar.gz") as tar:
        files = [member for member in tar.getmembers() if member.isfile()]
        return {member.name: tar.extractfile(member).read().decode() for member in files}  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_step_that_fails_or_hangs_stops_nobody(tmp_path: Path) -> None:
    run = Run(tmp_path / "work", tmp_path / "out", 60)
    done = run.go(
        [shell("one", "echo hello; exit 3"), shell("two", "sleep 60", limit=3.5), shell("three", "true")], report
    )
    assert not done
    assert [o.status for o in run.outcomes] == ["failed", "timed out", "passed"]
    assert 3.4 < run.outcomes[1].seconds < 12
    found = archived(tmp_path / "out")
    assert found["one.log"] == "hello\n" and found["verdict.md"] == "one:failed two:timed out three:passed"
    assert [o["name"] for o in json.loads(found["steps.json"])] == ["one", "two", "three"]


def test_a_check_that_must_pass_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "work", tmp_path / "out", 60)
    assert not run.go(
        [shell("check", "exit 1", must_pass=True), shell("long", "touch " + str(tmp_path / "ran"))], report
    )
    assert [o.status for o in run.outcomes] == ["failed", "not run"] and not (tmp_path / "ran").exists()
    assert "check failed: the run ends here, give the GPU back" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_starts_when_the_time_is_up(tmp_path: Path) -> None:
    run = Run(tmp_path / "work", tmp_path / "out", 5)
    run.go([shell("long", "sleep 60"), shell("late", "true")], report)
    assert [o.status for o in run.outcomes] == ["timed out", "no time left"]
    assert run.elapsed < 12


@pytest.mark.slow
def test_servers_that_a_step_leaves_are_ended(tmp_path: Path) -> None:
    """In a session of their own, as servers are: the group of the step doesn't hold them."""
    note = tmp_path / "pid"
    code = "import subprocess as s, sys; p = s.Popen(['sleep', '300'], start_new_session=True)"
    code += f"; open({str(note)!r}, 'w').write(str(p.pid)); p.wait()"
    before = set(descendants(os.getpid()))  # servers of other tests in this process
    run = Run(tmp_path / "work", tmp_path / "out", 60)
    run.go([Step("server", 3.5, (sys.executable, "-c", code))], report)
    assert is_gone(int(note.read_text()))
    assert set(descendants(os.getpid())) <= before


def is_gone(pid: int, seconds: float = 10) -> bool:
    """Killed processes end when a busy machine comes to it."""
    status, end = Path(f"/proc/{pid}/stat"), time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


RUNNER = """
import sys
from pathlib import Path
from fraqtl_bench.gpu import schedule
schedule.PACK_EVERY = 0.2
run = schedule.Run(Path(sys.argv[1]), Path(sys.argv[2]), 60)
def report(outcomes):
    return "so far"
run.go([schedule.Step("one", 20, ("echo", "first")), schedule.Step("two", 50, ("sh", "-c", sys.argv[3]))], report)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_its_archive(tmp_path: Path, number: signal.Signals) -> None:
    """With what the step that ran had written, too."""
    work, out = tmp_path / "work", tmp_path / "out"
    command = (sys.executable, "-c", RUNNER, str(work), str(out), f"echo half > {work}/half.jsonl; exec sleep 40")
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        end = time.monotonic() + 20
        while time.monotonic() < end and not (out.exists() and "half.jsonl" in names(out)):
            time.sleep(0.1)
        left = descendants(process.pid)
        process.send_signal(number)
    for pid in left:  # after SIGKILL nobody else ends it
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    found = archived(out)
    assert found["one.log"] == "first\n" and found["half.jsonl"] == "half\n" and found["verdict.md"] == "so far"


def names(out: Path) -> list[str]:
    try:
        return list(archived(out))
    except OSError:
        return []


def line(kind: str, shape: str, name: str, ms: float) -> dict[str, Any]:
    more = {"served": True, "share_of_copy_bandwidth": 0.8, "kernel_error": 1e-3}
    return {"kind": kind, "shape": shape, "name": name, "median_ms": ms, **more}


def test_a_verdict_on_the_kernels(tmp_path: Path) -> None:
    goals = {goal.shape: goal for goal in first.GPU.goals}
    assert list(goals) == list(tune.SHAPES)  # every goal is measured, and nothing without a goal
    lines = [
        line("baseline", s, name, ms) for s in tune.SHAPES[:3] for name, ms in (("fa3-bf16@16", 3.0), ("bf16@16", 4))
    ]
    for shape, ms in zip(tune.SHAPES, (3 / 2.0, 3 / 3.3, 3 / 2.0), strict=False):
        lines += [line("variant", shape, "fast", ms), line("variant", shape, "slow", 9.0)]
    (tmp_path / "tune.jsonl").write_text("\n".join(map(json.dumps, lines)))
    errors = {"errors": {first.GPU.error_shapes[0]: {"k4v4": {"kernel_error": 0.02}}}}
    (tmp_path / "errors.json").write_text(json.dumps(errors))
    xml = '<testsuites><testsuite errors="0" failures="2" skipped="1" tests="9"/></testsuites>'
    (tmp_path / "tests.xml").write_text(xml)
    outcomes = [Outcome("codes", "passed", 0, 1, 9), Outcome("tests", "failed", 1, 1, 9)]
    found = first.findings(first.GPU, tmp_path, outcomes)
    by_goal = {f.goal.split(":")[0]: f for f in found}

    def speed(shape: str) -> verdict.Finding:
        return by_goal[f"k4v4 decode at {shape}, against the fastest 16-bit kernel"]

    assert [speed(s).verdict for s in tune.SHAPES[:4]] == ["met", "met (stretch)", "missed", "not measured"]
    assert speed(tune.SHAPES[0]).found == "2x"
    assert by_goal[f"its share of a copy's speed at {tune.SHAPES[1]}"].verdict == "met"
    assert by_goal[f"kernel error of k4v4 at {first.GPU.error_shapes[0]}"].verdict == "missed"
    assert by_goal["the kernel tests pass, compiled"].found == "9 run, 2 failed, 1 skipped"
    text = verdict.as_text("Title", False, found, outcomes)
    assert f"5 of {len(found)} goals met, 3 missed, {len(found) - 8} not measured." in text
    assert "rehearsal" not in text and "rehearsal" in verdict.as_text("Title", True, found, outcomes)


def test_a_verdict_on_the_engine(tmp_path: Path) -> None:
    plan = engine.plan_for(False, tmp_path)
    for name, ms in (("k4v4", 8.0), ("stock", 10.0)):
        content = {"itl_ms": {"1x2048": {"median": ms}, "1x16384": {"median": 18 - ms}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    compared = {"same": 58, "differ_by_rounding": 2, "differ": []}
    (tmp_path / "texts.json").write_text(json.dumps({"compared": compared}))
    found = engine.findings(plan, tmp_path, [Outcome("imports", "passed", 0, 1, 9)])
    assert [f.verdict for f in found] == ["met", "met", "met", "missed", *["not measured"] * 5]
    assert found[1].found == "58 the same, 2 by rounding, 0 differ"
    assert found[2].found == "1.25x (10.00 / 8.00 ms)"
    (tmp_path / "prefix.json").write_text('{"hits": [0, 992], "same_text": true, "start_seconds": 40}')
    last = engine.findings(plan, tmp_path, [Outcome("prefix", "passed", 0, 1, 9)])[-2]
    assert (last.found, last.verdict) == ("992 tokens found, the same text, start 40 s", "met")


def make_part(folder: Path, name: str, text: str) -> Path:
    (folder / "source").mkdir(parents=True, exist_ok=True)
    (folder / "source" / "file.txt").write_text(text)
    return bundle.pack(folder / f"{name}.tar.xz", folder / "source", [Path("file.txt")])


def sums(folder: Path, *made: Path) -> None:
    lines = [f"{parts._digest(part)}  {part.name}\n" for part in made]
    (folder / parts.SUMS).write_text("".join(lines))


def test_parts_come_in_pieces_and_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, site = tmp_path / "made", tmp_path / "site"
    large, cache = make_part(made, "large", "x"), make_part(made, "triton-cache", "y")
    sums(made, large, cache)
    pieces = bundle.cut(large, 100)
    assert [p.name for p in pieces][:2] == ["large.tar.xz.00", "large.tar.xz.01"] and not large.exists()
    for number, arriving in enumerate([pieces[1:], [pieces[0], cache]]):
        transfer = tmp_path / f"transfer{number}"
        transfer.mkdir()
        for path in [*arriving, made / parts.SUMS]:
            (transfer / path.name).write_bytes(path.read_bytes())
        parts.prepare(transfer, site)
        assert (site / "file.txt").exists() == (number == 1)
    assert (site / "file.txt").read_text() == "x" and (site / "triton-cache" / "file.txt").read_text() == "y"
    assert "more to come" in capsys.readouterr().out
    assert parts.environment(site)["TRITON_CACHE_DIR"] == str(site / "triton-cache")
    parts.prepare(tmp_path / "transfer1", site)  # once more does no harm
    sums(tmp_path / "transfer1", make_part(tmp_path / "transfer1", "triton-cache", "z"))
    with pytest.raises(SystemExit, match="holds another build of triton-cache"):
        parts.prepare(tmp_path / "transfer1", site)


def test_a_part_that_was_cut_short_is_named(tmp_path: Path) -> None:
    part = make_part(tmp_path, "deps", "x")
    sums(tmp_path, part)
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(SystemExit, match=r"deps\.tar\.xz is not what SHA256SUMS says"):
        parts.prepare(tmp_path, tmp_path / "site")


def test_packages_of_the_bundle_have_versions() -> None:
    listed = [text for text in (ROOT / "bench/gpu_packages.txt").read_text().splitlines() if not text.startswith("#")]
    assert "vllm==0.32.0" in bundle.pins(listed)
    assert len(bundle.pins(bundle.TOOL_PACKAGES)) == len(bundle.TOOL_PACKAGES)
    with pytest.raises(SystemExit, match="has no nonsense"):
        bundle.pins(["nonsense"])


def test_the_project_part_holds_what_the_runs_name() -> None:
    files = {path.as_posix() for path in bundle.tree_files(ROOT)}
    wanted = {engine.CPU_TEXTS, "bench/gpu_first.sh", "bench/gpu_engine.sh", f"{first.TESTS}/test_unpack.py"}
    assert wanted <= files and {f"{first.TESTS}/{name}" for name in first.LEFT_OUT} <= files
    assert not any(name.startswith(("docs/images", "bench/results/cpu/quality")) for name in files)


def rehearse(script: str, out: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", str(ROOT / "bench" / script), str(out), "--rehearse", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="in Triton's interpreter")
def test_the_first_run_rehearsed(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    with rehearse("gpu_first.sh", tmp_path) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    found = archived(tmp_path)
    assert {o["status"] for o in json.loads(found["steps.json"])} == {"passed"}
    assert {"machine.json", "decode.json", "tests.xml", "tune.jsonl", "tuned.json", "errors.json"} < found.keys()
    assert "**A rehearsal without a GPU" in output and " 0 not measured." in output


@pytest.mark.slow
@pytest.mark.e2e
def test_the_engine_run_rehearsed(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    with rehearse("gpu_engine.sh", tmp_path) as process:
        output, _ = process.communicate()
    found = archived(tmp_path)
    assert process.returncode == 0, output + found.get("prefix.log", "")[-2000:]
    assert list(json.loads(found["k4v4.json"])["itl_ms"]) == ["1x40", "2x40"]
    assert json.loads(found["prefix.json"])["hits"][1] > 0
    assert "compared" in json.loads(found["drafts.json"])
    assert "**A rehearsal without a GPU" in output


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="in Triton's interpreter")
def test_a_rehearsal_killed_in_the_middle_leaves_its_archive(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    with rehearse("gpu_first.sh", tmp_path) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if "codes (at most" in text:
                break
        left = descendants(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    found = archived(tmp_path)
    assert "machine" in json.loads(found["machine.json"]) and "not measured" in found["verdict.md"]
