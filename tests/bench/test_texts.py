"""`fraqtl-bench texts`: what counts as rounding."""

from __future__ import annotations

import pytest

from fraqtl_bench.texts import Answer, compare, saved_answers
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


def test_saved_answers_are_picked_by_context() -> None:
    entries = [{"tokens": [str(n)], "gaps": [1.0], "right": True} for n in range(6)]
    content = {"contexts": [256, 1024], "answers": entries}
    assert [a.tokens for a in saved_answers(content, [1024], 2)] == [["3"], ["4"]]
    assert [a.tokens for a in saved_answers(content, [1024, 256], 1)] == [["3"], ["0"]]
    with pytest.raises(ConfigError, match=r"answers at \[256, 1024\] tokens, not at \[512\]"):
        saved_answers(content, [256, 512], 1)
    with pytest.raises(ConfigError, match="3 answers a context"):
        saved_answers(content, [256], 4)
