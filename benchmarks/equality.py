"""Does the fast step compute what the plain stack computes, at full size and over several steps?

    python benchmarks/equality.py FOLDER [--steps 6] [--batch 4] [--sides SIDE ...] [--json FILE]
    python benchmarks/equality.py FOLDER --sides "plain, float32, not quantised" "plain, float32" fp8

FOLDER holds LLaVA-1.5-7B (`benchmarks/full_size.py`). Everybody trains float32 adapters from the same values
on the same batches, another
one in each step, without dropout. The first side is the plain stack with all arithmetic in float32; printed
for each other one is how far
it is from that: the largest relative difference of a step's loss, and relative norms of the difference of
the first step's gradients, the
last step's, and what training changed in the adapters. The plain stack's own distances, with two kernels of
attention, are what rounding
to bfloat16 costs anyone. The second command asks what NF4 and fp8, which round the weights in different
ways, change in a model that is
not quantised.
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
    "plain, float32, not quantised": (plain, PLAIN | {"bits": None, "dtype": "float32"}),
}


@contextmanager
def watched() -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collects, of whatever trains in this process, each step's gradients and the first and last weights,
    flat, on the CPU."""
    found: dict[str, list[torch.Tensor]] = {"gradients": [], "weights": []}

    def parameters(optimizer: Optimizer) -> list[torch.Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.detach().float().cpu().flatten() for tensor in tensors])

    def before(optimizer: Optimizer, *_: Any) -> None:
        found["gradients"].append(
            flat([parameter.grad for parameter in parameters(optimizer) if parameter.grad is not None])
        )
        if not found["weights"]:
            found["weights"].append(flat(parameters(optimizer)))

    def after(optimizer: Optimizer, *_: Any) -> None:
        found["weights"][1:] = [flat(parameters(optimizer))]

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    yield found
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
        with watched() as found:
            losses = side(args.folder, case, args.steps)["losses"]
        reference = reference or (found, losses)
        theirs, their_losses = reference
        row = {
            "side": name,
            "loss": max(abs(mine - other) / other for mine, other in zip(losses, their_losses, strict=True)),
            "first_gradient": distance(found["gradients"][0], theirs["gradients"][0]),
            "last_gradient": distance(found["gradients"][-1], theirs["gradients"][-1]),
            "change": distance(
                found["weights"][1] - found["weights"][0], theirs["weights"][1] - theirs["weights"][0]
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
