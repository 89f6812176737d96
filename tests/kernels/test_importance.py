"""What errors of scores and values do to the output, against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fraqtl_kernels.calibration.importance import ROWS, attend


@pytest.mark.parametrize(
    ("window", "soft_cap", "sink"), [(None, None, None), (4, None, None), (None, 50.0, None), (4, None, 1.0)]
)
def test_importance_is_the_mean_square_effect_of_small_errors(
    window: int | None, soft_cap: float | None, sink: float | None
) -> None:
    size, tokens = 64, 10
    query, key, value = (torch.randn(tokens, heads, size) for heads in (4, 2, 2))
    options: dict[str, Any] = {"sequences": 1, "scale": 0.1, "window": window, "soft_cap": soft_cap}
    options["sink_logits"] = None if sink is None else torch.linspace(-sink, 2 * sink, 4)
    exact, importance = attend(query, key, value, **options)
    of_queries, of_values = torch.zeros(tokens, 4), torch.zeros(tokens, 2)
    for j in range(tokens):
        for head in range(2):
            for q in (2 * head, 2 * head + 1):
                for i in range(tokens):
                    moved = key.clone()  # so that the score of (i, j) is 0.01 larger
                    moved[j, head] += 0.01 * query[i, q] / (0.1 * query[i, q].square().sum())
                    out, _ = attend(query, moved, value, **options)
                    of_queries[i, q] += ((out - exact)[i, q] / 0.01).square().sum()
            moved = value.clone()
            moved[j, head, 0] += 1
            out, _ = attend(query, key, moved, **options)
            of_values[j, head] += (out - exact)[:, 2 * head : 2 * head + 2, 0].square().sum()
    torch.testing.assert_close(importance.value, of_values, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(importance.query, of_queries, rtol=0.1, atol=1e-2)


def test_sequences_do_not_see_each_other() -> None:
    query, key, value = torch.randn(12, 4, 64), torch.randn(12, 2, 64), torch.randn(12, 2, 64)
    out, importance = attend(query, key, value, sequences=2, scale=0.125)
    for part in (slice(0, 6), slice(6, 12)):
        own, its = attend(query[part], key[part], value[part], sequences=1, scale=0.125)
        assert torch.equal(out[part], own) and torch.equal(importance.query[part], its.query)
        assert torch.equal(importance.value[part], its.value)


def test_what_a_direction_of_a_values_error_costs() -> None:
    """The change of all heads' outputs times their matrices, when every value of a KV head moves along u."""
    tokens, width = 10, 24
    query, key, value = (torch.randn(tokens, heads, 64) for heads in (4, 2, 2))
    matrices = torch.randn(4, 64, width)
    options = {"sequences": 1, "scale": 0.1, "projection": matrices @ matrices.mT}
    exact, importance = attend(query, key, value, **options)
    assert importance.direction is not None and importance.direction.shape == (2, 64, 64)
    direction = torch.randn(64)
    for head in range(2):
        change = torch.zeros(())
        for j in range(tokens):  # one after another, as errors of different values are independent
            moved = value.clone()
            moved[j, head] += direction
            out, _ = attend(query, key, moved, **options)
            own = (out - exact)[:, 2 * head : 2 * head + 2]  # (tokens, 2, D): what one head adds to the sum of all
            change += torch.einsum("thd,hdw->thw", own, matrices[2 * head : 2 * head + 2]).square().sum()
        found = direction @ importance.direction[head] @ direction
        torch.testing.assert_close(found, change, rtol=1e-3, atol=1e-3)


def test_without_a_projection_no_direction_is_known() -> None:
    _, importance = attend(torch.randn(4, 2, 64), torch.randn(4, 1, 64), torch.randn(4, 1, 64), sequences=1, scale=1.0)
    assert importance.direction is None


def whole(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, soft_cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and factors of queries and values of one sequence, by the formulas of the module, in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = q @ k.mT * scale
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    tokens = torch.arange(len(query))
    distance = tokens[:, None] - tokens
    seen = (distance >= 0) & (distance < (window or len(query)))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = weights @ v
    of_queries = (weights.square() * (v[:, None] - out[:, :, None]).square().sum(-1)).sum(-1)
    of_values = weights.square().sum(1).unflatten(0, (key.shape[1], -1)).sum(1)
    return out.transpose(0, 1), of_queries.T, of_values.T


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (5, None), (ROWS + 9, None), (40, 3.0), (None, 3.0)])
def test_rows_of_queries_give_what_all_at_once_give(window: int | None, soft_cap: float | None, kv_heads: int) -> None:
    """Sequences that end within a row of queries, windows shorter and longer than one."""
    tokens = 2 * ROWS + 17
    query = torch.randn(2 * tokens, 4, 64)
    key, value = torch.randn(2, 2 * tokens, kv_heads, 64) + 0.5
    options = {"scale": 0.3, "window": window, "soft_cap": soft_cap}
    out, importance = attend(query, key, value, sequences=2, **options)
    for part in (slice(0, tokens), slice(tokens, None)):
        expected, of_queries, of_values = whole(query[part], key[part], value[part], **options)
        torch.testing.assert_close(out[part].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(importance.query[part].double(), of_queries, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(importance.value[part].double(), of_values, rtol=1e-4, atol=1e-5)


def test_sixteen_bit_inputs_are_attended_in_float32() -> None:
    query, key, value = (torch.randn(30, 2, 64).bfloat16() for _ in range(3))
    out, importance = attend(query, key, value, sequences=1, scale=0.1)
    expected, *_ = whole(query, key, value, 0.1, None, None)
    assert out.dtype == importance.query.dtype == importance.value.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
