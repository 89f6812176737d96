"""DSPy: its own engine and LiteLLM's, a signature by JSON schema, and one in a stream."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

import dspy
from dspy.lm15 import AccessPolicy, ModelSupport, OpenAIChatCompat, ProviderDefinition, register_provider
from dspy.streaming import StreamListener, StreamResponse

from tests.clients.seen import ANSWER, MODEL, QUESTION, places, tell

ITS_OWN = ["response.provider_data.fraqtl", "response.provider_data.usage.kv_cache"]
OF_LITELLM = {"response.fraqtl", "response.usage.kv_cache", "usage.kv_cache"}


class Fruit(dspy.Signature):
    """Read the text."""

    question: str = dspy.InputField()
    fruit: Literal["apple", "lemon"] = dspy.OutputField()


def lm(model: str, **options: Any) -> Any:
    return dspy.LM(f"{model}/{MODEL}", temperature=0, max_tokens=200, cache=False, **options)


async def stream(program: Any) -> list[Any]:
    """A signature in a stream, piece by piece and as a whole."""
    streaming = dspy.streamify(program, stream_listeners=[StreamListener("fruit")])
    return [piece async for piece in streaming(question=QUESTION)]


def main(url: str) -> None:
    for engine in ("auto", "litellm"):
        reader = lm("openai", api_base=f"{url}/v1", api_key="none", engine=engine)
        assert reader(QUESTION) == [ANSWER]
        shown = places(reader.history[-1])
        if engine == "auto":
            assert shown == ITS_OWN, shown
    assert {*shown} >= OF_LITELLM, shown
    # DSPy asks for a schema only where it's told that the server takes one.
    access = AccessPolicy(provider="fraqtl", env_keys=(), base_url=f"{url}/v1")
    provider = ProviderDefinition.chat(access, compat=OpenAIChatCompat.preset("vllm"), placeholder_key="none")
    register_provider(provider, supports=ModelSupport(response_schema=True))
    reader = lm("fraqtl")
    with dspy.context(lm=reader, adapter=dspy.JSONAdapter(), track_usage=True):
        found = dspy.Predict(Fruit)(question=QUESTION)
        assert found.fruit in ("apple", "lemon") and places([found, found.get_lm_usage()]) == []
        plain = places(reader.history[-1])
        pieces = asyncio.run(stream(dspy.Predict(Fruit)))
    assert isinstance(pieces[0], StreamResponse) and pieces[-1].fruit == found.fruit and places(pieces) == []
    assert plain == places(reader.history[-1]) == ITS_OWN and len(reader.history) == 2, plain
    tell("dspy", plain=plain, stream=places(reader.history[-1]))


main(sys.argv[1])
