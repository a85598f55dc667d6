"""What the dashboard's metrics page says of a run, asked of a real Ray node."""

import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from vlmtune.cluster import connect
from vlmtune.training.gauges import Gauges


@pytest.fixture
def node() -> Iterator[str]:
    connect()
    yield f"http://{ray.nodes()[0]['NodeManagerAddress']}:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    ray.shutdown()


@ray.remote(num_cpus=0)
class Worker:
    """Stays alive, as a worker does: metrics go to the node every few seconds."""

    def show(self) -> list[dict[str, Any]]:
        passed: list[dict[str, Any]] = []
        self.gauges = Gauges("trial-7", 1, passed.append)
        self.gauges({"loss": 2.5, "tokens_per_second": 1234.0, "step": 3})
        self.gauges({"note": "nothing to show"})
        return passed


def test_numbers_of_a_step_reach_the_metrics_page(node: str) -> None:
    worker: Any = Worker.remote()
    assert ray.get(worker.show.remote()) == [
        {"loss": 2.5, "tokens_per_second": 1234.0, "step": 3},
        {"note": "nothing to show"},
    ]
    end = time.monotonic() + 60
    lines: list[str] = []
    while not lines and time.monotonic() < end:
        time.sleep(1)
        with urllib.request.urlopen(node) as page:
            lines = [
                line
                for line in page.read().decode().splitlines()
                if line.startswith("ray_vlmtune_tokens_per_second{")
            ]
    assert len(lines) == 1
    assert 'run="trial-7"' in lines[0]
    assert 'worker="1"' in lines[0]
    assert float(lines[0].rpartition(" ")[2]) == 1234.0
