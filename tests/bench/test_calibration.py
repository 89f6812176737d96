"""`fraqtl-bench calibration`: the prompt as servers see it, scores at both places, and its figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fraqtl_bench import calibration
from fraqtl_bench.cli import main
from fraqtl_kernels.calibration.prompt import SEQUENCES, positions, texts_in_tokens, token_rows
from tests.bench.quality_models import demo


def test_the_prompt_is_seen_as_a_server_sees_it() -> None:
    """Against a cache that grows token by token, where nothing can be taken for the beginning of another text."""
    subject = demo()
    found = calibration.prompt_samples(subject, 4 * 64, 4096)
    places = positions(4096, 64)
    rows = token_rows(texts_in_tokens(subject.tokenizer), 64, subject.tokenizer.bos_token_id)
    assert places[3].diff().max() > 500 and len(found) == subject.layers
    cache = None
    with torch.inference_mode():
        for token, place in zip(rows[3], places[3], strict=True):
            ids = torch.tensor([[token]])
            cache = subject.model(ids, position_ids=place.view(1, 1), past_key_values=cache, use_cache=True)
            cache = cache.past_key_values
    for layer, sample in zip(cache.layers, found, strict=True):
        assert sample.key.shape == (subject.kv_heads, SEQUENCES * 64, subject.head_size)
        torch.testing.assert_close(sample.key[:, -64:], layer.keys[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(sample.value[:, -64:], layer.values[0], rtol=1e-3, atol=1e-3)
        assert sample.importance is not None and sample.importance.direction is not None


def test_far_positions_begin_at_zero_and_end_with_the_context() -> None:
    found = calibration.far(200, 4096)
    assert found[:64].tolist() == list(range(64)) and found[64:].tolist() == list(range(4096 - 136, 4096))
    assert calibration.far(10, 4096).tolist() == list(range(10))


def test_figures_of_two_distributions() -> None:
    exact, found = torch.randn(300, 20), torch.randn(300, 20)
    targets = torch.randint(20, (300,))
    losses = calibration.Losses()
    for part in (slice(0, 130), slice(130, 300)):
        losses.add(targets[part], exact[part], found[part])
    row = losses.row()
    own, other = (torch.distributions.Categorical(logits=x.double()) for x in (exact, found))
    assert row["divergence"] == pytest.approx(torch.distributions.kl_divergence(own, other).mean().item(), rel=1e-5)
    differences = own.log_prob(targets) - other.log_prob(targets)
    assert row["perplexity"] == pytest.approx(math.exp(-other.log_prob(targets).mean()), rel=1e-5)
    assert row["increase"] == pytest.approx(math.expm1(differences.mean()), rel=1e-5)
    assert row["standard_error"] == pytest.approx(differences.std(correction=0).item() / math.sqrt(300), rel=1e-4)


def test_a_run_on_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = tmp_path / "found.json", tmp_path / "text.txt"
    text.write_text("The harbour lay quiet, and twelve boats had come back before the light went out.\n" * 30)
    main(["calibration", "demo", "--text", str(text), "--tokens", "300", "--window", "200", "--threads", "1",
          "--prompt-tokens", "64", "512", "--out", str(out)])  # fmt: skip
    assert "near: PPL" in capsys.readouterr().out
    written = json.loads(out.read_text())
    rows = written["prompt_tokens"]
    assert rows.keys() == {"near", "far"}
    for by_method in rows.values():
        assert by_method.keys() == {"fp16", "64", "512"}
        assert by_method["fp16"]["divergence"] == 0 and by_method["fp16"]["tokens"] == 300  # behind a BOS
        assert 0 < by_method["512"]["divergence"] < by_method["64"]["divergence"]
    assert rows["near"]["fp16"]["perplexity"] != rows["far"]["fp16"]["perplexity"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt-tokens", "3"], "--prompt-tokens 3 is too few: give 4 or more"),
        (["--context", "99999999"], "--context 99999999 is not possible: give 1024"),
        (["--kv-format", "int3-row"], "unknown method 'int3-row'"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["calibration", "demo", *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err
