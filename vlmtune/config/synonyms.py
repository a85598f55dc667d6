"""Names that other tools have for vlmtune's options. Messages use them to say what to type instead."""

_SAME = {
    "learning_rate": "lr base_learning_rate peak_lr",
    "num_train_epochs": "epochs num_epochs n_epochs max_epochs train_epochs",
    "per_device_train_batch_size": "batch_size train_batch_size bs batch micro_batch",
    "per_device_eval_batch_size": "eval_batch_size val_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps grad_accum_steps",
    "model_name_or_path": "model model_name model_id base_model model_path base_model_name_or_path",
    "data_path": "dataset_name dataset data dataset_path train_file train_data data_files dataset_id",
    "eval_data_path": "eval_dataset val_dataset validation_file eval_file val_data",
    "eval_fraction": "val_size val_fraction validation_split eval_split_ratio split_dataset_ratio",
    "image_root": "image_folder image_dir images_dir media_dir dataset_dir",
    "max_length": "cutoff_len max_len max_seq_len seq_length sequence_len model_max_length context_length",
    "num_samples": "n_trials trials num_trials",
    "max_concurrent_trials": "parallel_trials n_jobs concurrency",
    "time_budget_s": "timeout time_budget max_time",
    "lora_r": "r rank lora_dim",
    "lora_alpha": "alpha",
    "lora_target_modules": "lora_target lora_targets target target_module",
    "lora_modules_to_save": "modules_to_save additional_target",
    "lora_vision": "train_vision finetune_vision_layers tune_vision freeze_vision_tower freeze_vit",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "optim": "optimizer",
    "max_steps": "steps num_steps train_steps total_steps",
    "quantization": "bits quantization_bit quant load_in",
    "dtype": "torch_dtype precision compute_dtype mixed_precision",
    "attn_implementation": "flash_attn attention attn",
    "num_workers": "num_gpus nproc_per_node devices n_gpus world_size",
    "output_dir": "output out out_dir save_dir outdir output_path",
    "resume": "resume_from continue_from",
    "gradient_checkpointing": "use_gradient_checkpointing grad_checkpointing",
    "max_grad_norm": "grad_clip gradient_clipping clip_grad_norm",
    "weight_decay": "wd",
    "seed": "random_state random_seed data_split_seed",
    "search_space": "parameters hyperparameters space sweep",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "storage_path": "storage",
    "max_pixels": "image_max_pixels",
    "min_pixels": "image_min_pixels",
    "max_image_tiles": "max_patches max_dynamic_patch max_num_tiles max_tiles max_slice_nums",
}
_WITH_REASON = {
    "warmup_ratio": "a share below 1 of warmup_steps is a ratio: --warmup_steps 0.03",
    "group_by_length": (
        "give --train_sampling_strategy group_by_length (group_by keeps the rows of a camera or sequence in "
        "one split)"
    ),
    "image_size": (
        "images get the size that the model's processor gives them; --max_pixels or --max_image_tiles limits "
        "it, and inspect shows the tokens of an image"
    ),
    "template": "the chat template is that of the model's processor; leave it out",
    "finetuning_type": "vlmtune trains LoRA adapters; leave it out",
    "stage": "vlmtune trains on questions and answers; leave it out",
    "do_sample": "answers are greedy; leave it out",
    "fp32": "give --dtype float32",
}
_WITH_REASON |= dict.fromkeys(("image_resolution", "resize", "image_resize"), _WITH_REASON["image_size"])
SYNONYMS: dict[str, str] = {other: name for name, others in _SAME.items() for other in others.split()}
# For commands that answer rows instead of training (eval, predict): a batch is a batch of answers.
SYNONYMS_OF_ANSWERING = {
    **SYNONYMS,
    "model": "adapter",
    "batch_size": "per_device_eval_batch_size",
    "image": "data_path",
    "images": "data_path",
    "input": "data_path",
    "prompt": "question",
    "query": "question",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "lora": "adapter",
    "checkpoint": "adapter",
    "adapter_path": "adapter",
    "adapter_name_or_path": "adapter",
    "output_format": "format",
}


def advice(name: str, known: frozenset[str] | set[str], synonyms: dict[str, str] | None = None) -> str | None:
    """What to type instead of `name`, an option of another tool; None if the tool's option is not known.

    Args:
        known: the names of the command's options.
        synonyms: the command's options by the names of other tools; SYNONYMS by default.
    """
    if name in _WITH_REASON:
        return _WITH_REASON[name]
    right = (synonyms or SYNONYMS).get(name)
    return f"this option is called --{right}" if right in known else None
