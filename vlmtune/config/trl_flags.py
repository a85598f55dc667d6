"""TRL's training options, by `make flags` from trl 1.16.0 and transformers 5.23.0."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrlTraining:
    """The options of `trl.SFTConfig` that vlmtune passes on, with TRL's names, types and defaults."""

    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "The batch size per device for training."}
    )
    num_train_epochs: float = field(
        default=3.0, metadata={"help": "Total number of training epochs to perform."}
    )
    max_steps: int = field(
        default=-1,
        metadata={
            "help": (
                "Overrides `num_train_epochs`. If set to a positive number, the total number of "
                "training steps to perform. Must be set when the training dataset does not "
                "implement `__len__` (e.g. a streaming dataset)."
            )
        },
    )
    learning_rate: float = field(default=2e-05, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(
        default="linear",
        metadata={
            "help": ("The learning rate scheduler type to use. See `SchedulerType` for all possible values."),
            "choices": [
                "linear",
                "cosine",
                "cosine_with_restarts",
                "polynomial",
                "constant",
                "constant_with_warmup",
                "inverse_sqrt",
                "reduce_lr_on_plateau",
                "cosine_with_min_lr",
                "cosine_warmup_with_min_lr",
                "warmup_stable_decay",
                "greedy",
            ],
        },
    )
    lr_scheduler_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": (
                "Additional parameters for the lr_scheduler, such as {'num_cycles': 1} for cosine "
                "with hard restarts. See the documentation of each scheduler for possible values."
            )
        },
    )
    warmup_steps: float = field(
        default=0.0,
        metadata={
            "help": (
                "Number of steps for a linear warmup from 0 to `learning_rate`. Can be an integer "
                "(exact steps) or a float in [0, 1) (ratio of total steps)."
            )
        },
    )
    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "help": "The optimizer to use. See `OptimizerNames` for the complete list.",
            "choices": [
                "adamw_torch",
                "adamw_torch_fused",
                "adamw_torch_xla",
                "adamw_torch_npu_fused",
                "adafactor",
                "adamw_anyprecision",
                "adamw_torch_4bit",
                "adamw_torch_8bit",
                "ademamix",
                "sgd",
                "adagrad",
                "adamw_bnb_8bit",
                "adamw_8bit",
                "ademamix_8bit",
                "lion_8bit",
                "lion_32bit",
                "paged_adamw_32bit",
                "paged_adamw_8bit",
                "paged_ademamix_32bit",
                "paged_ademamix_8bit",
                "paged_lion_32bit",
                "paged_lion_8bit",
                "rmsprop",
                "rmsprop_bnb",
                "rmsprop_bnb_8bit",
                "rmsprop_bnb_32bit",
                "galore_adamw",
                "galore_adamw_8bit",
                "galore_adafactor",
                "galore_adamw_layerwise",
                "galore_adamw_8bit_layerwise",
                "galore_adafactor_layerwise",
                "lomo",
                "adalomo",
                "grokadamw",
                "schedule_free_radam",
                "schedule_free_adamw",
                "schedule_free_sgd",
                "apollo_adamw",
                "apollo_adamw_layerwise",
                "stable_adamw",
            ],
        },
    )
    optim_args: str | None = field(
        default=None,
        metadata={
            "help": (
                "Optional arguments supplied to optimizers such as AnyPrecisionAdamW, AdEMAMix, and GaLore."
            )
        },
    )
    weight_decay: float = field(
        default=0.0,
        metadata={
            "help": (
                "Weight decay coefficient applied by the optimizer. Automatically excluded from "
                "bias and LayerNorm parameters."
            )
        },
    )
    adam_beta1: float = field(
        default=0.9,
        metadata={
            "help": (
                "The exponential decay rate for the first moment estimates (momentum) in Adam- "
                "based optimizers."
            )
        },
    )
    adam_beta2: float = field(
        default=0.999,
        metadata={
            "help": (
                "The exponential decay rate for the second moment estimates (variance) in Adam- "
                "based optimizers."
            )
        },
    )
    adam_epsilon: float = field(
        default=1e-08, metadata={"help": "Epsilon value for numerical stability in Adam-based optimizers."}
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={
            "help": (
                "Number of update steps to accumulate gradients before performing a "
                "backward/update pass. Effective batch size = per_device_train_batch_size * "
                "num_devices * gradient_accumulation_steps."
            )
        },
    )
    average_tokens_across_devices: bool = field(
        default=True,
        metadata={
            "help": (
                "Whether or not to average tokens across devices. If enabled, will use all_reduce "
                "to synchronize num_tokens_in_batch for precise loss calculation. Reference: "
                "https://github.com/huggingface/transformers/issues/34242"
            )
        },
    )
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Maximum gradient norm for gradient clipping. Set to 0 to disable."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Whether to use bf16 (mixed) precision instead of 32-bit. Requires Ampere or "
                "higher NVIDIA architecture or Intel XPU or using CPU (use_cpu) or Ascend NPU. If "
                "not set, it defaults to `True` if `fp16` is not set."
            )
        },
    )
    fp16: bool = field(
        default=False,
        metadata={
            "help": (
                "Enable float16 (FP16) mixed precision training. Consider using BF16 instead if "
                "your hardware supports it."
            )
        },
    )
    tf32: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Enable TF32 mode on Ampere and newer GPUs. Provides up to 8x speedup with "
                "negligible accuracy loss."
            )
        },
    )
    gradient_checkpointing: bool = field(
        default=True,
        metadata={
            "help": (
                "Enable gradient checkpointing to trade compute for memory. Reduces memory at the "
                "cost of ~20% slower training."
            )
        },
    )
    gradient_checkpointing_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Deprecated alias of `activation_checkpointing_kwargs`, will be removed in v6."},
    )
    torch_compile: bool = field(
        default=False, metadata={"help": "Compile the model using `torch.compile()` for faster training."}
    )
    neftune_noise_alpha: float | None = field(
        default=None,
        metadata={
            "help": (
                "If not None, activates NEFTune noise embeddings. Can drastically improve "
                "performance for instruction fine-tuning. Typical range: [5.0, 15.0]."
            )
        },
    )
    torch_empty_cache_steps: int | None = field(
        default=None,
        metadata={
            "help": (
                "Number of steps to wait before calling `torch.<device>.empty_cache()`. Helps "
                "avoid CUDA OOM at a cost of ~10% slower performance. If None, cache will not be "
                "emptied."
            )
        },
    )
    logging_strategy: str = field(
        default="steps",
        metadata={
            "help": "The logging strategy to adopt during training. Options: 'no', 'epoch', 'steps'.",
            "choices": ["no", "steps", "epoch"],
        },
    )
    logging_steps: float = field(
        default=10.0,
        metadata={
            "help": (
                "Log every X updates steps. Should be an integer or a float in range `[0,1)`. If "
                "smaller than 1, will be interpreted as ratio of total training steps."
            )
        },
    )
    logging_first_step: bool = field(
        default=False, metadata={"help": "Whether to log the first `global_step` or not."}
    )
    log_on_each_node: bool = field(
        default=True,
        metadata={
            "help": (
                "When doing a multinode distributed training, whether to log once per node or "
                "just once on the main node."
            )
        },
    )
    logging_nan_inf_filter: bool = field(
        default=True,
        metadata={
            "help": (
                "Filter out NaN and Inf training and evaluation losses when logging. Does not "
                "affect gradient computation, only logging."
            )
        },
    )
    log_level: str = field(
        default="passive",
        metadata={
            "help": (
                "Logging level for the main process. Options: 'debug', 'info', 'warning', "
                "'error', 'critical', 'passive'."
            ),
            "choices": ["detail", "debug", "info", "warning", "error", "critical", "passive"],
        },
    )
    log_level_replica: str = field(
        default="warning",
        metadata={
            "help": (
                "Logging level for replica processes in distributed training. Same options as `log_level`."
            ),
            "choices": ["detail", "debug", "info", "warning", "error", "critical", "passive"],
        },
    )
    report_to: list[str] | str | None = field(
        default="none",
        metadata={
            "help": (
                "The list of integrations to report the results and logs to. Use 'all' for all "
                "installed integrations, 'none' for no integrations."
            )
        },
    )
    eval_strategy: str = field(
        default="no",
        metadata={
            "help": "When to run evaluation. Options: 'no', 'steps', 'epoch'.",
            "choices": ["no", "steps", "epoch"],
        },
    )
    eval_steps: float | None = field(
        default=None,
        metadata={
            "help": (
                "Number of update steps between evaluations if `eval_strategy='steps'`. Defaults "
                "to `logging_steps` if not set. Should be an integer or a float in range `[0,1)`. "
                "If smaller than 1, will be interpreted as ratio of total training steps."
            )
        },
    )
    eval_delay: float = field(
        default=0.0,
        metadata={
            "help": (
                "Number of epochs or steps to wait for before the first evaluation can be "
                "performed, depending on the eval_strategy."
            )
        },
    )
    per_device_eval_batch_size: int = field(
        default=8, metadata={"help": "The batch size per device (GPU/TPU core/CPU) for evaluation."}
    )
    eval_on_start: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether to run through the entire `evaluation` step at the very beginning of "
                "training as a sanity check."
            )
        },
    )
    full_determinism: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether to call enable_full_determinism instead of set_seed for reproducibility "
                "in distributed training. Important: this will negatively impact the performance, "
                "so only use it for debugging."
            )
        },
    )
    seed: int = field(
        default=42, metadata={"help": "Random seed that will be set at the beginning of training."}
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": (
                "Sampler for training: 'random' (default), 'sequential', 'group_by_length', or "
                "'batch_rebalance'."
            ),
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": (
                "Coefficient of the load-balancing auxiliary loss for Mixture-of-Experts (MoE) "
                "models, added to the training loss with this weight. When not set, the value "
                "declared by the model config is used. Set to `0.0` to disable it. Fails when "
                "used with a non-MoE model."
            )
        },
    )
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": (
                "Maximum length of the tokenized sequence. Sequences longer than `max_length` are "
                "truncated from the left or right depending on the `truncation_mode`. If `None`, "
                "no truncation is applied. When packing is enabled, this value sets the sequence "
                "length."
            )
        },
    )
    pad_to_multiple_of: str | None = field(
        default="auto",
        metadata={
            "help": (
                "If set, the sequences will be padded to a multiple of this value. `'auto'` pads "
                "to a multiple of 128 on Neuron (AWS Trainium), which compiles once per input "
                "shape, and does not pad elsewhere."
            )
        },
    )
    loss_type: str = field(
        default="nll",
        metadata={
            "help": (
                "Type of loss to use. Possible values are `'nll'` (standard negative log- "
                "likelihood) and `'dft'` (Dynamic Fine-Tuning, "
                "https://huggingface.co/papers/2508.05629)."
            ),
            "choices": ["nll", "dft", "chunked_nll"],
        },
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Whether to offload the activations to the CPU."}
    )


