"""The quality lab's hook, texts and measures, each against something worked out another way."""

from __future__ import annotations

import itertools
import json
import math
import random
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from fraqtl_bench.quality import budget, lab, law, margins, models, routing, tasks, texts, verdict
from fraqtl_bench.quality.cache import LabCache, logits
from fraqtl_bench.quality.fitted import fit
from fraqtl_bench.quality.methods import parse
from fraqtl_bench.quality.schema import ModelReport, Row
from fraqtl_bench.quality.score import Score, perplexity, score
from fraqtl_bench.quality.watch import Seen, calibration_samples, watching
from fraqtl_bench.reporting.progress import Progress
from fraqtl_kernels.errors import ConfigError, UnsupportedError
from tests.bench.quality_models import (
    ARCHITECTURES,
    chat_ids,
    config,
    demo,
    random_model,
    random_subject,
    token_ids,
    tokenizer,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_is_scored_as_the_model_itself_says(kind: str) -> None:
    subject, ids = random_subject(kind), token_ids(60)
    plain = subject.model(torch.tensor([ids]), use_cache=False, labels=torch.tensor([ids])).loss.item()
    assert math.log(score(subject.model, ids, 1, None).perplexity) == pytest.approx(plain, rel=1e-4)
    samples = calibration_samples(subject.model, token_ids(80, seed=1))
    assert len(samples) == subject.layers == 2
    losses = {}
    for name in ("fp16", "int8-channel", "rank2", "k4v4"):
        losses[name] = math.log(score(subject.model, ids, 1, fit(parse(name), samples).layers).perplexity)
    assert losses["fp16"] == pytest.approx(plain, rel=1e-3)
    assert abs(losses["int8-channel"] - plain) < abs(losses["rank2"] - plain)
    assert losses["k4v4"] != losses["fp16"]


def test_what_subjects_say_of_their_attention() -> None:
    found = {kind: random_subject(kind) for kind in ARCHITECTURES}
    assert {kind: (s.attention, s.group) for kind, s in found.items()} == {
        "gpt2": ("MHA", 1), "llama": ("GQA", 2), "mistral": ("GQA", 2), "qwen2": ("GQA", 2), "gemma": ("MQA", 4),
        "gemma2": ("GQA", 2),
    }  # fmt: skip
    assert {s.head_size for s in found.values()} == {64}
    assert found["gpt2"].max_length == 512


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_one_pass_attends_what_decoding_token_by_token_would(kind: str) -> None:
    ids = token_ids(50)
    model = deepcopy(random_model(kind)).double()  # or a code next to its rounding threshold may fall on either side
    layers = fit(parse("int4-token@hadamard"), calibration_samples(model, token_ids(64, seed=1))).layers
    whole = logits(model, ids, layers, len(ids))
    cache = LabCache(model.config, layers)
    with torch.inference_mode():
        steps = [model(torch.tensor([[i]]), past_key_values=cache, use_cache=True).logits[0, -1] for i in ids]
        exact = model(torch.tensor([ids])).logits[0]
    off = (torch.stack(steps) - whole).norm() / whole.norm()
    assert off < 1e-5 and (whole - exact).norm() / exact.norm() > 1e-2


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_calibration_weighs_as_the_models_own_attention_does(kind: str) -> None:
    """Windows, soft-caps and scales included; and the output projection, which every kind keeps in its own way."""
    model, seen = random_model(kind), []
    with watching(model, seen.append), torch.inference_mode():
        model(torch.tensor([token_ids(64)]), use_cache=False)
    for layer in seen:
        importance = layer.sample().importance
        heads, size = layer.key.shape[0], layer.key.shape[-1]
        weights = layer.scores(torch.arange(64)).softmax(-1).unflatten(0, (heads, -1))  # (KV heads, group, T, T)
        squares = weights.square().sum(2)
        torch.testing.assert_close(importance.value, squares.sum(1).T, rtol=1e-4, atol=1e-5)
        matrix = layer.module.c_proj.weight if kind == "gpt2" else layer.module.o_proj.weight.T
        rows = matrix.detach().unflatten(0, (heads, -1, size))
        expected = torch.einsum("hg,hgim,hgjm->hij", squares.sum(-1), rows, rows)
        torch.testing.assert_close(importance.direction, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["mla", "mamba", "jamba", "t5"])
def test_models_without_a_standard_cache_are_refused_in_a_sentence(kind: str) -> None:
    name = {"mla": "deepseek_v3"}.get(kind, kind)
    wanted = {"mla": "caches a latent", "t5": "is an encoder-decoder"}.get(kind, "keeps a recurrent state")
    with pytest.raises(UnsupportedError, match=rf"model type '{name}' {wanted}.*GPT-2, Llama"):
        models.check_supported(config(name))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2"])
def test_what_is_watched_explains_the_output(kind: str) -> None:
    """Attention computed from what the lab sees is what the model's own attention gives."""
    model, ids = random_model(kind), token_ids(40)
    seen: list[Seen] = []
    with torch.inference_mode():
        plain = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        with watching(model, seen.append):
            watched = model(torch.tensor([ids]), use_cache=False)
        cache = DynamicCache()
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    assert torch.allclose(plain.logits, watched.logits, atol=1e-3)
    assert [s.layer for s in seen] == [0, 1]
    for layer, own in zip(cache.layers, seen, strict=True):
        assert torch.allclose(layer.keys[0], own.key, atol=1e-4)
    rows = torch.arange(40)
    weights = seen[0].scores(rows).softmax(-1)
    assert torch.allclose(weights.triu(1), torch.zeros_like(weights), atol=1e-6)
    if kind == "mistral":  # a window of 24
        assert float(weights[:, 39, :16].sum()) == 0.0
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40, 41])
@pytest.mark.parametrize("stride", [16, 8, 5, 1])
@pytest.mark.parametrize("bos", [[], [999]])
def test_windows_score_every_token_once(count: int, stride: int, bos: list[int]) -> None:
    found = list(texts.windows(range(count), 16, stride, None, bos))
    scored = [i for w in found for i in w.ids[w.first :]]
    assert scored == list(range(0 if bos else 1, count))
    for w in found:
        assert len(w.ids) <= 16 and list(w.ids[: len(bos)]) == bos
        own = list(w.ids[len(bos) :])
        assert own == list(range(own[0], own[0] + len(own)))
        if w.index:
            assert w.first > 0 and len(w.ids) - w.scored >= min(16 - stride, len(w.ids) - 1)


