"""Train one adapter with the packed or the isolated runner, for `ray_jobs/train.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmtune.cluster import Cluster
from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import named_interrupt
from vlmtune.evaluation.adapter import TrainedAdapter, read_adapter_files
from vlmtune.packed.packable import check_packable
from vlmtune.packed.train_packed import run_packed
from vlmtune.run_state import TRAINING
from vlmtune.session import Session
from vlmtune.stop_signals import kept_signal_handlers
from vlmtune.training.isolated import run_isolated
from vlmtune.training.launch import Outcome
from vlmtune.training.save import save_adapter_folder

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainResult:
    """The result of `vlmtune.train`.

    Attributes:
        folder: absolute path or URI of the output folder.
        adapter: the trained adapter; `adapter.load()` returns a PEFT model and its processor.
        metrics: the last report: `eval_loss` (mean negative log-likelihood of a labelled token on all
            evaluation rows), `train_loss`, `step`, `max_steps`, `epoch`, `seconds`, `tokens_per_second`,
            `rows_per_second`, `peak_memory` (GB of 2**30 bytes), and others.
        curves_dir: folder of the TensorBoard events.
        device: the device of training: "CPU", or "GPU" with its name if this machine has it.
        parameters: number of parameters of the base model and the adapter.
        trainable_parameters: number of parameters of the adapter.
    """

    folder: str
    adapter: TrainedAdapter
    metrics: dict[str, Any]
    curves_dir: str
    device: str = "CPU"
    parameters: int = 0
    trainable_parameters: int = 0


def train_adapter(settings: Settings, progress: Progress) -> TrainResult:
    """Train one adapter, or resume an interrupted run (`settings.run.resume`).

    Args:
        progress: called with the numbers of each logged step and each evaluation, and with {"note": text}.

    Raises:
        UserError: something is wrong with the settings, the data, the model or the machine. Nothing has been
            written then.
    """
    with (
        Session.open(settings, TRAINING, check_runner) as session,
        named_interrupt(lambda: session.watch.resume),
        kept_signal_handlers(),  # Ray Train sets a handler of SIGINT
    ):
        session.claim()
        settings, store, folder = session.settings, session.store, session.folder
        outcome = train_with_runner(settings, store, folder, session.cluster, progress)
        save_adapter_folder(outcome.checkpoint, folder, settings, outcome.metrics, store)
        trainable, device = adapter_parameters(folder), device_name(session)
        session.finish()
    return TrainResult(
        folder,
        TrainedAdapter(folder, settings.model.trust_remote_code),
        outcome.metrics,
        f"{folder}/runs",
        device,
        trainable + sum(one.numel() for one in settings.model.ref.meta_model().parameters()),
        trainable,
    )


def adapter_parameters(folder: str) -> int:
    """The number of parameters of an adapter."""
    from safetensors.torch import load

    tensors = load(read_adapter_files(folder)["adapter_model.safetensors"])
    return sum(tensor.numel() for tensor in tensors.values())


def device_name(session: Session) -> str:
    """The device that workers train on, with the name of the GPU if this machine has it."""
    import torch

    if not session.cluster.workers_use_gpu(session.settings.run.use_cpu):
        return "CPU"
    return f"GPU ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "GPU"


def check_runner(settings: Settings) -> None:
    """Raises ConfigError for settings that the chosen runner cannot train."""
    if settings.search.trial_runner == "packed":
        check_packable(settings)


def train_with_runner(
    settings: Settings, store: Store, folder: str, cluster: Cluster, progress: Progress
) -> Outcome:
    """Train with the runner that `trial_runner` names: "packed", else isolated.

    Checkpoints and curves go to `folder`, and a run resumes from a checkpoint in it.
    """
    run = run_packed if settings.search.trial_runner == "packed" else run_isolated
    without_page = settings.replace(live_answers=0)  # nobody would see the answers
    return run(without_page, store, folder, cluster, progress)
