"""Catches every warning a client library gives, as a Python warning or in a log, for tests of live clients."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

Ignore = Callable[[warnings.WarningMessage], bool]


@contextmanager
def no_warnings(caplog: pytest.LogCaptureFixture, ignore: Ignore = lambda warning: False) -> Iterator[None]:
    """Fails at its end if a warning was given that `ignore` does not answer for."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    loud = [str(warning) for warning in seen if not ignore(warning)]
    loud += [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not loud, loud
