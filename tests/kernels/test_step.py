"""A decode step in one compiled call, against the reference."""

import pytest
import torch

from fraqtl_kernels import reference
from fraqtl_kernels.cpu import DecodeStep, LayerOperands, StepPlan
from fraqtl_kernels.cpu import step as steps
from fraqtl_kernels.formats import CPU_HEAD_SIZES, FORMATS
from tests.kernels.conftest import PagedBatch, make_batch, make_sink_batch, relative_error, without_key_constants
from tests.kernels.on_cpu import cpu_write, decode_step

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
LENGTHS = (1, 17, 40, 64, 900, 1700)


def new_slots(batch: PagedBatch) -> torch.Tensor:
    last = batch.seq_lens - 1
    block = batch.block_table.gather(1, (last // batch.layout.block_size)[:, None])[:, 0]
    return block.long() * batch.layout.block_size + last % batch.layout.block_size


def rewind(batch: PagedBatch) -> None:
    """Bring the pages to the state before the newest token of each request, whose slot is poisoned."""
    size = batch.layout.block_size
    for r, length in enumerate(batch.seq_lens.tolist()):
        token = torch.arange(length - 1)
        slots = batch.block_table[r, token // size].long() * size + token % size
        for block in batch.block_table[r, : -(-length // size)].tolist():
            batch.pool[block] = 0xFF
        earlier = batch.key[r, : length - 1], batch.value[r, : length - 1]
        cpu_write(batch.pool, batch.layout, *earlier, slots, batch.constants)


def step_and_reference(
    batch: PagedBatch,
    window: int | None = None,
    soft_cap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs of the step, those of the reference over what `cpu.write` stored, and that pool."""
    rewind(batch)
    slots = new_slots(batch)
    rows = torch.arange(len(batch.seq_lens))
    key, value = (x[rows, batch.seq_lens - 1] for x in (batch.key, batch.value))
    expected_pool = batch.pool.new_zeros(0)
    storage = batch.pool.untyped_storage().clone()
    expected_pool = torch.empty(0, dtype=torch.uint8).set_(
        storage, batch.pool.storage_offset(), batch.pool.shape, batch.pool.stride()
    )
    residual = []
    for r, slot in enumerate(slots):
        one = slice(r, r + 1)
        cpu_write(expected_pool, batch.layout, key[one], value[one], slot[None], batch.constants)
        length = int(batch.seq_lens[r])
        residual.append(
            tuple(reference.page_residuals(expected_pool, batch.layout, batch.block_table[r], length, batch.constants))
        )
    options = {"scale": batch.scale, "window": window, "soft_cap": soft_cap, "constants": batch.constants}
    expected = reference.paged_attention(
        batch.query,
        expected_pool,
        batch.layout,
        batch.block_table,
        batch.query_start,
        batch.seq_lens,
        residuals=residual,
        sink_logits=sink_logits,
        **options,
    )
    # Rows as they come out of one product of a model: queries, keys and values side by side
    heads, size = batch.key.shape[2:]
    joined = torch.cat([batch.query.flatten(1), key.flatten(1), value.flatten(1)], 1)
    width = batch.query.shape[1] * size
    q, k, v = joined.split([width, heads * size, heads * size], 1)
    output = torch.full_like(batch.query, float("nan"))
    step = decode_step(
        batch.pool,
        batch.layout,
        batch.query.dtype,
        batch.constants,
        scale=batch.scale,
        window=window,
        soft_cap=soft_cap,
        sink_logits=sink_logits,
    )
    plan = StepPlan(batch.seq_lens, batch.block_table, slots)
    step(q.unflatten(1, (-1, size)), k.unflatten(1, (-1, size)), v.unflatten(1, (-1, size)), output, plan)
    return output, expected, expected_pool


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_step_writes_what_write_does_and_attends_as_the_reference(
    name: str, dtype: torch.dtype, calibrated: bool
) -> None:
    if not DecodeStep.supports(FORMATS[name], dtype):
        pytest.skip("goes through write and attend")
    batch = make_batch(
        name,
        seq_lens=LENGTHS,
        queries=(1,) * len(LENGTHS),
        dtype=dtype,
        kv_heads=3,
        group=3,
        padding=96,
        calibrated=calibrated,
        stored=False,
    )
    output, expected, pool = step_and_reference(batch)
    assert relative_error(output, expected) < TOLERANCE[dtype]
    assert torch.equal(batch.pool, pool)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("seq_lens", [(1,), (1700,), (900, 17)])
def test_any_way_to_share_it_out(
    seq_lens: tuple[int, ...], threads: int, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_at_once", lambda *_: at_once)
    monkeypatch.setattr(steps, "team_size", lambda _: threads)
    batch = make_batch(
        "k4v4",
        seq_lens=seq_lens,
        queries=(1,) * len(seq_lens),
        dtype=torch.float32,
        kv_heads=3,
        group=3,
        calibrated=True,
        stored=False,
    )
    output, expected, pool = step_and_reference(batch)
    assert relative_error(output, expected) < TOLERANCE[torch.float32]
    assert torch.equal(batch.pool, pool)


def test_steps_of_a_part_follow_each_other_where_threads_stay_busy() -> None:
    assert steps._at_once(tokens=4, runs=8, heads=3, threads=2)
    assert steps._at_once(tokens=1, runs=1, heads=3, threads=2)  # nothing to share out
    assert not steps._at_once(tokens=1, runs=6, heads=3, threads=2)  # 2 parts beside 1
    assert not steps._at_once(tokens=1, runs=6, heads=1, threads=2)


@pytest.mark.parametrize("head_size", CPU_HEAD_SIZES)
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (33, None), (1000, 20.0)])
def test_head_sizes_windows_and_soft_caps(head_size: int, window: int | None, soft_cap: float | None) -> None:
    batch = make_batch(
        "k4v4",
        head_size=head_size,
        seq_lens=(5, 33, 1300),
        queries=(1, 1, 1),
        dtype=torch.bfloat16,
        group=2,
        calibrated=True,
        stored=False,
    )
    output, expected, pool = step_and_reference(batch, window, soft_cap)
    assert relative_error(output, expected) < TOLERANCE[torch.bfloat16]
    assert torch.equal(batch.pool, pool)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (33, None), (1000, 3.0)])
@pytest.mark.parametrize("name", FORMATS)
def test_sink_logits(name: str, window: int | None, soft_cap: float | None, dtype: torch.dtype) -> None:
    if not DecodeStep.supports(FORMATS[name], dtype):
        pytest.skip("goes through write and attend")
    batch, sink_logits = make_sink_batch(
        name, seq_lens=LENGTHS, queries=(1,) * len(LENGTHS), dtype=dtype, kv_heads=3, group=3, padding=96
    )
    output, expected, _ = step_and_reference(batch, window, soft_cap, sink_logits)
    assert relative_error(output, expected) < TOLERANCE[dtype]


def test_a_sink_is_compared_with_the_whole_score(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, sink_logits = make_sink_batch("k4v4", seq_lens=(40, 1200), queries=(1, 1))
    make = LayerOperands.of
    monkeypatch.setattr(LayerOperands, "of", lambda *args: without_key_constants(make(*args)))
    output, expected, _ = step_and_reference(batch)
    assert relative_error(output, expected) < TOLERANCE[torch.float32]
    output, expected, _ = step_and_reference(batch, sink_logits=sink_logits)
    assert relative_error(output, expected) > 1e-2


def test_a_negative_slot_is_not_written_and_none_without_keys() -> None:
    batch = make_batch("k4v4", seq_lens=(20, 30), queries=(1, 1), dtype=torch.bfloat16)
    before = batch.pool.clone()
    step = decode_step(batch.pool, batch.layout, torch.bfloat16, batch.constants, scale=1.0, window=None, soft_cap=None)
    output = torch.empty_like(batch.query)
    key = torch.randn(2, 2, 64).bfloat16()
    step(batch.query, key, key, output, StepPlan(batch.seq_lens, batch.block_table, torch.tensor([-1, -1])))
    assert torch.equal(batch.pool, before)
    step(batch.query, None, None, output, StepPlan(batch.seq_lens, batch.block_table, new_slots(batch)))
    assert torch.equal(batch.pool, before)


def test_a_result_does_not_depend_on_the_batch() -> None:
    seq_lens = (1, 17, 40, 900)
    batch = make_batch("k4v4", seq_lens=seq_lens, queries=(1,) * 4, dtype=torch.bfloat16, calibrated=True)
    together, _, _ = step_and_reference(batch)
    for r in range(4):
        one = slice(r, r + 1)
        alone = torch.empty_like(batch.query[one])
        step = decode_step(
            batch.pool, batch.layout, torch.bfloat16, batch.constants, scale=batch.scale, window=None, soft_cap=None
        )
        plan = StepPlan(batch.seq_lens[one], batch.block_table[one], new_slots(batch)[one])
        step(batch.query[one], None, None, alone, plan)
        assert torch.equal(alone, together[one])


def test_rows_may_stand_anywhere_in_the_batch() -> None:
    batch = make_batch("k4v4", seq_lens=(20, 30, 50), queries=(1, 1, 1), dtype=torch.bfloat16, calibrated=True)
    output, _, pool = step_and_reference(batch)
    step = decode_step(
        batch.pool, batch.layout, torch.bfloat16, batch.constants, scale=batch.scale, window=None, soft_cap=None
    )
    rows = torch.tensor([5, 0, 3])
    query = torch.full((7, *batch.query.shape[1:]), float("nan"), dtype=torch.bfloat16)
    query[rows] = batch.query
    apart = torch.full_like(query, float("nan"))
    step(query, None, None, apart, StepPlan(batch.seq_lens, batch.block_table, torch.full((7,), -1), rows))
    assert torch.equal(apart[rows], output)
    assert apart[[1, 2, 4, 6]].isnan().all()
    key, value = torch.zeros(7, 2, 64).bfloat16(), torch.zeros(7, 2, 64).bfloat16()
    last = torch.arange(3), batch.seq_lens - 1
    key[rows], value[rows] = batch.key[last], batch.value[last]
    rewind(batch)
    slots = torch.full((7,), -1)
    slots[rows] = new_slots(batch)
    plan = StepPlan(batch.seq_lens, batch.block_table, slots, rows)
    step(query, key, value, apart, plan)
    assert torch.equal(batch.pool, pool)
    assert torch.equal(apart[rows], output)


def test_a_step_says_which_tensors_it_takes() -> None:
    batch = make_batch("k4v4", seq_lens=(20,), queries=(1,), dtype=torch.bfloat16)
    step = decode_step(batch.pool, batch.layout, torch.bfloat16, batch.constants, scale=1.0, window=None, soft_cap=None)
    key = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    assert step.takes(batch.query, key, key, torch.empty_like(batch.query))
    assert not step.takes(batch.query, key.float(), key, torch.empty_like(batch.query))
    assert not step.takes(torch.zeros(1, 4, 128, dtype=torch.bfloat16)[..., ::2], None, None, batch.query)
    assert not step.takes(torch.zeros(1, 4, 80, dtype=torch.bfloat16)[..., :64], None, None, batch.query)
