"""The last block of a start: what is served, how much fits, where it answers, and a request to paste."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from argparse import Namespace
from typing import Any

import httpx

from fraqtl_serve.http.guard import PREFIX, api_keys
from fraqtl_serve.reports.capacity import Capacity
from fraqtl_vllm.start import progress

QUESTION = "What is the capital of France?"
DEMO_QUESTION = "The code for apple is 4821. The code for tiger is 1357.\nWhat is the code for apple?"
ANYWHERE = (None, "", "0.0.0.0", "::")


def base_url(args: Namespace) -> str:
    """Where a client on this machine finds the server."""
    scheme = "https" if getattr(args, "ssl_certfile", None) else "http"
    host = "127.0.0.1" if args.host in ANYWHERE else args.host
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}"


def block(capacity: Capacity, args: Namespace, *, name: str, tasks: tuple[str, ...], has_chat_template: bool) -> str:
    """The text. name: what the model is called in requests."""
    url = base_url(args)
    root = (getattr(args, "root_path", None) or "").rstrip("/")
    size = f"{capacity.pool_bytes / 2**20:,.0f} MiB"
    fits = f"{capacity.kv_format}: {capacity.tokens:,} tokens fit into {size}, {capacity.baseline_tokens:,} would in "
    lines = [
        ("model", name),
        ("KV cache", f"{fits}{capacity.baseline_dtype}"),
        ("API", f"{url}{root}/v1"),
        ("page", f"{url}{root}{PREFIX}/"),
    ]
    if "generate" in tasks:
        lines.append(("ask it", request(f"{url}{root}", name, chat=has_chat_template, key=bool(api_keys(args)))))
    return "\n".join(f"  {label:10}{text}" for label, text in lines)


def request(url: str, name: str, *, chat: bool, key: bool) -> str:
    """A command to paste into a shell."""
    question = DEMO_QUESTION if name == "fraqtl-demo" else QUESTION
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": question}]} if chat else {"prompt": "The capital"}
    path = "chat/completions" if chat else "completions"
    # Greedily, as the small models that answer here are at their best; a base model never ends by itself
    body = json.dumps({"model": name, **asked, "temperature": 0, **({} if chat else {"max_tokens": 32})})
    header = ' -H "Authorization: Bearer $API_KEY"' if key else ""
    command = f"curl {url}/v1/{path}{header} -H 'Content-Type: application/json'"
    return f"{command} \\\n              -d {shlex.quote(body)}"


async def until_answered(args: Namespace, state: Any) -> None:
    """Returns once a request from outside has been answered."""
    while not getattr(getattr(state, "server", None), "started", False):
        await asyncio.sleep(0.05)
    transport = httpx.AsyncHTTPTransport(uds=args.uds, verify=False) if getattr(args, "uds", None) else None
    async with httpx.AsyncClient(transport=transport, verify=False, trust_env=False, timeout=5) as client:
        while True:
            try:
                if (await client.get(f"{base_url(args)}/health")).status_code < 500:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.1)


async def announce(capacity: Capacity, args: Namespace, engine_client: Any, state: Any) -> None:
    """Wait for the server to answer, then print the block, if lines of progress are asked for."""
    if progress.SWITCH not in os.environ or getattr(engine_client.engine_core, "client_index", 0) != 0:
        return
    await until_answered(args, state)
    name = args.served_model_name[0] if args.served_model_name else args.model
    tokenizer = engine_client.tokenizer
    text = block(
        capacity,
        args,
        name=name,
        tasks=tuple(await engine_client.get_supported_tasks()),
        has_chat_template=bool(args.chat_template or getattr(tokenizer, "chat_template", None)),
    )
    progress.say("ready")
    print(f"\n{text}\n", file=sys.stderr, flush=True)
