from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreOutput, FinishReason

from fraqtl_serve.engine import grammars
from tests.serve.fake_engine import FakeProcessor


class Queue:
    def __init__(self) -> None:
        self.put_in: list[Any] = []

    def put(self, item: Any) -> None:
        self.put_in.append(item)


@pytest.fixture
def processor() -> FakeProcessor:
    processor = FakeProcessor()
    grammars.watch(processor)
    return processor


def admit(processor: FakeProcessor, key: str, *, grammar: bool) -> Queue:
    queue = Queue()
    params = SimpleNamespace(structured_outputs="a grammar" if grammar else None)
    processor.add_request(
        SimpleNamespace(request_id=key, external_req_id=key, sampling_params=params), "hi", None, 0, queue
    )
    return queue


def end(
    processor: FakeProcessor, *keys: str, reason: FinishReason | None = FinishReason.ERROR, tokens: int = 0
) -> None:
    processor.process_outputs([EngineCoreOutput(key, [1] * tokens, finish_reason=reason) for key in keys])


def test_grammar_that_the_engine_cannot_compile(processor: FakeProcessor) -> None:
    with_grammar, without = admit(processor, "a", grammar=True), admit(processor, "b", grammar=False)
    end(processor, "a", "b")
    [error] = with_grammar.put_in
    assert isinstance(error, VLLMValidationError) and error.parameter == "structured_outputs"
    assert without.put_in == []
    assert [output.request_id for output in processor.seen] == ["a", "b"]


def test_errors_after_the_first_token_stay_the_servers(processor: FakeProcessor) -> None:
    queue = admit(processor, "a", grammar=True)
    end(processor, "a", reason=None, tokens=1)
    end(processor, "a")
    assert queue.put_in == []


def test_sequence_that_nobody_listens_to_is_forgotten(processor: FakeProcessor) -> None:
    admit(processor, "a", grammar=True)  # its queue is gone when this returns
    end(processor, "a")
