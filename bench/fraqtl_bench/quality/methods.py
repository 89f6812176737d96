"""Methods of keeping a cache small, by name, and their matched budgets.

    NAME[@BASIS][:SIDE]      int4-channel   int4-token@hadamard   rank32:k   rank64x8@random   k4v4

- `intB-channel`, `intB-token`: B bits on every dimension, symmetric, see `grids`; basis identity
- `rankR`: R coordinates in fp16; basis pca
- `rankRxC`: R coordinates at C bits, static scales per channel; basis pca
- a format of the server; it has its own basis. FORMAT+residual: with what free slots of its newest block hold
- a rival of `rivals`, under its own name: q4_0, kivi-2, turboquant-4bit
- SIDE k or v: only the keys or only the values, the others stay fp16

At budget b (bits per dimension, scales and constants left out) rank b·D/16 at 16 bits and rank b·D/C at C bits
take what b bits on all D dimensions take.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fraqtl_bench.quality.bases import BASES
from fraqtl_bench.quality.codecs import Codec, Coordinates, Exact
from fraqtl_bench.quality.grids import FP16_BITS, Float16, Symmetric
from fraqtl_bench.quality.rivals import RIVALS, Rival
from fraqtl_bench.quality.served import served_stream
from fraqtl_bench.quality.server_codec import ServerStream
from fraqtl_kernels.errors import ConfigError, one_of
from fraqtl_kernels.formats import CPU_HEAD_SIZES, FORMATS, KVFormat

BASELINE = "fp16"
BUDGETS = (2, 3, 4, 8)
HYBRID_BITS = (4, 6, 8)
RESIDUAL = "+residual"
SIDES = {"": "kv", "k": "k", "v": "v"}
_NAME = re.compile(
    r"(?:int(?P<bits>\d+)-(?P<scale>channel|token)|rank(?P<rank>\d+)(?:x(?P<code>\d+))?)"
    r"(?:@(?P<basis>\w+))?(?::(?P<side>k|v))?"
)


@dataclass(frozen=True)
class Method:
    """One way of storing keys and values."""

    name: str
    family: str  # baseline, quantisation, rank, hybrid, server or rival
    basis: str
    side: str  # kv, k or v
    key: Codec
    value: Codec
    dims: int | None = None  # how many coordinates are kept, None: all
    code_bits: float = FP16_BITS
    exact_ends: int = 0  # how many first and how many last layers stay fp16

    @property
    def needs_gradient(self) -> bool:
        """Whether its codecs are fitted with gradients of the calibration text."""
        return self.key.needs_gradient or self.value.needs_gradient

    def budget(self, head_size: int) -> float:
        """Bits per dimension of the codes alone, on the side that is stored."""
        return self.code_bits * (1.0 if self.dims is None else self.dims / head_size)

    def check(self, head_size: int) -> None:
        """Raises ConfigError or UnsupportedError if vectors of this size can't be stored so."""
        if self.family in ("server", "baseline") and head_size not in CPU_HEAD_SIZES:
            raise ConfigError(f"{self.name}: the server has no pages for head size {head_size}")
        self.key.check(head_size)
        self.value.check(head_size)


def parse(name: str, seed: int = 0) -> Method:
    """The method called `name`. Raises ConfigError, which says what names there are."""
    if name == BASELINE:
        return Method(name, "baseline", "identity", "kv", Exact(), Exact())
    format = FORMATS.get(name.removesuffix(RESIDUAL))
    if format is not None and (format.has_residual or name in FORMATS):
        return _of_server(name, format)
    rival, _, side = name.partition(":")
    if rival in RIVALS and name in (rival, *(f"{rival}:{s}" for s in SIDES if s)):
        return _rival(name, RIVALS[rival], SIDES[side])
    match = _NAME.fullmatch(name)
    if match is None:
        served = (as_served(each) for each in FORMATS)
        formats, rivals = ", ".join(dict.fromkeys([*FORMATS, *served])), ", ".join(RIVALS)
        raise ConfigError(
            f"unknown method {name!r}: give {formats}, int4-channel, int4-token, rank32 or rank64x8, the last four "
            f"with other numbers and a basis (@identity, @random, @hadamard, @pca) if you like, or a rival: {rivals}; "
            f"these and those four also with a side (:k, :v)"
        )
    return _parsed(name, match, seed)


