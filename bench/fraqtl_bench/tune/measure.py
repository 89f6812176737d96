"""Times variants and baselines on one shape at a time, all on the same inputs and in rotation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from fraqtl_bench.kernels.arms import Arm, Prepared, UnavailableError, errors_of
from fraqtl_bench.kernels.cuda_arms import Pages
from fraqtl_bench.kernels.packed import sample_constants
from fraqtl_bench.kernels.shapes import Inputs, Shape
from fraqtl_bench.kernels.sweep import prepare, summarize
from fraqtl_bench.kernels.timing import Timer
from fraqtl_bench.tune.variants import Variant
from fraqtl_kernels.constants import IDENTITY
from fraqtl_kernels.formats import KVFormat

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Line = dict[str, Any]
Sink = Callable[[Line], None]


@dataclass(frozen=True)
class Baseline:
    """Another arm of `fraqtl-bench kernels`, with pages of some size."""

    arm: Arm
    block_size: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}@{self.block_size}"


@dataclass
class OneShape:
    """The inputs of a shape and their pages, made when a subject first needs them."""

    shape: Shape
    format: KVFormat
    device: torch.device
    inputs: Callable[[int, str], Inputs] = field(init=False)
    pages: Callable[[int, str, bool], Pages] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = lru_cache(self._inputs)
        self.pages = lru_cache(self._pages)

    def _inputs(self, block_size: int, dtype: str) -> Inputs:
        return Inputs.random(self.shape, block_size, 0, self.device, TORCH_DTYPES[dtype])

    def _pages(self, block_size: int, dtype: str, calibrated: bool) -> Pages:
        shape = self.shape
        constants = IDENTITY
        if calibrated:
            constants = sample_constants(self.format, shape.head_size, shape.kv_heads, shape.query_heads)
        return Pages.store(self.format, self.inputs(block_size, dtype), constants)

    def prepare(self, subject: Variant | Baseline) -> tuple[Prepared, Inputs]:
        if isinstance(subject, Baseline):
            inputs = self.inputs(subject.block_size, "bf16")
            return prepare(subject.arm, inputs), inputs
        tuning = subject.tuning()
        pages = self.pages(subject.block_size, subject.dtype, subject.calibrated)
        return pages.prepare(tuning), pages.inputs


@dataclass(frozen=True)
class Bench:
    """What all shapes share. ceiling: of a copy, bytes a second. end: on `time.monotonic`, no subject starts later."""

    timer: Timer
    format: KVFormat
    device: torch.device
    ceiling: float
    repeats: int
    end: float
    sink: Sink

    def measure(self, shape: Shape, subjects: Sequence[Variant | Baseline]) -> list[Line]:
        """One line a subject: its time, its errors, or why there is none. Each goes to the sink."""
        place, lines, ready = OneShape(shape, self.format, self.device), [], {}
        for subject in subjects:
            line = self._describe(shape, subject)
            try:
                if time.monotonic() > self.end:
                    raise UnavailableError("no time left")
                prepared, inputs = place.prepare(subject)
                line |= {"bytes": prepared.bytes, **errors_of(prepared, inputs)}
                ready[subject] = self.timer.ready(prepared)
            except Exception as error:  # one that doesn't compile must not end the others
                text = str(error) if isinstance(error, UnavailableError) else f"{type(error).__name__}: {error}"
                line["skipped"] = text[:500]
            lines.append(line)
        timed: dict[Any, list[Any]] = {subject: [] for subject in ready}
        for _ in range(self.repeats):
            for subject, prepared in ready.items():
                timed[subject].append(self.timer.time(prepared))
        for subject, line in zip(subjects, lines, strict=True):
            if subject in timed:
                line |= summarize(self.timer.seconds(timed[subject]), line["bytes"], self.ceiling)
            self.sink(line)
        return lines

    def _describe(self, shape: Shape, subject: Variant | Baseline) -> Line:
        line: Line = {"kind": "baseline", "shape": str(shape), "name": subject.name}
        if isinstance(subject, Variant):
            served = {"served": subject.is_served, "launch": dict(subject.launch)}
            line |= {"kind": "variant", "format": self.format.name, **served}
        return line


def sweep(bench: Bench, shapes: Sequence[Shape], subjects: Sequence[Variant | Baseline]) -> Iterator[Line]:
    for shape in shapes:
        yield from bench.measure(shape, subjects)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
