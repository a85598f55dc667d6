"""Reports and checkpoints while training continues."""

import threading
from pathlib import Path
from typing import Any

import pytest
from packed_kit import pack

from vlmtune.data.store import Store
from vlmtune.packed import checkpoint_writer

pytestmark = pytest.mark.timeout(200)


def test_only_the_last_report_waits_for_its_checkpoint(
    stores: dict[str, Store], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write, open_disk, waited = checkpoint_writer.write_checkpoint, threading.Event(), []

    def when_the_disk_is_open(*args: Any) -> None:
        waited.append(open_disk.wait(60))
        write(*args)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", when_the_disk_is_open)
    packed = pack(
        stores["mall llava"], models / "llava", tmp_path, {"one": {"max_steps": 4, "eval_steps": 1}}
    )
    packed.run(until=lambda: len(packed.reports.get("one", [])) == checkpoint_writer.MAX_UNWRITTEN)
    assert not list(tmp_path.rglob("report.json"))
    opening = threading.Timer(1.0, open_disk.set)
    opening.start()
    packed.run(until=lambda: len(packed.reports["one"]) > checkpoint_writer.MAX_UNWRITTEN)
    assert open_disk.is_set(), "a third copy of the adapter waited for the first to be written"
    packed.run()
    packed.close()
    assert [report.metrics["step"] for report in packed.reports["one"]] == [1, 2, 3, 4]
    kept = {path.parent.name for path in tmp_path.rglob("report.json")}
    assert kept == {"checkpoint-3", "checkpoint-4"}, "the last two"
    assert all(waited)
