"""The last block of a start. That it comes when the server answers is in tests/e2e/test_smollm2.py."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace

import pytest

from fraqtl_serve.cli import banner
from fraqtl_serve.reports.capacity import Capacity

CAPACITY = Capacity.model_construct(
    kv_format="k4v4", pool_bytes=256 << 20, tokens=43_856, baseline_tokens=11_648, baseline_dtype="bfloat16"
)


def args(**values: object) -> Namespace:
    return Namespace(**{"host": "0.0.0.0", "port": 8000, "api_key": None, "root_path": "", **values})


def block(**values: object) -> str:
    given = {"name": "smollm2", "tasks": ("generate",), "has_chat_template": True}
    return banner.block(CAPACITY, args(**values), **given)  # type: ignore[arg-type]


def test_all_that_is_needed() -> None:
    text = block()
    assert "k4v4: 43,856 tokens fit into 256 MiB, 11,648 would in bfloat16" in text
    assert "http://127.0.0.1:8000/v1\n" in text
    assert "http://127.0.0.1:8000/plugins/fraqtl/\n" in text
    assert '"content": "What is the capital of France?"' in text


def test_the_request_is_one_command() -> None:
    command = block().split("ask it")[1]
    words = shlex.split(command)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert words[-2] == "-d"
    assert json.loads(words[-1]) == {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }


def test_a_quote_in_the_question_survives_the_shell() -> None:
    command = banner.request("http://x", "it's", chat=True, key=False)
    assert '"model": "it\'s"' in shlex.split(command)[-1]


def test_without_a_chat_template() -> None:
    command = banner.request("http://x", "base", chat=False, key=False)
    assert "http://x/v1/completions" in command and '"prompt"' in command and "messages" not in command


def test_nothing_to_ask_of_a_model_that_does_not_generate() -> None:
    text = banner.block(CAPACITY, args(), name="m", tasks=("embed",), has_chat_template=False)
    assert "ask it" not in text and "API" in text


def test_the_key_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = block(api_key=["secret"])
    assert "secret" not in text and 'Authorization: Bearer $API_KEY"' in text


@pytest.mark.parametrize(
    ("values", "url"),
    [
        ({"host": None}, "http://127.0.0.1:8000"),
        ({"host": "::"}, "http://127.0.0.1:8000"),
        ({"host": "::1"}, "http://[::1]:8000"),
        ({"host": "10.0.0.5", "port": 80}, "http://10.0.0.5:80"),
        ({"ssl_certfile": "cert.pem"}, "https://127.0.0.1:8000"),
    ],
)
def test_where_a_client_finds_it(values: dict[str, object], url: str) -> None:
    assert banner.base_url(args(**values)) == url


def test_behind_a_prefix() -> None:
    assert "http://127.0.0.1:8000/llm/v1/chat/completions" in block(root_path="/llm")
