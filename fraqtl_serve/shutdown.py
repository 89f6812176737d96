"""A stop that ends.

When vLLM's server is told to stop while it generates, it kills the engine and then waits for open
connections; a request that the dead engine will never answer can keep it waiting for ever. uvicorn
has a limit for that wait, which vLLM leaves unset.
"""

from __future__ import annotations

from fraqtl_serve.asgi import Application, Receive, Scope, Send

CONNECTION_SECONDS = 3  # the engine has stopped by then: nothing more can come


class BoundedShutdown:
    """ASGI middleware that sets uvicorn's limit when the application starts, unless it is set."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            server = getattr(scope["app"].state, "server", None)
            if server is not None and server.config.timeout_graceful_shutdown is None:
                server.config.timeout_graceful_shutdown = CONNECTION_SECONDS
        await self.app(scope, receive, send)
