"""Run by test_quality_rivals.py in a process of its own: what vLLM's kernels write, under Triton's interpreter.

vLLM decides at its import whether there is Triton, and believes in it without a driver only if no GPU may be seen.
Argument: a file, for the tensors of every format by name.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

SIZE, HEADS, TOKENS, BLOCK = 64, 3, 5, 16


def vectors() -> torch.Tensor:
    """(TOKENS, HEADS, SIZE)."""
    x = torch.randn(TOKENS, HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    return x * torch.linspace(0.2, 3, SIZE) + torch.linspace(-1, 1, SIZE)


def int4() -> dict[str, torch.Tensor]:
    from vllm.v1.attention.ops.int4_per_token_head import reshape_and_cache_int4

    codes, scales = (torch.zeros(1, BLOCK, HEADS, n, dtype=torch.uint8) for n in (SIZE // 2, 4))
    others = torch.zeros_like(codes), torch.zeros(1, BLOCK, HEADS)
    scale = scales.view(torch.float32)[..., 0]
    x = vectors()
    slots = torch.arange(TOKENS)
    reshape_and_cache_int4(x, x, codes, others[0], slots, k_scale_cache=scale, v_scale_cache=others[1])
    return {"int4 codes": codes[0, :TOKENS], "int4 scale": scale[0, :TOKENS].clone()}


def turboquant(bits: int) -> dict[str, torch.Tensor]:
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.backends.turboquant_attn import _build_hadamard
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    config = TurboQuantConfig.from_cache_dtype(f"turboquant_{bits}bit_nc", SIZE)
    levels = get_centroids(SIZE, bits)
    cache = torch.zeros(1, BLOCK, HEADS, config.slot_size_aligned, dtype=torch.uint8)
    triton_turboquant_store(
        vectors(), vectors(), cache, torch.arange(TOKENS), _build_hadamard(SIZE, "cpu"), (levels[1:] + levels[:-1]) / 2,
        bits, config.key_packed_size, bits,
    )  # fmt: skip
    return {f"turboquant {bits}": cache[0, :TOKENS], f"levels {bits}": levels}


if __name__ == "__main__":
    torch.save(int4() | turboquant(4) | turboquant(3), Path(sys.argv[1]))
