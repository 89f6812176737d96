"""Our formats beside other caches on real models: tables, and the figure of the README."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fraqtl_bench.reporting import figures
from fraqtl_bench.reporting.markdown import table
from fraqtl_bench.reporting.pages.numbers import change, fixed, share
from fraqtl_bench.reporting.pages.results import MODELS, Result, block, load, source

FILES = {
    "smollm2-135m-instruct": ("rivals_smollm2", "residual_smollm2", "three_bits_smollm2"),
    "qwen2.5-coder-0.5b": ("rivals_qwen2.5", "three_bits_qwen2.5"),
    "gemma3-270m": ("rivals_gemma3", "three_bits_gemma3"),
}
SERVED = {
    "k8v8": "`k8v8`",
    "k8v4+residual": "`k8v4`",
    "k4v4+residual": "`k4v4`",
    "k4v3+residual": "`k4v3`",
    "k3v3+residual": "`k3v3`",
}
"""What a server offers, by the method that simulates it as it is served."""
OTHERS = {
    "fp8": "FP8",
    "kivi-4": "KIVI-4",
    "turbo-attn": "turbo-attn",
    "q4_0": "llama.cpp `q4_0`",
    "int4_per_token_head": "vLLM `int4_per_token_head`",
    "turboquant-4bit": "TurboQuant-4",
    "nvfp4": "NVFP4",
    "rank": "a quarter of the dimensions",
}
Rows = dict[str, dict[str, Any]]


def _files(model: str) -> list[Result]:
    return [load(f"cpu/real/{name}.json") for name in FILES[model]]


def _rows(model: str) -> Rows:
    """By method; a later file has the word. `rank` is what keeps a quarter of this model's dimensions."""
    found: Rows = {row["method"]: row for file in _files(model) for row in file.model["rows"]}
    reduced = next(name for name in found if name.startswith("rank"))
    return {**found, "rank": found[reduced]}


def _increase(rows: Rows, method: str) -> float:
    return float(rows[method]["perplexity"] / rows["fp16"]["perplexity"] - 1)


def _bits(models: Iterable[Rows], method: str) -> str:
    """A number, in a long sequence; of all these models where they differ."""
    return " / ".join(dict.fromkeys(f"{rows[method]['vector_bits_per_dim']:.2f}" for rows in models))


def _scale(file: Result) -> str:
    tokens, window = file.model["scored_tokens"], file.data["settings"]["window"]
    return f"{fixed(tokens)} tokens of WikiText-2 in windows of {fixed(window)}, float32."


@block("rivals")
def rivals() -> Iterator[str]:
    files = _files("smollm2-135m-instruct")
    found = _rows("smollm2-135m-instruct")
    exact = found["fp16"]["perplexity"]
    rows = []
    for row in sorted(
        (row for name, row in found.items() if name != "rank"),
        key=lambda row: (-row["vector_bits_per_dim"], row["perplexity"]),
    ):
        value = fixed(row["perplexity"], 2)
        cells = [f"`{row['method']}`", f"{row['vector_bits_per_dim']:.2f}", f"{row['bits_per_dim']:.2f}", value]
        if row["method"] == "fp16":
            rows.append([*cells, *[""] * 5])
            continue
        moved = row["divergence"]
        error = share(row["perplexity_delta_error"] / exact, 2)
        cells += [change(row["perplexity"] / exact - 1), error, f"{1000 * moved['kl']:.1f}"]
        rows.append([*cells, f"{1000 * moved['kl_p99']:.0f}", share(moved["agreement"], 1)])
    yield _scale(files[0])
    yield "Bits a dimension: in a long sequence, and of all that is kept behind one window, constants included."
    yield "Divergence in 10^-3 nat a token."
    yield ""
    head = ["stored as", "bits", "bits, one window", "perplexity", "change", "standard error"]
    yield from table([*head, "divergence", "its 99th percentile", "same best token"], rows)
    yield from source(*files, model=MODELS["smollm2-135m-instruct"])


