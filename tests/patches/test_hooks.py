"""Hooks: that each is still needed, and how one is put on. A failure here is good news, or a new vLLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fraqtl_vllm
from fraqtl_vllm import compat
from fraqtl_vllm._vllm import VERSION
from fraqtl_vllm.compat import Hook, Symptom
from fraqtl_vllm.hooks import HOOKS
from tests.symptoms import changed, not_of_vllm, replacements, writers
from tests.symptoms import source as stock_source

PACKAGE = Path(str(fraqtl_vllm.__file__)).parent
HOOK = Hook("Thing.method", "somewhere", "nothing", "never", ())


@pytest.mark.smoke
@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target)
def test_vllm_still_needs_it(hook: Hook) -> None:
    found = [line for symptom in hook.symptoms for line in changed(symptom)]
    assert found == [] if hook.only in ("", VERSION) else found


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target)
def test_hooks_say_why_and_until_when(hook: Hook) -> None:
    assert hook.without and hook.until and hook.symptoms
    assert all(symptom.has or symptom.lacks for symptom in hook.symptoms)
    assert importlib.util.find_spec(hook.user) is not None


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if not_of_vllm(hook)], ids=lambda hook: hook.target)
def test_what_is_added_has_a_name_of_ours_only(hook: Hook) -> None:
    assert hook.attribute not in "".join(stock_source(symptom.place) for symptom in hook.symptoms)


def test_a_symptom_that_is_gone_is_seen() -> None:
    place = "vllm.utils.network_utils:zmq_socket_ctx"
    assert changed(Symptom(place, has=("except KeyboardInterrupt:",), lacks=("raise",))) == []
    assert changed(Symptom(place, has=("except SystemExit:",))) == [f"{place}: no longer has 'except SystemExit:'"]
    assert changed(Symptom(place, lacks=("KeyboardInterrupt",))) == [f"{place}: now has 'KeyboardInterrupt'"]


def test_nothing_else_replaces_anything() -> None:
    assert writers(PACKAGE, compat) == {}


@pytest.mark.parametrize(
    "line",
    [
        "owner.method = replacement",
        "owner.part.method = replacement",
        "owner.a, owner.b = (replacement, other)",
        "owner.method = lambda: None",
        "setattr(owner, 'method', 3)",
    ],
)
def test_a_replacement_is_seen(line: str) -> None:
    assert replacements(f"def replacement(): ...\ndef install(owner, other):\n    {line}\n") == [line]


def test_what_is_ones_own_is_no_replacement() -> None:
    assert (
        replacements("def f(): ...\nclass A:\n    def __init__(self, b):\n        self.f = f\n        b.n = 3\n") == []
    )


class Thing:
    def method(self, value: int) -> int:
        return value

    @classmethod
    def make(cls, value: int) -> str:
        return f"{cls.__name__} {value}"


def plus_one(original: Any) -> Any:
    return lambda *arguments: original(*arguments) + 1


def test_an_object_is_wrapped_once_and_others_are_not() -> None:
    first, second = Thing(), Thing()
    for _ in range(2):
        HOOK.wrap(first, plus_one)
    assert (first.method(3), second.method(3)) == (4, 3)
    assert first.method.__name__ == "method"


def test_hooks_of_one_method_wrap_each_other() -> None:
    thing = Thing()
    other = Hook("Thing.method", "elsewhere", "nothing", "never", ())
    for hook in (HOOK, other, HOOK, other):
        hook.wrap(thing, plus_one)
    assert thing.method(3) == 5


def test_a_class_is_wrapped_with_its_methods_kinds() -> None:
    class Own(Thing):
        pass

    HOOK.wrap(Own, plus_one)
    Hook("Thing.make", "somewhere", "nothing", "never", ()).wrap(Own, lambda make: lambda value: make(value) + "!")
    assert (Own().method(3), Own.make(3), Own().make(3)) == (4, "Own 3!", "Own 3!")
    assert (Thing().method(3), Thing.make(3)) == (3, "Thing 3")


def test_a_value_is_put_for_now() -> None:
    thing = SimpleNamespace(method=1)
    with pytest.raises(ValueError, match="boom"), HOOK.put_for_now(thing, 2):
        assert thing.method == 2
        raise ValueError("boom")
    assert thing.method == 1
