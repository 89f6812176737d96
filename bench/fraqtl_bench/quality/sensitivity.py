"""What each layer of a model costs in each format, while all others keep 16 bits.

The cost is the divergence of the next token from that with a 16-bit cache: KL in nats, a mean over the scored tokens.
It is never below zero, so it stands out of the noise of a short text where a difference of losses does not. And the
divergences of errors that know nothing of each other add up, to second order.

The layers below the one that is stored compute what they did without it. So they are run once a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from fraqtl_bench.quality.cache import logits
from fraqtl_bench.quality.divergence import compare
from fraqtl_bench.quality.fitted import Fitted
from fraqtl_bench.quality.lab import Lab
from fraqtl_bench.quality.models import Subject
from fraqtl_bench.quality.texts import Window


def sensitivity(
    lab: Lab, windows: Sequence[Window], exact: Fitted, formats: Mapping[str, Fitted]
) -> dict[str, list[float]]:
    """Format -> per layer, nats a token that it costs when no other layer is stored in it."""
    total = {name: [0.0] * lab.subject.layers for name in formats}
    for window in windows:
        below = Below(lab.subject, window, exact)
        for layer in range(lab.subject.layers):
            key = f"{lab.subject.name}/sensitivity {window.index} layer {layer}"
            found = lab.progress.get(key, partial(below.divergences, layer, formats))
            for name, nats in found.items():
                total[name][layer] += nats
            lab.ticker.tick("budget", f"layer {layer}")
    tokens = sum(window.scored for window in windows)
    return {name: [nats / tokens for nats in layers] for name, layers in total.items()}


class Below:
    """One window, and what every layer gave for it with a 16-bit cache; computed when it is first asked for."""

    def __init__(self, subject: Subject, window: Window, exact: Fitted) -> None:
        self.model = subject.model
        self.blocks = decoder_blocks(self.model, subject.layers)
        self.window = window
        self.exact = exact
        self.outputs: list[Any] = []
        self.reference: Tensor | None = None

    def divergences(self, layer: int, formats: Mapping[str, Fitted]) -> dict[str, float]:
        return {name: self.divergence(layer, stored) for name, stored in formats.items()}

    def divergence(self, layer: int, stored: Fitted) -> float:
        """Summed over the scored tokens of the window, with one layer as `stored` has it."""
        if self.reference is None:
            with _noting(self.blocks, self.outputs):
                self.reference = self._logits(self.exact)
        own = Fitted(
            self.exact.method, (*self.exact.layers[:layer], stored.layers[layer], *self.exact.layers[layer + 1 :])
        )
        with ExitStack() as stack:
            for block, output in zip(self.blocks[:layer], self.outputs, strict=False):
                stack.enter_context(_giving(block, output))
            return sum(compare(self._logits(own), self.reference, self.window.first).kl)

    def _logits(self, fitted: Fitted) -> Tensor:
        return logits(self.model, self.window.ids[:-1], fitted.layers, len(self.window.ids) - self.window.first)


def decoder_blocks(model: nn.Module, layers: int) -> list[nn.Module]:
    """The decoder's blocks, in order: the outermost list of as many modules as the model has layers."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
    return list(next(lists))


@contextmanager
def _noting(blocks: Sequence[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Within the context, `outputs` gets what each block gives."""
    hooks = [block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _giving(block: nn.Module, output: Any) -> Iterator[None]:
    """Within the context, the block computes nothing and gives `output`."""
    block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del block.forward
