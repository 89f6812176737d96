"""What stands before the engine: front ends that our server can't be on, and how long connections are kept."""

from __future__ import annotations

import os
from argparse import Namespace

from fraqtl_kernels.errors import ConfigError

RUST = "VLLM_USE_RUST_FRONTEND"
KEEP_ALIVE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
IDLE_SECONDS = 75


def check_front_end(args: Namespace) -> None:
    """Raises ConfigError where `args` or the environment put something else before the engine than vLLM's own server.

    Its plugins are how ours comes in. Packed blocks alone need none: plain `vllm serve` has them with any front end.
    """
    packed_only = "for packed blocks alone use vllm serve --attention-backend FRAQTL"
    if os.environ.get(RUST, "0") != "0":
        raise ConfigError(
            f"{RUST}={os.environ[RUST]} takes vLLM's Python server away, and with it reports, metrics and key guard: "
            f"unset it, or {packed_only}"
        )
    if getattr(args, "grpc", False) or getattr(args, "grpc_port", None) is not None:
        raise ConfigError(
            "--grpc and --grpc-port start servers without reports, metrics and key guard: "
            f"leave them out, or {packed_only}"
        )


def keep_idle_connections() -> None:
    """Keeps a connection open for longer than a client that asks again does, unless the environment says how long.

    vLLM closes it after 5 seconds, and httpx (openai, litellm) uses one again for up to 5 seconds: a request that is
    sent while the server closes has no answer. Proxies keep theirs for a minute.
    """
    os.environ.setdefault(KEEP_ALIVE, str(IDLE_SECONDS))
