"""The chat page: questions about an image that is chosen in headless Chromium, to a real adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser_kit import needs_chromium, wait_for

from vlmtune.evaluation.chat import Chat
from vlmtune.ui.chat_page import chat_page, safe_suffix

QUESTION = "How many cups are there? <img src=x onerror=alert(1)>"


def test_names_in_the_page_stay_texts() -> None:
    text = chat_page("<b>best</b>", "a & b")
    assert "&lt;b&gt;best&lt;/b&gt;" in text and "a &amp; b" in text


def test_an_uploaded_file_name_gives_a_suffix_and_nothing_else() -> None:
    assert safe_suffix("photo.JPG") == ".jpg"
    assert safe_suffix("../../etc/passwd") == safe_suffix("a.sh") == safe_suffix("x.jpg/../y") == ".png"


@needs_chromium
@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
def test_a_person_chooses_an_image_and_gets_the_answer_that_chat_gives(
    serve: Callable[..., str], demo_adapter: Path, browser: Any
) -> None:
    image = demo_adapter.parent / "photo.jpg"
    expected = Chat.load(str(demo_adapter), 16, use_cpu=True).ask(str(image), QUESTION)
    browser.get(serve("chat", "--adapter", str(demo_adapter), "--ui", "--use_cpu", "--max_new_tokens", "16"))
    assert browser.find_element("tag name", "h1").text == demo_adapter.name
    browser.find_element("id", "question").send_keys("How many?")
    browser.find_element("id", "send").click()
    wait_for(lambda: "Choose an image first" in browser.find_element("id", "answers").text)
    browser.find_element("id", "image").send_keys(str(image))
    wait_for(lambda: browser.find_element("id", "shown").is_displayed())
    question = browser.find_element("id", "question")
    question.clear()
    question.send_keys(QUESTION)
    browser.find_element("id", "send").click()
    wait_for(lambda: len(browser.find_elements("css selector", ".turn")) == 2, 60)
    turn = browser.find_element("css selector", ".turn")
    shown_question, answer = (part.text for part in turn.find_elements("tag name", "p"))
    assert (shown_question, answer) == (QUESTION, expected.strip())
    assert len(browser.find_elements("tag name", "img")) == 1, "texts stay texts"
    broken = demo_adapter.parent / "broken.jpg"
    broken.write_bytes(b"no image")
    browser.find_element("id", "image").send_keys(str(broken))
    browser.find_element("id", "send").click()
    wait_for(lambda: len(browser.find_elements("css selector", ".turn")) == 3, 30)
    failed = browser.find_element("css selector", ".turn.failed")
    assert "the image" in failed.text and "/tmp" not in failed.text
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
