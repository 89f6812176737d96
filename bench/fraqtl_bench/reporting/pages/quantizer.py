"""How the quantizer of k4v4 was chosen."""

from __future__ import annotations

from collections.abc import Iterator

from fraqtl_bench.reporting.markdown import table
from fraqtl_bench.reporting.pages.numbers import fixed
from fraqtl_bench.reporting.pages.quality import perplexity_rows
from fraqtl_bench.reporting.pages.results import block, load, source

FILE = "cpu/quantiser.json"
PLAIN = "symmetric/none/absmax/none/none"
COLUMNS = (
    (PLAIN, "plain INT4: symmetric, not rotated"),
    ("midpoint/hadamard/edge/none/none", "midpoint grid, rotated"),
    ("midpoint/hadamard/edge/mean/none", "+ centered"),
    ("midpoint/hadamard/edge/sinks/powers", "+ outlier center, balanced"),
    ("matrix", "calibrated basis in their place"),
    ("feedback", "+ pairs and feedback"),
    ("k4v4", "+ best of eight scales = `k4v4`"),
)
CASES = (
    ("demo_model, D=64", "demo model"),
    ("gaussian, D=128", "Gaussian"),
    ("heavy tails, D=128", "heavy tails (Student t, 3 degrees)"),
    ("1 outlier 8x, D=128", "1 outlier channel, 8x"),
    ("1 outlier 30x, D=128", "1 outlier channel, 30x"),
    ("4 outliers 30x, D=128", "4 outlier channels, 30x"),
    ("4 outliers 30x hidden, D=128", "the same, queries 30x smaller there"),
    ("bias, D=128", "key bias on slow RoPE pairs"),
    ("sinks 10x, D=128", "4 sink tokens, 10x norm"),
    ("sinks 30x, D=128", "4 sink tokens, 30x norm"),
)
VARIANTS = (
    (PLAIN, "plain: symmetric, not rotated"),
    ("midpoint/hadamard/absmax/none/none", "midpoint, rotated, scale max/7.5"),
    ("midpoint/hadamard/edge/none/none", "midpoint, rotated, scale max/8"),
    ("midpoint/hadamard/edge/mean/none", "+ centered"),
    ("midpoint/hadamard/edge/mean/balanced", "centered, balanced"),
    ("midpoint/hadamard/edge/sinks/none", "two centers"),
    ("midpoint/hadamard/edge/sinks/magnitude", "two centers, smoothed by magnitude"),
    ("midpoint/hadamard/edge/sinks/balanced", "two centers, balanced"),
    ("midpoint/hadamard/edge/sinks/powers", "two centers, balanced by powers of 2"),
    ("midpoint/none/edge/sinks/powers", "the same, not rotated"),
    ("symmetric/hadamard/edge/sinks/powers", "the same, symmetric grid"),
    ("midpoint/hadamard/mse/sinks/powers", "the same, searched scale"),
    ("asymmetric/hadamard/mse/sinks/powers", "the same, asymmetric grid, searched scale"),
    ("matrix", "two centers, calibrated basis"),
    ("feedback", "two centers, pairs and feedback"),
    ("k4v4", "`k4v4` as shipped"),
)
FAMILIES = ("model", "bias", "sinks", "outliers", "hidden outliers", "all")
STEPS = {
    "float32": "float32",
    "k4v4": "`k4v4`",
    "k4v4, calibrated on chats like these": "`k4v4`, calibrated on chats of this kind",
    "k4v4, output projection ignored": "`k4v4`, output projection ignored",
    "k4v4, not refined": "`k4v4`, no residual",
    "k4v4, feedback only": "`k4v4`, basis, pairs and feedback, one scale",
    "k4v4, not calibrated": "`k4v4`, not calibrated",
    "k4v4, matrix only": "`k4v4`, basis only",
    "centred, balanced by powers of 2": "centered, a factor per channel",
    "plain INT4": "plain INT4",
}


@block("quantizer-cases")
def cases() -> Iterator[str]:
    file = load(FILE)
    found = file.data["quantiser"]
    rows = []
    for name, label in CASES:
        case = found[name]
        measured = {**case["keys"], **case["steps"], "k4v4": case["shipped"]}
        cells = (f"{100 * measured[key][1]:.1f} ({100 * measured[key][2]:.1f})" for key, _ in COLUMNS)
        rows.append([label, *cells])
    yield "Error of the attention output in %. In brackets: queries whose most attended key changes, in %."
    yield ""
    yield from table(["case", *(label for _, label in COLUMNS)], rows)
    yield from source(file, model="fraqtl-demo at head size 64, made-up heads of size 128")


@block("quantizer-variants")
def variants() -> Iterator[str]:
    file = load(FILE)
    overall, size = file.data["overall"], file.data["bytes"]
    rows = []
    for key, label in VARIANTS:
        own = overall[key]
        cells = [fixed(own[family]["against_shipped"], 2) for family in FAMILIES]
        worst = [fixed(own[f]["against_own_benign"], 1) for f in FAMILIES[1:-1]]
        rows.append([label, str(size.get(key, size[PLAIN])["128"]), *cells, *worst])
    number = len(file.data["quantiser"])
    head = [
        "variant",
        "bytes",
        "demo model",
        *FAMILIES[1:-1],
        f"all {number}",
        *(f"{f}, worst" for f in FAMILIES[1:-1]),
    ]
    yield "Error of the attention output over that of `k4v4`, geometric mean over the cases of a family."
    yield 'The columns "worst" compare with the same variant\'s error on Gaussian heads instead.'
    yield ""
    yield from table(head, rows)
    beaten = sum(case["keys"][PLAIN][1] > case["shipped"][1] for case in file.data["quantiser"].values())
    yield f"`k4v4` has the smaller error than plain INT4 in {beaten} of {number} cases."
    yield from source(file, model="fraqtl-demo and made-up heads of size 64 and 128")


@block("quantizer-steps")
def steps() -> Iterator[str]:
    file = load(FILE)
    yield from perplexity_rows(file.data["perplexity"], STEPS)
    yield from source(file, model="fraqtl-demo, made-up chats")
