"""CRReLU's experiments: the theory in full, the training on a tiny size, and what is judged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actkit.claims import crrelu
from actkit.core.layers.moments import Density, entropy
from actkit.functions.crrelu.crrelu import CRReLU

TINY = crrelu.Sizes(seeds=(0, 1), functions=3, epochs=1, images=64)


def test_the_theory_holds() -> None:
    assert crrelu.worst_of_all(crrelu.Sizes()).passed and crrelu.correction_lowers().passed


def test_random_functions_rise_from_0_to_1_and_differ() -> None:
    x = torch.linspace(-40, 40, 801, dtype=torch.float64)
    found = [crrelu._mixture(seed) for seed in range(3)]
    for function in found:
        y = function(x)
        assert bool((y.diff() >= 0).all()) and float(y[0]) < 1e-6 and float(y[-1]) > 1 - 1e-6
    assert len({round(entropy(function, Density.normal()), 6) for function in found}) == 3


def test_a_wrong_correction_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved the other way the entropies rise; a correction with a wrong term is another one by the inverse."""
    assert crrelu._moved(crrelu.RISING["softplus"], step=-0.01) > 0
    monkeypatch.setattr(crrelu, "_density", lambda u: 2 * torch.exp(-(u**2) / 2))
    with pytest.raises(AssertionError, match="another one"):
        crrelu._moved(crrelu.RISING["softplus"])


def test_arms_start_alike_and_differ_in_the_function_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crrelu, "train", lambda model, *args, **settings: None)
    models = {name: crrelu.trained(name, 0, TINY) for name in crrelu.ARMS}
    for name, model in models.items():
        kinds = [type(module) for module in model.modules() if isinstance(module, tuple(CLASSES))]
        assert kinds == [CLASSES_BY_NAME[name]] * 2
        assert torch.equal(model.classifier.weight, models["relu"].classifier.weight)


CLASSES_BY_NAME = {"crrelu": CRReLU, "relu": nn.ReLU, "gelu": nn.GELU, "prelu": nn.PReLU}
CLASSES = CLASSES_BY_NAME.values()


def test_training_on_a_tiny_size() -> None:
    here = crrelu.on_digits(TINY, progress=False).here
    assert "crrelu" in here and "CRReLU less relu" in here and "of 4" in here


@pytest.mark.parametrize(
    ("ours", "relu", "epsilon", "passed"),
    [(97.0, 97.2, 0.05, True), (96.8, 97.2, 0.05, False), (99.0, 97.0, 0.0105, False)],
)
def test_what_passes(ours: float, relu: float, epsilon: float, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(name: str, seed: int, sizes: crrelu.Sizes) -> nn.Module:
        return nn.Sequential(CRReLU(epsilon)) if name == "crrelu" else nn.Sequential(nn.ReLU())

    monkeypatch.setattr(crrelu, "trained", trained)
    monkeypatch.setattr(crrelu, "_accuracy", lambda model: ours if isinstance(model[0], CRReLU) else relu)
    assert crrelu.on_digits(TINY, progress=False).passed == passed


def test_the_premise_is_counted_by_layer() -> None:
    good, steep, poor = (-0.4, 0.95, 1.0, 1.0), (-1.0, 0.95, 0.5, 1.0), (-0.4, 0.5, 2.0, 1.0)
    assert crrelu.judged([good, good, steep, poor], 10).passed
    assert not crrelu.judged([good, steep, poor], 10).passed
