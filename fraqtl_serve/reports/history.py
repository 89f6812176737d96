"""Pool use over the last hour, kept by every API server process for the page.

A sample is vLLM's own gauge at one moment: what comes and goes between two samples isn't seen.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from pydantic import BaseModel, Field

from fraqtl_serve._vllm import init_logger

SECONDS = 2.0
SIZE = 1800

logger = init_logger("vllm.fraqtl.history")


class PoolHistory(BaseModel):
    """Samples, the oldest first: `time` and `pool_use` are of one length."""

    seconds: float = Field(description="time between two samples")
    time: list[float] = Field(description="when each sample was taken, in seconds since 1970")
    pool_use: list[float] = Field(description="share of the pool's blocks in use then, 0 to 1")


class History:
    """A ring of samples: the oldest makes room for the newest."""

    def __init__(self, size: int = SIZE) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=size)

    def add(self, when: float, pool_use: float) -> None:
        self._samples.append((round(when, 3), pool_use))

    def later_than(self, when: float) -> PoolHistory:
        samples = [sample for sample in self._samples if sample[0] > when]
        return PoolHistory(seconds=SECONDS, time=[t for t, _ in samples], pool_use=[use for _, use in samples])

    async def keep(self, read: Callable[[], float | None], seconds: float = SECONDS) -> None:
        """Sample `read()` for ever; a sample that can't be had is left out."""
        warned = False
        while True:
            try:
                use = read()
            except Exception:  # a gap in a curve is no reason to end, whatever it was
                use = None
                if not warned:
                    logger.warning("the use of the KV pool can't be read now", exc_info=True)
                warned = True
            if use is not None:
                self.add(time.time(), use)
            await asyncio.sleep(seconds)
