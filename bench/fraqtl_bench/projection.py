"""What a model of transformers multiplies the output of every query head by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMES = ("o_proj", "out_proj", "c_proj", "dense")


@torch.inference_mode()
def output_projection(attention: Any, head_size: int) -> Tensor | None:
    """(query heads, D, D) float32: W W^T of each head's rows of the output projection; None if it has no known name.

    attention: an attention module. `fraqtl_vllm.calibration.projection` finds the same in vLLM's models.
    """
    linear = next((getattr(attention, name) for name in NAMES if hasattr(attention, name)), None)
    if linear is None:
        return None
    # GPT-2's layers don't say how many inputs they take and hold the matrix the other way round
    units = torch.eye(getattr(linear, "in_features", len(linear.weight))).to(linear.weight)
    rows = (linear(units) - linear(torch.zeros_like(units))).float().unflatten(0, (-1, head_size))
    return rows @ rows.mT
