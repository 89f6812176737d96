"""Standard errors of means over tokens, from how windows differ: the tokens of one window share their text."""

from __future__ import annotations

from collections.abc import Sequence


def standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Of sum(sums) / sum(counts). sums, counts: one per window. None if there are fewer than two windows.

    The ratio estimator's (Cochran, Sampling Techniques, 1977, section 6.4): windows are taken for independent.
    """
    windows, tokens = len(sums), sum(counts)
    if windows < 2:
        return None
    mean = sum(sums) / tokens
    spread = sum((x - mean * n) ** 2 for x, n in zip(sums, counts, strict=True))
    return float((spread * windows / (windows - 1)) ** 0.5 / tokens)
