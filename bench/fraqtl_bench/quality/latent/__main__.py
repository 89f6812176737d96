"""`python -m fraqtl_bench.quality.latent`, see the package's docstring."""

from __future__ import annotations

import argparse
from pathlib import Path

from fraqtl_bench import results
from fraqtl_bench.quality.latent.measure import measure, settings
from fraqtl_bench.quality.latent.model import HEADS, LATENT, LAYERS, PLAIN, ROPE, corpus, random_model, train


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fraqtl_bench.quality.latent", description="Pack an MLA's latent.")
    parser.add_argument("--steps", type=int, default=300, help="of training (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    args = parser.parse_args()
    model, texts = random_model(), corpus()
    training = train(model, texts, args.steps)
    shape = {"layers": LAYERS, "heads": HEADS, "latent": LATENT, "rope": ROPE, "head_size": PLAIN}
    found = {"model": shape, "training": training, "settings": settings(), "forms": measure(model, texts)}
    command = f"python -m fraqtl_bench.quality.latent --steps {args.steps} --out {args.out}"
    results.save(args.out, {"command": command, **found})


if __name__ == "__main__":
    main()
