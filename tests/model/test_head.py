"""The head at labelled positions says what it says at all positions."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText
from trl.trainer.utils import add_fused_lm_head

from vlmtune.data.encoded_example import IGNORED
from vlmtune.model.head import add_positions_argument, fused_head_agrees, log_probs_at_labels


@pytest.mark.parametrize("labelled", [[], [20], [1, 2, 3, 19], list(range(1, 21))])
def test_scores_and_gradients_are_those_of_all_positions(labelled: list[int], models: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(models / "llava", dtype=torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    ids = torch.arange(3 * 21).view(3, 21) % 50 + 10
    labels = torch.full_like(ids, IGNORED)
    for position in labelled:
        labels[position % 3 :: 2, position] = ids[position % 3 :: 2, position]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight

    def found(outputs: object) -> tuple[torch.Tensor, ...]:
        log_probs, right, mask = outputs.log_probs, outputs.is_top1, outputs.label_mask  # type: ignore[attr-defined]
        (gradient,) = torch.autograd.grad(log_probs.sum(), weight)
        return log_probs.sum(1).detach(), right.sum(1), mask.sum(1), gradient

    expected = found(model(**batch, use_cache=False, fused_lm_head=True))
    add_positions_argument(model)
    outputs = log_probs_at_labels(model, batch)
    assert outputs.log_probs.shape[1] % 8 == 0 or outputs.log_probs.shape[1] == 20
    assert outputs.log_probs.shape[1] < len(labelled) + 8 or not labelled
    for mine, theirs in zip(found(outputs), expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    logits = model(**batch).logits
    assert logits.shape[:2] == ids.shape, "a plain call is as it was"


@pytest.mark.parametrize("family", ["llava", "mllama", "smolvlm"])
def test_the_fused_head_is_used_where_it_is_the_classes(models: Path, family: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(models / family, dtype=torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    assert fused_head_agrees(model)


def test_a_scale_that_the_class_leaves_out_is_left_out(models: Path) -> None:
    """As in Aya Vision and Granite Vision, whose decoder alone scales its logits."""
    model = AutoModelForImageTextToText.from_pretrained(models / "llava", dtype=torch.float32)
    model.config.get_text_config().logit_scale = 0.25
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    assert not fused_head_agrees(model)
    add_positions_argument(model)
    ids = torch.arange(2 * 21).view(2, 21) % 50 + 10
    labels = torch.full_like(ids, IGNORED)
    labels[0, 3:7], labels[1, 12:] = ids[0, 3:7], ids[1, 12:]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    outputs = log_probs_at_labels(model, batch)
    own = model(**batch).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    labelled = labels[:, 1:] != IGNORED
    torch.testing.assert_close(outputs.log_probs.sum(1), (own * labelled).sum(1), rtol=1e-5, atol=1e-5)
    assert outputs.label_mask.sum(1).tolist() == labelled.sum(1).tolist() == [4, 9]
    assert outputs.log_probs.requires_grad
