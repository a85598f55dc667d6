"""The loss of each row, against the model's own loss of that row alone."""

from pathlib import Path
from typing import Any

import torch
from packed_kit import row_of

from vlmtune.compat.trl import add_fused_lm_head
from vlmtune.data.encoded_example import IGNORED
from vlmtune.data.store import Store
from vlmtune.model.base import load_base
from vlmtune.model.head import add_positions_argument
from vlmtune.model_ref import ModelRef
from vlmtune.packed.loss import row_losses
from vlmtune.packed.packed_batch import make_batch

CPU = torch.device("cpu")


def make_base(models: Path) -> Any:
    base = load_base(ModelRef(str(models / "llava")), quantization="none", dtype="float32", device=CPU)
    add_fused_lm_head(base)
    add_positions_argument(base)
    return base.eval()


@torch.no_grad()
def test_each_row_has_the_loss_of_the_row_alone(stores: dict[str, Store], models: Path) -> None:
    base, store = make_base(models), stores["mixed llava"]
    rows = [row_of("one", tokens, answers=answers) for tokens, answers in ((20, 1), (24, 7), (31, 12))]
    batch = make_batch(rows, 32, store.meta, CPU, torch.float32)
    together = row_losses(base, batch)
    dft = row_losses(base, batch, torch.tensor([False, True, False]))
    for index, row in enumerate(rows):
        alone = make_batch([row], 32, store.meta, CPU, torch.float32)
        labels = alone.pop("labels")
        scores = base(**alone, use_cache=False).logits[0, :-1].log_softmax(-1)
        labelled = labels[0, 1:] != IGNORED
        wanted = labels[0, 1:][labelled]
        log_probs = scores[labelled].gather(1, wanted[:, None])[:, 0]
        torch.testing.assert_close(together.loss[index], -log_probs.sum())
        assert together.correct[index] == (scores[labelled].argmax(-1) == wanted).sum()
        weighted = -(log_probs * log_probs.exp()).sum() if index == 1 else -log_probs.sum()
        torch.testing.assert_close(dft.loss[index], weighted)
