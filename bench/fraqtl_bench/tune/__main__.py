"""`python -m fraqtl_bench.tune`: the command on hosts that lack what others of `fraqtl-bench` import."""

from __future__ import annotations

import argparse
import sys

from fraqtl_bench import tune
from fraqtl_kernels.errors import FraqtlError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="fraqtl-bench tune", description=tune.__doc__)
    tune.add_arguments(parser)
    args = parser.parse_args()
    try:
        tune.run(args)
    except FraqtlError as error:
        sys.exit(f"fraqtl-bench tune: {error}")