def as_served(name: str) -> str:
    """The method that is a server's format with its residuals, if it has any."""
    return name + RESIDUAL if FORMATS[name].has_residual else name


def _of_server(name: str, format: KVFormat) -> Method:
    stream: Callable[[KVFormat, str], Codec] = served_stream if name.endswith(RESIDUAL) else ServerStream
    bits = (format.k.bits + format.v.bits) / 2
    basis = "hadamard" if format.k.rotated else "identity"
    return Method(name, "server", basis, "kv", stream(format, "key"), stream(format, "value"), code_bits=bits)


def _rival(name: str, rival: Rival, side: str) -> Method:
    key = rival.key if "k" in side else Exact()
    value = rival.value if "v" in side else Exact()
    return Method(name, "rival", rival.basis, side, key, value, code_bits=rival.bits, exact_ends=rival.exact_ends)


def _parsed(name: str, match: re.Match[str], seed: int) -> Method:
    basis = match["basis"] or ("pca" if match["rank"] else "identity")
    if basis not in BASES:
        raise one_of("basis", basis, BASES)
    bits = int(match["bits"] or match["code"] or FP16_BITS)
    if bits != FP16_BITS and not 2 <= bits <= 8:
        raise ConfigError(f"{name}: {bits} bits are not possible, give 2 to 8")
    if match["rank"] is None:
        if bits == FP16_BITS:
            raise ConfigError(f"{name}: 16 bits are not possible, give 2 to 8")
        family, rank = "quantisation", None
        codec = Coordinates(basis, Symmetric(bits, match["scale"]), seed=seed)
    else:
        family, rank = ("rank" if bits == FP16_BITS else "hybrid"), int(match["rank"])
        grid = Float16() if bits == FP16_BITS else Symmetric(bits, "channel")
        codec = Coordinates(basis, grid, rank, centered=True, seed=seed)
    side = SIDES[match["side"] or ""]
    key = codec if "k" in side else Exact()
    value = codec if "v" in side else Exact()
    return Method(name, family, basis, side, key, value, rank, bits)


def rank_at(budget: float, head_size: int, bits: int = FP16_BITS) -> int | None:
    """The rank that at `bits` bits a coordinate costs `budget` bits a dimension; None if there is no such rank."""
    rank = budget * head_size / bits
    return int(rank) if rank == int(rank) and 0 < rank < head_size else None


def standard_names(head_size: int, budgets: Iterable[int] = BUDGETS, main: int = 4) -> list[str]:
    """The lab's standard set: all kinds at every budget; bases and sides at the main one."""
    names = [BASELINE]
    for b in budgets:
        names += [f"int{b}-channel", f"int{b}-token"]
        names += _reduced(b, head_size)
        if b == main:
            names += _variations(b, head_size)
    names += [name for name in FORMATS if name != BASELINE and head_size in CPU_HEAD_SIZES]
    return list(dict.fromkeys(names))


def _reduced(budget: int, head_size: int) -> Iterator[str]:
    rank = rank_at(budget, head_size)
    if rank is not None:
        yield from (f"rank{rank}{side}" for side in ("", ":k", ":v"))
    for code in HYBRID_BITS:
        rank = rank_at(budget, head_size, code)
        if code > budget and rank is not None:
            yield f"rank{rank}x{code}"


def _variations(budget: int, head_size: int) -> Iterator[str]:
    kinds = [f"int{budget}-channel", f"int{budget}-token"]
    yield from (kind + side for kind in kinds for side in (":k", ":v"))
    yield from (f"{kind}@{basis}" for kind in kinds for basis in ("random", "hadamard", "pca"))
    for code in (FP16_BITS, *HYBRID_BITS):
        rank = rank_at(budget, head_size, code)
        if code > budget and rank is not None:
            name = f"rank{rank}" if code == FP16_BITS else f"rank{rank}x{code}"
            yield from (f"{name}@{basis}" for basis in ("identity", "random", "hadamard"))


def quick_names(head_size: int) -> list[str]:
    """A handful at the budgets of 2 and 4 bits."""
    names = [BASELINE]
    for b in (2, 4):
        names += [f"int{b}-channel", f"int{b}-token"]
        names += [f"rank{rank}" for rank in [rank_at(b, head_size)] if rank is not None]
        names += [f"rank{rank}x8" for rank in [rank_at(b, head_size, 8)] if rank is not None]
    return names + (["k4v4"] if head_size in CPU_HEAD_SIZES else [])
