"""`fraqtl-serve chat` with a live server, piped and in a terminal."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.e2e.reports import ANSWER, BASELINE_BLOCK_BYTES, BLOCK_BYTES, QUESTION
from tests.e2e.server import Server
from tests.terminal import CTRL_D, ROOT, fraqtl_serve, terminal

ASKED = QUESTION.replace("\n", " ")
SAVED = re.compile(r"KV memory: ([\d.]+) KiB in k4v4 instead of ([\d.]+) KiB, 73 % saved; (\d+) tokens in (\d+) blocks")


def check_saving(text: str) -> None:
    found = SAVED.search(text)
    assert found, text
    blocks = int(found[4])
    assert (found[1], found[2]) == (f"{blocks * BLOCK_BYTES / 1024:.1f}", f"{blocks * BASELINE_BLOCK_BYTES / 1024:.1f}")
    assert blocks == -(-int(found[3]) // 16)


@pytest.mark.smoke
def test_piped(demo_server: Server) -> None:
    done = subprocess.run(
        fraqtl_serve("chat", "--url", demo_server.url),
        input=ASKED + "\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer, saved = done.stdout.splitlines()
    assert answer == ANSWER
    check_saving(saved)


def test_in_a_terminal(demo_server: Server) -> None:
    with terminal(*fraqtl_serve("chat", "--url", demo_server.url)) as user:
        user.wait_for("you> ")
        assert "fraqtl-demo at http" in user.text
        user.press(ASKED + "\n")
        user.wait_for(ANSWER, times=1)
        user.wait_for("you> ", times=2)
        check_saving(user.text)
        user.press(CTRL_D)
        assert user.wait_for_end() == 0
