"""Numbers as the pages write them."""

from __future__ import annotations


def fixed(x: float, digits: int = 0) -> str:
    return f"{x:,.{digits}f}"


def share(x: float, digits: int = 1) -> str:
    return f"{100 * x:.{digits}f} %"


def change(x: float, digits: int = 1) -> str:
    """A relative change, `x` = 0.02 for +2.0 %. What more than doubles is a factor."""
    return f"{1 + x:,.1f}x" if x > 1 else f"{100 * x:+.{digits}f} %"


def times(x: float, digits: int = 2) -> str:
    return f"{x:,.{digits}f}x"


def mebibytes(x: float, digits: int = 0) -> str:
    return f"{x / (1 << 20):,.{digits}f} MiB"
