"""What is compared: an arm stores a set of inputs its own way and says how to attend over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from fraqtl_bench.kernels.shapes import Inputs, exact_attention, relative_error


class UnavailableError(Exception):
    """An arm that can't run here; the text says why."""


@dataclass
class Prepared:
    """One set of inputs, stored by one arm.

    call: attends, into `output`, (batch, query heads, D). bytes: what a call must read of the cache. stored: what the
    cache of the first request holds, (key, value), (tokens, KV heads, D), or None where nobody can tell.
    refresh: to be called before each call, untimed; for what an engine computes once a step for all layers.
    write: stores all keys and values once more.
    """

    call: Callable[[], object]
    output: Tensor
    bytes: int
    stored: Callable[[], tuple[Tensor, Tensor]] | None
    refresh: Callable[[], object] | None = None
    write: Callable[[], object] | None = None

    def writing(self, inputs: Inputs) -> Prepared:
        """The same with its write in the place of its attention. Raises UnavailableError if it doesn't tell."""
        if self.write is None:
            raise UnavailableError("its write can't be called by itself")
        read = inputs.key.nbytes + inputs.value.nbytes
        return replace(self, call=self.write, bytes=read + self.bytes, refresh=None)


class Arm(Protocol):
    """A plugin. name: unique. foreign: not ours, so that whatever goes wrong in it makes it unavailable."""

    @property
    def name(self) -> str: ...

    @property
    def foreign(self) -> bool: ...

    def prepare(self, inputs: Inputs) -> Prepared:
        """Raises UnavailableError where the arm can't run."""


def errors_of(prepared: Prepared, inputs: Inputs, truth: Tensor | None = None) -> dict[str, float | None]:
    """Relative errors of the first request's output against float64, computed where the inputs lie.

    total_error: against attention over the inputs, `truth` if the caller has it. quantisation_error: of exact attention
    over what the cache holds. kernel_error: the output against that, so what arithmetic alone costs, rounding of the
    output included.
    """
    prepared.call()
    output = prepared.output[0]
    if truth is None:
        truth = inputs.truth()
    found: dict[str, float | None] = {"total_error": relative_error(output, truth)}
    if prepared.stored is None:
        return found | {"kernel_error": None, "quantisation_error": None}
    key, value = prepared.stored()
    stored = exact_attention(inputs.query[0], key, value, inputs.scale)
    return found | {
        "kernel_error": relative_error(output, stored),
        "quantisation_error": relative_error(stored, truth),
    }
