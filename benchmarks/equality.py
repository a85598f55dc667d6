"""Does the fast step compute what the plain stack computes, at full size and over several steps?

    python benchmarks/equality.py FOLDER [--steps 6] [--batch 4] [--sides SIDE ...] [--json FILE]
    python benchmarks/equality.py FOLDER --sides "plain, float32, not quantized" "plain, float32" fp8

FOLDER holds LLaVA-1.5-7B (`benchmarks/full_size.py`). All sides train float32 adapters from the same initial
values on the same batches, another batch in each step, without dropout. The first side is the plain stack
that computes in float32. For each other side the benchmark prints its distance from the first: the largest
relative difference of a step's loss, and relative norms of the differences of the first step's gradients, of
the last step's gradients, and of the change that training made to the adapters. The distances of the plain
stack in bfloat16, with two kernels of attention, show what rounding to bfloat16 costs.

The second command compares NF4 and fp8, which round the weights in different ways, with a model that is not
quantized.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from train_step import CASES, SMALL, ours, plain
from versions import check_versions

PLAIN = {"bits": 4, "checkpointing": False, "same_start": True}
SIDES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain, float32": (plain, PLAIN | {"dtype": "float32"}),
    "plain, attention by sdpa": (plain, PLAIN | {"attention": "sdpa"}),
    "plain, attention by eager": (plain, PLAIN | {"attention": "eager"}),
    "fast": (ours, {"quantization": "nf4", "torch_compile": True}),
    "fast, not compiled": (ours, {"quantization": "nf4", "torch_compile": False, "cuda_graphs": False}),
    "fast in little memory": (ours, SMALL | {"torch_compile": True}),
    "fp8": (ours, {"quantization": "fp8", "torch_compile": True}),
    "plain, float32, not quantized": (plain, PLAIN | {"bits": None, "dtype": "float32"}),
}


@contextmanager
def recorded_training() -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record each step's gradients and the first and last weights of any training in this process.

    Yields flat tensors on the CPU, under `gradients` (one for each step) and `weights` (first and last).
    """
    recorded: dict[str, list[torch.Tensor]] = {"gradients": [], "weights": []}

    def parameters(optimizer: Optimizer) -> list[torch.Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.detach().float().cpu().flatten() for tensor in tensors])

    def before(optimizer: Optimizer, *_: Any) -> None:
        recorded["gradients"].append(
            flat([parameter.grad for parameter in parameters(optimizer) if parameter.grad is not None])
        )
        if not recorded["weights"]:
            recorded["weights"].append(flat(parameters(optimizer)))

    def after(optimizer: Optimizer, *_: Any) -> None:
        recorded["weights"][1:] = [flat(parameters(optimizer))]

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    yield recorded
    for handle in handles:
        handle.remove()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def main() -> None:
    check_versions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--sides",
        nargs="+",
        default=list(SIDES)[:6],
        metavar="SIDE",
        help="the first is what the others are compared with",
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    reference: tuple[dict[str, list[torch.Tensor]], list[float]] | None = None
    for name in args.sides:
        side, options = SIDES[name]
        case = {
            **CASES["llava-b8"],
            "batch": args.batch,
            "dropout": 0.0,
            "varied": True,
            "plain": options,
            "ours": options,
        }
        with recorded_training() as recorded:
            losses = side(args.folder, case, args.steps)["losses"]
        reference = reference or (recorded, losses)
        first, first_losses = reference
        row = {
            "side": name,
            "loss": max(abs(mine - other) / other for mine, other in zip(losses, first_losses, strict=True)),
            "first_gradient": distance(recorded["gradients"][0], first["gradients"][0]),
            "last_gradient": distance(recorded["gradients"][-1], first["gradients"][-1]),
            "change": distance(
                recorded["weights"][1] - recorded["weights"][0],
                first["weights"][1] - first["weights"][0],
            ),
            "losses": losses,
        }
        print(json.dumps(row), flush=True)
        if args.json:
            with Path(args.json).open("a") as file:
                file.write(json.dumps(row) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
