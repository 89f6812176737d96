"""The matrices that carry queries, keys and values into the stored basis, as kernels take them.

A Hadamard matrix has entries ±1/sqrt(D). Kernels multiply by ±1, which 16-bit numbers hold
exactly, and apply the factor 1/sqrt(D) in fp32 afterwards: the rotation of a 16-bit vector is then
as exact as fp32 sums are. A key centre is subtracted after the rotation, rotated once here:
(k - c) H = k H - c H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels.formats import KVFormat
from fraqtl_kernels.rotation import hadamard


@dataclass(frozen=True)
class Bases:
    """Operands of one layer (layers without a centre may share them).

    k, v: (D, D) contiguous in the model's dtype, entries ±1, or None for an unrotated vector:
    stored row = row @ k · factor. k_inverse, v_inverse: their transposes, row = stored @ v_inverse · factor.
    centre: (KV heads, D) fp32 in the stored basis, or None.
    """

    k: Tensor | None
    v: Tensor | None
    k_inverse: Tensor | None
    v_inverse: Tensor | None
    centre: Tensor | None
    factor: float

    @classmethod
    def of(
        cls,
        format: KVFormat,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        key_centre: Tensor | None = None,
    ) -> Bases:
        """Operands of a format. key_centre: (KV heads, D) in the model's own basis, subtracted from every key."""
        exact = hadamard(head_size)
        signs = (exact.sign() if format.k.rotated or format.v.rotated else exact).to(device=device, dtype=dtype)
        inverse = signs.T.contiguous()
        centre = None
        if key_centre is not None and format.k.centred:
            centre = key_centre.double()
            if format.k.rotated:
                centre = centre @ exact.to(centre.device)
            centre = centre.float().contiguous().to(device)
        return cls(
            k=signs if format.k.rotated else None,
            v=signs if format.v.rotated else None,
            k_inverse=inverse if format.k.rotated else None,
            v_inverse=inverse if format.v.rotated else None,
            centre=centre,
            factor=head_size**-0.5,
        )
