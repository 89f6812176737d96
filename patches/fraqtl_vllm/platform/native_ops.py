"""Torch versions of vLLM's compiled operators, for wheels that have no CPU extension.

Those of `torch.ops._C` that vLLM 0.32's decoders reach on x86 and ARM, with weights that are not quantized or those
of gpt-oss:

  init_cpu_memory_env                           the CPU worker, when it is made
  greedy_argmax, fused_gumbel_argmax            the sampler
  gelu_new, gelu_fast, gelu_quick               activations look them up when they are made, and then run other code
  convert_weight_packed, weight_packed_linear   small linear layers on processors with AMX
  prepack_moe_weight, cpu_fused_moe             mixtures of experts
  convert_scale_packed, fused_experts_cpu       the same with MXFP4 weights, which also take `convert_weight_packed`

Where vLLM's own are loaded these must not be registered. Schemas are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 256  # probabilities


def _first_beyond(sums: Tensor, passed: Tensor) -> Tensor:
    """(rows,) the first place whose sum is beyond a number, at the latest the first that holds the whole sum.

    sums: (rows, n) not falling. passed: (rows, 1).
    """
    whole = sums[:, -1:]
    below = torch.minimum(passed, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(sums, below, right=True)[:, 0].clamp_max(sums.shape[1] - 1)


def draw_tokens(logits: Tensor, seeds: Tensor) -> Tensor:
    """One token a row out of softmax(logits): where the sum of the probabilities up to it passes a random number.

    logits: (rows, tokens) float32. seeds: (rows,) int64, of each row's number. (rows,) int64. One random number a row,
    in the place of one a token, takes a tenth of the time.
    """
    tokens, rows = logits.shape[1], torch.arange(len(logits))
    probabilities = logits.softmax(-1)
    if tokens % _CHUNK:
        probabilities = F.pad(probabilities, (0, -tokens % _CHUNK))
    chunks = probabilities.unflatten(-1, (-1, _CHUNK))
    sums = chunks.sum(-1).cumsum(-1, dtype=torch.float64)
    draws = [torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(x)) for x in seeds.tolist()]
    passed = torch.stack(draws) * sums[:, -1:]
    chunk = _first_beyond(sums, passed)
    before = F.pad(sums, (1, 0))[rows, chunk, None]
    token = chunk * _CHUNK + _first_beyond(before + chunks[rows, chunk].cumsum(-1, dtype=torch.float64), passed)
    return token.clamp_max(tokens - 1)


def gelu_tanh_(out: Tensor, x: Tensor) -> None:
    """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))): what both "gelu_new" and "gelu_fast" mean. Any shape."""
    out.copy_(F.gelu(x, approximate="tanh"))


def gelu_quick_(out: Tensor, x: Tensor) -> None:
    """x · sigmoid(1.702 x). Any shape."""
    out.copy_(x * torch.sigmoid(1.702 * x))


def keep_weight(weight: Tensor) -> Tensor:
    """A weight in the layout that `packed_linear` takes: its own."""
    return weight.view_as(weight)


def packed_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, is_packed: bool) -> None:
    """out (rows, n) = x (rows, k) · weight (n, k)ᵀ + bias (n,), which vLLM keeps in float32."""
    out.copy_(F.linear(x, weight, None if bias is None else bias.to(x.dtype)))


def keep_expert_weight(weight: Tensor, packed: Tensor, isa: str) -> None:
    """`packed`, of the weight's shape, in the layout that `fused_experts` takes: the weight's own."""
    packed.copy_(weight)


def fused_experts(*operands: Any) -> None:
    """`experts.fused_experts`, which is imported where a model has some: Numba comes with it."""
    from fraqtl_vllm.platform import experts

    experts.fused_experts(*operands)


def fused_quantized_experts(*operands: Any) -> None:
    """`experts.fused_quantized_experts`, in the same way."""
    from fraqtl_vllm.platform import experts

    experts.fused_quantized_experts(experts.Quantized(*operands))


NATIVE_OPS: dict[str, Callable[..., Any]] = {
    "init_cpu_memory_env(int[] nodes) -> ()": lambda nodes: None,
    "greedy_argmax(Tensor logits) -> Tensor": lambda logits: logits.argmax(-1),
    "fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor": draw_tokens,
    "gelu_new(Tensor(a!) out, Tensor input) -> ()": gelu_tanh_,
    "gelu_fast(Tensor(a!) out, Tensor input) -> ()": gelu_tanh_,
    "gelu_quick(Tensor(a!) out, Tensor input) -> ()": gelu_quick_,
    "convert_weight_packed(Tensor(a) weight) -> Tensor(a)": keep_weight,
    "weight_packed_linear(Tensor(a!) out, Tensor mat1, Tensor mat2, Tensor? bias, bool is_vnni) -> ()": packed_linear,
    "prepack_moe_weight(Tensor weight, Tensor(a!) packed_weight, str isa) -> ()": keep_expert_weight,
    "cpu_fused_moe(Tensor(a!) output, Tensor input, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, "
    "Tensor topk_weights, Tensor topk_id, bool skip_weighted, str act, str isa) -> ()": fused_experts,
    "convert_scale_packed(Tensor(a) scale) -> Tensor(a)": keep_weight,
    "fused_experts_cpu(Tensor(a!) output, Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, "
    "Tensor topk_ids, int moe_comp_method, Tensor? w1_scale, Tensor? w2_scale, Tensor? w1_zero, Tensor? w2_zero, "
    "Tensor? a1_scale, int[]? block_size, Tensor? w1_bias, Tensor? w2_bias, float? alpha, float? limit, bool is_vnni, "
    "int act_method=0) -> ()": fused_quantized_experts,
}
"""By schema."""
