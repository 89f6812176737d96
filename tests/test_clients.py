"""What tests/clients stands on: the report is found wherever it hides, and the result is of what is pinned."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai.types import CompletionUsage

from tests.clients.seen import only_last, places

FOLDER = Path(__file__).parent / "clients"
RESULT = FOLDER.parents[1] / "bench" / "results" / "cpu" / "clients.json"


@dataclass(slots=True)
class Slotted:
    meta: dict[str, Any]


class Private:
    def __init__(self, hidden: Any) -> None:
        self._hidden = hidden


USAGE = CompletionUsage.model_validate(
    {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "kv_cache": {"blocks": 1}}
)


@pytest.mark.parametrize(
    ("thing", "found"),
    [
        (USAGE, ["kv_cache"]),  # a field that the model doesn't declare
        (Slotted({"usage": USAGE}), ["meta.usage.kv_cache"]),
        (Private([{"fraqtl": {}}]), ["_hidden[].fraqtl"]),
        ({"headers": {"X-Fraqtl-KV-Bytes": "8704"}}, ["headers.X-Fraqtl-KV-Bytes"]),
        ({"usage": json.dumps({"kv_cache": {}})}, ["usage (text)"]),
        (Private(b'{"fraqtl": {}}'), ["_hidden (text)"]),
        ({"model": "fraqtl-demo", "usage": {"kv_cache": None}}, []),  # a name alone is no report
    ],
)
def test_a_report_is_found_wherever_it_hides(thing: Any, found: list[str]) -> None:
    assert places(thing) == found


def test_the_last_chunk_only() -> None:
    assert only_last([{}, {}, {"fraqtl": {}}])
    assert not only_last([{}, {"fraqtl": {}}, {}])
    assert not only_last([{"fraqtl": {}}, {"fraqtl": {}}])


def test_the_result_is_of_the_pinned_clients() -> None:
    pins = re.findall(r"^  \[(\w+)\]=\"[^=]+==([^ \"]+)", (FOLDER / "run.sh").read_text("utf-8"), re.MULTILINE)
    clients = json.loads(RESULT.read_text("utf-8"))["clients"]
    assert {name: client.get("version") for name, client in clients.items()} == dict(pins)
    assert [name for name, client in clients.items() if not client["passed"]] == []
    assert [name for name in clients if not (FOLDER / f"{name}.py").is_file()] == []
