"""KV-cache formats as data. Everything that depends on a format reads it from here.

A key or value vector of head size D is stored in one of three ways:

- raw: D numbers of 16 bits in the named dtype;
- quantized: D codes of b = 2, 3, 4 or 8 bits and an fp16 scale for each of `groups` equal runs of
  dimensions. The value of code c is (c - (2^b - 1) / 2) · scale: a midpoint grid, symmetric about
  zero, which uses all 2^b codes. scale = max|x| / 2^(b-1): the largest element lies on the outer edge of
  the last cell, so that no rounding error exceeds half a step;
- static: D codes and nothing else. The value of code c = 1 .. 2^b - 1 is (c - 2^(b-1)) · s_d, with a
  scale s_d for each dimension that calibration fixes before the first request.

`rotated` says that the vector is multiplied by an orthogonal Hadamard matrix first, which
spreads outliers over all dimensions (see `rotation.py`). `calibrated` says that calibration may subtract a mean and,
of 3- and 4-bit vectors, choose the matrix (see `constants.py`): their codes and scale then follow
`reference.quantize_with_feedback`. `has_residual` says that the newest tokens of a block leave what rounding left of
them in its free slots (see `residual.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fraqtl_kernels.errors import ConfigError, UnsupportedError, one_of

HEAD_SIZES = (64, 80, 96, 128, 256)
CPU_HEAD_SIZES = (*HEAD_SIZES, 512)
PART = 256  # dimensions; a larger head takes as many bytes as heads of so many would
SCALE_DTYPE = torch.float16
SCALE_BYTES = 2
LARGEST_SCALE = torch.finfo(SCALE_DTYPE).max
# Of max|z| / edge, by the bits of a code, eight from the first on: which is best is mostly a matter of luck. With fewer
# codes it pays to clip more.
SCALE_CHOICES = {bits: tuple((first + n) / 32 for n in range(8)) for bits, first in ((3, 24), (4, 28))}
FEEDBACK_GRID = 128  # rounding errors are fed back in 1/128 of a step, which 16-bit numbers hold exactly up to 2 steps
FEEDBACK_LIMIT = 2.0
CODE_BITS = (2, 3, 4, 8)
RAW_DTYPES = (torch.bfloat16, torch.float16)
GROUPED_BITS = (2, 4, 8)
GROUPS = (2, 4, 8)
TOP_BITS = 0, 2, 1, 3  # where in half a byte the third bits of four quarters of a vector stand, see `pages.py`


@dataclass(frozen=True)
class VectorFormat:
    """How one key or value vector is stored. Raises ConfigError for what no kernel reads."""

    bits: int
    rotated: bool = False
    raw_dtype: torch.dtype | None = None
    groups: int = 1
    static: bool = False
    calibrated: bool = False
    has_residual: bool = False

    def __post_init__(self) -> None:
        if self.is_raw:
            valid = self.bits == 16 and self.raw_dtype in RAW_DTYPES
            valid = valid and not (self.rotated or self.static or self.calibrated or self.has_residual)
        else:
            valid = self.bits in CODE_BITS
        if self.calibrated:
            valid = valid and self.rotated and not self.static
        if self.static:
            valid = valid and not (self.rotated or self.has_residual)
        if self.groups != 1:
            valid = valid and self.groups in GROUPS and self.bits in GROUPED_BITS and not self.static
            valid = valid and not self.has_feedback
        if not valid:
            raise ConfigError(
                f"no kernel reads {self}: codes have 2, 3, 4 or 8 bits, raw numbers are bfloat16 or float16; calibrated"
                " vectors are rotated; static ones are neither rotated nor have residuals; only scaled vectors of"
                " 2, 4 or 8 bits come in 2, 4 or 8 groups, and calibrated ones of 4 bits don't"
            )

    @property
    def is_raw(self) -> bool:
        return self.raw_dtype is not None

    @property
    def is_scaled(self) -> bool:
        """Whether every vector comes with scales of its own."""
        return not (self.is_raw or self.static)

    @property
    def has_feedback(self) -> bool:
        """Whether calibration also chooses the matrix, and how rounding errors are fed back."""
        return self.calibrated and self.bits in SCALE_CHOICES

    @property
    def levels(self) -> int:
        """The largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def midpoint(self) -> float:
        """The code that stands for zero. On the midpoint grid it lies between two codes."""
        return float(self.edge) if self.static else self.levels / 2

    @property
    def edge(self) -> int:
        """Steps from zero to the outer edge of the grid, 2^(bits - 1)."""
        return 1 << (self.bits - 1)

    def code_bytes(self, head_size: int) -> int:
        return head_size * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales that are stored with every vector."""
        return SCALE_BYTES * self.groups if self.is_scaled else 0

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
        """Bytes per (token, KV head), key and value and their scales together.

        A head of 512 takes as many as two of 256, up to 2.5 % more than it needs: a model that has both (Gemma 4) fills
        one pool with pages of both, and vLLM would pad the smaller one where it doesn't divide the larger one.
        """
        parts = max(1, head_size // PART)
        return parts * (self.k.bytes(head_size // parts) + self.v.bytes(head_size // parts))

    def ratio(self, head_size: int) -> float:
        """How many times smaller than a 16-bit cache."""
        return 4 * head_size / self.bytes_per_token(head_size)

    @property
    def is_quantized(self) -> bool:
        return not (self.k.is_raw and self.v.is_raw)

    @property
    def has_residual(self) -> bool:
        """Whether the newest tokens are read with their residuals."""
        return self.k.has_residual or self.v.has_residual

    @property
    def without_residual(self) -> KVFormat:
        """The same format without that; its bytes are the same."""
        return replace(self, k=replace(self.k, has_residual=False), v=replace(self.v, has_residual=False))

    @property
    def is_calibrated(self) -> bool:
        """Whether constants of the model make this format better."""
        return self.k.calibrated or self.v.calibrated or self.needs_calibration

    @property
    def needs_calibration(self) -> bool:
        """Whether the format means nothing without constants of the model."""
        return self.k.static or self.v.static


def _raw(name: str, dtype: torch.dtype, purpose: str) -> KVFormat:
    vector = VectorFormat(16, raw_dtype=dtype)
    return KVFormat(name, vector, vector, purpose)


INT8 = VectorFormat(8, rotated=True, calibrated=True)
INT4_KEY = VectorFormat(4, rotated=True, calibrated=True, has_residual=True)
INT4_VALUE = VectorFormat(4, rotated=True, calibrated=True, has_residual=True)
INT3 = VectorFormat(3, rotated=True, calibrated=True, has_residual=True)
INT2_VALUE = VectorFormat(2, rotated=True, groups=4, calibrated=True, has_residual=True)
INT4_CHANNEL = VectorFormat(4, static=True)

FORMATS: dict[str, KVFormat] = {
    f.name: f
    for f in (
        _raw("bf16", torch.bfloat16, "the baseline: bfloat16 blocks through the same code path"),
        _raw("fp16", torch.float16, "the same in float16"),
        KVFormat("k8v8", INT8, INT8, "half the memory, for models that tolerate no loss at all"),
        KVFormat("k8v4", INT8, INT4_VALUE, "keys that 4 bits hurt"),
        KVFormat("k4v4", INT4_KEY, INT4_VALUE, "the default: a quarter of the memory"),
        KVFormat("k4v4-channel", INT4_CHANNEL, INT4_CHANNEL, "the published recipe, to compare with"),
        KVFormat("k4v3", INT4_KEY, INT3, "a little less memory than the default"),
        KVFormat("k3v3", INT3, INT3, "least memory, where a loss is acceptable"),
        KVFormat("k4v2", INT4_KEY, INT2_VALUE, "to compare with k3v3, which is smaller"),
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
    if head_size not in CPU_HEAD_SIZES:
        valid = ", ".join(map(str, CPU_HEAD_SIZES))
        raise UnsupportedError(f"head size {head_size} is not supported: the packed cache takes {valid}")
