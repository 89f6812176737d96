"""`fraqtl-serve serve`: vLLM's own server, with the packed cache switched on.

vLLM's parser reads the command line, so every flag of `vllm serve` works unchanged; ours are one
more group in front. Then vLLM's own entry point runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fraqtl_kernels.errors import ConfigError, FraqtlError
from fraqtl_kernels.formats import DEFAULT_FORMAT, FORMATS, get_format
from fraqtl_serve.cli import layer_budget, layer_formats, quiet_log, smollm2
from fraqtl_serve.cli.checkpoint import check_checkpoint
from fraqtl_serve.cli.front_end import check_front_end, keep_idle_connections
from fraqtl_serve.cli.plugin_names import allow_plugin
from fraqtl_serve.cli.start_errors import TRACEBACK_SWITCH, explain, noted_reasons
from fraqtl_serve.cli.start_stop import StoppedError, stoppable_start
from fraqtl_serve.http.body_limit import DEFAULT_BYTES
from fraqtl_vllm.config import KEY, FraqtlConfig, new_names, read_config
from fraqtl_vllm.names import BACKEND_NAME, format_of
from fraqtl_vllm.start import progress

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
DEMO_NAME = "fraqtl-demo"
CPU_KV_CACHE_BYTES = 256 << 20


def serve(argv: Sequence[str]) -> None:
    """Parse, check, and run until the server is stopped. Raises FraqtlError for what the user can mend."""
    allow_plugin()
    try:
        from fraqtl_vllm._vllm import check_version

        check_version()  # before names are looked for that another vLLM has elsewhere
        from fraqtl_serve._vllm import ServeSubcommand, cli_env_setup
    except ImportError as error:
        raise ConfigError(f"vLLM can't be imported ({error}): run fraqtl-serve doctor") from error

    cli_env_setup()
    keep_idle_connections()
    args = argparse.Namespace()
    with noted_reasons():
        try:
            args = build_parser().parse_args(["serve", *argv])  # reads the file of --config, too
            _settle_output(args)
            ours = configure(args)
            progress.say(f"starting the engine for {args.model}, KV cache in {ours.format_name}")
            ServeSubcommand().validate(args)
            with stoppable_start():
                ServeSubcommand.cmd(args)
        except FraqtlError:
            raise
        except KeyboardInterrupt as error:
            # vLLM's handler of SIGTERM says "terminated".
            raise StoppedError(signal.SIGTERM if error.args else signal.SIGINT) from None
        except Exception as error:
            if os.environ.get(TRACEBACK_SWITCH):
                raise
            raise ConfigError(explain(error, args)) from error


def build_parser() -> argparse.ArgumentParser:
    """vLLM's parser of `serve`, under our name, with our flags in a first group."""
    from fraqtl_serve._vllm import FlexibleArgumentParser, ServeSubcommand

    root = FlexibleArgumentParser(prog="fraqtl-serve")
    parser: argparse.ArgumentParser = ServeSubcommand().subparser_init(root.add_subparsers(dest="subparser"))
    parser.set_defaults(model=None)  # tells a model in the file of --config from vLLM's own default
    parser.usage = "fraqtl-serve serve [MODEL] [--kv-format FORMAT] [any flag of vllm serve]"
    parser.description = (
        "Serve MODEL (a folder or a Hugging Face id) from a packed KV cache; without MODEL, the demo model."
    )
    group = parser.add_argument_group("fraqtl", "--kv-format and ten more of our own, see --help=fraqtl")
    group.add_argument(
        "--kv-format",
        type=_format_name,
        metavar="FORMAT",
        help=f"how KV blocks are stored: {', '.join(FORMATS)} (default: {DEFAULT_FORMAT}); see fraqtl-serve formats",
    )
    layer_formats.add_flags(group)
    layer_budget.add_flag(group)
    group.add_argument(
        "--no-fraqtl-report",
        dest="fraqtl_report",
        action="store_false",
        help='leave "fraqtl" and "usage.kv_cache" out of response bodies; the headers stay',
    )
    group.add_argument(
        "--no-fraqtl-usage",
        dest="fraqtl_usage",
        action="store_false",
        help='leave "usage.kv_cache" out of response bodies, for clients that take no unknown field there',
    )
    group.add_argument(
        "--no-kv-calibration",
        dest="kv_calibration",
        action="store_false",
        help="don't run the built-in calibration prompt at start-up; keys of 3 or 4 bits are coarser then",
    )
    group.add_argument(
        "--kv-calibration-cache",
        metavar="FOLDER",
        help="where calibrations are kept (default: fraqtl-serve/calibration in the user's cache folder)",
    )
    group.add_argument(
        "--no-kv-residual",
        dest="kv_residual",
        action="store_false",
        help="read the newest tokens of a sequence without their residuals; costs no memory either way",
    )
    group.add_argument(
        "--no-kv-refinement", dest="kv_residual", action=_OldName, new="--no-kv-residual", help=argparse.SUPPRESS
    )
    group.add_argument(
        "--max-body-bytes",
        type=_positive,
        default=DEFAULT_BYTES,
        metavar="BYTES",
        help=f"the longest body that a request may have (default: {DEFAULT_BYTES}, {DEFAULT_BYTES >> 20} MiB)",
    )
    group.add_argument(
        "--quiet", action="store_true", help="don't say what the start is doing, nor what is served when it is done"
    )
    parser._action_groups.remove(group)
    parser._action_groups.insert(0, group)
    return root


