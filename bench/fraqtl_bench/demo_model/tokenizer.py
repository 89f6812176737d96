"""The demo model's tokenizer: byte-level BPE, every digit a token of its own."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fraqtl_bench.demo_model.corpus import CHAT_TEMPLATE, FACTS, NAMES, SPECIAL_TOKENS, grammar_sentence, made_up_name


def train_tokenizer(prose: list[str], vocab_size: int, seed: int = 0) -> Tokenizer:
    """Byte-pair merges learnt on prose, the sentence grammar and the wording of the tasks."""
    rng = random.Random(seed)
    text = list(prose)
    text += [grammar_sentence(rng) for _ in range(3000)]
    for name in NAMES * 60:
        statement, question = rng.choice(list(FACTS.values()))
        text += [question.format(k=name), statement.format(k=name, v=rng.randrange(1000, 10000))]
    text += [made_up_name(rng) for _ in range(2000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = "<|bos|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            ),
        ]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write the files that transformers and vLLM read."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
