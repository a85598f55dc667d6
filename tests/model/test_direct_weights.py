"""Layers whose weights the model's code reads itself stay unquantised."""

import torch
from torch import nn

from vlmtune.model.direct_weights import directly_read_layers


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x.to(self.embedding.weight.dtype))
        return self.head(self.norm(x.to(self.norm.weight.dtype)))


class Clamped(Patches):
    def clamp(self) -> None:
        self.head.weight.data.clamp_(-1, 1)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Patches(), Clamped()])
        self.projector = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.to(self.blocks[0].head.weight.dtype), self.projector.weight)


def test_linear_layers_whose_weights_other_code_mentions_are_found():
    assert directly_read_layers(Tower()) == [
        "projector",
        "blocks.0.embedding",
        "blocks.1.embedding",
        "blocks.1.head",
    ]


def test_a_class_made_at_run_time_is_passed_over():
    made = type("Made", (nn.Module,), {"forward": lambda self, x: x})
    assert directly_read_layers(nn.Sequential(made(), nn.Linear(2, 2))) == []
