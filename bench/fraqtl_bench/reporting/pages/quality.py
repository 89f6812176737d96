"""Perplexity, recall, the quality lab, and the known quality floors."""

from __future__ import annotations

from collections.abc import Iterator

from fraqtl_bench.reporting.markdown import table
from fraqtl_bench.reporting.pages.numbers import change, fixed, share
from fraqtl_bench.reporting.pages.results import MODELS, Result, block, load, source

REAL = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b", "gemma3-270m")
LAB = "cpu/quality/quality.json"
GROUPS = "cpu/quality/groups.json"
REDUCED = ("rank", "hybrid")
GROUP_MODELS = ("mha", "gqa4", "gqa8")
STORED_AS = (
    ("fp16", "`fp16`"),
    ("k8v8", "`k8v8`"),
    ("k4v4", "`k4v4`"),
    ("k4v4-channel", "`k4v4-channel`, the published recipe"),
    ("int4-token", "plain INT4, one scale per token"),
    ("rank", "a quarter of the dimensions, 16 bits each"),
)


def _real() -> list[Result]:
    return [load(f"cpu/real/{name}.json") for name in REAL]


def _increase(result: Result, method: str) -> float:
    """Of the perplexity over that of fp16, relative."""
    return float(result.method(method)["perplexity"] / result.method("fp16")["perplexity"] - 1)


def _reduced(result: Result) -> str:
    """The method that keeps a quarter of the dimensions: its rank depends on the head size."""
    return next(row["method"] for row in result.model["rows"] if row["method"].startswith("rank"))


def _perplexity_cell(result: Result, method: str) -> str:
    method = _reduced(result) if method == "rank" else method
    value = fixed(result.method(method)["perplexity"], 2)
    return value if method == "fp16" else f"{value} ({change(_increase(result, method))})"


def _real_table() -> Iterator[str]:
    files = _real()
    rows = [[label, *(_perplexity_cell(file, method) for file in files)] for method, label in STORED_AS]
    yield from table(["", *(MODELS[name] for name in REAL)], rows)


@block("perplexity-real")
def perplexity_real() -> Iterator[str]:
    files = _real()
    scored = {file.model["scored_tokens"] for file in files}
    window = files[0].data["settings"]["window"]
    yield f"Perplexity on {fixed(scored.pop())} tokens of WikiText-2 in windows of {fixed(window)}, float32."
    yield "In brackets the change against `fp16`."
    yield ""
    yield from _real_table()
    yield from source(*files, model="as in the table")


@block("rivals")
def rivals() -> Iterator[str]:
    file, served = load("cpu/real/rivals_smollm2.json"), load("cpu/real/residual_smollm2.json")
    exact = file.method("fp16")["perplexity"]
    rows = []
    found = [*file.model["rows"], *(row for row in served.model["rows"] if row["method"] != "fp16")]
    for row in sorted(found, key=lambda row: (-row["vector_bits_per_dim"], row["perplexity"])):
        value = fixed(row["perplexity"], 2)
        error = row["perplexity_delta_error"]
        cells = [f"`{row['method']}`", f"{row['vector_bits_per_dim']:.2f}", f"{row['bits_per_dim']:.2f}", value]
        if row["method"] == "fp16":
            rows.append([*cells, *[""] * 5])
            continue
        moved = row["divergence"]
        cells += [change(row["perplexity"] / exact - 1), share(error / exact, 2), f"{1000 * moved['kl']:.1f}"]
        rows.append([*cells, f"{1000 * moved['kl_p99']:.0f}", share(moved["agreement"], 1)])
    tokens, window = file.model["scored_tokens"], file.data["settings"]["window"]
    yield f"{fixed(tokens)} tokens of WikiText-2 in windows of {fixed(window)}, float32."
    yield "Bits a dimension: in a long sequence, and of all that is kept behind one window, constants included."
    yield "Divergence in 10^-3 nat a token."
    yield ""
    head = ["stored as", "bits", "bits, one window", "perplexity", "change", "standard error"]
    yield from table([*head, "divergence", "its 99th percentile", "same best token"], rows)
    yield from source(file, served, model=MODELS["smollm2-135m-instruct"])


@block("readme-perplexity")
def readme_perplexity() -> Iterator[str]:
    yield from _real_table()


@block("perplexity-demo")
def perplexity_demo() -> Iterator[str]:
    file = load("cpu/quantiser.json")
    found = file.data["perplexity"]
    names = ("float32", "bf16", "k8v8", "k8v4", "k4v4", "k4v4-channel", "k4v2", "plain INT4")
    yield from perplexity_rows(found, {name: f"`{name}`" if name[0] in "bk" else name for name in names})
    yield from source(file, model="fraqtl-demo, made-up chats")


