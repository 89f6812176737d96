"""Every kernel once on small shapes, for a checker of memory accesses to watch.

    compute-sanitizer --tool memcheck python -m fraqtl_bench.kernels.sanitize

Lengths end inside blocks and tiles, slots are skipped, blocks are shuffled, one pool ends with the last page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.formats import FORMATS, KVFormat
from fraqtl_kernels.gpu.config import has_kernels
from fraqtl_kernels.gpu.decode import decode, plan_decode
from fraqtl_kernels.gpu.operands import LayerOperands
from fraqtl_kernels.gpu.prefill import prefill
from fraqtl_kernels.gpu.workspace import dequantize
from fraqtl_kernels.gpu.write import write
from fraqtl_kernels.pages import PageLayout

LENGTHS = (1, 17, 300, 555)
QUERIES = 3
KV_HEADS, GROUP, BLOCK_SIZE = 2, 4, 16


def run(format: KVFormat, head_size: int, device: torch.device, num_sms: int = 132) -> Tensor:
    """Write, decode (split and direct), prefill, dequantize; the last output, so that a caller can look at it."""
    layout = PageLayout(format, head_size, BLOCK_SIZE)
    blocks = [-(-n // BLOCK_SIZE) for n in LENGTHS]
    order = torch.randperm(sum(blocks)).int()
    table = torch.zeros(len(LENGTHS), max(blocks), dtype=torch.int32)
    for row, part in zip(table, order.split(blocks), strict=True):
        row[: len(part)] = part
    table = table.to(device)
    width = format.bytes_per_token(head_size)
    pool = torch.zeros(sum(blocks), KV_HEADS, BLOCK_SIZE, width, dtype=torch.uint8, device=device)
    sample = torch.randn(3, 100, KV_HEADS, head_size)
    operands = LayerOperands.of(format, head_size, torch.bfloat16, device, calibrate(format, *sample))
    for row, length in zip(table, LENGTHS, strict=True):
        token = torch.arange(length, device=device)
        slots = row[token // BLOCK_SIZE].long() * BLOCK_SIZE + token % BLOCK_SIZE
        key, value = torch.randn(2, length + 1, KV_HEADS, head_size, device=device).bfloat16().unbind()
        write(pool, layout, key, value, torch.cat([slots, slots.new_tensor([-1])]), operands)
    seq_lens = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    start = torch.tensor([0, 1, 1 + QUERIES, 1 + 2 * QUERIES, 1 + 3 * QUERIES], dtype=torch.int32, device=device)
    query = torch.randn(int(start[-1]), KV_HEADS * GROUP, head_size, device=device).bfloat16()
    output, scale = torch.empty_like(query), head_size**-0.5
    for processors in (num_sms, 1):  # many splits, and few
        plan = plan_decode(
            layout,
            requests=len(LENGTHS),
            queries=QUERIES,
            query_heads=KV_HEADS * GROUP,
            kv_heads=KV_HEADS,
            max_seq_len=max(LENGTHS),
            num_sms=processors,
        )
        scratch = torch.empty(plan.scratch_floats(head_size), device=device)
        decode(query, pool, layout, table, start, seq_lens, output, plan, operands, scratch, scale=scale)
    prefill(query, pool, layout, table, start, seq_lens, QUERIES, output, operands, scale=scale, window=100)
    key, value = torch.empty(2, sum(LENGTHS), KV_HEADS, head_size, dtype=torch.bfloat16, device=device).unbind()
    target = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    dequantize(pool, layout, table, torch.zeros_like(seq_lens), target, max(LENGTHS), key, value, operands)
    return output


def main() -> None:
    for name, format in FORMATS.items():
        if not has_kernels(format):
            continue
        for head_size in (64, 128):
            run(format, head_size, torch.device("cuda"))
            torch.cuda.synchronize()
            print(name, head_size, flush=True)


if __name__ == "__main__":
    main()
