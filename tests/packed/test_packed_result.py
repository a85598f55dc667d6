"""The self-check of packed steps: a fault is found, and a right step stays as it is to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_kit import pack

from vlmtune.data.store import Store
from vlmtune.packed.layers import PackedLinear


def test_a_fault_in_packed_layers_stops_the_engine(
    stores: dict[str, Store], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in what every packed step needs, so there is nothing to leave out."""
    from vlmtune.errors import ModelError

    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda layer, x: 2 * forward(layer, x))
    trial: dict[str, Any] = {"one": {"max_steps": 1}}
    with pytest.raises(ModelError, match="self-check fails: losses differ"):
        pack(stores["mixed llava"], models / "llava", tmp_path, trial, lora_target_modules=["q_proj"])


@pytest.mark.parametrize("rows", ["mixed llava", "mixed mllama"])
def test_the_check_changes_no_bit(stores: dict[str, Store], models: Path, tmp_path: Path, rows: str) -> None:
    adapters = []
    for check in (True, False):
        trial: dict[str, Any] = {"one": {"max_steps": 3, "lora_dropout": 0.1}}
        model = models / rows.split()[1]
        packed = pack(stores[rows], model, tmp_path / str(check), trial, self_check=check)
        packed.run()
        packed.close()
        assert not [note for note in packed.notes if "self-check" in note]
        adapters.append(packed.adapter("one"))
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