def test_windows_end_at_the_limit_and_hold_no_more_than_one() -> None:
    pulled = 0

    def endless() -> itertools.count[int]:
        nonlocal pulled
        for i in itertools.count():
            pulled += 1
            yield i  # type: ignore[misc]

    stream = texts.windows(endless(), 16, 8, 30, [])
    next(stream)
    assert pulled == 16
    next(stream)
    assert pulled == 24
    assert sum(w.scored for w in stream) + 15 + 8 <= 30
    with pytest.raises(ConfigError, match="stride 17 is not possible with windows of 16 tokens: give 1 to 16"):
        next(texts.windows(range(9), 16, 17, None, []))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    contents = {"empty": b"", "blank": b" \n\n", "binary": b"abc\0def", "latin": "café".encode("latin-1")}
    says = {"empty": "is empty", "blank": "is empty", "binary": "is a binary file", "latin": "is not UTF-8"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=says[name]):
            list(texts.file_pieces(tmp_path / name))
    with pytest.raises(ConfigError, match="was not found"):
        list(texts.file_pieces(tmp_path / "none"))


def test_files_come_in_pieces_that_end_with_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE_CHARACTERS", 50)
    text = "".join(f"line {i} of some length\n" for i in range(20))
    (tmp_path / "t").write_text(text)
    found = list(texts.file_pieces(tmp_path / "t"))
    assert "".join(found) == text and len(found) > 3 and all(piece.endswith("\n") for piece in found)


def test_generated_text_depends_on_seed_and_split_only() -> None:
    def first(split: str, seed: int) -> list[str]:
        return list(itertools.islice(texts.generated_documents(tokenizer(), split, seed), 3))

    assert first("test", 1) == first("test", 1)
    assert first("test", 1) != first("test", 2)
    assert not {*texts._prose("test")} & {*texts._prose("calibration")}
    assert "<|assistant|>The code for" in first("test", 1)[0]


