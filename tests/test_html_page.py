"""The parts of an HTML page: valid, without anything that has to be loaded."""

import http.server
import threading
from pathlib import Path
from typing import Any

import pytest
from page_kit import Links, chromium, rendered

from vlmtune.html_page import document, section, table, tiles


def test_a_page_needs_no_other_file() -> None:
    page = document(
        "1 < 2", [section("Rows", "<p>3 rows</p>"), "", tiles([("3", "rows", "of 4")])], style="p {}"
    )
    links = Links(page)
    assert links.targets == []
    assert links.tags.count("section") == 1
    assert "<title>1 &lt; 2</title>" in page
    assert "url(" not in page and "@import" not in page
    assert page.index("p {}") < page.index("<body>")
    assert "\n\n" not in page[page.index("<main>") :]


def test_a_table_has_a_head_only_if_it_is_named() -> None:
    rows = ["<td>1</td><td>2</td>"]
    assert table(["a", "b"], rows).count("<tr>") == 2
    assert "<th>" not in table([], rows)


@pytest.mark.skipif(chromium() is None, reason="needs Chromium")
def test_a_page_runs_no_script_and_asks_no_server_even_if_a_text_were_html(tmp_path: Path) -> None:
    """The texts here stand in the page unescaped, as no text of data ever does."""
    requested: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}"
    hostile = f"""<p id=place></p><script>document.title = "ran"; fetch("{site}/fetch")</script>
        <img src="{site}/image" onerror="document.title = 'ran'"><svg onload="document.title = 'ran'"></svg>
        <iframe src="{site}/frame"></iframe><link rel=stylesheet href="{site}/style">
        <style>p {{ background: url({site}/background) }}</style><object data="{site}/object"></object>
        <video src="{site}/video" autoplay></video><base href="{site}/base/"><img src="relative">
        <meta http-equiv="refresh" content="0; url=javascript:document.title='ran'">"""
    (tmp_path / "page.html").write_text(document("still", [hostile]))
    (tmp_path / "open.html").write_text(hostile)
    after = rendered(tmp_path / "page.html", tmp_path / "profile")
    assert "<title>still</title>" in after and requested == []
    rendered(tmp_path / "open.html", tmp_path / "profile")  # what the same texts do without the policy
    assert {"/fetch", "/image", "/frame", "/style"} <= set(requested)
    server.shutdown()
    server.server_close()
