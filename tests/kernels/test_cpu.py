"""CPU kernels against the reference, on the same quantized values."""

import pytest
import torch

from fraqtl_kernels import cpu, reference
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.cpu import prefill
from fraqtl_kernels.formats import CPU_HEAD_SIZES, FORMATS
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.residual import DISTANCE
from tests.kernels.conftest import (
    PagedBatch,
    make_batch,
    make_pool,
    make_sink_batch,
    relative_error,
    without_key_constants,
)
from tests.kernels.on_cpu import cpu_attend, cpu_write
from tests.kernels.transforms import without_centers

CALIBRATED = [name for name, f in FORMATS.items() if f.is_calibrated]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def error_of(
    batch: PagedBatch,
    window: int | None = None,
    soft_cap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> float:
    """Of attention in the step that writes the queries' own tokens."""
    options = {"scale": batch.scale, "window": window, "soft_cap": soft_cap, "constants": batch.constants}
    options["sink_logits"] = sink_logits
    running, residual = write_chunks(batch)
    expected = batch.attention(residuals=residual, **options)
    output = torch.full_like(batch.query, float("nan"))
    plan = cpu.plan_attention(batch.query_start.tolist(), batch.seq_lens.tolist())
    cpu_attend(batch.query, batch.pool, batch.layout, batch.block_table, plan, output, residuals=running, **options)
    return relative_error(output, expected)


def write_chunks(batch: PagedBatch) -> tuple[cpu.Residuals | None, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What `cpu.write` returns for the tokens of the queries, and what they and those before them add, by request."""
    layout, seq_lens, counts = batch.layout, batch.seq_lens.tolist(), batch.query_start.diff().tolist()
    residual, keys, values, slots = [], [], [], []
    for r, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
        table, token = batch.block_table[r], torch.arange(length)
        slot = table[token // layout.block_size].long() * layout.block_size + token % layout.block_size
        done = length - count  # what earlier steps have written: their residuals stand in the pages again
        earlier = batch.key[r, :done], batch.value[r, :done], slot[:done]
        reference.write(batch.pool, layout, *earlier, batch.constants)
        found = reference.page_residuals(batch.pool, layout, table, done, batch.constants)
        residual.append([torch.cat([x, x.new_zeros(count, *x.shape[1:])]) for x in found])
        keys.append(batch.key[r, done:length])
        values.append(batch.value[r, done:length])
        slots.append(slot[done:])
    chunk = torch.cat(keys), torch.cat(values), torch.cat(slots)
    running = cpu_write(batch.pool, layout, *chunk, batch.constants)
    for r, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
        table, first = batch.block_table[r], int(batch.query_start[r])
        if count == 1:
            residual[r] = list(reference.page_residuals(batch.pool, layout, table, length, batch.constants))
        elif running is not None:
            streams = (
                (running.key, layout.format.k, batch.constants.key.transform, 0),
                (
                    running.value,
                    layout.format.v,
                    batch.constants.value.transform,
                    1,
                ),
            )
            for rows, vector, transform, stream in streams:
                if rows is not None:
                    z = rows.tokens[first : first + count].double()
                    residual[r][stream][length - count :] = reference.restore_residual(z, vector, transform)
    return running, [(key, value) for key, value in residual]


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("size", CPU_HEAD_SIZES)
@pytest.mark.parametrize("soft_cap", [None, 20.0])
def test_calibrated_vectors(name: str, size: int, soft_cap: float | None) -> None:
    batch = make_batch(
        name, head_size=size, seq_lens=(5, 64, 33, 90), queries=(5, 1, 20, 1), group=4, calibrated=True, padding=48
    )
    if FORMATS[name].k.calibrated:
        flags = batch.layout.planes(batch.pool).k_scale[batch.block_table[3, :5].long()].signbit()
        assert flags.any() and not flags.all()  # both centers are in use
    assert error_of(batch, None, soft_cap) < 2e-5


@pytest.mark.parametrize("size", CPU_HEAD_SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decode(format_name: str, size: int, dtype: torch.dtype) -> None:
    batch = make_batch(format_name, head_size=size, dtype=dtype)
    assert error_of(batch) < TOLERANCE[dtype]


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 8), (4, 1), (2, 4), (3, 2)])
def test_mqa_mha_and_gqa_in_a_mixed_batch(format_name: str, kv_heads: int, group: int) -> None:
    batch = make_batch(
        format_name, kv_heads=kv_heads, group=group, seq_lens=(5, 64, 33, 18, 90), queries=(5, 1, 7, 1, 40), padding=48
    )
    assert error_of(batch) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("head_size", "kv_heads", "group", "window", "soft_cap"),
    [(64, 1, 8, None, None), (80, 3, 1, 33, None), (96, 2, 3, 1, None), (64, 2, 3, 50, 3.0)],
)
def test_sink_logits(
    format_name: str, head_size: int, kv_heads: int, group: int, window: int | None, soft_cap: float | None
) -> None:
    """In prompts, chunks and decodes, one of them in several runs."""
    of = {"head_size": head_size, "kv_heads": kv_heads, "group": group, "padding": 48}
    batch, sink_logits = make_sink_batch(format_name, seq_lens=(5, 64, 33, 530), queries=(5, 1, 20, 1), **of)
    assert error_of(batch, window, soft_cap, sink_logits) < 2e-5


@pytest.mark.parametrize("logit", [-torch.inf, -200.0, 200.0])
def test_sinks_that_take_nothing_or_all(logit: float) -> None:
    batch, sink_logits = make_sink_batch("k4v4", seq_lens=(40, 33), queries=(1, 20))
    assert error_of(batch, sink_logits=torch.full_like(sink_logits, -torch.inf)) < 2e-5
    output, sinks = torch.empty_like(batch.query), torch.full_like(sink_logits, logit)
    plan = cpu.plan_attention([0, 1, 21], [40, 33])
    write_chunks(batch)
    options = {"scale": batch.scale, "constants": batch.constants, "residuals": cpu.Residuals(None, None)}
    read = batch.query, batch.pool, batch.layout, batch.block_table, plan
    cpu_attend(*read, output, sink_logits=sinks, **options)
    without = torch.empty_like(batch.query)
    cpu_attend(*read, without, **options)
    torch.testing.assert_close(output, without if logit < 0 else torch.zeros_like(output))


@pytest.mark.parametrize(("length", "count"), [(40, 1), (40, 20), (530, 1)])
def test_a_sink_is_compared_with_the_whole_score(length: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is not blind: scores without the center's constant are right for softmax alone."""
    batch, sink_logits = make_sink_batch("k4v4", seq_lens=(length,), queries=(count,))
    make = cpu.LayerOperands.of
    monkeypatch.setattr(cpu.LayerOperands, "of", lambda *args: without_key_constants(make(*args)))
    assert error_of(batch) < 2e-5
    assert error_of(batch, sink_logits=sink_logits) > 1e-2


@pytest.mark.parametrize("residue", range(16))
def test_every_length_modulo_the_block_size(format_name: str, residue: int) -> None:
    batch = make_batch(format_name, seq_lens=(32 + residue, 1 + residue), queries=(3 + residue, 1))
    assert error_of(batch) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("window", [1, 15, 16, 17, 50, 1000])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_sliding_window_and_soft_cap(format_name: str, window: int, soft_cap: float | None) -> None:
    batch = make_batch(format_name, seq_lens=(7, 61, 100, 100), queries=(7, 1, 30, 1))
    assert error_of(batch, window, soft_cap) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("window", [None, 40])
def test_many_small_tiles_give_the_same(format_name: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "TILE_TOKENS", 32)
    monkeypatch.setattr(prefill, "PIECE_FLOATS", 16 * 256)
    monkeypatch.setattr(prefill, "BLOCK_ROWS", 9)
    batch = make_batch(format_name, seq_lens=(7, 161, 100, 64, 16), queries=(7, 1, 100, 1, 1))
    assert error_of(batch, window) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("window", [None, 40])
def test_a_prompt_in_chunks_gets_the_same_bits(format_name: str, window: int | None) -> None:
    batch = make_batch(format_name, seq_lens=(700,), queries=(700,), dtype=torch.bfloat16)
    options = {"scale": batch.scale, "window": window, "constants": batch.constants}
    whole, pieces = torch.empty_like(batch.query), torch.empty_like(batch.query)
    read = (batch.pool, batch.layout, batch.block_table)
    running, _ = write_chunks(batch)
    cpu_attend(batch.query, *read, cpu.plan_attention([0, 700], [700]), whole, residuals=running, **options)
    for first, last in ((0, 259), (259, 262), (262, 700)):
        query, table = batch.query[first:last], batch.block_table[0]
        token = torch.arange(first, last)
        slots = table[token // batch.layout.block_size].long() * batch.layout.block_size
        key, value = batch.key[0, first:last], batch.value[0, first:last]
        running = cpu_write(
            batch.pool, batch.layout, key, value, slots + token % batch.layout.block_size, batch.constants
        )
        plan = cpu.plan_attention([0, last - first], [last])
        if running is None:  # formats without residuals: keep even three queries on this path
            running = cpu.Residuals(None, None)
        cpu_attend(query, *read, plan, pieces[first:last], residuals=running, **options)
    assert torch.equal(whole, pieces)


def test_blocks_that_a_window_has_freed_are_not_read(format_name: str) -> None:
    batch = make_batch(format_name, seq_lens=(100,), queries=(1,))
    batch.block_table[0, :4] = 0  # block 0 is still poison: vLLM's null block
    batch.query[:] = torch.randn_like(batch.query)
    output = torch.empty_like(batch.query)
    plan = cpu.plan_attention([0, 1], [100])
    options = {"scale": 0.1, "window": 30, "constants": batch.constants}
    cpu_attend(batch.query, batch.pool, batch.layout, batch.block_table, plan, output, **options)
    assert output.isfinite().all()


def test_a_larger_context_moves_the_output() -> None:
    """The comparison above is not blind: hiding one key is an error far above the tolerance."""
    batch = make_batch("k4v4", seq_lens=(40,), queries=(1,))
    full = torch.empty_like(batch.query)
    plan = cpu.plan_attention([0, 1], [40])
    cpu_attend(batch.query, batch.pool, batch.layout, batch.block_table, plan, full, scale=batch.scale)
    short = torch.empty_like(batch.query)
    plan = cpu.plan_attention([0, 1], [39])
    cpu_attend(batch.query, batch.pool, batch.layout, batch.block_table, plan, short, scale=batch.scale)
    assert relative_error(short, full) > 1e-3


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("calibrated", [False, True])
def test_write_stores_what_the_reference_stores(format_name: str, dtype: torch.dtype, calibrated: bool) -> None:
    layout = PageLayout(FORMATS[format_name], 96, 32)
    tokens, heads = 41, 3
    # Strided views, as a fused QKV projection gives them
    qkv = torch.randn(tokens, 4 * heads * 96, dtype=dtype)
    key = qkv[:, heads * 96 : 2 * heads * 96].view(tokens, heads, 96)
    value = qkv[:, 3 * heads * 96 :].view(tokens, heads, 96)
    constants = IDENTITY
    if calibrated or layout.format.needs_calibration:
        key[::9] += 50 * key[0]
        constants = calibrate(layout.format, key, torch.randn(8, 2 * heads, 96), value)
    # A block's begin, single tokens, a run over the edge of two blocks, and tokens that are padding
    slots = torch.tensor([*range(64, 76), 3, 170, 130, *range(23, 49)])
    slots[[3, 17, 40]] = -1
    ours, theirs = (make_pool(layout, 6, heads, padding=64) for _ in range(2))
    cpu_write(ours, layout, key, value, slots, constants)
    reference.write(theirs, layout, key, value, slots, constants)
    used = slots[slots >= 0]
    residual_slots = used[used % 32 + DISTANCE < 32] + DISTANCE
    residual_slots = residual_slots[~torch.isin(residual_slots, used)]
    for get in (lambda p: (p.k, p.k_scale, layout.format.k), lambda p: (p.v, p.v_scale, layout.format.v)):
        (a, a_scale, vector), (b, b_scale, _) = (get(layout.planes(pool)) for pool in (ours, theirs))
        a, b = (x.transpose(1, 2).flatten(0, 1) for x in (a, b))  # (slots, heads, bytes)
        if vector.has_residual:
            # Codes of what codes left: alike where the first ones are equal
            equal = (a[residual_slots - DISTANCE] == b[residual_slots - DISTANCE]).all(-1)
            fine = [reference.unpack(x[residual_slots][equal], vector).int() for x in (a, b)]
            assert equal.float().mean() > 0.5 and (fine[0] - fine[1]).abs().max() <= 1
        a, b = a[used], b[used]
        if vector.is_raw:
            assert torch.equal(a, b)
            continue
        # The reference rotates in float64. A value on the edge of two codes may fall to the other side, no more.
        steps = (reference.unpack(a, vector).int() - reference.unpack(b, vector).int()).abs()
        assert steps.max() <= 1 and steps.float().mean() < 5e-3  # bf16 numbers often lie on an edge
        if a_scale is not None:
            a_scale, b_scale = (x.transpose(1, 2).flatten(0, 1)[used].float() for x in (a_scale, b_scale))
            assert torch.allclose(a_scale, b_scale, rtol=2**-10, atol=0)
    rows = layout.planes(ours).k.view(torch.uint8).transpose(1, 2).flatten(0, 1)
    untouched = torch.ones(len(rows), dtype=torch.bool)
    untouched[torch.cat([used, residual_slots]) if layout.format.k.has_residual else used] = False
    assert (rows[untouched] == 0xFF).all()


def test_only_given_slots_are_written(format_name: str) -> None:
    layout = PageLayout(FORMATS[format_name], 64, 16)
    pool = make_pool(layout, 3, 2)
    before = pool.clone()
    key = torch.randn(2, 2, 64)
    constants = LayerConstants.of(key_scale=torch.ones(2, 64), value_scale=torch.ones(2, 64))
    cpu_write(pool, layout, key, key, torch.tensor([-1, -1, 5]), constants)  # mapping longer than the batch: padding
    assert torch.equal(pool, before)
    cpu_write(pool, layout, key, key, torch.tensor([-1, 16 + 5]), constants)
    changed = layout.planes((pool != before).to(torch.uint8))
    rows = (changed.k.view(torch.uint8) != 0).any(-1).nonzero()
    wanted = {5, 5 + DISTANCE} if layout.format.k.has_residual else {5}
    assert set(map(tuple, rows.tolist())) == {(1, head, slot) for head in range(2) for slot in wanted}


def test_the_default_dtype_does_not_matter(format_name: str) -> None:
    """vLLM builds layers with the model's dtype as torch's default."""
    batch = make_batch(format_name, seq_lens=(40, 33), queries=(20, 1))
    torch.set_default_dtype(torch.bfloat16)
    try:
        cpu.warm_up(FORMATS[format_name], torch.bfloat16)
        plan = cpu.plan_attention([0, 20, 21], [40, 33])
        output = torch.empty_like(batch.query)
        options = {"scale": batch.scale, "constants": batch.constants}
        cpu_attend(batch.query, batch.pool, batch.layout, batch.block_table, plan, output, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert output.dtype == torch.float32
    assert error_of(batch) < TOLERANCE[torch.float32]


def _filled(layout: PageLayout, pieces: list[int], key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    pool, start = torch.zeros(4, key.shape[1], 32, layout.page_bytes // 32, dtype=torch.uint8), 0
    constants = calibrate(layout.format, key, torch.randn(8, 6, 96), value)
    for n in pieces:
        slots = torch.arange(start, start + n)
        cpu_write(pool, layout, key[start : start + n], value[start : start + n], slots, constants)
        start += n
    return pool


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.is_quantized])
def test_bytes_of_a_token_do_not_depend_on_its_batch(name: str) -> None:
    """One by one, in small batches, or all at once over several threads: as chunking and preemption cut them."""
    layout = PageLayout(FORMATS[name], 96, 32)
    key, value = torch.randn(2, 120, 3, 96).unbind()
    key[::9] += 50 * key[0]
    state = torch.get_rng_state()
    pools = []
    for pieces in ([120], [1] * 120, [7, 13, 100]):
        torch.set_rng_state(state)
        pools.append(_filled(layout, pieces, key, value))
    assert pools[0].any()
    assert torch.equal(pools[0], pools[1]) and torch.equal(pools[0], pools[2])


@pytest.mark.parametrize("name", ["k8v8", "k4v4", "k3v3", "k4v2"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_scales_are_rounded_like_torch_rounds(name: str, calibrated: bool) -> None:
    """Zero, tiny (subnormal scales), huge (clamped), and broken vectors, next to ordinary ones."""
    layout = PageLayout(FORMATS[name], 64, 16)
    x = torch.randn(16, 1, 64)
    x[1], x[2], x[3], x[4] = 0, x[2] * 3e-6, x[3] * 1e-9, x[4] * 1e7
    x[5, 0, 7], x[6, 0, 7], x[7, 0, 7] = torch.nan, torch.inf, -torch.inf
    constants = IDENTITY
    if calibrated:
        constants = without_centers(layout.format, 64)
    ours, theirs = torch.zeros(2, 1, 1, 16, layout.page_bytes // 16, dtype=torch.uint8)
    cpu_write(ours, layout, x, x, torch.arange(16), constants)
    reference.write(theirs, layout, x, x, torch.arange(16), constants)
    for pages in (lambda p: p.k_scale, lambda p: p.v_scale):
        a, b = pages(layout.planes(ours)).float(), pages(layout.planes(theirs)).float()
        assert torch.allclose(a, b, rtol=2**-10, atol=2**-24, equal_nan=True)
    assert layout.planes(ours).k_scale.isnan().sum() >= 3
