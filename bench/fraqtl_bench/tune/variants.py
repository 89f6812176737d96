"""What is timed: launch shapes of the decode kernel, and a few things to compare the best of them with."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from fraqtl_bench.kernels.arms import UnavailableError

if TYPE_CHECKING:  # at run time only where Triton is
    from fraqtl_kernels.gpu.tuning import Tuning

DTYPES = ("bf16", "fp16")
# By the compiled instruction counts: the control, two and three load buffers, programs of one and two warps, and the
# transposed form, also computing in fp16.
FIRST = (
    "tile=128,warps=4,stages=4,registers=255,programs_per_sm=2",
    "tile=128,warps=4,stages=5,registers=255,programs_per_sm=2",
    "tile=128,warps=4,stages=7,registers=255,programs_per_sm=2",
    "tile=32,warps=1,stages=7,registers=255,programs_per_sm=8",
    "tile=32,warps=1,stages=5,registers=255,programs_per_sm=8",
    "tile=64,warps=2,stages=7,registers=255,programs_per_sm=4",
    "tile=64,warps=2,stages=5,registers=255,programs_per_sm=4",
    "tile=128,warps=4,stages=5,registers=168,programs_per_sm=3",
    "tile=256,warps=4,stages=5,registers=255,programs_per_sm=2",
    "tile=64,warps=1,stages=5,registers=255,programs_per_sm=8,min_tiles=4,transposed=1",
    "tile=64,warps=1,stages=5,registers=255,programs_per_sm=8,min_tiles=4,transposed=1,half=1",
    "tile=32,warps=1,stages=5,registers=255,programs_per_sm=8,transposed=1",
    "tile=32,warps=1,stages=5,registers=255,programs_per_sm=8,transposed=1,half=1",
)


@dataclass(frozen=True)
class Variant:
    """launch: fields of `Tuning` by name. block_size, calibrated, dtype: of the pages that are read."""

    launch: tuple[tuple[str, int], ...]
    block_size: int = 16
    calibrated: bool = True
    dtype: str = "bf16"

    @classmethod
    def parse(cls, text: str) -> Variant:
        """`tile=128,warps=4,stages=5,block_size=64,calibrated=0,dtype=fp16`."""
        try:
            given = dict(part.split("=") for part in text.split(","))
            dtype = given.pop("dtype", "bf16")
            numbers = {name: int(value) for name, value in given.items()}
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text}: give name=number, ...") from error
        if dtype not in DTYPES:
            raise argparse.ArgumentTypeError(f"{text}: dtype is one of {', '.join(DTYPES)}")
        block_size, calibrated = numbers.pop("block_size", 16), bool(numbers.pop("calibrated", 1))
        return cls(tuple(numbers.items()), block_size, calibrated, dtype)

    @property
    def name(self) -> str:
        """As `parse` takes it."""
        parts = [f"{name}={value}" for name, value in self.launch]
        parts += [f"block_size={self.block_size}"] * (self.block_size != 16)
        parts += ["calibrated=0"] * (not self.calibrated) + [f"dtype={self.dtype}"] * (self.dtype != "bf16")
        return ",".join(parts)

    @property
    def is_served(self) -> bool:
        """Whether it reads what a server stores by default, so that its launch shape may be chosen."""
        return self == Variant(self.launch)

    def tuning(self) -> Tuning:
        """Raises UnavailableError for what the launcher doesn't take."""
        from fraqtl_kernels.gpu.tuning import Tuning

        known = {f.name: f.default for f in fields(Tuning)}
        if unknown := [name for name, _ in self.launch if name not in known]:
            raise UnavailableError(f"the launcher takes no {' or '.join(unknown)}: choose of {', '.join(known)}")
        # Compile-time flags: 1 would be another constant than True
        given: dict[str, Any] = {n: bool(value) if isinstance(known[n], bool) else value for n, value in self.launch}
        return Tuning(**given)

    def with_launch(self, **changes: int) -> Variant:
        return replace(self, launch=tuple((dict(self.launch) | changes).items()))


def second(best: Variant) -> Iterator[Variant]:
    """What is tried on top of the best of the first."""
    yield best.with_launch(min_tiles=1)
    yield best.with_launch(min_tiles=4)
    yield replace(best, block_size=64)
    yield replace(best, calibrated=False)
    yield replace(best, dtype="fp16")
