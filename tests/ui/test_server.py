"""The page in headless Chromium, and that nobody but its reader is served."""

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from browser_kit import needs_chromium, wait_for

HOSTILE = "<img src=x onerror=alert(1)>"


def ask(address: str, path: str, token: str | None, data: Any = None) -> tuple[int, str]:
    headers = {"Content-Type": "application/json", **({"X-Token": token} if token else {})}
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(address.partition("?")[0] + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def test_a_token_is_needed_and_mistakes_are_told(serve: Callable[..., str], running: Path) -> None:
    address = serve("ui", str(running))
    token = address.partition("token=")[2]
    assert ask(address, "api/state", None)[0] == ask(address, "api/state", "wrong")[0] == 403
    assert ask(address, f"api/stop?token={token}", None, {"trial_id": "t2"})[0] == 403, (
        "a form of another site"
    )
    assert json.loads(ask(address, "api/state", token)[1])["best"] == 1
    status, said = ask(address, "api/propose", token, {"lora_r": "5", "learning_rate": "1e-3"})
    assert status == 400 and "outside the search space" in json.loads(said)["said"]
    status, said = ask(address, "api/propose", token, {"lora_r": "8", "learning_rate": "1e-3"})
    assert status == 200 and list((running / "requests").glob("try-*.json"))


def texts_of(browser: Any, rows: str, cells: str = "th, td") -> list[list[str]]:
    """The texts of a table's cells, read in one script: the page draws its tables anew every two seconds."""
    script = (
        "return [...document.querySelectorAll(arguments[0])].map("
        "row => [...row.querySelectorAll(arguments[1])].map(cell => cell.innerText))"
    )
    texts: list[list[str]] = browser.execute_script(script, rows, cells)
    return texts


@needs_chromium
@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
def test_a_person_sees_trials_stops_one_and_proposes_one(
    serve: Callable[..., str], running: Path, finished: Path, browser: Any
) -> None:
    browser.get(serve("ui", str(running)))
    rows = wait_for(lambda: browser.find_elements("css selector", "#trials tr"))
    assert len(rows) == 3 and "best 0.5 (trial 1)" in browser.find_element("id", "line").text
    assert len(browser.find_elements("css selector", "#curves path")) == 1
    assert len(browser.find_elements("css selector", "#curves circle")) == 1, "one report is a point"
    assert browser.find_elements("tag name", "img") == [], "texts of the data stay texts"
    assert "onerror" in browser.find_element("id", "folder").text
    assert texts_of(browser, "#answers tr") == [
        ["question", "reference", "step 10", "step 20", "step 40"],
        [f"몇 명? {HOSTILE}", "4", HOSTILE, HOSTILE, "4"],
        ["red?", "no", "no", "yes", "yes"],
    ]
    changed = [text for row in texts_of(browser, "#answers tr", "td.changed") for text in row]
    assert changed == ["4", "yes"]
    browser.find_element("id", "trial").send_keys("trial 2")
    wait_for(lambda: "maybe" in browser.find_element("id", "answers").text)
    time.sleep(2.5)  # the page has drawn the state again
    assert "Trial 2" in browser.find_element("id", "whose").text
    browser.find_element("css selector", "#trials button").click()
    wait_for(lambda: "stops at its next report" in browser.find_element("id", "said").text)
    browser.find_element("name", "lora_r").send_keys("8")
    browser.find_element("name", "learning_rate").send_keys("0.002")
    browser.find_element("css selector", "#form button").click()
    wait_for(lambda: "queued" in browser.find_element("id", "said").text)
    assert list((running / "requests").glob("try-*.json"))
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.get(serve("ui", str(finished)))
    wait_for(lambda: "3/3 trials" in browser.find_element("id", "line").text)
    assert not browser.find_element("id", "propose").is_displayed()
    assert not browser.find_element("id", "answered").is_displayed(), "no answers are known"
