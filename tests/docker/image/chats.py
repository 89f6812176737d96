"""Requests that a client outside the container sends."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "fraqtl-demo"
QUESTION = [{"role": "user", "content": "Hello! Who are you?"}]
TIMEOUT = 120


def chat(url: str) -> Any:
    """The answer to one chat request."""
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 64, "temperature": 0}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT)
    response.raise_for_status()
    return response.json()


def tokens_per_second(url: str) -> float:
    body = {"model": MODEL, "prompt": "my neighbour", "max_tokens": 100, "ignore_eos": True}
    began = time.monotonic()
    httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT).raise_for_status()
    return 100 / (time.monotonic() - began)


@dataclass
class Stream:
    """A streamed completion of exactly `tokens` tokens, read by a thread of its own."""

    url: str
    tokens: int
    lines: list[str] = field(default_factory=list)
    broken: str | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        body = {"model": MODEL, "prompt": "my neighbour", "max_tokens": self.tokens, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=TIMEOUT) as response:
                self.lines.extend(line for line in response.iter_lines() if line)
        except httpx.HTTPError as error:
            self.broken = type(error).__name__

    def wait_for_lines(self, count: int) -> None:
        end = time.monotonic() + TIMEOUT
        while len(self.lines) < count and self.thread.is_alive() and time.monotonic() < end:
            time.sleep(0.005)

    def result(self) -> dict[str, Any]:
        """How it ended: with [DONE] after all tokens were sent, or otherwise."""
        self.thread.join(TIMEOUT)
        events = [json.loads(line.removeprefix("data: ")) for line in self.lines if line.startswith("data: {")]
        reasons = [c["finish_reason"] for e in events for c in e.get("choices", []) if c["finish_reason"]]
        counted = [e["usage"]["completion_tokens"] for e in events if e.get("usage")]
        return {
            "tokens_asked": self.tokens,
            "tokens_sent": counted[-1] if counted else None,
            "finish_reason": reasons[-1] if reasons else None,
            "done": bool(self.lines) and self.lines[-1] == "data: [DONE]",
            "broken": self.broken,
        }
