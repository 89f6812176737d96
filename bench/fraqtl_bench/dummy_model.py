"""A model folder with the shape of an 8-billion-parameter Llama and no weights, for `--load-format dummy`.

    python -m fraqtl_bench.dummy_model FOLDER

32 layers, 32 query and 8 KV heads of size 128. The tokenizer and the vocabulary are the demo model's, so the
embedding is smaller than the original's; attention and MLP are not.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def make(folder: Path) -> None:
    """Write config and tokenizer files to `folder`, which is made."""
    spec = find_spec("fraqtl_serve")
    if spec is None or spec.origin is None:
        raise SystemExit("fraqtl_serve, whose demo model this is shaped after, can't be found")
    demo = Path(spec.origin).parent / "demo_model"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo / name, folder / name)
    config = json.loads((demo / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **SHAPE}, indent=2))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m fraqtl_bench.dummy_model FOLDER")
    make(Path(sys.argv[1]))
