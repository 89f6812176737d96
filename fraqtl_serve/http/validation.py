"""Bodies that vLLM's validators stumble over.

Some of them take a field's type for granted (`structured_outputs: 3` ends in an AttributeError), and what they
raise then is answered as if the server had failed. It is the body that was wrong: that is 400.
"""

from __future__ import annotations

from types import TracebackType

from fastapi.dependencies.utils import request_body_to_args

from fraqtl_serve._vllm import init_logger
from fraqtl_serve.http.asgi import Application, Message, Receive, Scope, Send
from fraqtl_serve.http.errors import send_error

logger = init_logger("vllm.fraqtl.validation")


class ValidationErrorMiddleware:
    """ASGI middleware: 400 for an exception that came while FastAPI validated the body; others pass."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if started or not came_from_validation(error.__traceback__):
                raise
            logger.warning("%s: a body that could not be validated: %r", scope["path"], error)
            await send_error(send, 400, f"the body isn't valid, a field has a value of a wrong type: {error}")


def came_from_validation(traceback: TracebackType | None) -> bool:
    """Whether FastAPI was still making the handler's arguments of the body: no handler has run."""
    while traceback is not None:
        if traceback.tb_frame.f_code is request_body_to_args.__code__:
            return True
        traceback = traceback.tb_next
    return False
