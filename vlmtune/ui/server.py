"""The server of a search's page: serves its state, and takes requests to stop or propose trials."""

from collections.abc import Callable

from aiohttp import web

from vlmtune.errors import UserError
from vlmtune.ui import loopback
from vlmtune.ui.page import page
from vlmtune.ui.state import SearchFolder


def application(search: SearchFolder, token: str) -> web.Application:
    """The page of a search. See `loopback.application`."""

    async def state(_: web.Request) -> web.Response:
        return web.json_response(search.state())

    async def stop(request: web.Request) -> web.Response:
        data = await request.json()
        return _respond(lambda: search.stop(str(data.get("trial_id"))), "the trial stops at its next report")

    async def propose(request: web.Request) -> web.Response:
        data = await request.json()
        values = {str(name): str(value) for name, value in data.items()}
        return _respond(lambda: search.propose(values), "queued: the next trial has these values")

    routes = [
        web.get("/api/state", state),
        web.post("/api/stop", stop),
        web.post("/api/propose", propose),
    ]
    return loopback.application(page, routes, token)


def _respond(act: Callable[[], None], done: str) -> web.Response:
    try:
        act()
    except UserError as error:
        return web.json_response({"said": str(error)}, status=400)
    return web.json_response({"said": done})


def serve(folder: str, port: int) -> None:
    """Serve the page of a search until Ctrl-C.

    Args:
        port: 0 means any free port.

    Raises:
        ConfigError: the folder holds no search.
    """
    search = SearchFolder(folder)
    loopback.serve(lambda token: application(search, token), port)
