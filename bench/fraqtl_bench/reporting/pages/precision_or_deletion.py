"""Is precision better than deletion: the quality lab's tables, the perturbation law, adaptive bits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from statistics import fmean
from typing import Any

from fraqtl_bench.reporting.markdown import table
from fraqtl_bench.reporting.pages.numbers import fixed, share
from fraqtl_bench.reporting.pages.results import MODELS, Result, block, load, source
from fraqtl_kernels.formats import FORMATS

LAB = "cpu/quality/quality.json"
GROUPS = "cpu/quality/groups.json"
REDUCED = ("rank", "hybrid")
GROUP_MODELS = ("mha", "gqa4", "gqa8")
SEARCHES = ("search_smollm2_4.25", "search_smollm2_3.9", "search_qwen2.5_3.9")
SERVED = ("smollm2_3.9", "smollm2_3.625", "qwen2.5_3.9", "qwen2.5_3.625")


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
    files = [load(path) for path in ("cpu/quality/budget.json", "cpu/real/budget_smollm2.json")]
    rows: list[list[str]] = []
    for model in (model for file in files for model in file.data["models"]):
        rows += _allocation_rows(model["allocation"], MODELS.get(model["model"], model["model"]), model["head_size"])
    yield from table(["model", "layers in each format", "bits/dim", "perplexity", "divergence, added up"], rows)
    yield from source(*files, model="as in the table")


def _allocation_rows(found: dict[str, Any], model: str, size: int) -> Iterator[list[str]]:
    """The allocation, the best format for all layers within the budget, and `k4v4`."""
    cost, layers = found["sensitivity"], range(len(found["formats"]))
    names = {_by_format(found["formats"]): found["formats"]}
    names |= {f"`{name}` all": [name] * len(layers) for name in (found["best_uniform"], "k4v4")}
    perplexities = [found["perplexity"], found["best_uniform_perplexity"], found["uniform"]["k4v4"]]
    for (label, formats), perplexity in zip(names.items(), perplexities, strict=True):
        bits = fmean(FORMATS[name].bytes_per_token(size) * 8 / (2 * size) for name in formats)
        nats = sum(cost[name][layer] for layer, name in enumerate(formats))
        yield [model, label, fixed(bits, 2), fixed(perplexity, 3), fixed(1000 * nats, 1)]
        model = ""


@block("adaptive-bits-searches")
def adaptive_bits_searches() -> Iterator[str]:
    files = [load(f"cpu/real/{name}.json") for name in SEARCHES]
    rows = []
    for file in files:
        found = file.model["allocation"]
        cells = [f"{found['budget']:g}", fixed(found["search_tokens"])]
        rows.append(
            [MODELS[file.model["model"]], *cells, _by_format(found["formats"]), fixed(found["bits_per_dim"], 3)]
        )
    yield from table(["model", "budget", "tokens", "layers in each format", "bits/dim"], rows)
    yield from source(*files, model="as in the table")


@block("adaptive-bits-served")
def adaptive_bits_served() -> Iterator[str]:
    files = [load(f"cpu/real/through_budget_{name}.json") for name in SERVED]
    head = ["model", "layers in each format", "bits/dim", "tokens in the pool", "with `bf16`", "server"]
    head += ["against exact", "simulation", "server against simulation"]
    yield from table(head, list(map(_served_row, files)))
    yield from source(*files, model="as in the table")


def _served_row(file: Result) -> list[str]:
    """What the server said of its profile and its pool, beside the lab's simulation."""
    model, [found] = file.model, file.model["through_server"]
    capacity = found["capacity"]
    numbers = capacity["block_size"] * model["layers"] * model["kv_heads"] * 2 * model["head_size"]
    return [
        MODELS[model["model"]],
        _by_format(capacity["kv_formats"] or [found["kv_format"]] * model["layers"]),
        fixed(8 * capacity["block_bytes"] / numbers, 3),
        fixed(capacity["tokens"]),
        fixed(capacity["baseline_tokens"]),
        fixed(found["perplexity"], 3),
        f"{100 * (found['perplexity'] / file.method('fp16')['perplexity'] - 1):+.1f} %",
        fixed(found["simulated"], 3),
        f"{100 * found['relative_difference']:+.2f} % ± {100 * found['standard_error']:.2f} %",
    ]


def _by_format(formats: list[str]) -> str:
    """Ranges of layers by format, such as `k4v4` 0-2, 5."""
    return "; ".join(
        f"`{name}` " + ", ".join(_ranges([i for i, each in enumerate(formats) if each == name]))
        for name in sorted(set(formats))
    )


def _ranges(numbers: list[int]) -> Iterator[str]:
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *others = [number for _, number in run]
        yield f"{first}-{others[-1]}" if others else str(first)


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
