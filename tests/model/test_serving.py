"""What vLLM takes and refuses, on the content of adapter folders."""

import re
from typing import Any

import pytest

from vlmtune.model.serving import max_lora_rank, refusals

PREFIX = "model.language_model."
TENSORS = [f"base_model.model.{PREFIX}layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"]


def refused(*more: str, model_type: str = "llava", **changes: Any) -> list[str]:
    config = {"r": 8, "lora_alpha": 16, "bias": "none", "use_dora": False, "modules_to_save": None, **changes}
    return refusals(config, [*TENSORS, *more], model_type=model_type, language_prefix=PREFIX)


def test_a_plain_adapter_is_taken() -> None:
    assert refused() == []
    assert refused(use_rslora=True) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 513}, "rank 513 is above 512"),
        ({"rank_pattern": {"q_proj": 1024}}, "rank 1024 is above 512"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "bias"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \(lm_head\)"),
        ({"alpha_pattern": {"q_proj": 4}}, "one rank and alpha"),
        ({"model_type": "mllama"}, "Llama-3.2-Vision left vLLM"),
    ],
)
def test_what_it_refuses(changes: dict[str, Any], reason: str) -> None:
    assert any(re.search(reason, one) for one in refused(**changes))


def test_layers_beside_the_language_model_and_strange_tensors() -> None:
    assert (
        "model.vision_tower.q_proj" in refused("base_model.model.model.vision_tower.q_proj.lora_A.weight")[0]
    )
    assert refused("base_model.model.x.magnitude") == [
        "it does not know the tensor base_model.model.x.magnitude"
    ]


def test_ranks_are_rounded_up_to_what_the_option_takes() -> None:
    assert [max_lora_rank(rank) for rank in (1, 4, 8, 9, 300, 512, 513)] == [1, 8, 8, 16, 320, 512, None]
