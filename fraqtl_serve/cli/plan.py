"""`fraqtl-serve plan`: how many tokens and users fit into a given KV memory, at each format."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fraqtl_kernels.errors import ConfigError
from fraqtl_serve.cli import layer_formats
from fraqtl_serve.cli.model_config import read_shape
from fraqtl_serve.cli.sizing import BASELINE, LayerKind, ModelShape, StateKind, plan
from fraqtl_vllm.config import FraqtlConfig

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def add_command(commands: Any) -> None:
    parser = commands.add_parser("plan", help="how many tokens and users fit into a KV memory", description=__doc__)
    parser.add_argument("--model-config", metavar="MODEL", help="a config.json, a model folder or a Hugging Face id")
    parser.add_argument("--models", type=Path, metavar="FILE", help="a JSON list of models as bare numbers instead")
    parser.add_argument("--layers", type=int, help="bare numbers instead: attention layers")
    parser.add_argument("--kv-heads", type=int, help="KV heads a layer, over all ranks")
    parser.add_argument("--head-size", type=int)
    parser.add_argument("--kv-memory", type=memory, default="20GiB", metavar="SIZE", help="per GPU (default: 20GiB)")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="of one user (default: what the model can)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="RANKS")
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=8192,
        metavar="TOKENS",
        help="of a step; sliding windows keep blocks for them (default: %(default)s)",
    )
    parser.add_argument(
        "--no-async-scheduling",
        dest="async_scheduling",
        action="store_false",
        help="as vLLM is on a CPU: sliding windows keep blocks for the tokens of one step, not of two",
    )
    parser.add_argument(
        "--no-enable-prefix-caching",
        dest="prefix_caching",
        action="store_false",
        help="sequences of hybrid models hold their states once then, not twice",
    )
    layer_formats.add_flags(parser)
    parser.add_argument("--draft-model", metavar="MODEL", help="a model that drafts, its pages are in the same memory")
    parser.add_argument(
        "--draft-tokens",
        type=int,
        default=0,
        metavar="TOKENS",
        help="num_speculative_tokens; sequences of hybrid models hold their states once more for each",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def memory(text: str) -> int:
    """Bytes of "20GiB", "20 GB" or a bare number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)\s*", text.upper())
    if not match or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, or a number with MB, GB, MiB or GiB")
    return int(float(match[1]) * UNITS[match[2]])


@contextmanager
def only_errors_of_vllm() -> Iterator[None]:
    """Nothing else that vLLM says while its planner is loaded is of interest here."""
    logger, asked = logging.getLogger("vllm"), os.environ.get("VLLM_LOGGING_LEVEL")
    level = logger.level
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM sets the level by it when it is first imported
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if asked is None:
            del os.environ["VLLM_LOGGING_LEVEL"]


def run(args: argparse.Namespace) -> None:
    chosen = layer_formats.chosen(args)
    own = FraqtlConfig(**chosen) if chosen else None
    draft = read_shape(args.draft_model) if args.draft_model else None
    if args.draft_tokens < 0:
        raise ConfigError(f"--draft-tokens {args.draft_tokens}: give 0 or more")
    with only_errors_of_vllm():
        plans = [
            plan(
                shape,
                args.kv_memory,
                context=args.context or shape.context,
                ranks=args.tensor_parallel_size,
                batched_tokens=args.max_num_batched_tokens,
                async_scheduling=args.async_scheduling,
                prefix_caching=args.prefix_caching,
                own=own,
                draft=draft,
                drafts=args.draft_tokens,
            )
            for shape in shapes(args)
        ]
    if args.json:
        print(json.dumps(plans if args.models else plans[0], indent=1))
        return
    console = Console()
    for one in plans:
        console.print(heading(one), highlight=False, soft_wrap=True)
        console.print(table(one))
    console.print(
        f"users: sequences of the whole context at once; factor: tokens against {BASELINE} in the same memory"
    )


def shapes(args: argparse.Namespace) -> list[ModelShape]:
    """The models that the command line names, in one of three ways."""
    numbers = [args.layers, args.kv_heads, args.head_size]
    ways = [args.model_config is not None, args.models is not None, any(n is not None for n in numbers)]
    if sum(ways) != 1:
        raise ConfigError("name a model in one way: --model-config, --models, or --layers --kv-heads --head-size")
    if args.model_config is not None:
        return [read_shape(args.model_config)]
    if args.models is not None:
        return read_shapes(args.models)
    if None in (*numbers, args.context):
        raise ConfigError("bare numbers need all of --layers, --kv-heads, --head-size and --context")
    return [ModelShape("model", args.layers, args.kv_heads, args.head_size, args.context)]


def read_shapes(path: Path) -> list[ModelShape]:
    try:
        return [_shape(numbers) for numbers in json.loads(path.read_text(encoding="utf-8"))]
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        fields = ", ".join(ModelShape.__dataclass_fields__)
        raise ConfigError(f"{path} is no list of models with {fields}: {error}") from None


def _shape(numbers: dict[str, Any]) -> ModelShape:
    others = tuple(LayerKind(**other) for other in numbers.get("others", ()))
    states = StateKind(**numbers["states"]) if numbers.get("states") else None
    return ModelShape(**{**numbers, "others": others, "states": states})


def heading(planned: dict[str, Any]) -> str:
    ranks = f" on each of {planned['ranks']} ranks" if planned["ranks"] > 1 else ""
    draft = f"; drafts by {_described(planned['draft_model'])}" if "draft_model" in planned else ""
    return f"{_described(planned['model'])}{draft}; {planned['kv_memory'] / 2**30:g} GiB of KV memory{ranks}"


def _described(model: dict[str, Any]) -> str:
    windows = f", {model['windowed_layers']} with a window of {model['window']:,}" if model["windowed_layers"] else ""
    others = "".join(
        f"; {other['layers']} layers"
        + (f" with a window of {other['window']:,}" if other["window"] else "")
        + f", {other['kv_heads']} KV heads, head size {other['head_size']}"
        for other in model.get("others", ())
    )
    return (
        f"{model['name']}: {model['layers']} layers{windows}, {model['kv_heads']} KV heads, head size "
        f"{model['head_size']}{others}{_states(model)}"
    )


def _states(model: dict[str, Any]) -> str:
    states = model.get("states")
    return f"; {states['layers']} layers that keep a state" if states else ""


def table(planned: dict[str, Any]) -> Table:
    is_hybrid = "states" in planned["model"]
    lines = Table()
    lines.add_column("format", no_wrap=True)
    columns = ["bytes a block", "tokens", f"users at {planned['context']:,}", "factor"]
    columns += ["tokens a block", "MiB a user: tokens", "states", "padding"] if is_hybrid else []
    for column in columns:
        lines.add_column(column, justify="right")
    for row in planned["formats"]:
        factor = "" if row["tokens_vs_baseline"] is None else f"{row['tokens_vs_baseline']:.2f}"
        cells = [f"{row['block_bytes']:,}", f"{row['tokens']:,}", f"{row['users']:,}", factor]
        if is_hybrid:
            parts = (row["attention_bytes"], row["state_bytes"], row["padding_bytes"])
            cells += [f"{row['block_size']:,}", *(f"{part / 2**20:,.1f}" for part in parts)]
        lines.add_row(row["name"], *cells)
    return lines
