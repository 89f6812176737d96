"""Prompt chunks on a GPU: vLLM's flash attention over the chunk's raw keys and the dequantized prefix.

The prefix comes back from its pages in the model's own basis, center included, into a workspace of fixed size
that all layers share. So its scores are those of the raw keys, and pieces can be joined. See `passes.py`. Sink logits
come last, when all keys of a chunk are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.gpu.gather import dequantize
from fraqtl_kernels.gpu.operands import LayerOperands
from fraqtl_kernels.pages import PageLayout
from fraqtl_vllm import _vllm
from fraqtl_vllm.attention.cuda_buffers import Workspace
from fraqtl_vllm.attention.passes import Chunk, Pass, plan_passes

WORKSPACE_BYTES = 128 << 20


class Flash(Protocol):
    """Flash attention over ragged batches, as `flash_attention` gives it."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: DevicePass, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """q: (queries, heads, D). k, v: (keys, KV heads, D). Returns the output, which is `out` if that is given,
        and the natural logarithms of the softmax sums, (heads, queries) fp32."""


def flash_attention(head_size: int, scale: float, window: int | None, soft_cap: float | None) -> Flash:
    """vLLM's flash attention for one layer. Raises UnsupportedError where it has none for this GPU."""
    version = _vllm.get_flash_attn_version(head_size=head_size, requires_softcap=soft_cap is not None)
    if version is None:
        raise UnsupportedError(
            "vLLM has no flash attention for this GPU, which prompts need: "
            'attend their packed keys with --additional-config \'{"fraqtl": {"prefill_keys": "packed"}}\''
        )

    def flash(q: Tensor, k: Tensor, v: Tensor, call: DevicePass, out: Tensor | None) -> tuple[Tensor, Tensor]:
        output, lse, *_ = _vllm.flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            out=out,
            cu_seqlens_q=call.query_start,
            cu_seqlens_k=call.key_start,
            max_seqlen_q=call.max_query_len,
            max_seqlen_k=call.max_key_len,
            softmax_scale=scale,
            causal=call.plan.causal,
            window_size=[window - 1, 0] if window is not None and call.plan.causal else [-1, -1],
            softcap=soft_cap or 0.0,
            return_softmax_lse=True,
            fa_version=version,
        )
        return output, lse

    return flash


