"""`fraqtl-bench texts`: what counts as rounding."""

from __future__ import annotations

import pytest

from fraqtl_bench.texts import Answer, compare
from fraqtl_kernels.errors import ConfigError


def answer(text: str, *gaps: float) -> Answer:
    return Answer(list(text), list(gaps), True)


def test_only_undecided_tokens_may_differ() -> None:
    saved = [answer("abc", 1.0, 0.05, 1.0), answer("abc", 1.0, 0.5, 0.01), answer("ab", 1.0, 1.0), answer("ab", 1, 1)]
    found = [answer("axy"), answer("axc"), answer("ab"), answer("a")]
    assert compare(saved, found, 0.1) == {
        "same": 1,
        "differ_by_rounding": 1,
        "differ": [{"question": 1, "token": 1, "gap": 0.5}, {"question": 3, "token": 1, "gap": 1}],
    }


def test_other_questions() -> None:
    with pytest.raises(ConfigError, match="1 answers in the file, 0 here: ask the same questions"):
        compare([answer("a", 1.0)], [], 0.1)