def perplexity_rows(found: dict[str, dict[str, float]], labels: dict[str, str]) -> Iterator[str]:
    tokens = {row["tokens"] for row in found.values()}
    yield f"{fixed(tokens.pop())} tokens. The divergence is that of the next-token distribution from the exact model's."
    yield ""
    rows = []
    for name, label in labels.items():
        row = found[name]
        rows.append(
            [
                label,
                fixed(row["perplexity"], 4),
                f"{100 * row['increase']:+.2f} %",
                share(row["standard_error"], 2),
                fixed(1000 * row["divergence"], 2),
            ]
        )
    yield from table(["stored as", "perplexity", "increase", "standard error", "divergence, 10^-3 nat/token"], rows)


def _recall_rows() -> Iterator[list[str]]:
    first, second = load("cpu/recall.json"), load("cpu/recall_4096.json")
    formats = list(first.data["recall"])
    for context in first.data["recall"][formats[0]]:
        cells = [share(first.data["recall"][name][context]["accuracy"]) for name in formats]
        yield [fixed(int(context)), fixed(first.data["questions"]), *cells]
    again = second.data["recall"]
    for context in next(iter(again.values())):
        cells = [share(again[name][context]["accuracy"]) if name in again else "" for name in formats]
        yield [fixed(int(context)), f"{second.data['questions']} others", *cells]


@block("recall")
def recall() -> Iterator[str]:
    first, second = load("cpu/recall.json"), load("cpu/recall_4096.json")
    yield from table(["context", "questions", *(f"`{name}`" for name in first.data["recall"])], list(_recall_rows()))
    yield from source(first, second, model="fraqtl-demo")


@block("readme-recall")
def readme_recall() -> Iterator[str]:
    formats = load("cpu/recall.json").data["recall"]
    yield from table(["context", "questions", *(f"`{name}`" for name in formats)], list(_recall_rows()))


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {100 * error:.2f} %"


@block("through-server")
def through_server() -> Iterator[str]:
    arms = {
        "bf16": "`bf16`",
        "k8v8": "`k8v8`",
        "k4v4": "`k4v4`, no residual",
        "k4v4_refined": "`k4v4` as served",
    }
    runs = {
        "demo": ("quality/through", ("bf16", "k4v4", "k4v4_refined")),
        "smollm2-135m-instruct": ("real/through", ("bf16", "k4v4", "k4v4_refined")),
        "gemma3-270m": ("real/through_gemma3", ("bf16", "k8v8", "k4v4_refined")),
    }
    files, rows = [], []
    for model, (start, of_model) in runs.items():
        for arm in of_model:
            file, label = load(f"cpu/{start}_{arm}.json"), arms[arm]
            files.append(file)
            [found] = file.model["through_server"]
            exact = file.method("fp16")["perplexity"]
            needle = found["needle_accuracy"]
            rows.append(
                [
                    MODELS[model],
                    label,
                    fixed(found["tokens"]),
                    fixed(found["perplexity"], 4),
                    f"{100 * (found['perplexity'] / exact - 1):+.2f} %",
                    fixed(found["simulated"], 4),
                    f"{100 * found['relative_difference']:+.2f} %" + _plus_minus(found.get("standard_error")),
                    "" if needle is None else share(needle, 0),
                ]
            )
    head = ["model", "format", "tokens", "server", "against exact", "simulation", "server against simulation", "needle"]
    yield from table(head, rows)
    yield from source(*files, model="as in the table")


def _lab_row(file: Result, method: str, model: int = 0) -> list[str]:
    row = file.method(method, model)
    plus = "" if method == "fp16" else f"{row['perplexity_delta']:+.3f}"
    return [
        f"`{method}`",
        fixed(row["bits_per_dim"], 2),
        fixed(row["perplexity"], 3),
        plus,
        share(row["needle_accuracy"], 0),
        share(row["last_word_accuracy"], 1),
        share(row["flips"], 2 if row["flips"] < 0.1 else 1),
    ]


@block("lab-demo")
def lab_demo() -> Iterator[str]:
    file = load(LAB)
    names = ("fp16", "int4-channel", "int4-token", "k4v4-channel", "k4v4", "rank16", "rank32x8")
    head = ["method", "bits/dim", "perplexity", "against fp16", "needle", "last word", "flips"]
    yield from table(head, [_lab_row(file, name) for name in names])
    found = file.model
    yield f"{fixed(found['scored_tokens'])} scored tokens in {found['windows']} windows."
    yield from source(file, model="fraqtl-demo, text made up by the lab")


