"""Every error that this project raises on purpose.

FraqtlError
├── ConfigError        a value the user gave is not valid; the message lists what is
├── UnsupportedError   a valid request that this software can't serve; the message says why
└── ServerError        (fraqtl_serve.cli.chat_client) the server that the user named can't be used
"""

from __future__ import annotations

from collections.abc import Iterable


class FraqtlError(Exception):
    """Base of every error raised on purpose; its text is one sentence for the user."""


class ConfigError(FraqtlError, ValueError):
    """A value given by the user is not valid."""


class UnsupportedError(FraqtlError, ValueError):
    """A combination that this software refuses rather than serving it wrongly."""


def one_of(what: str, given: object, valid: Iterable[object]) -> ConfigError:
    """The error for an unknown name: says what was given and lists what is valid."""
    return ConfigError(f"unknown {what} {given!r}: choose one of {', '.join(map(str, valid))}")
