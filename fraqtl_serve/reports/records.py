"""The last requests of one API server process, and what each of them cost."""

from __future__ import annotations

import time
from collections import deque
from hashlib import sha256
from typing import Literal

from pydantic import BaseModel, Field

from fraqtl_serve.reports.report import KVReport, Ledger

RING_SIZE = 256
LONGEST_ID = 256  # characters; a client may choose an id as long as a body, and the ring would keep it
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
    """A ring: the oldest request makes room for the newest. Clients choose ids, so several may have the same one."""

    def __init__(self, size: int = RING_SIZE) -> None:
        self._ring: deque[RequestRecord] = deque(maxlen=size)

    def add(self, record: RequestRecord) -> None:
        self._ring.append(record)

    def latest(self, limit: int) -> list[RequestRecord]:
        """At most `limit` requests, the newest first."""
        return list(reversed(self._ring))[:limit]

    def get(self, request_id: str) -> RequestRecord | None:
        """The newest request with this id."""
        wanted = bounded(request_id)
        return next((record for record in reversed(self._ring) if record.id == wanted), None)


def bounded(request_id: str) -> str:
    """The id as it is kept: of a very long one its beginning, and a digest of all of it."""
    if len(request_id) <= LONGEST_ID:
        return request_id
    digest = sha256(request_id.encode(errors="replace")).hexdigest()[:16]
    return f"{request_id[: LONGEST_ID - 17]}~{digest}"


def record_of(ledger: Ledger) -> RequestRecord:
    """What is kept of a request once its last sequence has ended."""
    request_id = ledger.response_id or ledger.request_id.removesuffix(FIRST_PROMPT.get(ledger.endpoint, ""))
    return RequestRecord(
        id=bounded(request_id),
        endpoint=ledger.endpoint,
        status="finished" if ledger.finished >= ledger.started else "aborted",
        time=time.time(),
        report=ledger.report(),
    )
