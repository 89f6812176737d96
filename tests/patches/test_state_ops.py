"""Torch versions of the operators of layers with a state, through vLLM's own wrappers: against sums that are written
differently, and against transformers. A prompt may be cut anywhere."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_fn_cpu, causal_conv1d_update_cpu
from vllm.model_executor.layers.mamba.ops.cpu.mamba_ssm import _mamba_chunk_scan_combined_fwd_cpu
from vllm.platforms import current_platform

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm.platform.cpu_platform import CpuWithoutNativeOps
from fraqtl_vllm.platform.state_copies import copy_states

pytestmark = pytest.mark.skipif(
    not isinstance(current_platform, CpuWithoutNativeOps), reason="vLLM runs on another platform here"
)
LENGTHS = (7, 1, 12)
TOKENS = sum(LENGTHS)
STARTS = torch.tensor([0, 7, 8, 20])
ROWS = torch.tensor([3, 1, 4], dtype=torch.int32)
POOL = 6


@pytest.fixture(autouse=True)
def _operators() -> None:
    CpuWithoutNativeOps.import_kernels()
    torch.manual_seed(0)


def close(found: Tensor, expected: Tensor) -> None:
    """But for the last bits: where a number lies in a vector register decides how exp rounds it."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def sequences() -> list[slice]:
    return [slice(int(a), int(b)) for a, b in pairwise(STARTS)]


# ---- convolutions

DIM, WIDTH = 10, 4


