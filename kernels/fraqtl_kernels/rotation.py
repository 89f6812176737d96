"""Orthogonal Hadamard rotations for every supported head size.

A Hadamard matrix of order n has entries ±1 and orthogonal rows. Orders 2^k come from
Sylvester's doubling; 12 and 20, for head sizes 96 = 8·12 and 80 = 4·20, from Paley's first
construction (R. E. A. C. Paley, "On orthogonal matrices", 1933) with q = 11 and 19.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def _paley(q: int) -> Tensor:
    """Hadamard matrix of order q + 1, for a prime q with q % 4 == 3."""
    squares = {x * x % q for x in range(1, q)}
    jacobsthal = torch.tensor(
        [[0 if i == j else (1 if (i - j) % q in squares else -1) for j in range(q)] for i in range(q)]
    )
    skew = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, jacobsthal
    return skew + torch.eye(q + 1, dtype=torch.int64)


@cache
def hadamard(order: int) -> Tensor:
    """The rotation of a head size: (order, order) float64, orthogonal, entries ±1/sqrt(order).

    Source: Sylvester's and Paley's constructions, see the module's docstring.
    Raises ValueError for an order that neither reaches.
    """
    base_order, power = order, 1
    while base_order % 2 == 0 and base_order not in (12, 20):
        base_order, power = base_order // 2, power * 2
    if base_order not in (1, 12, 20):
        raise ValueError(f"no Hadamard matrix of order {order} here: it must be 2^k, 12·2^k or 20·2^k")
    matrix = torch.ones(1, 1, dtype=torch.int64) if base_order == 1 else _paley(base_order - 1)
    while power > 1:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        power //= 2
    return matrix.double() / order**0.5
