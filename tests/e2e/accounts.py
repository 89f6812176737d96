"""Compares the reports of random requests with what a witness saw in the engine's block pool.

    python -m tests.e2e.accounts --requests 300 --out bench/results/cpu/accounting.json
    python -m tests.e2e.accounts --store --requests 500 --out bench/results/cpu/accounting-store.json
    python -m tests.e2e.accounts --drafts MODEL DRAFT --requests 60 --out accounting-drafts.json

Four servers: the demo model in a pool so small that requests are preempted, with and without speculation; a model
whose layers with sliding windows give blocks back; the demo model on two tensor-parallel ranks. A request that has no
answer when the server's --seconds are over is a mismatch. FRAQTL_KEEP_LOGS=1 keeps what the servers said.

With --drafts one server: a model of heads of 64 and one that drafts for it, both folders.
With --store one server: a small pool, a smaller memory beside it and a folder of files, from which evicted blocks come
back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from fraqtl_bench import results
from fraqtl_bench.random_load import Job, Outcome, make_jobs, send_all
from tests.e2e.random_models import NAS_KV_HEADS, random_gemma2, random_granite_hybrid, random_nemotron_nas
from tests.e2e.server import forked
from tests.e2e.witness import FILE

ROOT = Path(__file__).parents[2]
SEQUENCE = re.compile(r"^(?:(?P<child>\d+)_)?cmpl-(?P<job>job\d+)-(?P<prompt>\d+)-")
ANSWER = 120  # tokens, three times that for requests that will be aborted
SECONDS = 1800.0  # for all requests to a server: ten minutes on two cores with nothing else to do
PROGRESS = 30  # requests between two lines about how far it is
Line = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """A server: the model, its flags, and a pool of so many blocks for prompts of at most so many tokens."""

    arguments: tuple[str, ...]
    block_bytes: int  # of the group of layers that needs most, over all ranks: for the size of the pool only
    baseline: tuple[int, ...]  # bytes of a block in the model's own dtype, by group of layers, over all ranks
    blocks: int
    longest: int = 3000
    ranks: int = 1

    @property
    def flags(self) -> list[str]:
        memory = self.blocks * self.block_bytes // self.ranks
        return [
            *self.arguments,
            *("--kv-cache-memory-bytes", str(memory), "--max-model-len", str(self.longest + 3 * ANSWER)),
            *("--scheduler-cls", "tests.e2e.witness.witnessed_scheduler"),
            *("--worker-extension-cls", "tests.e2e.witness.Pages"),
        ]


# Worked out by hand: layers, KV heads, tokens, bytes of a key and a value.
DEMO_BLOCK, DEMO_BASELINE = 4 * 2 * 16 * 68, (4 * 2 * 16 * 2 * 64 * 2,)
GEMMA_BLOCK, GEMMA_BASELINE = 2 * 16 * 260, (2 * 16 * 2 * 256 * 2,) * 2
NAS_HEADS = sum(NAS_KV_HEADS)
NAS_BLOCK, NAS_BASELINE = NAS_HEADS * 16 * 68, (NAS_HEADS * 16 * 2 * 64 * 2,)
MIXED_BLOCK = 2 * 2 * 16 * (68 + 132)  # two layers in k4v4, two in k8v8
MIXED = Setup(("--kv-layers", "0,-1=k8v8"), MIXED_BLOCK, DEMO_BASELINE, blocks=240)
TINY_POOL = Setup((), DEMO_BLOCK, DEMO_BASELINE, blocks=240)  # one of the longest sequences

DRAFTS: dict[str, Any] = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
DRAFTS_IN_TINY_POOL = replace(TINY_POOL, arguments=("--speculative-config", json.dumps(DRAFTS)))


def two_ranks(longest: int = 3000) -> Setup:
    return Setup(
        ("--tensor-parallel-size", "2"), DEMO_BLOCK, DEMO_BASELINE, blocks=longest // 6, longest=longest, ranks=2
    )


def sliding_windows(folder: Path, *arguments: str, longest: int = 3000, ranks: int = 1) -> Setup:
    """One layer sees everything, one 32 tokens: two groups of one layer."""
    model = str(random_gemma2(folder))
    return Setup((model, *arguments), GEMMA_BLOCK, GEMMA_BASELINE, blocks=longest // 4, longest=longest, ranks=ranks)


def unlike_heads(folder: Path, longest: int = 3000) -> Setup:
    """A Nemotron-NAS: one group of layers, of which one has two KV heads and one has one."""
    model = str(random_nemotron_nas(folder))
    return Setup((model, "--trust-remote-code"), NAS_BLOCK, NAS_BASELINE, blocks=longest // 12, longest=longest)


def hybrid(folder: Path, longest: int = 600) -> Setup:
    """Two layers attend, four keep a state in their own groups: a block holds one of their states or 128 tokens."""
    model = str(random_granite_hybrid(folder))
    tokens, groups = 128, 4
    block, baseline = tokens * 2 * 2 * 68, tokens * 2 * 2 * 256
    flags = (model, "--mamba-ssm-cache-dtype", "float32")  # as vLLM chooses on some processors
    return Setup(flags, block, (*[0] * groups, baseline), blocks=40, longest=longest)


def with_drafts(model: Path, draft: Path, longest: int = 600) -> Setup:
    """Both models have heads of 64. Their pages are in the same blocks, those of drafts in 8 bits."""
    asked = {
        "method": "draft_model",
        "model": str(draft.resolve()),
        "num_speculative_tokens": DRAFTS["num_speculative_tokens"],
    }
    own, drafting = (16 * _kv_heads(folder) for folder in (model, draft))
    flags = (str(model.resolve()), "--speculative-config", json.dumps(asked))  # servers start in another folder
    return Setup(flags, own * 68 + drafting * 132, ((own + drafting) * 256,), blocks=longest // 6, longest=longest)


def _kv_heads(folder: Path) -> int:
    """Of all layers together."""
    config = json.loads((folder / "config.json").read_text())
    return int(config["num_hidden_layers"] * config["num_key_value_heads"])


def with_store(folder: Path, chunks: int = 24, longest: int = 600) -> Setup:
    """A pool of a few requests, and files behind a memory of so many blocks."""
    extra = {"cpu_bytes_to_use": chunks * 12288, "secondary_tiers": [{"type": "fs", "root_dir": str(folder)}]}
    offload = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    flags = ("--kv-transfer-config", json.dumps(offload))
    return Setup(flags, DEMO_BLOCK, DEMO_BASELINE, blocks=64, longest=longest)


@dataclass(frozen=True)
class Blocks:
    """By group of layers: bytes of a block over all ranks, the same in the model's own dtype, what it holds."""

    sizes: list[int]
    baseline: tuple[int, ...]  # 0 for states
    keeps_states: list[bool]
    drafts: int = 0
    """Tokens that a step may bring beyond one."""


