"""Start the demo model once and ask it something, while the CPU image is built.

That leaves behind what every start would otherwise make anew: the bytecode of what a server imports, Numba's kernels,
and the calibration of the demo model. And an image whose server doesn't answer is none.
"""

from __future__ import annotations

import httpx

from fraqtl_bench.server import running

QUESTION = {"model": "fraqtl-demo", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16}


def main() -> None:
    with running() as server:
        response = httpx.post(f"{server.url}/v1/chat/completions", json=QUESTION, timeout=300)
        response.raise_for_status()
        assert response.json()["fraqtl"]["kv_format"] == "k4v4", response.text


if __name__ == "__main__":
    main()
