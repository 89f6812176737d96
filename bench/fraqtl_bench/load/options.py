"""What the arguments mean: the settings of a run, or one sentence that says what is valid."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from fraqtl_bench.load.schema import Point, Settings
from fraqtl_kernels.errors import ConfigError, one_of

RANDOM, PREFIX, CUSTOM = "random", "prefix_repetition", "custom"
DATASETS = (RANDOM, PREFIX, CUSTOM)
SLO_NAMES = ("ttft", "tpot", "e2el")
CONTEXT_REQUESTS = 2  # times the concurrency, at a context of the fit


def size(text: str) -> int:
    """Bytes of "256MiB", "20 GB" or a bare number."""
    try:
        found = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        found = ByteSize(0)
    if found <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, or a number with MB, GB, MiB or GiB")
    return int(found)


def pair(text: str) -> tuple[str, str]:
    """NAME=URL."""
    name, _, url = text.partition("=")
    if not name or not url.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=URL, such as A=http://127.0.0.1:8000")
    return name, url.rstrip("/").removesuffix("/v1")


def slo_of(given: list[str]) -> dict[str, float]:
    """Milliseconds by name. Raises ConfigError for anything else."""
    found = {}
    for text in given:
        name, _, value = text.partition(":")
        if name not in SLO_NAMES:
            raise one_of("SLO", name, SLO_NAMES)
        try:
            found[name] = float(value)
        except ValueError:
            raise ConfigError(f"--slo {text!r} has no milliseconds: give such as {name}:200") from None
    return found


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises ConfigError."""
    _check(args)
    urls = dict(args.url)
    if len(urls) < len(args.url):
        raise ConfigError("two servers have the same name in --url: give each its own")
    return Settings(
        arms=list(urls) if urls else list(dict.fromkeys(args.arms)),
        urls=urls,
        model=args.model,
        tokenizer=args.tokenizer,
        kv_memory_bytes=args.kv_memory,
        gpu_memory_utilization=args.gpu_memory_utilization,
        server_args=args.server_args,
        dataset=args.dataset,
        dataset_path=str(args.dataset_path) if args.dataset_path else None,
        prefix_len=args.prefix_len,
        prefixes=args.prefixes,
        points=points_of(args),
        repeats=args.repeats,
        warmup=args.warmup,
        slo=slo_of(args.slo),
        temperature=args.temperature,
        seed=args.seed,
    )


def points_of(args: argparse.Namespace) -> list[Point]:
    """Every load of a turn: the context ladder, then concurrencies and rates."""
    found = [
        Point(
            kind="context",
            concurrency=args.context_concurrency,
            input=context,
            output=args.output,
            requests=_requests(args, CONTEXT_REQUESTS * args.context_concurrency),
        )
        for context in args.contexts
    ]
    shape = {"input": args.input, "output": args.output}
    for concurrency in args.concurrency:
        wanted = max(args.min_requests, args.requests_each * concurrency)
        found.append(Point(concurrency=concurrency, requests=_requests(args, wanted), **shape))
    found += [Point(rate=rate, requests=_requests(args, args.rate_requests), **shape) for rate in args.rates]
    return found


def _requests(args: argparse.Namespace, wanted: int) -> int:
    """As many as the dataset gives: a whole number for each prefix, a line once."""
    if args.dataset == PREFIX:
        prefixes = min(args.prefixes, wanted)
        return -(-wanted // prefixes) * prefixes
    if args.dataset == CUSTOM:
        lines = [line for line in Path(args.dataset_path).read_text(encoding="utf-8").splitlines() if line.strip()]
        return min(wanted, len(lines))
    return wanted


def _check(args: argparse.Namespace) -> None:
    whole = ("input", "output", "repeats", "requests_each", "min_requests", "rate_requests", "context_concurrency")
    for name in (*whole, "prefixes", "concurrency", "contexts", "rates"):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value:g} is too small: give a number above 0")
    if not (args.concurrency or args.rates or args.contexts):
        raise ConfigError("nothing to measure: give --concurrency, --rates or --contexts")
    if args.warmup < 0:
        raise ConfigError(f"--warmup {args.warmup} is too small: give 0 or more")
    _check_dataset(args)
    if args.url and (args.server_args or args.kv_memory or args.gpu_memory_utilization or args.model):
        raise ConfigError("--url measures servers as they run: leave out --model, --kv-memory and flags for servers")


def _check_dataset(args: argparse.Namespace) -> None:
    if (args.dataset == CUSTOM) != (args.dataset_path is not None):
        raise ConfigError("--dataset-path FILE belongs to --dataset custom: give both or none")
    if args.dataset == CUSTOM:
        if args.dataset_path.suffix != ".jsonl" or not args.dataset_path.is_file():
            raise ConfigError(
                f"{str(args.dataset_path)!r} is no file that ends in .jsonl: give one with a `prompt` a line"
            )
        if args.contexts:
            raise ConfigError("--contexts needs prompts of given lengths: leave it out with --dataset custom")
    least = 2 if args.dataset == RANDOM else args.prefix_len + 1
    for length in (args.input, *args.contexts) if args.dataset != CUSTOM else ():
        if length < least:
            raise ConfigError(
                f"prompts of {length} tokens are too short for --dataset {args.dataset}: give {least} or more"
            )
