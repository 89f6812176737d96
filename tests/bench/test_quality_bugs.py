"""Bugs planted on purpose: each must end a run before it gives a number, or fail a comparison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fraqtl_bench.quality import cache, selfcheck, texts
from fraqtl_bench.quality.cache import LabCache
from fraqtl_bench.quality.fitted import fit
from fraqtl_bench.quality.grids import Kept, Symmetric
from fraqtl_bench.quality.methods import parse
from fraqtl_bench.quality.selfcheck import SelfCheckError, check
from fraqtl_bench.quality.watch import calibration_samples
from fraqtl_kernels.errors import ConfigError
from tests.bench.quality_models import demo, token_ids

NAMES = ("fp16", "int4-channel", "int4-token", "int3-channel@pca", "rank16x8", "k4v4", "k4v4-channel")
TEXT = token_ids(90, seed=4)


def run_checks() -> None:
    samples = calibration_samples(demo().model, TEXT)
    check(demo(), [fit(parse(name), samples) for name in NAMES], samples, TEXT)


def test_without_a_bug_the_checks_pass() -> None:
    run_checks()


def test_scales_along_the_wrong_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step per channel where one per token was meant, which looks much the same in a table."""
    right = Symmetric.encode

    def wrong(self: Symmetric, y: Tensor, constants: Kept) -> Kept:
        if self.scale == "channel":
            return right(self, y, constants)
        step = self._step(y, -2).mean(-1, keepdim=True).expand(y.shape[:-1]).contiguous()
        return {"codes": self._codes(y, step.float().unsqueeze(-1)), "step": step}

    monkeypatch.setattr(Symmetric, "encode", wrong)
    with pytest.raises(SelfCheckError, match=r"int4-token is off by .* half steps of its keys: its grid is wrong"):
        run_checks()


def test_one_step_for_all_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Symmetric, "fit", lambda self, y: {"step": self._step(y, -2).amax(-1, keepdim=True).expand(-1, y.shape[-1])}
    )
    with pytest.raises(SelfCheckError, match=r"its grid is wrong"):
        run_checks()


def test_more_kept_than_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Symmetric.encode

    def wrong(self: Symmetric, y: Tensor, constants: Kept) -> Kept:
        return right(self, y, constants) | {"minimum": y.amin(-1).to(torch.float16)}

    monkeypatch.setattr(Symmetric, "encode", wrong)
    with pytest.raises(SelfCheckError, match=r"int4-channel keeps .* bits of its keys but claims"):
        run_checks()


def test_rope_applied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that takes what it gets for keys before RoPE."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rotary = LlamaRotaryEmbedding(demo().model.config)

    class Twice(LabCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            positions = torch.arange(key_states.shape[2])[None]
            _, key_states = apply_rotary_pos_emb(key_states, key_states, *rotary(key_states, positions))
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    monkeypatch.setattr(cache, "LabCache", Twice)
    with pytest.raises(SelfCheckError, match=r"the model's logits are off by .*: the hook is wrong"):
        run_checks()


def test_a_hook_that_mixes_up_layers_or_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    class Swapped(LabCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            return super().update(value_states, key_states, layer_idx, *args, **kwargs)

    monkeypatch.setattr(cache, "LabCache", Swapped)
    with pytest.raises(SelfCheckError, match=r"the hook is wrong"):
        run_checks()


def test_calibration_on_the_text_that_is_measured() -> None:
    ids = token_ids(300)
    window = texts.Window(3, ids[100:228], 64)
    with pytest.raises(ConfigError, match=r"100% of window 3 stands in the calibration text too"):
        texts.check_apart(texts.shingles(ids), window)
    texts.check_apart(texts.shingles(token_ids(300, seed=1)), window)
    texts.check_apart(texts.shingles(ids[:135]), window)  # 35 tokens in common: 4 runs of 97


def test_a_grid_that_is_off_only_on_other_text_is_no_bug() -> None:
    """Static steps clip values that calibration never saw; the check is about the calibration text itself."""
    samples = calibration_samples(demo().model, TEXT)
    fitted = fit(parse("int4-channel"), samples)
    selfcheck.check_errors(fitted, samples)
    key = fitted.layers[0].key
    loud = 3 * samples[0].key[None].float()
    assert ((key.round_trip(loud) - loud).abs().amax(-2) > key.constants["step"].float()).any()


def test_steps_below_what_fp16_holds_are_no_bug() -> None:
    """Fewer tokens than dimensions: the last principal coordinates are next to nothing, and so are their steps."""
    samples = calibration_samples(demo().model, TEXT[:12])
    fitted = fit(parse("rank16x8"), samples)
    assert (fitted.layers[0].key.constants["step"] < 1e-5).any()
    selfcheck.check_errors(fitted, samples)
