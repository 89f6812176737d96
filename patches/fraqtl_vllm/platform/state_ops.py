"""Torch versions of vLLM's compiled operators for layers that keep a state, for wheels that have no CPU extension.

Those of `torch.ops._C` that hybrid models reach through vLLM's own CPU layers:

  causal_conv1d_update_cpu_vec                  one token of a causal convolution, any family
  mamba_chunk_scan_fwd_cpu                      prompts of Mamba2 layers
  selective_state_update_cpu                    one token of Mamba2 layers
  fused_gdn_gating_cpu                          decay and step size of gated delta layers
  chunk_gated_delta_rule_cpu                    prompts of gated delta layers
  fused_sigmoid_gating_delta_rule_update_cpu    one token of gated delta layers
  fused_sigmoid_gating_delta_rule_update_spec_cpu    a token and its drafts of gated delta layers
  causal_conv1d_weight_pack, _fwd_cpu, _update_cpu   the convolutions of gated delta layers on processors with bf16

Recurrences run token by token in float32, a prompt as a decode. So how a prompt was cut changes a state by rounding
only, that to the dtype of the pool's states (`--mamba-ssm-cache-dtype`) included.

Schemas are vLLM's. A state is one row of the pool; `null` rows are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fraqtl_kernels.errors import UnsupportedError

NORM_EPS = 1e-6  # of the norm of queries and keys: that of the checkpoints' own code and of vLLM's GPU kernels


def _refuse_drafts(*given: Tensor | None) -> None:
    if any(one is not None for one in given):
        raise UnsupportedError("states of several draft tokens need vLLM's CPU build: leave --speculative-config out")


def _sequences(starts: Tensor) -> Iterator[tuple[int, int, int]]:
    """(number, first token, end) of every sequence that has a token. starts: (sequences + 1,)."""
    for i, (first, end) in enumerate(pairwise(starts.tolist())):
        if end > first:
            yield i, first, end


# ---- causal convolution


def convolve(window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """(rows, dim) float32: of every channel the sum of its last tokens, weighed. window: (rows, dim, width)."""
    out = (window.float() * weight.float()).sum(-1)
    if bias is not None:
        out = out + bias.float()
    return F.silu(out) if silu else out


def convolve_one(
    x: Tensor,
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    rows: Tensor | None,
    starts: Tensor | None,
    null: int,
) -> Tensor:
    """One token a sequence. x: (sequences, dim). states: (pool, dim, width - 1), moved on by the token. -> like x.

    weight: (dim, width). rows: (sequences,) of the pool. starts: None, one token each.
    """
    _refuse_drafts(starts)
    states = states[..., : weight.shape[1] - 1]
    index = torch.arange(len(x)) if rows is None else rows.reshape(len(x), -1)[:, 0].long()
    window = torch.cat([states[index], x.unsqueeze(-1).to(states.dtype)], dim=-1)
    real = index != null
    states[index[real]] = window[real][..., 1:]
    return convolve(window, weight, bias, activation in ("silu", "swish")).to(x.dtype)


def keep_conv_weight(weight: Tensor) -> Tensor:
    """(dim, width): in the layout that the next two take, its own."""
    return weight.clone()


def convolve_prompts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor | None,
    starts: Tensor | None,
    rows: Tensor | None,
    has_state: Tensor | None,
    silu: bool,
    null: int,
    is_packed: bool,
) -> Tensor:
    """Many tokens a sequence. x: (dim, tokens). states: (pool, dim, width - 1), left as they are at the end.

    weight: (dim, width), or (dim, 1, width) where vLLM packs none: it does in bfloat16 only.
    """
    assert states is not None and starts is not None and rows is not None
    weight = weight.flatten(1)
    out, before = torch.empty_like(x), weight.shape[1] - 1
    for i, first, end in _sequences(starts):
        row = int(rows[i])
        if row == null:
            continue
        known = states[row, :, :before]  # with drafts there is room for theirs behind
        if has_state is not None and not bool(has_state[i]):
            known = torch.zeros_like(known)
        whole = torch.cat([known, x[:, first:end].to(states.dtype)], dim=-1)
        windows = whole.unfold(-1, before + 1, 1).transpose(0, 1)
        out[:, first:end] = convolve(windows, weight, bias, silu).T.to(x.dtype)
        states[row, :, :before] = whole[:, -before:]
    return out


def convolve_drafts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    rows: Tensor,
    accepted: Tensor,
    starts: Tensor,
    silu: bool,
) -> Tensor:
    """A few tokens a sequence, of which the last ones may be taken back. (tokens, dim) like x.

    weight: (dim, width). states: (pool, dim, width - 1 + drafts). rows: (sequences,) of them, each <- what the next
    step needs, however many tokens are accepted: the width - 2 tokens before this step, and then its own. accepted:
    (sequences,) how many tokens of the step before counted. starts: (sequences + 1,).
    """
    before, out = weight.shape[1] - 1, torch.empty_like(x)
    for i, first, end in _sequences(starts):
        row, taken = int(rows[i]), int(accepted[i])
        known = states[row, :, taken - 1 : taken - 1 + before]
        whole = torch.cat([known, x[first:end].T.to(states.dtype)], dim=-1)
        out[first:end] = convolve(whole.unfold(-1, before + 1, 1).transpose(0, 1), weight, bias, silu).to(x.dtype)
        states[row, :, : whole.shape[1] - 1] = whole[:, 1:]
    return out


def convolve_one_packed(
    x: Tensor,
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    accepted: Tensor | None,
    rows: Tensor | None,
    null: int,
    is_packed: bool,
) -> Tensor:
    """`convolve_one` in other words, with a weight as `convolve_prompts` takes it.

    With `accepted` x is (sequences, tokens, dim), and it is `convolve_drafts`.
    """
    if accepted is None:
        return convolve_one(x, states, weight.flatten(1), bias, "silu" if silu else None, rows, None, null)
    assert rows is not None
    starts = torch.arange(x.shape[0] + 1) * x.shape[1]
    return convolve_drafts(x.flatten(0, 1), weight.flatten(1), bias, states, rows, accepted, starts, silu).view_as(x)


# ---- Mamba2: h = exp(Δ A) h + Δ x Bᵀ, y = h C + D x


def _mamba_step(h: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """h: (..., heads, dim, n). x: (..., heads, dim). dt, a: broadcast over h. b, c: (..., heads, n). All float32."""
    h = torch.exp(dt * a) * h + dt * x.unsqueeze(-1) * b.unsqueeze(-2)
    return h, (h * c.unsqueeze(-2)).sum(-1)


def _per_head(groups: Tensor, heads: int) -> Tensor:
    """(..., groups, n) -> (..., heads, n) float32: neighboring heads share a group."""
    return groups.float().repeat_interleave(heads // groups.shape[-2], dim=-2)


def mamba_prompts(
    out: Tensor,
    states: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    starts: Tensor,
) -> None:
    """out, x: (tokens, heads, dim). states: (sequences, heads, dim, n) float32, moved on. dt: (tokens, heads), after
    its softplus. a, d: (heads,). b, c: (tokens, groups, n). z: None, or a gate like x."""
    heads = x.shape[1]
    step_a = a.float()[:, None, None]
    for i, first, end in _sequences(starts):
        h = states[i]
        for t in range(first, end):
            step_dt = dt[t].float()[:, None, None]
            h, y = _mamba_step(h, x[t].float(), step_dt, step_a, _per_head(b[t], heads), _per_head(c[t], heads))
            out[t] = _skip_and_gate(y, x[t], None if d is None else d[:, None], None if z is None else z[t])
        states[i] = h


def _skip_and_gate(y: Tensor, x: Tensor, d: Tensor | None, z: Tensor | None) -> Tensor:
    if d is not None:
        y = y + d.float() * x.float()
    return y if z is None else y * F.silu(z.float())


def mamba_one(  # noqa: PLR0917 (vLLM's order)
    states: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    rows: Tensor | None,
    rows_to: Tensor | None,
    null: int,
    out: Tensor,
    accepted: Tensor | None,
    starts: Tensor | None,
) -> None:
    """One token a sequence. states: (pool, heads, dim, n). x, dt, z, out: (sequences, heads, dim). a: (heads, dim, n).
    b, c: (sequences, groups, n). d, dt_bias: (heads, dim)."""
    _refuse_drafts(accepted, starts)
    heads = x.shape[1]
    index = torch.arange(len(x)) if rows is None else rows.reshape(len(x), -1)[:, 0].long()
    target = index if rows_to is None else rows_to.reshape(len(x), -1)[:, 0].long()
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    if softplus:
        step = F.softplus(step)
    h, y = _mamba_step(
        states[index].float(), x.float(), step.unsqueeze(-1), a.float(), _per_head(b, heads), _per_head(c, heads)
    )
    out.copy_(_skip_and_gate(y, x, d, z))
    real = target != null
    states[target[real]] = h[real].to(states.dtype)


# ---- gated delta rule: S = g S + k (β (v - (g S)ᵀ k))ᵀ, o = Sᵀ q


def delta_gates(a_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """ln g = -exp(a_log) softplus(a + dt_bias) and β = σ(b), (1, tokens, heads) float32. a, b: (tokens, heads)."""
    g = -torch.exp(a_log.float()) * F.softplus(a.float() + dt_bias.float())
    return g.unsqueeze(0), torch.sigmoid(b.float()).unsqueeze(0)


def _delta_step(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """s: (..., heads, K, V). q, k: (..., heads, K). v: (..., heads, V). g (its logarithm), beta: (..., heads)."""
    s = s * torch.exp(g)[..., None, None]
    error = (v - (s * k.unsqueeze(-1)).sum(-2)) * beta.unsqueeze(-1)
    s = s + k.unsqueeze(-1) * error.unsqueeze(-2)
    return s, (s * q.unsqueeze(-1)).sum(-2)


def _unit(x: Tensor, heads: int, is_normed: bool) -> Tensor:
    """(..., key heads, K) -> (..., heads, K) float32 of length one: neighboring heads share a key head."""
    x = x.float()
    if is_normed:
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)
    return x.repeat_interleave(heads // x.shape[-2], dim=-2)


def delta_prompts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    returns_states: bool,
    starts: Tensor,
    head_first: bool,
    is_normed: bool,
    rows: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """query, key: (1, tokens, key heads, K). value: (1, tokens, heads, V). states: (pool, heads, K, V), moved on.

    Returns the output like `value`, and the states at the end. eps: vLLM's default for its own kernel; see NORM_EPS.
    """
    assert not head_first
    heads = value.shape[2]
    q = _unit(query[0], heads, is_normed) * query.shape[-1] ** -0.5
    k, v = _unit(key[0], heads, is_normed), value[0].float()
    out = torch.empty_like(value)
    for i, first, end in _sequences(starts):
        s = states[rows[i]].float()
        for t in range(first, end):
            s, out[0, t] = _delta_step(s, q[t], k[t], v[t], g[0, t], beta[0, t])
        states[rows[i]] = s.to(states.dtype)
    return out, states[rows.long()]


def delta_one(  # noqa: PLR0917 (vLLM's order)
    a_log: Tensor,
    dt_bias: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    states: Tensor,
    rows: Tensor,
    starts: Tensor,
    is_normed: bool,
    softplus_beta: float,
    softplus_threshold: float,
) -> Tensor:
    """One token a sequence, as in `delta_prompts`; a, b: (sequences, heads). Returns (sequences, 1, heads, V)."""
    heads, index = value.shape[2], rows.long()
    g, beta = delta_gates(a_log, a, b, dt_bias)
    q = _unit(query[0], heads, is_normed) * query.shape[-1] ** -0.5
    s, out = _delta_step(states[index].float(), q, _unit(key[0], heads, is_normed), value[0].float(), g[0], beta[0])
    states[index] = s.to(states.dtype)
    return out.to(value.dtype).unsqueeze(1)


def delta_drafts(  # noqa: PLR0917 (vLLM's order)
    a_log: Tensor,
    dt_bias: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    states: Tensor,
    rows: Tensor,
    accepted: Tensor,
    starts: Tensor,
    is_normed: bool,
    softplus_beta: float,
    softplus_threshold: float,
) -> Tensor:
    """A few tokens a sequence, as in `delta_one`, with a row of the pool for the state after each of them.

    rows: (sequences, tokens at most). accepted: (sequences,) how many tokens of the step before counted: this step
    begins with the state after the last of them. query, key: (tokens, key heads, K). a, b: (tokens, heads). Returns
    (tokens, heads, V) like `value`.
    """
    heads = value.shape[1]
    g, beta = delta_gates(a_log, a, b, dt_bias)
    q, k = _unit(query, heads, is_normed) * query.shape[-1] ** -0.5, _unit(key, heads, is_normed)
    out = torch.empty_like(value)
    for i, first, end in _sequences(starts):
        s = states[rows[i, accepted[i] - 1]].float()
        for t in range(first, end):
            s, out[t] = _delta_step(s, q[t], k[t], value[t].float(), g[0, t], beta[0, t])
            states[rows[i, t - first]] = s.to(states.dtype)
    return out


STATE_OPS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_update_cpu_vec(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, str? activation, "
    "Tensor? conv_state_indices, Tensor? query_start_loc, int pad_slot_id) -> Tensor": convolve_one,
    "causal_conv1d_weight_pack(Tensor weight) -> Tensor": keep_conv_weight,
    "causal_conv1d_fwd_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? conv_states, Tensor? query_start_loc, "
    "Tensor? cache_indices, Tensor? has_initial_state, bool silu_activation, int pad_slot_id, bool is_vnni) "
    "-> Tensor": convolve_prompts,
    "causal_conv1d_update_cpu(Tensor x, Tensor(a!) conv_states, Tensor weight, Tensor? bias, bool silu_activation, "
    "Tensor? num_accepted_tokens, Tensor? conv_state_indices, int pad_slot_id, bool is_vnni) "
    "-> Tensor": convolve_one_packed,
    "mamba_chunk_scan_fwd_cpu(Tensor(a!) out, Tensor(b!) final_states, Tensor x, Tensor dt, Tensor A, Tensor B, "
    "Tensor C, Tensor? D, Tensor? z, Tensor cu_seqlens) -> ()": mamba_prompts,
    "selective_state_update_cpu(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices, Tensor? dst_state_batch_indices, "
    "int null_block_id, Tensor(b!) out, Tensor? num_accepted_tokens, Tensor? cu_seqlens) -> ()": mamba_one,
    "fused_gdn_gating_cpu(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)": delta_gates,
    "chunk_gated_delta_rule_cpu(Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, "
    "Tensor(a!) initial_state, bool output_final_state, Tensor cu_seqlens, bool head_first, "
    "bool use_qk_l2norm_in_kernel, Tensor initial_state_indices, float eps) -> (Tensor, Tensor)": delta_prompts,
    "fused_sigmoid_gating_delta_rule_update_cpu(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, Tensor v, Tensor a, "
    "Tensor b, Tensor(a!) initial_state_source, Tensor initial_state_indices, Tensor cu_seqlens, "
    "bool use_qk_l2norm_in_kernel, float softplus_beta, float softplus_threshold) -> Tensor": delta_one,
    "fused_sigmoid_gating_delta_rule_update_spec_cpu(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, Tensor v, "
    "Tensor a, Tensor b, Tensor(a!) initial_state_source, Tensor spec_state_indices, Tensor num_accepted_tokens, "
    "Tensor cu_seqlens, bool use_qk_l2norm_in_kernel, float softplus_beta, float softplus_threshold) "
    "-> Tensor": delta_drafts,
}
"""By schema."""
