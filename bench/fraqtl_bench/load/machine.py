"""How much of the machine other programs took during a run: a comparison that they disturbed is none."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

from fraqtl_bench.server import Server, group_members

STAT = Path("/proc/stat")
BUSY = (0, 1, 2, 5, 6)  # user, nice, system, irq, softirq: proc(5)


class Watch:
    """From its making on. Knows nothing of a server that somebody else started: it may be on another machine."""

    def __init__(self, server: Server | None) -> None:
        self.server = server if STAT.exists() else None
        self.start, self.before = time.monotonic(), self._others()

    def cores(self) -> float | None:
        """Cores that neither the server nor this command and its client kept busy, on average."""
        after, seconds = self._others(), time.monotonic() - self.start
        if after is None or self.before is None:
            return None
        return max(0.0, (after - self.before) / seconds)

    def _others(self) -> float | None:
        """Seconds of CPU so far, all cores together."""
        if self.server is None:
            return None
        ours = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return _busy() - _group(self.server) - sum(usage.ru_utime + usage.ru_stime for usage in ours)


def _busy() -> float:
    ticks = STAT.read_text().splitlines()[0].split()[1:]
    return sum(int(ticks[i]) for i in BUSY) / os.sysconf("SC_CLK_TCK")


def _group(server: Server) -> float:
    """Of a server's processes, and of those children that they have seen end."""
    ticks = 0
    for pid in group_members(server):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has just ended
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")
