"""Private and experimental APIs of other libraries: used in `vlmtune.compat` alone, and still as they were.

Where a test of the second half fails after an upgrade, the API has moved: change the function in
`vlmtune/compat`, not its callers.
"""

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from test_imports import inside, read_sources

import vlmtune
from vlmtune.cluster import connect

# Documented in spite of its underscore: https://docs.python.org/3/library/collections.html#collections.namedtuple
NAMED_TUPLE = {"_replace", "_asdict", "_fields"}
# Packages that their libraries call internal without an underscore.
INTERNAL = ("ray.train.v2", "transformers.masking_utils")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


def own_names(tree: ast.AST) -> set[str]:
    """The names that a module defines itself: functions, classes, fields, and attributes that it assigns."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
        elif isinstance(node, ast.AnnAssign | ast.Name):
            target = node.target if isinstance(node, ast.AnnAssign) else node
            if isinstance(target, ast.Name):
                names.add(target.id)
    return names


DOCUMENTED = {"os._exit"}  # private by its name alone


def private_uses(source: str) -> list[str]:
    """The private attributes and modules of other libraries in a module's text, each as it is written."""
    tree = ast.parse(source)
    own, uses = own_names(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            uses += [name for name in [ast.unparse(node)] if name not in DOCUMENTED]
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            foreign = not inside(name, "vlmtune")
            if foreign and (
                any(is_private(part) for part in name.split("."))
                or any(inside(name, package) for package in INTERNAL)
            ):
                uses.append(name)
    return uses


def modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(vlmtune.__path__, "vlmtune."):
        if not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


def test_private_parts_of_other_libraries_are_used_in_compat_alone() -> None:
    found = {
        module: uses
        for module, source in read_sources().items()
        if not inside(module, "vlmtune.compat") and (uses := private_uses(source))
    }
    assert found == {}, "put a function for it into vlmtune/compat, with its version, reason and test"


def test_no_class_overrides_a_private_part_of_another_library() -> None:
    overridden = [
        f"{one.__module__}.{one.__qualname__}.{name} of {base.__module__}.{base.__qualname__}"
        for module in modules()
        for one in vars(module).values()
        if isinstance(one, type) and one.__module__ == module.__name__
        for base in one.__mro__[1:]
        if not inside(base.__module__, "vlmtune")
        for name, value in vars(one).items()
        if is_private(name)
        and name in vars(base)
        and isinstance(value, FunctionType)
        and value.__module__ == module.__name__
    ]
    assert overridden == []


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("model._parameters", ["model._parameters"]),
        ("def _own(): ...\nmodule._own()", []),
        ("class A:\n    def __init__(self): self._x = 1\n    def get(self): return self._x", []),
        ("other._x = 1", ["other._x"]),
        ("import torch\ntorch._dynamo.config.x = 1", ["torch._dynamo"]),
        ("from ray.data._internal import plan", ["ray.data._internal.plan"]),
        ("from ray.train.v2.api import callback", ["ray.train.v2.api.callback"]),
        ("from torch.utils import _pytree", ["torch.utils._pytree"]),
        ("from vlmtune.data import _hidden", []),
        ("url._replace(path='')", []),
        ("model.__class__", []),
    ],
)
def test_a_private_use_is_found(source: str, uses: list[str]) -> None:
    assert private_uses(source) == uses


# Each API that compat uses


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    connect()
    yield
    ray.shutdown()


def test_datasets_have_a_fingerprint_of_their_content() -> None:
    from datasets import Dataset

    from vlmtune.compat.datasets import fingerprint_of

    one, same, other = (Dataset.from_dict({"text": [text]}) for text in "aab")
    assert fingerprint_of(one) == fingerprint_of(same) != fingerprint_of(other)


