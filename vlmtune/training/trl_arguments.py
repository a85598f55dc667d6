"""Make TRL's `SFTConfig` of the settings, on the machine that trains, because it checks the device."""

import dataclasses

import torch
from trl.trainer.sft_config import SFTConfig

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.training.step_plan import uses_gpu


def training_arguments(settings: Settings, work_dir: str, *, checkpointing: bool) -> SFTConfig:
    """TRL's `SFTConfig` of the settings.

    Args:
        work_dir: local folder for checkpoints.
        checkpointing: whether activations are computed again in the backward pass.

    Raises:
        ConfigError: the settings request bfloat16, and the GPU does not compute in it.
    """
    gpu, bf16 = uses_gpu(settings), settings.training.bf16
    has_bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if gpu and not has_bf16 and (bf16 or settings.model.dtype == "bfloat16"):
        flag = "--bf16 true" if bf16 else "--dtype bfloat16"
        raise ConfigError(
            f"{flag}: {torch.cuda.get_device_name()} does not compute in bfloat16; leave it out, and float32 "
            "is used"
        )
    known = {option.name for option in dataclasses.fields(SFTConfig)}
    trl_options = {name: value for name, value in vars(settings.training).items() if name in known}
    return SFTConfig(
        **{
            **trl_options,
            "remove_unused_columns": False,
            "save_strategy": "no",
            "load_best_model_at_end": False,  # `best_evaluation` chooses the checkpoint, in both runners
            "output_dir": work_dir,
            "use_cpu": not gpu,
            "bf16": has_bf16 if bf16 is None else bf16,
            "gradient_checkpointing": checkpointing,
            # Without a GPU, activations are in the CPU's memory anyway.
            "activation_offloading": gpu and settings.training.activation_offloading,
            "torch_compile": False,  # it compiles the whole model; `compile_layers` compiles layer by layer
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "disable_tqdm": True,
            "report_to": "none",
            "router_aux_loss_coef": 0.0,  # routers are frozen
        }
    )
