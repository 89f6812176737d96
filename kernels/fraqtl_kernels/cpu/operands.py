"""What the compiled write takes of the keys, or of the values, of a batch and of the layer they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.cpu.kernels.products import panels
from fraqtl_kernels.formats import FEEDBACK_GRID, VectorFormat
from fraqtl_kernels.residual import DISTANCE
from fraqtl_kernels.rotation import hadamard

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NOTHING = np.empty(0, np.float32)
_NO_ROTATION = np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class Table:
    """A layer's constants of its keys or values, for every head one after another, float32:

    the center (D), the way from it to the outlier center in the basis (D), the basis in panels (D · D), and the
    feedback, as its spectrum (D/2) or as the matrix divided by FEEDBACK_GRID (D/2 · D/2).
    """

    numbers: Any
    head_numbers: int
    is_structured: bool
    is_shifted: bool


@dataclass(frozen=True)
class StreamOperands:
    """Keys or values of a batch.

    x: what is read, to keep it alive. table: `Table.numbers`. residual: residuals to fill, flat. hadamard_base: of the
    rotation. whole: address and kind of the numbers, bytes from token to token and from head to head, bits (0: nothing
    to do), groups, whether calibrated, structured, shifted, numbers of a head in the table, code offset and bytes,
    scale offset and bytes, slots to a residual, whether `residual` is to be filled. numbers: edge, midpoint, levels,
    D^-½.
    """

    x: Tensor
    table: Any
    residual: Any
    hadamard_base: Any
    whole: tuple[int, ...]
    numbers: tuple[float, ...]

    @classmethod
    def of(
        cls,
        x: Tensor,
        vector: VectorFormat,
        code_offset: int,
        scale_offset: int,
        constants: LayerConstants,
        stream: str,
        residual: Tensor | None,
    ) -> StreamOperands:
        """x: (tokens, KV heads, D), floating point, any strides. stream: "key" or "value". residual: (tokens, KV heads,
        D) float32 <- what the residuals of tokens stand for, zero for those without."""
        size = x.shape[-1]
        if not vector.is_scaled:
            return cls(x, _NOTHING, _NOTHING, _NO_ROTATION, (0,) * 16, (0.0,) * 4)
        if x.dtype not in _KINDS:
            x = x.float()
        if x.stride(-1) != 1:
            x = x.contiguous()
        table = tables_of(constants)[stream] if vector.calibrated else None
        each = x.element_size()
        whole = (
            x.data_ptr(),
            _KINDS[x.dtype],
            x.stride(0) * each,
            x.stride(1) * each,
            vector.bits,
            vector.groups,
            int(table is not None),
            int(table is not None and table.is_structured),
            int(table is not None and table.is_shifted),
            0 if table is None else table.head_numbers,
            code_offset,
            vector.code_bytes(size),
            scale_offset,
            vector.scale_bytes,
            DISTANCE if vector.has_residual else 0,
            int(residual is not None),
        )
        return cls(
            x,
            _NOTHING if table is None else table.numbers,
            _NOTHING if residual is None else residual.view(-1).numpy(),
            make_hadamard_base(size) if vector.rotated and table is None else _NO_ROTATION,
            whole,
            (vector.edge, vector.midpoint, vector.levels, size**-0.5),
        )


def join(key: StreamOperands, value: StreamOperands) -> tuple[Any, ...]:
    """Both in the form that `kernels.store.store_range` takes, the same types for every format."""
    return (
        (key.table, value.table),
        (key.residual, value.residual),
        (key.hadamard_base, value.hadamard_base),
        np.array([key.whole, value.whole], np.int64),
        np.array([key.numbers, value.numbers], np.float32),
    )


_PREPARED: WeakKeyDictionary[LayerConstants, dict[str, Table | None]] = WeakKeyDictionary()


def tables_of(constants: LayerConstants) -> dict[str, Table | None]:
    """By "key" and "value"; None without a transform."""
    if constants not in _PREPARED:
        _PREPARED[constants] = {"key": _table(constants, "key"), "value": _table(constants, "value")}
    return _PREPARED[constants]


def _table(constants: LayerConstants, stream: str) -> Table | None:
    transform = constants.key.transform if stream == "key" else constants.value.transform
    if transform is None:
        return None
    center = transform.center.float()
    outlier_center = constants.key.outlier_center if stream == "key" else None
    outlier_shift = torch.zeros_like(center) if outlier_center is None else transform.apply(outlier_center.float())
    spectrum = spectrum_of(transform.feedback)
    feedback = transform.feedback.float() / FEEDBACK_GRID if spectrum is None else spectrum
    parts = center, outlier_shift, panels(transform.basis.float()).flatten(1), feedback.flatten(1)
    numbers = torch.cat(parts, 1)
    return Table(
        numbers.flatten().contiguous().numpy(), numbers.shape[1], spectrum is not None, outlier_center is not None
    )


def spectrum_of(feedback: Tensor) -> Tensor | None:
    """What `feed_back` takes in the place of F (KV heads, D/2, D/2): (KV heads, D/2) float32, or None if F has no
    such form."""
    size = feedback.shape[-1]
    if size & (size - 1) or size < 32:
        return None
    first, index = feedback[:, 0].double(), torch.arange(size)
    if not torch.equal(first[:, index[:, None] ^ index], feedback.double()):
        return None
    eigenvalues = first @ hadamard(size).sign()
    return (eigenvalues / size / FEEDBACK_GRID).float()


@cache
def make_hadamard_base(size: int) -> Any:
    """B of H = S ⊗ B, entries ±1, (b, b) float32 with b = 1, 12 or 20."""
    hadamard_base = size
    while hadamard_base % 2 == 0 and hadamard_base not in (12, 20):
        hadamard_base //= 2
    return hadamard(hadamard_base).sign().float().numpy()
