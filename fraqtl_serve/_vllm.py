"""Every vLLM import of this package that is not a documented extension point.

`fraqtl_serve.cli.serve` checks the version before: names move between versions.
"""

from __future__ import annotations

from importlib import import_module

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logger import configure_logging_from_args, init_logger
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import FinishReason
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import get_prometheus_registry

from fraqtl_vllm._vllm import VERSION, check_version

check_version()
cli_env_setup = import_module(
    "vllm.entrypoints.serve.utils.api_utils" if VERSION == "0.32" else "vllm.entrypoints.common.startup"
).cli_env_setup

__all__ = [
    "BeamSearchOnlineMixin",
    "EngineDeadError",
    "ErrorResponse",
    "FinishReason",
    "FlexibleArgumentParser",
    "GracefulHTTPError",
    "ServeSubcommand",
    "VLLMValidationError",
    "cli_env_setup",
    "configure_logging_from_args",
    "current_platform",
    "engine_utils",
    "get_prometheus_registry",
    "init_logger",
]
