"""The server's own numbers: the lab's windows and needles, sent to a running endpoint.

Perplexity comes from `prompt_logprobs`, the needle from greedy decoding after the same tokens. On a GPU a prompt that
is prefilled in one chunk may attend its own raw keys and then measures nothing: start the server with small chunks
(--max-num-batched-tokens), so that nearly every attended key is read from a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from fraqtl_bench.quality import texts, uncertainty
from fraqtl_bench.quality.fitted import Fitted, FittedLayer, FittedStream, fit
from fraqtl_bench.quality.lab import Lab
from fraqtl_bench.quality.methods import as_served, parse
from fraqtl_bench.quality.ruler.measure import measure_through
from fraqtl_bench.quality.ruler.question import Item as RulerItem
from fraqtl_bench.quality.schema import Capacity, Through
from fraqtl_bench.quality.score import Score, perplexity
from fraqtl_bench.quality.server_codec import read_constants
from fraqtl_bench.quality.tasks import Item
from fraqtl_kernels.errors import ConfigError

TIMEOUT = 600


class Endpoint:
    """A running server."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        """Raises ConfigError if no server of ours answers there."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self.client = client
        try:
            self.model = client.get(f"{self.url}/v1/models", timeout=TIMEOUT).raise_for_status().json()["data"][0]
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise ConfigError(f"no server answers at {url!r}: give the URL of a running fraqtl-serve") from error

    def _complete(self, ids: Sequence[int], **options: Any) -> dict[str, Any]:
        return self._post("completions", f"a prompt of {len(ids)} tokens", prompt=list(ids), **options)

    def _post(self, path: str, what: str, **options: Any) -> dict[str, Any]:
        body = {"model": self.model["id"], "temperature": 0, **options}
        try:
            reply = self.client.post(f"{self.url}/v1/{path}", json=body, timeout=TIMEOUT)
        except httpx.HTTPError as error:
            raise ConfigError(f"the server at {self.url!r} stopped answering: {type(error).__name__}") from error
        if reply.is_error:
            raise ConfigError(f"the server at {self.url!r} refused {what}: {reply.text[:200]}")
        found: dict[str, Any] = reply.json()
        return found

    def kv_format(self) -> str:
        """The format that the server's report names. Raises ConfigError if it sends none."""
        found = self._complete([1], max_tokens=1).get("fraqtl", {}).get("kv_format")
        if found is None:
            raise ConfigError(f"the server at {self.url!r} sends no fraqtl report: give the URL of a fraqtl-serve")
        return str(found)

    def capacity(self) -> dict[str, Any]:
        """What the server says of its pool; `kv_formats` is the format of every layer, None where they are alike."""
        try:
            found: dict[str, Any] = (
                self.client.get(f"{self.url}/plugins/fraqtl/capacity", timeout=TIMEOUT).raise_for_status().json()
            )
        except (httpx.HTTPError, ValueError) as error:
            raise ConfigError(f"the server at {self.url!r} does not say what its pool holds: {error}") from error
        return found

    def score(self, ids: Sequence[int], first: int) -> Score:
        """The same as `score.score`, from the log-probabilities that the server gives to the prompt's tokens."""
        given = self._complete(ids, max_tokens=1, prompt_logprobs=0)["choices"][0]["prompt_logprobs"]
        logs = [given[i][str(ids[i])]["logprob"] for i in range(first, len(ids))]
        ranks = [given[i][str(ids[i])]["rank"] for i in range(first, len(ids))]
        return Score(-sum(logs), len(logs), all(rank == 1 for rank in ranks))

    def says(self, item: Item, tokenizer: Any) -> bool:
        """Whether greedy decoding after the item's prompt gives its answer."""
        answer = item.ids[item.first :]
        reply = self._complete(item.ids[: item.first], max_tokens=len(answer), ignore_eos=True)
        said = reply["choices"][0]["text"]
        return bool(said.strip() == tokenizer.decode(list(answer)).strip())

    def reply(self, item: RulerItem) -> str:
        """What it replies to one of RULER's questions: by chat, or by completion where the lab's item is no chat.

        Raises ConfigError if the chat became another prompt there than here.
        """
        if not item.is_chat:
            return str(self._complete(item.prompt, max_tokens=item.limit)["choices"][0]["text"])
        go_on = {"continue_final_message": True, "add_generation_prompt": False, "max_tokens": item.limit}
        found = self._post("chat/completions", f"a chat, {item.name}", messages=item.question.messages, **go_on)
        tokens = found["usage"]["prompt_tokens"]
        if tokens != len(item.prompt):
            raise ConfigError(
                f"the server at {self.url!r} makes {tokens} tokens of a chat that has {len(item.prompt)} here: serve "
                f"the same model with its own chat template"
            )
        return found["choices"][0]["message"]["content"] or ""


