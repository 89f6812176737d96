"""The HTTP half of `fraqtl-serve chat`: finds the server's model, streams answers, reads their reports.

Whatever goes wrong ends in a ServerError with one sentence for the user.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from fraqtl_kernels.errors import FraqtlError

TIMEOUT = httpx.Timeout(10, read=600)  # a long prompt can take minutes to its first token
STOPPED_TRIES = 10


class ServerError(FraqtlError):
    """The server that the user named can't be used, or failed."""


@dataclass
class Answer:
    id: str = ""
    text: str = ""
    report: dict[str, Any] | None = None


class ChatClient:
    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model or ""
        self._has_key = bool(api_key)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT)
        except (httpx.InvalidURL, UnicodeEncodeError):
            raise ServerError(f"{url!r} is no URL: give one like http://127.0.0.1:8000") from None

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def connect(self) -> str:
        """Check the server and choose its model; returns the name of its KV-cache format."""
        models = [str(model["id"]) for model in self._get("/v1/models")["data"]]
        if self.model and self.model not in models:
            raise ServerError(f"the server at {self.url} has no model {self.model}: choose one of {', '.join(models)}")
        self.model = self.model or models[0]
        return str(self._get("/plugins/fraqtl/capacity", "is no fraqtl server")["kv_format"])

    def stream(self, messages: list[dict[str, str]], answer: Answer) -> Generator[str, None, None]:
        """Pieces of the answer as they come; the whole of it and its report are kept in `answer`."""
        body = {"model": self.model, "messages": messages, "stream": True}
        with self._sentences(), self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise ServerError(self._refusal(response))
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                payload = json.loads(line.removeprefix("data: "))
                if "error" in payload:
                    raise ServerError(f"the server gave up: {payload['error'].get('message', 'no reason given')}")
                answer.id = payload.get("id") or answer.id
                answer.report = payload.get("fraqtl") or answer.report
                for choice in payload.get("choices", ()):
                    delta = choice.get("delta") or {}
                    answer.text += delta.get("content") or ""
                    if piece := (delta.get("reasoning") or "") + (delta.get("content") or ""):
                        yield piece

    def report_of_stopped(self, answer: Answer) -> dict[str, Any] | None:
        """What an answer held when it was stopped, once the engine has let go of it; None if nobody knows."""
        report: dict[str, Any] | None = None
        for _ in range(STOPPED_TRIES if answer.id else 0):
            with suppress(httpx.HTTPError):
                response = self._http.get(f"/plugins/fraqtl/requests/{answer.id}")
                if response.status_code == 200:
                    report = response.json()["report"]
                    break
            time.sleep(0.1)
        return report

    def _get(self, path: str, otherwise: str = "does not speak OpenAI's API") -> Any:
        with self._sentences():
            response = self._http.get(path)
        if response.status_code in (401, 403):
            raise ServerError(self._refusal(response))
        try:
            if response.status_code == 200:
                return response.json()
        except ValueError:
            pass
        if response.status_code >= 500:
            raise ServerError(self._refusal(response))
        raise ServerError(f"the server at {self.url} {otherwise}: start one with fraqtl-serve serve")

    def _refusal(self, response: httpx.Response) -> str:
        if response.status_code == 401:
            if self._has_key:
                return f"the server at {self.url} refuses this API key: give another with --api-key"
            return f"the server at {self.url} wants an API key: give it with --api-key or VLLM_API_KEY"
        try:
            reason = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            reason = response.text[:200]
        return f"the server answered {response.status_code}: {reason}"

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except httpx.UnsupportedProtocol:
            raise ServerError(f"{self.url!r} is no URL: give one like http://127.0.0.1:8000") from None
        except httpx.ConnectError:
            raise ServerError(
                f"no server answers at {self.url}: start one with fraqtl-serve serve, or name another with --url"
            ) from None
        except httpx.TimeoutException:
            raise ServerError(f"the server at {self.url} takes too long to answer") from None
        except (httpx.HTTPError, ValueError) as error:
            raise ServerError(f"the server at {self.url} went away in the middle of an answer: {error}") from None
