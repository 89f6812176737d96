"""Which requests to the engine are the beams of a search.

vLLM's beam search runs every beam one token further as a request of its own, in rounds. It tells them apart by a
suffix of their ids, which a client that chooses its own id can imitate; so here the search itself is watched, and a
context variable says of what it starts that it is a beam.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from fraqtl_serve._vllm import BeamSearchOnlineMixin
from fraqtl_serve.engine import hooks


@dataclass(eq=False)
class Search:
    """The beam search of one prompt."""

    request_id: str
    """vLLM's id of the prompt."""
    round: str = ""
    """What the ids of the running round's beams begin with: vLLM makes it up anew for every round."""
    beams: int = 0
    """How many beams the running round has so far."""
    keys: set[str] = field(default_factory=set)
    """The engine's ids of them."""

    def join(self, request_id: str) -> tuple[int, set[str]]:
        """Count one more beam. Returns how many are over by that, and their keys: those of the last round, or none."""
        this = request_id.rpartition("-beam-")[0]
        over: tuple[int, set[str]] = (0, set())
        if this != self.round:
            over = self.beams, self.keys
            self.round, self.beams, self.keys = this, 0, set()
        self.beams += 1
        return over


current_search: ContextVar[Search | None] = ContextVar("fraqtl_search", default=None)


def watch(handler: type[Any] = BeamSearchOnlineMixin) -> None:
    """Have `current_search` say, while a search of `handler` runs, which one it is; once for a class."""
    hooks.BEAM_SEARCH.wrap(handler, _watched)


def _watched(beam_search: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    def watched(self: Any, prompt: Any, request_id: str, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        return _searching(Search(request_id), beam_search(self, prompt, request_id, *args, **kwargs))

    return watched


async def _searching(search: Search, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    async with aclosing(outputs):
        while True:
            # A generator shares the context of whoever asks it for the next item: there it must not stay set.
            token = current_search.set(search)
            try:
                output = await anext(outputs, None)
            finally:
                current_search.reset(token)
            if output is None:
                return
            yield output
