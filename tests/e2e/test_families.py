"""Families of models: some of them tried, and whether what is wrong would show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fraqtl_bench.reporting.pages.results import load
from tests.e2e.families.engine import Answer, prompts
from tests.e2e.families.judge import EQUAL, problems_of
from tests.e2e.families.models import FAMILIES, VOCABULARY, make
from tests.e2e.families.reference import Reference, rounding
from tests.e2e.families.row import AccountsResult, FormatResult, Row, Scheduling

ROOT = Path(__file__).parents[2]
SOME = ("llama", "mistral")


def test_some_families(tmp_path: Path) -> None:
    out = tmp_path / "families.json"
    command = [sys.executable, "-m", "tests.e2e.families", "--quick", "--only", *SOME, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["families"]
    assert found.keys() == set(SOME)
    for row in found.values():
        assert row["formats"].keys() == {"bf16", "k4v4"}
        assert row["accounts"]["requests"] == 60
        assert row["problems"] == []


def test_the_result_file_has_every_family() -> None:
    rows = load("cpu/families.json").data["families"]
    assert rows.keys() == FAMILIES.keys()
    assert {name: row["problems"] for name, row in rows.items() if row["problems"]} == {}
    assert {name: bool(row["refused"]) for name, row in rows.items()} == {
        name: bool(family.refused) for name, family in FAMILIES.items()
    }


def test_an_unknown_family_is_named() -> None:
    command = [sys.executable, "-m", "tests.e2e.families", "--only", "lama"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "unknown family 'lama': choose one of llama, mistral, " in done.stderr


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_window_that_is_one_token_off_would_show(family: str, tmp_path: Path) -> None:
    make(FAMILIES[family], tmp_path)
    prompt = prompts(VOCABULARY[FAMILIES[family].tokenizer])[-1]
    answer = Answer(prompt, [5], torch.zeros(0), 0, [])
    right = Reference(tmp_path).read(answer, None)
    config = json.loads((tmp_path / "config.json").read_text())
    config["sliding_window"] -= 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    wrong = Reference(tmp_path).read(answer, None)
    assert (right.logprobs - wrong.logprobs).abs().max() > 10 * EQUAL["bf16"]


def test_the_codec_of_another_format_would_show(tmp_path: Path) -> None:
    make(FAMILIES["llama"], tmp_path)
    reference = Reference(tmp_path)
    answer = Answer(prompts(256)[-1], [5], torch.zeros(0), 0, [])
    bf16, k8v8 = (reference.read(answer, rounding(name, reference.layers)) for name in ("bf16", "k8v8"))
    assert (bf16.logprobs - k8v8.logprobs).abs().max() > EQUAL["k8v8"]


def good() -> Row:
    """A family that passes."""
    one = FormatResult(1e-5, 8, 8, 8, 0.01, 0.01, Scheduling(500, 3, []))
    other = FormatResult(1e-4, 8, 8, 8, 0.02, 0.02, Scheduling(500, 3, []))
    default = FormatResult(0.2, 8, 2, 0, 0.09, 0.10, Scheduling(500, 3, []))
    return Row("Good", formats={"bf16": one, "k8v8": other, "k4v4": default}, accounts=AccountsResult(60, 5, 9, 3, []))


@pytest.mark.parametrize(
    ("kv_format", "wrong", "said"),
    [
        ("bf16", {"largest_difference": 0.1}, "bf16: log-probabilities differ by 0.1 from transformers"),
        ("bf16", {"texts_of_transformers": 7}, "bf16: 7 of 8 texts are those of transformers"),
        ("k8v8", {"texts_that_begin_alike": 5}, "k8v8: 5 of 8 texts begin as with an exact cache"),
        ("k4v4", {"error": 0.2}, "k4v4: error 0.200, but the codec's is 0.100"),
        ("k4v4", {"error": 0.0}, "k4v4: error 0.000, but the codec's is 0.100"),
        ("k4v4", {"error": float("nan")}, "k4v4: error nan, but the codec's is 0.100"),
    ],
)
def test_what_is_wrong_is_said(kv_format: str, wrong: dict[str, object], said: str) -> None:
    row = good()
    assert problems_of(row) == []
    for name, value in wrong.items():
        setattr(row.formats[kv_format], name, value)
    assert problems_of(row) == [said]


def test_texts_part_where_the_codec_alone_moves_more_than_a_tie() -> None:
    """As with routers of experts that have random weights."""
    row = good()
    row.formats["k8v8"].texts_that_begin_alike = 1
    row.formats["k8v8"].error = row.formats["k8v8"].codec_error = 0.18
    assert problems_of(row) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cached_tokens": 0}, "k4v4: no prompt was found in the prefix cache"),
        ({"preemptions": 0}, "k4v4: nothing was preempted, give the family fewer blocks"),
        ({"changed": ["chunks"]}, "k4v4: chunks changed a text"),
    ],
)
def test_scheduling_that_is_wrong_is_said(wrong: dict[str, object], said: str) -> None:
    row = good()
    for name, value in wrong.items():
        setattr(row.formats["k4v4"].scheduling, name, value)
    assert problems_of(row) == [said]


@pytest.mark.parametrize(
    ("tokens", "gap", "departs"),
    [([1, 2, 3], 0.0, False), ([1, 5, 3], 0.04, False), ([1, 5, 3], 0.06, True), ([5, 2, 3], 0.0, True)],
)
def test_texts_may_part_where_two_tokens_are_as_likely(tokens: list[int], gap: float, departs: bool) -> None:
    text = Answer([4], [1, 2, 3], torch.zeros(3), 0, [1.0, gap, 1.0])
    other = Answer([4], tokens, torch.zeros(3), 0, [1.0, 1.0, 1.0])
    assert text.departs_from(other, 0.05) == other.departs_from(text, 0.05) == departs


def test_wrong_accounts_are_said() -> None:
    row = good()
    assert row.accounts is not None
    row.accounts.mismatches = ["request1: said 1, seen 2"]
    assert problems_of(row) == ["account of request1: said 1, seen 2"]
