"""Which layers of a model are exchanged on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from fraqtl_vllm.cpu_layers import _linear


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_head_without_storage_is_left_alone(device: str) -> None:
    """vLLM puts the head of a model that only pools on the meta device."""
    weight = torch.empty(8, 16, dtype=torch.bfloat16, device=device)
    assert (_linear(SimpleNamespace(weight=weight)) is None) == (device == "meta")
