"""`python -m fraqtl_serve.cli.prepare`: what a first start would compile, compiled at installation, all cores at once.

Numba compiles the kernels of a CPU in half a minute, and Python the thousands of modules that a server imports in a
quarter of one. Each kernel and the imports have a process of their own. What other modules there are, Python compiles
when they are imported: a server needs a third of what is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

IMPORTS = (
    "fraqtl_serve.plugin",
    "vllm.entrypoints.cli.serve",
    "vllm.v1.engine.core",
    "vllm.v1.worker.{device}_worker",
    "vllm.model_executor.models.llama",
)


def commands(device: str) -> dict[str, str]:
    """What to run, in Python, by what it is called. device: cpu or gpu."""
    imports = ", ".join(IMPORTS).format(device=device)
    by_name = {"modules of the server": f"import {imports}"}
    if device == "cpu":
        from fraqtl_kernels.cpu import WARM_UPS

        for number, part in enumerate(WARM_UPS):
            code = f"from fraqtl_kernels.cpu import WARM_UPS; WARM_UPS[{number}]()"
            by_name[part.__name__.replace("warm_up_", "kernels: ")] = code
    return by_name


def main() -> None:
    """Runs them all, says when each is done; exits with 1 and what the first to fail printed."""
    import torch

    device = "cpu" if torch.version.cuda is None or not torch.cuda.is_available() else "gpu"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.monotonic()
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, code in commands(device).items()
    }
    print(f"Compiling once, {len(running)} parts side by side", flush=True)
    for name, process in running.items():
        said = process.communicate()[0]
        if process.returncode:
            print(f"{said}\n{name} can't be compiled", file=sys.stderr)
            sys.exit(1)
        print(f"  {name}: done after {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