@block("lab-demo-budgets")
def lab_demo_budgets() -> Iterator[str]:
    file = load(LAB)
    kinds = (("quantisation", "quantization"), ("hybrid",), ("rank",))
    rows = []
    for bits in (2, 3, 4, 8):
        best = [_best(file, bits, families) for families in kinds]
        rows.append([str(bits), *(cell for cells in best for cell in cells)])
    measures = ["bits/dim", "perplexity", "needle"]
    head = ["budget", "best quantized", *measures, "best hybrid", *measures, "rank reduction", *measures]
    yield from table(head, rows)
    yield from source(file, model="fraqtl-demo, text made up by the lab")


def _best(file: Result, bits: int, families: tuple[str, ...]) -> list[str]:
    """Of the rows of these families at this budget, keys and values alike, the one with the least perplexity."""
    rows = [
        row
        for row in file.model["rows"]
        if row["family"] in families and row["budget"] == bits and row["side"] == "kv" and "@" not in row["method"]
    ]
    if not rows:
        return [""] * 4
    row = min(rows, key=lambda row: float(row["perplexity"]))
    cells = [fixed(row["bits_per_dim"], 2), fixed(row["perplexity"], 3), share(row["needle_accuracy"], 0)]
    return [f"`{row['method']}`", *cells]


@block("lab-demo-flips")
def lab_demo_flips() -> Iterator[str]:
    file = load(LAB)
    methods = ("int4-token", "k4v4", "rank32x8", "rank16")
    found = [file.method(method)["flips_by_margin"] for method in methods]
    rows = []
    for i, first in enumerate(found[0]):
        until = f" to {found[0][i + 1]['above']:g}" if i + 1 < len(found[0]) else " or more"
        cells = (share(one[i]["flips"] / one[i]["decisions"]) for one in found)
        rows.append([f"{first['above']:g}{until}", fixed(first["decisions"]), *cells])
    yield from table(["lead of the first key", "decisions", *(f"`{method}`" for method in methods)], rows)
    yield from source(file, model="fraqtl-demo, text made up by the lab")


@block("lab-demo-bases")
def lab_demo_bases() -> Iterator[str]:
    file = load(LAB)
    bases = ("identity", "random", "hadamard", "pca")
    rows = []
    for method in ("int4-channel", "int4-token", "rank16", "rank32x8"):
        own = {row["basis"]: row for row in file.model["rows"] if row["method"].split("@")[0] == method}
        values = [own[basis]["perplexity"] for basis in bases]
        rows.append([f"`{method}`", *(fixed(x, 3) for x in values), fixed(max(values) - min(values), 3)])
    yield from table(["method", *bases, "largest minus smallest"], rows)
    sides = []
    for method in ("int4-token", "rank16"):
        cells = [f"{file.method(f'{method}:{side}')['perplexity_delta']:+.3f}" for side in "kv"]
        sides.append([f"`{method}`", *cells])
    yield "Perplexity against `fp16` where only one side is changed:"
    yield ""
    yield from table(["method", "keys only", "values only"], sides)
    yield from source(file, model="fraqtl-demo, text made up by the lab")


@block("lab-groups")
def lab_groups() -> Iterator[str]:
    file = load(GROUPS)
    ratios = [f"`{m['model']}` {m['group']}:1" for m in file.data["models"]]
    rows = []
    for method in ("fp16", "int4-channel", "int4-token", "k4v4", "rank16", "rank32x8"):
        cells = []
        for i in range(len(GROUP_MODELS)):
            row = file.method(method, i)
            flips = share(row["flips"], 2 if row["flips"] < 0.1 else 1)
            cells.append(f"{fixed(row['perplexity'], 3)}, {share(row['needle_accuracy'], 0)}, {flips}")
        rows.append([f"`{method}`", *cells])
    yield "Perplexity, codes found, flips:"
    yield ""
    yield from table(["method", *ratios], rows)
    yield "Perplexity of the best of rank reduction and hybrids minus that of the best quantized method:"
    yield ""
    yield from table(["margin", *ratios], list(_margin_rows(file)))
    yield from source(file, model="mha, gqa4 and gqa8, trained by `fraqtl_bench.demo_model.train`")


