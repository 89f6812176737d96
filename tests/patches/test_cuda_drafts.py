"""Speculation on a GPU, in Triton's interpreter: what rejected drafts leave, and the layers of a model that drafts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm
from torch import Tensor

pytest.importorskip("triton")
from vllm.v1.attention.backend import CommonAttentionMetadata

from fraqtl_kernels import reference
from fraqtl_kernels.constants import IDENTITY
from fraqtl_kernels.formats import FORMATS
from fraqtl_kernels.gpu.plan import MAX_QUERIES
from fraqtl_kernels.pages import PageLayout
from fraqtl_vllm import speculation
from fraqtl_vllm.attention import cuda as cuda_attention
from tests.kernels.conftest import make_pool, relative_error
from tests.kernels.gpu.conftest import DEVICE, one_thread  # noqa: F401
from tests.patches.test_cuda_attention import (
    HEADS,
    KV_HEADS,
    SIZE,
    attend,
    common,
    make_builder,
    make_config,
    make_layer,
    mixed_batch,
    worker,  # noqa: F401
)

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a stand-in for what vLLM does on the GPU itself")

DRAFTS, LONGEST = 3, 48


def test_drafts_that_one_call_takes() -> None:
    assert speculation.MOST_ON_A_GPU == MAX_QUERIES - 1


@dataclass
class Text:
    """A request with the keys and values of the text that it will have, of which `length` are accepted."""

    blocks: list[int]
    length: int
    key: Tensor = field(default_factory=lambda: torch.randn(LONGEST, KV_HEADS, SIZE).bfloat16())
    value: Tensor = field(default_factory=lambda: torch.randn(LONGEST, KV_HEADS, SIZE).bfloat16())

    def slots(self, first: int, count: int) -> Tensor:
        return torch.tensor([self.blocks[i // 16] * 16 + i % 16 for i in range(first, first + count)])

    def draft(self, drafts: int, kept: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a step, (1 + drafts, KV heads, D) each: behind those that are kept, of another text."""
        rows = slice(self.length, self.length + 1 + drafts)
        key, value = self.key[rows].clone(), self.value[rows].clone()
        key[1 + kept :] = torch.randn_like(key[1 + kept :]) * 8
        value[1 + kept :] = torch.randn_like(value[1 + kept :]) * 8
        return key, value


def metadata(texts: list[Text], counts: list[int], slots: Tensor) -> CommonAttentionMetadata:
    start = torch.tensor([0, *counts]).cumsum(0).int()
    seq_lens = torch.tensor([text.length + count for text, count in zip(texts, counts, strict=True)]).int()
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=len(texts),
        num_actual_tokens=int(start[-1]),
        max_query_len=max(counts),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.tensor([text.blocks for text in texts], dtype=torch.int32),
        slot_mapping=slots,
    )


def plain_attention(layer: cuda_attention.Impl, text: Text, layout: PageLayout, query: Tensor, kept: int) -> Tensor:
    """Of the tokens of a step that stay, one after another over pages that no draft was ever in."""
    pool, table = make_pool(layout, 8, KV_HEADS), torch.tensor([text.blocks], dtype=torch.int32)
    end = text.length + 1 + kept
    rows = []
    for length in range(text.length + 1, end + 1):
        first = length - 1 if rows else 0
        slots = text.slots(first, length - first)
        reference.write(pool, layout, text.key[first:length], text.value[first:length], slots)
        residuals = [reference.page_residuals(pool, layout, table[0], length)] if layout.format.has_residual else None
        rows.append(
            reference.paged_attention(
                query[len(rows)][None],
                pool,
                layout,
                table,
                torch.tensor([0, 1]),
                torch.tensor([length]),
                scale=layer.scale,
                residuals=residuals,
            )
        )
    return torch.cat(rows)


def largest_error(layer: cuda_attention.Impl, most: int) -> float:
    """Of what two requests attend in steps with at most so many drafts, of which some are rejected."""
    torch.manual_seed(0)
    rng = random.Random(0)
    layout = PageLayout(layer.kv_format, SIZE, 16)
    pool, builder = make_pool(layout, 8, KV_HEADS), make_builder(make_config(speculation=DRAFTS))
    texts = [Text([5, 1, 3], 13), Text([2, 6, 4], 20)]
    for text in texts:
        slots = text.slots(0, text.length)
        layer.do_kv_cache_update(None, text.key[: text.length], text.value[: text.length], pool, slots)
    errors = []
    for step in range(12):
        counts = [1 + rng.choice([0, 1, most] if step % 2 and most else [0]) for _ in texts]
        kept = [rng.randint(0, count - 1) for count in counts]
        drafted = [text.draft(count - 1, k) for text, count, k in zip(texts, counts, kept, strict=True)]
        key, value = (torch.cat(parts) for parts in zip(*drafted, strict=True))
        slots = torch.cat([text.slots(text.length, count) for text, count in zip(texts, counts, strict=True)])
        batch = builder.build(0, metadata(texts, counts, slots))
        query = torch.randn(sum(counts), HEADS, SIZE).bfloat16()
        layer.do_kv_cache_update(None, key, value, pool, slots)
        output = layer.forward(None, query, key, value, pool, batch, torch.full_like(query, torch.nan))
        for r, text in enumerate(texts):
            rows = slice(sum(counts[:r]), sum(counts[:r]) + 1 + kept[r])
            wanted = plain_attention(layer, text, layout, query[rows], kept[r])
            errors.append(float(relative_error(output[rows], wanted)))
            text.length += 1 + kept[r]
    return max(errors)


