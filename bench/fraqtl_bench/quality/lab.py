"""Runs the measures on one model: calibrate, fit, check, then every window and item through every method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache, cached_property
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fraqtl_bench.quality import law, margins, selfcheck, tasks, texts
from fraqtl_bench.quality.cache import logits
from fraqtl_bench.quality.divergence import Divergence, compare, summarize
from fraqtl_bench.quality.fitted import Fitted, FittedLayer, fit
from fraqtl_bench.quality.methods import BASELINE, parse, standard_names
from fraqtl_bench.quality.models import Subject
from fraqtl_bench.quality.options import LEAST_CALIBRATION
from fraqtl_bench.quality.routing import MARGINS, Routing, measure_routing
from fraqtl_bench.quality.ruler.measure import items_for, measure_ruler
from fraqtl_bench.quality.ruler.question import Item as RulerItem
from fraqtl_bench.quality.ruler.replies import greedy
from fraqtl_bench.quality.schema import Margin, ModelReport, Row, Settings
from fraqtl_bench.quality.score import Score, compare_perplexity, perplexity, score, score_rows
from fraqtl_bench.quality.watch import calibration_samples
from fraqtl_bench.reporting.progress import Progress
from fraqtl_kernels.errors import ConfigError, FraqtlError


class Ticker:
    """Told of every unit of work; the command shows bars."""

    def expect(self, measure: str, units: int | None) -> None:
        """`units` of `measure` are to come, None: nobody knows how many."""

    def tick(self, measure: str, what: str) -> None:
        """One unit of `measure` is done."""


class WindowResult(NamedTuple):
    """Of one method on one test window. divergence: None for the 16-bit cache itself, or if it wasn't asked for."""

    score: Score
    divergence: Divergence | None


