"""Fill a Triton cache with the decode and write kernels that a first run launches, without a GPU.

    TRITON_CACHE_DIR=FOLDER python -m fraqtl_bench.gpu.precompile [--architecture 90]

To be run with the host's versions of Python and Triton: their files are part of the cache's keys. Where they differ,
kernels are compiled again, which costs time and nothing else. The launchers are called as on a GPU, with tensors of the
same shapes in main memory, and what they would launch is compiled.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fraqtl_bench import tune
from fraqtl_bench.gpu.checks import SHAPES as CHECK_SHAPES
from fraqtl_bench.gpu.first import GPU
from fraqtl_bench.kernels import cuda_arms
from fraqtl_bench.kernels.arms import UnavailableError
from fraqtl_bench.kernels.cuda_arms import Pages
from fraqtl_bench.kernels.packed import sample_constants
from fraqtl_bench.kernels.shapes import Inputs, Shape
from fraqtl_bench.tune.measure import TORCH_DTYPES
from fraqtl_bench.tune.variants import FIRST, Variant, second
from fraqtl_kernels.constants import IDENTITY
from fraqtl_kernels.formats import FORMATS
from fraqtl_kernels.gpu.aot import NoGpu, replaced

MULTIPROCESSORS = 132  # an H100 or H200: how a batch is split decides which kernels it takes
Job = tuple[str, str, Variant | None]  # format, shape, launch shape


def jobs() -> Iterator[Job]:
    variants = [Variant.parse(text) for text in FIRST]
    columns = [v for v in variants if v.tuning().transposed]
    more = [v for first in (*variants[:2], *columns[:2]) for v in second(first)]  # of the likeliest of either form
    for shape in tune.SHAPES:
        yield from (("k4v4", shape, variant) for variant in (*variants, *more))
        yield "bf16", shape, None
    for shape in (*GPU.error_shapes, CHECK_SHAPES["cuda"]):
        yield from ((format, shape, None) for format in ("bf16", "k8v8", "k8v4", "k4v4"))
    yield "k3v3", CHECK_SHAPES["cuda"], None


def empty_inputs(shape: Shape, block_size: int, dtype: torch.dtype) -> Inputs:
    """Inputs that nobody reads: memory that is never touched costs nothing."""
    key, value = (torch.empty(shape.batch, shape.context, shape.kv_heads, shape.head_size, dtype=dtype) for _ in "kv")
    query = torch.empty(shape.batch, shape.query_heads, shape.head_size, dtype=dtype)
    blocks = torch.zeros(shape.batch, -(-shape.context // block_size), dtype=torch.int32)
    return Inputs(shape, block_size, query, key, value, blocks)


def compile_job(job: Job, architecture: int) -> str | None:
    """Compile what a job launches; why not, if it can't be."""
    format, text, variant = job
    shape = Shape.parse(text)
    settings = variant or Variant(())
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> None:
        run(self, *args, **options | {"warmup": True})

    driver.set_active(NoGpu(architecture))
    constants = IDENTITY
    if settings.calibrated:
        constants = sample_constants(FORMATS[format], shape.head_size, shape.kv_heads, shape.query_heads)
    try:
        with (
            replaced(JITFunction, "run", compile_only),
            replaced(cuda_arms, "multiprocessors", lambda device: MULTIPROCESSORS),
        ):
            inputs = empty_inputs(shape, settings.block_size, TORCH_DTYPES[settings.dtype])
            pages = Pages.store(FORMATS[format], inputs, constants)
            pages.prepare(variant.tuning() if variant else None).call()
    except UnavailableError as reason:
        return str(reason)
    except Exception as error:  # ptxas gives up on some launch shapes; on a GPU they are skipped as well
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--most", type=int, help="only so many jobs")
    args = parser.parse_args(argv)
    start, todo = time.monotonic(), list(jobs())[: args.most]
    with ProcessPoolExecutor(args.jobs) as pool:
        reasons = list(pool.map(partial(compile_job, architecture=args.architecture), todo))
    for (format, shape, variant), reason in zip(todo, reasons, strict=True):
        if reason:
            print(f"{format} {shape} {variant.name if variant else ''}: {reason}")
    print(f"{len(todo) - sum(map(bool, reasons))} of {len(todo)} compiled in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