def workspace_tokens(kv_heads: int, head_size: int, window: int | None, longest_chunk: int) -> int:
    """Tokens that `WORKSPACE_BYTES` hold; more only where one chunk and its window need more."""
    return max(WORKSPACE_BYTES // (4 * kv_heads * head_size), longest_chunk + (window or 1) - 1)


@dataclass(frozen=True)
class DevicePass:
    """A pass and its numbers on the device. chunk_rows: the workspace's rows of the chunks' own tokens, or None."""

    plan: Pass
    query_start: Tensor
    key_start: Tensor
    first: Tensor
    chunk_rows: Tensor | None
    max_query_len: int
    max_key_len: int


@dataclass
class Prefills:
    """The chunks of one step. Passes are planned and uploaded once for all layers with the same window."""

    chunks: tuple[Chunk, ...]
    _passes: dict[tuple[int, int | None], list[DevicePass]] = field(default_factory=dict)

    def passes(self, capacity: int, window: int | None, device: torch.device) -> list[DevicePass]:
        key = (capacity, window)
        if key not in self._passes:
            self._passes[key] = [_upload(p, device) for p in plan_passes(self.chunks, capacity, window)]
        return self._passes[key]


def _upload(plan: Pass, device: torch.device) -> DevicePass:
    queries = [chunk.queries for chunk in plan.chunks]
    key_start = [0, *accumulate(plan.counts)]
    rows = None
    if plan.from_pages and plan.causal:
        ends = zip(queries, key_start[1:], strict=True)
        rows = _to_device(torch.cat([torch.arange(end - count, end) for count, end in ends]), device)
    return DevicePass(
        plan,
        _to_device(torch.tensor([0, *accumulate(queries)], dtype=torch.int32), device),
        _to_device(torch.tensor(key_start, dtype=torch.int32), device),
        _to_device(torch.tensor(plan.first, dtype=torch.int32), device),
        rows,
        max(queries),
        max(plan.counts),
    )


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the device: from pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


@dataclass(frozen=True)
class Layer:
    """What of a layer its prefill needs. sink_logits: (query heads,)."""

    flash: Flash
    workspace: Workspace
    window: int | None
    operands: LayerOperands
    sink_logits: Tensor | None = None


def warm_up(layer: Layer, pool: Tensor, layout: PageLayout) -> None:
    """Compile what brings back a cached prefix, on one token of whatever the first block holds. None of vLLM's trial
    runs has a prefix; without this the first one of a server would wait for the compiler."""
    integers = torch.tensor([[0, 1]], dtype=torch.int32, device=pool.device)
    first, start = integers[0, :1], integers[0]
    key, value = layer.workspace.key[:1], layer.workspace.value[:1]
    dequantize(pool, layout, integers, first, start, 1, key, value, layer.operands)


def attend(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    prefills: Prefills,
    output: Tensor,
) -> None:
    """Write the attention of the step's chunks to their rows of `output`.

    query, output: (tokens, heads, D); key, value: (tokens, KV heads, D), the raw ones of the whole batch, which
    must also be in their pages already. block_table: (requests, blocks) of the whole batch.
    """
    pieces: list[tuple[Tensor, Tensor]] = []
    for call in prefills.passes(layer.workspace.tokens, layer.window, query.device):
        plan = call.plan
        k, v = key[plan.tokens], value[plan.tokens]
        if plan.from_pages:
            k, v = _restore(layer, call, k, v, pool, layout, block_table)
        target = output[plan.tokens]
        found = layer.flash(query[plan.tokens], k, v, call, None if plan.joined else target)
        if plan.joined:
            found = _join([*pieces, found], target if plan.causal else None)
        pieces = [] if plan.causal else [found]
        if plan.causal and layer.sink_logits is not None:
            _add_sinks(target, found[1], layer.sink_logits)


def _restore(
    layer: Layer, call: DevicePass, key: Tensor, value: Tensor, pool: Tensor, layout: PageLayout, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    """The keys and values of a pass in the workspace: cached ones from their pages, the chunk's own raw."""
    space, total = layer.workspace, sum(call.plan.counts)
    k, v = space.key[:total], space.value[:total]
    table = block_table[call.plan.rows]
    dequantize(pool, layout, table, call.first, call.key_start, call.max_key_len, k, v, layer.operands)
    if call.chunk_rows is not None:
        k.index_copy_(0, call.chunk_rows, key)
        v.index_copy_(0, call.chunk_rows, value)
    return k, v


def _add_sinks(output: Tensor, lse: Tensor, sink_logits: Tensor) -> None:
    """Outputs (queries, heads, D) of all their keys, beside a sink: times Σ e^score / (Σ e^score + e^sink).

    lse: (heads, queries), log Σ e^score, of scores with the center's constant in them, as a sink is compared with.
    """
    output.mul_(torch.sigmoid(lse.float() - sink_logits.float()[:, None]).T[..., None])


def _join(pieces: Sequence[tuple[Tensor, Tensor]], target: Tensor | None) -> tuple[Tensor, Tensor]:
    """One or two pieces as one; the output goes to `target` if it is given.

    out = Σ_i e^(l_i - l) · out_i, l = log Σ_i e^l_i, with (out_i, l_i) as flash attention gives them.
    """
    if len(pieces) == 1:
        return pieces[0]
    (older, older_lse), (newer, newer_lse) = pieces
    output = torch.empty_like(newer) if target is None else target
    lse = torch.empty_like(newer_lse)
    _vllm.merge_attn_states(output, older, older_lse, newer, newer_lse, output_lse=lse)
    return output, lse
