"""What the free slots of a block hold: what rounding left of its newest tokens, coded as the tokens are.

Attention looks most at the tokens nearest to the query, so their rounding errors cost most. The block that takes the
newest token has free slots behind it, until it is full. There a token of a format with residuals leaves its residual:
the codes of z - ẑ, in the basis, with the bits and the scale of an ordinary vector.

    offset in the block     0    1    2   ...   p      p+1   ...   p+4      ...
    holds                  t_0  t_1  t_2  ...  t_p  │  t_(p-3)    t_p      nothing
                           tokens                   │  residuals

- The token at offset r leaves its residual in slot r + DISTANCE, if the block has that, until that slot's own token
  comes.
- A query at offset p reads the tokens at offsets p - 3 .. p of its block as ẑ + residual where they have one, and
  every other token as ẑ.

Its position alone says which tokens a query reads with their residuals. So neither chunking nor preemption changes it,
and a full block, the only kind that requests share, holds none. No byte is added to the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

DISTANCE = 4  # slots from a token to its residual; one less is how far back a query reads tokens with their residuals


def reads_residual(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    """Whether the query at one position reads the key at another with its residual. query, key: int64, broadcast."""
    return (
        (key <= query)
        & (key > query - DISTANCE)
        & (key // block_size == query // block_size)
        & (key % block_size + DISTANCE < block_size)
    )


def residual_positions(length: int, block_size: int) -> Tensor:
    """The positions (n,) that the last of `length` tokens reads with their residuals, each DISTANCE slots before its
    residual."""
    position = torch.arange(max(0, length - DISTANCE), length)
    return position[reads_residual(torch.tensor(length - 1), position, block_size)]
