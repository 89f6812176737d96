"""instructor: objects by tool call and by JSON schema, whole and growing, and a second attempt."""

from __future__ import annotations

import sys
from typing import Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field, field_validator

from tests.clients.seen import MODEL, QUESTION, places, tell

ASK: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 99,
}


class Code(BaseModel):
    fruit: Literal["apple", "lemon"]
    code: int = Field(ge=1000, le=9999)


class Picky(Code):
    @field_validator("code")
    @classmethod
    def second_time_only(cls, code: int) -> int:
        seen.append(code)
        if len(seen) == 1:
            raise ValueError("again")
        return code


seen: list[int] = []


def main(url: str) -> None:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(OpenAI(base_url=f"{url}/v1", api_key="none"), mode=mode)
        code, answer = client.chat.completions.create_with_completion(response_model=Code, max_retries=0, **ASK)
        plain = places(answer)
        assert plain == ["fraqtl", "usage.kv_cache"] and code._raw_response is answer, plain
        growing = list(client.chat.completions.create_partial(response_model=Code, max_retries=0, **ASK))
        assert len(growing) > 3 and places(growing) == [], places(growing)
        assert isinstance(code, Code) and Code.model_validate(growing[-1].model_dump())
    _, answer = client.chat.completions.create_with_completion(response_model=Picky, max_retries=2, **ASK)
    # Tokens are summed over the attempts; the report stays that of the last.
    assert len(seen) == 2 and answer.usage.kv_cache["tokens"] == answer.fraqtl["tokens"]
    assert answer.fraqtl["tokens"] < answer.usage.total_tokens - 20
    tell("instructor", plain=plain, stream=places(growing))


main(sys.argv[1])
