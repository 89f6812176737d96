"""Random requests to /v1/chat/completions: malformed bodies, malformed headers, clients that hang up.

Whatever the server may rightly answer stays short: a request that is valid after all asks for a few tokens.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.e2e.reports import MODEL, messages

PATH = b"/v1/chat/completions"
JSON = b"application/json"


@dataclass(frozen=True)
class Attempt:
    """Bytes to send on a connection of its own."""

    kind: str
    pieces: list[bytes]
    pause: float = 0.0  # seconds between pieces
    hangs_up: bool = False  # closes the connection when all is sent,
    reads: int = 0  # or when so many bytes of the answer were read

    def described(self) -> dict[str, Any]:
        start = b"".join(self.pieces)[:600].decode("latin-1")
        return {"kind": self.kind, "length": sum(map(len, self.pieces)), "start": start}


def make_attempt(rng: random.Random) -> Attempt:
    kinds: list[Callable[[random.Random], Attempt]] = [wrong_value] * 8
    kinds += [wrong_message] * 3 + [wrong_structure] * 2 + [broken_json] * 3 + [wrong_header] * 3 + [hang_up] * 5
    return rng.choice(kinds)(rng)


def request(
    body: bytes,
    *,
    method: bytes = b"POST",
    path: bytes = PATH,
    content_type: bytes | None = JSON,
    length: bytes | None = None,
    extra: tuple[bytes, ...] = (),
) -> bytes:
    """A request's bytes; `length` is what it says of its body, where that isn't the truth."""
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: localhost", b"Connection: close", *extra]
    if content_type is not None:
        lines.append(b"Content-Type: " + content_type)
    lines.append(b"Content-Length: " + (str(len(body)).encode() if length is None else length))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def valid(rng: random.Random) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": messages(),
        "max_tokens": rng.randint(1, 8),
        "stream": rng.random() < 0.5,
        "temperature": rng.choice([0, 0.7]),
    }


def dump(body: Any) -> bytes:
    return json.dumps(body).encode("utf-8", "surrogatepass")


def anything(rng: random.Random, depth: int = 0) -> Any:
    """A value of any type JSON has, and a few that it has not."""
    simple: list[Any] = [
        None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, 10**30, -(2**63), 2**64, float("nan"), float("inf"),
        "", "a", "\x00", "\ud800", "é" * 300, "null", "x" * rng.randint(1, 20_000), [], {}, [[]], [None], {"": None},
    ]  # fmt: skip
    if depth < 4 and rng.random() < 0.3:
        if rng.random() < 0.5:
            return [anything(rng, depth + 1) for _ in range(rng.randint(1, 4))]
        return {
            rng.choice(["type", "content", "a", "\u0000"]): anything(rng, depth + 1) for _ in range(rng.randint(1, 3))
        }
    return rng.choice(simple)


# Of `n` and the lengths only what can't be granted: a valid answer would be long, and no fault.
IMPOSSIBLE: dict[str, list[Any]] = {
    "n": [0, -1, 1.5, "two", 2**63, [], {}, float("nan")],
    "max_tokens": [-1, 0.5, "many", 2**63, -(2**63), [], {}, float("inf"), 10**6],
    "max_completion_tokens": [-1, "many", 2**63, [], 10**6],
    "min_tokens": [-1, "few", 10**6, 2**70, []],
    "best_of": [-1, "x", []],
}
ANYTHING = [
    "model", "messages", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "seed", "stop",
    "logprobs", "top_logprobs", "prompt_logprobs", "logit_bias", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "length_penalty", "user", "tools", "tool_choice", "parallel_tool_calls",
    "response_format", "structured_outputs", "bad_words", "stop_token_ids", "allowed_token_ids",
    "add_generation_prompt", "continue_final_message", "add_special_tokens", "documents", "chat_template",
    "chat_template_kwargs", "priority", "request_id", "echo", "truncate_prompt_tokens", "return_token_ids",
    "cache_salt", "kv_transfer_params", "vllm_xargs", "reasoning_effort", "include_reasoning",
    "mm_processor_kwargs", "skip_special_tokens", "include_stop_str_in_output", "metadata", "\x00",
]  # fmt: skip


def wrong_value(rng: random.Random) -> Attempt:
    body = valid(rng)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        if rng.random() < 0.2:
            name = rng.choice(list(IMPOSSIBLE))
            body[name] = rng.choice(IMPOSSIBLE[name])
        elif rng.random() < 0.1:
            body.pop(rng.choice([name for name in body if name != "max_tokens"]))
        else:
            body[rng.choice(ANYTHING)] = anything(rng)
    return Attempt("wrong value", [request(dump(body))])


def wrong_message(rng: random.Random) -> Attempt:
    part = rng.choice(
        [
            anything(rng),
            {"type": "text", "text": anything(rng)},
            {
                "type": "image_url",
                "image_url": {"url": rng.choice(["", "data:image/png;base64,!!", "file:///etc/passwd"])},
            },
            {"type": "input_audio", "input_audio": anything(rng)},
            {"type": anything(rng), "text": "a"},
        ]
    )
    message = rng.choice(
        [
            {"role": "user", "content": part},
            {"role": "user", "content": [part]},
            {"role": anything(rng), "content": "a"},
            {"role": "tool", "content": "a", "tool_call_id": anything(rng)},
            {"role": "assistant", "content": None, "tool_calls": anything(rng)},
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": anything(rng)}}],
            },
            {"content": anything(rng)},
            anything(rng),
        ]
    )
    return Attempt(
        "wrong message", [request(dump({**valid(rng), "messages": [*messages(), message][rng.randint(0, 1) :]}))]
    )


def wrong_structure(rng: random.Random) -> Attempt:
    """Schemas, expressions and grammars that can't be compiled."""
    wishes: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": anything(rng)}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": anything(rng)}},
            }
        },
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}},
        {"response_format": {"type": anything(rng)}},
        {"structured_outputs": {"regex": rng.choice(["(", "[z-a]", "a{9999999}", "\\", "(?<=a)b", "", "*"])}},
        {"structured_outputs": {"grammar": rng.choice(["", "root ::=", "root ::= nothing", "::=", "\x00"])}},
        {"structured_outputs": {"choice": anything(rng)}},
        {"structured_outputs": {"json": anything(rng)}},
        {"structured_outputs": {"structural_tag": anything(rng)}},
        {"structured_outputs": {"json": {"type": "object"}, "regex": "a"}},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": anything(rng)}}],
            "tool_choice": "required",
        },
        {"tools": anything(rng), "tool_choice": {"type": "function", "function": {"name": "g"}}},
    ]
    return Attempt("wrong structure", [request(dump({**valid(rng), **rng.choice(wishes)}))])


