"""Pieces of Markdown."""

from __future__ import annotations

from collections.abc import Iterator


def number(x: float | None, digits: int = 2) -> str:
    if x is None:
        return ""
    return f"{x:,.{digits}f}" if abs(x) < 1e5 else f"{x:.2e}"


def share(x: float | None) -> str:
    return "" if x is None else f"{x:.2%}" if x < 0.1 else f"{x:.1%}"


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""