def simulation(
    lab: Lab, name: str, calibration: Path | None, formats: Sequence[str] | None = None, *, residual: bool = False
) -> Fitted:
    """A server's format with the constants in its calibration file, or with those of the lab's calibration text.

    formats: of every layer, where they differ. residual: whether the server keeps residuals.
    """
    fitted = _fitted(lab, [as_served(each) if residual else each for each in formats or [name]])
    if calibration is None or not any(s.constants for layer in fitted.layers for s in (layer.key, layer.value)):
        return fitted
    constants = read_constants(calibration, lab.subject.layers)
    device = lab.subject.model.device
    layers = [
        FittedLayer(
            *(
                FittedStream(part.codec, {k: v.to(device) for k, v in own[stream].items()}, part.heads)
                for stream, part in (("key", layer.key), ("value", layer.value))
            )
        )
        for layer, own in zip(fitted.layers, constants, strict=True)
    ]
    return Fitted(fitted.method, tuple(layers))


def _fitted(lab: Lab, names: Sequence[str]) -> Fitted:
    """names: of the methods of all layers, or one for all."""
    by_name = {each: fit(parse(each, lab.settings.seed), lab.samples) for each in dict.fromkeys(names)}
    if len(names) == 1:
        return by_name[names[0]]
    method = replace(by_name[names[0]].method, name=" ".join(names))
    return Fitted(method, tuple(by_name[each].layers[i] for i, each in enumerate(names)))


def standard_error(there: Sequence[Score], here: Sequence[Score]) -> float | None:
    """Of the mean difference in nats a token, which is the relative one of two perplexities as long as it is small."""
    return uncertainty.standard_error(
        [a.nll - b.nll for a, b in zip(there, here, strict=True)], [s.tokens for s in there]
    )


def measure(
    lab: Lab, url: str, client: httpx.Client, calibration: Path | None = None, *, residual: bool = False
) -> Through:
    """Perplexity, and needle accuracy if the settings ask for it, through a server and by simulation of its format."""
    endpoint = Endpoint(url, client)
    name, capacity = endpoint.kv_format(), endpoint.capacity()
    fitted = simulation(lab, name, calibration, capacity.get("kv_formats"), residual=residual)
    key = f"simulated with {calibration}, " if calibration else ""
    windows: list[texts.Window] = list(lab.windows())
    there, here = [], []
    for window in windows:
        there.append(endpoint.score(window.ids, window.first))
        here.append(lab.scored(f"{key}window {window.index}", window.ids, window.first, fitted))
        lab.ticker.tick("server", f"{name}, window {window.index}")
    found, simulated = perplexity(there), perplexity(here)
    needles = lab.needle_items if "needle" in lab.settings.measures else []
    said = [endpoint.says(item, lab.subject.tokenizer) for item in needles]
    expected = [lab.scored(f"{key}needle {item.name}", item.ids, item.first, fitted).right for item in needles]
    ruler = simulated_ruler = None
    if "ruler" in lab.settings.measures:
        ruler, simulated_ruler = measure_through(
            lab.ruler_items, endpoint.reply, lambda item: lab.reply(item, fitted, key)
        )
    return Through(
        kv_format=name,
        residual=residual,
        perplexity=found,
        simulated=simulated,
        relative_difference=found / simulated - 1,
        standard_error=standard_error(there, here),
        tokens=sum(s.tokens for s in there),
        needle_accuracy=sum(said) / len(said) if said else None,
        simulated_needle_accuracy=sum(expected) / len(expected) if expected else None,
        ruler=ruler,
        simulated_ruler=simulated_ruler,
        capacity=Capacity(**{name: capacity.get(name) for name in Capacity.model_fields}),
    )
