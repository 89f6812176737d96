from __future__ import annotations

import argparse
import os
from argparse import Namespace

import pytest

from fraqtl_kernels.errors import ConfigError
from fraqtl_serve.cli.front_end import KEEP_ALIVE, check_front_end, keep_idle_connections
from fraqtl_serve.cli.serve import build_parser, configure

NAME = "VLLM_USE_RUST_FRONTEND"


@pytest.mark.parametrize("value", ["1", "true", "2"])
def test_rust_server_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(NAME, value)
    args = build_parser().parse_args(["serve", "org/model"])
    with pytest.raises(ConfigError) as error:
        configure(args)
    assert str(error.value) == (
        f"VLLM_USE_RUST_FRONTEND={value} takes vLLM's Python server away, and with it reports, metrics and key guard: "
        "unset it, or for packed blocks alone use vllm serve --attention-backend FRAQTL"
    )


@pytest.mark.parametrize("arguments", [["--grpc"], ["--grpc-port", "5051"]])
def test_grpc_servers_are_refused(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.delenv(NAME, raising=False)
    args = build_parser().parse_args(["serve", "org/model", *arguments])
    with pytest.raises(ConfigError, match=r"^--grpc and --grpc-port start servers without reports"):
        configure(args)


@pytest.mark.parametrize("value", [None, "0"])
def test_vllms_own_server_is_not(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv(NAME, raising=False)
    else:
        monkeypatch.setenv(NAME, value)
    check_front_end(Namespace(grpc=False, grpc_port=None))


def test_vllm_has_these_switches() -> None:
    from vllm import envs

    assert NAME in envs.environment_variables
    args: argparse.Namespace = build_parser().parse_args(["serve", "org/model"])
    assert (args.grpc, args.grpc_port) == (False, None)


@pytest.mark.parametrize(("given", "kept"), [(None, "75"), ("5", "5")])
def test_connections_are_kept_as_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str
) -> None:
    from vllm import envs

    monkeypatch.setenv(KEEP_ALIVE, given or "")  # so that what is set here is taken back
    if given is None:
        monkeypatch.delenv(KEEP_ALIVE)
    keep_idle_connections()
    assert os.environ[KEEP_ALIVE] == kept
    assert int(kept) == envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE
