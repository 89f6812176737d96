"""Codecs that keep the newest tokens in another way than the rest.

What a query attends then depends on how far it stands behind a key. One forward pass over a text in which every key has
one state can't show that. So both states of every key are made, `is_new` says which one a query finds, and
`attention.attending` has each query attend that one: just what decoding the text token by token would attend.
Decoding itself has one query at a time; what it finds is in `History`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fraqtl_bench.quality.codecs import Codec, LayerSample
from fraqtl_bench.quality.grids import Kept


@dataclass(frozen=True)
class Recent(Codec):
    """`new` for the newest tokens, at most `window`, and `old` for the rest. Both have the constants of `old`."""

    old: Codec
    new: Codec
    window: int
    by_token: ClassVar[bool] = False
    """Whether a token's states depend on no other token."""

    @abstractmethod
    def is_new(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query at a position finds the key at another in its new state; both broadcast."""

    @abstractmethod
    def counts(self, tokens: int) -> tuple[int, int]:
        """How many tokens are kept as `old`, the first ones, and as `new`, the last ones, behind so many tokens."""

    def states(self, x: Tensor, constants: Kept) -> tuple[Tensor, Tensor]:
        """x (..., H, T, D) as `old` and as `new`, in x's dtype. Tokens that nobody finds in a state may be anything."""
        return self.old.round_trip(x, constants), self.new.round_trip(x, constants)

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        return self.old.fit(sample, stream)

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        """What is kept behind the last token of x."""
        tokens = x.shape[-2]
        old, new = self.counts(tokens)
        parts = {"old": self.old.encode(x[..., :old, :], constants)}
        parts["new"] = self.new.encode(x[..., tokens - new :, :], constants)
        return {f"{name} {field}": kept for name, part in parts.items() for field, kept in part.items()}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        old, new = (
            codec.decode({k.split()[1]: v for k, v in kept.items() if k.startswith(name)}, constants, size)
            for name, codec in (("old", self.old), ("new", self.new))
        )
        return torch.cat([old[..., : self._first_new(old.shape[-2], new.shape[-2]), :], new], -2)

    def _first_new(self, old: int, new: int) -> int:
        """The first of the new tokens, from the numbers that are kept."""
        return old

    def vector_bits(self, size: int) -> int:
        """In a long sequence, where the window counts for nothing."""
        return self.old.vector_bits(size)

    def constant_bits(self, size: int, constants: Kept) -> int:
        return self.old.constant_bits(size, constants)

    def shared_token_bits(self, size: int) -> int:
        return self.old.shared_token_bits(size)

    def shared_constant_bits(self, size: int, constants: Kept) -> int:
        return self.old.shared_constant_bits(size, constants)

    def sequence_bits(self, size: int, heads: int, tokens: int) -> int:
        old, new = self.counts(tokens)
        return old * self.old.token_bits(size, heads) + new * self.new.token_bits(size, heads)

    def check(self, size: int) -> None:
        self.old.check(size)
        self.new.check(size)


class Buffer(Recent):
    """Tokens gather as `new`; a full window of them moves to `old` at once, behind the step that filled it."""

    def is_new(self, query: Tensor, key: Tensor) -> Tensor:
        return key >= query // self.window * self.window

    def counts(self, tokens: int) -> tuple[int, int]:
        new = tokens % self.window
        return tokens - new, new

    def states(self, x: Tensor, constants: Kept) -> tuple[Tensor, Tensor]:
        whole, _ = self.counts(x.shape[-2])
        old = self.old.round_trip(x[..., :whole, :], constants)
        return torch.cat([old, x[..., whole:, :]], -2), self.new.round_trip(x, constants)


class Queue(Recent):
    """The newest `window` tokens are `new`; the oldest of them moves to `old` behind the step that brought another."""

    def is_new(self, query: Tensor, key: Tensor) -> Tensor:
        return query - key <= self.window

    def counts(self, tokens: int) -> tuple[int, int]:
        new = min(tokens, self.window)
        return tokens - new, new


class Ring(Recent):
    """All tokens are kept as `old`, and the newest `window`, the query's own among them, as `new` beside that."""

    def is_new(self, query: Tensor, key: Tensor) -> Tensor:
        return query - key < self.window

    def counts(self, tokens: int) -> tuple[int, int]:
        return tokens, min(tokens, self.window)

    def _first_new(self, old: int, new: int) -> int:
        return old - new


class History:
    """The tokens of one sequence that came to a codec so far."""

    def __init__(self, codec: Recent, constants: Kept) -> None:
        self.codec, self.constants = codec, constants
        self._came: list[Tensor] = []
        self._states: tuple[Tensor, Tensor] | None = None

    def append(self, x: Tensor) -> None:
        """x: (..., H, T, D), behind what came before."""
        self._came.append(x)

    def found(self) -> Tensor:
        """(..., H, T, D): all tokens, each in the state in which the query of the last one finds it."""
        old, new = self._made()
        tokens = torch.arange(old.shape[-2], device=old.device)
        return torch.where(self.codec.is_new(tokens[-1], tokens)[:, None], new, old)

    def _made(self) -> tuple[Tensor, Tensor]:
        if not self.codec.by_token:
            return self.codec.states(torch.cat(self._came, -2), self.constants)
        if self._came:
            fresh = self.codec.states(torch.cat(self._came, -2), self.constants)
            before = self._states or tuple(x[..., :0, :] for x in fresh)
            old, new = (torch.cat(pair, -2) for pair in zip(before, fresh, strict=True))
            self._states, self._came = (old, new), []
        assert self._states is not None
        return self._states
