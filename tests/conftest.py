"""Before anything imports Triton: its interpreter runs the GPU kernels here, and must be chosen that early.

FRAQTL_TEST_DEVICE=cuda runs the same tests, compiled, on a GPU. Servers and engines that tests start
don't inherit the switch.
"""

from __future__ import annotations

import os

if os.environ.get("FRAQTL_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
