"""Stock TRL as the oracle of both runners: plain SFTTrainer, PEFT, transformers and bitsandbytes.

The plain run shares with vlmtune only what is to be equal at the start: the rows in their order, and the
first values of the adapter.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from training_kit import Adapter, Run, difference, settings_of
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from vlmtune.data.order import Order
from vlmtune.data.store import Store
from vlmtune.data.stream import read_batches
from vlmtune.model.lora import initial_a
from vlmtune.packed.train_packed import train_shard

CLOSE = 1e-5  # relative norm of what two adapters differ by
STEPS, ROWS, SEED = 8, 4, 42
RANK, ALPHA, RATE = 4, 8, 1e-3
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": ROWS,
    "learning_rate": RATE,
    "lora_r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.0,
    "lr_scheduler_type": "linear",
    "seed": SEED,
    "eval_strategy": "no",
}


def stock_adapter(store: Store, model: Path, quantization: str, folder: Path) -> Adapter:
    """The adapter that TRL trains on the CPU, as its documentation shows it, in float32."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base: Any = AutoModelForImageTextToText.from_pretrained(
        str(model),
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=four_bits if quantization == "nf4" else None,
    )
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    adapted: Any = get_peft_model(base, lora)
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        seed=SEED,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = len(store.rows_of("train"))
    order = Order(rows=rows, per_device=ROWS, accumulation=1, world_size=1, seed=SEED)
    read = read_batches(store, "train", order.epoch(0, 0), None)
    batches = [store.meta.input_format.normalize(batch) for batch in read]
    number = count()
    trainer = SFTTrainer(
        adapted,
        args=args,
        train_dataset=Dataset.from_dict({"row": list(range(STEPS * ROWS))}),
        processing_class=AutoProcessor.from_pretrained(str(model)),
        data_collator=lambda _: dict(batches[next(number)]),
    )
    # TRL has cast an adapter on a quantised base to bfloat16. Here it starts as vlmtune's, in float32.
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            parameter.data.copy_(initial_a(module, *parameter.shape, seed=SEED))
    trainer.train()
    assert trainer.state.global_step == STEPS
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(adapted).items()}


@pytest.mark.parametrize("family", ["llava", "mllama"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_both_runners_train_the_adapter_of_stock_trl(
    family: str,
    quantization: str,
    run_loop: Callable[..., Run],
    stores: dict[str, Store],
    models: Path,
    tmp_path: Path,
) -> None:
    name = f"mall {family}"
    store, model = stores[name], models / family
    assert len(store.rows_of("train")) >= STEPS * ROWS, "the steps are within one epoch"
    expected = stock_adapter(store, model, quantization, tmp_path / "stock")
    options = {**OPTIONS, "quantization": quantization}
    isolated = run_loop(name, **options).adapter()
    settings = settings_of(store, model, num_workers=0, **options)
    report = train_shard(settings, store, str(tmp_path / "packed"), lambda _: None)
    packed = load_file(f"{report['checkpoint_path']}/adapter_model.safetensors")
    assert any(tensor.any() for key, tensor in expected.items() if "lora_B" in key), "it has learnt"
    assert difference(isolated, expected) < CLOSE
    assert difference(packed, expected) < CLOSE
