"""Store keys and values into packed pages, in one launch. What is stored: `kernels/write.py`."""

from __future__ import annotations

import triton
from torch import Tensor

from fraqtl_kernels.gpu.constexprs import page_shape
from fraqtl_kernels.gpu.kernels.write import write_kernel
from fraqtl_kernels.gpu.operands import LayerOperands, check_contiguous
from fraqtl_kernels.gpu.tuning import Tuning
from fraqtl_kernels.pages import PageLayout

TOKENS = 16  # tokens a program: the M of the rotation's product


def write_tuning(head_size: int) -> Tuning:
    """Launch shape. With a cap of 128 registers, or none, ptxas spills a few for an occupancy that nobody needs."""
    return Tuning(TOKENS, 4, 1, registers=168) if head_size <= 128 else Tuning(TOKENS, 8, 1)


def write(
    pool: Tensor,
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    operands: LayerOperands,
) -> None:
    """Store keys and values of a batch: same bytes as `reference.write`, see `kernels/write.py`.

    pool: (blocks, KV heads, N, bytes) uint8, see `PageLayout.planes`. key, value: (tokens, KV heads, D) fp16 or
    bf16, last dimension contiguous. slot_mapping: (tokens or fewer,) block · N + offset; negative: skip.
    """
    page, tuning = page_shape(layout, key.dtype, ptx=False, writes=True), write_tuning(layout.head_size)
    operands.check(layout.format)
    check_contiguous(key=key, value=value)
    tokens = min(slot_mapping.shape[0], key.shape[0])
    if tokens == 0:
        return
    k, v = operands.key, operands.value
    write_kernel[(triton.cdiv(tokens, TOKENS), key.shape[1], 2)](
        key=key,
        key_stride_token=key.stride(0),
        key_stride_head=key.stride(1),
        value=value,
        value_stride_token=value.stride(0),
        value_stride_head=value.stride(1),
        pool=pool,
        pool_stride_block=pool.stride(0),
        pool_stride_head=pool.stride(1),
        slot_mapping=slot_mapping,
        basis_key=k.store,
        basis_key_stride_head=k.head_stride,
        basis_value=v.store,
        basis_value_stride_head=v.head_stride,
        feedback_key=k.feedback,
        feedback_value=v.feedback,
        key_scale=k.scale,
        value_scale=v.scale,
        key_center=k.center,
        key_outlier_center=k.outlier_center,
        value_center=v.center,
        tokens=tokens,
        key_factor=k.factor,
        value_factor=v.factor,
        PAGE=page,
        TOKENS=TOKENS,
        **tuning.options,
    )
