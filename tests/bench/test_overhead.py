"""`fraqtl-bench overhead`: its arithmetic and its guards; `python -m fraqtl_bench.cli overhead` measures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fraqtl_bench import overhead
from fraqtl_kernels.errors import FraqtlError


def measured(throughput: float, ttft: float) -> dict[str, float]:
    return {"output_throughput": throughput, "median_ttft_ms": ttft, "median_tpot_ms": 1.0}


def test_ratios_are_those_of_pairs() -> None:
    # The machine is twice as slow in the second pair: the ratios don't see it, the medians of the runs would.
    pairs = [
        {"with": measured(99, 10), "without": measured(100, 10)},
        {"with": measured(45, 22), "without": measured(50, 20)},
        {"with": measured(110, 9), "without": measured(100, 10)},
    ]
    found = overhead.ratios(pairs)
    assert found["output_throughput"]["ratios"] == [0.99, 0.9, 1.1]
    assert found["output_throughput"]["median"] == 0.99
    assert found["output_throughput"]["quartiles"] == [0.945, 1.045]
    assert found["output_throughput"]["extremes"] == [0.9, 1.1]
    assert found["median_ttft_ms"]["median"] == 1.0
    assert overhead.ratios(pairs[:1])["median_ttft_ms"]["quartiles"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("ours", "without", "status", "said"),
    [
        ({"fraqtl": {}, "choices": [{"text": "a"}]}, {"choices": [{"text": "a"}]}, 404, None),
        ({"choices": [{"text": "a"}]}, {"choices": [{"text": "a"}]}, 404, "not what they should be"),
        ({"fraqtl": {}, "choices": [{"text": "a"}]}, {"fraqtl": {}, "choices": [{"text": "a"}]}, 404, "not what they"),
        ({"fraqtl": {}, "choices": [{"text": "a"}]}, {"choices": [{"text": "a"}]}, 200, "not what they should be"),
        ({"fraqtl": {}, "choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, 404, "don't give the same answer"),
    ],
)
def test_arms_are_checked(
    ours: Any, without: Any, status: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"http://ours": ours, "http://without": without}
    monkeypatch.setattr(
        httpx, "post", lambda url, **kw: httpx.Response(200, json=answers[url.removesuffix("/v1/completions")])
    )
    monkeypatch.setattr(httpx, "get", lambda url: httpx.Response(status))
    arms: list[Any] = [SimpleNamespace(url=url) for url in answers]
    if said is None:
        overhead.check_arms(*arms, model="m")
    else:
        with pytest.raises(FraqtlError, match=said):
            overhead.check_arms(*arms, model="m")
