"""An engine whose API server was killed ends, too: vLLM's own goes on for ever, with its memory.

Why, and until when: `hooks.ORPHANS`. The test of a killed server in tests/e2e/test_start.py shows what it does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from functools import cache
from threading import Thread
from typing import Any

ENGINE = "EngineCore"  # what vLLM calls the process, with a number behind it where there are several
SECONDS_TO_END = 10  # in which it may end as it does when asked to


@cache
def end_with_parent() -> None:
    """In the engine's process, watch the process that started it. In any other, nothing."""
    parent = multiprocessing.parent_process()
    if parent is not None and multiprocessing.current_process().name.startswith(ENGINE):
        Thread(target=_watch, args=(parent,), name="fraqtl-parent", daemon=True).start()


def _watch(parent: Any) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_END)
    os._exit(1)
