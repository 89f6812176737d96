"""States of hybrid models under speculation: what rejected drafts did to them is gone a step later.

The text of a sequence is random vectors. A step brings its next vector, some right drafts (those behind it), and some
wrong ones (others). What comes out for tokens that stay must be what the whole text gives at once.
"""

from __future__ import annotations

import ast
import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.worker import mamba_utils

from fraqtl_vllm.platform.cpu_platform import CpuWithoutNativeOps
from fraqtl_vllm.platform.state_copies import carry_before_step, keep_after_step
from fraqtl_vllm.platform.state_ops import convolve_drafts
from tests.patches import test_state_ops as plain

pytestmark = pytest.mark.skipif(
    not isinstance(current_platform, CpuWithoutNativeOps), reason="vLLM runs on another platform here"
)
TEXT, MOST = 24, 3
SEEDS = range(8)


@pytest.fixture(autouse=True)
def _operators() -> None:
    CpuWithoutNativeOps.import_kernels()
    torch.manual_seed(0)


@dataclass
class Sequence:
    """at: the next token of its text. accepted: of the step before, with its own token."""

    row: int
    at: int
    accepted: int = 1


@dataclass
class Step:
    """index: (tokens,) of the text, -1 for wrong drafts. kept: (tokens,) which of them stay. starts: as vLLM's."""

    index: list[list[int]]
    kept: list[list[bool]]
    accepted: Tensor

    @property
    def starts(self) -> Tensor:
        return torch.tensor([0, *map(len, self.index)]).cumsum(0).int()


def steps(rng: random.Random, sequences: list[Sequence]) -> Iterator[Step]:
    """Until one of the texts is over, moving the sequences on."""
    while True:
        index, kept, accepted = [], [], torch.tensor([s.accepted for s in sequences])
        for s in sequences:
            drafts = rng.choice([0, 0, 1, MOST])
            right = rng.randint(0, drafts)
            index.append([*range(s.at, s.at + right + 1), *[-1] * (drafts - right)])
            kept.append([i >= 0 for i in index[-1]])
            s.at, s.accepted = s.at + right + 1, right + 1
        if max(s.at for s in sequences) > TEXT:
            return
        yield Step(index, kept, accepted)


def inputs(step: Step, texts: Tensor) -> Tensor:
    """(tokens, ...). texts: (sequences, TEXT, ...)."""
    rows = [
        text[i] if i >= 0 else torch.randn_like(text[0])
        for text, own in zip(texts, step.index, strict=True)
        for i in own
    ]
    return torch.stack(rows)


