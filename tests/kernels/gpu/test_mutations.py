"""The comparison sees errors: kernels with one line changed must fail it.

Each mutation is a copy of the kernel sources with a piece of text replaced, loaded under another package name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import fraqtl_kernels.gpu
from fraqtl_kernels.gpu.tuning import Tuning
from tests.kernels.gpu.cases import TOLERANCE, Case, decode_error
from tests.kernels.gpu.conftest import interpreter_only

SOURCES = Path(fraqtl_kernels.gpu.__file__).parent
CASE = Case(seq_lens=(33, 140), queries=(1, 3), splits=4, calibrated=True, tuning=Tuning(16, 4, 1))  # several chunks
PORTABLE = "nibbles are swapped"  # where there is no inline PTX, which a GPU runs
MUTATIONS = {
    "the scale of V is ignored": (
        "kernels/rows.py",
        "weights * scales[group].to(tl.float32)[None, :]",
        "weights * 1.0",
    ),
    "the scale of K is ignored": (
        "kernels/rows.py",
        "(tl.abs(k_scale) if HAS_SHIFT else k_scale)",
        "(k_scale * 0 + 1)",
    ),
    "the mask is off by one": ("kernels/rows.py", "< bound[:, None]", "< bound[:, None] - 1"),
    "the mask is off by one the other way": ("kernels/rows.py", "< bound[:, None]", "<= bound[:, None]"),
    PORTABLE: ("kernels/unpack.py", "(words & 15, (words >> 4) & 15,", "((words >> 4) & 15, words & 15,"),
    "words are read in the order of bytes": ("constexprs.py", "half.permute(2, 0, 1)", "half"),
    "the zero point of V is left in": ("kernels/rows.py", "out[part] - V.ZEROS[0] * weight_sum[:, None]", "out[part]"),
    "outlier keys are not told apart": (
        "kernels/rows.py",
        "is_outlier[None, :] * q_shift[:, None]",
        "is_outlier[None, :] * 0.0",
    ),
    "queries are carried into another basis": ("operands.py", "matrix(inverse.mT)", "matrix(basis)"),
    "the center of V is left out": (
        "kernels/output.py",
        "weight_share[:, None] * tl.load(at, mask=real, other=0.0)",
        "0.0",
    ),
    "splits are not weighted": (
        "kernels/combine.py",
        "weight = tl.exp2(split_lse - shift)",
        "weight = tl.exp2(shift - shift)",
    ),
}

DECODING = replace(CASE, seq_lens=(4, 5, 23), queries=(1, 1, 1))  # few keys: residuals take much of the weight
OF_RESIDUALS = {
    "residuals of K are left out": ("kernels/rows.py", "scores += score_codes(", "score_codes("),
    "residuals of V are left out": ("kernels/rows.py", "    if V.HAS_RESIDUAL:\n", "    if False:\n"),
    "residuals stand one slot further": (
        "kernels/residual.py",
        "tl.where(has_residual, slot + _DISTANCE, 0)",
        "slot + _DISTANCE + 1",
    ),
    "tokens with a residual are attended twice": (
        "kernels/rows.py",
        "last = tl.minimum(last, bound)\n        bound +=",
        "bound = length +",
    ),
    "a token too few is read with its residual": (
        "kernels/residual.py",
        "tl.minimum(_DISTANCE - 1,",
        "tl.minimum(_DISTANCE - 2,",
    ),
}


TRANSPOSED = Tuning(16, 4, 1, transposed=True)
OF_COLUMNS = {
    "the scale of V is ignored": (
        "kernels/transposed.py",
        "weights * v_scales[0].to(tl.float32)[:, None]",
        "weights * 1.0",
    ),
    "the scale of K is ignored": (
        "kernels/transposed.py",
        "(tl.abs(k_scale) if HAS_SHIFT else k_scale)",
        "(k_scale * 0 + 1)",
    ),
    "the mask is off by one": ("kernels/transposed.py", "token[:, None] <= position", "token[:, None] < position"),
    "the mask is off by one the other way": (
        "kernels/transposed.py",
        "<= position[None, :]",
        "<= position[None, :] + 1",
    ),
    "the zero point of K is left in": ("kernels/transposed.py", "scores -= q_zero[None, :]", "scores -= 0.0"),
    "the zero point of V is left in": ("kernels/transposed.py", "- V.ZEROS[0] * weight_sum[None, :]", "- 0.0"),
    "outlier keys are not told apart": ("kernels/transposed.py", "is_outlier[:, None] * q_shift[None, :]", "0.0"),
    "outputs keep their old maximum": ("kernels/transposed.py", "out[part] * alpha[None, :]", "out[part]"),
    "sums keep their old maximum": ("kernels/transposed.py", "l_i * alpha[None, :] + weights", "l_i + weights"),
    "pieces overlap": ("kernels/transposed.py", "first += piece_start(split_idx, pieces, own) * TILE", "first += 0"),
    "queries are scaled to the wrong base": ("kernels/prepared.py", "scale *= LOG2E", "scale *= 1.0"),
    "every query token is the first": (
        "kernels/transposed.py",
        "tl.minimum(column // SHAPE.GROUP, count - 1)",
        "column * 0",
    ),
}
RESIDUALS_OF_COLUMNS = {
    "residuals of K are left out": ("kernels/transposed.py", "scores += score_columns(", "score_columns("),
    "residuals of V are left out": ("kernels/transposed.py", "    if V.HAS_RESIDUAL:\n", "    if False:\n"),
    "tokens with a residual are attended twice": (
        "kernels/transposed.py",
        "tl.minimum(last, length - 1 - residual_tokens_before(length - 1, PAGE.BLOCK_SIZE))",
        "tl.minimum(last, length)",
    ),
}


@pytest.fixture
def mutant(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a mutated copy of the package."""
    file, old, new = request.param
    package = tmp_path / "mutated_gpu"
    (package / "kernels").mkdir(parents=True)
    for source in SOURCES.rglob("*.py"):
        text, place = source.read_text(), source.relative_to(SOURCES)
        if place.as_posix() == file:
            assert text.count(old) == 1, f"{old!r} is in {file} {text.count(old)} times"
            text = text.replace(old, new)
        (package / place).write_text(text.replace("fraqtl_kernels.gpu", package.name))
    monkeypatch.syspath_prepend(tmp_path)
    yield package.name
    for name in [n for n in sys.modules if n.split(".")[0] == package.name]:
        del sys.modules[name]


