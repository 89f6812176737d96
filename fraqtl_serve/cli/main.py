"""The command `fraqtl-serve`.

Imports little until it knows what is asked. The engine's process imports this file, too, before anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from fraqtl_kernels.errors import FraqtlError
from fraqtl_kernels.formats import CPU_HEAD_SIZES
from fraqtl_serve.cli.start_stop import StoppedError, leave
from fraqtl_vllm.start import garbage

PROGRAM = "fraqtl-serve"

if "--multiprocessing-fork" in sys.orig_argv:
    garbage.collect_rarely()  # until the engine is up, see fraqtl_vllm.accounting.scheduler


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and one sentence on stderr for anything the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:
        _begin(arguments[1:])

    try:
        # vLLM's parser knows its own hundreds of flags; ours must not read them first.
        if arguments[:1] == ["serve"]:
            from fraqtl_serve.cli.serve import serve

            serve(arguments[1:])
        else:
            args = _parser().parse_args(arguments)
            args.run(args)
    except StoppedError as stop:
        leave(stop)
    except FraqtlError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(2)


def _begin(arguments: list[str]) -> None:
    """What has to happen before torch and vLLM are imported, which takes seconds."""
    from fraqtl_serve.cli import quiet_log
    from fraqtl_serve.cli.plugin_names import allow_plugin
    from fraqtl_vllm.start import progress

    # Python's resource tracker outlives a start that failed, and would have the last word on what vLLM left open.
    given = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [given, "ignore:resource_tracker:UserWarning"]))
    garbage.collect_rarely()
    allow_plugin()
    quiet_log.begin(arguments)
    if {"-h", "--help"} & {argument.split("=")[0] for argument in arguments}:
        return
    if "--quiet" not in arguments:
        progress.begin()
        progress.say(f"{PROGRAM} {version(PROGRAM)}: importing vLLM")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Serve language models from a KV cache of packed INT4 blocks."
    )
    parser.add_argument("--version", action="version", version=version("fraqtl-serve"))
    from fraqtl_serve.cli import chat, plan

    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="serve a model (no model: the demo model) with OpenAI's API", add_help=False)
    formats = commands.add_parser("formats", help="list the KV-cache formats and what they cost")
    formats.add_argument("--head-size", type=int, default=128, choices=CPU_HEAD_SIZES, help="default: %(default)s")
    formats.add_argument("--json", action="store_true", help="print JSON")
    formats.set_defaults(run=_formats)
    doctor = commands.add_parser("doctor", help="say what is installed, what would run, and what is wrong")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    chat.add_command(commands)
    plan.add_command(commands)
    return parser


def _formats(args: argparse.Namespace) -> None:
    from fraqtl_serve.cli.format_table import print_formats

    print_formats(args.head_size, as_json=args.json)


def _doctor(args: argparse.Namespace) -> None:
    from fraqtl_serve.cli.doctor import print_report

    sys.exit(print_report(as_json=args.json))


if __name__ == "__main__":
    main()
