"""The lab's report, typed and versioned: what `quality.json` holds, and what the other files are made from."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

VERSION = 1


class Part(BaseModel):
    """Unknown fields are refused, so that a misspelt one is an error and not an empty column."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Settings(Part):
    """What a run depends on; a resumed run must have the same."""

    models: list[str]
    text: str
    calibration: str
    last_word: str
    window: int
    stride: int
    tokens: int
    calibration_tokens: int
    methods: list[str] | None
    measures: list[str]
    needle_lengths: list[int]
    needle_depths: list[float]
    needle_repeats: int
    ruler_tasks: list[str] = []
    ruler_lengths: list[int] = []
    ruler_repeats: int = 0
    passages: int
    routing_windows: int
    queries: int
    dtype: str | None
    device: str
    seed: int


class Margin(Part):
    """Routing decisions whose margin (probability of the first key minus the second) is at least `above`."""

    above: float
    decisions: int
    flips: int


class DivergenceMeans(Part):
    """Of the next token's distribution from that with a 16-bit cache; see `divergence`. With standard errors."""

    tokens: int
    kl: float
    kl_error: float | None
    total_variation: float
    total_variation_error: float | None
    agreement: float
    agreement_error: float | None


class ContextDivergence(DivergenceMeans):
    """Of the tokens whose context is at most `up_to` tokens long, and above the class before."""

    up_to: int


class DivergenceSummary(DivergenceMeans):
    """Of all scored tokens."""

    kl_p99: float
    kl_p999: float
    by_context: list[ContextDivergence]


class RulerCell(Part):
    """Items of one of RULER's tasks and lengths.

    found: of all their `answers`. accuracy: mean over the items of the share found, with its standard error, which is
    the binomial one where an item has one answer. lost, gained: answers found with fp16 alone, and without it alone.
    """

    task: str
    length: int
    items: int
    answers: int
    found: int
    accuracy: float
    standard_error: float
    lost: int
    gained: int


class Row(Part):
    """One method on one model.

    budget: bits per dimension of the codes alone, on the side that is stored. bits_per_dim: of all that is kept for a
    sequence of one window, scales and constants included; vector_bits_per_dim: without the constants. dims: coordinates
    kept of a vector. perplexity_delta: against fp16, with its standard error. margin: perplexity of the best method of
    the other paradigm (rank and hybrids against quantization) at the same budget, minus the own; positive is better.
    """

    method: str
    family: str
    budget: float
    basis: str
    side: str
    dims: int
    bits_per_dim: float
    vector_bits_per_dim: float
    perplexity: float | None = None
    perplexity_delta: float | None = None
    perplexity_delta_error: float | None = None
    divergence: DivergenceSummary | None = None
    margin: float | None = None
    last_word_accuracy: float | None = None
    last_word_perplexity: float | None = None
    needle_accuracy: float | None = None
    needle: dict[str, float] | None = None
    ruler: list[RulerCell] | None = None
    flips: float | None = None
    flips_by_margin: list[Margin] | None = None
    attention_divergence: float | None = None


class LawLine(Part):
    """Mean KL, measured and predicted, over the points of one kind and number of bits (or kept dimensions)."""

    kind: str
    bits: int
    points: int
    measured: float
    predicted: float
    ratio: float
    published_ratio: float
    within_quarter: float  # share of the points whose ratio lies in 0.75 .. 1.25


class LawRatio(Part):
    """How much more dropping a direction costs than quantizing it: KL of projection / KL of quantization."""

    bits: int
    measured: float
    predicted: float  # 3 · 2^(2b) · (σ/R)²
    published: float  # 3 · 2^(2b)


class Law(Part):
    """The perturbation law; points are (kind, bits, predicted, measured)."""

    lines: list[LawLine]
    ratios: list[LawRatio]
    points: list[tuple[str, int, float, float]]


class Allocation(Part):
    """What `--budget` found: a format for every layer."""

    budget: float
    bits_per_dim: float
    formats: list[str]
    sensitivity: dict[str, list[float]]  # format -> per layer, divergence in nats a token that it alone costs
    perplexity: float
    best_uniform: str
    best_uniform_bits: float
    best_uniform_perplexity: float
    uniform: dict[str, float]
    search_tokens: int
    held_out_tokens: int


class Capacity(Part):
    """What a server says of its pool. kv_formats: of every layer, where they differ. baseline: the model's own dtype.

    None: a server that doesn't say it.
    """

    kv_formats: list[str] | None = None
    block_size: int | None = None
    block_bytes: int | None = None
    pool_bytes: int | None = None
    tokens: int | None = None
    baseline_tokens: int | None = None


class Through(Part):
    """What a running server gave on the same windows, beside the simulation of its format."""

    kv_format: str
    residual: bool = False  # whether the simulation has residuals
    perplexity: float
    simulated: float
    relative_difference: float
    standard_error: float | None = None  # of that, from how windows differ; None if there is one
    tokens: int
    needle_accuracy: float | None
    simulated_needle_accuracy: float | None
    ruler: list[RulerCell] | None = None
    simulated_ruler: list[RulerCell] | None = None
    capacity: Capacity | None = None


class ModelReport(Part):
    """Everything measured on one model."""

    model: str
    attention: str
    group: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    parameters: int
    dtype: str
    scored_tokens: int
    windows: int
    rows: list[Row]
    skipped: dict[str, str]
    law: Law | None = None
    allocation: Allocation | None = None
    through_server: list[Through] = []

    def row(self, method: str) -> Row | None:
        return next((row for row in self.rows if row.method == method), None)


class Report(Part):
    """`quality.json`."""

    schema_version: int = VERSION
    provenance: dict[str, Any]
    settings: Settings
    seconds: float
    published: dict[str, dict[str, Any]] = {}
    models: list[ModelReport]
