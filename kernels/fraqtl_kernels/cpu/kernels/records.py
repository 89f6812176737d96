"""What compiled loops know of a layer's pages and of the vectors it stores, by name: one array of one record each.

An array costs a call as much as one number does, whatever is in it.
"""

from __future__ import annotations

import numpy as np

STREAM = np.dtype(
    [
        ("address", np.int64),  # of the first vector in memory
        ("kind", np.int64),  # of its numbers: 0 float32, 1 bfloat16, 2 float16
        ("token_stride", np.int64),  # bytes
        ("head_stride", np.int64),
        ("bits", np.int64),  # a code; 0: these vectors are stored as they come, or not here
        ("groups", np.int64),  # scales a vector
        ("is_calibrated", np.int64),
        ("feeds_back", np.int64),  # there is a feedback
        ("is_structured", np.int64),  # it comes as its spectrum
        ("is_shifted", np.int64),  # there is an outlier center
        ("head_numbers", np.int64),  # of a head in the table of constants
        ("code_offset", np.int64),  # in a page, bytes
        ("code_bytes", np.int64),  # of a vector
        ("scale_offset", np.int64),
        ("scale_bytes", np.int64),
        ("distance", np.int64),  # slots from a token to its residual, 0: it has none
        ("keeps_residual", np.int64),  # residuals are also handed on to attention
        ("edge", np.float32),  # steps from zero to the outer edge of the grid
        ("midpoint", np.float32),  # the code that stands for zero
        ("levels", np.float32),  # the largest code
        ("unit", np.float32),  # what makes the rotation orthogonal: D^-½
    ]
)
"""How keys, or values, of a batch get into pages."""

PAGES = np.dtype(
    [
        ("block_size", np.int64),
        ("heads", np.int64),
        ("head_size", np.int64),
        ("block_stride", np.int64),  # bytes
        ("head_stride", np.int64),
        ("k_bits", np.int64),  # 16: bfloat16, 17: float16
        ("v_bits", np.int64),
        ("k_groups", np.int64),  # scales a vector
        ("v_groups", np.int64),
        ("v_offset", np.int64),  # in a page, bytes
        ("k_scale_offset", np.int64),
        ("v_scale_offset", np.int64),
        ("k_distance", np.int64),  # slots from a token to its residual, 0: not read
        ("v_distance", np.int64),
        ("k_rows", np.int64),  # addresses of `rows.row_function`
        ("v_rows", np.int64),
        ("k_midpoint", np.float32),  # what codes are too large by
        ("v_midpoint", np.float32),
    ]
)
"""What lies where in a pool, and how it is read."""
