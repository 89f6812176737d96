"""Caches of other projects under their own names, as published, each at its real bytes.

A module a family; its docstring has the paper, the repository and the file. A rival is two codecs, one a stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from fraqtl_bench.quality.codecs import Codec, Exact
from fraqtl_bench.quality.recent import Buffer, Queue, Ring
from fraqtl_bench.quality.rivals import floats, int4_per_token_head, kivi, kvquant, llama_cpp, turbo_attn, turboquant


@dataclass(frozen=True)
class Rival:
    """bits: nominal, per dimension. basis: of the codes. exact_ends: so many first and last layers stay fp16."""

    key: Codec
    value: Codec
    bits: int
    basis: str = "identity"
    exact_ends: int = 0


def _llama_cpp(bits: int, *, rotated: bool) -> Rival:
    key, value = ("largest", "least") if rotated else ("none", "none")
    basis = "hadamard" if rotated else "identity"
    return Rival(llama_cpp.Blocks(bits, key), llama_cpp.Blocks(bits, value), bits, basis)


def _turboquant(bits: int, ends: int) -> Rival:
    return Rival(turboquant.Keys(bits), turboquant.Values(bits), bits, "hadamard", ends)


def _kivi(bits: int) -> Rival:
    keys, values = kivi.Groups(bits, along_tokens=True), kivi.Groups(bits, along_tokens=False)
    return Rival(Buffer(keys, Exact(), kivi.RESIDUAL), Queue(values, Exact(), kivi.RESIDUAL), bits)


def _nuq(bits: int) -> Rival:
    return Rival(kvquant.Keys(bits), kvquant.Values(bits), bits)


def _turbo_attn(bits: int) -> Rival:
    key, value = (turbo_attn.Coded(bits, keeps_length=keeps) for keeps in (True, False))
    ring = turbo_attn.Int8()
    return Rival(Ring(key, ring, turbo_attn.WINDOW), Ring(value, ring, turbo_attn.WINDOW), bits, "hadamard")


_INT4 = int4_per_token_head.Int4PerTokenHead()

RIVALS = {
    "fp8": Rival(floats.Fp8(), floats.Fp8(), 8),
    "nvfp4": Rival(floats.Nvfp4(), floats.Nvfp4(), 4),
    "int4_per_token_head": Rival(_INT4, _INT4, 4, "hadamard"),
    "turboquant-4bit": _turboquant(4, 0),
    "turboquant-3bit": _turboquant(3, 0),
    "turboquant-4bit-ends": _turboquant(4, turboquant.ENDS),
    "turboquant-3bit-ends": _turboquant(3, turboquant.ENDS),
    "turbo-attn": _turbo_attn(4),
    "q8_0": _llama_cpp(8, rotated=True),
    "q4_0": _llama_cpp(4, rotated=True),
    "q8_0-plain": _llama_cpp(8, rotated=False),
    "q4_0-plain": _llama_cpp(4, rotated=False),
    "kivi-4": _kivi(4),
    "kivi-2": _kivi(2),
    "kvquant-nuq4": _nuq(4),
    "kvquant-nuq3": _nuq(3),
}
