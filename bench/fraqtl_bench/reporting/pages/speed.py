"""Kernels, decode steps, load, starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fraqtl_bench.reporting.markdown import table
from fraqtl_bench.reporting.pages.numbers import fixed, mebibytes, share, times
from fraqtl_bench.reporting.pages.results import MODELS, Result, block, load, source

SMOLLM2 = MODELS["smollm2-135m-instruct"]
LINEAR = ("linear: gate, up", "linear: out of attention, down", "linear: q, k, v")
KINDS = (
    ("attention and write", ("attention and write",)),
    ("linear layers", LINEAR),
    ("logits", ("linear: logits",)),
    ("norms, rotary embedding, gates", ("norms", "rotary embedding", "gates")),
    ("the rest: scheduler, sampler, Python", ("the rest",)),
    ("a step", ("step",)),
)
STEP = "cpu/decode_step/"


def shape(name: str) -> str:
    batch, context, heads, kv_heads, size = map(int, name.split("x"))
    return f"{batch} x {context:,}, {heads} query and {kv_heads} KV heads, D = {size}"


@block("cpu-decode")
def cpu_decode() -> Iterator[str]:
    file = load("cpu/kernels.json")
    formats = ("bf16", "k8v8", "k8v4", "k4v4", "k4v4-channel", "k4v2")
    rows = []
    for name, arms in file.data["kernels"].items():
        cells = (f"{arms[f]['median_ms']:.2f} ({arms[f]['speed_against_baseline']:.1f}x)" for f in formats)
        rows.append([shape(name), f"{arms['sdpa-bf16']['median_ms']:.2f}", *cells])
    yield f"Milliseconds, median of {file.data['repeats']} calls. In brackets the speed against SDPA in the same run."
    yield ""
    yield from table(["batch x context, heads", "SDPA", *(f"`{f}`" for f in formats)], rows)
    errors = {f: max(arms[f]["kernel_error"] for arms in file.data["kernels"].values()) for f in ("k4v4", "sdpa-bf16")}
    yield f"Largest error of the kernel against float64 on the same stored values: {errors['k4v4']:.1e} for `k4v4`,"
    yield f"{errors['sdpa-bf16']:.1e} for SDPA."
    yield from source(file, model="none, random inputs")


@block("cpu-writes")
def cpu_writes() -> Iterator[str]:
    file = load("cpu/writes.json")
    formats = ("bf16", "k8v8", "k4v4-channel", "k4v2", "k8v4", "k4v4")
    rows = []
    for name, arms in file.data["writes"].items():
        _, tokens, _, kv_heads, size = map(int, name.split("x"))
        cells = (fixed(arms[f]["ns_per_vector"]) for f in formats)
        whole = f"{arms['k4v4']['median_ms']:.1f} ms"
        rows.append([f"{tokens:,}, {kv_heads} KV heads, D = {size}", *cells, whole])
    yield "Nanoseconds per vector; the last column is the whole write of one layer."
    yield ""
    yield from table(["tokens, heads", *(f"`{f}`" for f in formats), "`k4v4`, a layer"], rows)
    yield from source(file, model="none, random inputs")


def _step(file: Result, context: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = file.data["decode_step"][context][name]
    return found


@block("decode-step")
def decode_step() -> Iterator[str]:
    alone = [(name, context) for name in ("new_batch1", "again_batch1", "third_batch1") for context in ("2048", "6000")]
    runs = [*alone, ("new_batch4", "2048"), ("new_batch16", "2048")]
    rows, files = [], []
    for name, context in runs:
        file = load(f"{STEP}{name}.json")
        files.append(file)
        ours, ratio = (_step(file, context, "k4v4")[key] for key in ("itl_ms", "ratio"))
        spread = f"{1 / ratio['high_quartile']:.2f} to {1 / ratio['low_quartile']:.2f}"
        cells = [f"{_step(file, context, 'bf16')['itl_ms']['median']:.1f}", f"{ours['median']:.1f}"]
        rows.append(
            [str(file.data["batch"]), fixed(int(context)), *cells, f"{times(1 / ratio['median'])} ({spread})", file.day]
        )
    head = ["requests", "context", "`bf16`, ms", "`k4v4`, ms", "speed of `k4v4` to `bf16` (quartiles)", "measured"]
    yield from table(head, rows)
    yield from source(*{file.path: file for file in files}.values(), model=SMOLLM2)


@block("decode-before")
def decode_before() -> Iterator[str]:
    rows, files = [], []
    for batch in (1, 4, 16):
        new, before = load(f"{STEP}new_batch{batch}.json"), load(f"{STEP}before_batch{batch}.json")
        files += [new, before]
        now, then = (_step(file, "2048", "k4v4")["itl_ms"]["median"] for file in (new, before))
        rows.append([str(batch), f"{then:.1f}", f"{now:.1f}", times(then / now)])
    yield from table(["requests", "`k4v4` before, ms", "`k4v4` after, ms", "speed-up"], rows)
    yield from source(*files, model=SMOLLM2)


@block("decode-profile")
def decode_profile() -> Iterator[str]:
    one, four, many = (load(f"{STEP}profile_batch{n}.json") for n in (1, 4, 16))
    columns = [(one, "bf16"), (one, "k4v4"), (four, "k4v4"), (many, "k4v4")]
    rows = []
    for label, parts in KINDS:
        cells = (sum(file.data["ms"][name][0][part] for part in parts) for file, name in columns)
        rows.append([label, *(f"{x:.1f}" for x in cells)])
    heads = (f"`{name}`, {file.data['batch']}" for file, name in columns)
    yield f"Milliseconds at {one.data['context']:,} tokens of context, by format and requests."
    yield ""
    yield from table(["", *heads], rows)
    yield from source(one, four, many, model=SMOLLM2)


@block("llama-cpp")
def llama_cpp() -> Iterator[str]:
    wide, narrow = load("cpu/llama_cpp/smollm2.json"), load("cpu/llama_cpp/smollm2_avx2.json")
    rows = []
    for file, note in ((wide, ""), (narrow, ", limited to AVX2")):
        for key, label in (("prompt_tokens_per_second", "prompt"), ("decode_tokens_per_second", "decode")):
            found, ratio = file.data["median"][key], file.data["ratios"][key]
            cells = (fixed(found[arm], 0 if found[arm] > 100 else 1) for arm in ("bf16", "k4v4", "f16", "q4_0"))
            rows.append([label + note, *cells, times(ratio["k4v4 / f16"]), times(ratio["k4v4 / q4_0"])])
    rounds = len(wide.data["rounds"]["prompt_tokens_per_second"]["k4v4"])
    yield f"Tokens per second, medians of {rounds} rounds in turns. Prompts of {wide.data['prompt_tokens']:,} tokens."
    yield f"Answers of {wide.data['new_tokens']}."
    yield ""
    head = ["", "ours, `bf16`", "ours, `k4v4`", "llama.cpp, f16 cache", "llama.cpp, q4_0 cache"]
    yield from table([*head, "`k4v4` to f16", "`k4v4` to q4_0"], rows)
    yield from source(wide, narrow, model=f"{SMOLLM2}; ours with 16-bit weights, llama.cpp's with 4-bit weights")


def _spread(found: dict[str, float], digits: int = 0) -> str:
    if found["low"] == found["high"]:
        return fixed(found["median"], digits)
    return f"{fixed(found['median'], digits)} ({fixed(found['low'], digits)}-{fixed(found['high'], digits)})"


def _quartiles(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{found['median']:.2f} ({low:.2f} to {high:.2f})"


def _load_rows(file: Result) -> Iterator[list[str]]:
    arms = file.data["arms"]
    for i, first in enumerate(arms[0]["summaries"]):
        for arm in arms:
            found = arm["summaries"][i]
            values, ratio = found["values"], found["ratios"]["output_tokens_per_s"]
            yield [
                str(first["point"]["concurrency"]),
                f"`{arm['name']}`",
                _spread(values["output_tokens_per_s"], 1 if values["output_tokens_per_s"]["median"] < 100 else 0),
                "" if arm is arms[0] else _spread(ratio, 2),
                fixed(values["ttft_ms"]["median"]),
                fixed(values["itl_ms"]["median"], 1),
                fixed(values["itl_p99_ms"]["median"], 1),
                fixed(values["running_mean"]["median"], 1),
                fixed(values["preemptions"]["median"]),
                share(found["prompt_share"], 0),
            ]


LOAD_HEAD = ["users", "format", "output tokens/s", "against `bf16`", "TTFT, ms", "ITL, ms", "ITL p99, ms"]
LOAD_HEAD += ["running, mean", "preemptions", "time in prompts"]


def _load(path: str, model: str) -> Iterator[str]:
    file = load(path)
    point = file.data["settings"]["points"][0]
    held = ", ".join(
        f"`{arm['name']}` {fixed(arm['capacity']['tokens'])} tokens or {arm['capacity']['requests']} such requests"
        for arm in file.data["arms"]
    )
    memory = mebibytes(file.data["settings"]["kv_memory_bytes"])
    yield f"Prompts of {point['input']:,} tokens, answers of {point['output']}, {memory} of KV memory."
    yield f"It holds: {held}."
    turns = file.data["settings"]["repeats"]
    yield f"{turns} turn{'s' if turns > 1 else ''}; medians, in brackets the extremes."
    yield ""
    yield from table(LOAD_HEAD, list(_load_rows(file)))
    yield from source(file, model=model)


@block("load-smollm2")
def load_smollm2() -> Iterator[str]:
    yield from _load("cpu/load_smollm2/load.json", SMOLLM2)


@block("load-watermark")
def load_watermark() -> Iterator[str]:
    files = [load(f"cpu/load_smollm2/{name}.json") for name in ("without_watermark", "with_watermark")]
    rows = []
    for arms in zip(*(file.data["arms"] for file in files), strict=True):
        for kept, arm in zip(("none", "a tenth"), arms, strict=True):
            found = arm["summaries"][0]
            values = found["values"]
            rows.append(
                [
                    f"`{arm['name']}`",
                    kept,
                    _spread(values["output_tokens_per_s"], 1),
                    "" if arm["name"] == "bf16" else _spread(found["ratios"]["output_tokens_per_s"], 2),
                    fixed(values["preemptions"]["median"]),
                    fixed(values["running_mean"]["median"], 1),
                    fixed(values["ttft_ms"]["median"]),
                    fixed(values["ttft_p99_ms"]["median"]),
                ]
            )
    head = ["format", "kept free", "output tokens/s", "against `bf16`", "preemptions", "running, mean"]
    yield from table([*head, "TTFT, ms", "TTFT p99, ms"], rows)
    yield from source(*files, model=SMOLLM2)


@block("load-demo")
def load_demo() -> Iterator[str]:
    yield from _load("cpu/load/load.json", "fraqtl-demo")


@block("load-rates")
def load_rates() -> Iterator[str]:
    file = load("cpu/load_ladders/load.json")
    arms = file.data["arms"]
    points = [i for i, s in enumerate(arms[0]["summaries"]) if s["point"]["rate"]]
    rows = []
    for i in points:
        values = [arm["summaries"][i]["values"] for arm in arms]
        cells = [fixed(v["ttft_ms"]["median"]) for v in values]
        cells += [share(v["pool_use_peak"]["median"], 0) for v in values if "pool_use_peak" in v]
        rows.append([fixed(arms[0]["summaries"][i]["point"]["rate"]), *cells])
    heads = [f"{what}: `{arm['name']}`" for what in ("TTFT, ms", "pool at its peak") for arm in arms]
    yield from table(["requests/s", *heads], rows)
    yield from source(file, model="fraqtl-demo")


@block("load-contexts")
def load_contexts() -> Iterator[str]:
    file = load("cpu/load_ladders/load.json")
    rows = []
    for arm in file.data["arms"]:
        fit = arm["fit"]
        ratio = "" if fit["slope_ratio"] is None else f"{fit['slope_ratio']:.2f}"
        rows.append(
            [
                f"`{arm['name']}`",
                fixed(fit["slope_us_per_1k"]),
                ratio,
                f"{fit['intercept_ms']:.2f}",
                f"{fit['r_squared']:.2f}",
            ]
        )
    yield from table(["format", "ITL, µs per 1,000 tokens of context", "of `bf16`", "intercept, ms", "R²"], rows)
    yield from source(file, model="fraqtl-demo")


@block("readme-load")
def readme_load() -> Iterator[str]:
    file = load("cpu/load_smollm2/load.json")
    arms = {arm["name"]: arm for arm in file.data["arms"]}
    found = {(name, s["point"]["concurrency"]): s["values"] for name, arm in arms.items() for s in arm["summaries"]}
    ratios = {(name, s["point"]["concurrency"]): s["ratios"] for name, arm in arms.items() for s in arm["summaries"]}
    names = ("bf16", "k4v4")
    rows = [["requests that fit", *(str(arms[name]["capacity"]["requests"]) for name in names), ""]]
    rows.append(
        ["first token with 16 users, median", *(f"{found[n, 16]['ttft_ms']['median'] / 1000:.1f} s" for n in names), ""]
    )
    for users in (16, 4, 1):
        speeds = (f"{found[n, users]['output_tokens_per_s']['median']:.1f}" for n in names)
        ratio = f"{ratios['k4v4', users]['output_tokens_per_s']['median']:.2f}"
        rows.append([f"output tokens/s, {users} user{'s' if users > 1 else ''}", *speeds, ratio])
    settings = file.data["settings"]
    point, memory = settings["points"][0], mebibytes(settings["kv_memory_bytes"])
    yield f"{SMOLLM2}, {memory} of KV memory, prompts of {point['input']:,} tokens, answers of {point['output']}."
    turns = settings["repeats"]
    yield f"Machine: {file.machine}. {turns} turn{'s' if turns > 1 else ''}."
    yield ""
    yield from table(["", *(f"`{name}`" for name in names), "ratio within a turn, median"], rows)


@block("readme-speed")
def readme_speed() -> Iterator[str]:
    kernels = load("cpu/kernels.json").data["kernels"]
    speeds = {n: [arms[n]["speed_against_baseline"] for arms in kernels.values()] for n in ("bf16", "k4v4")}
    speeds["own"] = [k4v4 / bf16 for k4v4, bf16 in zip(speeds["k4v4"], speeds["bf16"], strict=True)]
    steps = [load(f"{STEP}{name}_batch1.json") for name in ("new", "again", "third")]
    short, long = ([_step(step, context, "k4v4")["ratio"]["median"] for step in steps] for context in ("2048", "6000"))
    beside = load("cpu/llama_cpp/smollm2.json").data["ratios"]
    prompt, decode = beside["prompt_tokens_per_second"], beside["decode_tokens_per_second"]
    cost = load("cpu/overhead.json").data["ratios"]
    load_demo_file = load("cpu/load/load.json").data["arms"][1]
    table_rows = [
        ["tokens in the same memory, `k4v4` to `bf16`", times(load_demo_file["capacity_ratio"])],
        [
            "speed of decode attention, `k4v4` to our `bf16`, and to torch's SDPA on bf16",
            ", ".join(f"{min(speeds[n]):.1f}x to {max(speeds[n]):.1f}x" for n in ("own", "k4v4")),
        ],
        [
            "time of a SmolLM2 token, one core, `k4v4` to `bf16`, three starts",
            f"{min(short):.2f} to {max(short):.2f} at 2,048 tokens, {min(long):.2f} to {max(long):.2f} at 6,000",
        ],
        [
            "SmolLM2 (16-bit weights) beside llama.cpp (4-bit weights, f16 cache), one core",
            f"prompts {prompt['k4v4 / f16']:.1f}x as fast, decoding {decode['k4v4 / f16']:.2f}x",
        ],
        [
            "with reports to without, demo model, 32 requests at once; quartiles",
            "throughput {}, time to the first token {}".format(
                *(_quartiles(cost[name]) for name in ("output_throughput", "median_ttft_ms"))
            ),
        ],
    ]
    yield from table(["what", "measured"], table_rows)


@block("capacity")
def capacity() -> Iterator[str]:
    rows, files = [], []
    for path, model in (("cpu/load/load.json", "fraqtl-demo"), ("cpu/load_smollm2/load.json", SMOLLM2)):
        file = load(path)
        files.append(file)
        for arm in file.data["arms"]:
            found = arm["capacity"]
            cells = [fixed(found["tokens"]), times(arm["capacity_ratio"]), str(found["requests"])]
            rows.append([model, mebibytes(file.data["settings"]["kv_memory_bytes"]), f"`{arm['name']}`", *cells])
    yield from table(["model", "KV memory", "format", "tokens", "against `bf16`", "requests of the load test"], rows)
    yield from source(*files, model="as in the table")


SIZING = ("bf16", "k8v8", "k4v4", "k4v3", "k3v3")
SIZING_COMMAND = "fraqtl-serve plan --models bench/sizing_models.json --kv-memory 20GiB --context 16384 --json"


@block("sizing")
def sizing() -> Iterator[str]:
    file = load("sizing.json")
    rows = []
    for planned in file.data:
        model, formats = planned["model"], {row["name"]: row for row in planned["formats"]}
        size = f"{model['layers']} x {model['kv_heads']} x {model['head_size']}"
        if model["windowed_layers"]:
            size += f", {model['windowed_layers']} see {model['window']:,}"
        cells = (f"{formats[name]['tokens']:,} ({formats[name]['users']})" for name in SIZING)
        rows.append([model["name"], size, *cells])
    yield from table(["model", "layers x KV heads x head size", *(f"`{name}`" for name in SIZING)], rows)
    yield from source(file, model="as in the table", command=SIZING_COMMAND, machine="none, this is arithmetic")


@block("start")
def start() -> Iterator[str]:
    rows, files = [], []
    for name in ("fraqtl-demo", "smollm2"):
        file = load(f"cpu/start/{name}.json")
        files.append(file)
        for run, label in (("first", "empty clone, empty caches"), ("second", "the next start")):
            found = file.data["runs"][run]
            rows.append([name, label, f"{found['seconds_to_first_answer']:.1f} s", found["answer"]])
    yield from table(["model", "start", "until the first answer", "answer"], rows)
    yield from source(*files, model="as in the table")


@block("overhead")
def overhead() -> Iterator[str]:
    file = load("cpu/overhead.json")
    labels = {"output_throughput": "output tokens/s", "median_ttft_ms": "TTFT", "median_tpot_ms": "time per token"}
    rows = []
    for key, label in labels.items():
        found = file.data["ratios"][key]
        low, high = found["quartiles"]
        rows.append([label, f"{found['median']:.3f}", f"{low:.3f} to {high:.3f}"])
    of = file.data["load"]
    yield f"{len(file.data['pairs'])} pairs of runs, {of['concurrency']} requests at once, {of['input']} tokens in,"
    yield f"{of['output']} out. Each row is the server with reports over the one without."
    yield ""
    yield from table(["", "median", "quartiles"], rows)
    idle = max(run["cores_of_the_idle_server"] for pair in file.data["pairs"] for run in pair.values())
    yield f"The server that idles meanwhile takes at most {share(idle)} of a core."
    yield from source(file, model="fraqtl-demo")


@block("aot")
def aot() -> Iterator[str]:
    file = load("aot/registers.json")
    usages = file.data["usages"]
    kernels = sorted({usage["variant"].split("-")[0] for usage in usages})
    rows = []
    for kernel in kernels:
        own = [usage for usage in usages if usage["variant"].startswith(kernel + "-")]
        cells = []
        for architecture in (80, 90, 100):
            here = [usage for usage in own if usage["architecture"] == architecture]
            cells.append(f"{min(u['registers'] for u in here)} to {max(u['registers'] for u in here)}")
        rows.append([kernel, str(len({u["variant"] for u in own})), *cells, str(max(u["spills"] for u in own))])
    yield from table(["kernel", "variants", "registers, sm_80", "sm_90", "sm_100", "spills"], rows)
    number = len({usage["variant"] for usage in usages})
    tf32 = sum(bool(usage["tf32"]) for usage in usages)
    yield f"{number} variants, each for three architectures; {tf32} of them use TF32."
    command = "python -m fraqtl_kernels.gpu.aot --out bench/results/aot"
    yield from source(file, model="none", command=command, machine="a machine without a GPU")
