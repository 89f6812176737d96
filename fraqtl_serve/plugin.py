"""`vllm.endpoint_plugins`: puts the reports on vLLM's own FastAPI application."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from fraqtl_serve.accounting import Accounting
from fraqtl_serve.middleware import ReportMiddleware
from fraqtl_serve.shutdown import BoundedShutdown
from fraqtl_vllm.config import read_config


class FraqtlEndpoints:
    """See vLLM's EndpointPlugin protocol."""

    name = "fraqtl"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        args = app.state.args
        app.add_middleware(BoundedShutdown)
        app.add_middleware(ReportMiddleware, in_body=getattr(args, "fraqtl_report", True))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if engine_client is None:
            return
        accounting = Accounting(read_config(args.additional_config).kv_format)
        accounting.watch(engine_client)
        state.fraqtl_accounting = accounting
