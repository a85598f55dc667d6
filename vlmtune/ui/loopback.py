"""A web server for pages on this machine only. Each request needs the token of the printed address."""

import asyncio
import hmac
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from aiohttp import web

from vlmtune.console import console_line

HOST = "127.0.0.1"
POLICY = (
    "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob:; "
    "frame-ancestors 'none'; form-action 'none'"
)


def application(
    page: Callable[[], str], routes: Iterable[web.RouteDef], token: str, *, max_bytes: int = 100_000
) -> web.Application:
    """A page at `/` and its further routes.

    Args:
        page: makes the whole document.
        token: the token that requests need, in the address (page) or in the header X-Token (all others).
        max_bytes: the largest size of a request.
    """

    @web.middleware
    async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("X-Token") or request.query.get("token", "")
        if request.method == "POST" and "X-Token" not in request.headers:
            given = ""  # another site's form cannot set a header
        local = request.host.partition(":")[0] in (HOST, "localhost")
        if not local or not hmac.compare_digest(given.encode(), token.encode()):
            raise web.HTTPForbidden(text="the address with its token, as the command printed it, is needed")
        response: web.StreamResponse = await handler(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        return response

    async def index(_: web.Request) -> web.Response:
        return web.Response(text=page(), content_type="text/html")

    app = web.Application(middlewares=[guard], client_max_size=max_bytes)
    app.add_routes([web.get("/", index), *routes])
    return app


def serve(make: Callable[[str], web.Application], port: int) -> None:
    """Serve an application until Ctrl-C, and print its address.

    Args:
        make: makes the application for a new token.
        port: 0 means any free port.
    """
    token = secrets.token_urlsafe(16)
    asyncio.run(_run(make(token), token, port))


async def _run(app: web.Application, token: str, port: int) -> None:
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, HOST, port).start()
    address = f"http://{HOST}:{runner.addresses[0][1]}/?token={token}"
    # Not `say`, which would leave the token out: whoever reads this console may have it.
    print(console_line("Page", f"{address}  (Ctrl-C ends it)"), flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
