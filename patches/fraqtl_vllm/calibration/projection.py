"""What a model makes of the output of every query head: W W^T, with W the head's rows of the output projection.

No name in a model says which matrix that is. It is the row-parallel linear layer beside the attention layer, in the
same module, that takes as many inputs as attention gives. Its weight is taken if the layer's own kernel multiplies
by it as it stands. Quantized and packed weights don't say what their matrix is: there unit vectors are sent through
that kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fraqtl_vllm import _vllm

logger = _vllm.init_logger("vllm.fraqtl.calibration")

KERNEL_ERROR = 0.02  # of 16-bit products; another scale or order of the weights is off by much more


def projections(model: torch.nn.Module, layers: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """(query heads, D, D) float32 for every layer whose projection is found, by name.

    layers: vLLM's attention layers in `model`. dtype: of the model's activations.
    """
    names = {id(layer): name for name, layer in layers.items()}
    grams = {}
    for parent in model.modules():
        children = list(parent.children())
        for child in children:
            if id(child) not in names:
                continue
            gram = _of_layer(child, children, dtype)
            if gram is not None:
                grams[names[id(child)]] = gram
    missing = len(layers) - len(grams)
    if missing:
        logger.info("The output projection of %d layers is not known: errors of values count as they are", missing)
    return grams


def _of_layer(layer: Any, siblings: list[torch.nn.Module], dtype: torch.dtype) -> Tensor | None:
    heads, size = layer.impl.num_heads, layer.impl.head_size
    bare = [getattr(x, "base_layer", x) for x in siblings]  # without LoRA
    linear = [x for x in bare if isinstance(x, _vllm.RowParallelLinear)]
    matching = [x for x in linear if x.input_size_per_partition == heads * size]
    if len(matching) != 1:
        return None
    try:
        weight = _weight(matching[0], heads * size, dtype)
        if weight is None:
            return torch.stack([_gram(matching[0], head, heads, size, dtype) for head in range(heads)])
        rows = weight.float().T.unflatten(0, (heads, size))
        return _finite(rows @ rows.mT)
    except Exception as error:  # what the kernels of quantized layers raise is open, and this is no need
        logger.debug("The output projection can't be probed (%s: %s)", type(error).__name__, error)
        return None


def _weight(linear: Any, inputs: int, dtype: torch.dtype) -> Tensor | None:
    """The layer's weight, (outputs, inputs), if a random vector comes out of its kernel as the weight says."""
    weight = getattr(linear, "weight", None)
    if weight is None or weight.ndim != 2 or weight.shape[1] != inputs or not weight.is_floating_point():
        return None
    probe = torch.randn(1, inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    probe = probe.to(weight.device, dtype)
    product = linear.quant_method.apply(linear, probe, None).float()
    expected = probe.float() @ weight.float().T
    is_same = product.shape == expected.shape and (product - expected).norm() <= KERNEL_ERROR * expected.norm()
    return weight if is_same else None


def _gram(linear: Any, head: int, heads: int, size: int, dtype: torch.dtype) -> Tensor:
    """W W^T of one head: (D, D). Raises ValueError where it isn't finite."""
    device = next(linear.parameters()).device
    units = torch.zeros(size, heads * size, dtype=dtype, device=device)
    units[:, head * size : (head + 1) * size].fill_diagonal_(1)
    rows = linear.quant_method.apply(linear, units, None).float()
    return _finite(rows @ rows.T)


def _finite(gram: Tensor) -> Tensor:
    if not gram.isfinite().all():
        raise ValueError("its products are not finite")
    return gram
