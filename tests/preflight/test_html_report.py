"""The preflight as a page that needs no other file."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from page_kit import Links

from vlmtune.config.settings import Settings
from vlmtune.data.cache import prepare_store
from vlmtune.data.samples import pick_samples
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.preflight.console_report import console_report
from vlmtune.preflight.html_report import html_report
from vlmtune.preflight.statistics import summarize
from vlmtune.preflight.summary import Summary

pytestmark = pytest.mark.timeout(180)


def test_the_page_needs_nothing_but_itself(
    summary: Summary, faulty_store: Store, configure: Callable[..., Settings]
) -> None:
    shown = pick_samples(faulty_store, DataSource.from_settings(configure()).scan().fragments)
    assert len(shown) == 12
    text = html_report(summary, shown)
    links = Links(text)
    assert links.targets
    assert all(target.startswith("data:image/jpeg;base64,") for target in links.targets)
    assert links.tags.count("img") == sum(len(sample.images) for sample in shown) >= 12
    assert "svg" in links.tags
    assert not {"script", "link", "iframe", "object"} & set(links.tags)
    assert not re.search(r"https?:|@import|url\(", text)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    for words in ("there is no such file", "data.jsonl:25", "this config", "How many people?", "<mark>"):
        assert words in text


def test_texts_of_the_data_cannot_become_part_of_the_page(
    tmp_path: Path, models: Path, ray_cluster: None
) -> None:
    rows = [
        {"instruction": f"<script>alert({number})</script>\x1b[31m", "output": "<img src=x>"}
        for number in range(6)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings.from_flags(
        {"data_path": str(tmp_path / "d.jsonl"), "model_name_or_path": str(models / "llava")}
    )
    source = DataSource.from_settings(settings)
    made = prepare_store(source, str(tmp_path / "cache"))
    found = summarize(made, settings, source.model.processor().tokenizer)
    text = html_report(found, pick_samples(made, source.scan().fragments))
    assert not {"script", "img"} & set(Links(text).tags)
    assert "&lt;script&gt;alert(" in text
    assert "\x1b" not in console_report(found, colour=False)
