"""Does a run on GPUs do what a run on the CPU does? Trains through Ray Train and compares the ranks.

    python benchmarks/gpu_check.py MODEL_FOLDER DATA_PATH --workers 2 [--any_flag value of train.py]

Prints one line: steps, seconds a step, peak memory, evaluation losses, whether all ranks hold the same
adapter, and the sum of its absolute values.
"""

import sys
import tempfile
from functools import partial
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, ScalingConfig
from ray.train.torch import TorchTrainer
from versions import check_versions

from vlmtune.cluster import connect
from vlmtune.config.parse import parse
from vlmtune.console import configure_console
from vlmtune.data.stream import stream_batches
from vlmtune.session import prepare_rows, with_absolute_paths
from vlmtune.training.launch import worker_resources
from vlmtune.training.loop import train


def worker(config: dict[str, Any]) -> None:
    """Train, then report whether this rank's adapter equals those of the others."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work_dir:
        model = train(
            config["settings"],
            config["store"],
            read_batches=partial(stream_batches, config["store"]),
            report=lambda metrics, _: reports.append(metrics),
            work_dir=work_dir,
            rank=rank,
            world_size=context.get_world_size(),
        )
    trained = [parameter.detach().double() for parameter in model.parameters() if parameter.requires_grad]
    digest = torch.stack([tensor.abs().sum() for tensor in trained])
    digests = [digest]
    if context.get_world_size() > 1:
        digests = [torch.empty_like(digest) for _ in range(context.get_world_size())]
        torch.distributed.all_gather(digests, digest)
    metrics = {
        **reports[-1],
        "eval_losses": [round(metrics["eval_loss"], 5) for metrics in reports],
        "ranks_agree": all(torch.equal(digests[0], other) for other in digests),
        "adapter_sum": float(digest.sum()),
        "dtypes": sorted(
            {str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad}
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        # Ray Train keeps only the metrics of reports that come with a checkpoint.
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def main() -> None:
    check_versions()
    configure_console()
    model, data, _, workers, *flags = sys.argv[1:]
    settings = with_absolute_paths(parse(["--model_name_or_path", model, "--data_path", data, *flags]))
    cluster = connect()
    store = prepare_rows(settings)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"settings": settings, "store": store},
        scaling_config=ScalingConfig(
            num_workers=int(workers),
            use_gpu=cluster.gpus > 0,
            resources_per_worker=worker_resources(cluster.gpus > 0),
        ),
    )
    metrics = trainer.fit().metrics or {}
    seconds = metrics["seconds"] / metrics["step"]
    names = (
        "eval_losses",
        "ranks_agree",
        "adapter_sum",
        "dtypes",
        "data_wait_fraction",
        "tokens_per_second",
        "peak_memory",
    )
    print(f"{metrics['step']} steps, {seconds:.3f} s a step", {name: metrics[name] for name in names})


if __name__ == "__main__":
    main()
