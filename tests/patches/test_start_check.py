from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CacheConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import get_format
from fraqtl_vllm import plugin
from fraqtl_vllm.attention.backend import FraqtlBackend
from fraqtl_vllm.attention.check import check_worker

plugin.register()


class Layer(AttentionLayerBase):
    head_size = 64

    def __init__(self, backend: Any = FraqtlBackend, dtype: torch.dtype = torch.uint8, content: int = 68) -> None:
        self.backend = backend
        self.impl: Any = SimpleNamespace(kv_format=get_format("k4v4"))
        self.kv_cache = torch.zeros(5, 2, 16, content, dtype=dtype)

    def get_attn_backend(self) -> Any:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: Any) -> None:
        return None


def worker(
    *layers: Any, backend: str | None = "FRAQTL", per_kind: dict[str, str] | None = None, ours: Any = None
) -> Any:
    chosen = None if backend is None else AttentionBackendEnum[backend]
    attention = SimpleNamespace(
        backend=chosen, backend_per_kind={k: AttentionBackendEnum[v] for k, v in (per_kind or {}).items()}
    )
    context = {f"layers.{i}.attn": layer for i, layer in enumerate(layers)}
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            attention_config=attention,
            cache_config=CacheConfig(),
            additional_config={} if ours is None else {"fraqtl": ours},
            compilation_config=SimpleNamespace(static_forward_context=context),
        )
    )


def test_packed_layers_pass_and_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    check_worker(worker(Layer(), Layer(), object()))  # a layer that isn't attention is none of ours
    check_worker(worker(Layer(), ours={"kv_format": "k4v4"}))


def test_a_subclass_of_our_backend_is_ours() -> None:
    """vLLM makes one for layers that see chunks of their own."""
    check_worker(worker(Layer(type("ChunkedFraqtl", (FraqtlBackend,), {}))))


@pytest.mark.parametrize("per_kind", [None, {"full_attention": "FRAQTL"}])
def test_every_layer_must_be_ours(per_kind: dict[str, str] | None) -> None:
    with pytest.raises(UnsupportedError, match=r"^FRAQTL was asked for, but vLLM gave layer layers.1.attn to CPU_ATTN"):
        check_worker(worker(Layer(), Layer(CPUAttentionBackend), per_kind=per_kind))


def test_the_reason_is_told_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    with pytest.raises(UnsupportedError, match=r"unset VLLM_TARGET_DEVICE"):
        check_worker(worker(Layer(CPUAttentionBackend)))
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cuda")
    with pytest.raises(UnsupportedError, match=r"fraqtl-serve doctor says which platform"):
        check_worker(worker(Layer(CPUAttentionBackend)))


@pytest.mark.parametrize(("dtype", "content"), [(torch.bfloat16, 128), (torch.uint8, 132), (torch.int8, 68)])
def test_the_pool_must_be_packed(dtype: torch.dtype, content: int) -> None:
    held = f"5 x 2 x 16 x {content} of {str(dtype).removeprefix('torch.')}$"
    with pytest.raises(UnsupportedError, match=f"layers.1.attn is not packed: k4v4 needs 68 bytes .* allocated {held}"):
        check_worker(worker(Layer(), Layer(dtype=dtype, content=content)))


def test_a_pool_that_was_never_made() -> None:
    layer = Layer()
    layer.kv_cache = torch.tensor([])
    with pytest.raises(UnsupportedError, match="is not packed"):
        check_worker(worker(layer))


def test_a_model_without_attention() -> None:
    with pytest.raises(UnsupportedError, match=r"^--attention-backend FRAQTL: this model has no attention layer"):
        check_worker(worker(object()))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backend": None, "ours": {}}, "no attention backend: add --attention-backend FRAQTL$"),
        ({"backend": "FLASH_ATTN", "ours": {}}, "attention backend FLASH_ATTN: add --attention-backend FRAQTL$"),
        ({"per_kind": {"sliding_window": "FLASH_ATTN"}}, "backend_per_kind has FLASH_ATTN for sliding_window$"),
        ({"backend": None, "per_kind": {"full_attention": "FRAQTL"}}, "add --attention-backend FRAQTL$"),
    ],
)
def test_half_a_request_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedError, match=sentence):
        check_worker(worker(Layer(), **options))


@pytest.mark.parametrize("backend", [None, "CPU_ATTN"])
def test_other_caches_are_left_alone(backend: str | None) -> None:
    check_worker(worker(Layer(CPUAttentionBackend, torch.bfloat16, 128), backend=backend))
