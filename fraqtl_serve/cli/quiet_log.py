"""What a healthy start logs: warnings and errors, without those that say nothing about this server.

vLLM reads its logging from a file that VLLM_LOGGING_CONFIG_PATH names (`quiet_log.json`), in every process. A user who
says how to log (VLLM_LOGGING_LEVEL=INFO, --log-level and the like) gets vLLM's own logging, unfiltered.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

CONFIG = Path(__file__).with_suffix(".json")
PATH = "VLLM_LOGGING_CONFIG_PATH"
VARIABLES = ("VLLM_LOGGING_LEVEL", "VLLM_CONFIGURE_LOGGING", PATH)
FLAGS = ("--log-level", "--log-config-file", "--logging-config", "--disable-access-log-for-endpoints")

# By logger: how a message begins that a healthy CPU server always gives, and why it is no news.
HARMLESS = {
    "vllm.config.vllm": (
        "Enforce eager set",  # we set it
        "Inductor compilation was disabled",  # follows from that
        "Model Runner V2 requires Triton",  # V1 is what a CPU gets
    ),
    "vllm.config.scheduler": ("Using custom scheduler class fraqtl_vllm",),  # ours
    "vllm.platforms.cpu": (
        "Triton is not installed",  # nothing of ours uses it on a CPU
        "Reset SSM cache type",  # of Mamba layers, whether or not the model has any
    ),
    "vllm.v1.worker.cpu_worker": (
        "libtcmalloc is not found in LD_PRELOAD",  # hints
        "libiomp is not found in LD_PRELOAD",
        "CPU backend doesn't allow to use `torch.set_num_threads`",  # vLLM calls it itself
    ),
}
WITHOUT_TRITON = "Failed to import Triton kernels"  # at level ERROR, of layers in MXFP4, whatever the model
HARMLESS_WARNINGS = (
    # vLLM looks into all of torch for Triton kernels, and so touches names that torch warns of.
    "ignore::FutureWarning:vllm.triton_utils.dispatcher",
    # At a stop, of semaphores of the engine, which vLLM kills: the tracker that says so has removed them.
    "ignore::UserWarning:multiprocessing.resource_tracker",
)
FEW_FILES = "Found ulimit of %s"  # vLLM wants 65,535 open files
ENOUGH_FILES = 4096  # for a thousand clients and more


class NoNews(logging.Filter):
    """Lets everything pass but what is known to be harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.has_triton = importlib.util.find_spec("triton") is not None

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        if text.startswith(WITHOUT_TRITON):
            return self.has_triton
        if text.startswith(FEW_FILES) and isinstance(record.args, tuple):
            return int(str(record.args[0])) < ENOUGH_FILES
        return not record.getMessage().startswith(HARMLESS.get(record.name, ("\0",)))


def begin(arguments: Sequence[str]) -> None:
    """Choose the quiet log for this process and those that it starts, unless the user says how to log."""
    flags = {argument.split("=")[0].split(".")[0] for argument in arguments}
    if any(name in os.environ for name in VARIABLES) or flags & set(FLAGS):
        return
    os.environ[PATH] = str(CONFIG)
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), *HARMLESS_WARNINGS]))


def is_chosen() -> bool:
    return os.environ.get(PATH) == str(CONFIG)


def settle(args: Namespace) -> None:
    """Once all is parsed: a file of flags (--config) may say how to log, too."""
    if not is_chosen():
        return
    given = (
        getattr(args, "log_level", None),
        getattr(args, "disable_access_log_for_endpoints", None),
        getattr(args, "log_config_file", str(CONFIG)) not in (None, str(CONFIG)),
    )
    if any(given):
        del os.environ[PATH]
        if getattr(args, "log_config_file", None) == str(CONFIG):
            args.log_config_file = None
