"""Timers: seconds of prepared calls, on fresh data, and the speed of a large copy."""

from __future__ import annotations

import statistics
import time
from typing import Any, Protocol

import torch

from fraqtl_bench.kernels.arms import Prepared

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache


class Timer(Protocol):
    def ready(self, prepared: Prepared) -> Any:
        """Warm up; what `time` takes."""

    def time(self, ready: Any) -> Any:
        """One call; what `seconds` takes."""

    def seconds(self, timed: list[Any]) -> list[float]:
        """All calls of an arm, once they are done."""


class CpuTimer:
    """Wall-clock time."""

    def ready(self, prepared: Prepared) -> Prepared:
        prepared.call()
        return prepared

    def time(self, ready: Prepared) -> float:
        start = time.perf_counter()
        ready.call()
        return time.perf_counter() - start

    def seconds(self, timed: list[float]) -> list[float]:
        return timed


class Flush:
    """Pushes everything out of a cache by reading more than it holds.

    What writing would leave there, the call that is timed afterwards would have to write back: 18 % of a call that
    reads 4-bit codes.
    """

    def __init__(self, device: str, size: int = FLUSH_BYTES) -> None:
        self.buffer = torch.zeros(size // 4, device=device)
        self.total = torch.zeros((), device=device)

    def __call__(self) -> None:
        torch.sum(self.buffer, 0, out=self.total)


class CudaTimer:
    """CUDA graphs between events, with the L2 cache read full of something else before each replay."""

    def __init__(self) -> None:
        self.flush = Flush("cuda")

    def ready(self, prepared: Prepared) -> tuple[torch.cuda.CUDAGraph, Prepared]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                _refresh(prepared)
                prepared.call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        _refresh(prepared)
        with torch.cuda.graph(graph):
            prepared.call()
        torch.cuda.synchronize()
        return graph, prepared

    def time(self, ready: tuple[torch.cuda.CUDAGraph, Prepared]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        graph, prepared = ready
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        _refresh(prepared)
        start.record()
        graph.replay()
        end.record()
        return start, end

    def seconds(self, timed: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in timed]


def _refresh(prepared: Prepared) -> None:
    if prepared.refresh is not None:
        prepared.refresh()


def make_timer(device: str) -> Timer:
    return CudaTimer() if device == "cuda" else CpuTimer()


def copy_ceiling(device: str) -> float:
    """Bytes a second of a large torch copy, read and write counted; median of several."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    prepared = Prepared(lambda: target.copy_(source), target, 2 * source.numel(), None)
    timer = make_timer(device)
    ready = timer.ready(prepared)
    return prepared.bytes / statistics.median(timer.seconds([timer.time(ready) for _ in range(9)]))
