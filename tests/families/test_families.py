"""Tiny models of vision-language families through vlmtune, against transformers, PEFT and TRL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from transformers.utils.import_utils import is_timm_available, is_torchvision_available

from families.builders import FAMILIES, build
from families.cases import write_rows
from families.checks import CHECKS, Trial
from families.kit import Subject
from vlmtune.cluster import connect

pytestmark = [
    pytest.mark.skipif(not is_torchvision_available(), reason="these families' processors need torchvision"),
    pytest.mark.filterwarnings(
        "ignore"
    ),  # of transformers' and TRL's, about sizes and options of tiny models
]

# One family for each kind of model that must work; the rest is in the heavy tests.
FAST = (
    "qwen3_vl",  # deep-stack features, multimodal positions
    "idefics2",  # no replacement offsets
    "gemma3",  # masks in a dict
    "cohere2_vision",  # several templates, a logit scale that the class leaves out
    "janus",  # no image_token_id
    "llava_onevision",  # several images of a row in other crops
    "deepseek_vl_hybrid",  # two pixel tensors
    "lfm2_vl",  # an attention whose output is `out_proj`
    "llama4",  # no backbone under the head, bfloat16 pixels
    "molmo2",  # a BOS of the processor's
    "qwen3_5",  # an empty thought
    "paligemma",  # a prefix language model
    "florence2",  # an encoder-decoder
)
# What does not work, by family: the checks, and why.
KNOWN: dict[str, tuple[str, ...]] = {
    # Refused: images padded to the largest of a batch have other features.
    "emu3": ("training", "stock"),
    # Refused over quantised weights: their classes cast images to the type of their weights.
    "ernie4_5_vl_moe": ("training", "packed"),
    "lfm2_vl": ("training", "packed"),
    "gemma3n": ("training", "packed"),  # refused over quantised weights: its class clips them in each step
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    connect()
    yield tmp_path_factory.mktemp("families")
    ray.shutdown()


def check(name: str, work: Path) -> None:
    """Every check of a family ends well, or in one plain line for a family that is not to be trained."""
    if FAMILIES[name].needs == "timm" and not is_timm_available():
        pytest.skip("needs timm")
    model = work / "models" / name
    build(name, model)
    trial = Trial(FAMILIES[name], Subject(model, write_rows(work / "rows"), work / "runs" / name))
    for check, run in CHECKS.items():
        trial.check(check, run)
    bad = {
        check: outcome
        for check, outcome in trial.outcomes.items()
        if check not in KNOWN.get(name, ())
        and (outcome.state in ("wrong", "traceback") or (outcome.state == "refused" and FAMILIES[name].end))
    }
    assert not bad


@pytest.mark.parametrize("name", FAST)
def test_a_family_of_each_kind_is_right(name: str, work: Path):
    check(name, work)


@pytest.mark.heavy
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FAST])
def test_every_family_is_right_or_refused_plainly(name: str, work: Path):
    check(name, work)
