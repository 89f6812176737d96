from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from fraqtl_serve.reports.history import History


def test_the_oldest_samples_make_room() -> None:
    history = History(size=2)
    for when in (1.0, 2.0, 3.0004):
        history.add(when, when / 10)
    kept = history.later_than(0)
    assert (kept.time, kept.pool_use) == ([2.0, 3.0], [0.2, 0.30004])
    assert history.later_than(kept.time[-1]).time == []  # what a client knows isn't sent again


def test_sampling_leaves_out_what_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("fraqtl_serve.reports.history.logger.warning", lambda text, **_: warnings.append(text))
    reads = iter([0.5, None, OSError("gone"), OSError("gone"), 0.25])

    def read() -> float | None:
        value = next(reads)
        if isinstance(value, Exception):
            raise value
        return value

    history = History()

    async def sample() -> None:
        task = asyncio.create_task(history.keep(read, seconds=0))
        while len(history.later_than(0).time) < 2:
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(sample())
    assert history.later_than(0).pool_use == [0.5, 0.25]
    assert len(warnings) == 1  # once, not every two seconds
