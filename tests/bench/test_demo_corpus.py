"""What the demo model is trained on: the annotations must point at the right tokens."""

from __future__ import annotations

import random

import pytest

from fraqtl_bench.demo_model.corpus import NAMES, Corpus, standard_library_prose
from fraqtl_bench.demo_model.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    prose = standard_library_prose(limit_bytes=200_000)
    return Corpus(train_tokenizer(prose, vocab_size=1024), prose)


@pytest.mark.parametrize("length", [64, 256, 1024])
def test_samples_have_the_length_and_copies_equal_their_source(corpus: Corpus, length: int) -> None:
    rng = random.Random(length)
    copies = 0
    for _ in range(20):
        sample = corpus.sample(rng, length)
        assert len(sample.ids) == len(sample.answer) == len(sample.source) == length
        for i, source in enumerate(sample.source):
            if source >= 0:
                assert source < i
                assert sample.ids[source] == sample.ids[i]
                assert sample.answer[i]
                copies += 1
    assert copies > 50


def test_a_seed_decides_everything(corpus: Corpus) -> None:
    first, again, other = (corpus.sample(random.Random(s), 300).ids for s in (1, 1, 2))
    assert first == again != other


def test_recall_answers_are_in_the_text(corpus: Corpus) -> None:
    sample = corpus.recall(random.Random(3), 600)
    text = corpus.tokenizer.decode(sample.ids, skip_special_tokens=False)
    question = text.split("What is the")[1]
    value = question.split(" is ")[1][:4] if " is " in question else ""
    assert value.isdigit()
    assert text.count(value) >= 2


def test_names_are_single_words() -> None:
    assert len(set(NAMES)) == len(NAMES) > 150
    assert all(name.isalpha() and name.islower() for name in NAMES)
