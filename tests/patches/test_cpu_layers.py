"""Which layers of a model are exchanged on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from fraqtl_vllm.platform import cpu_layers
from fraqtl_vllm.platform.cpu_layers import _linear, has_matrix_unit, replace_layers


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_head_without_storage_is_left_alone(device: str) -> None:
    """vLLM puts the head of a model that only pools on the meta device."""
    weight = torch.empty(8, 16, dtype=torch.bfloat16, device=device)
    assert (_linear(SimpleNamespace(weight=weight), copies=True) is None) == (device == "meta")


@pytest.mark.skipif(not has_matrix_unit(torch.bfloat16), reason="needs a processor with bf16 matrix units")
@pytest.mark.parametrize("rows", [(1,), (2,), (5,), (0,), (2, 3), (300,)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_copied_weights_multiply_as_torch_does(rows: tuple[int, ...], biased: bool) -> None:
    weight, bias = torch.randn(96, 64).bfloat16(), torch.randn(96).bfloat16() if biased else None
    linear = _linear(SimpleNamespace(weight=weight), copies=True)
    assert linear is not None
    x = torch.randn(*rows, 128).bfloat16()[..., :64]
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(linear(x, weight, bias), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not has_matrix_unit(torch.bfloat16), reason="needs a processor with bf16 matrix units")
@pytest.mark.parametrize(("free", "copies", "kept"), [(1 << 20, None, True), (1 << 14, None, False), (0, True, True)])
def test_weights_are_copied_where_they_fit(
    free: int, copies: bool | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.Linear(64, 96, dtype=torch.bfloat16)  # 12 KiB
    layer.cpu_linear = None
    made: list[torch.Tensor] = []
    monkeypatch.setattr(cpu_layers, "PackedLinear", lambda weight: made.append(weight))
    monkeypatch.setattr(cpu_layers.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    replace_layers(torch.nn.Sequential(layer), copies=copies)
    assert bool(made) == kept
