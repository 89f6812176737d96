"""The last requests of one API server process, and what each of them cost."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Literal

from pydantic import BaseModel, Field

from fraqtl_serve.report import KVReport, Ledger

RING_SIZE = 256
# What vLLM appends to a response's id where the request may hold several prompts.
FIRST_PROMPT = {"/v1/completions": "-0", "/v1/chat/completions/batch": "_0"}


class RequestRecord(BaseModel):
    """One request that has ended."""

    id: str = Field(description="the id of its response, or of its first sequence where none was sent")
    endpoint: str = Field(description="the path it was sent to")
    status: Literal["finished", "aborted"]
    time: float = Field(description="when it ended, in seconds since 1970")
    report: KVReport | None = Field(description="its KV memory; null if the engine said nothing about it")


class Records:
    """A ring: the oldest request makes room for the newest."""

    def __init__(self, size: int = RING_SIZE) -> None:
        self._size = size
        self._by_id: OrderedDict[str, RequestRecord] = OrderedDict()

    def add(self, record: RequestRecord) -> None:
        self._by_id.pop(record.id, None)  # clients may choose their own ids: the last one counts
        self._by_id[record.id] = record
        if len(self._by_id) > self._size:
            self._by_id.popitem(last=False)

    def latest(self, limit: int) -> list[RequestRecord]:
        """At most `limit` requests, the newest first."""
        return list(reversed(self._by_id.values()))[:limit]

    def get(self, request_id: str) -> RequestRecord | None:
        return self._by_id.get(request_id)


def record_of(ledger: Ledger) -> RequestRecord:
    """What is kept of a request once its last sequence has ended."""
    return RequestRecord(
        id=ledger.response_id or ledger.request_id.removesuffix(FIRST_PROMPT.get(ledger.endpoint, "")),
        endpoint=ledger.endpoint,
        status="finished" if ledger.finished >= ledger.started else "aborted",
        time=time.time(),
        report=ledger.report(),
    )
