"""Fewer garbage collections while a process starts.

Importing torch and vLLM makes millions of objects that stay. Python's collector looks through them again and again:
a fifth of the seconds that the imports take.
"""

from __future__ import annotations

import gc

USUAL = gc.get_threshold()
RARE = (100_000, 20, 100)


def collect_rarely() -> None:
    gc.set_threshold(*RARE)


def collect_as_usual() -> None:
    gc.set_threshold(*USUAL)