def test_answers_begin_where_the_answer_begins() -> None:
    items = tasks.needle_items(tokenizer(), [200], [0.0, 1.0], 2, seed=0)
    items += tasks.last_word_items(tokenizer(), tasks.generated_passages(0), 5)
    items += tasks.last_word_items(tokenizer(), ["one two three"], 5)
    for found in items:
        answer = tokenizer().decode(list(found.ids[found.first :]))
        prompt = tokenizer().decode(list(found.ids[: found.first]))
        assert found.ids[0] == tokenizer().bos_token_id and found.ids.count(found.ids[0]) == 1
        assert answer.strip() and not answer.strip().count(" ")
        if found.cell != "all":
            name = prompt.rpartition("The code for ")[2].split()[0]
            assert prompt.count(f"The code for {name} is {answer.strip()}.") == 1
            where = prompt.index(f"The code for {name} is {answer.strip()}.") / len(prompt)
            assert where < 0.2 if "depth 0%" in found.cell else where > 0.7
            assert 150 < len(found.ids) <= 200
    assert tokenizer().decode(list(items[-1].ids[items[-1].first :])).strip() == "three"


def test_the_demo_model_does_the_tasks_and_loses_them_without_its_keys() -> None:
    subject = demo()
    items = tasks.needle_items(subject.tokenizer, [200], [0.0, 0.5, 1.0], 2, seed=0)
    samples = calibration_samples(subject.model, token_ids(100))
    right = {
        name: sum(score(subject.model, i.ids, i.first, fit(parse(name), samples).layers).right for i in items)
        for name in ("fp16", "rank1")
    }
    assert right["fp16"] >= 5 and right["rank1"] == 0
    found = items[0]
    with torch.inference_mode():
        said = subject.model.generate(
            torch.tensor([found.ids[: found.first]]), max_new_tokens=len(found.ids) - found.first, do_sample=False
        )
    assert score(subject.model, found.ids, found.first, None).right == (said[0].tolist() == list(found.ids))


def test_flips_and_divergence_by_hand() -> None:
    exact = torch.tensor([[[2.0, 1.0, -100.0], [1.0, 1.001, -100.0]]])
    stored = torch.tensor([[[2.0, 1.5, -100.0], [1.0, 0.9, -100.0]]])
    found = routing.compare(exact, stored)
    assert found.decisions == [1, 0, 0, 1, 0] and found.flips == [1, 0, 0, 0, 0]
    assert found.share == 0.5
    p, q = exact[0].softmax(-1), stored[0].softmax(-1)
    assert found.divergence == pytest.approx(float((p * (p / q).log()).nan_to_num(0).sum()), rel=1e-5)


def test_masked_keys_take_no_part_in_the_divergence() -> None:
    exact = torch.tensor([[0.0, 1.0, -math.inf]])
    assert routing.divergence(exact, exact + torch.tensor([0.5, 0.0, 3.0])).isfinite().all()
    assert float(routing.divergence(exact, exact)) == 0.0


def test_exact_keys_flip_nothing_and_noise_does() -> None:
    subject = demo()
    samples = calibration_samples(subject.model, token_ids(100, seed=2))
    methods = [fit(parse(name), samples) for name in ("int8-channel", "int2-channel", "rank8")]
    found = routing.measure_routing(subject.model, token_ids(120, seed=3), methods, 16)
    assert sum(found["rank8"].decisions) == 4 * 4 * 16
    assert found["int8-channel"].share < found["int2-channel"].share
    assert found["int8-channel"].divergence < found["rank8"].divergence


def law_head(noise: float) -> law._Head:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(400, 16, generator=generator)
    query = torch.randn(2, 30, 16, generator=generator) * noise
    scores = query @ key.T
    return law._Head(0, 0, scores, query, key, 1 - scores.softmax(-1).square().sum(-1))


def test_the_law_holds_for_independent_keys_and_small_changes() -> None:
    points = list(law.points_of(law_head(0.3)))
    assert len(points) == 4 * (1 + len(law.BITS)) + len(law.BITS) + 4
    for point in points:
        if point.kind == law.PROJECTION or (point.kind in (law.QUANTIZATION, law.CHANNELS) and point.bits >= 4):
            assert point.measured / point.predicted == pytest.approx(1, abs=0.2), point
    ratio = next(p.measured for p in points if p.kind == law.PROJECTION) / next(
        p.measured for p in points if p.kind == law.QUANTIZATION and p.bits == 4
    )
    largest = points[0].predicted / next(p.published for p in points if p.bits == 4)
    assert largest == pytest.approx(3 * 4**4)  # the published factor is the one with σ for R
    assert ratio < largest


def test_the_law_fails_for_large_changes() -> None:
    first = next(law.points_of(law_head(8.0)))
    assert not 0.5 < first.measured / first.predicted < 2


