"""Bring cached tokens of some requests back into a contiguous 16-bit workspace. How: `kernels/gather.py`.

For prefill behind a cached prefix: flash attention then reads the workspace next to the raw keys and values of the
chunk. A caller bounds the workspace by calling it for a range of tokens of each request at a time.
"""

from __future__ import annotations

import triton
from torch import Tensor

from fraqtl_kernels.gpu.constexprs import page_shape
from fraqtl_kernels.gpu.kernels.gather import workspace_kernel
from fraqtl_kernels.gpu.operands import LayerOperands, check_contiguous
from fraqtl_kernels.pages import PageLayout

TILE = 32
WARPS = 4


def dequantize(
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    first: Tensor,
    target_start: Tensor,
    max_tokens: int,
    key: Tensor,
    value: Tensor,
    operands: LayerOperands,
) -> None:
    """Write tokens [first[r], first[r] + n_r) of every request r to rows target_start[r] ... of key and value.

    first: (requests,) int. target_start: (requests + 1,) int, so n_r = target_start[r+1] - target_start[r] (0 skips
    a request); max_tokens: a bound on n_r. key, value: (rows, KV heads, D) fp16 or bf16, last dimension contiguous.
    """
    page = page_shape(layout, key.dtype, ptx=False)
    operands.check(layout.format)
    check_contiguous(key=key, value=value)
    if max_tokens <= 0:
        return
    k, v = operands.key, operands.value
    workspace_kernel[(triton.cdiv(max_tokens, TILE), first.shape[0], 2 * pool.shape[1])](
        pool=pool,
        pool_stride_block=pool.stride(0),
        pool_stride_head=pool.stride(1),
        block_table=block_table,
        table_stride=block_table.stride(0),
        first=first,
        target_start=target_start,
        key=key,
        key_stride_token=key.stride(0),
        key_stride_head=key.stride(1),
        value=value,
        value_stride_token=value.stride(0),
        value_stride_head=value.stride(1),
        basis_key=k.in_bytes.back,
        basis_key_stride_head=k.head_stride,
        basis_value=v.in_bytes.back,
        basis_value_stride_head=v.head_stride,
        key_scale=k.scale,
        value_scale=v.scale,
        key_center=k.own_center,
        key_outlier_center=k.own_outlier_center,
        value_center=v.own_center,
        key_factor=k.factor,
        value_factor=v.factor,
        PAGE=page,
        TILE=TILE,
        num_warps=WARPS,
    )
