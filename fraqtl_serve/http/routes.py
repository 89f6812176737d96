"""JSON routes about the KV pool and the last requests, under `/plugins/fraqtl`.

`guard.KeyGuard` asks for the API key. Errors are raised as HTTPException, which vLLM's handlers turn into
OpenAI's error shape.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import BaseModel

from fraqtl_serve._vllm import ErrorResponse, get_prometheus_registry
from fraqtl_serve.http.guard import PREFIX
from fraqtl_serve.reports.capacity import Capacity, Load, read_load
from fraqtl_serve.reports.history import PoolHistory
from fraqtl_serve.reports.records import RING_SIZE, RequestRecord


class RequestList(BaseModel):
    requests: list[RequestRecord]


def load_now() -> Load:
    return read_load(get_prometheus_registry().collect())


def _of_state(request: Request, name: str) -> Any:
    """What the plugin keeps on the application once its engine is up; a server without an engine never has it."""
    value = getattr(request.app.state, name, None)
    if value is None:
        raise HTTPException(503, "the engine has not said what its KV pool is made of")
    return value


router = APIRouter(
    prefix=PREFIX,
    tags=["fraqtl"],
    # vLLM's handlers answer 400 where FastAPI would say 422.
    responses={"4XX": {"model": ErrorResponse}, 503: {"model": ErrorResponse}},
)


@router.get("/capacity")
def capacity(request: Request) -> Capacity:
    """What the KV pool holds, against the same memory in the model's own dtype."""
    answer: Capacity = _of_state(request, "fraqtl_pool").capacity(load_now())
    return answer


@router.get("/history")
def history(request: Request, since: Annotated[float, Query(allow_inf_nan=False)] = 0) -> PoolHistory:
    """Pool use over the last hour at most; `since`, in seconds since 1970, leaves out what is known."""
    answer: PoolHistory = _of_state(request, "fraqtl_history").later_than(since)
    return answer


@router.get("/requests")
def requests(request: Request, limit: Annotated[int, Query(ge=1, le=RING_SIZE)] = 50) -> RequestList:
    """The last requests that this API server process answered, the newest first."""
    return RequestList(requests=_of_state(request, "fraqtl_records").latest(limit))


@router.get("/requests/{request_id}")
def one_request(request: Request, request_id: str) -> RequestRecord:
    """One of the last requests, by the id of its response."""
    record: RequestRecord | None = _of_state(request, "fraqtl_records").get(request_id)
    if record is None:
        raise HTTPException(404, f"no request {request_id} among the last {RING_SIZE}")
    return record
