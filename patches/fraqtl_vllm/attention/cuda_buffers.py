"""Device memory that the layers of a worker use in turn, since they run one after another.

One `Buffers` a worker, owned by vLLM's workspace manager, which the worker makes before its model. Layers reserve what
they need while the model is loaded: so vLLM counts it before it sizes the pool. CUDA graphs keep its addresses, and are
captured later, when nothing grows any more.
"""

from __future__ import annotations

import torch

from fraqtl_vllm._vllm import current_workspace_manager


class Workspace:
    """Keys and values of cached tokens in 16 bits; contents live for one pass. key, value: (tokens, KV heads, D)."""

    def __init__(self, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.key = torch.empty(0, kv_heads, head_size, dtype=dtype, device=device)
        self.value = torch.empty_like(self.key)

    @property
    def tokens(self) -> int:
        return self.key.shape[0]

    def reserve(self, tokens: int) -> None:
        """Make room for at least so many tokens."""
        if self.tokens < tokens:
            self.key, self.value = (x.new_empty(tokens, *x.shape[1:]) for x in (self.key, self.value))


class Buffers:
    """scratch: fp32, what the launches of a decode step leave one another. workspaces: by the shape of layers."""

    def __init__(self, device: torch.device) -> None:
        self.scratch = torch.empty(0, dtype=torch.float32, device=device)
        self._workspaces: dict[tuple[int, int, torch.dtype], Workspace] = {}

    @classmethod
    def of_worker(cls, device: torch.device) -> Buffers:
        """Those of the worker whose model is being loaded."""
        buffers: Buffers = current_workspace_manager().get_persistent_resource((cls, device), lambda: cls(device))
        return buffers

    def reserve_scratch(self, floats: int) -> None:
        """Make room for at least so many fp32 numbers."""
        if self.scratch.numel() < floats:
            self.scratch = self.scratch.new_empty(floats)

    def workspace(self, tokens: int, kv_heads: int, head_size: int, dtype: torch.dtype) -> Workspace:
        """The workspace of all layers of a shape, with room for `tokens`."""
        key = (kv_heads, head_size, dtype)
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(*key, self.scratch.device)
        self._workspaces[key].reserve(tokens)
        return self._workspaces[key]