@block("rivals-others")
def rivals_others() -> Iterator[str]:
    models = [name for name in FILES if name != "smollm2-135m-instruct"]
    found = {model: _rows(model) for model in models}
    first = found[models[0]]
    names = sorted((name for name in first if not name.startswith("rank")), key=lambda name: first[name]["perplexity"])
    rows = []
    for name in (*(name for name in names if name != "fp16"), "rank"):
        cells = []
        for model in models:
            row, exact, risen = found[model][name], found[model]["fp16"]["perplexity"], _increase(found[model], name)
            error = "" if risen > 1 else f" ± {share(row['perplexity_delta_error'] / exact, 2)}"
            moved = row["divergence"]
            cells += [f"{change(risen)}{error}", f"{1000 * moved['kl']:,.1f}", share(moved["agreement"], 1)]
        rows.append([OTHERS["rank"] if name == "rank" else f"`{name}`", _bits(found.values(), name), *cells])
    files = [file for model in models for file in _files(model)]
    yield _scale(files[0])
    exact = " and ".join(fixed(found[model]["fp16"]["perplexity"], 2) for model in models)
    yield f"Perplexity of `fp16`: {exact}. Divergence in 10^-3 nat a token, and how often the best token is the same."
    yield ""
    columns = [part for model in models for part in (MODELS[model], "divergence", "best token")]
    yield from table(["stored as", "bits, heads of 64 / 256", *columns], rows)
    yield from source(*files, model="as in the table")


@block("refract")
def refract() -> Iterator[str]:
    file = load("cpu/real/refract_smollm2.json")
    rows = []
    for name, report in file.data["reports"].items():
        axes = report["axes"]
        scores = (report["composite"], *(axes[axis]["score"] for axis in ("gtm", "kld", "plad", "rniah")))
        same = axes["gtm"]["full_match_rate"] * axes["gtm"]["n_prompts"]
        rows.append([f"`{name}`", *(fixed(score, 1) for score in scores), fixed(same), report["band"].lower()])
    yield f"REFRACT {file.data['refract']}, 100 is the reference, `bf16`. Texts that are the same to the end, of 30."
    yield ""
    head = ["stored as", "score", "greedy texts", "divergence", "perturbed prompts", "needles", "same texts"]
    yield from table([*head, "REFRACT calls it"], rows)
    yield from source(file, model=MODELS["smollm2-135m-instruct"])


@block("readme-rivals")
def readme_rivals() -> Iterator[str]:
    found = {model: _rows(model) for model in FILES}
    rows = []
    for name, label in {**SERVED, **OTHERS}.items():
        cells = [f"{change(_increase(of, name))}, {1000 * of[name]['divergence']['kl']:,.1f}" for of in found.values()]
        rows.append([label, _bits(found.values(), name), *cells])
    yield _scale(_files("smollm2-135m-instruct")[0])
    yield ""
    yield from table(["stored as", "bits, heads of 64 / 256", *(MODELS[model] for model in FILES)], rows)


LABEL_GAP = 0.19  # decades between two labels
CROWDED = 5.5  # bits, below which points lie close together


def draw(folder: Path) -> Path:
    """rivals.png: divergence over bits a number, a panel a model. Raises ConfigError without matplotlib."""
    plt = figures.pyplot()
    figure, panels = plt.subplots(1, len(FILES), figsize=(13, 5), sharey=True)
    for panel, model in zip(panels, FILES, strict=True):
        _draw_model(panel, _rows(model))
        panel.set(title=MODELS[model], yscale="log", xlabel="bits a number, in a long sequence", xlim=(2.9, 9.4))
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("divergence of the next token from fp16's, 10⁻³ nat")
    return figures.save(plt, figure, folder / "rivals.png")


def _draw_model(panel: Any, rows: Rows) -> None:
    points = []
    for labels, color, marker in ((OTHERS, "#777777", "o"), (SERVED, "#0b62c4", "s")):
        for name, label in labels.items():
            bits, moved = rows[name]["vector_bits_per_dim"], 1000 * rows[name]["divergence"]["kl"]
            panel.plot(bits, moved, marker, color=color, markersize=7)
            points.append((moved, bits, label.replace("`", ""), color))
    last = -math.inf
    for moved, bits, label, color in sorted(points):
        height = math.log10(moved)
        if bits < CROWDED:
            last = height = max(height, last + LABEL_GAP)
        line = {"arrowstyle": "-", "color": color, "alpha": 0.4, "shrinkB": 0}
        at = (bits + 0.35, 10**height)
        panel.annotate(label, (bits, moved), at, fontsize=8, color=color, va="center", arrowprops=line)