def _margin_rows(file: Result) -> Iterator[list[str]]:
    reduced = {4: "rank16", 8: "rank32"}
    models = range(len(GROUP_MODELS))
    alone = [file.method(reduced[4], i)["perplexity"] - _quantized(file, 4, i) for i in models]
    yield ["4 bits, rank reduction alone", *(fixed(x, 2) for x in alone)]
    for bits in (8, 4, 3, 2):
        cells = []
        for i in models:
            rows = [r for r in file.data["models"][i]["rows"] if r["budget"] == bits and r["family"] in REDUCED]
            cells.append(fixed(min(r["perplexity"] for r in rows) - _quantized(file, bits, i), 2))
        yield [f"{bits} bits", *cells]


def _quantized(file: Result, bits: int, model: int) -> float:
    rows = file.data["models"][model]["rows"]
    own = (r for r in rows if r["budget"] == bits and r["method"].startswith("int") and r["side"] == "kv")
    return float(min(r["perplexity"] for r in own))


@block("law")
def law() -> Iterator[str]:
    file = load(LAB)
    lines = file.model["law"]["lines"]
    bits = sorted({line["bits"] for line in lines if line["kind"].startswith("quanti")})
    rows = []
    for kind, label in (("quanti", "one direction quantized"), ("all channels", "all channels quantized")):
        own = {line["bits"]: line for line in lines if line["kind"].startswith(kind)}
        rows.append([label, *(f"{own[b]['ratio']:.2f} ({share(own[b]['within_quarter'], 0)})" for b in bits)])
    yield "Measured KL over predicted KL. In brackets the share of single points within 25 %."
    yield ""
    yield from table(["change", *(f"{b} bit{'s' if b > 1 else ''}" for b in bits)], rows)
    [dropped] = [line for line in lines if line["kind"] == "projection"]
    ranks = [line for line in lines if line["kind"] == "rank"]
    four = next(line for line in lines if line["kind"].startswith("quanti") and line["bits"] == 4)
    yield f"- One direction dropped: {dropped['ratio']:.2f} ({share(dropped['within_quarter'], 0)})."
    yield "- Reduced to rank " + ", ".join(f"{r['bits']}: {r['ratio']:.2f}" for r in ranks) + "."
    factors = f"{dropped['measured'] / four['measured']:.0f} measured, {dropped['predicted'] / four['predicted']:.0f}"
    yield f"- Damage of dropping a direction over quantizing it to 4 bits: {factors} predicted, 768 published."
    yield ""
    yield from source(file, model="fraqtl-demo, text made up by the lab")


@block("adaptive-bits")
def adaptive_bits() -> Iterator[str]:
    file = load("cpu/quality/budget.json")
    rows = []
    for model in file.data["models"]:
        found = model["allocation"]
        rows.append(
            [
                f"`{model['model']}`",
                ", ".join(found["formats"]),
                fixed(found["bits_per_dim"], 2),
                fixed(found["perplexity"], 3),
                f"`{found['best_uniform']}`",
                fixed(found["best_uniform_bits"], 2),
                fixed(found["best_uniform_perplexity"], 3),
                fixed(found["uniform"]["k4v4"], 3),
            ]
        )
    head = ["model", "format of each layer", "bits/dim", "perplexity", "best uniform within the budget", "bits/dim"]
    yield from table([*head, "perplexity", "`k4v4` everywhere"], rows)
    yield from source(file, model="as in the table")


@block("reproduced")
def reproduced() -> Iterator[str]:
    lab, groups = load(LAB), load(GROUPS)
    last = len(GROUP_MODELS) - 1
    demo = {name: lab.method(name) for name in ("int4-channel", "int4-token", "rank16")}
    eight = {name: groups.method(name, last) for name in ("int4-channel", "int4-token", "rank16")}
    deltas = [f"{row['perplexity_delta']:+.3f}" for row in (demo["int4-channel"], demo["int4-token"])]
    deltas8 = [f"{row['perplexity_delta']:+.3f}" for row in (eight["int4-channel"], eight["int4-token"])]
    margins = [fixed(lab.method("rank16")["perplexity"] - _quantized(lab, 4, 0), 1)]
    margins += [fixed(groups.method("rank16", i)["perplexity"] - _quantized(groups, 4, i), 1) for i in range(last + 1)]
    rows = [
        [
            "joint K+V INT4 costs +0.18 perplexity (Mistral-7B)",
            f"{deltas[0]} per channel, {deltas[1]} per token (`demo`); {deltas8[0]}, {deltas8[1]} (`gqa8`)",
        ],
        [
            "rank reduction is 4 to 364 perplexity worse",
            f"at 4 bits {margins[0]} (`demo`), {margins[1]} (`mha`), {margins[2]} (`gqa4`), {margins[3]} (`gqa8`)",
        ],
        [
            "routing flips: 4.6 % (rank), 0.03 % (INT4)",
            f"{share(demo['rank16']['flips'])}, {share(demo['int4-token']['flips'])} (`demo`); "
            f"{share(eight['rank16']['flips'])}, {share(eight['int4-token']['flips'])} (`gqa8`)",
        ],
    ]
    yield from table(["published", "here"], rows)
    yield from source(lab, groups, model="demo, mha, gqa4, gqa8")


