"""An engine that asks for the packed cache and would serve another one does not start."""

from __future__ import annotations

from tests.e2e.forced_backend import start_with


def test_layers_that_another_backend_serves() -> None:
    said = start_with("backend")
    assert said.startswith("UnsupportedError: FRAQTL was asked for, but vLLM gave layer model.layers.0.self_attn.attn")
    assert "to CPU_ATTN, and its cache would not be packed" in said


def test_a_pool_that_is_not_packed() -> None:
    said = start_with("pool")
    assert said.startswith("UnsupportedError: the pool of layer model.layers.0.self_attn.attn is not packed: k4v4 ")
    assert said.endswith("of bfloat16")