class _OldName(argparse.Action):
    """The old name of a flag that switches something off. It works for one more version, and says so."""

    def __init__(self, option_strings: list[str], dest: str, *, new: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)
        self.new = new

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, values: Any, name: str | None = None
    ) -> None:
        print(f"fraqtl-serve: {name} is now {self.new}; the old name goes with the next version", file=sys.stderr)
        setattr(args, self.dest, False)


def _format_name(name: str) -> str:
    try:
        return get_format(name).name
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of bytes above 0, not {text!r}")
    return int(text)


def _settle_output(args: argparse.Namespace) -> None:
    """Who may say what: the command line's first look could not know a file of flags."""
    from fraqtl_serve._vllm import configure_logging_from_args

    quiet_log.settle(args)
    configure_logging_from_args(args)  # as vLLM will, but before it warns of anything
    if args.quiet:
        os.environ.pop(progress.SWITCH, None)
    if quiet_log.is_chosen() and not sys.stderr.isatty():
        args.use_tqdm_on_load = False


def configure(args: argparse.Namespace) -> FraqtlConfig:
    """Turn our flags, and our defaults for what the user left out, into vLLM's arguments. Returns our settings."""
    from fraqtl_serve._vllm import current_platform

    check_front_end(args)
    model = args.model_tag or args.model
    if model is None:
        model = str(DEMO_MODEL)
        _prefer(args, served_model_name=[DEMO_NAME])
    elif smollm2.is_meant(model):
        model = str(smollm2.find_model())
        _prefer(args, served_model_name=[smollm2.NAME])
        if not args.enable_auto_tool_choice and args.tool_call_parser is None:
            vars(args).update(smollm2.TOOLS)
    check_checkpoint(model)
    args.model = args.model_tag = model
    args.additional_config = _additional_config(args, model)
    _choose_kv_memory(args)
    if args.scheduler_cls is None:
        args.scheduler_cls = "fraqtl_vllm.accounting.scheduler.accounting_scheduler"
    if _backend_name(args) not in (None, BACKEND_NAME):
        raise ConfigError(f"--attention-backend {_backend_name(args)}: fraqtl-serve always uses {BACKEND_NAME}")
    args.attention_backend = BACKEND_NAME
    if current_platform.is_cpu():
        args.enforce_eager = True
    return read_config(args.additional_config, args.kv_cache_dtype)


def _choose_kv_memory(args: argparse.Namespace) -> None:
    """On a CPU without a size from the user: our default, or more if the model's context needs it."""
    from fraqtl_serve._vllm import current_platform

    given = args.kv_cache_memory_bytes is not None or "VLLM_CPU_KVCACHE_SPACE" in os.environ
    if current_platform.is_cpu() and not given:
        args.kv_cache_memory_bytes = CPU_KV_CACHE_BYTES
        args.additional_config[KEY]["kv_memory_fits_context"] = True


def _prefer(args: argparse.Namespace, **values: Any) -> None:
    """Set what the user left out."""
    for name, value in values.items():
        setattr(args, name, getattr(args, name) or value)


def _backend_name(args: argparse.Namespace) -> str | None:
    backend = args.attention_backend
    return getattr(backend, "name", backend)


def _additional_config(args: argparse.Namespace, model: str) -> dict[str, Any]:
    config = args.additional_config or {}
    if not isinstance(config, dict):
        raise ConfigError(f"--additional-config must be a JSON object, not {config!r}")
    inside = read_config(config)  # refuses unknown keys before ours are put beside them
    section = new_names(config.get(KEY, {}))
    if args.kv_format is not None:
        if section.get("kv_format", args.kv_format) != args.kv_format:
            raise ConfigError(
                f"--kv-format {args.kv_format} contradicts --additional-config, which says "
                f"{inside.kv_format}: give one of them"
            )
        section["kv_format"] = args.kv_format
    section.setdefault("kv_format", format_of(args.kv_cache_dtype) or DEFAULT_FORMAT)
    section |= _formats_of_layers(args, inside, model)
    if not args.kv_calibration:
        section["calibration"] = False
    if not args.kv_residual:
        section["residual"] = False
    if args.kv_calibration_cache is not None:
        section["calibration_cache"] = args.kv_calibration_cache
    return {**config, KEY: section}


def _formats_of_layers(args: argparse.Namespace, inside: FraqtlConfig, model: str) -> dict[str, Any]:
    """What flags say of single layers, in our settings. inside: those of --additional-config."""
    whole = {"--kv-budget": args.kv_budget, "--kv-profile": args.kv_profile}
    others = {
        "--kv-profile": args.kv_profile is not None,
        "--kv-layers": args.kv_layers is not None,
        "--kv-format": args.kv_format is not None,
        "the KV format of --additional-config": bool({"kv_format", "kv_layers"} & inside.model_fields_set),
    }
    for flag in (flag for flag, value in whole.items() if value is not None):
        for name in (name for name, is_given in others.items() if is_given and name != flag):
            raise layer_formats.contradiction(name, flag)
    if args.kv_budget is None:
        return layer_formats.chosen(args)
    return layer_formats.read_profile(layer_budget.find_profile(model, args.kv_budget, quiet=args.quiet))
