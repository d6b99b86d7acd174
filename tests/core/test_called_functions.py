"""Activation functions that are called as functions: found behind their layers, and only there."""

from __future__ import annotations

import torch
from tiny_models import build
from torch import Tensor, nn

from actkit.core.model.anatomy import anatomy
from actkit.core.model.called_functions import called_functions


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 2, 3), nn.Linear(72, 4), nn.Linear(4, 3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).flatten(1)
        return self.third(self.act(self.second(x)))


def test_they_are_named_by_what_reads_them() -> None:
    (found,) = called_functions(anatomy(Net(), torch.randn(2, 1, 8, 8)))
    assert (found.name, found.before, found.label) == ("relu", "second", "relu before second")
    assert str(found.site) == "layer.input:second" and found.gives_zeros
    assert not list(called_functions(anatomy(build("llama"))))
