"""RULER's tasks: every item is solved from its tokens alone by a few regular expressions that share no code with it."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from functools import cache
from typing import Any

import httpx
import pytest

from fraqtl_bench.quality.options import RULER_TASKS
from fraqtl_bench.quality.ruler.cells import overall, ruler_cells
from fraqtl_bench.quality.ruler.needles import KINDS
from fraqtl_bench.quality.ruler.question import Item, Question, fit, largest
from fraqtl_bench.quality.ruler.replies import found
from fraqtl_bench.quality.ruler.tasks import ruler_items
from fraqtl_bench.quality.ruler.words import LEAST, zeta_counts
from fraqtl_bench.quality.through_server import Endpoint
from fraqtl_kernels.errors import ConfigError
from tests.bench.quality_models import tokenizer

TOLERANCE = 96  # tokens: a needle of two long ids
REPEATS = 3


def without_chat() -> Any:
    plain = copy.copy(tokenizer())
    plain.chat_template = None
    return plain


@cache
def items(task: str, length: int, seed: int = 0) -> list[Item]:
    return ruler_items(tokenizer(), [task], [length], REPEATS, seed)


def solve_needle(text: str) -> list[str]:
    said, _, question = text.rpartition("What")
    keys = re.findall(r"[\w-]+", re.search(r"codes? for (.*)\?", question)[1])  # type: ignore[index]
    return [v for k, v in re.findall(r"The code for ([\w-]+) is ([\w-]+)\.", said) if k in keys]


def solve_tracking(text: str) -> list[str]:
    value = re.search(r"variables are (\d+) in the end\?", text)[1]  # type: ignore[index]
    holds: dict[str, str] = {}
    for name, given in re.findall(r"Set (\w+) to (\w+)\.", text):
        holds[name] = holds.get(given, given)
    return [name for name, held in holds.items() if held == value]


def solve_list(text: str) -> list[str]:
    return [word for word, _ in Counter(re.findall(r"\d+\. (\w+)", text)).most_common(5)]


def solve_coded(text: str) -> list[str]:
    return [word for word, _ in Counter(re.findall(r"\b[a-z]{6}\b", text.partition("\nWhich")[0])).most_common(3)]


def solve_conversation(text: str) -> list[str]:
    which, request = re.search(r"Repeat the (\w+) (\w+ about the \w+)\.", text).groups()  # type: ignore[union-attr]
    replies = re.findall(rf"Write a {request}\.[^A-Z]*([^.]*)\.", text)
    assert len(replies) == 2
    return [replies[which == "second"]]


SOLVERS = {**dict.fromkeys(KINDS, solve_needle), "vt": solve_tracking, "cwe": solve_list, "fwe": solve_coded}
SOLVERS["mrcr_2"] = solve_conversation


def asked(text: str, task: str) -> str:
    """What stands in the last turn of a rendered chat; a conversation is asked about as a whole."""
    return text if task == "mrcr_2" else text.split("<|user|>")[-1].split("<|assistant|>")[0]


@pytest.mark.parametrize("task", RULER_TASKS)
@pytest.mark.parametrize("length", [600, 1500, 4100])
def test_items_are_solved_from_their_tokens_and_as_long_as_asked(task: str, length: int) -> None:
    for item in items(task, length):
        text = tokenizer().decode(list(item.prompt))
        assert sorted(SOLVERS[task](asked(text, task))) == sorted(item.question.answers)
        assert length - TOLERANCE <= len(item.prompt) + item.limit <= length
        assert text.endswith(item.question.lead) and not any(found(item, item.question.lead))
    assert len({item.prompt for item in items(task, length)}) == REPEATS


@pytest.mark.parametrize("task", RULER_TASKS)
def test_the_seed_decides_and_the_length_only_adds(task: str) -> None:
    assert items(task, 600) == ruler_items(tokenizer(), [task], [600], REPEATS, 0)
    assert not {i.question.answers for i in items(task, 600)} & {i.question.answers for i in items(task, 600, seed=1)}


def test_every_kind_has_the_needles_of_its_name() -> None:
    answers = {task: len(items(task, 600)[0].question.answers) for task in RULER_TASKS}
    assert answers == {
        **dict.fromkeys(KINDS, 1), "niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 5, "fwe": 3, "mrcr_2": 1
    }  # fmt: skip
    hidden = {task: len(re.findall("The code for", items(task, 600)[0].question.turns[0])) for task in KINDS}
    several = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    many = {task: hidden[task] for task in ("niah_multikey_2", "niah_multikey_3")}
    assert hidden == {**dict.fromkeys(KINDS, 1), **several, **many} and min(many.values()) > 4


def test_needles_lie_all_over_the_text() -> None:
    places = []
    for item in ruler_items(tokenizer(), ["niah_single_2"], [600], 20, 0):
        text = item.question.turns[0]
        places.append(text.index(f" is {item.question.answers[0]}.") / len(text))
    assert min(places) < 0.2 and max(places) > 0.8 and 0.3 < sum(places) / 20 < 0.7


def test_both_needles_of_a_conversation_are_asked_for() -> None:
    asked_for = set()
    for item in ruler_items(tokenizer(), ["mrcr_2"], [400], 12, 0):
        asked_for.add(item.question.turns[-1].split()[2])
    assert asked_for == {"first", "second"}


def test_chats_become_the_tokens_that_a_chat_template_makes() -> None:
    item = items("vt", 600)[0]
    roles = [message["role"] for message in item.question.messages]
    assert roles == ["user", "assistant", "user", "assistant"] and item.is_chat
    *before, lead = item.question.messages
    given = tokenizer().apply_chat_template(before, add_generation_prompt=True, tokenize=False) + lead["content"]
    assert list(item.prompt) == tokenizer()(given, add_special_tokens=False).input_ids


def test_without_a_chat_template_turns_are_lines() -> None:
    [item] = ruler_items(without_chat(), ["vt"], [400], 1, 0)
    assert not item.is_chat and item.prompt[0] == tokenizer().bos_token_id
    said = tokenizer().decode(list(item.prompt[1:])).strip()
    assert said == "\n".join((*item.question.turns, item.question.lead))


@pytest.mark.parametrize("limit", range(70))
def test_the_largest_size_that_fits_is_found(limit: int) -> None:
    assert largest(lambda size: size <= limit) == limit and largest(lambda size: False) == -1


def test_lengths_that_hold_no_item_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--ruler-lengths 100: cwe takes \d+ tokens or more: give longer ones"):
        ruler_items(tokenizer(), ["cwe"], [100], 1, 0)


def test_ranks_that_are_asked_for_differ_in_count() -> None:
    assert zeta_counts(1000)[:4] == [607, 151, 67, 37]  # 6000/π² over the squares of 1, 2, 3, 4
    for total in range(LEAST, 5000):
        counts = zeta_counts(total)
        assert counts[1] > counts[2] > counts[3] > counts[4] and sum(counts) <= total


def small(*answers: str) -> Item:
    return fit(tokenizer(), lambda size: Question(("a " * size,), "It is", answers), "vt", 80, 0)


def test_answers_count_as_whole_words() -> None:
    item = small("1234", "ABC")
    assert found(item, " 1234, abc.") == [True, True]
    assert found(item, " 12345 xabc") == [False, False]
    assert found(item, "1234") == [True, False]


def test_cells_count_answers_and_say_how_sure_they_are() -> None:
    one, two = small("1234"), small("1234", "ABC")
    [cell] = ruler_cells([one] * 4, ["1234", "", "1234 x", "1234"], ["1234", "1234", "", "1234"])
    assert (cell.items, cell.answers, cell.found, cell.lost, cell.gained) == (4, 4, 3, 1, 1)
    assert cell.accuracy == 0.75 and cell.standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    [cell] = ruler_cells([two, two], ["1234", "1234 ABC"])
    assert (cell.answers, cell.found, cell.accuracy, cell.lost, cell.gained) == (4, 3, 0.75, 0, 0)
    assert cell.standard_error == pytest.approx(0.25 / 2**0.5)  # of 0.5 and 1, not of four answers
    mean, error = overall([cell, cell])
    assert mean == 0.75 and error == pytest.approx(cell.standard_error / 2**0.5)


class ChatServer:
    """Says what it was asked, rendered as vLLM does, with `extra` tokens more than there are."""

    def __init__(self, extra: int = 0) -> None:
        self.extra = extra
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "demo"}]})
        body = json.loads(request.content)
        self.bodies.append(body)
        if request.url.path == "/v1/completions":
            return httpx.Response(200, json={"choices": [{"text": tokenizer().decode(body["prompt"])}]})
        assert body["continue_final_message"] and not body["add_generation_prompt"]
        ids = tokenizer().apply_chat_template(body["messages"], continue_final_message=True, return_dict=False)
        said = {"message": {"content": tokenizer().decode(ids)}}
        return httpx.Response(200, json={"choices": [said], "usage": {"prompt_tokens": len(ids) + self.extra}})


def test_a_server_is_asked_by_chat_and_must_see_the_same_tokens() -> None:
    item = items("mrcr_2", 600)[0]
    [plain] = ruler_items(without_chat(), ["vt"], [400], 1, 0)
    server = ChatServer()
    with httpx.Client(transport=httpx.MockTransport(server)) as client:
        endpoint = Endpoint("http://server", client)
        assert found(item, endpoint.reply(item)) == [True]
        assert all(found(plain, endpoint.reply(plain)))
    assert [body["temperature"] for body in server.bodies] == [0, 0]
    assert [body["max_tokens"] for body in server.bodies] == [item.limit, plain.limit]
    with httpx.Client(transport=httpx.MockTransport(ChatServer(extra=3))) as client:
        more = len(item.prompt) + 3
        with pytest.raises(
            ConfigError, match=f"makes {more} tokens of a chat that has {more - 3} here: serve the same"
        ):
            Endpoint("http://server", client).reply(item)
