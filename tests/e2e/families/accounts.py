"""Random requests to an engine, and whether its accounts say what a witness in its block manager saw."""

from __future__ import annotations

import random
from typing import Any

from fraqtl_serve.reports.report import Ledger
from fraqtl_vllm.accounting.schema import ACCOUNT_KEY, Account
from tests.e2e.accounts import Blocks, disputes
from tests.e2e.families.engine import FIRST_TOKEN, Engine
from tests.e2e.families.row import AccountsResult

REQUESTS = 60
LONGEST = 150  # tokens of a prompt
ANSWER = 40  # tokens at most
ABORT_AFTER = 20  # steps
REPORTED = ("tokens", "blocks", "shared_blocks", "loaded_blocks", "bytes", "baseline_bytes", "state_bytes")


def compare(engine: Engine, kv_format: str) -> AccountsResult:
    """Send the requests all at once, abort a few, and hold each last account against the witness."""
    first_line, preempted = len(engine.seen()), engine.preemptions
    sequences = _send(engine)
    accounts = _accounts(engine, sequences)
    lines = engine.seen()[first_line:]
    blocks = _blocks(engine)
    mismatches = disputes(lines)
    for request, sequence in sequences.items():
        end = next((line for line in lines if line["event"] == "end" and line["sequence"] == sequence), None)
        said = None if request not in accounts else _reported(kv_format, accounts[request])
        seen = None if end is None else _expected(end, blocks)
        if said != seen or said is None:
            mismatches.append(f"{request}: said {said}, seen {seen}")
    return AccountsResult(
        requests=len(sequences),
        aborted=sum(line["event"] == "end" and line["status"] == "FINISHED_ABORTED" for line in lines),
        with_shared_blocks=sum(any(map(len, account["shared"])) for account in accounts.values()),
        preemptions=engine.preemptions - preempted,
        mismatches=mismatches,
    )


def _send(engine: Engine) -> dict[str, str]:
    """Requests of random lengths, half of them with a prefix of one of two texts. Engine's ids by ours."""
    from vllm import SamplingParams

    rng = random.Random(1)
    tokens = range(FIRST_TOKEN, 256)
    texts = [rng.choices(tokens, k=LONGEST) for _ in range(2)]
    sequences = {}
    for number in range(REQUESTS):
        length = rng.randint(1, LONGEST)
        shared = rng.choice(texts)[: rng.randint(0, length)] if rng.random() < 0.5 else []
        prompt = shared + rng.choices(tokens, k=length - len(shared))
        params = SamplingParams(seed=number, max_tokens=rng.randint(1, ANSWER), ignore_eos=True)
        name = f"request{number}"
        sequences[name] = engine.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
    return sequences


def _accounts(engine: Engine, sequences: dict[str, str]) -> dict[str, Account]:
    """The last account of every request, by our ids. Runs the engine until all have ended."""
    vllm, found = engine.llm.llm_engine, {}
    engine.scheduler.send_accounts_to(0)  # the number of the one client that an engine in this process has
    ours = {sequence: name for name, sequence in sequences.items()}
    steps = 0
    while vllm.has_unfinished_requests():
        for output in vllm.step():
            if output.finished:
                found[output.request_id] = output.kv_transfer_params[ACCOUNT_KEY]
        steps += 1
        if steps == ABORT_AFTER:
            running = [request.request_id for request in engine.scheduler.running]
            vllm.abort_request([ours[sequence] for sequence in running[:: max(1, len(running) // 5)]])
            for last in engine.scheduler.take_last_accounts().get(0, []):
                found[ours[last.request_id]] = last.kv_transfer_params[ACCOUNT_KEY]
    return found


def _reported(kv_format: str, account: Account) -> dict[str, int]:
    """What a response would say."""
    report = Ledger(kv_format, accounts={"": account}).report()
    assert report is not None
    return {name: getattr(report, name) for name in REPORTED}


def _expected(end: dict[str, Any], blocks: Blocks) -> dict[str, int]:
    held = list(map(len, end["blocks"]))
    taken = [n * size for n, size in zip(held, blocks.sizes, strict=True)]
    return {
        "tokens": min(end["length"] - 1, end["written"]),
        "blocks": sum(held),
        "shared_blocks": sum(map(len, end["shared"])),
        "loaded_blocks": sum(map(len, end["loaded"])),
        "bytes": sum(n for n, keeps in zip(taken, blocks.keeps_states, strict=True) if not keeps),
        "baseline_bytes": sum(n * size for n, size in zip(held, blocks.baseline, strict=True)),
        "state_bytes": sum(n for n, keeps in zip(taken, blocks.keeps_states, strict=True) if keeps),
    }


def _blocks(engine: Engine) -> Blocks:
    """Of every group: by the tensors of the pool, and by heads, head sizes and the model's dtype."""
    pages = engine.llm.collective_rpc("fraqtl_pages")[0]
    number, layers = engine.config.model_config.dtype.itemsize, engine.layers
    baseline = [
        sum(2 * layers[name].num_kv_heads * layers[name].head_size for name in group.layer_names if name in layers)
        * number
        * group.kv_cache_spec.block_size
        for group in engine.groups
    ]
    return Blocks(pages["block_bytes"], tuple(baseline), pages["keeps_states"])
