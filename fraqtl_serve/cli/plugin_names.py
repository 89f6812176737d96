"""VLLM_PLUGINS, set before vLLM is imported."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

PLUGIN_GROUPS = ("general", "platform", "stat_logger", "io_processor")


def allow_plugin() -> None:
    """Let vLLM load our HTTP routes, which it does only for names in VLLM_PLUGINS.

    That variable also filters every other group of plugins, so where it was unset all that are
    installed are named, as they would have been loaded without it.
    """
    given = os.environ.get("VLLM_PLUGINS")
    if given is None:
        names = {p.name for group in PLUGIN_GROUPS for p in entry_points(group=f"vllm.{group}_plugins")}
    else:
        names = {name for name in given.split(",") if name}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {"fraqtl"}))
