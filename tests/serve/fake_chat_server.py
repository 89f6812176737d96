"""A server that speaks as much of the protocol as `fraqtl-serve chat` hears, in a thread of the test."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPORT = {
    "kv_format": "k4v4",
    "tokens": 40,
    "blocks": 3,
    "block_size": 16,
    "shared_blocks": 2,
    "loaded_blocks": 0,
    "bytes": 26112,
    "baseline_bytes": 98304,
    "saved_bytes": 72192,
    "state_bytes": 0,
    "ratio": 3.7647,
}


@dataclass
class FakeServer:
    """What it answers with; `seen` collects the messages of every question."""

    url: str = ""
    key: str | None = None
    is_fraqtl: bool = True
    pieces: tuple[str, ...] = ("Hello", " there", ".")
    endless: bool = False
    broken: str | None = None  # "error": an error in the stream, "cut": the connection ends, "refuse": a 400
    seen: list[Any] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)


def handler_of(server: FakeServer) -> type[BaseHTTPRequestHandler]:  # noqa: C901 (a class for each conversation)
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                self.answer(401, {"error": "Unauthorized"})
            elif self.path == "/v1/models":
                self.answer(200, {"data": [{"id": "first"}, {"id": "second"}]})
            elif self.path == "/plugins/fraqtl/capacity" and server.is_fraqtl:
                self.answer(200, {"kv_format": "k4v4"})
            elif self.path == "/plugins/fraqtl/requests/chat-1" and server.hung_up.is_set():
                self.answer(200, {"report": REPORT})
            else:
                self.answer(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.seen.append(body["messages"])
            if server.broken == "refuse":
                self.answer(400, {"error": {"message": "the prompt is too long"}})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                self.stream()
            except (BrokenPipeError, ConnectionResetError):
                server.hung_up.set()

        def stream(self) -> None:
            for piece in server.pieces:
                self.event({"id": "chat-1", "choices": [{"delta": {"content": piece}}]})
            while server.endless:
                self.event({"id": "chat-1", "choices": [{"delta": {"content": " more"}}]})
                time.sleep(0.02)
            if server.broken == "error":
                self.event({"error": {"message": "the engine died"}})
            elif server.broken != "cut":
                self.event({"id": "chat-1", "choices": [{"delta": {}, "finish_reason": "stop"}], "fraqtl": REPORT})
                self.wfile.write(b"data: [DONE]\n\n")

        def event(self, payload: Any) -> None:
            self.wfile.write(b"data: " + json.dumps(payload).encode() + b"\n\n")
            self.wfile.flush()

        def answer(self, status: int, payload: Any) -> None:
            body = json.dumps(payload).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(**options: Any) -> Iterator[FakeServer]:
    server = FakeServer(**options)
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(server))
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.endless = False
        http.shutdown()
        http.server_close()
