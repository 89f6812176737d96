"""`python -m fraqtl_bench.kernels`: the command on hosts that lack what others of `fraqtl-bench` import."""

from __future__ import annotations

import argparse
import sys

from fraqtl_bench import kernels
from fraqtl_kernels.errors import FraqtlError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="fraqtl-bench kernels", description=kernels.__doc__)
    kernels.add_arguments(parser)
    args = parser.parse_args()
    try:
        kernels.run(args)
    except FraqtlError as error:
        sys.exit(f"fraqtl-bench kernels: {error}")
