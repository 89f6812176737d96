"""What a format costs: perplexity, recall, through a server, calibration, and the known quality floors."""

from __future__ import annotations

from collections.abc import Iterator

from fraqtl_bench.reporting.markdown import table
from fraqtl_bench.reporting.pages.numbers import change, fixed, share
from fraqtl_bench.reporting.pages.results import MODELS, Result, block, load, source

REAL = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b", "gemma3-270m")
THREE_BITS = dict(zip(REAL, ("smollm2", "qwen2.5", "gemma3"), strict=True))  # how result files end
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


@block("perplexity-real")
def perplexity_real() -> Iterator[str]:
    files = _real()
    scored = {file.model["scored_tokens"] for file in files}
    window = files[0].data["settings"]["window"]
    yield f"Perplexity on {fixed(scored.pop())} tokens of WikiText-2 in windows of {fixed(window)}, float32."
    yield "In brackets the change against `fp16`."
    yield ""
    rows = [[label, *(_perplexity_cell(file, method) for file in files)] for method, label in STORED_AS]
    yield from table(["", *(MODELS[name] for name in REAL)], rows)
    yield from source(*files, model="as in the table")


@block("eight-bits")
def eight_bits() -> Iterator[str]:
    files = [load(f"cpu/real/eight_bits_{name}.json") for name in REAL]
    stored_as = {
        "int8-token": "as they come",
        "int8-token@hadamard": "rotated",
        "k8v8": "rotated, about centers: `k8v8`",
    }
    rows = []
    for method, label in stored_as.items():
        cells = []
        for file in files:
            row = file.method(method)
            exact, moved = file.method("fp16")["perplexity"], row["divergence"]
            error = share(row["perplexity_delta_error"] / exact, 2)
            cells.append(f"{100 * row['perplexity_delta'] / exact:+.2f} ± {error}, {1000 * moved['kl']:.2f}")
        rows.append([label, *cells])
    scored = {file.model["scored_tokens"] for file in files}
    yield f"Change of the perplexity on {fixed(scored.pop())} tokens of WikiText-2 in windows of 1,024, float32,"
    yield "with its standard error, and divergence in 10^-3 nat a token."
    yield ""
    yield from table(["8 bits, one scale a vector", *(MODELS[name] for name in REAL)], rows)
    yield from source(*files, model="as in the table")


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


@block("ruler-real")
def ruler_real() -> Iterator[str]:
    files = [load(f"cpu/real/ruler_{part}_smollm2.json") for part in ("needles", "words")]
    methods = [row["method"] for row in files[0].model["rows"]]
    rows = []
    for file in files:
        of_method = {row["method"]: row["ruler"] for row in file.model["rows"]}
        for i, cell in enumerate(of_method["fp16"]):
            found = (of_method[method][i]["found"] for method in methods)
            rows.append([f"`{cell['task']}`", fixed(cell["length"]), fixed(cell["answers"]), *map(fixed, found)])
    yield from table(["task", "tokens", "answers", *(f"`{method}`" for method in methods)], rows)
    yield from source(*files, model=MODELS["smollm2-135m-instruct"])


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {100 * error:.2f} %"


@block("through-server")
def through_server() -> Iterator[str]:
    arms = {
        "bf16": "`bf16`",
        "k8v8": "`k8v8`",
        "k4v4": "`k4v4`, no residual",
        "k4v4_refined": "`k4v4` as served",
        "k4v3_refined": "`k4v3` as served",
        "k3v3_refined": "`k3v3` as served",
        "k4v2_refined": "`k4v2` as served",
    }
    small = "k4v3_refined", "k3v3_refined"
    runs = {
        "demo": ("quality/through", ("bf16", "k4v4", "k4v4_refined")),
        "smollm2-135m-instruct": ("real/through", ("bf16", "k4v4", "k4v4_refined", *small, "k4v2_refined")),
        "qwen2.5-coder-0.5b": ("real/through_qwen2.5", ("k3v3_refined", "k4v2_refined")),
        "gemma3-270m": ("real/through_gemma3", ("bf16", "k8v8", "k4v4_refined", "k3v3_refined")),
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


TEXTS = {"wikitext2": "WikiText-2", "bible": "King James Bible", "code": "Python"}


@block("calibration-texts")
def calibration_texts() -> Iterator[str]:
    files = {
        (made, scored): load(f"cpu/calibration/transfer_{made}_{scored}.json") for made in TEXTS for scored in TEXTS
    }
    tokens = {file.model["scored_tokens"] for file in files.values()}
    yield f"Of {fixed(tokens.pop())} tokens each: increase of the perplexity with its standard error, and divergence in"
    exact = {text: fixed(files["wikitext2", text].method("fp16")["perplexity"], 2) for text in TEXTS}
    yield f"10^-3 nat per token. Perplexity of `fp16`: {', '.join(f'{TEXTS[text]} {exact[text]}' for text in TEXTS)}."
    yield ""
    rows = []
    for method, label in (("k4v4+residual", "`k4v4` as served"), ("k4v4-channel", "`k4v4-channel`")):
        for made, name in TEXTS.items():
            cells = []
            for scored in TEXTS:
                file = files[made, scored]
                row = file.method(method)
                error = row["perplexity_delta_error"] / file.method("fp16")["perplexity"]
                increase = f"{100 * _increase(file, method):+.1f} ± {100 * error:.1f} %"
                cells.append(f"{increase}, {fixed(1000 * row['divergence']['kl'], 1)}")
            rows.append([label, name, *cells])
    yield from table(["format", "calibrated with", *(f"on {name}" for name in TEXTS.values())], rows)
    yield from source(*files.values(), model=MODELS["smollm2-135m-instruct"])


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
        small = load(f"cpu/real/three_bits_{THREE_BITS[name]}.json")
        for kv_format in ("k4v3", "k3v3"):
            told = f"perplexity {change(_increase(small, kv_format + '+residual'))}"
            rows.append([MODELS[name], f"`{kv_format}`", told, small.link])
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
    refract = load("cpu/real/refract_smollm2.json")
    for name, report in refract.data["reports"].items():
        texts = report["axes"]["gtm"]
        turned = round((1 - texts["full_match_rate"]) * texts["n_prompts"])
        told = f"{turned} of {texts['n_prompts']} greedy texts of {texts['n_tokens_each']} tokens differ from `bf16`'s"
        rows.append([MODELS["smollm2-135m-instruct"], f"`{name}`", told, refract.link])
    yield from table(["model", "format", "what it looks like", "result file"], rows)
