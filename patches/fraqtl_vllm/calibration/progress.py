"""What the log says while calibration runs: one line at once, and another every few seconds."""

from __future__ import annotations

import time
from pathlib import Path

from fraqtl_vllm import _vllm

logger = _vllm.init_logger("vllm.fraqtl.calibration")

EVERY = 5.0  # seconds


class Progress:
    """The lines of one run. Its end is told by the worker, with the seconds that all took."""

    def __init__(self, kv_format: str, folder: Path) -> None:
        """folder: where the constants will be kept."""
        self.kv_format = kv_format
        self.folder = folder

    def begin(self, tokens: int, layers: int) -> None:
        self.layers, self.done = layers, 0
        self.start = self.told = time.monotonic()
        logger.info(
            "Calibrating %s constants: %d tokens, kept in %s for the next start", self.kv_format, tokens, self.folder
        )

    def layer_done(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.told >= EVERY and self.done < self.layers:
            self.told = now
            logger.info("Calibrating: %d of %d layers in %.0f s", self.done, self.layers, now - self.start)