class Lab:
    """One model, its calibrated methods, and the notes of what is done."""

    def __init__(self, subject: Subject, settings: Settings, progress: Progress, ticker: Ticker) -> None:
        self.subject = subject
        self.settings = settings
        self.progress = progress
        self.ticker = ticker
        if settings.window > subject.max_length:
            raise ConfigError(f"window {settings.window} is above the {subject.max_length} tokens that the model takes")
        if "last-word" in settings.measures:  # before anything is measured, as is all that can be refused
            self.last_word_items  # noqa: B018
        if "needle" in settings.measures:
            self.needle_items  # noqa: B018
        if "ruler" in settings.measures:
            self.ruler_items  # noqa: B018
        self.skipped: dict[str, str] = {}
        gradients = any(parse(name).needs_gradient for name in settings.methods or ())
        self.samples = calibration_samples(subject.model, self.calibration_ids, gradients=gradients)
        self.methods = list(self._methods())
        selfcheck.check(subject, self.methods, self.samples, self.calibration_ids)

    def _methods(self) -> Iterator[Fitted]:
        """The methods asked for, fitted; of the standard set those that this head size allows."""
        asked, size = self.settings.methods, self.subject.head_size
        for name in asked or standard_names(size):
            method = parse(name, self.settings.seed)
            try:
                method.check(size)
                yield fit(method, self.samples)
            except FraqtlError as error:
                if asked:
                    raise
                self.skipped[name] = str(error)

    @cached_property
    def calibration_ids(self) -> tuple[int, ...]:
        """The first tokens of the calibration text; of a text that is also the test text, they are left out there."""
        s = self.settings
        ids = [*self.bos, *self._head(s.calibration, "calibration", s.calibration_tokens)]
        return tuple(ids[: s.calibration_tokens])

    @property
    def bos(self) -> list[int]:
        return texts.begins_with_bos(self.subject.tokenizer)

    def _stream(self, source: str, split: str) -> Iterator[int]:
        tokenizer = self.subject.tokenizer
        return texts.token_stream(tokenizer, texts.pieces(source, split, self.settings.seed, tokenizer))

    def _head(self, source: str, split: str, count: int) -> list[int]:
        found = [token for token, _ in zip(self._stream(source, split), range(count), strict=False)]
        if len(found) < LEAST_CALIBRATION:
            raise ConfigError(
                f"text {source!r} has {len(found)} tokens: give a longer one, calibration needs {LEAST_CALIBRATION}"
            )
        return found

    def windows(self, limit: int | None = None) -> Iterator[texts.Window]:
        """The test windows, each checked to stand apart from the calibration text."""
        s = self.settings
        stream = self._stream(s.text, "test")
        if s.text == s.calibration and s.text not in (texts.GENERATED, texts.WIKITEXT):
            for _ in zip(range(s.calibration_tokens), stream, strict=False):
                pass
        known = texts.shingles(self.calibration_ids)
        found = False
        for window in texts.windows(stream, s.window, s.stride, limit or s.tokens or None, self.bos):
            texts.check_apart(known, window)
            found = True
            yield window
        if not found:
            raise ConfigError(f"text {s.text!r} is too short: nothing is left of it after the calibration tokens")

    def scored(self, key: str, ids: tuple[int, ...], first: int, fitted: Fitted) -> Score:
        """A score from the notes, or measured now."""
        name = f"{self.subject.name}/{key}/{fitted.method.name}"
        model = self.subject.model
        return Score(**self.progress.get(name, lambda: asdict(score(model, ids, first, fitted.layers))))

    def measured_windows(self) -> dict[str, list[WindowResult]]:
        """Per method, what the settings ask for of every test window."""
        found: dict[str, list[WindowResult]] = defaultdict(list)
        s = self.settings
        at_most = 1 + (s.tokens - s.window) // s.stride if s.tokens >= s.window else 1
        self.ticker.expect("text", at_most * len(self.methods) if s.tokens else None)
        exact = next((f.layers for f in self.methods if f.method.name == BASELINE), None)
        for window in self.windows():
            reference = self._rows(window, exact)
            for fitted in self.methods:
                rows = reference if fitted.layers is exact else self._rows(window, fitted.layers)
                found[fitted.method.name].append(self._window(window, fitted, rows, reference))
                self.ticker.tick("text", fitted.method.name)
        return found

    def _rows(self, window: texts.Window, layers: Sequence[FittedLayer] | None) -> Callable[[], Tensor]:
        """Logits for the scored tokens of a window; computed when they are first asked for."""
        count = len(window.ids) - window.first
        return cache(lambda: logits(self.subject.model, window.ids[:-1], layers, count))

    def _window(
        self, window: texts.Window, fitted: Fitted, rows: Callable[[], Tensor], reference: Callable[[], Tensor]
    ) -> WindowResult:
        def scored() -> dict[str, Any]:
            found = rows()
            return asdict(score_rows(found, torch.tensor(list(window.ids[window.first :]), device=found.device)))

        name, method = self.subject.name, fitted.method.name
        result = Score(**self.progress.get(f"{name}/window {window.index}/{method}", scored))
        if "divergence" not in self.settings.measures or rows is reference:
            return WindowResult(result, None)
        compared = self.progress.get(
            f"{name}/divergence {window.index}/{method}", lambda: asdict(compare(rows(), reference(), window.first))
        )
        return WindowResult(result, Divergence(**compared))

    def answers(self, kind: str, items: list[tasks.Item]) -> dict[str, list[tuple[tasks.Item, Score]]]:
        found: dict[str, list[tuple[tasks.Item, Score]]] = defaultdict(list)
        self.ticker.expect(kind, len(items) * len(self.methods))
        for item in items:
            for fitted in self.methods:
                result = self.scored(f"{kind} {item.name}", item.ids, item.first, fitted)
                found[fitted.method.name].append((item, result))
                self.ticker.tick(kind, fitted.method.name)
        return found

    @cached_property
    def needle_items(self) -> list[tasks.Item]:
        s, tokenizer = self.settings, self.subject.tokenizer
        return self._fitting(
            "--needle-lengths",
            tasks.needle_items(tokenizer, s.needle_lengths, s.needle_depths, s.needle_repeats, s.seed),
        )

    @cached_property
    def ruler_items(self) -> list[RulerItem]:
        return items_for(self.subject, self.settings)

    def reply(self, item: RulerItem, fitted: Fitted, key: str = "") -> str:
        """A reply from the notes, or decoded now. key: what tells apart simulations with other constants."""
        name = f"{self.subject.name}/{key}ruler {item.name}/{fitted.method.name}"
        said = str(self.progress.get(name, lambda: greedy(self.subject, item, fitted.layers)))
        self.ticker.tick("ruler", f"{fitted.method.name}, {item.task}")
        return said

    @cached_property
    def last_word_items(self) -> list[tasks.Item]:
        s = self.settings
        generated = s.last_word == texts.GENERATED
        passages = tasks.generated_passages(s.seed) if generated else texts.lambada_passages(s.last_word)
        return self._fitting("--last-word", tasks.last_word_items(self.subject.tokenizer, passages, s.passages))

    def _fitting(self, option: str, items: list[tasks.Item]) -> list[tasks.Item]:
        """The items. Raises ConfigError if one is longer than the model takes."""
        longest, limit = max(items, key=lambda item: len(item.ids)), self.subject.max_length
        if len(longest.ids) > limit:
            raise ConfigError(
                f"{option}: {longest.name} has {len(longest.ids)} tokens, the model takes {limit}: give shorter ones"
            )
        return items

    def routing(self) -> dict[str, Routing]:
        """Summed over the first `routing_windows` windows, for methods that store keys."""
        methods = [f for f in self.methods if "k" in f.method.side]
        total = {f.method.name: Routing() for f in methods}
        for window, _ in zip(self.windows(), range(self.settings.routing_windows), strict=False):
            ids = window.ids

            def measure(ids: tuple[int, ...] = ids) -> dict[str, object]:
                found = measure_routing(self.subject.model, ids, methods, self.settings.queries)
                return {name: asdict(routing) for name, routing in found.items()}

            noted = self.progress.get(f"{self.subject.name}/routing {window.index}", measure)
            for name, routing in noted.items():
                total[name].add(Routing(**routing))
            self.ticker.tick("routing", f"window {window.index}")
        return total

    def law(self) -> list[law.Point]:
        """On the first window, in at most eight layers spread over the model."""
        count = self.subject.layers
        layers = sorted({round(i * (count - 1) / 7) for i in range(8)})
        window = next(self.windows())

        def measure() -> list[dict[str, object]]:
            points = law.law_points(self.subject.model, window.ids, self.settings.queries // 2, layers)
            return [asdict(point) for point in points]

        return [law.Point(**point) for point in self.progress.get(f"{self.subject.name}/law", measure)]

    def rows(self) -> dict[str, Row]:
        """A row per method, without results."""
        size, tokens = self.subject.head_size, self.settings.window
        return {
            f.method.name: Row(
                method=f.method.name,
                family=f.method.family,
                budget=f.method.budget(size),
                basis=f.method.basis,
                side=f.method.side,
                dims=f.method.dims or size,
                bits_per_dim=f.bits_per_dim(size, tokens),
                vector_bits_per_dim=f.vector_bits(size) / (2 * size),
            )
            for f in self.methods
        }

    def run(self) -> ModelReport:
        """All measures that the settings ask for."""
        measures, rows, found = self.settings.measures, self.rows(), self.subject
        tokens = windows = 0
        if "perplexity" in measures or "divergence" in measures:
            results = self.measured_windows()
            tokens, windows = add_windows(rows, results)
            margins.add_margins(list(rows.values()))
        if "last-word" in measures:
            for name, answers in self.answers("last word", self.last_word_items).items():
                rows[name].last_word_accuracy = fmean(s.right for _, s in answers)
                rows[name].last_word_perplexity = perplexity(s for _, s in answers)
        if "needle" in measures:
            for name, answers in self.answers("needle", self.needle_items).items():
                add_needle(rows[name], answers)
        if "ruler" in measures:
            self.ticker.expect("ruler", len(self.ruler_items) * len(self.methods))
            for name, own in measure_ruler(self.ruler_items, self.methods, self.reply).items():
                rows[name].ruler = own
        if "routing" in measures:
            for name, routing in self.routing().items():
                add_routing(rows[name], routing)
        return ModelReport(
            model=found.name,
            attention=found.attention,
            group=found.group,
            layers=found.layers,
            heads=found.heads,
            kv_heads=found.kv_heads,
            head_size=found.head_size,
            parameters=found.parameters,
            dtype=str(found.model.dtype).removeprefix("torch."),
            scored_tokens=tokens,
            windows=windows,
            rows=list(rows.values()),
            skipped=self.skipped,
            law=margins.summarize_law(self.law()) if "law" in measures else None,
        )


def add_windows(rows: dict[str, Row], results: dict[str, list[WindowResult]]) -> tuple[int, int]:
    """Perplexity and divergence of every method into its row. Returns how many tokens and windows were scored."""
    scores = {name: [result.score for result in found] for name, found in results.items()}
    for name, found in results.items():
        row = rows[name]
        row.perplexity = perplexity(scores[name])
        if BASELINE in scores:
            row.perplexity_delta, row.perplexity_delta_error = compare_perplexity(scores[name], scores[BASELINE])
        if divergences := [result.divergence for result in found if result.divergence is not None]:
            row.divergence = summarize(divergences)
    first = next(iter(scores.values()))
    return sum(s.tokens for s in first), len(first)


def add_needle(row: Row, answers: list[tuple[tasks.Item, Score]]) -> None:
    cells: dict[str, list[bool]] = defaultdict(list)
    for item, result in answers:
        cells[item.cell].append(result.right)
    row.needle_accuracy = fmean(result.right for _, result in answers)
    row.needle = {cell: fmean(right) for cell, right in cells.items()}


def add_routing(row: Row, routing: Routing) -> None:
    row.flips = routing.share
    row.attention_divergence = routing.mean_divergence
    bins = zip(MARGINS, routing.decisions, routing.flips, strict=True)
    row.flips_by_margin = [Margin(above=above, decisions=n, flips=flips) for above, n, flips in bins]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
