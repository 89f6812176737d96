"""Chat users for Locust: every request another prompt, streamed, with its time to first token and what it saved.

    locust -f bench/examples/locustfile.py --host http://127.0.0.1:8000

Beside Locust's own row (the whole answer) its statistics have two more, in milliseconds: `first token`, and
`per token`, the mean time between the tokens after it. The KV memory that the server reports is printed at the end.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

from locust import HttpUser, constant, events, task

MODEL = os.environ.get("MODEL", "fraqtl-demo")
API_KEY = os.environ.get("VLLM_API_KEY", "none")
PROMPT_WORDS = int(os.environ.get("PROMPT_WORDS", "64"))
ANSWER_TOKENS = int(os.environ.get("ANSWER_TOKENS", "64"))
WORDS = [
    "river",
    "stone",
    "garden",
    "market",
    "winter",
    "letter",
    "engine",
    "window",
    "forest",
    "silver",
    "bridge",
    "story",
]

saved = {"requests": 0, "bytes": 0, "baseline_bytes": 0}


class Reader(HttpUser):
    """Asks, reads the answer, asks again."""

    wait_time = constant(0)

    @task
    def chat(self) -> None:
        # Random words: a prompt that was sent before would be found in the prefix cache, and measure that.
        prompt = " ".join(random.choices(WORDS, k=PROMPT_WORDS))
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Authorization": f"Bearer {API_KEY}"}
        began, first = time.perf_counter(), 0.0
        last: dict[str, Any] = {}
        with self.client.post(
            "/v1/chat/completions", json=body, headers=headers, stream=True, catch_response=True, name="chat"
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {response.text[:200]}")
                return
            for line in response.iter_lines(decode_unicode=True):
                if not line.startswith("data: {"):
                    continue
                last = json.loads(line.removeprefix("data: "))
                if not first and last.get("choices") and last["choices"][0]["delta"].get("content"):
                    first = time.perf_counter()
            if not last.get("usage"):
                response.failure("the stream ended without its usage")
                return
            end = time.perf_counter()
            response.request_meta["response_time"] = 1000 * (end - began)  # Locust's own is that of the headers
        self.record(began, first, end, last)

    def record(self, began: float, first: float, end: float, last: dict[str, Any]) -> None:
        tokens = last["usage"]["completion_tokens"]
        fire = self.environment.events.request.fire
        fire(request_type="", name="first token", response_time=1000 * (first - began), response_length=0)
        if tokens > 1:
            mean = 1000 * (end - first) / (tokens - 1)
            fire(request_type="", name="per token", response_time=mean, response_length=0)
        if report := last.get("fraqtl"):
            saved["requests"] += 1
            saved["bytes"] += report["bytes"]
            saved["baseline_bytes"] += report["baseline_bytes"]


@events.quitting.add_listener
def say_what_was_saved(**_: Any) -> None:
    if saved["requests"]:
        mean, before = (saved[key] / saved["requests"] / 1024 for key in ("bytes", "baseline_bytes"))
        print(f"KV memory of a request: {mean:.1f} KiB; in the model's own type {before:.1f} KiB, {before / mean:.2f}x")
