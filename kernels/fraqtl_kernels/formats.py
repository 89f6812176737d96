"""KV-cache formats as data. Everything that depends on a format reads it from here.

A key or value vector of head size D is stored in one of two ways:

- raw: D numbers of 16 bits in the named dtype;
- quantised: D codes of 4 or 8 bits and one fp16 scale. With b bits the value of code c is
  (c - (2^b - 1) / 2) · scale: a midpoint grid, symmetric about zero, which uses all 2^b codes.

`rotated` says that the vector is multiplied by an orthogonal Hadamard matrix first, which
spreads outliers over all dimensions (see `rotation.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fraqtl_kernels.errors import UnsupportedError, one_of

HEAD_SIZES = (64, 80, 96, 128, 256)
SCALE_DTYPE = torch.float16
SCALE_BYTES = 2


@dataclass(frozen=True)
class VectorFormat:
    """How one key or value vector is stored."""

    bits: int
    rotated: bool = False
    raw_dtype: torch.dtype | None = None

    @property
    def is_raw(self) -> bool:
        return self.raw_dtype is not None

    @property
    def levels(self) -> int:
        """The largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def midpoint(self) -> float:
        """The code that stands for zero (it lies between two codes)."""
        return self.levels / 2

    def code_bytes(self, head_size: int) -> int:
        return head_size * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        return 0 if self.is_raw else SCALE_BYTES

    def bytes(self, head_size: int) -> int:
        """Bytes of one vector, its scale included."""
        return self.code_bytes(head_size) + self.scale_bytes


@dataclass(frozen=True)
class KVFormat:
    """A cache format: how a key and how a value is stored, and what to use it for."""

    name: str
    k: VectorFormat
    v: VectorFormat
    purpose: str

    def bytes_per_token(self, head_size: int) -> int:
        """Bytes per (token, KV head), key and value and their scales together."""
        return self.k.bytes(head_size) + self.v.bytes(head_size)

    def ratio(self, head_size: int) -> float:
        """How many times smaller than a 16-bit cache."""
        return 4 * head_size / self.bytes_per_token(head_size)

    @property
    def is_quantised(self) -> bool:
        return not (self.k.is_raw and self.v.is_raw)


def _raw(name: str, dtype: torch.dtype, purpose: str) -> KVFormat:
    vector = VectorFormat(16, raw_dtype=dtype)
    return KVFormat(name, vector, vector, purpose)


INT8 = VectorFormat(8)
INT4_ROTATED = VectorFormat(4, rotated=True)

FORMATS: dict[str, KVFormat] = {
    f.name: f
    for f in (
        _raw("bf16", torch.bfloat16, "the baseline: bfloat16 blocks through the same code path"),
        _raw("fp16", torch.float16, "the same in float16"),
        KVFormat("k8v8", INT8, INT8, "half the memory, for models that tolerate no loss at all"),
        KVFormat("k8v4", INT8, INT4_ROTATED, "keys that 4 bits hurt"),
        KVFormat("k4v4", INT4_ROTATED, INT4_ROTATED, "the default: a quarter of the memory"),
    )
}
DEFAULT_FORMAT = "k4v4"


def get_format(name: str) -> KVFormat:
    """The format called `name`. Raises ConfigError, which lists the valid names."""
    try:
        return FORMATS[name]
    except KeyError:
        raise one_of("KV format", name, FORMATS) from None


def check_head_size(head_size: int) -> None:
    """Raises UnsupportedError for a head size that the page layout and the kernels don't cover."""
    if head_size not in HEAD_SIZES:
        valid = ", ".join(map(str, HEAD_SIZES))
        raise UnsupportedError(f"head size {head_size} is not supported: the packed cache takes {valid}")