def convolved(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """x: (tokens, dim) of one sequence from its start."""
    out = F.conv1d(F.pad(x.T[None], (WIDTH - 1, 0)), weight[:, None], bias, groups=DIM)[0].T
    return F.silu(out) if silu else out


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("kind", ["plain", "packed", "of a layer"])
def test_convolution_of_prompts_and_then_of_single_tokens(silu: bool, kind: str) -> None:
    x, weight, bias = torch.randn(TOKENS + 3, DIM), torch.randn(DIM, WIDTH), torch.randn(DIM)
    states = torch.full((POOL, WIDTH - 1, DIM), float("nan")).transpose(1, 2)
    fresh = torch.zeros(3, dtype=torch.bool)
    prompts = x[:TOKENS].T
    if kind != "plain":
        kept = ops.causal_conv1d_weight_pack(weight) if kind == "packed" else weight[:, None]
        out = ops.causal_conv1d_fwd_cpu(prompts, kept, bias, states, STARTS, ROWS, fresh, silu, True)
        one = ops.causal_conv1d_update_cpu(x[TOKENS:], states, kept, bias, silu, ROWS, True)
    else:
        activation = "silu" if silu else None
        out = causal_conv1d_fn_cpu(prompts, weight, bias, states, STARTS, ROWS, fresh, activation)
        one = causal_conv1d_update_cpu(x[TOKENS:], states, weight, bias, activation, conv_state_indices=ROWS)
    for i, part in enumerate(sequences()):
        whole = convolved(torch.cat([x[part], x[TOKENS + i][None]]), weight, bias, silu)
        torch.testing.assert_close(torch.cat([out.T[part], one[i][None]]), whole)
    assert states[[0, 2, 5]].isnan().all()  # nobody's


def test_padding_moves_no_state() -> None:
    states = torch.randn(POOL, DIM, WIDTH - 1)
    before, rows = states.clone(), torch.tensor([0, 2])  # block 0 means none
    causal_conv1d_update_cpu(torch.randn(2, DIM), states, torch.randn(DIM, WIDTH), conv_state_indices=rows)
    assert [bool((a != b).any()) for a, b in zip(states, before, strict=True)] == [False, False, True] + [False] * 3


# ---- Mamba2

HEADS, HEAD_DIM, GROUPS, STATE = 4, 6, 2, 5


def mamba_inputs() -> dict[str, Tensor]:
    return {
        "x": torch.randn(TOKENS, HEADS, HEAD_DIM),
        "dt": torch.randn(TOKENS, HEADS),
        "A": -torch.rand(HEADS),
        "B": torch.randn(TOKENS, GROUPS, STATE),
        "C": torch.randn(TOKENS, GROUPS, STATE),
        "D": torch.randn(HEADS),
        "dt_bias": torch.randn(HEADS),
    }


def every_pair(of: dict[str, Tensor], part: slice) -> Tensor:
    """y_t = Σ_{s ≤ t} (C_t · B_s) exp(A Σ_{s < r ≤ t} Δ_r) Δ_s x_s + D x_t in float64: no state anywhere."""
    x, dt, b, c = (of[name][part].double() for name in ("x", "dt", "B", "C"))
    dt = F.softplus(dt + of["dt_bias"].double())
    b, c = (z.repeat_interleave(HEADS // GROUPS, dim=1) for z in (b, c))
    sums = dt.cumsum(0)
    decay = torch.exp(of["A"].double() * (sums[:, None] - sums[None]))
    weight = torch.einsum("thn,shn->tsh", c, b) * decay * dt[None]
    weight *= torch.ones(len(x), len(x)).tril()[..., None]
    return torch.einsum("tsh,shd->thd", weight, x) + of["D"].double()[:, None] * x


def scan(of: dict[str, Tensor], part: slice, states: Tensor | None) -> tuple[Tensor, Tensor]:
    """One sequence's tokens through vLLM's CPU version of its scan."""
    out = torch.full((len(of["x"][part]), HEADS, HEAD_DIM), float("nan"))
    mine = {name: of[name][part] for name in ("x", "dt", "B", "C")}
    starts = torch.tensor([0, len(out)])
    end = _mamba_chunk_scan_combined_fwd_cpu(
        **mine,
        A=of["A"],
        D=of["D"],
        dt_bias=of["dt_bias"],
        chunk_size=8,
        out=out,
        dt_softplus=True,
        initial_states=states,
        cu_seqlens=starts,
    )
    return out, end


def update(of: dict[str, Tensor], tokens: Tensor, states: Tensor, rows: Tensor) -> Tensor:
    """One token a sequence through vLLM's wrapper, with its layer's shapes."""
    out = torch.full((len(tokens), HEADS, HEAD_DIM), float("nan"))
    wide = of["A"][:, None, None].expand(-1, HEAD_DIM, STATE)
    per_dim = {name: of[name][:, None].expand(-1, HEAD_DIM) for name in ("D", "dt_bias")}
    x, dt, b, c = (of[name][tokens] for name in ("x", "dt", "B", "C"))
    dt = dt[..., None].expand(-1, -1, HEAD_DIM)
    ops.selective_state_update_cpu(
        states, x, dt, wide, b, c, per_dim["D"], None, per_dim["dt_bias"], True, rows, rows, 0, out, None, None
    )
    return out


def test_mamba_scan_is_the_sum_over_all_pairs() -> None:
    of = mamba_inputs()
    out = torch.full((TOKENS, HEADS, HEAD_DIM), float("nan"))
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias")
    _mamba_chunk_scan_combined_fwd_cpu(
        **{name: of[name] for name in names}, chunk_size=8, out=out, dt_softplus=True, cu_seqlens=STARTS
    )
    for part in sequences():
        torch.testing.assert_close(out[part].double(), every_pair(of, part), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_mamba_chunks_and_single_tokens_go_on(cut: int) -> None:
    of, part = mamba_inputs(), sequences()[2]
    whole, end = scan(of, part, None)
    first, middle = scan(of, slice(part.start, part.start + cut), None)
    rest, last = scan(of, slice(part.start + cut, part.stop), middle)
    close(torch.cat([first, rest]), whole)
    close(last, end)
    states = torch.randn(POOL, HEADS, HEAD_DIM, STATE)
    states[4] = middle[0]
    single = [update(of, torch.tensor([t]), states, torch.tensor([[4]])) for t in range(part.start + cut, part.stop)]
    close(torch.cat(single), rest)
    close(states[4], end[0])


def test_mamba_states_of_others_and_of_padding_stay() -> None:
    of, states = mamba_inputs(), torch.randn(POOL, HEADS, HEAD_DIM, STATE)
    before = states.clone()
    update(of, torch.tensor([3, 9]), states, torch.tensor([5, 0]))
    assert [bool((a != b).any()) for a, b in zip(states, before, strict=True)] == [False] * 5 + [True]


# ---- gated delta rule

KEY_HEADS, K, V = 2, 8, 6


def delta_inputs() -> dict[str, Tensor]:
    return {
        "query": torch.randn(1, TOKENS, KEY_HEADS, K),
        "key": torch.randn(1, TOKENS, KEY_HEADS, K),
        "value": torch.randn(1, TOKENS, HEADS, V),
        "a": torch.randn(TOKENS, HEADS),
        "b": torch.randn(TOKENS, HEADS),
        "a_log": torch.rand(HEADS),
        "dt_bias": torch.randn(HEADS),
    }


def by_transformers(of: dict[str, Tensor], part: slice) -> tuple[Tensor, Tensor]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    query, key = (of[x][:, part].repeat_interleave(HEADS // KEY_HEADS, dim=2) for x in ("query", "key"))
    g = -of["a_log"].exp() * F.softplus(of["a"][part] + of["dt_bias"])
    out, state = torch_recurrent_gated_delta_rule(
        query,
        key,
        of["value"][:, part],
        g=g[None],
        beta=of["b"][part].sigmoid()[None],
        initial_state=None,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return out[0], state[0]


def delta(of: dict[str, Tensor], part: slice, states: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    g, beta = ops.fused_gdn_gating_cpu(of["a_log"], of["a"][part], of["b"][part], of["dt_bias"])
    query, key, value = (of[x][:, part] for x in ("query", "key", "value"))
    out, _ = ops.chunk_gated_delta_rule_cpu(query, key, value, g, beta, states, True, starts, False, True, rows)
    return out[0]


def test_delta_rule_is_that_of_transformers() -> None:
    of, states = delta_inputs(), torch.zeros(POOL, HEADS, K, V)
    out = delta(of, slice(0, TOKENS), states, ROWS, STARTS)
    for row, part in zip(ROWS.tolist(), sequences(), strict=True):
        expected, state = by_transformers(of, part)
        torch.testing.assert_close(out[part], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[row], state, rtol=1e-4, atol=1e-5)
    assert not states[[0, 2, 5]].any()


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_delta_chunks_and_single_tokens_go_on(cut: int) -> None:
    of, part, row = delta_inputs(), sequences()[2], torch.tensor([4])
    ends = slice(part.start, part.start + cut), slice(part.start + cut, part.stop)
    states, pieces, single = (torch.zeros(POOL, HEADS, K, V) for _ in range(3))
    whole = delta(of, part, states, row, torch.tensor([0, 12]))
    first = delta(of, ends[0], pieces, row, torch.tensor([0, cut]))
    single.copy_(pieces)
    rest = delta(of, ends[1], pieces, row, torch.tensor([0, 12 - cut]))
    close(torch.cat([first, rest]), whole)
    close(pieces, states)
    steps = [
        ops.fused_sigmoid_gating_delta_rule_update_cpu(
            of["a_log"],
            of["dt_bias"],
            *(of[x][:, t : t + 1] for x in ("query", "key", "value")),
            *(of[x][t : t + 1] for x in ("a", "b")),
            single,
            row,
            torch.tensor([0, 1]),
            True,
        )
        for t in range(ends[1].start, ends[1].stop)
    ]
    close(torch.cat(steps).squeeze(1), rest)
    close(single, states)


# ---- what they don't do, and how a state gets into the next block


def test_several_draft_tokens_are_refused() -> None:
    x: Any = torch.zeros(1, DIM)
    with pytest.raises(UnsupportedError, match=r"^states of several draft tokens need vLLM's CPU build: leave --spec"):
        causal_conv1d_update_cpu(x, torch.zeros(2, DIM, 3), torch.zeros(DIM, 4), query_start_loc=torch.tensor([0, 1]))


def test_states_are_copied_by_address() -> None:
    source, target = torch.arange(12.0), torch.zeros(12)
    size = 4 * source.element_size()
    addresses = [torch.tensor([x.data_ptr() + 16, x.data_ptr()]) for x in (source, target)]
    copy_states(*addresses, torch.tensor([size, 4]), BLOCK_SIZE=1024)
    assert target.tolist() == [0.0, 0, 0, 0, 4, 5, 6, 7, 0, 0, 0, 0]
