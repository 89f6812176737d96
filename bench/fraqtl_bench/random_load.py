"""Random requests to a live server, and what came back, to compare reports with other sources."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

VOCABULARY = range(200, 2000)  # of the demo model: no special tokens
STOPS = ("e", " th", ".")
SETTLE_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """One request to /v1/completions. Aborted after so many chunks of its stream, or so many seconds."""

    id: str
    prompts: list[list[int]]
    n: int
    max_tokens: int
    stream: bool
    stop: str | None
    seed: int
    abort_chunks: int | None = None
    abort_seconds: float | None = None

    @property
    def aborts(self) -> bool:
        return self.abort_chunks is not None or self.abort_seconds is not None

    def body(self, model: str) -> dict[str, Any]:
        body = {"model": model, "prompt": self.prompts, "n": self.n, "max_tokens": self.max_tokens, "seed": self.seed}
        body |= {"stream": self.stream, "ignore_eos": True, "return_token_ids": True, "temperature": 1.0}
        return body | ({"stop": self.stop} if self.stop else {})


@dataclass
class Choice:
    tokens: int = 0
    stopped_by_string: bool = False


@dataclass
class Outcome:
    """What the client saw, and for aborted requests what the server listed afterwards."""

    choices: dict[int, Choice] = field(default_factory=dict)
    report: dict[str, Any] | None = None
    status: str = "finished"
    error: str | None = None


def make_jobs(count: int, seed: int, longest: int, answer: int) -> list[Job]:
    """Lengths 1 to `longest`, n 1 to 3, half with a prefix of one of four texts, one in five cut off."""
    rng = random.Random(seed)
    texts = [rng.choices(VOCABULARY, k=longest) for _ in range(4)]
    return [_job(f"job{i}", rng, texts, longest, answer) for i in range(count)]


def _job(name: str, rng: random.Random, texts: list[list[int]], longest: int, answer: int) -> Job:
    several = rng.random() < 0.1
    prompts = [_prompt(rng, texts, longest) for _ in range(2 if several else 1)]
    stream, aborts = rng.random() < 0.5, rng.random() < 0.2
    max_tokens = rng.randint(1, answer) if not aborts else rng.randint(answer, 3 * answer)
    n = 1 if several else rng.choice((1, 1, 2, 3))
    # Of several sequences that end by a stop string, nobody could say when, once their client has gone.
    stops = rng.random() < 0.2 and not (aborts and (several or n > 1))
    chunks = rng.randint(1, 40) if aborts and stream and rng.random() < 0.7 else None
    return Job(
        id=name,
        prompts=prompts,
        n=n,
        max_tokens=max_tokens,
        stream=stream,
        stop=rng.choice(STOPS) if stops else None,
        seed=rng.randrange(1 << 30),
        abort_chunks=chunks,
        abort_seconds=rng.uniform(0, 4) if aborts and chunks is None else None,
    )


def _prompt(rng: random.Random, texts: list[list[int]], longest: int) -> list[int]:
    # Mostly short ones: many at once, each of them growing, is what a full pool preempts.
    length = rng.randint(1, longest) if rng.random() < 0.3 else int(longest ** rng.random())
    shared = rng.choice(texts)[: rng.randint(0, length)] if rng.random() < 0.5 else []
    return shared + rng.choices(VOCABULARY, k=length - len(shared))


async def send_all(
    url: str,
    jobs: list[Job],
    concurrency: int,
    seconds: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Outcome]:
    """All jobs, so many at a time; by their ids.

    seconds: all the time there is; a job without an outcome by then gets one whose error says so.
    progress: called with how many are done, after each.
    """
    limit = asyncio.Semaphore(concurrency)
    outcomes: dict[str, Outcome] = {}
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one(job: Job) -> None:
            async with limit:
                outcomes[job.id] = await send(client, job, model)
                progress(len(outcomes))

        tasks = [asyncio.create_task(one(job)) for job in jobs]
        _, pending = await asyncio.wait(tasks, timeout=seconds)
        for task in pending:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in set(tasks) - pending:
            task.result()  # raises what it raised
    late = f"no answer when the {seconds:g} s for all requests were over" if seconds else ""
    return {job.id: outcomes.get(job.id) or Outcome(status="unknown", error=late) for job in jobs}


async def send(client: httpx.AsyncClient, job: Job, model: str) -> Outcome:
    outcome = Outcome()
    try:
        with suppress(TimeoutError, _HungUpError):
            await asyncio.wait_for(_exchange(client, job, model, outcome), job.abort_seconds)
        if job.aborts and outcome.report is None:
            await _look_up(client, job, outcome)
    except httpx.HTTPError as error:
        outcome.error = repr(error)
    return outcome


class _HungUpError(Exception):
    """The client has seen enough."""


async def _exchange(client: httpx.AsyncClient, job: Job, model: str, outcome: Outcome) -> None:
    options: dict[str, Any] = {"json": job.body(model), "headers": {"X-Request-Id": job.id}}
    if not job.stream:
        payload = (await client.post("/v1/completions", **options)).raise_for_status().json()
        _read(payload, outcome)
        return
    async with client.stream("POST", "/v1/completions", **options) as response:
        response.raise_for_status()
        seen = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            _read(json.loads(line.removeprefix("data: ")), outcome)
            seen += 1
            if seen == job.abort_chunks:
                raise _HungUpError


def _read(payload: dict[str, Any], outcome: Outcome) -> None:
    if "error" in payload:
        outcome.error = json.dumps(payload["error"])
        return
    outcome.report = payload.get("fraqtl") or outcome.report
    for choice in payload["choices"]:
        seen = outcome.choices.setdefault(choice["index"], Choice())
        seen.tokens += len(choice.get("token_ids") or ())
        seen.stopped_by_string |= isinstance(choice.get("stop_reason"), str)


async def _look_up(client: httpx.AsyncClient, job: Job, outcome: Outcome) -> None:
    """What the server lists of a request whose client has gone; waits until the engine has let go of it.

    A connection belongs to one of several API server processes: so each try is a new one.
    """
    outcome.status = "unknown"
    for _ in range(SETTLE_SECONDS * 5):
        answer = await client.get(f"/plugins/fraqtl/requests/cmpl-{job.id}", headers={"Connection": "close"})
        if answer.status_code == 200:
            record = answer.json()
            outcome.report, outcome.status = record["report"], record["status"]
            return
        await asyncio.sleep(0.2)
