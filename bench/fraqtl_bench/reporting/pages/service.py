"""Accounts, malformed requests, containers, and texts that differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from fraqtl_bench.reporting.markdown import table
from fraqtl_bench.reporting.pages.numbers import fixed, mebibytes
from fraqtl_bench.reporting.pages.results import MODELS, block, load, source

ACCOUNTED = "fraqtl-demo; a model with sliding windows and random weights; with a draft model SmolLM2-135M-Instruct"


@block("accounting")
def accounting() -> Iterator[str]:
    files = [load(f"cpu/{name}.json") for name in ("accounting", "accounting-store", "accounting-drafts")]
    keys = ("aborted", "streamed", "several_sequences", "with_shared_blocks", "with_loaded_blocks", "preemptions")
    rows = []
    for name, setup in chain(*(file.data["setups"].items() for file in files)):
        counts = setup["counts"]
        cells = (fixed(counts[key]) for key in keys)
        ends = fixed(counts["ends_checked_against_the_pool"])
        rows.append([name, fixed(setup["requests"]), *cells, ends, fixed(len(setup["mismatches"]))])
    head = ["set-up", "requests", "aborted", "streamed", "several sequences", "shared blocks", "blocks from a store"]
    yield from table([*head, "preemptions", "ends checked", "mismatches"], rows)
    yield from source(*files, model=ACCOUNTED)


@block("totals")
def totals() -> Iterator[str]:
    file = load("cpu/totals.json")
    rows = []
    for servers, found in file.data["totals"].items():
        ours = found["from_prometheus"]
        cells = (fixed(ours[key]) for key in ("finished requests", "aborted requests", "tokens", "bytes"))
        rows.append([servers, fixed(found["requests"]), *cells, "yes" if found["equal"] else "no"])
    head = ["API server processes", "requests", "finished", "aborted", "tokens", "bytes", "equal to the responses"]
    yield from table(head, rows)
    yield from source(file, model="fraqtl-demo")


@block("fuzz")
def fuzz() -> Iterator[str]:
    file = load("cpu/fuzz.json")
    data = file.data
    rows = [[str(status), fixed(number)] for status, number in data["answers"].items()]
    yield f"{fixed(data['requests'])} requests, {fixed(data['distinct_requests'])} different ones,"
    yield f"{data['concurrency']} at a time."
    yield ""
    yield from table(["answer", "requests"], rows)
    yield f"- Answers of 500 or above: {len(data['server_errors'])}."
    yield f"- Requests without an answer: {len(data['unanswered'])}."
    left = ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in data["left_over"].items())
    yield f"- Left over afterwards: {left}."
    memory = data["memory_bytes"]
    for process, label in (("python", "API server"), ("VLLM::EngineCor", "engine")):
        first, last = memory[0][process], memory[-1][process]
        yield f"- Memory of the {label} after the first round {mebibytes(first)}, after the last {mebibytes(last)}."
    yield ""
    yield from source(file, model="fraqtl-demo")


@block("image")
def image() -> Iterator[str]:
    file = load("cpu/image.json")
    checks = {row["check"]: row for row in file.data["checks"]}
    cpu, gpu = checks["CPU image: builds"], checks["GPU image on a stand-in: builds"]
    stream = checks["nothing given: stop finishes a stream"]
    killed = checks["engine killed: ends when its engine is killed"]
    stops = [row["seconds_to_end"] for name, row in checks.items() if ": stop " in name]
    confined = checks["hardened, any user: is confined"]
    added = abs(gpu["image_bytes"] - gpu["base_bytes"]) / 1e6
    rows = [
        ["CPU image, unpacked", f"{cpu['image_bytes'] / 1e9:.2f} GB, {cpu['base_bytes'] / 1e9:.2f} GB of it the base"],
        [
            "kernels compiled when it starts",
            str(checks["nothing given: kernels are compiled"]["of_them_compiled_at_start"]),
        ],
        ["engine killed", f"health command 1; {killed['seconds_to_end']:.1f} s later the container ends, status 0"],
        ["`docker stop` during a stream", f"the stream of {stream['tokens_sent']} tokens is finished, status 0"],
        ["`docker stop`, slowest of all runs", f"{max(stops):.1f} s"],
        ["read-only, no capabilities: writable", ", ".join(f"`{path}`" for path in confined["writable"])],
        ["GPU image, on a stand-in for its base", f"differs from it by {added:.0f} MB; answers on the CPU"],
    ]
    yield f"{len(checks)} checks, {file.data['failed']} failed, Docker {file.data['docker'].partition('+')[0]}."
    yield ""
    yield from table(["what", "found"], rows)
    yield from source(file, model="fraqtl-demo")


@block("vllm-cpu")
def vllm_cpu() -> Iterator[str]:
    file = load("cpu/vllm_cpu.json")
    checks = file.data["checks"]
    rows = [[row["check"], "yes" if row["passed"] else "no"] for row in checks]
    yield from table(["check", "passed"], rows)
    yield from source(file, model="fraqtl-demo")


@block("texts-differ")
def texts_differ() -> Iterator[str]:
    file = load("cpu/texts_differ/smollm2.json")
    arms = file.data["arms"]

    def row(label: str, part: str, key: str) -> list[str]:
        return [label, *(f"{arm[part][key]} of {arm[part]['of']}" for arm in arms)]

    rows = [
        [
            "log-probabilities of a prompt, chunks of 256 against one chunk, nat: mean, largest",
            *(f"{arm['chunks']['mean']:.3f}, {arm['chunks']['max']:.2f}" for arm in arms),
        ],
        row("texts that differ: alone against among 16", "parallel", "together_against_alone"),
        row("the same request asked alone twice", "parallel", "alone_again"),
        row("the same request twice among the 16", "parallel", "twins_together"),
        row("dropped after 20 steps and computed anew, no stop string", "reset", "without_stop_reset"),
        row("the same with a stop string that never comes", "reset", "with_stop_reset"),
    ]
    yield from table(["", *(f"`{arm['kv_format']}`" for arm in arms)], rows)
    yield from source(file, model=f"{MODELS['smollm2-135m-instruct']} in bfloat16")


@block("speculation")
def speculation() -> Iterator[str]:
    file = load("cpu/speculation/smollm2.json")
    yield from _speculation_table(file.data["arms"])
    yield from source(file, model=MODELS["smollm2-135m-instruct"])


@block("speculation-heads")
def speculation_heads() -> Iterator[str]:
    file = load("cpu/speculation/eagle3.json")
    yield from _speculation_table(file.data["arms"])
    yield from source(file, model=MODELS["demo"])


@block("speculation-models")
def speculation_models() -> Iterator[str]:
    """Real models: a row a cache, in float32."""
    runs = {
        "smollm2_draft": ("smollm2-135m-instruct", "itself, weights rounded to 4 bits"),
        "qwen2.5_draft": ("qwen2.5-coder-0.5b", "itself, weights rounded to 3 bits"),
        "qwen2.5_ngram": ("qwen2.5-coder-0.5b", "n-grams"),
    }
    files = {name: load(f"cpu/speculation/{name}.json") for name in runs}
    rows = [
        [MODELS[model], drafts, *_speculation_cells(arm)]
        for name, (model, drafts) in runs.items()
        for arm in files[name].data["arms"]
    ]
    head = ["model", "drafts from", "cache", "prompts", "tokens a step", "texts that differ", "largest gap, nat"]
    yield from table([*head, "log-probabilities, nat", "preemptions"], rows)
    yield from source(*files.values(), model="as in the table")


def _speculation_cells(arm: dict[str, Any]) -> Iterator[str]:
    against = arm["against_plain"].values()
    yield f"`{arm['kv_format']}`"
    yield fixed(arm["of"])
    yield f"{arm['acceptance_length']:.2f}"
    yield ", ".join(str(found["differing"]) for found in against)
    yield ", ".join(f"{found['largest_gap']:.2g}" for found in against)
    yield ", ".join(f"{found['log_probabilities']['p99']:.2g}" for found in against)
    yield f"{arm['preemptions']['drafts']:.0f}"


def _speculation_table(arms: list[dict[str, Any]]) -> Iterator[str]:
    """A column an arm: a model dtype and a KV format."""

    def row(label: str, show: Callable[[dict[str, Any]], str]) -> list[str]:
        return [label, *map(show, arms)]

    def both(show: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
        return lambda arm: ", ".join(show(arm["against_plain"][how]) for how in ("grouped", "drafts"))

    def moved(found: dict[str, Any]) -> str:
        return f"{found['log_probabilities']['p99']:.2g}"

    rows = [
        row("tokens a step with drafts", lambda arm: f"{arm['acceptance_length']:.2f}"),
        row(f"texts that differ, of {arms[0]['of']}", both(lambda found: str(found["differing"]))),
        row("largest gap of the two best tokens there, nat", both(lambda found: f"{found['largest_gap']:.2g}")),
        row("log-probabilities before that, 99th percentile of the difference, nat", both(moved)),
        row("preemptions", lambda arm: ", ".join(f"{n:.0f}" for n in list(arm["preemptions"].values())[1:])),
        row("prompt tokens from the prefix cache", lambda arm: f"{arm['cached_tokens']['drafts']}"),
    ]
    yield from table(["", *(f"`{arm['kv_format']}`, {arm['dtype']}" for arm in arms)], rows)
