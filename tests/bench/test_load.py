"""`fraqtl-bench load`: turns, failures, interrupts, resuming; stand-ins for servers and `vllm bench serve`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from fraqtl_bench import bench_serve, server
from fraqtl_bench.cli import main
from fraqtl_bench.load import arms, drive
from fraqtl_bench.load.schema import Report
from tests.bench import stand_in_client

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STAND_IN = ("tests.bench.stand_in_server",)
SMALL = ["--input", "100", "--output", "10", "--concurrency", "1", "2", "--min-requests", "2", "--requests-each", "2"]


def stand_in_command(*arguments: Any) -> list[str]:
    return [sys.executable, str(stand_in_client.__file__), *REAL_COMMAND(*arguments)[5:]]


REAL_COMMAND = bench_serve.command


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "OURS", STAND_IN)
    monkeypatch.setattr(bench_serve, "command", stand_in_command)
    monkeypatch.setattr(drive, "LOOK_SECONDS", 0.2)


def load(out: Path, *arguments: str) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as ended:
        main(["load", "--out", str(out), "--no-figures", *SMALL, *arguments])
    return int(ended.value.code or 0)


def report_of(out: Path) -> Report:
    return Report.model_validate_json((out / "load.json").read_text())


def diary(out: Path) -> list[str]:
    """What the servers did: `start bf16`, `load bf16 1`, ..."""
    lines = (out / "diary").read_text().splitlines() if (out / "diary").exists() else []
    return [
        " ".join(line.split()[: 3 if line.startswith("load") else 2]) for line in lines if not line.startswith("warm")
    ]


def with_diary(out: Path, *more: str) -> list[str]:
    out.mkdir(exist_ok=True)
    return ["--server-args", "--diary", str(out / "diary"), *more]


def turn(arm: str) -> list[str]:
    return [f"start {arm}", f"load {arm} 1", f"load {arm} 2", f"end {arm}"]


def test_arms_take_turns_and_are_compared(tmp_path: Path) -> None:
    assert load(tmp_path, "--kv-memory", "1MiB", *with_diary(tmp_path)) == 0
    assert diary(tmp_path) == turn("bf16") + turn("k4v4") + turn("bf16") + turn("k4v4")
    report = report_of(tmp_path)
    assert report.ended == "complete" and report.schema_version == 1 and len(report.runs) == 8
    first, second = report.arms
    assert (first.name, second.name, first.reason, second.reason) == ("bf16", "k4v4", None, None)
    assert "--kv-format k4v4 --kv-cache-memory-bytes 1048576 --diary" in second.command
    assert first.capacity and second.capacity
    assert (first.capacity.tokens, second.capacity.tokens, second.capacity_ratio) == (1600, 6400, 4.0)
    # 110 tokens, of which 109 are written: 7 blocks; one block of the pool is vLLM's own
    assert (first.capacity.requests, second.capacity.requests) == (99 // 7, 399 // 7)
    assert all(run.other_cores is not None and run.other_cores >= 0 for run in report.runs)
    last = second.summaries[1]
    assert last.point.concurrency == 2 and last.repeats == 2
    assert last.ratios["output_tokens_per_s"].median == pytest.approx(1.5)
    assert last.values["user_tokens_per_s"].median == pytest.approx(225)
    assert last.values["preemptions"].median == 1 and first.summaries[1].values["preemptions"].median == 3
    assert last.values["queue_ms"].median == pytest.approx(250) and last.values["prefix_hits"].median == 0.1
    assert last.values["saved_bytes"].median == 7 * 3000 and last.values["kv_bytes"].median == 7 * 1000
    assert {p.name for p in tmp_path.iterdir()} == {"load.json", "load.md", "load.html", "diary"}
    text = (tmp_path / "load.md").read_text()
    assert "| concurrency 2 | `k4v4` | 450.0 | 1.50 |" in text and "Partial" not in text


def test_prompts_are_those_of_the_other_arms_and_of_no_other_run(tmp_path: Path) -> None:
    load(tmp_path, *with_diary(tmp_path))
    seeds: dict[str, list[str]] = {}
    for line in (tmp_path / "diary").read_text().splitlines():
        if line.startswith("load"):
            seeds.setdefault(line.split()[1], []).append(line.split()[-1])
    assert seeds["bf16"] == seeds["k4v4"] and len(set(seeds["bf16"])) == 4


def test_an_arm_that_can_not_run_is_a_row_with_its_reason(tmp_path: Path) -> None:
    assert load(tmp_path, *with_diary(tmp_path, "--broken", "k4v4")) == 3
    assert diary(tmp_path) == turn("bf16") + turn("bf16")  # it is tried once
    report = report_of(tmp_path)
    reason = "its server did not start: fraqtl-serve: this model has no keys to keep"
    assert report.arms[1].reason == reason and report.arms[1].summaries == []
    assert len(report.runs) == 4 and report.arms[0].reason is None
    assert f"- `k4v4` did not run: {reason}" in (tmp_path / "load.md").read_text()


def test_a_server_that_dies_half_way_leaves_a_partial_report_and_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = with_diary(tmp_path, "--die", "k4v4:2")
    assert load(tmp_path, *flags) == 3
    report = report_of(tmp_path)
    assert [(r.arm, r.repeat, r.point.concurrency) for r in report.runs] == [
        ("bf16", 0, 1), ("bf16", 0, 2), ("k4v4", 0, 1), ("bf16", 1, 1), ("bf16", 1, 2),
    ]  # fmt: skip
    assert report.arms[1].reason == "its server ended with exit status 0"
    assert report.ended == "k4v4: its server ended with exit status 0"
    said = capsys.readouterr()
    assert "the report is partial (k4v4: its server ended with exit status 0); --resume goes on" in said.err
    (tmp_path / "diary").unlink()

    assert load(tmp_path, *flags) == 2  # not without --resume
    assert "go on with --resume" in capsys.readouterr().err
    alive = server.start
    monkeypatch.setattr(server, "start", lambda *a, **k: alive(*(x for x in a if x not in ("--die", "k4v4:2")), **k))
    assert load(tmp_path, "--resume", *flags) == 0
    # only what was missing
    assert diary(tmp_path) == ["start k4v4", "load k4v4 2", "end k4v4", *turn("k4v4")]
    assert len(report_of(tmp_path).runs) == 8 and report_of(tmp_path).ended == "complete"
    assert not (tmp_path / "progress.jsonl").exists()


def test_a_server_that_has_stopped_listening_is_given_time_to_end() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3); raise SystemExit(4)"])
    gone = arms.Target("k4v4", f"http://127.0.0.1:{server.free_port()}", server.Server("", process, Path(os.devnull)))
    with httpx.Client() as http, pytest.raises(arms.ArmError, match="its server ended with exit status 4"):
        gone.check_alive(http)


def test_resuming_asks_for_the_same_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(tmp_path, *with_diary(tmp_path, "--broken", "k4v4"))
    assert load(tmp_path, "--resume", "--seed", "5", *with_diary(tmp_path, "--broken", "k4v4")) == 2
    assert "was made with another seed" in capsys.readouterr().err


def test_ctrl_c_leaves_a_partial_report_and_no_server(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from fraqtl_bench import bench_serve\n"
        "from fraqtl_bench.cli import main\n"
        "from fraqtl_bench.load import arms\n"
        f"arms.OURS = {STAND_IN!r}\n"
        "real = bench_serve.command\n"
        f"bench_serve.command = lambda *a: [sys.executable, {str(stand_in_client.__file__)!r}, *real(*a)[5:]]\n"
        "main(sys.argv[1:])\n"
    )
    line = ["load", "--out", str(tmp_path), "--no-figures", *SMALL, *with_diary(tmp_path, "--hang", "k4v4")]
    command = subprocess.Popen([sys.executable, "-c", script, *line], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while "load k4v4 1" not in diary(tmp_path):
        assert time.monotonic() < end and command.poll() is None
        time.sleep(0.1)
    pids = [int(x.split()[-1]) for x in (tmp_path / "diary").read_text().splitlines() if x.startswith("start")]
    command.send_signal(signal.SIGINT)
    said = command.communicate(timeout=60)[1]
    assert command.returncode == 130
    assert "the report is partial (interrupted); --resume goes on" in said and "Traceback" not in said
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    report = report_of(tmp_path)
    assert report.ended == "interrupted" and [run.arm for run in report.runs] == ["bf16", "bf16"]
    assert "**Partial: interrupted.**" in (tmp_path / "load.md").read_text()


@pytest.fixture
def two_servers(tmp_path: Path) -> Any:
    started = []
    for arm in ("bf16", "k4v4"):
        started.append(server.start("--kv-format", arm, "--diary", str(tmp_path / "diary"), module=STAND_IN))
        server.wait_until_ready(started[-1])
    yield started
    for one in started:
        server.stop(one)


def test_running_servers_take_turns_at_every_point(tmp_path: Path, two_servers: list[server.Server]) -> None:
    one, two = two_servers
    urls = ["--url", f"A={one.url}", "--url", f"B={two.url}/v1"]
    assert load(tmp_path, *urls) == 0
    loads = [line for line in diary(tmp_path) if line.startswith("load")]
    assert loads == ["load bf16 1", "load k4v4 1", "load bf16 2", "load k4v4 2"] * 2
    report = report_of(tmp_path)
    assert [arm.name for arm in report.arms] == ["A", "B"] and report.arms[1].command == two.url
    assert report.arms[1].summaries[0].ratios["output_tokens_per_s"].median == pytest.approx(1.5)
    assert one.process.poll() is None and two.process.poll() is None  # they are not ours to stop


def test_a_running_server_that_goes_away(tmp_path: Path, two_servers: list[server.Server]) -> None:
    one, two = two_servers
    server.stop(two)
    assert load(tmp_path, "--url", f"A={one.url}", "--url", f"B={two.url}") == 3
    report = report_of(tmp_path)
    assert len(report.runs) == 4 and report.arms[1].reason == f"no server answers at {two.url} any more (ConnectError)"


def test_a_client_that_fails_is_the_reason_of_its_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [sys.executable, "-c", "raise ValueError('prompts are too long')"]
    monkeypatch.setattr(bench_serve, "command", lambda *_: failing)
    monkeypatch.setattr(drive, "SETTLE_TRIES", 1)
    assert load(tmp_path, "--arms", "bf16", *with_diary(tmp_path)) == 3
    reason = report_of(tmp_path).arms[0].reason
    assert reason == "at concurrency 1 0 of 2 requests were answered: ValueError: prompts are too long"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--arms", "int3"], "unknown arm 'int3': choose one of bf16, fp16, k8v8, "),
        (["--concurrency", "0"], "--concurrency 0 is too small: give a number above 0"),
        (["--concurrency"], "nothing to measure: give --concurrency, --rates or --contexts"),
        (["--slo", "speed:3"], "unknown SLO 'speed': choose one of ttft, tpot, e2el"),
        (["--slo", "ttft:fast"], "--slo 'ttft:fast' has no milliseconds: give such as ttft:200"),
        (["--dataset", "custom"], "--dataset-path FILE belongs to --dataset custom: give both or none"),
        (["--dataset", "custom", "--dataset-path", "x.txt"], "'x.txt' is no file that ends in .jsonl"),
        (["--dataset", "prefix_repetition"], "prompts of 100 tokens are too short for --dataset prefix_repetition"),
        (["--url", "A=http://h", "--url", "A=http://i"], "two servers have the same name in --url"),
        (["--url", "A=http://h", "--kv-memory", "1GiB"], "--url measures servers as they run"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(tmp_path / "out", *arguments) == 2
    assert capsys.readouterr().err.startswith(f"fraqtl-bench: {sentence}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flag", "value"), [("--kv-memory", "much"), ("--url", "http://h"), ("--dataset", "mine")])
def test_arguments_that_the_parser_refuses(
    flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(tmp_path, flag, value) == 2
    assert f"argument {flag}" in capsys.readouterr().err


def test_json_is_what_the_schema_says(tmp_path: Path) -> None:
    load(tmp_path, *with_diary(tmp_path))
    found = json.loads((tmp_path / "load.json").read_text())
    assert Report.model_validate(found).model_dump(mode="json") == found
    with pytest.raises(ValueError, match="tokens_per_minute"):
        Report.model_validate({**found, "tokens_per_minute": 1})
