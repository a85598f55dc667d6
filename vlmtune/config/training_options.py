"""The options of training: TRL's, and a few of vlmtune's own."""

from dataclasses import dataclass

from vlmtune.config.options import option
from vlmtune.config.trl_flags import TrlTraining

# Schedules that depend on the step alone. One that reacts to a metric would be a second way of early
# stopping.
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
    *("inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
)
# Optimizers that need no further package.
OPTIMIZERS = (
    *("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"),
    *("adamw_8bit", "adamw_bnb_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit"),
    *("paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit"),
)


@dataclass(frozen=True)
class TrainingSettings(TrlTraining):
    """TRL's training options under TRL's names, with defaults that fit adapters, and some of vlmtune's."""

    lr_scheduler_type: str = option(
        "linear",
        "How the learning rate changes over the run; lr_scheduler_kwargs sets its details.",
        choices=SCHEDULES,
    )
    optim: str = option("adamw_torch_fused", "Optimizer of the adapter's weights.", choices=OPTIMIZERS)
    report_to: list[str] | None = option(
        ["none"],
        "Services that get the curves of each trial too, as a run of its own: wandb, mlflow, trackio. "
        "TensorBoard's are always in runs/.",
        choices=("none", "tensorboard", "wandb", "mlflow", "trackio"),
    )
    eval_strategy: str = option(
        "steps",
        "When to evaluate, report and save: every eval_steps, after every epoch, or never.",
        choices=("no", "steps", "epoch"),
    )
    eval_steps: float | None = option(
        0.25,
        "Steps between evaluations, or below 1 a share of the run: 0.25 gives a search four chances to "
        "stop a trial.",
    )
    load_best_model_at_end: bool | None = option(
        None,
        "Keep the adapter of the best evaluation, not of the last one; auto: in a search, whose trials are "
        "then compared by their best evaluation.",
    )
    early_stopping_patience: int | None = option(
        None,
        "End a run after this many evaluations in a row without an improvement of its own eval_loss. By "
        "default, never. early_stopping, in a search, compares trials with each other.",
    )
    early_stopping_threshold: float = option(
        0.0, "With early_stopping_patience: an improvement smaller than this does not count."
    )
    logging_steps: float = option(
        1.0, "Steps between two logged training losses, or below 1 a share of the run."
    )
    logging_nan_inf_filter: bool = option(
        False,
        "Replace a loss that is NaN or infinite in the log by the mean of the others; each step waits for"
        " it.",
    )
    loss_type: str = option(
        "nll",
        "Training loss: nll, or dft for Dynamic Fine-Tuning. Evaluation is always nll.",
        choices=("nll", "dft"),
    )
    gradient_checkpointing: bool | None = option(  # type: ignore[assignment]  # None: vlmtune decides
        None,
        "Recompute activations instead of keeping them, a third slower; auto: only where they do not fit "
        "in memory.",
    )
    torch_compile: bool | None = option(  # type: ignore[assignment]
        None, "Compile the decoder's layers: half a minute at the start; auto: on a GPU, in long runs."
    )
    cuda_graphs: bool | None = option(
        None,
        "Replay captured steps, faster below a few thousand tokens; auto: on a GPU with room for them.",
    )
    self_check: bool = option(
        True,
        "Before a model's first step, compare it with the plain transformers model on two rows, and leave out"
        " what makes it differ; once for each model and version of the libraries.",
    )
    micro_batch_size: int | None = option(
        None,
        "Run a batch of per_device_train_batch_size rows in parts of this many, to save memory; its gradient "
        "is the same. By default as many rows as fit in memory.",
    )
    pad_to_multiple_of: int | None = option(  # type: ignore[assignment]  # TRL's "auto" is for other hardware
        None, "Pad every batch to a length that is a multiple of this many tokens."
    )
    train_sampling_strategy: str = option(
        "random",
        "Order of the training rows: random, or group_by_length, whose steps have rows of similar length and "
        "so less padding.",
        choices=("random", "group_by_length"),
    )
    max_length: int | None = option(
        1024,
        "Longest row in tokens, its images included. Text is shortened to it, images never; none for no "
        "limit.",
    )
