"""A draft model from a model's own weights: those of its linear layers, rounded to few bits.

    python bench/examples/rounded_model.py MODEL OUT --bits 4

Groups of 32 weights along the input share a step. The weights are stored in their own dtype: the draft is as large and
as slow as the model. It shows how drafts are accepted, and is of no other use. MODEL and OUT are folders.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
KEPT = ("embed", "lm_head")


def rounded(weight: Tensor, bits: int) -> Tensor:
    """weight: (outputs, inputs), to -m .. m steps with m = 2^(bits - 1) - 1. Returns the same shape and dtype."""
    most = 2 ** (bits - 1) - 1
    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    step = (groups.abs().amax(-1, keepdim=True) / most).clamp_min(1e-8)
    return ((groups / step).round().clamp(-most, most) * step).reshape(weight.shape).to(weight.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for file in args.model.glob("*.json"):
        shutil.copy(file, args.out / file.name)
    for file in args.model.glob("*.safetensors"):
        weights = {
            name: weight if weight.dim() != 2 or any(part in name for part in KEPT) else rounded(weight, args.bits)
            for name, weight in load_file(file).items()
        }
        save_file(weights, args.out / file.name, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
