"""The write kernel against the reference: the same bytes, and nothing else touched."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fraqtl_kernels import reference
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import IDENTITY, LayerConstants, StreamConstants
from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import FORMATS, HEAD_SIZES, VectorFormat
from fraqtl_kernels.gpu.operands import LayerOperands
from fraqtl_kernels.gpu.write import write
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.residual import DISTANCE
from tests.kernels.conftest import make_pool
from tests.kernels.gpu.cases import ON_GPU, to_device
from tests.kernels.gpu.conftest import DEVICE
from tests.kernels.transforms import random_constants, random_transform, without_centers

EDGE = 1e-3  # a value this close to the edge of two codes (in steps) may go either way


def written(
    layout: PageLayout, key: Tensor, value: Tensor, slots: Tensor, constants: LayerConstants = IDENTITY
) -> Tensor:
    """The pool after the kernel has written to it, on the CPU."""
    pool = to_device(make_pool(layout, 7, key.shape[1], padding=64))
    operands = LayerOperands.of(layout.format, layout.head_size, key.dtype, DEVICE, constants)
    write(pool, layout, key.to(DEVICE), value.to(DEVICE), slots.to(DEVICE), operands)
    return pool.cpu() if DEVICE != "cpu" else pool


def calibration(layout: PageLayout, key: Tensor, value: Tensor) -> LayerConstants:
    """Constants that fit keys and values (tokens, KV heads, D)."""
    heads, size = key.shape[1:]
    if layout.format.needs_calibration:
        return calibrate(layout.format, key, key, value)
    return random_constants(heads, size, layout.format)[0]


def moved(x: Tensor, constants: StreamConstants, scale: Tensor) -> Tensor:
    """x (tokens, KV heads, D) about the centers that the scales (tokens, KV heads) name, in the stored basis."""
    assert constants.transform is not None
    about = constants.transform.apply(x)
    if constants.outlier_center is None:
        return about
    return torch.where(scale.signbit()[..., None], constants.transform.apply(x, constants.outlier_center), about)


def check_vectors(x: Tensor, codes: Tensor, scale: Tensor, vector: VectorFormat) -> None:
    """x: (n, D) exact, in the stored basis. codes, scale: what the kernel stored for it."""
    runs, scale = x.unflatten(-1, (vector.groups, -1)), scale.double().reshape(len(x), vector.groups).abs()
    ideal_scale = runs.abs().amax(-1) / vector.edge
    assert (((scale - ideal_scale).abs() / ideal_scale) < 2**-11 * (1 + EDGE)).all()
    check_codes((runs / scale[..., None]).flatten(-2) + vector.midpoint, codes, 0, vector)


def check_codes(steps: Tensor, codes: Tensor, lowest: int, vector: VectorFormat) -> None:
    """Codes are the steps, rounded and clamped, but for those on the edge of two codes."""
    near_edge = (((steps - steps.floor()) - 0.5).abs() < EDGE) & (steps > 0) & (steps < vector.levels)
    exact = steps.round().clamp(lowest, vector.levels).to(torch.uint8)
    assert ((codes == exact) | (near_edge & ((codes.int() - exact.int()).abs() <= 1))).all()
    assert near_edge.double().mean() < 0.01 or vector.bits == 8


def strided(tokens: int, heads: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as a fused QKV projection gives them: views with a token stride of four tensors."""
    qkv = torch.randn(tokens, 4 * heads * size, dtype=dtype)
    return tuple(qkv[:, i * heads * size : (i + 1) * heads * size].view(tokens, heads, size) for i in (1, 3))


