"""Hooks of the HTTP server: that each is still needed. How one is put on: tests/patches/test_hooks.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import fraqtl_serve
from fraqtl_serve.engine import hooks
from fraqtl_vllm.compat import Hook
from tests.symptoms import changed, writers

PACKAGE = Path(str(fraqtl_serve.__file__)).parent


def name(hook: Hook) -> str:
    return f"{hook.user.rpartition('.')[2]}: {hook.target}"


@pytest.mark.smoke
@pytest.mark.parametrize("hook", hooks.HOOKS, ids=name)
def test_vllm_still_needs_it(hook: Hook) -> None:
    assert [line for symptom in hook.symptoms for line in changed(symptom)] == []


@pytest.mark.parametrize("hook", hooks.HOOKS, ids=name)
def test_hooks_say_why_and_until_when(hook: Hook) -> None:
    assert hook.without and hook.until and hook.symptoms
    assert all(symptom.has or symptom.lacks for symptom in hook.symptoms)
    assert importlib.util.find_spec(hook.user) is not None


def test_nothing_else_replaces_anything() -> None:
    found = writers(PACKAGE, hooks)
    assert found.pop("openapi.py") == ["app.openapi = openapi"]  # which FastAPI documents
    # Of the command line's own arguments
    assert found.pop("serve.py") == [
        "setattr(args, self.dest, False)",
        "setattr(args, name, getattr(args, name) or value)",
    ]
    assert found == {}
