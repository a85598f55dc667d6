"""LoRA on tiny vision-language models: where it goes, what it starts from, how it trains, and that it comes
back from a folder."""

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from vlmtune.demo.models import write_model
from vlmtune.errors import ModelError
from vlmtune.model.base import load_base
from vlmtune.model.frozen import Int8Linear, dequantize_weight
from vlmtune.model.lora import (
    attach,
    initial_a,
    keep_adapter_in_fp32,
    load_adapter,
    lora_config,
    save_adapter,
    to_fp32,
)
from vlmtune.model.lora_targets import target_modules
from vlmtune.model_ref import ModelRef

CPU = torch.device("cpu")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAVA_LAYERS = ["model.language_model.layers.0.self_attn", "model.language_model.layers.1.self_attn"]
QUANTIZATIONS = ["none", "nf4", "int8"]
PROMPTS = {
    "llava": "USER: <image>\nHow many people? ASSISTANT: {} people</s>",
    "mllama": "<|image|><|begin_of_text|>How many people? {} people<|eot_id|>",
    "smolvlm": "<|im_start|>User:<image>How many people?<end_of_utterance>\n"
    "Assistant: {} people<end_of_utterance>",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in PROMPTS:
        write_model(family, folder / family)
    return folder


def load_base_for(
    models: Path, family: str, quantization: str = "none", dtype: str = "float32"
) -> PreTrainedModel:
    return load_base(ModelRef(str(models / family)), quantization=quantization, dtype=dtype, device=CPU)


def adapted(
    base: PreTrainedModel, *, r: int = 4, seed: int = 0, lora_vision: bool = False, **options: object
) -> PeftModel:
    targets = target_modules(base, None, lora_vision=lora_vision)
    return attach(
        base, lora_config(base, r=r, alpha=8, dropout=0.0, target_modules=targets, **options), seed=seed
    )


def batch_of(models: Path, family: str) -> dict[str, Tensor]:
    """Two questions about two images, with as many rectangles as the answer says; every token but padding
    is trained on."""
    images = []
    for count in (2, 5):
        image = Image.new("RGB", (56, 56), "white")
        for index in range(count):
            ImageDraw.Draw(image).rectangle((index * 10, 20, index * 10 + 6, 50), fill="black")
        images.append([image])
    processor = ModelRef(str(models / family)).processor()
    texts = [PROMPTS[family].format(count) for count in (2, 5)]
    batch = dict(
        processor(images=images, text=texts, return_tensors="pt", padding=True, add_special_tokens=False)
    )
    vocabulary = load_base_for(models, family).get_output_embeddings().weight.shape[0]
    ignored = (batch["attention_mask"] == 0) | (
        batch["input_ids"] >= vocabulary
    )  # Mllama's image token has no output
    batch["labels"] = batch["input_ids"].masked_fill(ignored, -100)
    return batch


def trainable(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def give_b_values(model: PeftModel) -> None:
    """B starts at zero, so that a fresh adapter changes nothing: make it one that does."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


# Where it goes


def test_default_targets_are_the_language_models_attention(models: Path):
    assert target_modules(load_base_for(models, "llava"), None, lora_vision=False) == [
        f"{layer}.{name}" for layer in LLAVA_LAYERS for name in ATTENTION
    ]


def test_mllama_targets_self_and_cross_attention(models: Path):
    targets = target_modules(load_base_for(models, "mllama"), None, lora_vision=False)
    kinds = ["self_attn", "cross_attn", "self_attn", "cross_attn"]
    assert targets == [
        f"model.language_model.layers.{i}.{kind}.{name}" for i, kind in enumerate(kinds) for name in ATTENTION
    ]


def test_smolvlm_calls_its_language_model_text_model(models: Path):
    targets = target_modules(load_base_for(models, "smolvlm"), ["q_proj"], lora_vision=False)
    assert targets == [f"model.text_model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_names_in_a_list(models: Path, quantization: str):
    base = load_base_for(models, "llava", quantization)
    assert target_modules(base, ["self_attn.q_proj"], lora_vision=False) == [
        f"{layer}.q_proj" for layer in LLAVA_LAYERS
    ]
    assert target_modules(base, [f"{LLAVA_LAYERS[1]}.v_proj"], lora_vision=False) == [
        f"{LLAVA_LAYERS[1]}.v_proj"
    ]
    assert target_modules(base, "q_proj", lora_vision=False) == [f"{layer}.q_proj" for layer in LLAVA_LAYERS]


def test_vision_joins_when_asked(models: Path):
    base = load_base_for(models, "llava")
    vision = [
        name
        for name in target_modules(base, ["q_proj", "out_proj"], lora_vision=True)
        if "language_model" not in name
    ]
    assert sorted(vision) == [
        f"model.vision_tower.encoder.layers.{i}.self_attn.{name}"
        for i in range(3)
        for name in ("out_proj", "q_proj")
    ]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_all_linear_leaves_out_the_head(models: Path, quantization: str):
    base = load_base_for(models, "llava", quantization)
    language = target_modules(base, "all-linear", lora_vision=False)
    everything = target_modules(base, "all-linear", lora_vision=True)
    assert len(language) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in language)
    assert set(everything) > set(language)
    assert "model.multi_modal_projector.linear_1" in everything
    assert "lm_head" not in everything


def test_a_pattern_is_matched_on_full_names(models: Path):
    base = load_base_for(models, "llava")
    assert target_modules(base, r".*language_model.*\.0\..*(q|v)_proj", lora_vision=False) == [
        f"{LLAVA_LAYERS[0]}.{n}" for n in ("q_proj", "v_proj")
    ]
    assert len(target_modules(base, r".*\.(q|v)_proj", lora_vision=True)) == 2 * 2 + 3 * 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["wq"],
            "no linear layer is called 'wq'; there are q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj",
        ),
        (["q_proj", "wq"], "no linear layer is called 'wq'"),
        ("wq", "no linear layer is called 'wq'"),
        (["embed_tokens"], "no linear layer is called 'embed_tokens'"),
        (["out_proj"], "'out_proj' is found in the vision tower only: add --lora_vision"),
        (
            r"(q|v)_proj",
            "matches no linear layer; a pattern must match a whole name such as "
            "model.language_model.layers.0",
        ),
        ("q_proj,k_proj", "matches no linear layer"),
        (r".*(q_proj", "is neither a layer's name nor a regular expression"),
        (
            r".*q_proj",
            "reaches the vision tower (model.vision_tower.encoder.layers.0.self_attn.q_proj): "
            "add --lora_vision",
        ),
    ],
)
def test_targets_that_cannot_be(models: Path, names: list[str] | str, message: str):
    with pytest.raises(ModelError) as caught:
        target_modules(load_base_for(models, "llava"), names, lora_vision=False)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# What it starts from


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_attach_trains_lora_alone_in_fp32(models: Path, quantization: str):
    model = adapted(load_base_for(models, "llava", quantization, dtype="bfloat16"), r=4)
    parameters = trainable(model)
    assert len(parameters) == 2 * 4 * 2
    assert all(".language_model." in name and ".lora_" in name for name in parameters)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    # Width 64; k and v have 2 of 4 heads: A is 4 x 64 everywhere, B is 64 x 4 for q and o, 32 x 4 for k and
    # v.
    assert sum(parameter.numel() for parameter in parameters.values()) == 2 * 4 * (4 * 64 + 2 * 64 + 2 * 32)


def test_mllama_has_no_vision_tensor(models: Path):
    parameters = trainable(adapted(load_base_for(models, "mllama", "int8")))
    assert len(parameters) == 4 * 4 * 2
    assert not any("vision" in name for name in parameters)


def test_initial_values_depend_on_seed_and_name_alone(models: Path):
    base = load_base_for(models, "llava")
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = {name: value.clone() for name, value in trainable(adapted(base, seed=3)).items()}
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(456)
    again = trainable(adapted(load_base_for(models, "llava", "nf4", dtype="bfloat16"), seed=3))
    other = trainable(adapted(load_base_for(models, "llava"), seed=4))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if "lora_B" in name:
            assert not value.any()
        else:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            assert torch.equal(value, initial_a(module, 4, 64, seed=3))
            assert not torch.equal(value, other[name])
    a = [value for name, value in first.items() if "lora_A" in name]
    assert len({tuple(value.flatten().tolist()) for value in a}) == len(a)
    stacked = torch.stack(a)
    assert (
        0.99 / 8 < stacked.abs().max() < 1 / 8
    )  # uniform within 1 / sqrt(64), as PEFT's kaiming_uniform_(a=sqrt(5))
    assert abs(stacked.std().item() - 1 / 8 / math.sqrt(3)) < 0.003


def test_a_fresh_adapter_changes_nothing(models: Path):
    batch = batch_of(models, "llava")
    base = load_base_for(models, "llava", "nf4")
    with torch.no_grad():
        before = base(**batch).logits
        assert torch.equal(adapted(base).eval()(**batch).logits, before)


def test_dora_and_rslora(models: Path):
    model = adapted(load_base_for(models, "llava", "int8"), r=16, use_rslora=True, use_dora=True)
    layer = model.get_submodule(f"base_model.model.{LLAVA_LAYERS[0]}.q_proj")
    assert layer.scaling["default"] == 8 / math.sqrt(16)
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, dequantize_weight(layer.base_layer).norm(dim=1), rtol=1e-3, atol=0)
    assert magnitude.requires_grad
    batch = batch_of(models, "llava")
    model(**batch).loss.backward()
    assert magnitude.grad is not None


def test_fp32_comes_back(models: Path):
    model = adapted(load_base_for(models, "llava", "nf4", dtype="bfloat16"))
    before = {name: value.clone() for name, value in trainable(model).items()}
    frozen = {name: value.dtype for name, value in model.named_parameters() if not value.requires_grad}

    def cast() -> None:  # as SFTTrainer's constructor does
        for parameter in trainable(model).values():
            parameter.data = parameter.data.to(torch.bfloat16)

    with keep_adapter_in_fp32(model):
        cast()
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())
    cast()
    to_fp32(model)
    assert all(value.dtype == torch.float32 for value in trainable(model).values())
    assert all(
        torch.equal(value, before[name].bfloat16().float()) for name, value in trainable(model).items()
    )
    assert {
        name: value.dtype for name, value in model.named_parameters() if not value.requires_grad
    } == frozen


# How it trains


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", list(PROMPTS))
def test_training_with_images_lowers_the_loss_and_leaves_the_base(
    models: Path, family: str, quantization: str
):
    model = adapted(load_base_for(models, family, quantization)).train()
    if quantization == "int8":
        assert any(isinstance(module, Int8Linear) for module in model.modules())
    batch = batch_of(models, family)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses
    assert all(
        torch.equal(value, frozen[name])
        for name, value in model.named_parameters()
        if not value.requires_grad
    )


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_evaluation_between_steps_changes_no_gradient(models: Path, quantization: str):
    batch = batch_of(models, "llava")
    gradients = []
    for evaluate in (False, True):
        model = adapted(load_base_for(models, "llava", quantization))
        give_b_values(model)
        if evaluate:
            with torch.no_grad():
                model.eval()(**batch)
        model.train()(**batch).loss.backward()
        gradients.append({name: value.grad for name, value in trainable(model).items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_gradient_checkpointing_reaches_every_adapter(models: Path, family: str, quantization: str):
    batch = batch_of(models, family)
    plain = adapted(load_base_for(models, family, quantization)).train()
    give_b_values(plain)
    plain(**batch).loss.backward()

    checkpointed = adapted(load_base_for(models, family, quantization)).train()
    give_b_values(checkpointed)
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed(**batch).loss.backward()
    expected = trainable(plain)
    for name, parameter in trainable(checkpointed).items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_cross_attention_adapters_train_only_with_an_image(models: Path):
    model = adapted(load_base_for(models, "mllama")).train()
    give_b_values(model)
    tokens = ModelRef(str(models / "mllama")).processor()(
        text=["How many people? 2 people"], return_tensors="pt"
    )
    model(**tokens, labels=tokens["input_ids"]).loss.backward()
    with_gradient = {
        name
        for name, value in trainable(model).items()
        if value.grad is not None and value.grad.abs().max() > 0
    }
    assert with_gradient == {name for name in trainable(model) if ".self_attn." in name}


@pytest.mark.parametrize("family", list(PROMPTS))
def test_vision_adapters_train_when_asked(models: Path, family: str):
    base = load_base_for(models, family, "int8")
    model = adapted(base, lora_vision=True).train()
    give_b_values(model)
    model(**batch_of(models, family)).loss.backward()
    vision = {name: value.grad for name, value in trainable(model).items() if ".vision_" in name}
    used = [name for name, gradient in vision.items() if gradient is not None and gradient.abs().max() > 0]
    # LLaVA reads the last layer of CLIP but one.
    assert sorted(used) == sorted(name for name in vision if family != "llava" or ".layers.2." not in name)
    assert used


def test_bf16_activations_with_fp32_adapters(models: Path):
    model = adapted(load_base_for(models, "mllama", "int8", dtype="bfloat16")).train()
    batch = batch_of(models, "mllama")
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    loss = model(**batch).loss
    loss.backward()
    gradients = [value.grad for name, value in trainable(model).items() if "lora_B" in name]
    assert torch.isfinite(loss)
    assert all(gradient.dtype == torch.float32 and gradient.abs().max() > 0 for gradient in gradients)


# Saving and loading


@pytest.fixture
def saved(models: Path, tmp_path: Path) -> Path:
    """An adapter of LLaVA that changes the logits."""
    model = adapted(load_base_for(models, "llava"))
    give_b_values(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_plain_peft_loads_what_was_saved(models: Path, tmp_path: Path, family: str, quantization: str):
    batch = batch_of(models, family)
    model = adapted(load_base_for(models, family, quantization)).eval()
    give_b_values(model)
    save_adapter(model, tmp_path)
    with torch.no_grad():
        logits = model(**batch).logits
        fresh = load_base_for(models, family, quantization)
        before = fresh(**batch).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT warns of adapter tensors that it misses
            plain = PeftModel.from_pretrained(fresh, tmp_path)
        ours = load_adapter(load_base_for(models, family, quantization), tmp_path)
        assert (logits - before).abs().max() > 0.01
        assert torch.equal(plain(**batch).logits, logits)
        assert torch.equal(ours(**batch).logits, logits)


@pytest.mark.parametrize(
    ("family", "below"),
    [("llava", "language_model"), ("mllama", "language_model"), ("smolvlm", "text_model")],
)
def test_the_saved_config_is_compact_and_portable(models: Path, tmp_path: Path, family: str, below: str):
    save_adapter(adapted(load_base_for(models, family)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == rf"model\.{below}\..*\.(k_proj|o_proj|q_proj|v_proj)"
    assert config["base_model_name_or_path"] == str(models / family)
    assert (config["r"], config["lora_alpha"], config["task_type"], config["peft_type"]) == (
        4,
        8,
        "CAUSAL_LM",
        "LORA",
    )
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("names", "lora_vision", "written"),
    [
        (["gate_proj", "o_proj"], False, ["gate_proj", "o_proj"]),
        (["q_proj"], True, ["q_proj"]),
        (
            r"model\.language_model\.layers\.1\.self_attn\.q_proj",
            False,
            ["model.language_model.layers.1.self_attn.q_proj"],
        ),
    ],
)
def test_targets_are_written_as_short_as_they_can_be(
    models: Path, names: list[str] | str, lora_vision: bool, written: list[str]
):
    base = load_base_for(models, "llava")
    targets = target_modules(base, names, lora_vision=lora_vision)
    config = lora_config(base, r=2, alpha=2, dropout=0.0, target_modules=targets)
    assert sorted(config.target_modules) == written
    layers = {
        name.removeprefix("base_model.model.").split(".lora_")[0]
        for name in trainable(attach(base, config, seed=0))
    }
    assert layers == set(targets)


def test_a_loaded_adapter_is_frozen_unless_asked(models: Path, saved: Path):
    frozen = load_adapter(load_base_for(models, "llava", "nf4", dtype="bfloat16"), saved)
    assert not trainable(frozen)
    assert not frozen.training
    model = load_adapter(load_base_for(models, "llava", "nf4", dtype="bfloat16"), saved, trainable=True)
    assert len(trainable(model)) == 2 * 4 * 2
    assert {value.dtype for value in trainable(model).values()} == {torch.float32}
    stored = load_file(saved / "adapter_model.safetensors")
    for name, value in trainable(model).items():
        assert torch.equal(value, stored[name.replace(".default.", ".")])
    assert model.training


def test_saving_what_was_loaded_keeps_the_base_it_was_made_for(models: Path, saved: Path, tmp_path: Path):
    moved = Path(shutil.copytree(models / "llava", tmp_path / "elsewhere"))
    save_adapter(
        load_adapter(load_base(ModelRef(str(moved)), quantization="none", dtype=None, device=CPU), saved),
        tmp_path / "again",
    )
    configs = [
        json.loads((folder / "adapter_config.json").read_text()) for folder in (saved, tmp_path / "again")
    ]
    assert configs[0] == configs[1]


def test_modules_to_save_travel_with_the_adapter(models: Path, tmp_path: Path):
    model = adapted(load_base_for(models, "llava"), modules_to_save=["multi_modal_projector"])
    projector = [name for name in trainable(model) if "multi_modal_projector" in name]
    assert len(projector) == 4
    with torch.no_grad():
        for name in projector:
            trainable(model)[name].add_(1.0)
    save_adapter(model, tmp_path)
    loaded = dict(load_adapter(load_base_for(models, "llava"), tmp_path).named_parameters())
    assert all(torch.equal(loaded[name], trainable(model)[name]) for name in projector)


def test_merging_int8_keeps_the_result_near(models: Path):
    """PEFT's merge works on the weight-only layers: it requantises them, which costs some precision."""
    batch = batch_of(models, "llava")
    model = adapted(load_base_for(models, "llava", "int8")).eval()
    give_b_values(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that merging into 8 bits rounds
        base_logits = model.get_base_model()(**batch).logits
        with model.disable_adapter():
            without = model(**batch).logits
        merged = model.merge_and_unload()
        difference = merged(**batch).logits - base_logits
    assert any(isinstance(module, Int8Linear) for module in merged.modules())
    assert difference.norm() < 0.1 * (without - base_logits).norm()


def refused(base: PreTrainedModel, folder: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_adapter(base, folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_no_adapter(models: Path, tmp_path: Path):
    base = load_base_for(models, "llava")
    refused(base, tmp_path / "nowhere", "is not an adapter: it has no adapter_config.json")
    refused(base, models / "llava", "is not an adapter: it has no adapter_config.json")


def test_damaged_adapters(models: Path, saved: Path, tmp_path: Path):
    base = load_base_for(models, "llava")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(saved, tmp_path / name))

    folder = copy("no-json")
    (folder / "adapter_config.json").write_text("{")
    refused(base, folder, r"adapter_config\.json is damaged")
    folder = copy("prompt-tuning")
    (folder / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    refused(base, folder, "holds an adapter of type PROMPT_TUNING, not LORA")
    folder = copy("no-weights")
    (folder / "adapter_model.safetensors").unlink()
    refused(base, folder, r"is incomplete: adapter_model\.safetensors is missing")
    folder = copy("cut-short")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(base, folder, "is damaged: its weight file cannot be read")


def test_an_adapter_that_lacks_tensors_or_has_more(models: Path, saved: Path):
    weights = saved / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = f"base_model.model.{LLAVA_LAYERS[1]}.k_proj.lora_A.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    refused(
        load_base_for(models, "llava"),
        saved,
        r"asks for more tensors than are there, for example .*layers\.1\.self_attn\.k_proj",
    )
    save_file({**tensors, name.replace("layers.1", "layers.7"): tensors[name].clone()}, weights)
    refused(
        load_base_for(models, "llava"),
        saved,
        r"tensors for layers that do not exist, for example .*layers\.7\.",
    )


def test_an_adapter_of_another_base(models: Path, saved: Path, tmp_path: Path):
    refused(load_base_for(models, "smolvlm"), saved, f"does not fit the base {models / 'smolvlm'}")
    wider = adapted(load_base_for(models, "llava"), r=8)
    save_adapter(wider, tmp_path / "wider")
    shutil.copy(saved / "adapter_config.json", tmp_path / "wider")
    refused(load_base_for(models, "llava"), tmp_path / "wider", "does not fit the base .*size mismatch")