@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("calibrated", [False, True])
def test_codes_and_scales(name: str, size: int, calibrated: bool, dtype: torch.dtype) -> None:
    layout = PageLayout(FORMATS[name], size, 32)
    key_format, value_format = layout.format.k, layout.format.v
    key, value = strided(41, 3, size, dtype)
    constants = calibration(layout, key, value) if calibrated or layout.format.needs_calibration else IDENTITY
    if key_format.calibrated and calibrated:
        key[::3] += constants.key.outlier_center.to(dtype)
        key[1::3] += constants.key.transform.center.to(dtype)
    # A block's begin, single tokens, a run over the edge of two blocks, and tokens that are padding
    slots = torch.tensor([*range(64, 76), 3, 170, 130, *range(23, 49)])
    slots[[3, 17, 40]] = -1
    planes = layout.planes(written(layout, key, value, slots, constants))
    used = slots[slots >= 0]
    has_room = (used % 32 + DISTANCE < 32) & ~torch.isin(used + DISTANCE, used)

    def stored(plane: Tensor, at: Tensor = used) -> Tensor:
        return plane.transpose(1, 2).flatten(0, 1)[at].flatten(0, 1)

    key, value = key[slots >= 0].double(), value[slots >= 0].double()
    for x, vector, plane, scales, step, encode, encode_residual in (
        (
            key,
            key_format,
            planes.k,
            planes.k_scale,
            constants.key.scale,
            reference.encode_keys,
            reference.encode_key_residuals,
        ),
        (
            value,
            value_format,
            planes.v,
            planes.v_scale,
            constants.value.scale,
            reference.encode_values,
            reference.encode_value_residuals,
        ),
    ):
        if vector.is_raw:
            assert torch.equal(stored(plane), x.flatten(0, 1).to(vector.raw_dtype))
            continue
        codes = reference.unpack(stored(plane), vector)
        if vector.calibrated and calibrated and x is key:
            assert stored(scales).signbit().any() and not stored(scales).signbit().all()
        if vector.has_feedback and calibrated:
            check_feedback(stored(scales), codes, *(y.flatten(0, 1) for y in encode(x, vector, constants)))
        elif vector.calibrated and calibrated:
            own = constants.key if x is key else constants.value
            first = stored(scales).reshape(*x.shape[:2], -1)[..., 0]
            check_vectors(moved(x, own, first).flatten(0, 1), codes, stored(scales), vector)
        elif vector.static:
            check_codes((x / step.double() + vector.midpoint).flatten(0, 1), codes, 1, vector)
        else:
            check_vectors(reference.rotate(x, vector).flatten(0, 1), codes, stored(scales), vector)
        if vector.has_residual:
            own = (y.unflatten(0, (len(x), -1))[has_room] for y in (codes, stored(scales)))
            exact = encode_residual(x[has_room], *own, vector, constants)
            residual_slots = used[has_room] + DISTANCE
            found = reference.unpack(stored(plane, residual_slots), vector), stored(scales, residual_slots)
            same = (found[0] == exact[0].flatten(0, 1)).all(-1) & (found[1] == exact[1].flatten(0, 1)).view(
                len(found[0]), -1
            ).all(-1)
            assert same.double().mean() > 0.9, f"{(~same).sum()} of {len(same)} differ"


def check_feedback(scale: Tensor, codes: Tensor, exact_codes: Tensor, exact_scale: Tensor) -> None:
    """Vectors (n, D) are as the reference's, but for those where a code lies on an edge or two scales are as good."""
    same = (codes == exact_codes).all(-1) & (scale == exact_scale)
    assert same.double().mean() > 0.97, f"{(~same).sum()} of {len(same)} differ"
    assert torch.equal(scale.signbit(), exact_scale.signbit())


@pytest.mark.parametrize("name", ON_GPU)
def test_only_given_slots_are_written(name: str) -> None:
    layout = PageLayout(FORMATS[name], 80, 16)
    key, value = strided(5, 2, 80, torch.float16)
    constants = calibration(layout, key, value)
    pool = written(layout, key, value, torch.tensor([-1, 16 + 5, -1, 6 * 16 + 15]), constants)  # shorter than the batch
    before = make_pool(layout, 7, 2, padding=64)
    raw, raw_before = (p.as_strided((7, p.stride(0)), (p.stride(0), 1)) for p in (pool, before))
    assert torch.equal(raw[[0, 2, 3, 4, 5]], raw_before[[0, 2, 3, 4, 5]])
    assert torch.equal(raw[:, -64:], raw_before[:, -64:])
    changed = layout.planes((pool != before).to(torch.uint8))
    format = layout.format
    for plane, with_residual in ((changed.k, format.k.has_residual), (changed.v, format.v.has_residual)):
        rows = (plane.contiguous().view(torch.uint8) != 0).any(-1).nonzero()
        places = [(1, 5), (6, 15)] + ([(1, 5 + DISTANCE)] if with_residual else [])
        assert set(map(tuple, rows.tolist())) == {(b, h, o) for b, o in places for h in (0, 1)}