@block("calibration-tokens")
def calibration_tokens() -> Iterator[str]:
    names = ("smollm2-135m-instruct", "gemma3-270m")
    files = [load(f"cpu/calibration/{name}.json") for name in names]
    head = ["prompt tokens", *(f"{MODELS[name]}, {place}" for name in names for place in ("near", "far"))]
    rows = []
    for tokens in (key for key in files[0].data["prompt_tokens"]["near"] if key != "fp16"):
        cells = []
        for file in files:
            for place in ("near", "far"):
                row = file.data["prompt_tokens"][place][tokens]
                increase = f"{100 * row['increase']:+.1f} ± {100 * row['standard_error']:.1f} %"
                cells.append(f"{increase}, {fixed(1000 * row['divergence'], 1)}")
        rows.append([fixed(int(tokens)), *cells])
    yield "Increase of the perplexity with its standard error, and divergence in 10^-3 nat per token:"
    yield ""
    yield from table(head, rows)
    yield from source(*files, model="as in the table")


@block("calibration-start")
def calibration_start() -> Iterator[str]:
    files = {name: load(f"cpu/calibration/start_{name}.json") for name in REAL}
    narrow = {name: load(f"cpu/calibration/start_{name}_avx2.json") for name in REAL}
    rows = [
        ["AVX512-BF16", *(f"{files[name].data['calibration_seconds']:.1f} s" for name in REAL)],
        ["the same, limited to AVX2", *(f"{narrow[name].data['calibration_seconds']:.1f} s" for name in REAL)],
    ]
    yield from table(["processor", *(MODELS[name] for name in REAL)], rows)
    yield from source(*files.values(), *narrow.values(), model="as in the table")


@block("floors")
def floors() -> Iterator[str]:
    real = dict(zip(REAL, _real(), strict=True))
    demo = load("cpu/quantiser.json").data["perplexity"]
    recall_file, again = load("cpu/recall.json"), load("cpu/recall_4096.json")
    overall = load("cpu/quantiser.json").data["overall"]
    rows = []
    for name, file in real.items():
        for kv_format in ("k8v8", "k4v4", "k4v4-channel"):
            rows.append([MODELS[name], f"`{kv_format}`", f"perplexity {change(_increase(file, kv_format))}", file.link])
    link = load("cpu/quantiser.json").link
    labels = {"k8v4": "`k8v4`", "k4v4": "`k4v4`", "k4v4, not calibrated": "`k4v4`, `--no-kv-calibration`"}
    labels |= {"k4v4-channel": "`k4v4-channel`", "k4v2": "`k4v2`"}
    for key, label in labels.items():
        rows.append([MODELS["demo"], label, f"perplexity {100 * demo[key]['increase']:+.2f} %", link])
    for file in (recall_file, again):
        found, questions = file.data["recall"], file.data["questions"]
        right = [found[name]["4096"]["right"] for name in ("k4v4", "bf16")]
        told = f"at 4,096 tokens {right[0]} of {questions} codes found, `bf16` {right[1]}"
        rows.append([MODELS["demo"], "`k4v4`", told, file.link])
    bias = overall["midpoint/hadamard/edge/none/none"]["bias"]["against_shipped"]
    told = f"error of the attention output {bias:.1f} times that of calibrated `k4v4`"
    rows.append(["heads with a key bias, made up", "4 bits, rotated, not calibrated", told, link])
    differ = load("cpu/texts_differ/smollm2.json")
    for arm in differ.data["arms"]:
        found = arm["parallel"]
        told = f"{found['together_against_alone']} of {found['of']} greedy texts differ when 16 run together"
        rows.append([MODELS["smollm2-135m-instruct"], f"`{arm['kv_format']}`", told, differ.link])
    yield from table(["model", "format", "what it looks like", "result file"], rows)
