"""Adapters to evaluate, predict with and export: trained once a session, by the commands' own function."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from vlmtune.cluster import connect
from vlmtune.config.parse import parse
from vlmtune.demo.instructions import write_instructions
from vlmtune.single_run import train_adapter


@pytest.fixture(scope="session")
def adapters(models: Path, mall: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter on a tiny LLaVA in NF4, of the mall's images, and one on a tiny Mllama in 8 bits, of text
    rows."""
    folder = tmp_path_factory.mktemp("adapters")
    write_instructions(folder / "rows.jsonl")
    kinds = {"llava": ("nf4", mall, "1e-2"), "mllama": ("int8", folder / "rows.jsonl", "1e-3")}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        connect()
        torch.set_num_threads(1)
        for family, (quantization, data, rate) in kinds.items():
            options = f"--data_path {data} --model_name_or_path {models / family}"
            options += f" --quantization {quantization} --learning_rate {rate}"
            options += (
                f" --output_dir {folder / family} --num_workers 0 --max_steps 8 --eval_strategy no --use_cpu"
            )
            train_adapter(parse(options.split()), lambda _: None)
        torch.set_num_threads(threads)
        ray.shutdown()
    return {family: folder / family for family in kinds}


@pytest.fixture(scope="module")
def one_ray(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray and one cache for a module, because a start costs seconds; the cache has what the adapters
    were trained on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(adapters["llava"].parent / "cache"))
        yield
    ray.shutdown()
