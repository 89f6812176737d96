"""The command `fraqtl-bench`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence

from fraqtl_bench import (
    calibration,
    decode_step,
    kernels,
    load,
    overhead,
    quality,
    quantizer,
    recall,
    texts,
    totals,
    tune,
)
from fraqtl_kernels.errors import FraqtlError

COMMANDS = (calibration, decode_step, kernels, load, overhead, quantizer, recall, quality, texts, totals, tune)
OLD_NAMES = {"quantiser": "quantizer"}  # of commands, for one more version


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and one sentence for anything the user can mend."""
    parser = argparse.ArgumentParser(prog="fraqtl-bench", description="Measure the packed KV cache.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command_name")
    for module in COMMANDS:
        module.add_command(commands)
    args = parser.parse_args(argv)
    if args.command_name in OLD_NAMES:
        print(f"fraqtl-bench: {args.command_name} is now {OLD_NAMES[args.command_name]}", file=sys.stderr)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are stopped
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("fraqtl-bench: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except FraqtlError as error:
        print(f"fraqtl-bench: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