def test_without_a_mutation_the_case_passes() -> None:
    assert decode_error(CASE) <= TOLERANCE[CASE.dtype]


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=name, marks=[interpreter_only] * (name == PORTABLE)) for name, m in MUTATIONS.items()],
    indirect=True,
)
def test_a_mutation_is_seen(mutant: str) -> None:
    error = decode_error(CASE, mutant)
    print(f"relative error {error:.3f} against a tolerance of {TOLERANCE[CASE.dtype]}")
    assert not error <= 5 * TOLERANCE[CASE.dtype]


def test_without_a_mutation_residuals_are_read() -> None:
    assert decode_error(DECODING) <= TOLERANCE[CASE.dtype]


@pytest.mark.parametrize("mutant", OF_RESIDUALS.values(), ids=OF_RESIDUALS, indirect=True)
def test_a_mutation_of_residuals_is_seen(mutant: str) -> None:
    error = decode_error(DECODING, mutant)
    print(f"relative error {error:.3f} against a tolerance of {TOLERANCE[CASE.dtype]}")
    assert not error <= 5 * TOLERANCE[CASE.dtype]


@pytest.mark.parametrize("mutant", OF_COLUMNS.values(), ids=OF_COLUMNS, indirect=True)
def test_a_mutation_of_the_transposed_form_is_seen(mutant: str) -> None:
    case = replace(CASE, tuning=TRANSPOSED)
    assert decode_error(case) <= TOLERANCE[case.dtype]
    assert not decode_error(case, mutant) <= 5 * TOLERANCE[case.dtype]


@pytest.mark.parametrize("mutant", RESIDUALS_OF_COLUMNS.values(), ids=RESIDUALS_OF_COLUMNS, indirect=True)
def test_a_mutation_of_residuals_in_the_transposed_form_is_seen(mutant: str) -> None:
    case = replace(DECODING, tuning=TRANSPOSED)
    assert decode_error(case) <= TOLERANCE[case.dtype]
    assert not decode_error(case, mutant) <= 5 * TOLERANCE[case.dtype]


@pytest.mark.parametrize("mutant", [("kernels/combine.py", "of_keys / l_i", "l_i / l_i")], indirect=True)
def test_the_center_of_values_must_not_count_for_sinks(mutant: str) -> None:
    case = replace(CASE, sink_logits=True, seq_lens=(3, 9))  # few keys: sinks take much of the weight
    assert decode_error(case) <= TOLERANCE[case.dtype]
    assert not decode_error(case, mutant) <= 5 * TOLERANCE[case.dtype]
