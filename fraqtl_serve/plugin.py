"""`vllm.endpoint_plugins`: puts the reports on vLLM's own FastAPI application."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from fraqtl_serve._vllm import init_logger
from fraqtl_serve.cli import banner
from fraqtl_serve.cli.start_errors import start_is_over
from fraqtl_serve.engine import beams, grammars, tracing
from fraqtl_serve.engine.accounting import Accounting, ask_for_accounts
from fraqtl_serve.http import openapi, shutdown
from fraqtl_serve.http.body_limit import DEFAULT_BYTES, BodyLimit
from fraqtl_serve.http.errors import ErrorShape
from fraqtl_serve.http.guard import KeyGuard, XApiKey, api_keys
from fraqtl_serve.http.report_middleware import ReportMiddleware
from fraqtl_serve.http.routes import load_now, router
from fraqtl_serve.http.upgrades import DeclinedUpgrades
from fraqtl_serve.http.validation import ValidationErrorMiddleware
from fraqtl_serve.page import router as page_router
from fraqtl_serve.reports.capacity import make_pool
from fraqtl_serve.reports.history import History
from fraqtl_serve.reports.metrics import Metrics
from fraqtl_serve.reports.records import Records, record_of
from fraqtl_serve.reports.report import Ledger
from fraqtl_vllm import layer_formats
from fraqtl_vllm.accounting.pool import METHOD
from fraqtl_vllm.start import garbage

logger = init_logger("vllm.fraqtl")


class FraqtlEndpoints:
    """See vLLM's EndpointPlugin protocol."""

    name = "fraqtl"
    required_tasks: tuple[str, ...] | None = None  # embeddings are guarded and bounded like everything else

    def attach_router(self, app: FastAPI) -> None:
        args = app.state.args
        in_body, in_usage = getattr(args, "fraqtl_report", True), getattr(args, "fraqtl_usage", True)
        keys = api_keys(args)
        app.include_router(router)
        app.include_router(page_router)
        openapi.extend(app, in_body=in_body, in_usage=in_usage, asks_for_key=bool(keys))
        app.add_middleware(shutdown.Shutdown)
        app.add_middleware(DeclinedUpgrades)
        app.add_middleware(ReportMiddleware, in_body=in_body, in_usage=in_usage)
        app.add_middleware(ValidationErrorMiddleware)
        app.add_middleware(BodyLimit, limit=getattr(args, "max_body_bytes", DEFAULT_BYTES))
        if keys:
            app.add_middleware(KeyGuard, keys=keys)
        # What is added here comes inside vLLM's own check of the key; --middleware is for what comes outside.
        outside = [XApiKey, ErrorShape] if keys else [ErrorShape]
        args.middleware = [*args.middleware, *(f"{each.__module__}.{each.__qualname__}" for each in outside)]

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if engine_client is None:
            return
        kv_format = layer_formats.name_of(engine_client.vllm_config)
        records, metrics = Records(), Metrics()

        def keep(ledger: Ledger) -> None:
            record = record_of(ledger)
            records.add(record)
            metrics.observe(record)

        accounting = Accounting(kv_format, keep)
        if (obstacle := await ask_for_accounts(engine_client)) is None:
            beams.watch()
            accounting.watch(engine_client)
            state.fraqtl_accounting = accounting
        else:
            logger.warning(
                "no response will say what KV memory it used, the engine doesn't tell (%s): "
                "start with fraqtl-serve serve, or add "
                "--scheduler-cls fraqtl_vllm.accounting.scheduler.accounting_scheduler",
                obstacle,
            )
        grammars.watch(engine_client.output_processor)
        tracing.watch(engine_client.output_processor, accounting.report_of)
        state.fraqtl_stop = shutdown.watch(engine_client, asyncio.get_running_loop())
        workers = await engine_client.collective_rpc(METHOD)  # of the first engine: the others are its equals
        pool = make_pool(
            kv_format,
            workers[0],
            str(engine_client.vllm_config.model_config.dtype).removeprefix("torch."),
            engines=len(engine_client.engine_core.engine_ranks_managed),
            kv_formats=layer_formats.by_layer(engine_client.vllm_config),
        )
        metrics.set_pool(pool)
        start_is_over()
        state.fraqtl_history = History()
        # The loop keeps no task alive by itself: the state does.
        state.fraqtl_sampler = asyncio.create_task(state.fraqtl_history.keep(lambda: load_now().pool_use))
        state.fraqtl_pool, state.fraqtl_records = pool, records
        garbage.collect_as_usual()
        state.fraqtl_announcement = asyncio.create_task(
            banner.announce(pool.capacity(load_now()), args, engine_client, state)
        )
