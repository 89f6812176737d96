"""Launch shapes: of decoding by head size, rows and form. What was measured on a GPU goes before, see `tuned.py`."""

from __future__ import annotations

from dataclasses import dataclass

from fraqtl_kernels.pages import PageLayout


@dataclass(frozen=True)
class Tuning:
    """Launch shape of a kernel: keys a tile, warps a program, pipeline stages, cap on registers a thread.

    Of decoding only: programs_per_sm, how many are wanted on each multiprocessor at once; min_tiles, the fewest tiles
    that are worth a program of their own; transposed, whether keys are the rows of products and queries the columns
    (`kernels/transposed.py`); half, whether that form computes in fp16 also for bf16 models.
    """

    tile: int
    warps: int
    stages: int
    registers: int | None = None
    programs_per_sm: int = 2
    min_tiles: int = 2
    transposed: bool = False
    half: bool = False

    @property
    def options(self) -> dict[str, int]:
        """Launch options of Triton."""
        return {"num_warps": self.warps} | ({"maxnreg": self.registers} if self.registers else {})


def decode_tuning(layout: PageLayout, rows: int) -> Tuning:
    """Launch shape by head size and rows: chosen so that no variant of head size 64 or 128 spills (see `aot.py`).

    Block numbers and codes are two levels of loads, which share the stages: 4 give one buffer of codes, 5 give two, 7
    give three.
    """
    if rows <= 16 and layout.format.is_quantized:
        # A cap that two programs leave room for; without one ptxas spills for the sake of a third.
        tile = 128 if layout.head_size <= 128 else 64
        if layout.format.v.groups > 1:  # a sum of weights for each group
            tile = 32 if layout.head_size <= 64 else 64
        return Tuning(tile, warps=4, stages=5, registers=255)
    tile = 64 if layout.head_size <= 128 and rows <= 32 else 32
    if rows > 16 and layout.head_size <= 64:
        tile = 32
    return Tuning(tile=tile, warps=4 if rows <= 32 else 8, stages=5)


def transposed_tuning(layout: PageLayout, columns: int, *, half: bool = False) -> Tuning:
    """Launch shape with queries as columns: no variant of head size 64 or 128 spills (see `aot.py`).

    One warp a program, where its registers hold the output, needs no barrier that waits. Eight warps fill the registers
    of a multiprocessor.
    """
    large = layout.head_size > 128 or min(layout.format.k.bits, layout.format.v.bits) >= 8
    warps = 1 if columns <= 8 else 2 if columns <= 32 else 4
    tile = 32 if large or columns > 16 else 64
    if layout.head_size not in (64, 128) and 3 in (layout.format.k.bits, layout.format.v.bits):
        tile = 16  # with more ptxas spills
    return Tuning(tile, warps, 5, 255, 8 // warps, min_tiles=256 // tile, transposed=True, half=half)
