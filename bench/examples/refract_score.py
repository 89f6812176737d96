"""What REFRACT (pip install refract-llm) says of packed caches: the score of another project, on vLLM's engine.

    python bench/examples/refract_score.py MODEL --corpus wikitext2-test.txt --formats bf16 k8v8 k4v4 --out refract.json

Its vLLM backend asks for a cache by dtype, and the reference is the model's own. Here both are made with the backend
FRAQTL, the reference in `bf16`: so the score of `bf16` is that of another run of the same cache. 100 is the reference,
and the axes are combined by their harmonic mean. Of a report all is kept but what it says of single prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

CONTEXT = 8192  # the same for all axes: they share an engine
TOP = 64  # tokens of which a divergence is made, as REFRACT does by default
REFERENCE = "auto"  # what REFRACT asks for
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
os.environ.update(REFRACT_VLLM_MAX_MODEL_LEN=str(CONTEXT), REFRACT_VLLM_KLD_TOPK=str(TOP))


def serve_formats(formats: list[str], pool_bytes: int) -> None:
    """Makes REFRACT know `formats` as "ctk=FORMAT,ctv=FORMAT", and its engines keep their keys and values in them."""
    import vllm

    engine, stock = import_module("refract.backends.vllm"), vllm.LLM
    engine._CTK_CTV_TO_VLLM.update({(name, name): name for name in formats} | {("f16", "f16"): REFERENCE})
    answers: dict[tuple[str, str], Any] = {}

    def packed(*, kv_cache_dtype: str, **options: Any) -> vllm.LLM:
        is_reference = kv_cache_dtype == REFERENCE
        llm = stock(
            **options,
            enforce_eager=True,
            max_logprobs=TOP,
            attention_backend="FRAQTL",
            kv_cache_memory_bytes=pool_bytes,
            additional_config={"fraqtl": {"kv_format": "bf16" if is_reference else kv_cache_dtype}},
        )
        if is_reference:  # asked the same for every format, one prompt at a time
            llm.generate = remembered(llm.generate, answers)  # type: ignore[method-assign]
        return llm

    vllm.LLM = packed  # type: ignore[assignment,misc]


def remembered(generate: Callable[..., Any], answers: dict[tuple[str, str], Any]) -> Callable[..., Any]:
    def ask(prompts: Any, params: Any, **options: Any) -> Any:
        key = repr(prompts), repr(params)
        if key not in answers:
            answers[key] = generate(prompts, params, **options)
        return answers[key]

    return ask


def score(args: argparse.Namespace, kv_format: str) -> dict[str, Any]:
    """The report on one format, without single prompts."""
    with tempfile.TemporaryDirectory(prefix="fraqtl-refract-") as folder:
        report = Path(folder) / "report.json"
        cache = f"ctk={kv_format},ctv={kv_format}"
        flags = ["score", "--backend", "vllm", "--model", args.model, "--candidate", cache, "--json-out", str(report)]
        flags += ["--no-auto-fetch", "--corpus", args.corpus, "--chunks", str(args.chunks), "--full"]
        flags += ["--rniah-haystack", args.corpus, "--rniah-lengths", ",".join(map(str, args.lengths))]
        if status := import_module("refract.cli").main(flags):
            raise SystemExit(f"REFRACT ended with status {status}")
        # What an axis could not try is NaN there.
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"), parse_constant=lambda name: None)
    for axis in found["axes"].values():
        axis.pop("per_prompt", None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--corpus", required=True, help="text for the divergence, and to hide needles in")
    parser.add_argument("--formats", nargs="+", default=["bf16", "k8v8", "k4v4"])
    parser.add_argument("--chunks", type=int, default=32, help="for the divergence, 512 tokens each")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="of needles' texts, in tokens"
    )
    parser.add_argument("--pool-bytes", type=int, default=512 << 20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    from fraqtl_bench import results

    serve_formats(args.formats, args.pool_bytes)
    made_by = " ".join(["python bench/examples/refract_score.py", *sys.argv[1:]])
    found: dict[str, Any] = {}
    for name in args.formats:
        found[name] = score(args, name)
        results.save(args.out, {"command": made_by, "refract": version("refract-llm"), "reports": found})


if __name__ == "__main__":
    main()