@pytest.mark.parametrize("name", [name for name, format in ON_GPU.items() if format.is_quantized])
def test_packing_is_bit_exact(name: str) -> None:
    """Values that fp32 rotates and scales without rounding: every byte of the pool equals the reference's."""
    layout = PageLayout(FORMATS[name], 64, 16)  # 1/sqrt(64) is a power of two
    key, value = (torch.randint(-64, 65, (50, 2, 64)).half() for _ in range(2))

    transforms = (
        random_transform(2, 64, center=torch.randint(-8, 9, (2, 64)).float(), feeds_back=vector.has_feedback)[0]
        for vector in (layout.format.k, layout.format.v)
    )
    constants = LayerConstants.of(*transforms, torch.randint(-99, 100, (2, 64)).float())
    if layout.format.needs_calibration:
        steps = torch.exp2(torch.randint(0, 5, (2, 64)).float())
        constants = LayerConstants.of(key_scale=steps, value_scale=2 * steps)
    slots = torch.tensor([*range(7, 41), *range(64, 75), 50, 81, 82, 83, 111])
    theirs = make_pool(layout, 7, 2, padding=64)
    reference.write(theirs, layout, key, value, slots, constants)
    assert torch.equal(written(layout, key, value, slots, constants), theirs)


@pytest.mark.parametrize("name", ["k4v4", "k8v8", "k3v3", "k4v2"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_zero_tiny_huge_and_broken_vectors(name: str, calibrated: bool) -> None:
    layout = PageLayout(FORMATS[name], 64, 16)
    x = torch.zeros(6, 1, 64, dtype=torch.bfloat16)
    x[1, 0, 3], x[2, 0, 5], x[3, 0, 7], x[4, 0, 9], x[5, 0, 9] = 1e-9, 1e9, math.nan, math.inf, -math.inf
    constants = IDENTITY
    if calibrated:
        constants = without_centers(layout.format, 64)
    planes = layout.planes(written(layout, x, x, torch.arange(6), constants))
    stored = (
        reference.stored_keys(planes, layout.format.k, constants),
        reference.stored_values(planes, layout.format.v, constants),
    )
    for values in (x[0, 0, :6] for x in stored):
        assert torch.equal(values[0], torch.zeros(64, dtype=torch.float64))
        assert values[1].abs().max() < 1e-7
        assert values[2].isfinite().all() and values[2].abs().argmax() == 5
        assert values[3:].isnan().all()


def test_static_steps_clip() -> None:
    layout = PageLayout(FORMATS["k4v4-channel"], 64, 16)
    x = torch.zeros(5, 1, 64, dtype=torch.bfloat16)
    x[0, 0, 3], x[1, 0, 3], x[2, 0, 3], x[3, 0, 3] = math.nan, math.inf, -math.inf, 0.5
    constants = LayerConstants.of(key_scale=torch.ones(1, 64), value_scale=torch.full((1, 64), 0.25))
    planes = layout.planes(written(layout, x, x, torch.arange(5), constants))
    assert reference.stored_keys(planes, layout.format.k, constants)[0, 0, :5, 3].tolist() == [0, 7, -7, 0, 0]
    assert reference.stored_values(planes, layout.format.v, constants)[0, 0, :5, 3].tolist() == [0, 1.75, -1.75, 0.5, 0]


def test_static_formats_need_calibration() -> None:
    layout = PageLayout(FORMATS["k4v4-channel"], 64, 16)
    x = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="needs calibration"):
        written(layout, x, x, torch.arange(1))
