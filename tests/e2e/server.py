"""The live servers of the end-to-end tests are started by the code that the benchmarks use."""

from functools import partial

from fraqtl_bench.server import (
    Launch,
    Server,
    free_port,
    group_members,
    popen,
    remove_log,
    running,
    start,
    stop,
    wait_until_ready,
)
from tests.e2e import forks

__all__ = [
    "Launch",
    "Server",
    "forked",
    "free_port",
    "group_members",
    "popen",
    "remove_log",
    "running",
    "start",
    "stop",
    "wait_until_ready",
]

# As `running`, for tests that don't look at a server's start and end: forked, it doesn't import vLLM again.
# Not where memory is measured: a forked process comes to own what it shared. Not with several API servers: Prometheus'
# client asks when it is imported whether it has to share its numbers.
forked = partial(running, launch=forks.launch)
