"""Every kernel once on small shapes, for a checker of memory accesses to watch.

    compute-sanitizer --tool memcheck python -m fraqtl_bench.kernels.sanitize [--formats k4v4] [--head-sizes 128]

Lengths end inside blocks and tiles, slots are skipped, blocks are shuffled, one pool ends with the last page.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.formats import FORMATS, KVFormat
from fraqtl_kernels.gpu.constexprs import has_kernels
from fraqtl_kernels.gpu.decode import decode
from fraqtl_kernels.gpu.gather import dequantize
from fraqtl_kernels.gpu.operands import LayerOperands
from fraqtl_kernels.gpu.plan import plan_decode
from fraqtl_kernels.gpu.prefill import prefill
from fraqtl_kernels.gpu.write import write
from fraqtl_kernels.pages import PageLayout

LENGTHS = (1, 17, 300, 555)
QUERIES = 3
HEAD_SIZES = (64, 128)
KV_HEADS, GROUP, BLOCK_SIZE = 2, 4, 16


def run(
    format: KVFormat,
    head_size: int,
    device: torch.device,
    num_sms: int = 132,
    lengths: Sequence[int] = LENGTHS,
) -> Tensor:
    """Write, decode (split and direct), prefill, dequantize; the last output, so that a caller can look at it.

    lengths: of four requests.
    """
    layout = PageLayout(format, head_size, BLOCK_SIZE)
    blocks = [-(-n // BLOCK_SIZE) for n in lengths]
    order = torch.randperm(sum(blocks)).int()
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for row, part in zip(table, order.split(blocks), strict=True):
        row[: len(part)] = part
    table = table.to(device)
    width = format.bytes_per_token(head_size)
    pool = torch.zeros(sum(blocks), KV_HEADS, BLOCK_SIZE, width, dtype=torch.uint8, device=device)
    sample = torch.randn(3, 100, KV_HEADS, head_size)
    operands = LayerOperands.of(format, head_size, torch.bfloat16, device, calibrate(format, *sample))
    for row, length in zip(table, lengths, strict=True):
        token = torch.arange(length, device=device)
        slots = row[token // BLOCK_SIZE].long() * BLOCK_SIZE + token % BLOCK_SIZE
        key, value = torch.randn(2, length + 1, KV_HEADS, head_size, device=device).bfloat16().unbind()
        write(pool, layout, key, value, torch.cat([slots, slots.new_tensor([-1])]), operands)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    start = torch.tensor([0, 1, 1 + QUERIES, 1 + 2 * QUERIES, 1 + 3 * QUERIES], dtype=torch.int32, device=device)
    query = torch.randn(int(start[-1]), KV_HEADS * GROUP, head_size, device=device).bfloat16()
    output, scale = torch.empty_like(query), head_size**-0.5
    for processors in (num_sms, 1):  # many splits, and few
        plan = plan_decode(
            layout,
            requests=len(lengths),
            queries=QUERIES,
            query_heads=KV_HEADS * GROUP,
            kv_heads=KV_HEADS,
            max_seq_len=max(lengths),
            num_sms=processors,
        )
        scratch = torch.empty(plan.scratch_floats(head_size), device=device)
        decode(query, pool, layout, table, start, seq_lens, output, plan, operands, scratch, scale=scale)
    prefill(query, pool, layout, table, start, seq_lens, QUERIES, output, operands, scale=scale, window=100)
    key, value = torch.empty(2, sum(lengths), KV_HEADS, head_size, dtype=torch.bfloat16, device=device).unbind()
    target = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    dequantize(pool, layout, table, torch.zeros_like(seq_lens), target, max(lengths), key, value, operands)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=[n for n, f in FORMATS.items() if has_kernels(f)])
    parser.add_argument("--head-sizes", nargs="+", type=int, default=HEAD_SIZES)
    parser.add_argument("--lengths", nargs=4, type=int, default=LENGTHS, help="tokens of the four requests")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args()
    for name in args.formats:
        for head_size in args.head_sizes:
            output = run(FORMATS[name], head_size, torch.device(args.device), lengths=args.lengths)
            if args.device == "cuda":
                torch.cuda.synchronize()
            print(name, head_size, "finite" if output.isfinite().all() else "NOT FINITE", flush=True)


if __name__ == "__main__":
    main()
