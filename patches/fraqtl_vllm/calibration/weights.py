"""A few numbers of every weight of a model, to tell it from others.

vLLM's CPU builds pack the weights of linear layers for their own kernels and leave empty ones behind. What was packed
is asked of the layer itself: unit vectors give columns of its matrix, exactly, in whatever order a kernel adds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fraqtl_vllm import _vllm

logger = _vllm.init_logger("vllm.fraqtl.calibration")

SAMPLES = 64  # numbers of every weight
COLUMNS = 8  # of a packed one that they are taken from


def weight_samples(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """(name, shape, numbers) of every parameter, alike with and without LoRA. dtype: of the model's activations."""
    for name, weight in model.named_parameters():
        numbers = weight.detach()
        if numbers.numel() == 0:
            columns = _columns(model.get_submodule(name.rpartition(".")[0]), dtype, numbers.device)
            numbers = numbers if columns is None else columns
        yield name.replace(".base_layer.", "."), tuple(numbers.shape), _sample(numbers.reshape(-1))


def add_weights(digest: Any, model: torch.nn.Module, dtype: torch.dtype) -> None:
    """To a hash, a sample of every weight."""
    for name, shape, sample in weight_samples(model, dtype):
        digest.update(f"{name} {shape} {sample.dtype}".encode())
        digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())


def _sample(numbers: Tensor) -> Tensor:
    return numbers[:: max(1, numbers.numel() // SAMPLES)][:SAMPLES].contiguous()


def _columns(layer: Any, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """(8, outputs): columns all over the matrix of a linear layer of vLLM's, None of another layer."""
    method = getattr(layer, "quant_method", None)
    inputs = getattr(layer, "input_size_per_partition", getattr(layer, "input_size", None))
    if method is None or inputs is None:
        return None
    units = torch.zeros(COLUMNS, inputs, dtype=dtype, device=device)
    units[range(COLUMNS), [i * inputs // COLUMNS for i in range(COLUMNS)]] = 1
    try:
        with torch.inference_mode():
            columns: Tensor = method.apply(layer, units, None)
    except Exception as error:  # what the kernels of quantized layers raise is open; their other parameters count
        logger.debug("A packed weight can't be sampled (%s: %s)", type(error).__name__, error)
        return None
    return columns
