from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.server import Server, forked


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Server]:
    """The demo model at its defaults (k4v4), shared by every test that only asks it questions."""
    with forked("--enable-auto-tool-choice", "--tool-call-parser", "hermes") as server:
        yield server
