from __future__ import annotations

import time
from typing import Any

import pytest

from fraqtl_serve.reports.records import Records, RequestRecord, record_of
from fraqtl_serve.reports.report import Ledger
from tests.serve.fake_engine import account


def record(number: int, status: Any = "finished") -> RequestRecord:
    return RequestRecord(id=f"r{number}", endpoint="/v1/completions", status=status, time=number, report=None)


def test_newest_first() -> None:
    records = Records()
    for number in range(5):
        records.add(record(number))
    assert [r.id for r in records.latest(3)] == ["r4", "r3", "r2"]
    assert len(records.latest(256)) == 5


def test_oldest_makes_room() -> None:
    records = Records(size=2)
    for number in range(3):
        records.add(record(number))
    assert [r.id for r in records.latest(9)] == ["r2", "r1"]
    assert records.get("r0") is None
    assert records.get("r1") == record(1)


def test_requests_with_one_id_are_all_there_and_the_last_is_found() -> None:
    records = Records(size=3)
    for item in (record(1), record(2), record(1, "aborted"), record(2, "aborted")):
        records.add(item)
    assert [(r.id, r.status) for r in records.latest(9)] == [("r2", "aborted"), ("r1", "aborted"), ("r2", "finished")]
    assert records.get("r2") == record(2, "aborted")


def test_very_long_ids_are_kept_short_and_told_apart() -> None:
    records = Records()
    ids = ["x" * 200_000 + end for end in "ab"]
    for request_id in ids:
        records.add(record_of(ledger(request_id=request_id)))
    first, second = (records.get(request_id) for request_id in ids)
    assert first is not None and second is not None and first.id != second.id
    assert len(first.id) == len(second.id) == 256
    assert records.get(first.id) == first


def ledger(**options: Any) -> Ledger:
    fields: dict[str, Any] = {"request_id": "chatcmpl-1", "endpoint": "/v1/chat/completions", "started": {"a", "b"}}
    return Ledger("k4v4", accounts={"a": account([1])}, **{**fields, **options})


@pytest.mark.parametrize(
    ("finished", "status"), [({"a", "b"}, "finished"), ({"a"}, "aborted"), (set[str](), "aborted")]
)
def test_record_of_a_ledger(finished: set[str], status: str) -> None:
    before = time.time()
    made = record_of(ledger(finished=finished))
    assert (made.id, made.endpoint, made.status) == ("chatcmpl-1", "/v1/chat/completions", status)
    assert made.report == ledger().report()
    assert before <= made.time <= time.time()


@pytest.mark.parametrize(
    ("endpoint", "request_id", "response_id", "expected"),
    [
        ("/v1/completions", "cmpl-1-0", "", "cmpl-1"),
        ("/v1/chat/completions/batch", "chatcmpl-1_0", "", "chatcmpl-1"),
        ("/v1/chat/completions", "chatcmpl-0", "", "chatcmpl-0"),
        ("/v1/chat/completions", "chatcmpl-mine-0", "", "chatcmpl-mine-0"),
        ("/v1/responses", "resp_1", "resp_2", "resp_2"),
    ],
)
def test_id_is_that_of_the_response(endpoint: str, request_id: str, response_id: str, expected: str) -> None:
    assert record_of(ledger(endpoint=endpoint, request_id=request_id, response_id=response_id)).id == expected
