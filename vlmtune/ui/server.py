"""The server of the page: loopback only, and each request needs the token of the printed address."""

import hmac
import secrets
from typing import Any

from aiohttp import web

from vlmtune.console import console_line, say
from vlmtune.errors import UserError
from vlmtune.ui.page import page
from vlmtune.ui.state import SearchFolder

HOST = "127.0.0.1"
POLICY = "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'"


def application(search: SearchFolder, token: str) -> web.Application:
    """The routes: the page, its state, and the two requests to the search.

    Args:
        token: what the page's address and the header X-Token must hold.
    """

    @web.middleware
    async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("X-Token") or request.query.get("token", "")
        if request.method == "POST" and "X-Token" not in request.headers:
            given = ""  # another site's form cannot set a header
        local = request.host.partition(":")[0] in (HOST, "localhost")
        if not local or not hmac.compare_digest(given.encode(), token.encode()):
            raise web.HTTPForbidden(text="the address with its token, as `vlmtune ui` printed it, is needed")
        response: web.StreamResponse = await handler(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        return response

    async def index(_: web.Request) -> web.Response:
        return web.Response(text=page(), content_type="text/html")

    async def state(_: web.Request) -> web.Response:
        return web.json_response(search.state())

    async def stop(request: web.Request) -> web.Response:
        data = await request.json()
        return _said(lambda: search.stop(str(data.get("trial_id"))), "the trial stops at its next report")

    async def propose(request: web.Request) -> web.Response:
        data = await request.json()
        values = {str(name): str(value) for name, value in data.items()}
        return _said(lambda: search.propose(values), "queued: the next trial has these values")

    app = web.Application(middlewares=[guard], client_max_size=100_000)
    app.add_routes(
        [
            web.get("/", index),
            web.get("/api/state", state),
            web.post("/api/stop", stop),
            web.post("/api/propose", propose),
        ]
    )
    return app


def _said(act: Any, done: str) -> web.Response:
    try:
        act()
    except UserError as error:
        return web.json_response({"said": str(error)}, status=400)
    return web.json_response({"said": done})


def serve(folder: str, port: int) -> None:
    """Serve the page of a search until Ctrl-C.

    Args:
        port: 0 takes a free one.

    Raises:
        ConfigError: the folder holds no search.
    """
    search = SearchFolder(folder)
    token = secrets.token_urlsafe(16)

    def started(address: str) -> None:
        say(console_line("Page", f"{address}/?token={token}  (Ctrl-C ends it)"))

    import asyncio

    asyncio.run(_run(application(search, token), port, started))


async def _run(app: web.Application, port: int, started: Any) -> None:
    import asyncio

    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, HOST, port)
    await site.start()
    started(f"http://{HOST}:{runner.addresses[0][1]}")
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