def compare(step: Step, out: Tensor, whole: Tensor) -> int:
    """Of tokens that stay. whole: (sequences, TEXT, ...). Returns how many there were."""
    kept = torch.tensor([stays for own in step.kept for stays in own])
    expected = [whole[n, i] for n, own in enumerate(step.index) for i in own if i >= 0]
    torch.testing.assert_close(out[kept], torch.stack(expected), rtol=1e-4, atol=1e-5)
    return len(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_convolutions(seed: int) -> None:
    rng, first = random.Random(seed), 5
    texts, weight, bias = torch.randn(2, TEXT, plain.DIM), torch.randn(plain.DIM, plain.WIDTH), torch.randn(plain.DIM)
    whole = torch.stack([plain.convolved(text, weight, bias, True) for text in texts])
    kept, rows, seen = wide_states(), torch.tensor([4, 1]), 0
    sequences = [Sequence(row, first) for row in rows.tolist()]
    for s, text in zip(sequences, texts, strict=True):
        kept[s.row, :, : plain.WIDTH - 1] = text[first - plain.WIDTH + 1 : first].T
    for step in steps(rng, sequences):
        out = convolve_drafts(inputs(step, texts), weight, bias, kept, rows, step.accepted, step.starts, True)
        seen += compare(step, out, whole)
    assert seen > TEXT // 2
    assert kept[[0, 2, 3, 5]].isnan().all()


def wide_states() -> Tensor:
    """(6, dim, width - 1 and room for drafts) of convolutions, with what nothing may read."""
    return torch.full((6, plain.DIM, plain.WIDTH - 1 + MOST), float("nan"))


def test_convolutions_of_processors_with_bf16() -> None:
    """There vLLM takes other operators: a prompt in two chunks, and steps with as many drafts as there may be."""
    texts, weight, bias = torch.randn(2, TEXT, plain.DIM), torch.randn(plain.DIM, plain.WIDTH), torch.randn(plain.DIM)
    whole = torch.stack([plain.convolved(text, weight, bias, True) for text in texts])
    kept, rows, at = wide_states(), torch.tensor([4, 1]), 6
    for first, end in ((0, 4), (4, at)):
        chunks, starts = texts[:, first:end].flatten(0, 1).T, torch.arange(3) * (end - first)
        has_state = torch.full((2,), first > 0)
        out = ops.causal_conv1d_fwd_cpu(chunks, weight, bias, kept, starts, rows, has_state, True, True)
        torch.testing.assert_close(out.T.view(2, end - first, -1), whole[:, first:end])
    accepted = torch.tensor([1, 1])
    for right in (2, MOST, 0):
        drafts = torch.cat([texts[:, at : at + 1 + right], torch.randn(2, MOST - right, plain.DIM)], 1)
        out = ops.causal_conv1d_update_cpu(drafts, kept, weight, bias, True, rows, True, num_accepted_tokens=accepted)
        torch.testing.assert_close(out[:, : 1 + right], whole[:, at : at + 1 + right])
        at, accepted = at + 1 + right, torch.tensor([1 + right] * 2)
    assert kept[[0, 2, 3, 5]].isnan().all()


@pytest.mark.parametrize("seed", SEEDS)
def test_delta_rule(seed: int) -> None:
    rng = random.Random(seed)
    shapes: dict[str, tuple[int, ...]] = {"query": (plain.KEY_HEADS, plain.K), "key": (plain.KEY_HEADS, plain.K)}
    shapes |= {"value": (plain.HEADS, plain.V), "a": (plain.HEADS,), "b": (plain.HEADS,)}
    texts = {name: torch.randn(2, TEXT, *shape) for name, shape in shapes.items()}
    a_log, dt_bias = torch.rand(plain.HEADS), torch.randn(plain.HEADS)
    whole = torch.stack([_delta_of({name: x[n] for name, x in texts.items()}, a_log, dt_bias) for n in range(2)])
    rows = torch.tensor([[3, 1, 7, 5], [6, 2, 9, 8]])
    states = torch.full((10, plain.HEADS, plain.K, plain.V), float("nan"))
    states[[3, 6]] = 0
    seen = 0
    for step in steps(rng, [Sequence(0, 0), Sequence(1, 0)]):
        given = {name: inputs(step, x) for name, x in texts.items()}
        out = ops.fused_sigmoid_gating_delta_rule_update_spec_cpu(
            a_log, dt_bias, *given.values(), states, rows, step.accepted, step.starts, True
        )
        seen += compare(step, out, whole)
    assert seen > TEXT // 2
    assert states[[0, 4]].isnan().all()


def _delta_of(text: dict[str, Tensor], a_log: Tensor, dt_bias: Tensor) -> Tensor:
    of = {name: x[None] if name in ("query", "key", "value") else x for name, x in text.items()}
    out, _ = plain.by_transformers({**of, "a_log": a_log, "dt_bias": dt_bias}, slice(0, TEXT))
    return out


# ---- from block to block: beside vLLM's own kernels, in Triton's interpreter

REQUESTS, COLUMNS, BLOCKS, BLOCK = 5, 7, 40, 16
KERNELS = (
    "_memcpy_u64_tiled",
    "_copy_mamba_state_block",
    "precopy_mamba_align_fused_kernel",
    "postprocess_mamba_fused_kernel",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's own, in a module by themselves: its imports leave Triton out on machines without a GPU."""
    source = Path(str(mamba_utils.__file__)).read_text(encoding="utf-8")
    found = [x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef) and x.name in KERNELS]
    assert len(found) == len(KERNELS)
    path = tmp_path_factory.mktemp("kernels") / "kernels_of_vllm.py"
    path.write_text("\n\n".join(["import triton", "import triton.language as tl", *map(ast.unparse, found)]))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Pool:
    """States of two layers, each with a convolution and a recurrence, in two groups with block tables of their own."""

    convolutions: list[Tensor]
    recurrences: list[Tensor]
    tables: list[Tensor]

    @classmethod
    def random(cls, rng: random.Random, channels_first: bool) -> Pool:
        shape = (3, 6) if channels_first else (6, 3)
        tables = [
            torch.tensor(rng.sample(range(BLOCKS), REQUESTS * COLUMNS)).int().view(REQUESTS, COLUMNS) for _ in "ab"
        ]
        return cls(
            [torch.randn(BLOCKS, *shape).bfloat16() for _ in "ab"], [torch.randn(BLOCKS, 5, 7) for _ in "ab"], tables
        )

    def copy(self) -> Pool:
        return Pool(*([x.clone() for x in part] for part in (self.convolutions, self.recurrences, self.tables)))

    @property
    def states(self) -> list[Tensor]:
        return [x for pair in zip(self.convolutions, self.recurrences, strict=True) for x in pair]

    def described(self, channels_first: bool) -> list[Any]:
        """As vLLM's `MambaSpecDecodeGPUContext` does it."""
        is_convolution = [True, False] * 2
        width, inner = (2, 1) if channels_first else (1, 3)
        return [
            torch.tensor([table.data_ptr() for table in self.tables]),
            COLUMNS,
            torch.tensor([x.data_ptr() for x in self.states]),
            torch.tensor([x.stride(0) * x.element_size() for x in self.states]),
            torch.tensor([x.element_size() for x in self.states]).int(),
            torch.tensor([inner if conv else 35 for conv in is_convolution]),
            torch.tensor(
                [x.shape[width] if conv else 0 for x, conv in zip(self.states, is_convolution, strict=True)]
            ).int(),
            torch.tensor([0, 0, 1, 1]).int(),
            torch.tensor([3 if conv and channels_first else 0 for conv in is_convolution]).int(),
            torch.tensor([x.stride(1) * x.element_size() for x in self.states]),
        ]


def ints(values: Any) -> Tensor:
    return torch.tensor(list(values)).int()


def both(before: Pool, kernel: Any, ours: Any, given: list[Tensor], *others: Any, **options: Any) -> list[Pool]:
    """What vLLM's kernel and ours make of a pool. others: by pool, what they take behind its description."""
    pools = [before.copy(), before.copy()]
    options["COPY_BLOCK_SIZE"] = 1024
    for n, run in enumerate((kernel[REQUESTS, 4, 1], ours)):
        described = pools[n].described(options["CONV_STATE_DIM_FIRST"])
        run(*given, *described, *(other[n] for other in others), None, REQUESTS, **options)
    return pools


def are_equal(a: Pool, b: Pool) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.states, b.states, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_states_are_carried_as_by_vllm(seed: int, channels_first: bool, kernels: Any) -> None:
    rng = random.Random(seed)
    before = Pool.random(rng, channels_first)
    sources = ints(rng.choice([-1, 0, 1, 2]) for _ in range(REQUESTS))
    targets = ints(rng.choice([int(s), int(s) + 1, 3]) if s >= 0 else 0 for s in sources)
    biases = ints(rng.randint(0, MOST) for _ in range(REQUESTS))
    options = {"HAS_IDX_MAPPING": False, "CONV_STATE_DIM_FIRST": channels_first}
    kernel, given = kernels.precopy_mamba_align_fused_kernel, [targets, sources, biases]
    theirs, ours = both(before, kernel, carry_before_step, given, **options)
    assert are_equal(theirs, ours) and not are_equal(theirs, before)


@pytest.mark.interpreter
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_states_at_ends_of_blocks_are_kept_as_by_vllm(seed: int, channels_first: bool, kernels: Any) -> None:
    """The first request goes beyond the end of a block, the second one up to it; others may or may not."""
    rng = random.Random(seed)
    before = Pool.random(rng, channels_first)
    drafted = [MOST, MOST, *(rng.randint(0, MOST) for _ in range(REQUESTS - 2))]
    accepted = [MOST + 1, MOST + 1, *(rng.randint(1, n + 1) for n in drafted[2:])]
    computed = [13, 12, *(rng.randint(0, 3) * BLOCK + rng.choice([0, 5, 13, 14, 15]) for _ in drafted[2:])]
    columns = [(c + d) // BLOCK for c, d in zip(computed, drafted, strict=True)]
    scheduled = [n + 1 for n in drafted]
    numbers = [ints(x) for x in (accepted, columns, scheduled, computed, drafted)]
    kept, options = [ints(accepted), ints(accepted)], {"block_size": BLOCK, "CONV_STATE_DIM_FIRST": channels_first}
    theirs, ours = both(before, kernels.postprocess_mamba_fused_kernel, keep_after_step, numbers, kept, **options)
    assert are_equal(theirs, ours) and torch.equal(*kept)
    assert not are_equal(theirs, before) and kept[0][1] == 1
