"""The built-in prompt: a few short texts of different kinds, run at start-up as sequences of their own.

Half of them start at position 0, as every real sequence does, so that the keys of its first tokens are seen. The
others start further into the context that the model allows: RoPE turns a key bias with the position, and a
centre must fit all positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fraqtl_vllm import _vllm

LENGTH = 64  # tokens a text
TEXTS = (
    "The harbour lay quiet before dawn. A woman in a grey coat walked to the end of the pier, counted the boats, and "
    "wrote the number into a small book. Eleven had come back; one was missing. She waited until the light of the "
    "lighthouse went out, then turned round and went home without a word to anybody.",
    'def moving_average(values, width):\n    """Mean of every run of `width`."""\n    total = sum(values[:width])\n'
    "    yield total / width\n    for old, new in zip(values, values[width:]):\n        total += new - old\n"
    "        yield total / width\n\nprint(list(moving_average([3, 1, 4, 1, 5, 9, 2, 6], 3)))\n",
    "Question: a train leaves at 08:17 and needs 2 hours and 56 minutes. When does it arrive? Answer: 08:17 plus two "
    "hours is 10:17, plus 56 minutes is 11:13. Question: what is 12.5 % of 640? Answer: 80. Question: which is larger, "
    "3/7 or 4/9? Answer: 27/63 is less than 28/63, so 4/9.",
    '{"order": 48213, "customer": {"name": "Ilse Brandt", "city": "Graz"}, "items": [{"sku": "A-77", "count": 2, '
    '"price": 19.90}, {"sku": "K-03", "count": 1, "price": 4.25}], "paid": true, "note": null, "sent": "2025-03-09"}',
    "Der Zug hielt auf freier Strecke, und niemand wusste, warum. Nach zehn Minuten kam der Schaffner und sagte, ein "
    "Schaf stehe auf den Gleisen. Les voyageurs se mirent a rire; un enfant demanda si le mouton avait un billet. "
    "El conductor no supo que contestar, y el tren siguio su camino.",
    "1. Wash the lentils and let them drain.\n2. Fry one onion and two cloves of garlic in oil until they are golden.\n"
    "3. Add cumin, the lentils and a litre of water.\n4. Cook for 25 minutes on a low flame; salt at the end.\n\n"
    "Serves 4. Keeps for three days. Goes well with rice, flat bread or a spoon of yoghurt.",
    "User: my laptop gets hot when nothing runs. What should I check first?\nAssistant: open the list of processes and "
    "sort it by processor time. If something odd is at the top, stop it. If nothing is, clean the fan, and look "
    "whether the firmware has an update. Tell me what you find and we go on from there.",
    "Abstract. We measure how the level of a mountain lake follows rainfall over thirty years. A model with two "
    "reservoirs explains 87 % of the variance; the slower one has a half-life of 41 days. Snow melt shifts the maximum "
    "from June to July. The data, the code and the errors of every station are given in the appendix.",
)


@dataclass(frozen=True)
class Prompt:
    """`sequences` texts of one length. ids: (tokens,) int64. positions: alike, or (3, tokens) for M-RoPE."""

    ids: Tensor
    positions: Tensor
    sequences: int


def make_prompt(model: Any) -> Prompt:
    """The texts in the tokens of a model. model: vLLM's ModelConfig."""
    length = min(LENGTH, model.max_model_len)
    rows = [repeat_to(ids, length) for ids in token_ids(model)]
    last = model.max_model_len - length
    starts = [0 if i % 2 == 0 else last * i // (len(rows) - 1) for i in range(len(rows))]
    positions = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
    if model.uses_mrope:
        positions = positions.expand(3, -1)
    return Prompt(torch.tensor(rows).flatten(), positions, len(rows))


def token_ids(model: Any) -> list[list[int]]:
    """The texts' tokens, every other one as a chat if the model has a template; random ones without a tokenizer."""
    if model.skip_tokenizer_init:
        random = torch.Generator().manual_seed(0)
        return torch.randint(model.get_vocab_size(), (len(TEXTS), LENGTH), generator=random).tolist()
    tokenizer = _vllm.cached_tokenizer_from_config(model)
    chats = bool(getattr(tokenizer, "chat_template", None))
    rows = []
    for i, text in enumerate(TEXTS):
        if chats and i % 2 == 0:
            messages = [{"role": "user", "content": text}]
            rows.append(list(tokenizer.apply_chat_template(messages, return_dict=False)))
        else:
            rows.append(list(tokenizer.encode(text)))
    return rows


def repeat_to(ids: list[int], length: int) -> list[int]:
    """The first `length` tokens, from the start again where there are fewer."""
    return (ids * (length // len(ids) + 1))[:length]
