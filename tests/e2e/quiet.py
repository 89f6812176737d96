"""Catches every warning a client library gives, as a Python warning or in a log, for tests of live clients."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Ignore = Callable[[warnings.WarningMessage], bool]


class _Ear(logging.Handler):
    """Keeps what is logged from warnings on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@contextmanager
def no_warnings(ignore: Ignore = lambda warning: False) -> Iterator[None]:
    """Fails at its end if a warning was given that `ignore` does not answer for."""
    gc.collect()  # what an earlier test left open is that test's
    with warnings.catch_warnings(record=True) as seen, _listening() as ear:
        warnings.simplefilter("always")
        yield
    loud = [str(warning) for warning in seen if not ignore(warning)] + ear.heard
    assert not loud, loud


@contextmanager
def _listening() -> Iterator[_Ear]:
    """Hears every logger below the root, also those that a library or an earlier test in this process silenced."""
    root, ear = logging.getLogger(), _Ear()
    loggers = [logger for logger in root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    silenced, floor, level = [logger for logger in loggers if logger.disabled], root.manager.disable, root.level
    try:
        for logger in silenced:
            logger.disabled = False
        logging.disable(logging.NOTSET)
        root.setLevel(min(level, logging.WARNING))
        root.addHandler(ear)
        yield ear
    finally:
        root.removeHandler(ear)
        root.setLevel(level)
        logging.disable(floor)
        for logger in silenced:
            logger.disabled = True
