"""The page of `vlmtune chat --ui`: an image, questions about it, and the answers of an adapter."""

import asyncio
from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aiohttp import web

from vlmtune.data.names import IMAGE_SUFFIXES
from vlmtune.errors import UserError
from vlmtune.html_page import document
from vlmtune.ui import loopback

MAX_IMAGE_BYTES = 64 * 2**20  # of a request with an uploaded image
STYLE = """
header { margin-bottom: 14px; }
form { display: grid; grid-template-columns: minmax(0, 340px) minmax(0, 1fr); gap: 18px; }
#drop { border: 2px dashed var(--line); border-radius: 10px; min-height: 220px; display: grid;
place-items: center; text-align: center; padding: 10px; cursor: pointer; color: var(--soft); }
#drop.over, #drop:focus-within { border-color: var(--bar); }
#drop img { max-width: 100%; max-height: 360px; border-radius: 6px; display: block; }
#drop input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.ask { display: flex; gap: 8px; margin-top: 12px; }
.ask input { font: inherit; flex: 1; min-width: 0; padding: 9px 12px; border: 1px solid var(--line);
border-radius: 8px; background: var(--page); color: var(--ink); }
.ask button { font: inherit; padding: 8px 18px; border-radius: 8px; border: 0; background: var(--bar);
color: var(--card); cursor: pointer; } .ask button:disabled { opacity: .5; cursor: default; }
#answers { display: grid; gap: 10px; align-content: start; }
#answers:empty::before { content: "Answers appear here."; color: var(--soft); }
.turn { border-left: 3px solid var(--bar); padding: 2px 0 2px 12px; overflow-wrap: anywhere; }
.turn p { margin: 0; white-space: pre-wrap; } .turn p:first-child { color: var(--soft); font-size: 13px; }
.turn.failed { border-color: var(--bad); }
@media (max-width: 700px) { form { grid-template-columns: 1fr; } #drop { min-height: 150px; } }
"""


def chat_page(adapter: str, base: str) -> str:
    """The whole document.

    Args:
        adapter, base: names of the adapter and of its base model, for the title.
    """
    script = files("vlmtune.ui").joinpath("chat.js").read_text(encoding="utf-8")
    body = f"""
<header><h1>{escape(adapter)}</h1><span class="soft wrap">an adapter of {escape(base)}</span></header>
<section><form id="form">
<div><label id="drop" aria-label="image"><span id="hint">Choose an image, or drop one here</span>
<img id="shown" alt="" hidden><input id="image" type="file" accept="image/*"></label>
<div class="ask"><input id="question" placeholder="Your question" autocomplete="off" required
aria-label="question"><button id="send">Ask</button></div></div>
<div id="answers" aria-live="polite"></div>
</form></section>"""
    return document("vlmtune chat", [body, f"<script>\n{script}</script>"], style=STYLE, policy=None)


def application(ask: Callable[[str, str], str], adapter: str, base: str, token: str) -> web.Application:
    """The page, and its one request: a form with `image`, the content of a file, and `question`.

    Args:
        ask: returns the answer to (path of an image, question). It is never called twice at the same time.
    """
    lock = asyncio.Lock()

    async def answer(request: web.Request) -> web.Response:
        form = await request.post()
        upload, question = form.get("image"), str(form.get("question", "")).strip()
        if not isinstance(upload, web.FileField) or not question:
            return web.json_response({"error": "an image and a question are needed"}, status=400)
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"image{safe_suffix(upload.filename)}"
            path.write_bytes(upload.file.read())
            try:
                async with lock:
                    text = await asyncio.to_thread(ask, str(path), question)
            except UserError as error:
                message = str(error).replace(str(path), "the image")
                return web.json_response({"error": message}, status=400)
        return web.json_response({"answer": text})

    routes = [web.post("/api/ask", answer)]
    return loopback.application(lambda: chat_page(adapter, base), routes, token, max_bytes=MAX_IMAGE_BYTES)


def safe_suffix(name: str) -> str:
    """The suffix of an image's file name, such as `.jpg`; `.png` for any other."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix in IMAGE_SUFFIXES else ".png"


def serve_chat(ask: Callable[[str, str], Any], adapter: str, base: str, port: int) -> None:
    """Serve the page until Ctrl-C. Port 0 means any free port."""
    loopback.serve(lambda token: application(ask, adapter, base, token), port)
