"""The calibration prompt: short texts of different kinds, in four sequences, at positions that cover the context.

The keys of a head lie along other axes at other positions, because RoPE turns them, and what calibration has not seen
is stored coarsely. So the first sequence runs from position 0 on, the second from where that ends (as far as the
context goes), and the other two jump through the rest, ever further. All begin at position 0, as every real sequence
does, so that the keys of its first tokens are seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SEQUENCES = 4
LENGTH = 512  # tokens a sequence; what fewer and more give: docs/results/calibration.md
CHUNKS = 8  # of tokens with consecutive positions, in a sequence
TEXTS = (
    "The harbour lay quiet before dawn. A woman in a grey coat walked to the end of the pier, counted the boats, "
    "and wrote the number into a small book. Eleven had come back; one was missing. She waited until the light of "
    "the lighthouse went out, then turned round and went home without a word to anybody.",
    'def moving_average(values, width):\n    """Mean of every run of `width`."""\n    total = '
    "sum(values[:width])\n    yield total / width\n    for old, new in zip(values, values[width:]):\n        total "
    "+= new - old\n        yield total / width\n\nprint(list(moving_average([3, 1, 4, 1, 5, 9, 2, 6], 3)))\n",
    "Question: a train leaves at 08:17 and needs 2 hours and 56 minutes. When does it arrive? Answer: 08:17 plus "
    "two hours is 10:17, plus 56 minutes is 11:13. Question: what is 12.5 % of 640? Answer: 80. Question: which is "
    "larger, 3/7 or 4/9? Answer: 27/63 is less than 28/63, so 4/9.",
    '{"order": 48213, "customer": {"name": "Ilse Brandt", "city": "Graz"}, "items": [{"sku": "A-77", "count": 2, '
    '"price": 19.90}, {"sku": "K-03", "count": 1, "price": 4.25}], "paid": true, "note": null, "sent": '
    '"2025-03-09"}',
    "Der Zug hielt auf freier Strecke, und niemand wusste, warum. Nach zehn Minuten kam der Schaffner und sagte, "
    "ein Schaf stehe auf den Gleisen. Les voyageurs se mirent a rire; un enfant demanda si le mouton avait un "
    "billet. El conductor no supo que contestar, y el tren siguio su camino.",
    "1. Wash the lentils and let them drain.\n2. Fry one onion and two cloves of garlic in oil until they are "
    "golden.\n3. Add cumin, the lentils and a litre of water.\n4. Cook for 25 minutes on a low flame; salt at the "
    "end.\n\nServes 4. Keeps for three days. Goes well with rice, flat bread or a spoon of yoghurt.",
    "User: my laptop gets hot when nothing runs. What should I check first?\nAssistant: open the list of processes "
    "and sort it by processor time. If something odd is at the top, stop it. If nothing is, clean the fan, and "
    "look whether the firmware has an update. Tell me what you find and we go on from there.",
    "Abstract. We measure how the level of a mountain lake follows rainfall over thirty years. A model with two "
    "reservoirs explains 87 % of the variance; the slower one has a half-life of 41 days. Snow melt shifts the "
    "maximum from June to July. The data, the code and the errors of every station are given in the appendix.",
    "The function opens a file and returns an object whose methods read from it. If the file does not exist, an "
    "error is raised. The optional argument mode says how the file is used; by default it is opened for reading, "
    "and text is decoded with the encoding of the platform. Changed in version 3.2: a context manager closes the "
    "file at the end.",
    "Room list. Anna Keller: room 4417, extension 208. Tomas Lind: room 1093, extension 551. The door code of the "
    "archive is 7730. The serial number of the red printer is KX-20419. The meeting on Tuesday is in room 3162; "
    "the one on Friday was moved to room 2875. Who sits in room 1093? Tomas Lind. What is the door code of the "
    "archive? 7730.",
    "User: remember that my locker number is 5528 and my badge says R-914.\nAssistant: Noted: locker 5528, badge "
    "R-914.\nUser: thanks. How do I get from the station to the office?\nAssistant: Take tram 6 to the market, "
    "then walk for five minutes along the river.\nUser: and what was my locker number?\nAssistant: Your locker "
    "number is 5528.",
    "NAME\n    split - cut a file into pieces\n\nSYNOPSIS\n    split [OPTION]... [FILE [PREFIX]]\n\n"
    "DESCRIPTION\n    Write pieces of FILE to PREFIXaa, PREFIXab, and so on; the default size is 1000 lines.\n    "
    "-b, --bytes=SIZE   put SIZE bytes into each piece\n    -n, --number=N     make N pieces of equal size\n    "
    "With no FILE, or when FILE is -, read standard input.",
    "LONDON, Thursday. Shares rose for a third day after the central bank left its rate unchanged at 4.25 per "
    'cent. Analysts had expected the decision, but not the tone of the statement. "Prices are falling more slowly '
    'than we hoped," the governor said, "and nobody should read a promise into this." The pound lost 0.6 per cent.',
    "Let n be even, so n = 2k for some integer k. Then n^2 = 4k^2 = 2(2k^2), which is even. Conversely, if n is "
    "odd, then n = 2k + 1 and n^2 = 4k^2 + 4k + 1, which is odd. Hence n is even if and only if n^2 is even. It "
    "follows that the square root of 2 is irrational: a fraction in lowest terms cannot have both parts even.",
    "Dear Ms Okafor,\n\nthank you for your letter of 3 May. We are sorry that the second parcel arrived damaged. A "
    "new one left our warehouse this morning and should reach you within four working days. You need not return "
    "the old one. If you have any further questions, please write to us or call between 9 and 17 o'clock.\n\nKind "
    "regards,\nJ. Marsh",
    "CREATE TABLE readings (station INTEGER NOT NULL, taken_at TEXT NOT NULL, celsius REAL);\nSELECT station, "
    "avg(celsius) AS mean FROM readings WHERE taken_at >= '2024-01-01' GROUP BY station HAVING count(*) > 100 "
    "ORDER BY mean DESC LIMIT 5;\n-- 17 | 14.2\n-- 3 | 13.9\n-- 22 | 11.05\n",
)


def texts_in_tokens(tokenizer: Any) -> list[list[int]]:
    """`TEXTS` in tokens, every other one as a chat if the tokenizer has a template. tokenizer: a Hugging Face one."""
    chats = bool(getattr(tokenizer, "chat_template", None))
    rows = []
    for i, text in enumerate(TEXTS):
        if chats and i % 2 == 0:
            messages = [{"role": "user", "content": text}]
            rows.append(list(tokenizer.apply_chat_template(messages, return_dict=False)))
        else:
            rows.append(list(tokenizer.encode(text)))
    return rows


def token_rows(texts: Sequence[Sequence[int]], length: int, first_token: int | None) -> list[list[int]]:
    """`SEQUENCES` rows of `length` tokens. texts: the tokens of `TEXTS`, each row starts with another one.

    first_token: what the tokenizer puts before every text, if anything. It stays at the start of a row only.
    """
    rows = []
    for number in range(SEQUENCES):
        start = number * len(texts) // SEQUENCES
        row = list(texts[start])
        while len(row) < length:
            start = (start + 1) % len(texts)
            text = texts[start]
            row += text[1:] if text and text[0] == first_token else text
        rows.append(row[:length])
    return rows


def positions(max_seq_len: int, length: int = LENGTH) -> Tensor:
    """(SEQUENCES, tokens of a sequence) int64, for a model whose context is `max_seq_len` tokens.

    length: tokens of a sequence at most, `max_seq_len` if that is less.
    """
    length = min(length, max_seq_len)
    near = torch.arange(length)
    chunk = length // CHUNKS
    last = max_seq_len - chunk
    if chunk == 0 or last < length:
        return near.expand(SEQUENCES, length).contiguous()
    count = CHUNKS - 1
    # In float64, whatever torch's default dtype is: vLLM sets it to the model's
    second = torch.linspace(length, min(length + chunk * (count - 1), last), count, dtype=torch.float64)
    low = min(2 * length, max(length, last // 8))
    far = low * (last / low) ** ((torch.arange(2 * count, dtype=torch.float64) + 1) / (2 * count))
    rows = [near]
    for starts in (second, far[0::2], far[1::2]):
        begin = torch.cat([starts.new_zeros(1), starts]).round().long().repeat_interleave(chunk)
        row = begin + torch.arange(len(begin)) % chunk
        rest = row[-1] + 1 + torch.arange(length - len(row))
        rows.append(torch.cat([row, rest.clamp_max(max_seq_len - 1)]))
    return torch.stack(rows)
