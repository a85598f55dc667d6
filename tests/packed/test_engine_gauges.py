"""What the dashboard's metrics page says of an engine and of trials, asked of a real Ray node."""

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from vlmtune.cluster import connect
from vlmtune.packed import engine_gauges
from vlmtune.packed.engine_gauges import EngineGauges
from vlmtune.training.gauges import DESCRIPTIONS, Gauges

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


@pytest.fixture
def page() -> Iterator[str]:
    connect()
    yield f"http://{ray.nodes()[0]['NodeManagerAddress']}:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    ray.shutdown()


@ray.remote(num_cpus=0)
class Worker:
    """Stays alive, as an engine does: metrics go to the node every few seconds."""

    def show(self) -> None:
        self.engine = EngineGauges("one")
        self.engine.show_slots(3, 8)
        for reason, seconds in (("trials", 0.3), ("decisions", 0.1)):
            with self.engine.waiting_for(reason):  # type: ignore[arg-type]
                time.sleep(seconds)
        self.trial = Gauges("trial-7", 0, None)
        self.trial(dict.fromkeys(DESCRIPTIONS, 1.0))


def dashboard_metrics() -> set[str]:
    """The metrics that the Grafana dashboard asks for."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    return set(re.findall(r"ray_vlmtune_\w+", " ".join(queries)))


def test_every_metric_of_the_dashboard_is_on_the_page_with_its_help(page: str) -> None:
    worker: Any = Worker.remote()
    ray.get(worker.show.remote())
    wanted = dashboard_metrics()
    assert {"ray_vlmtune_tokens_per_second", "ray_vlmtune_loss", "ray_vlmtune_peak_memory"} <= wanted
    end, text = time.monotonic() + 60, ""
    while time.monotonic() < end and any(f"{name}{{" not in text for name in wanted):
        time.sleep(1)
        with urllib.request.urlopen(page) as answer:  # a gauge is there once for each time it was sent
            text += answer.read().decode()
    values = {
        line.partition("{")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("ray_vlmtune") and 'reason="decisions"' not in line
    }
    assert wanted <= values.keys()
    assert values["ray_vlmtune_engine_slots_used"] == 3.0
    assert values["ray_vlmtune_engine_slots"] == 8.0
    assert 0.3 <= values["ray_vlmtune_engine_wait_seconds_total"] < 5.0
    assert 'run="trial-7"' in text
    for name, description in {
        "engine_slots_used": engine_gauges.SLOTS_USED,
        "engine_wait_seconds_total": engine_gauges.WAITED,
        "tokens_per_second": DESCRIPTIONS["tokens_per_second"],
        "loss": DESCRIPTIONS["loss"],
    }.items():
        assert f"# HELP ray_vlmtune_{name} {description}" in text
