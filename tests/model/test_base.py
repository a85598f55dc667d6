"""Loading, quantising and freezing tiny models; every way in which a model can be absent or broken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from vlmtune.demo.models import write_model
from vlmtune.errors import ModelError
from vlmtune.model.base import check_model, default_dtype, load_base
from vlmtune.model.frozen import Int8Linear, dequantize_weight
from vlmtune.model_ref import ModelRef

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llava", "mllama"):
        write_model(family, folder / family)
    return folder


@pytest.fixture
def llava(models: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(models / "llava", tmp_path / "llava"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_config(models: Path):
    assert check_model(ModelRef(str(models / "mllama"))).model_type == "mllama"


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_base_is_frozen_and_quantised_but_for_the_head(models: Path, family: str, quantization: str):
    model = load_base(ModelRef(str(models / family)), quantization=quantization, dtype="bfloat16", device=CPU)
    kind = {"none": nn.Linear, "nf4": Linear4bit, "int8": Int8Linear}[quantization]
    head = model.get_output_embeddings()
    assert {
        type(module) for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    } == {kind}
    assert type(head) is nn.Linear
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} == {
        torch.bfloat16
    }
    assert model.config.use_cache is False
    assert model.config.get_text_config().use_cache is False
    assert model.get_input_embeddings().weight.device == CPU


@pytest.mark.parametrize(("quantization", "relative_error"), [("nf4", 0.12), ("int8", 0.01)])
def test_quantised_weights_are_the_files_within_their_precision(
    models: Path, quantization: str, relative_error: float
):
    plain = load_base(ModelRef(str(models / "llava")), quantization="none", dtype="float32", device=CPU)
    quantised = load_base(
        ModelRef(str(models / "llava")), quantization=quantization, dtype="float32", device=CPU
    )
    name = "model.language_model.layers.1.mlp.down_proj"
    exact, stored = plain.get_submodule(name).weight, dequantize_weight(quantised.get_submodule(name))
    assert 0 < (stored - exact).norm() / exact.norm() < relative_error


def test_nested_quantisation_is_a_choice(models: Path):
    for nested in (True, False):
        model = load_base(
            ModelRef(str(models / "llava")), quantization="nf4", dtype=None, device=CPU, nested_quant=nested
        )
        states = [module.weight.quant_state for module in model.modules() if isinstance(module, Linear4bit)]
        assert {(state.nested, state.quant_type) for state in states} == {(nested, "nf4")}


def test_llm_int8_leaves_the_layers_to_bitsandbytes(models: Path):
    model = load_base(
        ModelRef(str(models / "llava")), quantization="int8", dtype=None, device=CPU, llm_int8=True
    )
    layer = model.get_submodule("model.language_model.layers.0.self_attn.q_proj")
    assert type(layer) is Linear8bitLt
    assert layer.state.threshold == 6.0


def test_dtype(models: Path, llava: Path):
    assert default_dtype(CPU) == torch.float32
    name = str(models / "llava")
    assert load_base(ModelRef(name), quantization="none", dtype=None, device=CPU).dtype == torch.float32
    assert load_base(ModelRef(name), quantization="none", dtype="float16", device=CPU).dtype == torch.float16
    edit_json(llava / "config.json", dtype="bfloat16")
    model = load_base(ModelRef(str(llava)), quantization="nf4", dtype="auto", device=CPU)
    assert model.dtype == torch.bfloat16
    assert {module.compute_dtype for module in model.modules() if isinstance(module, Linear4bit)} == {
        torch.bfloat16
    }


def test_a_quantised_folder_loads_as_what_it_is_and_as_nothing_else(models: Path, tmp_path: Path):
    expected = {}
    for quantization in ("nf4", "int8"):
        model = load_base(
            ModelRef(str(models / "llava")), quantization=quantization, dtype="float32", device=CPU
        )
        layer = model.get_submodule("model.language_model.layers.0.mlp.up_proj")
        expected[quantization] = dequantize_weight(layer)
        model.save_pretrained(tmp_path / quantization)
    for quantization, weight in expected.items():
        again = load_base(
            ModelRef(str(tmp_path / quantization)), quantization=quantization, dtype="bfloat16", device=CPU
        )
        assert {module.compute_dtype for module in again.modules() if isinstance(module, Linear4bit)} <= {
            torch.bfloat16
        }
        assert torch.equal(
            dequantize_weight(again.get_submodule("model.language_model.layers.0.mlp.up_proj")), weight
        )
    with pytest.raises(
        ModelError, match=r"is stored in nf4, so .* --quantization int8: use --quantization nf4$"
    ):
        load_base(ModelRef(str(tmp_path / "nf4")), quantization="int8", dtype=None, device=CPU)
    with pytest.raises(ModelError, match="is stored in int8"):
        load_base(ModelRef(str(tmp_path / "int8")), quantization="none", dtype=None, device=CPU)


def test_a_foreign_quantisation_is_refused(llava: Path):
    edit_json(llava / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"is stored in gptq, .*: give the model that it was made from"):
        load_base(ModelRef(str(llava)), quantization="nf4", dtype=None, device=CPU)


def refused(folder: Path, message: str) -> None:
    """Both the check before a GPU is taken and the loading itself refuse the folder, in one line that names
    it."""
    with pytest.raises(ModelError, match=message) as early:
        check_model(ModelRef(str(folder)))
    with pytest.raises(ModelError, match=message):
        load_base(ModelRef(str(folder)), quantization="none", dtype=None, device=CPU)
    assert "\n" not in str(early.value)
    assert str(folder) in str(early.value)


def test_no_weights(llava: Path):
    (llava / "model.safetensors").unlink()
    refused(llava, "has a config.json but no weights")


def test_weights_cut_short(llava: Path):
    weights = llava / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(llava, r"model\.safetensors is damaged or cut short")


def test_weights_with_a_broken_header(llava: Path):
    (llava / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    refused(llava, r"model\.safetensors is damaged or cut short")


def test_a_missing_shard(models: Path, llava: Path):
    load_base(ModelRef(str(models / "llava")), quantization="none", dtype=None, device=CPU).save_pretrained(
        llava, max_shard_size="500KB"
    )
    (llava / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(llava.glob("model-*.safetensors"))
    assert len(shards) > 1
    check_model(ModelRef(str(llava)))
    shards[1].unlink()
    refused(llava, rf"is incomplete: {shards[1].name} is missing")


def test_a_broken_index(llava: Path):
    (llava / "model.safetensors").unlink()
    (llava / "model.safetensors.index.json").write_text("[1, 2]")
    refused(llava, r"index\.json is not an index of weight shards")


def test_a_missing_tensor_is_not_made_up(llava: Path):
    state = load_file(llava / "model.safetensors")
    del state["language_model.model.layers.1.mlp.up_proj.weight"]
    save_file(state, llava / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError,
        match=r"is incomplete: 1 tensors are in no weight file, for example .*layers\.1\.mlp\.up_proj",
    ):
        load_base(ModelRef(str(llava)), quantization="none", dtype=None, device=CPU)


def test_weights_of_another_shape(llava: Path):
    config = json.loads((llava / "config.json").read_text())
    edit_json(llava / "config.json", text_config={**config["text_config"], "intermediate_size": 192})
    with pytest.raises(
        ModelError,
        match=r"does not fit its own config.json: .* is \[64, 128\] in the weights, \[64, 192\] by",
    ):
        load_base(ModelRef(str(llava)), quantization="none", dtype=None, device=CPU)


def test_a_config_that_is_no_json(llava: Path):
    (llava / "config.json").write_text("{")
    refused(llava, "not a valid JSON file")


def test_a_folder_without_config(tmp_path: Path):
    refused(tmp_path, "config.json")


def test_an_unknown_architecture(llava: Path):
    edit_json(llava / "config.json", model_type="lava")
    refused(llava, "`lava`")


def test_a_model_with_code_of_its_own(llava: Path):
    edit_json(
        llava / "config.json", model_type="lava", auto_map={"AutoConfig": "configuration_lava.LavaConfig"}
    )
    (llava / "configuration_lava.py").write_text("raise SystemExit('this code must not run')")
    refused(llava, "brings its own Python code: .* --trust_remote_code")


def test_an_adapter_given_as_a_base(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "is a LoRA adapter, not a base model")


def test_a_text_model(tmp_path: Path):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=300
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    refused(tmp_path, "is not a vision-language model .*'llama'")
