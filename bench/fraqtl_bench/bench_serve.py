"""`vllm bench serve`: its command line, and what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULT = "r.json"


def command(url: str, model: str, tokenizer: str, folder: Path | str, *options: str) -> list[str]:
    """A run against the completions endpoint at `url` that writes its result into `folder`.

    model: as the server calls it. tokenizer: its folder or Hub name. options: dataset, load and seed. Answers go on to
    their full length.
    """
    start = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    where = ["--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"]
    what = ["--model", model, "--tokenizer", tokenizer, "--ignore-eos", "--disable-tqdm"]
    return [*start, *where, *what, "--save-result", "--result-dir", str(folder), "--result-filename", RESULT, *options]


def result(folder: Path | str) -> dict[str, Any]:
    """What a run wrote into `folder`; empty if it wrote nothing."""
    path = Path(folder) / RESULT
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
