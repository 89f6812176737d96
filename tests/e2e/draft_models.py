"""Models that draft for the demo model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.e2e.engine import DEMO_MODEL


def first_layers(folder: Path, layers: int = 3) -> Path:
    """So many of the demo model's own: of its 4. Without the last one some drafts are right and some are not."""
    kept = [f"model.layers.{i}." for i in range(layers)]
    weights = {
        name: weight
        for name, weight in load_file(DEMO_MODEL / "model.safetensors").items()
        if ".layers." not in name or name.startswith(tuple(kept))
    }
    folder.mkdir(parents=True, exist_ok=True)
    for file in DEMO_MODEL.glob("*.json"):
        shutil.copy(file, folder / file.name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return folder
