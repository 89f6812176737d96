"""What the ablation measures, per case and variant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fraqtl_bench.quantizer.cases import SINKS, Case, Head, Sample, attended_keys
from fraqtl_bench.quantizer.steps import STEPS, Step
from fraqtl_bench.quantizer.stored import through_pages
from fraqtl_bench.quantizer.variants import PLAIN, Constants, Variant, key_variants, store, value_variants
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.formats import KVFormat, get_format

SHIPPED = "k4v4"


def affordable(variant: Variant, head_size: int) -> bool:
    """No more bytes than the shipped format takes."""
    return variant.bytes_per_token(head_size) <= get_format(SHIPPED).bytes_per_token(head_size)


@dataclass(frozen=True)
class Measures:
    """Errors of one variant on one case, means over its heads."""

    k_error: float
    output_error: float
    flips: float


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Root mean square over vectors of |found - exact| / |exact|: every token counts alike, sinks too."""
    norm = exact.norm(dim=-1).clamp_min(1e-12)
    return ((found - exact).norm(dim=-1) / norm).square().mean().sqrt().item()


def output_error(sample: Sample, weights: Tensor, key: Tensor, value: Tensor) -> float:
    """|o' - o| / |o| over all queries (Frobenius), o = weights · value, o' with stored keys and values."""
    exact = weights @ sample.value
    return ((sample.scores(key).softmax(-1) @ value - exact).norm() / exact.norm()).item()


def flips(sample: Sample, key: Tensor) -> float:
    """Share of queries whose most attended key is another one with stored keys."""
    return (sample.scores(key).argmax(-1) != sample.scores().argmax(-1)).float().mean().item()


def as_shipped(head: Head, format: KVFormat) -> tuple[Tensor, Tensor]:
    """The measured keys and values (T, D) as the server would read them, none with its residual."""
    calibration, measured = head.calibration, head.measured
    constants = calibrate(format, *calibration.by_head)
    stored = through_pages(format, measured.key[:, None], measured.value[:, None], constants)
    return stored.key[:, 0], stored.value[:, 0]


def through_step(head: Head, step: Step) -> tuple[Tensor, Tensor]:
    """The same with an earlier step of the quantizer."""
    calibration, measured = head.calibration, head.measured
    constants = step.calibrate(*calibration.by_head)
    key, value = step.store(measured.key[:, None], measured.value[:, None], constants)
    return key[:, 0], value[:, 0]


@dataclass(frozen=True)
class CaseResult:
    """What was found on one case."""

    case: Case
    attended_keys: float
    shipped: Measures
    shipped_v_error: float
    first_exact: Measures  # the shipped format with the first 4 tokens kept as they are
    steps: dict[str, Measures]  # on the way to the shipped format, see `steps.py`
    step_v_errors: dict[str, float]
    keys: dict[Variant, Measures]
    values: dict[Variant, tuple[float, float]]  # error of V, error of the output with exact keys

    def best(self, calibrated: bool) -> Variant:
        """The variant with the least output error of those that take no more bytes than the shipped format."""
        allowed = [v for v in self.keys if affordable(v, self.case.head_size) and (calibrated or not v.is_calibrated)]
        return min(allowed, key=lambda v: self.keys[v].output_error)

    def as_json(self) -> dict[str, Any]:
        """Rounded to 5 digits; lists are in the order that `columns` in the result file gives."""
        return {
            "head_size": self.case.head_size,
            "family": self.case.family,
            "attended_keys": _round(self.attended_keys),
            "shipped": [*_as_list(self.shipped), _round(self.shipped_v_error)],
            "shipped_first_exact": _as_list(self.first_exact),
            "steps": {name: [*_as_list(m), _round(self.step_v_errors[name])] for name, m in self.steps.items()},
            "keys": {v.name: _as_list(m) for v, m in self.keys.items()},
            "values": {v.name: [_round(x) for x in pair] for v, pair in self.values.items()},
        }


def _round(x: float) -> float:
    return float(f"{x:.5g}")


