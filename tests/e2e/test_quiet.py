"""The guard of the client tests hears what it is there for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import pytest

from tests.e2e.quiet import no_warnings


def test_nothing_said() -> None:
    with no_warnings():
        logging.getLogger("some.library").info("all is well")


def test_warnings_are_heard() -> None:
    with pytest.raises(AssertionError, match="one"), no_warnings():
        warnings.warn("one", stacklevel=1)
    with no_warnings(ignore=lambda warning: "one" in str(warning.message)):
        warnings.warn("one", stacklevel=1)


def disable_one() -> None:
    logging.getLogger("some.library").disabled = True


def disable_all() -> None:
    logging.disable(logging.CRITICAL)


def raise_the_level() -> None:
    logging.getLogger().setLevel(logging.CRITICAL)


@pytest.mark.parametrize("silence", [lambda: None, disable_one, disable_all, raise_the_level])
def test_logs_are_heard_even_if_something_silenced_them(silence: Callable[[], None]) -> None:
    root, logger = logging.getLogger(), logging.getLogger("some.library")
    before = root.level
    try:
        silence()
        state = root.level, root.manager.disable, logger.disabled
        with pytest.raises(AssertionError, match="two"), no_warnings():
            logger.warning("two")
        assert (root.level, root.manager.disable, logger.disabled) == state
    finally:
        root.setLevel(before)
        logging.disable(logging.NOTSET)
        logger.disabled = False
