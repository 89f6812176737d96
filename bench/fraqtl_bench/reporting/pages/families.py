"""Families of models that were tried, and those that are refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fraqtl_bench.reporting.markdown import table
from fraqtl_bench.reporting.pages.numbers import times
from fraqtl_bench.reporting.pages.results import block, load, source

HEAD = [
    "family",
    "attention layers of the model that was tried",
    "`bf16`: nat from transformers, same texts",
    "`k8v8`: the same with its codec; texts that begin as with an exact cache",
    "`k4v4`: error, of its codec alone",
    "changes the text",
    "tokens in the memory of `bf16`",
    "bytes of 4,096 tokens: attention, of `bf16`; states",
    "accounts that are wrong",
]


@block("families")
def families() -> Iterator[str]:
    file = load("cpu/families.json")
    rows = file.data["families"].values()
    yield from table(HEAD, [_served(row) for row in rows if row["formats"] and not row["problems"]])
    refused = [[row["title"], f"`{row['refused']}`"] for row in rows if row["refused"]]
    if refused:
        yield from table(["family", "refused with"], refused)
    failed = [[row["title"], "; ".join(row["problems"])] for row in rows if row["problems"] and not row["refused"]]
    if failed:
        yield from table(["family", "what is wrong"], failed)
    yield from source(file, model=f"small ones with random weights; {_versions(rows)}")


@block("families-033")
def families_on_the_other_version() -> Iterator[str]:
    """Two formats: the other one and capacity are the same arithmetic."""
    file = load("cpu/families_033.json")
    rows = file.data["families"].values()
    head = ["family", HEAD[2], HEAD[4], HEAD[5], HEAD[8]]
    yield from table(head, [_quickly(row) for row in rows if row["formats"]])
    yield from source(file, model=f"small ones with random weights; {_versions(rows)}")


def _quickly(row: dict[str, Any]) -> list[str]:
    formats, accounts = row["formats"], row["accounts"]
    default = formats["k4v4"]
    error = f"{default['error']:.3f}, {default['codec_error']:.3f}"
    wrong = f"{len(accounts['mismatches'])} of {accounts['requests']}"
    return [row["title"], _exact(formats["bf16"]), error, _changed(formats), wrong]


def _versions(rows: Iterable[dict[str, Any]]) -> str:
    return ", ".join(sorted({f"{name} {number}" for row in rows for name, number in row["versions"].items()}))


def _changed(formats: dict[str, Any]) -> str:
    """What changes a text in some format."""
    return ", ".join(sorted({what for one in formats.values() for what in one["scheduling"]["changed"]})) or "nothing"


def _served(row: dict[str, Any]) -> list[str]:
    formats, served, accounts = row["formats"], row["served"], row["accounts"]
    cells = [row["title"], "<br>".join(row["layers"])]
    alike = formats["k8v8"]["texts_that_begin_alike"]
    cells += [_exact(formats["bf16"]), f"{_exact(formats['k8v8'])}; {alike}"]
    cells.append(f"{formats['k4v4']['error']:.3f}, {formats['k4v4']['codec_error']:.3f}")
    cells.append(_changed(formats))
    cells.append(times(served["tokens"] / served["tokens_with_bf16"]))
    cells.append(_of_a_sequence(served.get("sequence")))
    cells.append(f"{len(accounts['mismatches'])} of {accounts['requests']}")
    return cells


def _of_a_sequence(one: dict[str, int] | None) -> str:
    if one is None:  # an older row
        return ""
    states = f"; {one['states']:,}" if one["states"] else ""
    return f"{one['attention']:,}, {one['attention_with_bf16']:,}{states}"


def _exact(result: dict[str, Any]) -> str:
    return f"{result['largest_difference']:.4f}, {result['texts_of_transformers']} of {result['texts']}"
