"""LiteLLM against a live server, at home and in its proxy's way of looking: answer, usage, headers, callbacks."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic.warnings import PydanticDeprecatedSince211

from tests.e2e.quiet import no_warnings
from tests.e2e.reports import ANSWER, MODEL, check_mirror, check_sequence, messages
from tests.e2e.server import Server

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices when it is imported
import litellm


def from_litellm_itself(warning: warnings.WarningMessage) -> bool:
    """It reads pydantic's `model_fields` from an instance in every stream that has usage, with or without a report."""
    return warning.category is PydanticDeprecatedSince211 and "model_response_utils" in warning.filename


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with no_warnings(from_litellm_itself):
        yield


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set once LiteLLM's own logging is through, which runs in a thread and could still warn."""
    done = threading.Event()
    monkeypatch.setattr(litellm, "success_callback", [lambda *_: done.set()])
    yield done


def ask(server: Server, **options: Any) -> Any:
    common: dict[str, Any] = {"api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0, "timeout": 120}
    return litellm.completion(model=f"openai/{MODEL}", messages=messages(), **common, **options)


def test_plain(demo_server: Server, logged: threading.Event) -> None:
    answer = ask(demo_server)
    assert logged.wait(60)
    assert answer.choices[0].message.content == ANSWER
    check_sequence(answer.fraqtl, answer.usage)
    check_mirror(answer.usage.kv_cache, answer.fraqtl)
    headers = answer._hidden_params["additional_headers"]
    assert headers["llm_provider-x-fraqtl-kv-bytes"] == str(answer.fraqtl["bytes"])
    assert headers["llm_provider-x-fraqtl-kv-saved-bytes"] == str(answer.fraqtl["saved_bytes"])


def test_streaming(demo_server: Server, logged: threading.Event) -> None:
    chunks = list(ask(demo_server, stream=True))
    assert logged.wait(60)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert [hasattr(chunk, "fraqtl") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_streaming_with_usage(demo_server: Server, logged: threading.Event) -> None:
    # LiteLLM makes the usage chunk anew and leaves the report behind; the counts and the text must survive.
    chunks = list(ask(demo_server, stream=True, stream_options={"include_usage": True}))
    assert logged.wait(60)
    answer: Any = litellm.stream_chunk_builder(chunks, messages=messages())
    assert answer.choices[0].message.content == ANSWER
    plain = ask(demo_server)
    assert answer.usage.total_tokens == plain.usage.total_tokens