@dataclass(frozen=True)
class TrlUnsupported:
    """The options of `trl.SFTConfig` and `trl.ModelConfig` that vlmtune takes with these values only."""

    optim_target_modules: list[str] | str | None = field(default=None)
    label_smoothing_factor: float = field(default=0.0)
    bf16_full_eval: bool = field(default=False)
    fp16_full_eval: bool = field(default=False)
    activation_checkpointing: bool | None = field(default=None)
    activation_checkpointing_kwargs: dict[str, Any] | None = field(default=None)
    torch_compile_backend: str | None = field(default=None)
    torch_compile_mode: str | None = field(default=None)
    use_liger_kernel: bool = field(default=False)
    liger_kernel_config: dict[str, Any] | None = field(default=None)
    use_cache: bool = field(default=False)
    auto_find_batch_size: bool = field(default=False)
    include_num_input_tokens_seen: str = field(default="no")
    disable_tqdm: bool | None = field(default=None)
    run_name: str | None = field(default=None)
    project: str = field(default="huggingface")
    trackio_space_id: str | None = field(default=None)
    trackio_bucket_id: str | None = field(default=None)
    trackio_static_space_id: str | None = field(default=None)
    prediction_loss_only: bool = field(default=False)
    eval_do_concat_batches: bool = field(default=True)
    eval_use_gather_object: bool = field(default=False)
    eval_accumulation_steps: int | None = field(default=None)
    include_for_metrics: list[str] | str = field(default_factory=list)
    batch_eval_metrics: bool = field(default=False)
    save_only_model: bool = field(default=False)
    save_strategy: str = field(default="no", metadata={"choices": ["no", "steps", "epoch", "best"]})
    save_steps: float = field(default=500.0)
    save_on_each_node: bool = field(default=False)
    save_total_limit: int | None = field(default=None)
    enable_jit_checkpoint: bool = field(default=False)
    push_to_hub: bool = field(default=False)
    hub_token: str | None = field(default=None)
    hub_private_repo: bool | None = field(default=None)
    hub_model_id: str | None = field(default=None)
    hub_strategy: str = field(
        default="every_save", metadata={"choices": ["end", "every_save", "checkpoint", "all_checkpoints"]}
    )
    hub_always_push: bool = field(default=False)
    hub_revision: str | None = field(default=None)
    metric_for_best_model: str | None = field(default=None)
    greater_is_better: bool | None = field(default=None)
    ignore_data_skip: bool = field(default=False)
    restore_callback_states_from_checkpoint: bool = field(default=False)
    data_seed: int | None = field(default=None)
    accelerator_config: dict[str, Any] | None = field(default=None)
    parallelism_config: str | None = field(default=None)
    dataloader_drop_last: bool = field(default=False)
    dataloader_num_workers: int = field(default=0)
    dataloader_pin_memory: bool = field(default=True)
    dataloader_persistent_workers: bool = field(default=False)
    dataloader_prefetch_factor: int | None = field(default=None)
    dataloader_multiprocessing_context: str | None = field(
        default=None, metadata={"choices": ["fork", "spawn", "forkserver"]}
    )
    dataloader_in_order: bool = field(default=True)
    remove_unused_columns: bool = field(default=False)
    label_names: list[str] | str | None = field(default=None)
    length_column_name: str = field(default="length")
    ddp_find_unused_parameters: bool | None = field(default=None)
    ddp_bucket_cap_mb: int | None = field(default=None)
    ddp_broadcast_buffers: bool | None = field(default=None)
    ddp_static_graph: bool | None = field(default=None)
    ddp_backend: str | None = field(
        default=None, metadata={"choices": ["nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"]}
    )
    ddp_timeout: int = field(default=1800)
    fsdp: str | None = field(default=None)
    fsdp_config: dict[str, Any] | None = field(default=None)
    deepspeed: dict[str, Any] | None = field(default=None)
    debug: list[str] | str = field(default="")
    skip_memory_metrics: bool = field(default=True)
    do_train: bool = field(default=False)
    do_eval: bool = field(default=False)
    do_predict: bool = field(default=False)
    resume_from_checkpoint: str | None = field(default=None)
    local_rank: int = field(default=-1)
    model_init_kwargs: dict[str, Any] | None = field(default=None)
    chat_template_path: str | None = field(default=None)
    dataset_text_field: str = field(default="text")
    dataset_kwargs: dict[str, Any] | None = field(default=None)
    dataset_num_proc: int | None = field(default=None)
    eos_token: str | None = field(default=None)
    truncation_mode: str = field(default="keep_start", metadata={"choices": ["keep_end", "keep_start"]})
    shuffle_dataset: bool = field(default=False)
    packing: bool = field(default=False)
    packing_strategy: str = field(default="bfd", metadata={"choices": ["bfd", "bfd_split", "wrapped"]})
    padding_free: bool = field(default=False)
    eval_packing: bool | None = field(default=None)
    completion_only_loss: bool | None = field(default=None)
    assistant_only_loss: bool = field(default=False)
    pad_token: str | None = field(default=None)
    use_peft: bool = field(default=True)
    lora_target_parameters: list[str] | str | None = field(default=None)
    lora_task_type: str = field(default="CAUSAL_LM")
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"choices": ["fp4", "nf4"]})
    bnb_4bit_quant_storage: str | None = field(default=None)
