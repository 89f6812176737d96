"""What a model replies, decoded greedily, and which answers stand in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from fraqtl_bench.quality.attention import attending
from fraqtl_bench.quality.cache import LabCache
from fraqtl_bench.quality.fitted import FittedLayer
from fraqtl_bench.quality.models import Subject
from fraqtl_bench.quality.ruler.question import Item


def found(item: Item, reply: str) -> list[bool]:
    """For each answer whether it stands in the reply as whole words, in capitals or not."""
    return [_stands(answer, reply) for answer in item.question.answers]


def _stands(answer: str, reply: str, then: str = r"(?!\w)") -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}{then}", reply, re.IGNORECASE) is not None


def _settled(item: Item, reply: str) -> bool:
    """Whether all answers stand there and whatever comes next can't change that."""
    return all(_stands(answer, reply, r"(?=\W)") for answer in item.question.answers)


@torch.inference_mode()
def greedy(subject: Subject, item: Item, layers: Sequence[FittedLayer] | None) -> str:
    """The reply with the cache in `layers`, up to where nothing more can be found in it."""
    model, tokenizer = subject.model, subject.tokenizer
    cache = LabCache(model.config.get_text_config(), layers)
    ends, ids, reply = _ends(subject), item.prompt, ""
    said: list[int] = []
    while len(said) < item.limit and not _settled(item, reply):
        inputs = torch.tensor([ids], device=model.device)
        with attending(model, layers) if not said else nullcontext():
            logits = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        token = int(logits.float().argmax())
        if token in ends:
            break
        said.append(token)
        reply = tokenizer.decode(said, skip_special_tokens=True)
        ids = (token,)
    return reply


def _ends(subject: Subject) -> set[int]:
    """The tokens that a server stops at."""
    given: Any = subject.model.generation_config.eos_token_id
    return {subject.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])}
