"""Drafts in the pages: each reads what plain decoding would have read, and a rejected one leaves nothing behind."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import get_format
from fraqtl_vllm._vllm import set_current_vllm_config
from fraqtl_vllm.attention import cpu as cpu_attention
from fraqtl_vllm.attention.turns import plan_turns, without
from fraqtl_vllm.platform.cpu_worker import kept_tokens
from tests.patches.test_backend import make_config

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 64, 16
BLOCKS = 6  # of a request


def config_for(kv_format: str, drafts: int) -> Any:
    config = make_config({"fraqtl": {"kv_format": kv_format}})
    asked = SimpleNamespace(method="ngram", num_speculative_tokens=drafts, rejection_sample_method="standard")
    object.__setattr__(config, "speculative_config", asked if drafts else None)
    return config


class Layer:
    """One attention layer of a server, with a pool of its own and the tokens that come to it."""

    def __init__(self, kv_format: str, drafts: int, requests: int, **options: Any) -> None:
        config = config_for(kv_format, drafts)
        with set_current_vllm_config(config):
            self.impl = cpu_attention.Impl(
                num_heads=HEADS, head_size=SIZE, scale=0.125, num_kv_heads=KV_HEADS, **options
            )
        self.builder = cpu_attention.MetadataBuilder(None, [], config, torch.device("cpu"))
        content = get_format(kv_format).bytes_per_token(SIZE)
        self.pool = torch.full((1 + requests * BLOCKS, KV_HEADS, BLOCK, content), 0x5A, dtype=torch.uint8)
        self.table = torch.randperm(requests * BLOCKS).view(requests, BLOCKS).int() + 1

    def step(self, rows: list[int], first: list[int], tokens: list[Tensor]) -> list[Tensor]:
        """Attention of new tokens (n, HEADS + 2 · KV_HEADS, SIZE) of requests, from the given positions on."""
        counts = torch.tensor([len(x) for x in tokens])
        position = torch.cat([torch.arange(a, a + len(x)) for a, x in zip(first, tokens, strict=True)])
        request = torch.tensor(rows).repeat_interleave(counts)
        slots = self.table[request, position // BLOCK].long() * BLOCK + position % BLOCK
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        batch = CommonAttentionMetadata(
            query_start_loc=start,
            query_start_loc_cpu=start,
            seq_lens=(torch.tensor(first) + counts).int(),
            num_reqs=len(rows),
            num_actual_tokens=int(counts.sum()),
            max_query_len=int(counts.max()),
            max_seq_len=BLOCKS * BLOCK,
            block_table_tensor=self.table[rows],
            slot_mapping=slots,
        )
        query, key, value = torch.cat(tokens).split([HEADS, KV_HEADS, KV_HEADS], 1)
        layer = SimpleNamespace(layer_name="layer", impl=self.impl)
        self.impl.do_kv_cache_update(layer, key, value, self.pool, slots)
        output = torch.full_like(query, torch.nan, memory_format=torch.contiguous_format)
        self.impl.forward(layer, query, key, value, self.pool, self.builder.build(0, batch), output)
        return list(output.split(counts.tolist()))


def random_tokens(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, HEADS + 2 * KV_HEADS, SIZE, generator=generator)


@dataclass
class Request:
    """Its true tokens, how far it got, and what plain decoding attends for each."""

    tokens: Tensor
    prompt: int
    plain: Tensor

    @classmethod
    def of(cls, layer: Layer, row: int, prompt: int, generator: torch.Generator) -> Request:
        tokens = random_tokens(BLOCKS * BLOCK, generator)
        parts = layer.step([row], [0], [tokens[:prompt]])
        parts += [layer.step([row], [p], [tokens[p : p + 1]])[0] for p in range(prompt, len(tokens))]
        return cls(tokens, prompt, torch.cat(parts))


@pytest.mark.parametrize("kv_format", ["k4v4", "k8v4", "k4v2", "k8v8"])
@pytest.mark.parametrize("drafts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("window", [None, 20])
def test_drafts_read_what_plain_decoding_reads(kv_format: str, drafts: int, window: int | None) -> None:
    """Three requests at once, with random drafts of which a random number is right, until they are full."""
    rng, generator = random.Random(drafts), torch.Generator().manual_seed(drafts)
    plain = Layer(kv_format, 0, 3, sliding_window=window)
    requests = [Request.of(plain, row, prompt, generator) for row, prompt in enumerate((1, 18, 40))]
    layer = Layer(kv_format, drafts, 3, sliding_window=window)
    for row, request in enumerate(requests):
        layer.step([row], [0], [request.tokens[: request.prompt]])
    at = [request.prompt for request in requests]
    rejected = 0
    while rows := [row for row in range(3) if at[row] < BLOCKS * BLOCK]:
        rows = rng.sample(rows, rng.randint(1, len(rows)))  # vLLM may leave a request out for a step
        proposed = [min(rng.randint(0, drafts), BLOCKS * BLOCK - at[row] - 1) for row in rows]
        right = [rng.randint(0, count) for count in proposed]
        given = []
        for row, count, good in zip(rows, proposed, right, strict=True):
            true = requests[row].tokens[at[row] : at[row] + 1 + good]
            given.append(torch.cat([true, 3 * random_tokens(count - good, generator)]))
        outputs = layer.step(rows, [at[row] for row in rows], given)
        for row, good, output in zip(rows, right, outputs, strict=True):
            expected = requests[row].plain[at[row] : at[row] + 1 + good]
            # Drafts of a format without residuals take another path, whose products are added up in another order
            torch.testing.assert_close(output[: 1 + good], expected, rtol=0, atol=1e-5 if kv_format == "k8v8" else 2e-6)
        if any(proposed):
            longest = max(proposed) + 1
            sampled = torch.tensor([[7] * (1 + good) + [-1] * (longest - 1 - good) for good in right])
            layer.impl.take_back(kept_tokens(proposed, sampled))
        rejected += sum(proposed) - sum(right)
        at = [at[r] + 1 + right[rows.index(r)] if r in rows else at[r] for r in range(3)]
    assert rejected > 20


def test_a_chunk_of_a_prompt_beside_drafts() -> None:
    """It may be as short as drafts are, or longer; nothing of it is taken back."""
    generator = torch.Generator().manual_seed(5)
    plain = Layer("k4v4", 0, 2)
    decoded, prompt = (Request.of(plain, row, length, generator) for row, length in ((0, 20), (1, 60)))
    layer = Layer("k4v4", 4, 2)
    layer.step([0], [0], [decoded.tokens[:20]])
    first, at = 20, 0
    for chunk in (3, 9, 5, 2, 1, 4, 30):
        drafts = torch.cat([decoded.tokens[first : first + 2], 3 * random_tokens(3, generator)])
        outputs = layer.step([0, 1], [first, at], [drafts, prompt.tokens[at : at + chunk]])
        torch.testing.assert_close(outputs[0][:2], decoded.plain[first : first + 2], rtol=0, atol=2e-6)
        # A chunk as short as drafts is read by the kernel for decoding, and was read by that for prompts: other sums
        torch.testing.assert_close(outputs[1], prompt.plain[at : at + chunk], rtol=0, atol=1e-5)
        layer.impl.take_back(kept_tokens([4, 0], torch.tensor([[7, 7, -1, -1, -1], [7, -1, -1, -1, -1]])))
        first, at = first + 2, at + chunk


def test_tensors_that_lie_otherwise() -> None:
    """Those that the compiled step does not take are copied for it: drafts can go no other way."""
    generator = torch.Generator().manual_seed(6)
    tokens = random_tokens(30, generator)
    outputs = []
    for dtype in (torch.float32, torch.float64):
        layer = Layer("k4v4", 3, 1)
        layer.table = torch.arange(1, 1 + BLOCKS)[None].int()
        layer.step([0], [0], [tokens[:20]])
        layer.step([0], [20], [tokens[20:21]])
        layer.impl.do_kv_cache_update = _as(dtype, layer.impl.do_kv_cache_update)  # type: ignore[method-assign]
        outputs.append(layer.step([0], [21], [tokens[21:25]])[0])
        layer.impl.take_back(torch.tensor([1]))
        outputs[-1] = torch.cat([outputs[-1], layer.step([0], [22], [tokens[22:23]])[0]])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def _as(dtype: torch.dtype, update: Any) -> Any:
    return lambda layer, key, value, *others: update(layer, key.to(dtype), value.to(dtype), *others)


def test_turns_of_a_batch() -> None:
    start = torch.tensor([0, 1, 4, 20, 22], dtype=torch.int32)
    batch = SimpleNamespace(
        query_start_loc=start,
        seq_lens=torch.tensor([9, 30, 16, 50], dtype=torch.int32),
        block_table_tensor=torch.arange(16, dtype=torch.int32).view(4, 4),
        slot_mapping=torch.arange(100, 122),
        max_query_len=16,
    )
    turns = plan_turns(batch, 3)  # type: ignore[arg-type]
    assert [turn.requests.tolist() for turn in turns] == [[0, 1, 3], [1, 3], [1]]
    assert [turn.rows.tolist() for turn in turns] == [[0, 1, 20], [2, 21], [3]]
    assert [turn.plan.seq_lens.tolist() for turn in turns] == [[9, 28, 49], [29, 50], [30]]
    for turn in turns:
        assert turn.plan.slots[turn.plan.rows].tolist() == [100 + row for row in turn.rows]
        assert (turn.plan.slots >= 0).sum() == len(turn.rows)
    left = without(batch.slot_mapping, turns)
    assert left.tolist() == [-1] * 4 + list(range(104, 120)) + [-1] * 2
    assert plan_turns(SimpleNamespace(**{**vars(batch), "query_start_loc": start[[0, 3]]}), 3) == ()  # type: ignore[arg-type]


def test_kept_tokens() -> None:
    kept = kept_tokens([0, 2, 2, 1], torch.tensor([[5, -1, -1], [5, -1, -1], [5, 6, 7], [5, 6, -1]]))
    assert kept[1:].tolist() == [1, 3, 2]
    assert kept[0] > 10**9


def test_formats_without_residuals_take_no_turns() -> None:
    assert cpu_attention.most_in_turns(config_for("k4v4", 3)) == 4
    assert cpu_attention.most_in_turns(config_for("k8v8", 3)) == 1
    assert cpu_attention.most_in_turns(config_for("k4v4", 0)) == 1


@pytest.mark.parametrize(("kv_format", "of_drafts"), [("k4v4", "k8v8"), ("k4v2", "k8v8"), ("bf16", "bf16")])
def test_layers_of_a_draft_model_take_no_turns(kv_format: str, of_drafts: str) -> None:
    config = config_for(kv_format, 3)
    with set_current_vllm_config(config):
        impl = cpu_attention.Impl(num_heads=HEADS, head_size=SIZE, scale=0.125, num_kv_heads=KV_HEADS)
    impl.serve_drafts()
    assert impl.is_draft and impl.kv_format == get_format(of_drafts)
    layers = {"draft": SimpleNamespace(impl=impl), "other": SimpleNamespace(impl=SimpleNamespace(is_draft=False))}
    config.compilation_config.static_forward_context.update(layers)
    most = [
        cpu_attention.MetadataBuilder(None, names, config, torch.device("cpu"))._most
        for names in (["draft"], ["other"], ["draft", "other"])
    ]
    assert most == [1, *[1 if kv_format == "bf16" else 4] * 2]


def test_layers_that_share_a_cache_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="speculative decoding of models whose layers share a cache yet"):
        Layer("k4v4", 2, 1, kv_sharing_target_layer_name="other")
