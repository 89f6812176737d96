"""Checks that a run does on itself before it measures, each against something computed another way.

A wrong hook, grid or scale gives numbers that look like results; these end the run instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fraqtl_bench.quality.cache import logits
from fraqtl_bench.quality.codecs import Coordinates, LayerSample, serialize
from fraqtl_bench.quality.fitted import Fitted
from fraqtl_bench.quality.grids import Symmetric
from fraqtl_bench.quality.models import Subject
from fraqtl_kernels.errors import FraqtlError

TOKENS = 64
FP16_LEAST = 2.0**-25  # half the smallest number: what rounding takes from a tiny step


class SelfCheckError(FraqtlError):
    """The lab contradicts itself: a bug, nothing that the user did."""


def check(subject: Subject, methods: Sequence[Fitted], samples: Sequence[LayerSample], ids: tuple[int, ...]) -> None:
    """Raises SelfCheckError if the hook changes an untouched cache, or a method breaks its bound or its size."""
    check_hook(subject, ids[:TOKENS])
    for fitted in methods:
        check_errors(fitted, samples)
        check_storage(fitted, samples)


@torch.inference_mode()
def check_hook(subject: Subject, ids: tuple[int, ...]) -> None:
    """The hook without a method gives the logits that the model gives with no cache at all."""
    plain = subject.model(torch.tensor([ids], device=subject.model.device), use_cache=False).logits[0].float()
    hooked = logits(subject.model, ids, None, len(ids)).float()
    tolerance = 1e-3 if subject.model.dtype == torch.float32 else 5e-2
    off = ((plain - hooked).norm() / plain.norm()).item()
    if not off <= tolerance:
        raise SelfCheckError(f"with its untouched cache the model's logits are off by {off:.2%}: the hook is wrong")


def check_errors(fitted: Fitted, samples: Sequence[LayerSample]) -> None:
    """On the vectors that calibrated it, a symmetric grid is off by half a step at most.

    The step is that of the largest magnitude in each vector, or in each channel, found here anew.
    """
    for stream, codec in (("key", fitted.method.key), ("value", fitted.method.value)):
        if not isinstance(codec, Coordinates) or not isinstance(codec.grid, Symmetric):
            continue
        constants = getattr(fitted.layers[0], stream).constants
        x = samples[0].stream(stream).float()
        y = codec.project(x, constants)
        axis = -2 if codec.grid.scale == "channel" else -1
        half_step = y.abs().amax(axis, keepdim=True) / ((1 << (codec.grid.bits - 1)) - 1) / 2
        stored = codec.grid.decode(codec.encode(x, constants), constants, y.shape[-1])
        off = ((y - stored).abs() - codec.grid.largest * FP16_LEAST).clamp_min(0)
        worst = (off / half_step.clamp_min(1e-12)).amax().item()
        if not worst <= 1.0 + codec.grid.largest * 2e-3:  # steps are rounded to fp16
            raise SelfCheckError(
                f"{fitted.method.name} is off by {worst:.2f} half steps of its {stream}s: its grid is wrong"
            )


def check_storage(fitted: Fitted, samples: Sequence[LayerSample]) -> None:
    """The bits that a method claims are the bytes that it keeps, in a middle layer: the ends may be exact."""
    middle = len(samples) // 2
    for stream in ("key", "value"):
        part = getattr(fitted.layers[middle], stream)
        x: Tensor = samples[middle].stream(stream).float()
        heads, tokens, size = x.shape
        claimed = part.codec.sequence_bits(size, heads, tokens)
        claimed += part.codec.all_constant_bits(size, heads, part.constants)
        kept = 8 * (len(serialize(part.codec.encode(x[None], part.constants))) + len(serialize(part.constants)))
        if kept != claimed:
            raise SelfCheckError(f"{fitted.method.name} keeps {kept} bits of its {stream}s but claims {claimed}")
