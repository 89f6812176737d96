"""Langfuse's client for OpenAI: what it hands on, and what of it would stand in Langfuse's traces."""

from __future__ import annotations

import gzip
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from langfuse import get_client
from langfuse.openai import OpenAI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.clients.seen import ANSWER, MODEL, QUESTION, only_last, places, tell

ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
WHOLE = ["fraqtl", "usage.kv_cache"]
USAGE = "langfuse.observation.usage_details"
spans: list[dict[str, str]] = []


class Collector(BaseHTTPRequestHandler):
    """In the place of Langfuse's server."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            found = [span for scope in resource.scope_spans for span in scope.spans]
            spans.extend({pair.key: pair.value.string_value for pair in span.attributes} for span in found)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def main(url: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {"LANGFUSE_PUBLIC_KEY": "public", "LANGFUSE_SECRET_KEY": "secret"}
    os.environ["LANGFUSE_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
    client: Any = OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == ANSWER and places(answer) == WHOLE, places(answer)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ASK))
    assert only_last(chunks) and places(chunks[-1]) == WHOLE, places(chunks)
    response = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=30)
    assert response.output_text == ANSWER and places(response) == WHOLE, places(response)
    get_client().flush()
    # The traces have the counts of tokens, and nothing of the report.
    assert len(spans) == 3 and all('"total_tokens": 4' in span[USAGE] for span in spans), spans
    assert places(spans) == [], places(spans)
    tell("langfuse", plain=places(answer), stream=places(chunks[-1]), traces=places(spans))


main(sys.argv[1])