@pytest.mark.parametrize("format_name", ["k4v4", "k4v2", "k8v8", "bf16"])
def test_rejected_drafts_leave_nothing(monkeypatch: pytest.MonkeyPatch, format_name: str) -> None:
    said: list[str] = []
    monkeypatch.setattr(cuda_attention.progress, "say_once", said.append)
    layer = make_layer(monkeypatch, settings={"kv_format": format_name}, speculation=DRAFTS)
    assert not layer.kv_format.has_residual
    assert (cuda_attention.WITHOUT_RESIDUALS in said) is FORMATS[format_name].has_residual
    assert largest_error(layer, DRAFTS) < 1e-2


def test_with_residuals_they_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why there are none: a rejected draft overwrites them, and a step with drafts reads none."""
    layer = make_layer(monkeypatch, settings={"kv_format": "k4v4"}, speculation=DRAFTS)
    layer.kv_format = FORMATS["k4v4"]
    layer.use_constants(IDENTITY)
    assert largest_error(layer, 0) < 1e-2
    assert largest_error(layer, DRAFTS) > 3e-2


@pytest.mark.parametrize(("kv_format", "of_drafts"), [("k4v4", "k8v8"), ("k4v4-channel", "k8v8"), ("bf16", "bf16")])
def test_layers_of_a_model_that_drafts(monkeypatch: pytest.MonkeyPatch, kv_format: str, of_drafts: str) -> None:
    """They are told after they were built, and write and read in their own format, uncalibrated."""
    layer = make_layer(monkeypatch, settings={"kv_format": kv_format}, speculation=DRAFTS)
    layer.serve_drafts()
    assert layer.is_draft and layer.kv_format.name == of_drafts and layer.reserved is None
    batch, key, value = mixed_batch(of_drafts)
    table = batch.block_table.long()
    written, wanted = batch.pool.clone(), batch.pool.clone()
    others = torch.randn(2, 9, KV_HEADS, SIZE).bfloat16().unbind()  # than those that are there
    slots = table[2, 0] * 16 + torch.arange(9)
    layer.do_kv_cache_update(None, *others, written, slots)
    reference.write(wanted, batch.layout, *others, slots)
    assert torch.equal(written, wanted) and not torch.equal(written, batch.pool)
    out = attend(layer, batch, key, value)
    assert relative_error(out[:2], batch.attention(2, constants=IDENTITY)) < 1e-2


def test_a_format_of_its_own_has_no_residuals_either(monkeypatch: pytest.MonkeyPatch) -> None:
    for drafts in (0, DRAFTS):
        layer = make_layer(monkeypatch, settings={"kv_format": "k8v8"}, speculation=drafts or None)
        layer.use_format(FORMATS["k4v4"])
        assert (layer.kv_format.name, layer.kv_format.has_residual) == ("k4v4", not drafts)


@pytest.mark.parametrize(
    ("runner", "module"),
    [
        ({"drafter": {"_draft_attn_layer_names"}}, "v1/spec_decode/llm_base_proposer.py"),
        ({"speculator": {"draft_attn_layer_names"}}, "v1/worker/gpu/spec_decode/speculator.py"),
    ],
)
def test_both_model_runners_say_which_layers_draft(runner: dict[str, set[str]], module: str) -> None:
    told = []
    layers = {
        name: SimpleNamespace(impl=SimpleNamespace(is_draft=False, serve_drafts=partial(told.append, name)))
        for name in ("model.0", "draft.0", "draft.1")
    }
    ((drafting, (attribute,)),) = runner.items()
    names = {"draft.0", "draft.1", "a layer of another backend"}
    speculation.tell_layers(SimpleNamespace(**{drafting: SimpleNamespace(**{attribute: names})}), layers)
    assert sorted(told) == ["draft.0", "draft.1"]
    speculation.tell_layers(SimpleNamespace(**{drafting: None}), layers)
    assert len(told) == 2
    assert f"self.{attribute} = " in (Path(vllm.__file__).parent / module).read_text()


def test_their_prompts_are_read_by_lengths_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's second model runner adds a token to what a draft model reads, and not to the bound that the host has."""
    layer = make_layer(monkeypatch, settings={"kv_format": "k4v4"}, speculation=DRAFTS)
    layer.serve_drafts()
    batch, key, value = mixed_batch("k8v8")
    said = common(batch)
    said.seq_lens_cpu_upper_bound = batch.seq_lens.int() - 1
    metadata = make_builder(make_config(speculation=DRAFTS)).build(0, said)
    output = torch.full_like(batch.query, torch.nan)
    layer.forward(None, batch.query, key.fill_(torch.nan), value.fill_(torch.nan), batch.pool, metadata, output)
    assert relative_error(output, batch.attention()) < 1e-2


def test_their_launches_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(monkeypatch, settings={"kv_format": "k4v4"}, speculation=DRAFTS)
    layer.serve_drafts()
    layout = PageLayout(layer.kv_format, SIZE, 16)
    for requests in (1, 8):
        for queries in (1, 1 + DRAFTS):
            assert layer.plan(layout, requests, queries).scratch_floats(SIZE) <= layer.buffers.scratch.numel()