def test_ray_data_calls_an_execution_callback(ray_cluster: None) -> None:
    import ray.data

    from vlmtune.compat.ray_data import ExecutionCallback, set_execution_callback

    calls: list[Any] = []

    class Count(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            calls.append(executor)

    dataset = ray.data.from_items([{"a": 1}]).map(lambda row: row)
    set_execution_callback(dataset, Count)
    assert dataset.take_all() == [{"a": 1}]
    assert calls, "Ray Data no longer calls on_execution_step of custom_execution_callback_classes"


def test_ray_train_errors_of_a_lost_worker_have_their_base() -> None:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from vlmtune.compat.ray_train import is_worker_loss

    assert is_worker_loss(WorkerHealthCheckFailedError("gone", failure=RuntimeError()))
    assert not is_worker_loss(ValueError("raised in the worker"))


def test_optuna_search_has_optunas_trials() -> None:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    from vlmtune.compat.ray_tune import completed_trials, optuna_study, optuna_trial

    def space(trial: optuna.Trial) -> None:
        trial.suggest_float("x", 0, 1)

    search = OptunaSearch(space, metric="loss", mode="min")
    search.suggest("a")
    assert isinstance(optuna_trial(search, "a"), optuna.Trial)
    assert completed_trials(search) == set()
    search.on_trial_complete("a", {"loss": 1.0})
    assert completed_trials(search) == {"a"}
    assert len(optuna_study(search).trials) == 1


def test_trees_of_tensors_are_flattened() -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    from vlmtune.compat.torch import flatten, unflatten

    output = BaseModelOutputWithPast(last_hidden_state=torch.ones(2))  # type: ignore[arg-type]
    leaves, structure = flatten((output, {"b": 1, "a": None}))
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 1
    again, rest = unflatten(leaves, structure)
    assert isinstance(again, BaseModelOutputWithPast) and rest == {"b": 1, "a": None}


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs fp8 units"
)
def test_scaled_products_of_8_bit_floats() -> None:
    from vlmtune.compat.torch import scaled_matmul

    a, b = (torch.randn(32, 32, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.full((32, 1), 0.5, device="cuda")
    found = scaled_matmul(a, b.t(), scale, scale.t().contiguous())
    torch.testing.assert_close(found, (a.float() @ b.float().t() / 4).bfloat16(), rtol=0.02, atol=0.02)


def llama(implementation: str) -> Any:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(vocab_size=32, **sizes, attn_implementation=implementation)).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_decoder_makes_its_masks_by_its_own_config(implementation: str) -> None:
    """With the changed config padding is seen, and a later token still is not."""
    from vlmtune.compat.transformers import config_without_padding_mask

    model, ids = llama(implementation), torch.arange(12).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    whole = model(ids).last_hidden_state
    assert not torch.allclose(model(ids, attention_mask=mask).last_hidden_state[1, -1], whole[1, -1])
    config = model.config
    model.config = config_without_padding_mask(config)
    torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state, whole)
    changed = torch.cat([ids[:, :-1], torch.zeros_like(ids[:, -1:])], 1)
    later = model(changed, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(later[:, :-1], whole[:, :-1])
    assert config._attn_implementation == implementation
    assert model.config.to_dict() == config.to_dict()


def test_layers_have_their_checkpointing() -> None:
    from vlmtune.compat.transformers import run_checkpointed

    model = llama("sdpa").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return (2 * x).sin()

    x = torch.ones(3, requires_grad=True)
    run_checkpointed(model.layers[0], double, x).sum().backward()
    assert len(calls) == 2, "the function is no longer run again in the backward pass"


def test_the_fused_head_scores_labels_that_are_shifted_already() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from vlmtune.compat.trl import add_fused_lm_head

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    ids = torch.arange(10).view(2, 5)
    expected = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    add_fused_lm_head(model)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    found = model(ids, shift_labels=shifted, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs[:, :-1], expected)
    assert found.log_probs[:, -1].tolist() == [0, 0]
    assert found.label_mask.sum() == found.is_top1.numel() - 2
