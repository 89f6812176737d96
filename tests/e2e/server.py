"""The live servers of the end-to-end tests are started by the code that the benchmarks use."""

from fraqtl_bench.server import (
    Server,
    free_port,
    group_members,
    remove_log,
    running,
    start,
    stop,
    wait_until_ready,
)

__all__ = ["Server", "free_port", "group_members", "remove_log", "running", "start", "stop", "wait_until_ready"]
