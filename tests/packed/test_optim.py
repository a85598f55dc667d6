"""One trial's updates on a flat vector, against the same optimizer on the matrices that it holds."""

import pytest
import torch
from transformers import Trainer, get_scheduler

from vlmtune.config.settings import Settings
from vlmtune.packed.layers import AdapterLayout, TargetLayer
from vlmtune.packed.optim import OPTIMIZERS, AdapterOptimizer
from vlmtune.training.trl_arguments import training_arguments

TARGETS = [TargetLayer("q", 12, 8), TargetLayer("cross", 8, 12, image_only=True)]
STEPS = 6


def arguments(tmp_path, **options):
    values = {
        "use_cpu": True,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        **options,
    }
    return training_arguments(Settings.from_flags(values), str(tmp_path), checkpointing=False)


def gradients(layout: AdapterLayout, step: int) -> torch.Tensor:
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_steps_on_the_flat_vector_are_those_on_the_matrices(tmp_path, optim: str, clip: float):
    layout, args = AdapterLayout(TARGETS, 4), arguments(tmp_path, optim=optim, max_grad_norm=clip)
    start = torch.randn(layout.size)
    mine = AdapterOptimizer(start.clone(), layout.image_start, args, STEPS)
    matrices = [torch.nn.Parameter(part.clone()) for pair in layout.views(start) for part in pair]
    make, options = Trainer.get_optimizer_cls_and_kwargs(args)
    theirs = make([{"params": matrices, "weight_decay": args.weight_decay}], **options)
    schedule = get_scheduler(args.lr_scheduler_type, theirs, args.get_warmup_steps(STEPS), STEPS)
    for step in range(STEPS):
        has_images = step != 2  # without an image, cross-attention's matrices have no gradient
        mine.gradient += gradients(layout, step)
        parts = [part for pair in layout.views(gradients(layout, step)) for part in pair]
        if not has_images:
            mine.gradient[layout.image_start :] = 0
        for number, (matrix, part) in enumerate(zip(matrices, parts, strict=True)):
            matrix.grad = part.clone() if has_images or number < 2 else None
        assert mine.learning_rate == schedule.get_last_lr()[0]
        norm = mine.step(has_images=has_images)
        expected = torch.nn.utils.clip_grad_norm_(matrices, clip or float("inf"))
        theirs.step()
        schedule.step()
        torch.testing.assert_close(norm, expected)
        assert not mine.gradient.any()
    torch.testing.assert_close(
        mine.flat, torch.cat([matrix.detach().flatten() for matrix in matrices]), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_resumed_optimizer_makes_the_same_steps(tmp_path, optim: str):
    layout, args = AdapterLayout(TARGETS, 4), arguments(tmp_path, optim=optim)
    whole = AdapterOptimizer(torch.ones(layout.size), layout.image_start, args, STEPS)
    for step in range(3):
        whole.gradient += gradients(layout, step)
        whole.step(has_images=step > 0)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = AdapterOptimizer(whole.flat.clone(), layout.image_start, args, STEPS)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, STEPS):
        for one in (whole, resumed):
            one.gradient += gradients(layout, step)
            one.step(has_images=True)
    assert torch.equal(whole.flat, resumed.flat)


def test_padding_of_a_lower_rank_stays_zero(tmp_path):
    layout, args = AdapterLayout(TARGETS, 8), arguments(tmp_path, weight_decay=0.5)
    flat = layout.pack({"q": (torch.randn(2, 12), torch.randn(8, 2))})
    zero = flat == 0
    optimizer = AdapterOptimizer(flat, layout.image_start, args, STEPS)
    for step in range(STEPS):
        optimizer.gradient += gradients(layout, step) * ~zero
        optimizer.step(has_images=True)
    assert not optimizer.flat[zero].any()
    assert optimizer.flat[~zero].all()
