"""Puts the report on one event of a stream of server-sent events.

Chat and text completions send bare chunks: the one with the usage carries the report if the client
asked for usage, else the one that ends the last choice. `/v1/responses` and `/v1/messages` name
their events, and the one that carries the usage is known by its name.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any

from fraqtl_serve.reports.report import KVReport, Ledger


def decorate(payload: dict[str, Any], report: KVReport, *, in_usage: bool = True) -> dict[str, Any]:
    """`payload` with the report at its top level, and if `in_usage` its integers in `usage` where there is one."""
    payload["fraqtl"] = report.model_dump()
    if in_usage and isinstance(payload.get("usage"), dict):
        payload["usage"]["kv_cache"] = report.usage()
    return payload


def parse(body: bytes | bytearray) -> dict[str, Any] | None:
    """The JSON object in `body`; None for anything else, which is not ours to judge."""
    try:
        payload = json.loads(body)
    except ValueError:
        return None
    return payload if isinstance(payload, dict) else None


def dump(payload: dict[str, Any]) -> bytes:
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()


class StreamDecorator(ABC):
    """Rewrites one event of a stream, which begins with `start`; everything else passes byte for byte.

    in_usage: as for `decorate`.
    """

    def __init__(self, ledger: Ledger, *, start: bytes, in_usage: bool) -> None:
        self.ledger = ledger
        self.in_usage = in_usage
        self.start = start
        self.done = False
        self.rest = b""  # the beginning of an event whose end was not sent yet

    def feed(self, data: bytes, *, last: bool) -> bytes:
        """Take what the application sent; returns what goes to the client now."""
        if not self.rest and (self.done or (data.endswith(b"\n\n") and not self.may_matter(data))):
            return data
        *events, self.rest = (self.rest + data).split(b"\n\n")
        out = b"".join(self._event(event) + b"\n\n" for event in events)
        if last:
            out, self.rest = out + self.rest, b""
        return out

    def _event(self, event: bytes) -> bytes:
        if self.done or not event.startswith(self.start) or not self.may_matter(event):
            return event
        head, mark, data = event.partition(b"data: ")
        payload = parse(data)
        target = None if payload is None else self.target(payload)
        report = None if target is None else self.ledger.report()
        if payload is None or target is None or report is None:
            return event
        self.ledger.response_id = str(target.get("id") or "")
        decorate(target, report, in_usage=self.in_usage)
        self.done = True
        return head + mark + dump(payload)

    @abstractmethod
    def may_matter(self, data: bytes) -> bool:
        """Whether there may be an event in `data` that the report belongs on; asked for every chunk, so it is quick."""

    @abstractmethod
    def target(self, payload: dict[str, Any]) -> dict[str, Any] | None:
        """The part of the payload that takes the report; None if it belongs on another event."""


class ChunkDecorator(StreamDecorator):
    """For chat and text completions.

    usage_chunk: the client asked for usage, so a last chunk without choices will carry it.
    """

    def __init__(self, ledger: Ledger, *, usage_chunk: bool, in_usage: bool = True) -> None:
        super().__init__(ledger, start=b"data: {", in_usage=in_usage)
        self.usage_chunk = usage_chunk
        self.finished = 0

    def may_matter(self, data: bytes) -> bool:
        # Only a chunk that ends a choice or carries the usage is of interest.
        return b'"finish_reason":"' in data or b'"choices":[]' in data

    def target(self, payload: dict[str, Any]) -> dict[str, Any] | None:
        self.finished += sum(choice.get("finish_reason") is not None for choice in payload.get("choices", ()))
        if self.usage_chunk:
            is_ours = payload.get("choices") == [] and payload.get("usage") is not None
        else:
            is_ours = self.finished == self.ledger.sequences
        return payload if is_ours else None


class NamedEventDecorator(StreamDecorator):
    """For streams whose events have names: the report goes where the usage is.

    That is the event itself (Anthropic), or the response object inside it (OpenAI's responses).
    """

    def __init__(self, ledger: Ledger, name: bytes, *, in_usage: bool = True) -> None:
        super().__init__(ledger, start=b"event: " + name + b"\ndata: {", in_usage=in_usage)

    def may_matter(self, data: bytes) -> bool:
        return self.start in data

    def target(self, payload: dict[str, Any]) -> dict[str, Any] | None:
        inside = payload.get("response", payload)
        return inside if isinstance(inside, dict) and isinstance(inside.get("usage"), dict) else None
