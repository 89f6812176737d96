"""The prototype for MLA: that it computes what the model does, and what its result file says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fraqtl_bench.quality.latent.absorbed import LatentSample, capture, cost, rope_cost
from fraqtl_bench.quality.latent.forms import FORMS, Form, fit
from fraqtl_bench.quality.latent.measure import logits
from fraqtl_bench.quality.latent.model import random_model
from fraqtl_bench.reporting.pages.results import load

LAYER = 1
ERROR = 1e-3  # of a latent, so small that its square doesn't count
DRAWS = 40


@cache
def model() -> Any:
    return random_model(initializer_range=0.08)


def ids(count: int = 48, seed: int = 0) -> Tensor:
    return torch.randint(6, 2048, (count,), generator=torch.Generator().manual_seed(seed))


def form(name: str) -> Form:
    return next(form for form in FORMS if form.name == name)


@cache
def sample() -> LatentSample:
    return capture(model(), ids())[LAYER]


def test_absorbed_attention_is_that_of_the_model() -> None:
    seen: list[Tensor] = []
    hook = model().model.layers[LAYER].self_attn.register_forward_hook(lambda _, inputs, out: seen.append(out[0][0]))
    with torch.inference_mode():
        model()(ids()[None])
    hook.remove()
    torch.testing.assert_close(sample().attend(), seen[0], rtol=1e-4, atol=1e-4)


def moved(field: str, basis: Tensor) -> float:
    """Mean square of what random errors along `basis` (D, n) do to the output, per square of an error."""
    generator, exact, found = torch.Generator().manual_seed(1), sample().attend(), 0.0
    kept = getattr(sample(), field)
    for _ in range(DRAWS):
        error = torch.randn(len(kept), basis.shape[1], generator=generator) @ basis.T * ERROR
        found += float((replace(sample(), **{field: kept + error}).attend() - exact).square().sum())
    return found / DRAWS / ERROR**2


@pytest.mark.parametrize("which", ["all", "cheapest", "dearest"])
def test_errors_of_the_latent_cost_what_is_predicted(which: str) -> None:
    predicted = cost(sample())
    axes = torch.linalg.eigh(predicted).eigenvectors
    basis = {"all": axes, "cheapest": axes[:, :16], "dearest": axes[:, -16:]}[which]
    assert moved("latent", basis) == pytest.approx(float((basis.T @ predicted @ basis).trace()), rel=0.1)


def test_neither_scores_nor_values_alone_predict_it() -> None:
    both, parts = cost(sample()), (cost(sample(), of_values=False), cost(sample(), of_scores=False))
    assert all(float(part.trace()) < 0.9 * float(both.trace()) for part in parts)
    assert not torch.allclose(both, parts[0] + parts[1], rtol=1e-3)


def test_errors_of_the_key_with_its_position_cost_what_is_predicted() -> None:
    predicted = rope_cost(sample())
    assert moved("rope_key", torch.eye(len(predicted))) == pytest.approx(float(predicted.trace()), rel=0.1)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("bf16", 1152),
        ("fp8_ds_mla", 656),
        ("latent 8", 642),
        ("latent 8, rope 8", 580),
        ("latent 4, basis of both", 386),
        ("latent 4, basis of both, rope 8", 324),
        ("latent 4, basis of both, rope 4", 292),
    ],
)
def test_bytes_of_a_token(name: str, size: int) -> None:
    assert form(name).token_bytes == size


def test_forms_move_the_logits_in_their_order() -> None:
    captured = capture(model(), ids(256)), capture(model(), ids(256, seed=1))
    exact = logits(model(), ids(128, seed=2), None)
    errors = {}
    for name in ("bf16", "latent 8", "latent 4, rotated", "latent 4, basis of both"):
        layers = [fit(form(name), of_layer) for of_layer in zip(*captured, strict=True)]
        errors[name] = float((logits(model(), ids(128, seed=2), layers) - exact).square().mean())
    assert 0 < errors["bf16"] < errors["latent 8"] < errors["latent 4, basis of both"] < errors["latent 4, rotated"]


def test_the_result_file_has_every_form() -> None:
    rows = {row["form"]: row for row in load("cpu/quality/latent.json").data["forms"]}
    assert {name: row["token_bytes"] for name, row in rows.items()} == {form.name: form.token_bytes for form in FORMS}
    assert rows["latent 4, basis of both"]["kl"] < rows["latent 4, rotated"]["kl"]