def test_the_law_holds_on_the_attention_of_the_demo_model() -> None:
    found = margins.summarize_law(law.law_points(demo().model, chat_ids(256), 48, range(4)))
    for line in found.lines:
        if line.kind in (law.QUANTIZATION, law.CHANNELS) and line.bits >= 4:
            assert 0.75 < line.ratio < 1.25, line
    dropped = next(line for line in found.lines if line.kind == law.PROJECTION)
    assert dropped.predicted > 0.05 and dropped.ratio < 0.75  # too large a change for second order
    assert [r.published for r in found.ratios] == [3.0 * 4**b for b in law.BITS]
    assert all(r.measured < r.predicted < r.published for r in found.ratios)


def rows(*given: tuple[str, str, float, float]) -> list[Row]:
    fixed = {"basis": "identity", "side": "kv", "dims": 1, "bits_per_dim": 1.0, "vector_bits_per_dim": 1.0}
    return [Row(method=m, family=f, budget=b, perplexity=p, **fixed) for m, f, b, p in given]  # type: ignore[arg-type]


def test_margins_are_against_the_best_of_the_other_paradigm_at_the_same_budget() -> None:
    found = rows(
        ("a", "quantisation", 4, 10.0), ("b", "quantisation", 4, 11.0), ("c", "rank", 4, 50.0),
        ("d", "hybrid", 4, 20.0), ("e", "rank", 2, 90.0), ("f", "baseline", 16, 9.0), ("g", "server", 4, 1.0),
    )  # fmt: skip
    margins.add_margins(found)
    assert [row.margin for row in found] == [10.0, 9.0, -40.0, -10.0, None, None, None]


def test_a_duel_is_between_the_best_of_either_paradigm() -> None:
    found = rows(("a", "quantisation", 4, 10.0), ("b", "quantisation", 4, 11.0), ("c", "rank", 4, 50.0))
    found += rows(("d", "hybrid", 4, 20.0), ("e", "rank", 2, 90.0), ("b@pca", "quantisation", 4, 10.5))
    found[0].flips, found[3].flips, found[0].needle_accuracy, found[3].needle_accuracy = 0.1, 0.05, 1.0, 1.0
    about = {"model": "m", "attention": "MHA", "group": 1, "layers": 1, "heads": 1, "kv_heads": 1, "head_size": 64}
    model = ModelReport(**about, parameters=1, dtype="float32", scored_tokens=1, windows=1, rows=found, skipped={})
    (duel,) = verdict.duels(model)
    assert (duel.precision.method, duel.deletion.method, duel.margin) == ("a", "d", 10.0)
    assert duel.wins() == {"perplexity": True, "needle": None, "flips": False}
    assert verdict.spreads(model) == {"b": 0.5}


def test_allocation_is_the_best_of_all() -> None:
    rng = random.Random(0)
    size = {"a": 5, "b": 3, "c": 2}
    for _ in range(20):
        loss = {name: [rng.random() for _ in range(4)] for name in size}
        limit = rng.randrange(8, 20)
        every = [c for c in itertools.product(size, repeat=4) if sum(size[n] for n in c) <= limit]
        best = min(every, key=lambda c: sum(loss[n][i] for i, n in enumerate(c)))
        assert budget.allocate(loss, size, limit) == list(best)
    with pytest.raises(ConfigError, match="below c, the smallest format"):
        budget.allocate(loss, size, 7)


def test_perplexity_is_of_all_tokens_together() -> None:
    assert perplexity([Score(2.0, 2, True), Score(4.0, 1, False)]) == pytest.approx(math.exp(2.0))
    assert perplexity([Score(1e6, 1, False)]) == math.inf


def test_notes_survive_a_cut_line_and_refuse_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    notes = Progress(path, {"seed": 0}, resume=False)
    assert notes.get("a", lambda: [1, 2]) == [1, 2]
    notes.get("b", lambda: 0.1)
    with path.open("a") as file:
        file.write('["c", {"half')
    with pytest.raises(ConfigError, match="holds an unfinished run: go on with --resume"):
        Progress(path, {"seed": 0}, resume=False)
    with pytest.raises(ConfigError, match="another seed: resume with the same settings"):
        Progress(path, {"seed": 1}, resume=True)
    again = Progress(path, {"seed": 0}, resume=True)
    assert again.done == {"a": [1, 2], "b": 0.1}
    again.get("c", lambda: 3)
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [["a", [1, 2]], ["b", 0.1], ["c", 3]]


def test_memory_that_runs_out_is_known() -> None:
    assert lab.out_of_memory(torch.OutOfMemoryError()) and lab.out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert lab.out_of_memory(error.value)
    assert not lab.out_of_memory(RuntimeError("shapes differ"))
