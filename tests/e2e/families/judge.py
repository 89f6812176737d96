"""Holds what the engine answered against transformers, and says what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.e2e.families.models import Family
from tests.e2e.families.reference import Reference, Seen, rounding
from tests.e2e.families.row import FormatResult, Row, SequenceBytes, ServedResult
from tests.e2e.families.serve import DEFAULT, FormatRun, Run

# nat: float32 sums in another order tip a code over now and then. In the first tokens of a prompt nothing averages that
# out: of eight prompts of Gemma 3 two differ by less than 0.0005, and one, from its second token on, by up to 0.019
EQUAL = {"bf16": 5e-3, "k8v8": 3e-2}
FIRST_TOKENS = 4
TIE = 0.1  # nat: between the favourites of random weights often lies less than 8 bits can tell
ALIKE = 0.75  # of the texts begin as with an exact cache, if the codec moves log-probabilities by less than a tie
SLACK = 1.1  # of an error over its bound


def judge(family: Family, folder: Path, run: Run) -> Row:
    """The row of a family whose model is in `folder`."""
    row = Row(family.title, layers=run.layers, refused=run.refused, accounts=run.accounts)
    if run.refused or run.failed:
        row.problems += [run.failed] if run.failed else _refusal_problems(family, run.refused)
        return row
    if family.refused:
        row.problems.append("it is served now, but models.py says that it is refused")
    reference = Reference(folder)
    row.formats = {name: _compare(reference, name, one) for name, one in run.formats.items()}
    if run.bfloat16:
        row.served = _served(reference, run)
    row.problems += problems_of(row)
    return row


def _refusal_problems(family: Family, sentence: str) -> list[str]:
    expected = family.refused and sentence.startswith(family.refused)
    return [] if expected else [f"refused: {sentence}"]


def _compare(reference: Reference, kv_format: str, run: FormatRun) -> FormatResult:
    coded = rounding(kv_format, reference.layers, run.constants)
    seen = [reference.read(answer, coded) for answer in run.answers]
    exact = [reference.read(answer, None) for answer in run.answers]
    served = [answer.logprobs for answer in run.answers]
    return FormatResult(
        largest_difference=max(float((a - b.logprobs).abs().max()) for a, b in zip(served, seen, strict=True)),
        texts=len(run.answers),
        texts_of_transformers=sum(bool((one.lost <= EQUAL.get(kv_format, 0)).all()) for one in seen),
        texts_that_begin_alike=sum(bool((one.lost[:FIRST_TOKENS] <= TIE).all()) for one in exact),
        error=_error(served, exact),
        codec_error=_error([one.logprobs for one in seen], exact),
        scheduling=run.scheduling,
    )


def _served(reference: Reference, run: Run) -> ServedResult:
    errors = {
        name: _error([a.logprobs for a in answers], [reference.read(a, None) for a in answers])
        for name, answers in run.bfloat16.items()
    }
    packed, plain = run.pools[DEFAULT], run.pools["bf16"]
    return ServedResult(
        error=errors[DEFAULT],
        error_with_bf16=errors["bf16"],
        memory_bytes=packed["blocks"] * packed["block_bytes"],
        tokens=packed["tokens"],
        tokens_with_bf16=plain["tokens"],
        tokens_said_of_bf16=packed["baseline_tokens"],
        block_bytes=packed["block_bytes"],
        baseline_block_bytes=packed["baseline_block_bytes"],
        sequence=SequenceBytes(
            max_model_len=packed["max_model_len"],
            attention=packed["attention_bytes"],
            attention_with_bf16=plain["attention_bytes"],
            states=packed["state_bytes"],
            padding=packed["padding_bytes"],
        ),
    )


def problems_of(row: Row) -> list[str]:
    """What is wrong with a family that is served, a sentence each."""
    found = [f"{name}: {problem}" for name, result in row.formats.items() for problem in _of_format(name, result)]
    return [*found, *_of_accounts(row), *_of_bfloat16(row)]


def _of_format(name: str, result: FormatResult) -> Iterator[str]:
    if name in EQUAL and not result.largest_difference <= EQUAL[name]:
        yield f"log-probabilities differ by {result.largest_difference:.2g} from transformers"
    if name in EQUAL and result.texts_of_transformers < result.texts:
        yield f"{result.texts_of_transformers} of {result.texts} texts are those of transformers"
    if name in EQUAL and result.codec_error < TIE and result.texts_that_begin_alike < ALIKE * result.texts:
        yield f"{result.texts_that_begin_alike} of {result.texts} texts begin as with an exact cache"
    if not 0 < result.error <= SLACK * result.codec_error:
        yield f"error {result.error:.3f}, but the codec's is {result.codec_error:.3f}"
    scheduling = result.scheduling
    if not scheduling.cached_tokens:
        yield "no prompt was found in the prefix cache"
    if not scheduling.preemptions:
        yield "nothing was preempted, give the family fewer blocks"
    yield from (f"{what} changed a text" for what in scheduling.changed)


def _of_accounts(row: Row) -> Iterator[str]:
    accounts = row.accounts
    if accounts is None:
        return
    yield from (f"account of {mismatch}" for mismatch in accounts.mismatches[:3])
    if not (accounts.preemptions and accounts.with_shared_blocks and accounts.aborted):
        yield f"random requests were too tame: {accounts}"


def _of_bfloat16(row: Row) -> Iterator[str]:
    served = row.served
    if served is None:
        return
    if served.tokens_said_of_bf16 != served.tokens_with_bf16:
        yield f"bf16 would hold {served.tokens_said_of_bf16} tokens, it was said, but {served.tokens_with_bf16} fit"
    bound = SLACK * (row.formats[DEFAULT].codec_error ** 2 + served.error_with_bf16**2) ** 0.5
    if not 0 < served.error <= bound:
        yield f"{DEFAULT} in a bfloat16 model: error {served.error:.3f}, the bound is {bound:.3f}"


def _error(served: Sequence[Tensor], exact: Sequence[Seen]) -> float:
    """Root mean square of the differences."""
    differences = torch.cat([a - b.logprobs for a, b in zip(served, exact, strict=True)])
    return float(differences.square().mean().sqrt())