@dataclass
class Comparison:
    requests: int
    seconds: float
    counts: dict[str, int]
    mismatches: list[str]


class _UnseenError(Exception):
    """The witness saw nothing at the moment at which a sequence must have ended."""


def compare(setup: Setup, requests: int, seed: int, concurrency: int = 24, seconds: float = SECONDS) -> Comparison:
    """Serve, send random requests, and hold every report against the witness."""
    jobs = make_jobs(requests, seed, setup.longest, ANSWER)
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "witness.jsonl"
        environment = {FILE: str(notes), "VLLM_SERVER_DEV_MODE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with forked(*setup.flags, environment=environment) as server:
            answer = httpx.post(f"{server.url}/collective_rpc", json={"method": "fraqtl_pages"}, timeout=60)
            ranks = answer.raise_for_status().json()["results"]
            began = time.monotonic()
            outcomes = asyncio.run(send_all(server.url, jobs, concurrency, seconds, Progress(len(jobs))))
            took = time.monotonic() - began
            accepted = accepted_drafts(server.url)
        lines = [json.loads(line) for line in notes.read_text().splitlines()]
    assert len(ranks) == setup.ranks, ranks
    block_bytes = [sum(sizes) for sizes in zip(*(rank["block_bytes"] for rank in ranks), strict=True)]
    drafts = DRAFTS["num_speculative_tokens"] if accepted else 0
    blocks = Blocks(block_bytes, setup.baseline, ranks[0]["keeps_states"], drafts)
    wrong = find_mismatches(jobs, outcomes, lines, blocks)
    counts = {**count(jobs, outcomes, lines), "accepted_drafts": accepted}
    return Comparison(requests, round(took, 1), counts, wrong)


def accepted_drafts(url: str) -> int:
    """By vLLM's own counter, which is there only with speculation."""
    lines = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text.splitlines()
    found = (line for line in lines if line.startswith("vllm:spec_decode_num_accepted_tokens_total"))
    return sum(int(float(line.rpartition(" ")[2])) for line in found)


class Progress:
    """A line now and then about how many requests are done."""

    def __init__(self, requests: int) -> None:
        self.requests = requests
        self.began = time.monotonic()

    def __call__(self, done: int) -> None:
        if done % PROGRESS == 0 or done == self.requests:
            print(f"{done} of {self.requests} requests, {time.monotonic() - self.began:.0f} s", file=sys.stderr)


def find_mismatches(
    jobs: list[Job],
    outcomes: dict[str, Outcome],
    lines: list[Line],
    blocks: Blocks,
) -> list[str]:
    by_job: dict[str, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if match := SEQUENCE.match(line["sequence"]):
            by_job[match["job"]][line["sequence"]].append(line)
    wrong = []
    for job in jobs:
        outcome = outcomes[job.id]
        if outcome.error:
            wrong.append(f"{job.id}: {outcome.error}")
            continue
        try:
            seen = expected(job, outcome, by_job[job.id], blocks)
        except _UnseenError as unseen:
            wrong.append(f"{job.id}: {unseen}")
            continue
        said = outcome.report and {key: outcome.report[key] for key in seen or {}}
        if said != seen:
            wrong.append(f"{job.id} ({outcome.status}, n={job.n}, stop={job.stop}): said {said}, seen {seen}")
    return wrong + disputes(lines)


def expected(
    job: Job,
    outcome: Outcome,
    sequences: dict[str, list[Line]],
    blocks: Blocks,
) -> dict[str, int] | None:
    """What the report must say, by the witness; None if the engine never saw the request."""
    ends = [
        line
        for key, seen in sequences.items()
        if (line := last_line(job, outcome, key, seen, blocks.drafts)) is not None
    ]
    if not ends:
        return None
    groups = range(len(blocks.sizes))
    held = [{number for end in ends for number in end["blocks"][g]} for g in groups]
    shared = [{number for end in ends for number in end["shared"][g]} for g in groups]
    loaded = [{number for end in ends for number in end["loaded"][g]} for g in groups]
    return {
        "tokens": sum(min(end["length"] - 1, end["written"]) for end in ends),
        "blocks": sum(map(len, held)),
        "shared_blocks": sum(map(len, shared)),
        "loaded_blocks": sum(map(len, loaded)),
        "bytes": sum(len(held[g]) * blocks.sizes[g] for g in groups if not blocks.keeps_states[g]),
        "baseline_bytes": sum(len(held[g]) * blocks.baseline[g] for g in groups),
        "state_bytes": sum(len(held[g]) * blocks.sizes[g] for g in groups if blocks.keeps_states[g]),
    }


def last_line(job: Job, outcome: Outcome, sequence: str, seen: list[Line], drafts: int = 0) -> Line | None:
    """The witness's line of the moment at which a sequence ended.

    A stop string is found by the API server, and the engine goes on until it hears of that: the
    sequence ended with the last token that the client got. A step with drafts may have made more: they are not in the
    text, but it held blocks for them.
    """
    match = SEQUENCE.match(sequence)
    assert match is not None
    prompt = int(match["prompt"])
    choice = outcome.choices.get(prompt * job.n + int(match["child"] or 0))
    length = None
    if outcome.status == "finished" and choice is not None and choice.stopped_by_string:
        length = len(job.prompts[prompt]) + choice.tokens
    elif outcome.status == "finished" and job.aborts and job.stop and job.n == 1 and outcome.report:
        length = outcome.report["tokens"] + 1  # it had stopped before the client could go
    if length is not None:
        lengths = range(length, length + drafts + 1)
        of_that_length = [line for line in seen if line["event"] != "preempted" and line["length"] in lengths]
        if not of_that_length:
            found = sorted({line["length"] for line in seen})
            raise _UnseenError(f"{sequence} ended at {length} tokens, {choice}, but was seen at {found}")
        return {**of_that_length[0], "length": length}
    return next((line for line in seen if line["event"] == "end"), None)


def disputes(lines: list[Line]) -> list[str]:
    """Moments at which the witness and the pool disagree, or requests held more than there is."""
    wrong = []
    for line in lines:
        if line["event"] != "output":
            if line["disputed"] or line["held"] + line["free"] != line["usable"]:
                wrong.append(f"pool: {line}")
            if sum(map(len, line["blocks"])) > line["usable"]:
                wrong.append(f"more than the pool: {line}")
    return wrong


def count(jobs: list[Job], outcomes: dict[str, Outcome], lines: list[Line]) -> dict[str, int]:
    """How much of everything the load had."""
    reports = [o.report for o in outcomes.values() if o.report]
    events = Counter(line["event"] for line in lines)
    longest = max(len(p) for job in jobs for p in job.prompts)
    return {
        "reports": len(reports),
        "aborted": sum(o.status == "aborted" for o in outcomes.values()),
        "streamed": sum(job.stream for job in jobs),
        "several_sequences": sum(job.n > 1 or len(job.prompts) > 1 for job in jobs),
        "stopped_by_string": sum(c.stopped_by_string for o in outcomes.values() for c in o.choices.values()),
        "with_shared_blocks": sum(report["shared_blocks"] > 0 for report in reports),
        "with_loaded_blocks": sum(report["loaded_blocks"] > 0 for report in reports),
        "preemptions": events["preempted"],
        "ends_checked_against_the_pool": events["end"] + events["preempted"],
        "fewest_free_blocks": min((line["free"] for line in lines if "free" in line), default=-1),
        "longest_prompt": longest,
        "shortest_prompt": min(len(p) for job in jobs for p in job.prompts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300, help="in the tiny pool; the others get a fifth of it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all requests to a server")
    parser.add_argument("--store", action="store_true", help="only the server with a store of blocks")
    parser.add_argument("--drafts", type=Path, nargs=2, metavar=("MODEL", "DRAFT"), help="only a server with these two")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {}
    only_one = args.store or args.drafts is not None
    with tempfile.TemporaryDirectory() as folder:
        setups = {
            "tiny pool": TINY_POOL,
            "speculation": DRAFTS_IN_TINY_POOL,
            "sliding windows": sliding_windows(Path(folder)),
            "two ranks": two_ranks(),
        }
        if args.store:
            setups = {"small pool and a store": with_store(Path(folder) / "store")}
        if args.drafts:
            setups = {"a draft model": with_drafts(*args.drafts)}
        for name, setup in setups.items():
            requests = args.requests if setup is TINY_POOL or only_one else max(1, args.requests // 5)
            comparison = compare(setup, requests, args.seed, seconds=args.seconds)
            found[name] = vars(comparison)
            print(
                f"{name}: {len(comparison.mismatches)} mismatches in {requests} requests, {comparison.counts}",
                flush=True,
            )
            print("\n".join(comparison.mismatches[:20]), flush=True)
    if args.out:
        chosen = "--store " if args.store else f"--drafts {args.drafts[0]} {args.drafts[1]} " if args.drafts else ""
        command = f"python -m tests.e2e.accounts {chosen}--requests {args.requests} --seed {args.seed}"
        results.save(args.out, {"command": command, "setups": found})
    if any(one["mismatches"] for one in found.values()):
        sys.exit("the reports are not what the pools held")


if __name__ == "__main__":
    main()
