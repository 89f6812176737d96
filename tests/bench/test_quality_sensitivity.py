"""What single layers cost, against whole passes that share nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fraqtl_bench.quality.cache import logits
from fraqtl_bench.quality.divergence import compare
from fraqtl_bench.quality.fitted import Fitted, fit
from fraqtl_bench.quality.methods import BASELINE, parse
from fraqtl_bench.quality.sensitivity import Below
from fraqtl_bench.quality.texts import Window
from fraqtl_bench.quality.watch import calibration_samples
from tests.bench.quality_models import ARCHITECTURES, random_subject, token_ids

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_costs_are_those_of_whole_passes_and_layers_below_are_left_out(kind: str) -> None:
    subject, window = random_subject(kind), Window(0, token_ids(60), 5)
    samples = calibration_samples(subject.model, token_ids(80, seed=1))
    exact, stored = (fit(parse(name), samples) for name in (BASELINE, "k4v2"))
    below = Below(subject, window, exact)
    ran: list[int] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: ran.append(module.layer_idx))
        for module in _attentions(subject.model)
    ]
    found = [below.divergence(layer, stored) for layer in range(subject.layers)]
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 0, 1, 1]  # once to know them, then from the stored layer on
    reference = _logits(subject.model, window, exact)
    for layer, cost in enumerate(found):
        mixed = [*exact.layers]
        mixed[layer] = stored.layers[layer]
        alone = _logits(subject.model, window, Fitted(exact.method, tuple(mixed)))
        assert cost == pytest.approx(sum(compare(alone, reference, window.first).kl), rel=1e-6)
        assert cost > 1e-4
    assert torch.equal(_logits(subject.model, window, exact), reference)  # the model is as it was


def _attentions(model: Any) -> list[Any]:
    return [module for module in model.modules() if "Attention" in type(module).__name__]


def _logits(model: Any, window: Window, fitted: Fitted) -> torch.Tensor:
    return logits(model, window.ids[:-1], fitted.layers, window.scored)
