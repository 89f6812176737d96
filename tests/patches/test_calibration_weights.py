"""Which numbers of a model's weights tell it from others, where vLLM has packed them away, too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from fraqtl_vllm.calibration.weights import weight_samples


class Packed(torch.nn.Module):
    """A linear layer as vLLM's CPU builds leave it: its weight is somewhere else."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.input_size_per_partition = weight.shape[1]
        self.weight = torch.nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
        self.quant_method = SimpleNamespace(apply=lambda layer, x, bias: F.linear(x, weight, bias))


def samples(layer: torch.nn.Module) -> list[tuple[str, tuple[int, ...], list[float]]]:
    model = torch.nn.ModuleDict({"inside": layer})
    return [(name, shape, numbers.tolist()) for name, shape, numbers in weight_samples(model, torch.bfloat16)]


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(40, 96, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_a_packed_weight_gives_exact_columns_of_its_matrix() -> None:
    [(name, shape, numbers)] = samples(Packed(weight()))
    columns = weight().T[::12].float()
    assert (name, shape) == ("inside.weight", (8, 40))
    assert numbers == columns.reshape(-1)[::5][:64].tolist()


def test_models_whose_weights_are_packed_are_told_apart() -> None:
    changed = weight()
    changed[10, 12] += 1
    assert samples(Packed(weight())) == samples(Packed(weight()))
    assert len({str(samples(Packed(w))) for w in (weight(), weight(1), changed)}) == 3


def test_other_weights_are_sampled_as_they_lie() -> None:
    layer = torch.nn.Linear(300, 7, dtype=torch.bfloat16)
    first, second = samples(layer)
    assert first == ("inside.weight", (7, 300), layer.weight.detach().reshape(-1)[::32][:64].tolist())
    assert second[:2] == ("inside.bias", (7,))


def test_an_empty_weight_of_which_nothing_is_known_stays_empty() -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    layer = Packed(weight())
    layer.quant_method = SimpleNamespace(apply=fail)
    assert samples(layer) == [("inside.weight", (0,), [])]
    bare = torch.nn.Module()
    bare.weight = torch.nn.Parameter(torch.empty(0))
    assert samples(bare) == [("inside.weight", (0,), [])]
