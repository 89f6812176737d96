"""`vllm.endpoint_plugins`: puts the reports on vLLM's own FastAPI application."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from fraqtl_serve import banner, grammars, openapi, shutdown, tracing
from fraqtl_serve.accounting import Accounting
from fraqtl_serve.body_limit import DEFAULT_BYTES, BodyLimit
from fraqtl_serve.capacity import make_pool
from fraqtl_serve.errors import ErrorShape
from fraqtl_serve.guard import KeyGuard, api_keys
from fraqtl_serve.history import History
from fraqtl_serve.metrics import Metrics
from fraqtl_serve.middleware import ReportMiddleware
from fraqtl_serve.page import router as page_router
from fraqtl_serve.records import Records, record_of
from fraqtl_serve.report import Ledger
from fraqtl_serve.routes import load_now, router
from fraqtl_serve.validation import StumblingValidators
from fraqtl_vllm import garbage
from fraqtl_vllm.config import read_config
from fraqtl_vllm.pool import METHOD


class FraqtlEndpoints:
    """See vLLM's EndpointPlugin protocol."""

    name = "fraqtl"
    required_tasks: tuple[str, ...] | None = None  # embeddings are guarded and bounded like everything else

    def attach_router(self, app: FastAPI) -> None:
        args = app.state.args
        in_body, keys = getattr(args, "fraqtl_report", True), api_keys(args)
        app.include_router(router)
        app.include_router(page_router)
        openapi.extend(app, in_body=in_body, asks_for_key=bool(keys))
        app.add_middleware(shutdown.Shutdown)
        app.add_middleware(ReportMiddleware, in_body=in_body)
        app.add_middleware(StumblingValidators)
        app.add_middleware(BodyLimit, limit=getattr(args, "max_body_bytes", DEFAULT_BYTES))
        if keys:
            app.add_middleware(KeyGuard, keys=keys)
        # What is added here comes inside vLLM's own check of the key; --middleware is for what comes outside.
        args.middleware = [*args.middleware, f"{ErrorShape.__module__}.{ErrorShape.__qualname__}"]

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if engine_client is None:
            return
        kv_format = read_config(args.additional_config).kv_format
        records, metrics = Records(), Metrics()

        def keep(ledger: Ledger) -> None:
            record = record_of(ledger)
            records.add(record)
            metrics.observe(record)

        accounting = Accounting(kv_format, keep)
        accounting.watch(engine_client)
        grammars.watch(engine_client.output_processor)
        tracing.watch(engine_client.output_processor, accounting.report_of)
        state.fraqtl_stop = shutdown.watch(engine_client, asyncio.get_running_loop())
        ranks = await engine_client.collective_rpc(METHOD)
        model = engine_client.vllm_config.model_config
        pool = make_pool(
            kv_format,
            ranks,  # of the first engine: the others are its equals
            model.max_model_len,
            str(model.dtype).removeprefix("torch."),
            engines=len(engine_client.engine_core.engine_ranks_managed),
        )
        metrics.set_pool(pool)
        state.fraqtl_history = History()
        # The loop keeps no task alive by itself: the state does.
        state.fraqtl_sampler = asyncio.create_task(state.fraqtl_history.keep(lambda: load_now().pool_use))
        state.fraqtl_pool, state.fraqtl_records, state.fraqtl_accounting = pool, records, accounting
        garbage.collect_as_usual()
        state.fraqtl_announcement = asyncio.create_task(
            banner.announce(pool.capacity(load_now()), args, engine_client, state)
        )
