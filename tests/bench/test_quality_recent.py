"""Codecs that treat the newest tokens apart: one pass attends what decoding token by token would."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from fraqtl_bench.quality import attention
from fraqtl_bench.quality.cache import LabCache, logits
from fraqtl_bench.quality.codecs import Exact, LayerSample, deserialize, serialize
from fraqtl_bench.quality.fitted import Fitted, FittedLayer, fit, fit_layer
from fraqtl_bench.quality.methods import Method, parse
from fraqtl_bench.quality.recent import Buffer, Queue, Recent, Ring
from fraqtl_bench.quality.rivals import RIVALS, kivi, turbo_attn
from fraqtl_bench.quality.rivals.kvquant import turn
from fraqtl_bench.quality.routing import stored_scores
from fraqtl_bench.quality.selfcheck import check
from fraqtl_bench.quality.served import BLOCK_SIZE, Served
from fraqtl_bench.quality.watch import Seen, calibration_samples, loss_gradients, watching
from fraqtl_kernels import reference
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.formats import FORMATS
from fraqtl_kernels.pages import PageLayout
from tests.bench.quality_models import demo, random_model, token_ids

WINDOW = 32
IDS = token_ids(80)


def of_kivi() -> Method:
    keys, values = kivi.Groups(2, along_tokens=True), kivi.Groups(2, along_tokens=False)
    return Method("kivi", "rival", "", "kv", Buffer(keys, Exact(), WINDOW), Queue(values, Exact(), WINDOW))


def of_turbo_attn() -> Method:
    keys, values = (turbo_attn.Coded(2, keeps_length=keeps) for keeps in (True, False))
    ring = turbo_attn.Int8()
    return Method("turbo-attn", "rival", "", "kv", Ring(keys, ring, WINDOW), Ring(values, ring, WINDOW))


def of_the_server() -> Method:
    return parse("k4v4+residual")


def keys_only() -> Method:
    return Method("keys", "rival", "", "k", of_kivi().key, Exact())


class Decoding(DynamicCache):
    """A cache as its project keeps it, one token at a time: what `attended` makes of all that came."""

    def __init__(self, config: Any, layers: tuple[FittedLayer, ...]) -> None:
        super().__init__(config=config)
        self.kept = layers
        self.raw: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        new = (key_states, value_states)
        before = self.raw.get(layer_idx, tuple(x[..., :0, :] for x in new))
        self.raw[layer_idx] = tuple(torch.cat(pair, 2) for pair in zip(before, new, strict=True))
        super().update(*new, layer_idx)  # for the lengths that masks are made from
        limit = self.layers[layer_idx].sliding_window if self.layers[layer_idx].is_sliding else None
        streams = (self.kept[layer_idx].key, self.kept[layer_idx].value)
        found = (attended(s.codec, s.constants, x) for s, x in zip(streams, self.raw[layer_idx], strict=True))
        return tuple(x[..., -limit:, :] if limit else x for x in found)


def attended(codec: Any, constants: Any, x: Tensor) -> Tensor:
    """What the query of the last token of x finds: KIVI's lists, and turbo-attn's ring, by their own rules."""
    tokens = x.shape[2]
    if isinstance(codec, Buffer):
        coded = (tokens - 1) // WINDOW * WINDOW  # what was full before this token came
    elif isinstance(codec, Queue):
        coded = max(0, tokens - 1 - WINDOW)
    elif isinstance(codec, Ring):
        coded = max(0, tokens - WINDOW)
    elif isinstance(codec, Served):
        last, (old, new) = tokens - 1, codec.states(x, constants)
        near = [i for i in range(tokens) if last - i < 4 and i // 16 == last // 16 and i % 16 < 12]
        old[:, :, near] = new[:, :, near]
        return old
    else:
        return codec.round_trip(x, constants)
    parts = (codec.old.round_trip(x[:, :, :coded], constants), codec.new.round_trip(x[:, :, coded:], constants))
    return torch.cat(parts, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("method", [of_kivi, of_turbo_attn, of_the_server, keys_only])
def test_one_pass_attends_what_decoding_would(kind: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ROWS", 13)
    model = deepcopy(random_model(kind)).double()  # or a code next to its rounding threshold may fall on either side
    layers = fit(method(), calibration_samples(model, token_ids(96, seed=1))).layers
    whole = logits(model, IDS, layers, len(IDS))
    cache = Decoding(model.config, layers)
    with torch.inference_mode():
        steps = [model(torch.tensor([[i]]), past_key_values=cache, use_cache=True).logits[0, -1] for i in IDS]
        exact = model(torch.tensor([IDS])).logits[0]
    off = (torch.stack(steps) - whole).norm() / whole.norm()
    assert off < 1e-5 and (whole - exact).norm() / exact.norm() > 1e-2
    assert torch.allclose(whole[:WINDOW], exact[:WINDOW], rtol=1e-2, atol=1e-2) is (
        method not in (of_turbo_attn, of_the_server)
    )


@pytest.mark.parametrize("name", ["k4v4", "k4v2"])
def test_residuals_are_those_that_pages_hold(name: str) -> None:
    """Behind every number of tokens, and what is kept then is made of bytes alone."""
    format, layout = FORMATS[name], PageLayout(FORMATS[name], 64, BLOCK_SIZE)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 50, 64, generator=generator) for _ in range(3))
    sample = LayerSample(query, key, value)
    constants = calibrate(format, *(x.transpose(0, 1) for x in (key, query, value)))
    layer = fit_layer(parse(f"{name}+residual"), sample)
    pool, table = torch.zeros(4, 2, BLOCK_SIZE, format.bytes_per_token(64), dtype=torch.uint8), torch.arange(4)
    for tokens in range(1, 51):
        last = slice(tokens - 1, tokens)
        new = (x.transpose(0, 1)[last] for x in (key, value))
        reference.write(pool, layout, *new, torch.tensor([tokens - 1]), constants)
        pages = reference.page_residuals(pool, layout, table, tokens, constants)
        for stream, x, added in zip((layer.key, layer.value), (key, value), pages, strict=True):
            assert isinstance(stream.codec, Served)
            x = x[None, :, :tokens]
            old, new_state = stream.codec.states(x, stream.constants)
            read = stream.codec.is_new(torch.tensor(tokens - 1), torch.arange(tokens))
            expected = added.transpose(0, 1).float()
            assert torch.allclose((new_state - old)[0] * read[:, None], expected, atol=1e-6)
            kept = stream.codec.encode(x, stream.constants)
            found = stream.codec.decode(deserialize(serialize(kept), kept), stream.constants, 64)
            assert torch.equal(found[0, :, read], new_state[0, :, read])
            assert torch.equal(found[0, :, ~read], old[0, :, ~read])


def test_a_model_is_left_as_it_was() -> None:
    model = random_model("llama")
    layers = fit(of_kivi(), calibration_samples(model, token_ids(64, seed=1))).layers
    before = model.config._attn_implementation
    with attention.attending(model, layers):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before
    with attention.attending(model, fit(parse("q4_0"), calibration_samples(model, IDS)).layers):
        assert model.config._attn_implementation == before


def test_a_pass_that_would_see_nothing_of_it_is_refused() -> None:
    model = random_model("llama")
    layers = fit(of_the_server(), calibration_samples(model, token_ids(64, seed=1))).layers
    with pytest.raises(RuntimeError, match="use attending"):
        model(torch.tensor([IDS]), past_key_values=LabCache(model.config, layers), use_cache=True)


@pytest.mark.parametrize("codec", [of_kivi().key, of_kivi().value, of_turbo_attn().key])
def test_what_is_kept_is_what_the_next_query_finds(codec: Recent) -> None:
    """The rule for one query and the numbers that are kept agree; a new key of its own is always there."""
    for tokens in range(1, 100):
        query, keys = torch.tensor(tokens), torch.arange(tokens + 1)
        new = int(codec.is_new(query, keys).sum())
        kept = codec.counts(tokens)[1]
        assert new == min(kept + 1, WINDOW if isinstance(codec, Ring) else 1000)
        assert bool(codec.is_new(query, keys)[-1])


def test_routing_takes_the_state_that_each_query_finds() -> None:
    model, seen = random_model("llama"), list[Seen]()
    layers = fit(of_kivi(), calibration_samples(model, token_ids(64, seed=1))).layers
    with watching(model, seen.append), torch.inference_mode():
        model(torch.tensor([IDS]), use_cache=False)
    rows = torch.tensor([31, 32, 63, 79])
    exact, stored = seen[0].scores(rows), stored_scores(seen[0], rows, layers[0].key)
    changed = ((exact - stored).abs() > 1e-2).any(0)
    first_new = [0, 32, 32, 64]
    for i, first in enumerate(first_new):
        assert not changed[i, first:].any() and (first == 0 or changed[i, :first].all())


def test_frequencies_are_those_of_the_models_rope() -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    model = random_model("llama")
    rope = calibration_samples(model, IDS)[1].rope
    assert rope is not None and rope.halves and calibration_samples(random_model("gpt2"), IDS)[0].rope is None
    x = torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(0))
    angles = LlamaRotaryEmbedding(model.config)(x, torch.arange(300)[None])
    assert torch.allclose(turn(x, rope.frequencies), apply_rotary_pos_emb(x, x, *angles)[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_gradients_foretell_the_loss(kind: str) -> None:
    """A small step against the gradient of one layer's keys and values lowers the loss by what it says."""
    model = deepcopy(random_model(kind)).double()
    gradients = loss_gradients(model, IDS)
    assert not any(p.grad is not None for p in model.parameters())
    assert not gradients[-1]["key"][:, -1].any()  # the last token's key meets no query whose token is known

    class Moved(DynamicCache):
        step = 0.0

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            if layer_idx == 0:
                key_states = key_states + self.step * gradients[0]["key"]
                value_states = value_states + self.step * gradients[0]["value"]
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def loss(step: float) -> float:
        cache = Moved(config=model.config)
        cache.step = step
        with torch.inference_mode():
            rows = model(torch.tensor([IDS]), past_key_values=cache, use_cache=True).logits[0, :-1]
        return torch.nn.functional.cross_entropy(rows, torch.tensor(IDS[1:])).item()

    squares = sum(g.square().sum().item() for g in gradients[0].values())
    step = 1e-4
    assert (loss(step) - loss(-step)) / (2 * step) == pytest.approx(squares, rel=0.02)


def test_the_labs_own_checks_take_every_rival() -> None:
    samples = calibration_samples(demo().model, token_ids(150, seed=4), gradients=True)
    served = [f"{name}+residual" for name, format in FORMATS.items() if format.has_residual]
    methods: list[Fitted] = [fit(parse(name), samples) for name in (*RIVALS, *served)]
    check(demo(), methods, samples, token_ids(90, seed=4))
