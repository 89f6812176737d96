"""vLLM's LoRA layers on a CPU, which survive a request for the log-probabilities of its prompt.

The head of a model has room for an adapter if the model allows one there, and adds it to the rows that are sampled
from. For a prompt's log-probabilities the head gets other rows, for which vLLM has no adapters: the exception ends the
engine. Where no adapter changes the head, there is nothing to add.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fraqtl_vllm._vllm import PunicaWrapperCPU


class FraqtlPunicaWrapper(PunicaWrapperCPU):
    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs: Any
    ) -> None:
        rows = x.numel() // x.shape[-1]
        if rows != len(self.sampler_indices) and not lora_b_stacked.any():
            return
        super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs)
