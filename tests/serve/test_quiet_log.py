"""Which messages a start keeps to itself, and that a user who says how to log is obeyed."""

from __future__ import annotations

import json
import logging
import logging.config
import os
from argparse import Namespace
from pathlib import Path

import pytest

from fraqtl_serve.cli import quiet_log

VLLM = Path(__import__("vllm").__file__).parent


@pytest.fixture(autouse=True)
def nobody_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "")
    for name in quiet_log.VARIABLES:
        monkeypatch.setenv(name, "")  # so that what `begin` sets is taken back
        monkeypatch.delenv(name)


def record(name: str, level: int, message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord(name, level, "file.py", 1, message, args, None)


def test_what_is_no_news() -> None:
    passes = quiet_log.NoNews().filter
    assert not passes(record("vllm.config.vllm", logging.WARNING, "Enforce eager set, disabling torch.compile, ..."))
    assert not passes(
        record("vllm.v1.worker.cpu_worker", logging.WARNING, "%s is not found in LD_PRELOAD. For", "libtcmalloc")
    )
    assert passes(record("vllm.config.vllm", logging.WARNING, "Chunked prefill is off"))
    assert passes(record("vllm.other", logging.WARNING, "Enforce eager set, disabling torch.compile, ..."))
    assert passes(record("vllm.v1.engine.core", logging.ERROR, "EngineCore encountered a fatal error."))


def test_a_scheduler_of_somebody_else_is_news() -> None:
    passes = quiet_log.NoNews().filter
    message = "Using custom scheduler class %s. This scheduler interface is not public"
    assert passes(record("vllm.config.scheduler", logging.WARNING, message, "mine.Scheduler"))
    ours = "fraqtl_vllm.accounting.scheduler.accounting_scheduler"
    assert not passes(record("vllm.config.scheduler", logging.WARNING, message, ours))


@pytest.mark.parametrize(("has_triton", "passes"), [(True, True), (False, False)])
def test_triton_kernels_are_missed_only_where_triton_is(has_triton: bool, passes: bool) -> None:
    no_news = quiet_log.NoNews()
    no_news.has_triton = has_triton
    text = "Failed to import Triton kernels. Please make sure your triton version is compatible. Error: %s"
    assert no_news.filter(record("vllm.model_executor.layers.x", logging.ERROR, text, "No module")) is passes


@pytest.mark.parametrize(("files", "passes"), [(1024, True), (20_000, False)])
def test_few_open_files_are_news(files: int, passes: bool) -> None:
    text = "Found ulimit of %s and failed to automatically increase with error %s. This can cause fd limit errors"
    assert quiet_log.NoNews().filter(record("vllm.utils", logging.WARNING, text, files, "limit")) is passes


@pytest.mark.parametrize("name", quiet_log.HARMLESS)
def test_vllm_still_says_these(name: str) -> None:
    """Else the list holds what is said no more, or under another name."""
    source = (VLLM / (name.removeprefix("vllm.").replace(".", "/") + ".py")).read_text()
    flat = "".join(part.strip().strip('"') if '"' in part else part for part in source.splitlines())
    filled_in = ("libtcmalloc", "libiomp", "fraqtl_vllm")
    for text in quiet_log.HARMLESS[name]:
        words = " ".join(word for word in text.split() if word not in filled_in)
        assert words in flat, text


def test_quiet_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_log.begin(["org/model", "--port", "8001"])
    assert quiet_log.is_chosen()
    assert os.environ["PYTHONWARNINGS"] == ",".join(quiet_log.HARMLESS_WARNINGS)


@pytest.mark.parametrize("name", quiet_log.VARIABLES)
def test_a_variable_of_vllm_wins(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    quiet_log.begin([])
    assert not quiet_log.is_chosen()


@pytest.mark.parametrize(
    "flag",
    ["--log-level=DEBUG", "--log-config-file", "--logging-config.formatter", "--disable-access-log-for-endpoints"],
)
def test_a_flag_of_vllm_wins(flag: str) -> None:
    quiet_log.begin(["org/model", flag, "x"])
    assert not quiet_log.is_chosen()


def test_a_file_of_flags_wins() -> None:
    quiet_log.begin([])
    args = Namespace(log_level="INFO", log_config_file=str(quiet_log.CONFIG))
    quiet_log.settle(args)
    assert not quiet_log.is_chosen()
    assert args.log_config_file is None


def test_it_stays_chosen() -> None:
    quiet_log.begin([])
    quiet_log.settle(Namespace(log_config_file=None, disable_access_log_for_endpoints=None))
    assert quiet_log.is_chosen()


def test_the_file_is_a_logging_configuration() -> None:
    config = json.loads(quiet_log.CONFIG.read_text())
    logging.config.DictConfigurator(config)  # names every formatter, filter and handler that it has
    assert config["loggers"]["vllm"]["level"] == "WARNING"
    for part in ("handlers", "formatters"):
        assert config[part]["vllm"]
    assert config["handlers"]["vllm"]["filters"] == ["no_news"]
