"""`fraqtl-bench quantizer`: each piece of the ablation against values written out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fraqtl_bench import quantizer
from fraqtl_bench.cli import main
from fraqtl_bench.quantizer import capture, cases, measure, perplexity
from fraqtl_bench.quantizer.steps import STEPS, Step
from fraqtl_bench.quantizer.stored import Stored
from fraqtl_bench.quantizer.variants import (
    PLAIN,
    Constants,
    Variant,
    encode,
    key_variants,
    on_grid,
    store,
    tie_pairs,
    value_variants,
)
from fraqtl_kernels import reference
from fraqtl_kernels.calibration.solve import solve_transform
from fraqtl_kernels.formats import SCALE_CHOICES, get_format
from fraqtl_kernels.rotation import hadamard

POWERS = Variant("midpoint", "hadamard", "edge", "sinks", "powers")  # the best of those with a factor for each channel


@pytest.fixture
def x() -> Tensor:
    return torch.randn(50, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sample(tokens: int = 40, queries: int = 9, size: int = 64) -> cases.Sample:
    generator = torch.Generator().manual_seed(1)
    key, value, query = (
        torch.randn(n, size, generator=generator, dtype=torch.float64) for n in (tokens, tokens, queries)
    )
    return cases.Sample(key, value, query, cases.causal(tokens, queries))


def test_midpoint_grid_is_the_one_of_the_kernels(x: Tensor) -> None:
    x = torch.cat([x, torch.zeros_like(x[:1])])
    codes, scale = reference.quantize(x, get_format("k4v4").k)
    found = encode(x, "midpoint", 15 / 16)
    assert torch.equal(found.codes.to(torch.uint8), codes) and torch.equal(found.scale, scale)
    assert torch.equal(found.decode(), reference.dequantize(codes, scale, get_format("k4v4").k, torch.float64))


def test_grids_by_hand() -> None:
    x = torch.tensor([[-3.0, 0.0, 1.0, 7.0]])
    assert on_grid(x, "symmetric", "absmax").tolist() == x.tolist()  # step 1
    assert on_grid(torch.tensor([[7.5, 0.4, -6.6]]), "midpoint", "absmax").tolist() == [[7.5, 0.5, -6.5]]
    assert encode(torch.tensor([[8.0, -7.6, 0.1]]), "midpoint", 15 / 16).codes.tolist() == [[15, 0, 8]]  # step 1
    assert on_grid(torch.tensor([[8.0, -7.6, 0.1]]), "midpoint", "edge").tolist() == [[7.5, -7.5, 0.5]]


def test_asymmetric_grid_reproduces_minimum_and_maximum() -> None:
    x = torch.tensor([[-2.0, -0.9, 3.3, 5.5]])  # step 1/2
    found = encode(x, "asymmetric")
    assert found.minimum is not None and found.minimum.tolist() == [-2.0] and found.scale.tolist() == [0.5]
    assert found.codes.tolist() == [[0, 2, 11, 15]]
    assert found.decode().tolist() == [[-2.0, -1.0, 3.5, 5.5]]


def test_searched_scale_is_never_worse_than_any_of_its_candidates(x: Tensor) -> None:
    for grid in ("symmetric", "asymmetric", "midpoint"):
        best = (on_grid(x, grid, "mse") - x).norm(dim=-1)
        for factor in (1.0, 0.9375, 0.875, 0.75, 0.625):
            assert (best <= (encode(x, grid, factor).decode() - x).norm(dim=-1)).all()


def test_edge_scale_rounds_by_at_most_half_a_smaller_step(x: Tensor) -> None:
    for scale, steps in (("absmax", 15), ("edge", 16)):
        error = (on_grid(x, "midpoint", scale) - x).abs().amax(-1)
        assert (error <= x.abs().amax(-1) / steps * (1 + 1e-2)).all()


def test_bytes_count_scales_and_minima() -> None:
    assert POWERS.bytes_per_token(128) == get_format("k4v4").bytes_per_token(128) == 132
    assert POWERS.bytes_per_token(64) == get_format("k4v4").bytes_per_token(64) == 68
    calibrated = Variant("midpoint", "hadamard", "mse", "mean", "balanced")
    assert calibrated.bytes_per_token(128) == 132
    assert Variant("asymmetric", "none", "absmax").bytes_per_token(128) == 136
    assert measure.affordable(calibrated, 64) and not measure.affordable(Variant("asymmetric", "none", "mse"), 64)


def test_every_combination_is_there_once() -> None:
    assert len(set(key_variants())) == 3 * 2 * 4 * 3 * 4
    assert len(set(value_variants())) == 3 * 2 * 4
    assert {PLAIN, POWERS} <= set(key_variants()) and POWERS.values in set(value_variants())


def test_centering_leaves_softmax_unchanged() -> None:
    s = sample()
    constants = Constants.calibrate(s.key + 5, s.query, Variant("midpoint", "none", "absmax", "mean"))
    assert torch.allclose(constants.center, s.key.mean(0) + 5, atol=1e-14, rtol=0)
    centered = s.scores(constants.prepare_key(s.key)).softmax(-1)
    torch.testing.assert_close(centered, s.scores().softmax(-1), atol=1e-13, rtol=0)
    torch.testing.assert_close(constants.restore_key(constants.prepare_key(s.key)), s.key, atol=1e-13, rtol=0)


@pytest.mark.parametrize("smoothing", ["magnitude", "balanced", "powers"])
def test_smoothing_folded_into_the_query_leaves_scores_unchanged(smoothing: str) -> None:
    s = sample()
    s = replace(s, key=s.key * torch.arange(1, 65))
    constants = Constants.calibrate(s.key, s.query, Variant("midpoint", "none", "absmax", "none", smoothing))
    folded = replace(s, query=constants.prepare_query(s.query)).scores(constants.prepare_key(s.key))
    torch.testing.assert_close(folded, s.scores(), atol=1e-12, rtol=1e-12)


def test_smoothing_commutes_with_rope() -> None:
    s = sample()
    constants = Constants.calibrate(s.key, s.query, Variant("midpoint", "none", "absmax", "none", "magnitude"))
    positions = torch.arange(40).double()
    turned = cases.rope(constants.prepare_key(s.key), positions)
    torch.testing.assert_close(turned, constants.prepare_key(cases.rope(s.key, positions)), atol=1e-12, rtol=0)


def test_smoothing_by_hand() -> None:
    assert tie_pairs(torch.tensor([1.0, 2.0, 3.0, 6.0])).tolist() == [2.0, 4.0, 2.0, 4.0]
    key, query = torch.tensor([[4.0, 1.0, 4.0, 1.0]]), torch.tensor([[1.0, 4.0, 1.0, 4.0]])
    for smoothing, factor in (("magnitude", [4.0, 1.0]), ("balanced", [2.0, 0.5]), ("powers", [2.0, 0.5])):
        constants = Constants.calibrate(key, query, Variant("midpoint", "none", "absmax", "none", smoothing))
        assert constants.factor.tolist() == factor * 2


def test_rotation_leaves_scores_unchanged() -> None:
    s = sample()
    rotation = hadamard(64)
    turned = replace(s, query=s.query @ rotation).scores(s.key @ rotation)
    torch.testing.assert_close(turned, s.scores(), atol=1e-13, rtol=0)


def test_rope_turns_pairs_and_keeps_their_size() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
    found = cases.rope(x, torch.tensor([math.pi / 2]).double(), theta=1e4)
    slow = math.pi / 200
    expected = torch.tensor([[0.0, -2 * math.sin(slow), 1.0, 2 * math.cos(slow)]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def test_measures_of_exact_keys_are_zero_and_of_wrong_ones_by_hand() -> None:
    s = sample()
    weights = s.scores().softmax(-1)
    assert measure.flips(s, s.key) == 0
    assert measure.relative_error(s.key, s.key) == 0
    assert measure.output_error(s, weights, s.key, s.value) == 0
    assert measure.output_error(s, weights, s.key, s.value * 1.5) == pytest.approx(0.5)
    wrong = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    right = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert measure.relative_error(wrong, right) == pytest.approx(math.sqrt((4 / 3) ** 2 / 2))
    assert measure.flips(s, -s.key) == 1


def test_causal_mask() -> None:
    assert cases.causal(4, 2).tolist() == [[True, True, True, False], [True] * 4]


@pytest.mark.parametrize("times", [0.0, 30.0])
def test_stored_as_the_shipped_format_stores_it(times: float) -> None:
    head = cases.synthetic_head(64, cases.outliers(2, 16, hidden=False), times, seed=2)
    key, value = measure.as_shipped(head, get_format("k4v4"))
    own_key, own_value = measure.through_step(head, Step(solve_transform, SCALE_CHOICES[4]))
    # fp32 in both, summed in another order: a value on the edge of two codes may fall to the other side.
    assert torch.isclose(own_key, key, atol=1e-4, rtol=1e-4).all(-1).double().mean() > 0.97
    assert torch.isclose(own_value, value, atol=1e-4, rtol=1e-4).all(-1).double().mean() > 0.97


def test_every_step_loses_less_than_the_one_before() -> None:
    """On keys and values whose dimensions go together, as those of models do."""
    head = cases.synthetic_head(64, cases.benign, 0, seed=9)
    mixing = torch.randn(64, 64, generator=torch.Generator().manual_seed(9)) @ torch.diag(torch.logspace(0.7, -0.7, 64))

    def mixed(s: cases.Sample) -> cases.Sample:
        return replace(s, value=s.value @ mixing.T)

    case = cases.Case("mixed", 64, (cases.Head(mixed(head.calibration), mixed(head.measured)),), "mixed")
    found = measure.measure_case(case)
    errors = [found.values[POWERS.values][0], *(found.step_v_errors[name] for name in STEPS), found.shipped_v_error]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.75 * errors[0]


def test_the_second_center_repairs_sinks() -> None:
    head = cases.synthetic_head(64, cases.benign, 30, seed=3)
    errors = {}
    for centering in ("mean", "sinks"):
        variant = replace(POWERS, centering=centering)
        constants = Constants.calibrate(head.calibration.key, head.calibration.query, variant)
        stored = store(head.measured.key, variant, constants)
        errors[centering] = (stored - head.measured.key)[: cases.SINKS].norm().item()
    assert errors["sinks"] < 0.1 * errors["mean"]


def test_synthetic_cases_are_what_they_say() -> None:
    head = cases.synthetic_head(64, cases.outliers(1, 30, hidden=True), 0, seed=3)
    assert cases.attended_keys(head.measured) == pytest.approx(cases.ATTENDED_KEYS, rel=1e-2)
    size = tie_pairs(head.measured.key.square().mean(0))[:32].sqrt()
    assert (size > 15).sum() == 1 and size.argmax() == tie_pairs(head.calibration.key.square().mean(0))[:32].argmax()
    query = tie_pairs(head.measured.query.square().mean(0))[:32]
    assert query.argmin() == size.argmax()
    sinks = cases.synthetic_head(64, cases.benign, 30, seed=3).measured
    norms = sinks.key.norm(dim=-1)
    assert norms[: cases.SINKS].min() > 20 * norms[cases.SINKS :].mean()
    again = cases.synthetic_head(64, cases.benign, 30, seed=3).measured
    assert torch.equal(again.key, sinks.key) and torch.equal(again.query, sinks.query)


def test_heavy_tails_have_variance_one_and_far_extremes() -> None:
    measured = cases.synthetic_head(128, cases.tails, 0, seed=5).measured
    assert measured.value.var().item() == pytest.approx(1, rel=0.3)
    assert measured.value.abs().max() > 10


def test_held_out_centering_repairs_a_key_bias() -> None:
    case = cases.Case("bias", 64, (cases.synthetic_head(64, cases.bias, 0, seed=7),), "bias")
    found = measure.measure_case(case)
    plain = found.keys[Variant("midpoint", "hadamard", "edge")]
    assert found.keys[POWERS].output_error == pytest.approx(found.shipped.output_error, rel=0.15)
    assert found.shipped.output_error < 0.5 * plain.output_error
    assert measure.affordable(found.best(calibrated=True), 64) and not found.best(calibrated=False).is_calibrated


def test_command_writes_every_combination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "TOKENS", 300)
    gaussian = cases.Case("gaussian, D=64", 64, (cases.synthetic_head(64, cases.benign, 0, seed=1),), "gaussian")
    model = replace(gaussian, name="model", family="model")
    monkeypatch.setattr(quantizer, "synthetic_cases", lambda sizes, seed: [gaussian])
    monkeypatch.setattr(quantizer, "model_case", lambda path, seed: model)
    row = {"perplexity": 5.0, "increase": 0.0, "standard_error": 0.0, "divergence": 0.0, "tokens": 9}
    monkeypatch.setattr(quantizer, "measure_perplexity", lambda path, seed: {"float32": row})
    out = tmp_path / "quantiser.json"
    main(["quantizer", "--threads", str(torch.get_num_threads()), "--out", str(out)])
    found = json.loads(out.read_text())
    assert set(found["quantiser"]) == {"gaussian, D=64", "model"}
    case = found["quantiser"]["gaussian, D=64"]
    assert len(case["keys"]) == 288 and len(case["values"]) == 24
    assert len(case["shipped"]) == len(found["columns"]["shipped"])
    assert found["overall"]["k4v4"]["all"] == dict.fromkeys(found["overall"]["k4v4"]["all"], 1.0)
    assert found["bytes"][POWERS.name] == {"64": 68, "128": 132}


def test_captured_keys_are_those_of_the_cache() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    ids = torch.randint(50, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    layers = capture.capture(model, ids)
    assert len(layers) == 2
    for (query, key, value), cached in zip(layers, cache.layers, strict=True):
        assert query.shape == (4, 300, 16)
        torch.testing.assert_close(key, cached.keys[0])
        torch.testing.assert_close(value, cached.values[0])
    found = capture.samples(layers)
    assert len(found) == 4 and torch.equal(found[3].key, layers[1][1][1])
    assert torch.equal(found[3].query[cases.QUERIES :], layers[1][0][3, -cases.QUERIES :])
    assert found[3].seen.sum(-1)[[0, 255, 256]].tolist() == [45, 300, 45]


def test_demo_model_is_found() -> None:
    assert (capture.demo_model() / "config.json").is_file()


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["quantizer", "--model", str(tmp_path)])
    assert ended.value.code == 2 and "no config.json there" in capsys.readouterr().err


def test_perplexity_of_stored_keys() -> None:
    """A small random model: raw formats change nothing, all others a little, and the storage of a layer is its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 64, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).eval()
    ids = torch.randint(50, (60,)).tolist()
    prompt = capture.Passes.joined([capture.capture(model, ids)], capture.output_projections(model))
    found = perplexity.storages(prompt, prompt)
    exact = perplexity.log_probabilities(model, ids, None)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    torch.testing.assert_close(exact, logits.log_softmax(-1))
    losses = {name: perplexity.Losses() for name in ("exact", *found)}
    losses["exact"].add(ids, exact, exact)
    for name, storage in found.items():
        losses[name].add(ids, exact, perplexity.log_probabilities(model, ids, storage))
    by_hand = -exact.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    assert losses["exact"].loss == pytest.approx([by_hand], rel=1e-5) and losses["exact"].divergence == [0]
    changes = {name: rows.divergence[0] for name, rows in losses.items()}
    assert 0 < changes["k8v8"] < changes["k4v4"] < changes["k4v2"]
    assert changes["k4v4"] < changes[perplexity.WITHOUT_RESIDUAL]
    assert set(found) >= {"bf16", "k4v4-channel", perplexity.PLAIN_NAME, perplexity.UNCALIBRATED}
    layers: list[int] = []

    def spy(layer: int, key: Tensor, value: Tensor) -> Stored:
        layers.append(layer)
        assert key.shape == value.shape == (60, 2, 64)
        return Stored(key, value)

    torch.testing.assert_close(perplexity.log_probabilities(model, ids, spy), exact)
    assert layers == [0, 1]


