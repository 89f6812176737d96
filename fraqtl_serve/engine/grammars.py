"""Grammars that the engine can't compile are the client's mistake.

The API server checks `structured_outputs` against several grammar libraries, the engine compiles with the one that
its first such request chose. What only another one understands ends there with an error, before its first token;
vLLM answers 500, as if the server had failed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from fraqtl_serve._vllm import FinishReason, VLLMValidationError
from fraqtl_serve.engine import hooks

SAID = "structured_outputs can't be compiled: the grammar library of this server doesn't take it"


def watch(processor: Any) -> None:
    """Have `processor` (vLLM's OutputProcessor) say so to the handlers of such requests, which answer 400."""
    # Queues of sequences with a grammar that have said nothing yet; vLLM holds them while anybody listens.
    queues: WeakValueDictionary[str, Any] = WeakValueDictionary()
    hooks.GRAMMARS_START.wrap(processor, partial(_add_request_watched, queues))
    hooks.GRAMMARS_FAIL.wrap(processor, partial(_outputs_watched, queues))


def _add_request_watched(queues: WeakValueDictionary[str, Any], add_request: Callable[..., Any]) -> Callable[..., Any]:
    def watched(request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None) -> Any:
        if queue is not None and getattr(request.sampling_params, "structured_outputs", None) is not None:
            queues[request.request_id] = queue
        return add_request(request, prompt, parent_req, request_index, queue)

    return watched


def _outputs_watched(queues: WeakValueDictionary[str, Any], process_outputs: Callable[..., Any]) -> Callable[..., Any]:
    def watched(engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        if not queues:  # as nearly always
            return process_outputs(engine_core_outputs, *args, **kwargs)
        first = [(output, queues.pop(output.request_id, None)) for output in engine_core_outputs]
        result = process_outputs(engine_core_outputs, *args, **kwargs)
        for output, queue in first:
            if queue is not None and output.finish_reason is FinishReason.ERROR and not output.new_token_ids:
                queue.put(VLLMValidationError(SAID, parameter="structured_outputs"))
        return result

    return watched
