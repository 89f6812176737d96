"""Linear layers whose weights lie as oneDNN multiplies them, for processors with 16-bit matrix units.

torch puts the weights into that order anew at every call, however few the rows are.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OPS = torch.ops.mkldnn
_ROWS = 16  # what oneDNN chooses an order for; it suits every number of rows


class PackedLinear:
    """y = x W^T + b for one layer, in bfloat16 with float32 sums.

    weight: (N, K) bfloat16; a copy of it is kept.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = _OPS._reorder_linear_weight(weight.detach(), _ROWS)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (..., K) bfloat16. Returns (..., N) in the same."""
        return _OPS._linear_pointwise(x, self._weight, bias, "none", [], "")
