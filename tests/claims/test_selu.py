"""SELU's experiments: the theory in full, the rest on tiny sizes, and what is judged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actkit.claims import selu
from actkit.core.layers.activations import Activation

TINY = selu.Sizes(seeds=(0, 1), layers=16, width=128, inputs=64, depth=3, units=8, epochs=1, tasks=2)


def test_the_map_holds() -> None:
    found = selu.the_map()
    assert found.passed and "functions: selu, with a radius of 0.7826" in found.here


def test_networks_differ_by_method_alone() -> None:
    nets = {method: selu.network(method, 5, 3, 0, TINY) for method in selu.METHODS}
    kinds = {method: {type(module) for module in net} for method, net in nets.items()}
    assert kinds["relu, He"] == {nn.Linear, nn.ReLU} and kinds["selu"] == {nn.Linear, Activation}
    assert nn.BatchNorm1d in kinds["relu, batch norm"] and nn.LayerNorm in kinds["relu, layer norm"]
    wide = selu.Sizes(depth=3, units=400)
    for method, expected in (("selu", 1.0), ("relu, He", 2.0)):
        assert float(selu.network(method, 5, 3, 0, wide)[2].weight.var()) * 400 == pytest.approx(expected, rel=0.05)


def test_tables_are_standardised_by_their_training_rows_and_split_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    class Watched(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.detach())
            return super().forward(x)

    monkeypatch.setattr(selu, "network", lambda *args: Watched(2, 2))
    x = torch.arange(200.0).view(100, 2) * 3 + 7
    selu._trained("selu", x, torch.zeros(100, dtype=torch.int64), 0.01, 0, TINY)
    train, validation, test = seen
    assert (len(train), len(validation), len(test)) == (60, 20, 20)
    assert float(train.mean().abs()) < 1e-5 and float(train.std(0).mean()) == pytest.approx(1, abs=1e-5)
    assert len(torch.cat(seen).unique(dim=0)) == 100


def test_training_on_tiny_sizes() -> None:
    assert "selu: mean rank" in selu.on_tables(TINY, progress=False).here


def test_deep_networks_on_a_tiny_size() -> None:
    """Narrow ones leave the box by chance; the text names every arm."""
    here = selu.sixty_four_layers(TINY).here
    assert all(f"{arm} from (0, 1)" in here for arm in ("SELU", "SELU, alpha dropout", "SELU, dropout", "tanh", "ELU"))


@pytest.mark.parametrize(
    ("ours", "he", "ranks", "passed"),
    [(80, 70, (1.5, 4, 1.2, 2), True), (80, 70, (1.8, 4, 1.2, 2), False), (80, 76, (1, 4, 2, 3), False)],
)
def test_what_passes(ours: float, he: float, ranks: tuple[float, ...], passed: bool) -> None:
    accuracy = dict(zip(selu.METHODS, ({"a": float(each)} for each in (ours, he, 79, 78))))
    assert selu.judged(accuracy, dict(zip(selu.METHODS, ranks))).passed == passed