def _as_list(m: Measures) -> list[float]:
    return [_round(m.k_error), _round(m.output_error), _round(m.flips)]


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(mean(math.log(max(v, 1e-12)) for v in values))


def measure_case(case: Case) -> CaseResult:
    """Every variant on a case. Values are stored on the grid, in the basis and with the scale of the keys."""
    weights = [head.measured.scores().softmax(-1) for head in case.heads]
    measured = [head.measured for head in case.heads]

    def measures(keys: Sequence[Tensor], values: Sequence[Tensor]) -> Measures:
        return Measures(
            mean(relative_error(k, s.key) for k, s in zip(keys, measured, strict=True)),
            mean(output_error(s, w, k, v) for s, w, k, v in zip(measured, weights, keys, values, strict=True)),
            mean(flips(s, k) for s, k in zip(measured, keys, strict=True)),
        )

    stored_values = {variant: [store(s.value, variant) for s in measured] for variant in value_variants()}
    keys = {}
    for variant in key_variants():
        constants = [Constants.calibrate(h.calibration.key, h.calibration.query, variant) for h in case.heads]
        stored = [store(s.key, variant, c) for s, c in zip(measured, constants, strict=True)]
        keys[variant] = measures(stored, stored_values[variant.values])
    values = {
        variant: (
            mean(relative_error(v, s.value) for v, s in zip(stored, measured, strict=True)),
            mean(output_error(s, w, s.key, v) for s, w, v in zip(measured, weights, stored, strict=True)),
        )
        for variant, stored in stored_values.items()
    }
    shipped = get_format(SHIPPED)
    k, v = zip(*(as_shipped(head, shipped) for head in case.heads), strict=True)
    k_first = [torch.cat([s.key[:SINKS], x[SINKS:]]) for s, x in zip(measured, k, strict=True)]
    v_first = [torch.cat([s.value[:SINKS], x[SINKS:]]) for s, x in zip(measured, v, strict=True)]
    v_error = mean(relative_error(found, s.value) for found, s in zip(v, measured, strict=True))
    attended = mean(attended_keys(s) for s in measured)
    by_step = {name: [through_step(head, step) for head in case.heads] for name, step in STEPS.items()}
    steps = {name: measures(*zip(*stored, strict=True)) for name, stored in by_step.items()}
    step_v_errors = {
        name: mean(relative_error(v, s.value) for (_, v), s in zip(stored, measured, strict=True))
        for name, stored in by_step.items()
    }
    return CaseResult(
        case, attended, measures(k, v), v_error, measures(k_first, v_first), steps, step_v_errors, keys, values
    )


def overall(found: list[CaseResult]) -> dict[str, dict[str, dict[str, float]]]:
    """Per variant and family of cases, how its output error compares.

    against_shipped: geometric mean of the ratio to the shipped format; worst_against_shipped: the
    largest ratio. against_own_benign: the largest ratio to the variant's own error on the Gaussian
    case of the same head size (the project's goal for outliers, bias and sinks is at most 2).
    """
    rows = {variant.name: [r.keys[variant].output_error for r in found] for variant in found[0].keys}
    rows |= {name: [r.steps[name].output_error for r in found] for name in STEPS}
    rows[SHIPPED] = [r.shipped.output_error for r in found]
    benign = {r.case.head_size: i for i, r in enumerate(found) if r.case.family == "gaussian"}
    families = {r.case.family: [i for i, o in enumerate(found) if o.case.family == r.case.family] for r in found}
    families["all"] = list(range(len(found)))
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, errors in rows.items():
        table[name] = {}
        for family, members in families.items():
            ratios = [errors[i] / rows[SHIPPED][i] for i in members]
            own = [errors[i] / errors[benign[found[i].case.head_size]] for i in members]
            table[name][family] = {
                "against_shipped": _round(geometric_mean(ratios)),
                "worst_against_shipped": _round(max(ratios)),
                "against_own_benign": _round(max(own)),
            }
    return table


def plain(result: CaseResult) -> Measures:
    """Symmetric per-token INT4 without anything else."""
    return result.keys[PLAIN]