def test_increase_divergence_and_their_error_by_hand() -> None:
    exact, found = perplexity.Losses([2.0, 6.0], [0.0, 0.0]), perplexity.Losses([2.4, 7.0], [0.5, 1.0])
    row = found.row(exact, [2, 4])
    assert row["perplexity"] == pytest.approx(math.exp(9.4 / 6)) and row["tokens"] == 6
    assert row["increase"] == pytest.approx(math.exp(1.4 / 6) - 1) and row["divergence"] == pytest.approx(0.25)
    assert row["standard_error"] == pytest.approx(
        0.025
    )  # differences of 0.2 and 0.25 a token: their deviation / sqrt(2)
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    losses = perplexity.Losses()
    losses.add([0, 1, 0], p.log(), torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log())
    assert losses.loss == pytest.approx([-math.log(0.75) - math.log(0.25)])
    assert losses.divergence == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3)])


def test_the_prompt_of_servers_is_captured_at_its_positions() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = capture.demo_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = capture.capture_prompt(model, AutoTokenizer.from_pretrained(path))
    assert [x.shape for x in found.layers[0]] == [(4, 2048, 64), (2, 2048, 64), (2, 2048, 64)] and found.count == 4
    joined = capture.Passes.joined([found.layers, found.layers], found.projections)
    assert torch.equal(joined.layers[3][1][:, 2048:], found.layers[3][1]) and joined.count == 2
    sample = capture.calibration_samples(found)[3]  # layer 1, KV head 1
    assert torch.equal(sample.key, found.layers[1][1][1]) and sample.query.shape == (4096, 64)
    assert torch.equal(sample.query[2048:], found.layers[1][0][3])
    key, query, value, importance = sample.by_head
    assert importance is not None and importance.query.shape == query.shape[:2]
    assert importance.value.shape == value.shape[:2] == key.shape[:2]
    matrix = model.model.layers[1].self_attn.o_proj.weight.detach().T.unflatten(0, (4, 64))
    torch.testing.assert_close(found.projections[1], matrix @ matrix.mT, rtol=1e-4, atol=1e-4)
    assert importance.direction is not None and importance.direction.shape == (1, 64, 64)