def broken_json(rng: random.Random) -> Attempt:
    whole = dump(valid(rng))
    body = rng.choice(
        [
            whole[: rng.randint(0, len(whole) - 1)],
            whole + whole,
            whole.decode().encode("utf-16"),
            b"\xef\xbb\xbf" + whole,
            gzip.compress(whole),
            rng.randbytes(rng.randint(0, 2000)),
            rng.choice([b"[", b'{"a":', b"\x00", b" ", b"\xff"]) * rng.randint(1, 300_000),
            rng.choice([b"null", b"[]", b'"a"', b"1", b"NaN", b"{}"]),
        ]
    )
    at = rng.randrange(len(whole))
    if rng.random() < 0.3:
        body = whole[:at] + rng.randbytes(rng.randint(1, 4)) + whole[at + 1 :]
    return Attempt("broken JSON", [request(body)])


def wrong_header(rng: random.Random) -> Attempt:
    body = dump(valid(rng))
    name = rng.choice([b"X-Request-Id", b"traceparent", b"X-data-parallel-rank", b"Origin", b"Cookie", b"Accept"])
    value = rng.choice([b"", b"-1", b"\xff\xfe", b"a" * rng.randint(1, 30_000), b"nan", b"%00", b"{}", b"00-0-0-0"])
    chunked = b"Transfer-Encoding: chunked"
    whole = rng.choice(
        [
            request(body, extra=(name + b": " + value,)),
            request(body, extra=(b"Authorization: " + value,)),
            request(body, content_type=rng.choice([None, b"", b"text/plain", b"application/json; charset=x", b"\xff"])),
            request(body, content_type=b"multipart/form-data"),
            request(body, length=rng.choice([b"-1", b"a", b"1e3", b"", b"0x10", b"9" * 30])),
            request(body, extra=(b"Content-Encoding: gzip",)),
            request(body, extra=(b"Content-Length: 3",)),
            request(body, extra=(chunked,)),
            request(b"0\r\n\r\n", extra=(chunked,), length=b""),
            request(body, extra=(b"Expect: 100-continue",)),
            request(body, extra=(b"Upgrade: websocket", b"Connection: Upgrade")),
            request(body, extra=tuple(b"X-%d: a" % i for i in range(rng.randint(1, 400)))),
            request(
                body, method=rng.choice([b"GET", b"PUT", b"DELETE", b"PATCH", b"HEAD", b"OPTIONS", b"TRACE", b"X"])
            ),
            request(body, path=PATH + rng.choice([b"?a=%ff", b"/", b"/..", b"%2f", b"\xff", b"?" + b"a" * 9000])),
            b"not HTTP at all\r\n\r\n",
            rng.randbytes(200),
        ]
    )
    return Attempt("wrong header", [whole])


def hang_up(rng: random.Random) -> Attempt:
    body = {**valid(rng), "max_tokens": rng.choice([1, 50, 2000]), "ignore_eos": True, "n": rng.choice([1, 1, 3])}
    whole = request(dump(body))
    if rng.random() < 0.3:  # before it has said all
        return Attempt(
            "hung up early", [whole[: rng.randint(1, len(whole) - 1)]], pause=rng.random() / 20, hangs_up=True
        )
    if rng.random() < 0.5:  # while the server works
        cut = rng.randint(1, len(whole) - 1)
        return Attempt("hung up at work", [whole[:cut], whole[cut:]], pause=rng.random() / 5, hangs_up=True)
    streaming = request(dump({**body, "stream": True}))
    return Attempt("hung up while reading", [streaming], hangs_up=True, reads=rng.choice([1, 300, 2000]))
