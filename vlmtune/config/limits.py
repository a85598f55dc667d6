"""The limits of options that are numbers, and the options of TRL that vlmtune refuses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limit:
    """The allowed values of a number: in words, and as a function that returns whether a value is allowed."""

    text: str
    holds: Callable[[Any], bool]


_AT_LEAST_0 = Limit("at least 0", lambda value: value >= 0)
_AT_LEAST_1 = Limit("at least 1", lambda value: value >= 1)
_ABOVE_0 = Limit("above 0", lambda value: value > 0)
_BELOW_1 = Limit("at least 0 and below 1", lambda value: 0 <= value < 1)
_WHOLE_OR_SHARE = Limit(
    "a share below 1 or a whole number of steps",
    lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
)

LIMITS: dict[str, Limit] = {
    "eval_fraction": _BELOW_1,
    "test_fraction": _BELOW_1,
    "max_bad_fraction": Limit("from 0 to 1", lambda value: 0 <= value <= 1),
    "video_frames": _AT_LEAST_1,
    "max_pixels": _AT_LEAST_1,
    "min_pixels": _AT_LEAST_1,
    "max_image_tiles": _AT_LEAST_1,
    "lora_r": _AT_LEAST_1,
    "lora_alpha": _AT_LEAST_1,
    "lora_dropout": _BELOW_1,
    "learning_rate": _ABOVE_0,
    "vision_learning_rate": _ABOVE_0,
    "num_train_epochs": _ABOVE_0,
    "max_steps": Limit(
        "at least 1, or -1 for num_train_epochs to decide", lambda value: value >= 1 or value == -1
    ),
    "per_device_train_batch_size": _AT_LEAST_1,
    "per_device_eval_batch_size": _AT_LEAST_1,
    "micro_batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "max_length": Limit("at least 8, or none", lambda value: value >= 8),
    "pad_to_multiple_of": _AT_LEAST_1,
    "torch_empty_cache_steps": _AT_LEAST_1,
    "neftune_noise_alpha": _ABOVE_0,
    "max_grad_norm": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "warmup_steps": Limit(
        "a share below 1 or a whole number of steps",
        lambda value: 0 <= value < 1 or (value >= 1 and value == int(value)),
    ),
    "adam_beta1": _BELOW_1,
    "adam_beta2": _BELOW_1,
    "adam_epsilon": _ABOVE_0,
    "eval_steps": _WHOLE_OR_SHARE,
    "eval_delay": _AT_LEAST_0,
    "logging_steps": _WHOLE_OR_SHARE,
    # numpy takes a seed of 32 bits.
    "split_seed": _AT_LEAST_0,
    "early_stopping_patience": _AT_LEAST_1,
    "early_stopping_threshold": _AT_LEAST_0,
    "seed": Limit("from 0 to 4294967295", lambda value: 0 <= value < 2**32),
    "num_samples": _AT_LEAST_1,
    "metric_rows": _AT_LEAST_1,
    "max_new_tokens": _AT_LEAST_1,
    "live_answers": _AT_LEAST_0,
    "gpus": _AT_LEAST_1,
    "max_concurrent_trials": _AT_LEAST_1,
    "time_budget_s": _ABOVE_0,
    "grace_period": Limit("above 0 and at most 1", lambda value: 0 < value <= 1),
    "reduction_factor": Limit("at least 2", lambda value: value >= 2),
}

# Options of TRL that would have no effect in vlmtune, or a wrong one: the reason, and the options. A value
# other
# than the default is refused with the reason.
_UNSUPPORTED: dict[str, str] = {
    "the loss is always on the assistant's tokens": "assistant_only_loss completion_only_loss",
    "rows are not packed; each is its own sequence": "packing packing_strategy padding_free eval_packing",
    "rows are prepared once by Ray Data": (
        "dataset_text_field dataset_kwargs dataset_num_proc remove_unused_columns label_names"
    ),
    "the order of rows depends on seed alone": ("shuffle_dataset data_seed length_column_name"),
    "a long row loses text between its images and its answer, by one rule": "truncation_mode",
    "the template and its end token are those of the model's processor": (
        "chat_template_path eos_token pad_token"
    ),
    "rows are read ahead by Ray Data on CPU workers": (
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
        "accelerator_config"
    ),
    "evaluation is vlmtune's own: exact over the whole evaluation set": (
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval"
    ),
    "use metric and mode to say what is best": ("metric_for_best_model greater_is_better"),
    "a checkpoint of the adapter is saved at every evaluation": (
        "save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint"
    ),
    "use resume, which continues at the exact next row": (
        "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint"
    ),
    "the base is frozen and fits a GPU: Ray Train gives every worker a whole one": (
        "deepspeed fsdp fsdp_config parallelism_config bnb_4bit_quant_storage local_rank ddp_backend "
        "ddp_timeout"
    ),
    "gradients are averaged once a step, without DistributedDataParallel": (
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph"
    ),
    "nothing is uploaded; push the finished folder with `hf upload`": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"
    ),
    "a tracker's project is that of WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT": (
        "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "tokens and peak memory are always in the metrics": "include_num_input_tokens_seen skip_memory_metrics",
    "vlmtune prints its own progress": "disable_tqdm",
    "use the flags of the model, such as dtype and attn_implementation": "model_init_kwargs",
    "the batch size is part of what is compared, so it is never changed in silence": "auto_find_batch_size",
    "vlmtune trains LoRA adapters": "use_peft lora_task_type lora_target_parameters optim_target_modules",
    "4-bit weights are nf4": "bnb_4bit_quant_type",
    "the script that is run decides this": "do_train do_eval do_predict",
    "use gradient_checkpointing and gradient_checkpointing_kwargs": (
        "activation_checkpointing activation_checkpointing_kwargs"
    ),
    "torch_compile fuses the same operations": "use_liger_kernel liger_kernel_config",
    "torch_compile compiles layer by layer with torch's defaults": "torch_compile_backend torch_compile_mode",
    "training needs no key-value cache": "use_cache",
    "TRL drops it; it would make train and evaluation loss differ in meaning": "label_smoothing_factor",
    "transformers' debugging of its own loop does not reach vlmtune's": "debug",
}
UNSUPPORTED: dict[str, str] = {
    name: reason for reason, names in _UNSUPPORTED.items() for name in names.split()
}
