"""The result file of run.sh, from the line that each client's script printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx

from fraqtl_bench import results

RESULT = Path("bench/results/cpu/clients.json")


def outcome(file: Path) -> dict[str, Any]:
    return {"passed": True, **json.loads(file.read_text())} if file.exists() else {"passed": False}


def main(folder: str, url: str, *clients: str) -> None:
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    found = {client: outcome(Path(folder, f"{client}.json")) for client in clients}
    results.save(RESULT, {"command": "tests/clients/run.sh FOLDER", "model": model, "clients": found})


if __name__ == "__main__":
    main(*sys.argv[1:])
