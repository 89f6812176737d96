"""What the parts of the calibrated quantizer give, one after another.

- `matrix`: z = (x - c) B with the best B for plain rounding: B B^T is the geometric mean of G and S^-1, so that in the
  basis in which both are diagonal, a direction of deviation s (in units of what errors cost) is divided by sqrt(s);
- `feedback`: the basis of `fraqtl_kernels.calibration.solve`, whose second half is rounded before the first;
- `k4v4`, the shipped one, also tries the `SCALE_CHOICES` of its bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels import reference
from fraqtl_kernels.calibration.importance import Importance
from fraqtl_kernels.calibration.solve import Solver, calibrate, solve_transform
from fraqtl_kernels.constants import LayerConstants, Transform, make_transform
from fraqtl_kernels.formats import get_format
from fraqtl_kernels.rotation import hadamard


def balanced(center: Tensor, covariance: Tensor, hessian: Tensor) -> Transform:
    """Like `solve_transform`, without feedback."""
    size = covariance.shape[-1]
    values, axes = torch.linalg.eigh(hessian)
    root = (axes * values.sqrt()[:, None]) @ axes.mT
    variance, axes = torch.linalg.eigh(root @ covariance @ root)
    basis = root @ (axes / variance.clamp_min(1e-12).pow(0.25)[:, None]) @ hadamard(size).to(covariance)
    basis = basis / torch.linalg.slogdet(basis).logabsdet.div(size).exp()[:, None, None]
    return make_transform(center, basis, torch.zeros(len(basis), size // 2, size // 2))


@dataclass(frozen=True)
class Step:
    """One way of storing keys and values with constants."""

    solve: Solver
    choices: tuple[float, ...] = (1.0,)

    def calibrate(
        self, key: Tensor, query: Tensor, value: Tensor, importance: Importance | None = None
    ) -> LayerConstants:
        """As `fraqtl_kernels.calibration.solve.calibrate` for k4v4."""
        return calibrate(get_format("k4v4"), key, query, value, importance, solve=self.solve)

    def store(self, key: Tensor, value: Tensor, constants: LayerConstants) -> tuple[Tensor, Tensor]:
        """Keys and values (tokens, KV heads, D) after a round trip."""
        of_keys, of_values, outlier_center = (
            constants.key.transform,
            constants.value.transform,
            constants.key.outlier_center,
        )
        assert of_keys is not None and of_values is not None
        z, is_outlier = of_keys.apply(key), torch.zeros(key.shape[:-1], dtype=torch.bool)
        if outlier_center is not None:
            as_outlier = of_keys.apply(key, outlier_center)
            is_outlier = as_outlier.abs().amax(-1) < z.abs().amax(-1)
            z = torch.where(is_outlier[..., None], as_outlier, z)
        stored = constants.restore_keys(self._round_trip(z, of_keys), is_outlier)
        return stored, of_values.undo(self._round_trip(of_values.apply(value), of_values))

    def _round_trip(self, z: Tensor, transform: Transform) -> Tensor:
        vector = get_format("k4v4").k
        assert transform.feedback is not None
        codes, scale = reference.quantize_with_feedback(z, transform.feedback, vector, self.choices)
        return reference.dequantize(codes, scale, vector, z.dtype)


STEPS = {"matrix": Step(balanced), "feedback": Step(solve_transform)}
