"""The matrices and vectors that carry queries, keys and values into the stored basis, as kernels take them.

A Hadamard matrix has entries ±1/sqrt(D). Kernels multiply by ±1, which 16-bit numbers hold
exactly, and apply the factor 1/sqrt(D) in fp32 afterwards: the rotation of a 16-bit vector is then
as exact as fp32 sums are. Key exponents fold into the matrices, one per KV head then, which stay exact:

    queries: 2^e · signs      keys: 2^-e · signs      back: signs^T · 2^e

A key centre is subtracted after the rotation, so it is carried there once, here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import KVFormat
from fraqtl_kernels.rotation import hadamard


@dataclass(frozen=True)
class Bases:
    """Operands of one layer (layers without constants may share them). None where there is nothing to do.

    query, key, key_inverse: (D, D), or (KV heads, D, D) with key exponents, contiguous in the model's dtype, of rotated
    keys: stored row = row @ key · factor. value, value_inverse: (D, D), of rotated values.
    centre, sink_centre: (KV heads, D) fp32 in the stored basis, key_centre, key_sink_centre: in the model's own;
    sink_shift: sink_centre - centre. key_scale, value_scale: (KV heads, D) fp32, the steps of static formats.
    """

    query: Tensor | None
    key: Tensor | None
    key_inverse: Tensor | None
    value: Tensor | None
    value_inverse: Tensor | None
    centre: Tensor | None
    sink_centre: Tensor | None
    sink_shift: Tensor | None
    key_centre: Tensor | None
    key_sink_centre: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None
    factor: float

    @property
    def head_stride(self) -> int:
        """Numbers between the key bases of two KV heads: 0 where they share one."""
        return self.key.stride(0) if self.key is not None and self.key.dim() == 3 else 0

    def check(self, format: KVFormat) -> None:
        """Raises ConfigError if the format has static scales and calibration has given none."""
        if (format.k.static and self.key_scale is None) or (format.v.static and self.value_scale is None):
            raise ConfigError(f"the format {format.name} has static scales and needs calibration: leave calibration on")

    @classmethod
    def of(
        cls,
        format: KVFormat,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        constants: LayerConstants = IDENTITY,
    ) -> Bases:
        """Operands of a format."""
        k, v = format.k, format.v
        used = constants if k.centred else IDENTITY
        signs = hadamard(head_size).sign()
        smoothing = torch.ones(head_size) if used.smoothing is None else used.smoothing.cpu()
        smoothing = smoothing.double().unsqueeze(-1)

        def matrix(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype).contiguous()

        def centres(centre: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            """A centre as stored and as given."""
            if centre is None:
                return None, None
            stored = (centre.cpu().double().unsqueeze(-1) / smoothing).squeeze(-1) @ hadamard(head_size)
            return vector(stored), vector(centre)

        def vector(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device=device, dtype=torch.float32).contiguous()

        centre, key_centre = centres(used.key_centre)
        sink_centre, key_sink_centre = centres(used.sink_centre)
        return cls(
            query=matrix(smoothing * signs) if k.rotated else None,
            key=matrix(signs / smoothing) if k.rotated else None,
            key_inverse=matrix(signs.T * smoothing.mT) if k.rotated else None,
            value=matrix(signs) if v.rotated else None,
            value_inverse=matrix(signs.T) if v.rotated else None,
            centre=centre,
            sink_centre=sink_centre,
            sink_shift=None if sink_centre is None or centre is None else sink_centre - centre,
            key_centre=key_centre,
            key_sink_centre=key_sink_centre,
            key_scale=vector(constants.key_scale) if k.static else None,
            value_scale=vector(constants.value_scale) if v.static else None,
            factor=head_size**-0.5,
        )
