"""Importance against closed forms of the Hessian, its modes against each other, and what LayerNorm does to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from actkit.core.forward.batch import first_tensor, forward
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.watch.importance import Divergence, perturbation_importance, squared_gradient
from actkit.testing import tiny_batches, tiny_model

MSE = Divergence("mse")


def importance(model: nn.Module, path: str, batches: list, **settings: object) -> list[Tensor]:
    return perturbation_importance(model, [path], batches, progress=False, **settings)[path]  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["perturb", "hvp"])
def test_squared_errors_behind_a_linear_layer_have_a_known_hessian(mode: str) -> None:
    """L = |W (a' - a)|^2 / n for each row, so H = 2 W'W / n, and its rows are summed."""
    model, batches = tiny_model("mlp"), tiny_batches("mlp")
    weight = model.second.weight.detach().double()
    expected = (2 / len(weight) * weight.t() @ weight).sum(1).abs()
    (found,) = importance(model, "act", batches, divergence=MSE, mode=mode)
    assert found.shape == (1, 24)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-6)


def test_random_signs_find_the_diagonal() -> None:
    model, batches = tiny_model("mlp"), tiny_batches("mlp")
    weight = model.second.weight.detach()
    expected = 2 / len(weight) * weight.square().sum(0)
    (found,) = importance(model, "act", batches, divergence=MSE, mode="hutchinson", draws=300)  # for each of 40 rows
    torch.testing.assert_close(found[0], expected, rtol=0.1, atol=0.05)


def test_the_divergence_of_probabilities_has_a_known_diagonal() -> None:
    """Of logits H = (diag(p) - p p') / T^2, whose rows sum to 0."""
    model, batch = tiny_model("mlp"), tiny_batches("mlp")[0]
    p = torch.softmax(model(batch).detach().double() / 2, -1)
    settings = {"divergence": Divergence("kl", 2.0), "average": None}
    (found,) = importance(model, "second", [batch], mode="hutchinson", draws=4000, **settings)
    torch.testing.assert_close(found.double(), p * (1 - p) / 4, rtol=0.2, atol=0.002)
    (sums,) = importance(model, "second", [batch], mode="hvp", **settings)
    assert float(sums.max()) < 1e-12


def test_finite_differences_agree_with_products() -> None:
    """In a language model too, each token by itself."""
    model, batches = tiny_model("gpt2"), tiny_batches("gpt2", lengths=((7, 7),))
    path = "h.0.mlp.c_fc" if hasattr(model, "h") else "transformer.h.0.mlp.c_fc"
    kwargs = {"divergence": MSE, "average": None}
    perturbed, product = (importance(model, path, batches, mode=mode, **kwargs)[0] for mode in ("perturb", "hvp"))
    assert float((perturbed - product).norm() / product.norm()) < 1e-4
    narrow = importance(model, path, batches, dtype=torch.float32, **kwargs)[0]
    assert float((narrow - product).norm() / product.norm()) > 1e-2  # rounding


def test_behind_it_stands_a_norm_that_takes_no_notice_of_a_shift() -> None:
    model, batches = tiny_model("vit"), tiny_batches("vit")
    path = "vit.layers.0"
    (sums,), (diagonal,), (perturbed,) = (
        importance(model, path, batches, mode=mode) for mode in ("hvp", "hutchinson", "perturb")
    )
    assert float(sums.max()) < 1e-12 * float(diagonal.max())
    assert float(perturbed.max()) < 1e-6 * float(diagonal.max())
    inside = [importance(model, "vit.layers.0.mlp.fc1", batches, mode=mode)[0] for mode in ("perturb", "hvp")]
    torch.testing.assert_close(*inside, rtol=1e-3, atol=1e-6 * float(inside[1].max()))


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_averages_are_those_of_the_rows(kind: str) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind)
    path = "vit.layers.1" if kind == "vit" else "model.layers.1"
    each = importance(model, path, batches, mode="hvp", average=None)
    (found,) = importance(model, path, batches, mode="hvp")
    if kind == "vit":
        torch.testing.assert_close(found, torch.cat(each).mean(0, keepdim=True))
        return
    rows = [h[batch["attention_mask"].bool()] for h, batch in zip(each, batches, strict=True)]
    torch.testing.assert_close(found, torch.cat(rows).mean(0)[None, None])
    (first,) = importance(model, path, batches, mode="hvp", tokens=9)
    torch.testing.assert_close(first, each[0][0].mean(0)[None, None])


def test_padding_has_no_importance() -> None:
    model, (batch, *_) = tiny_model("bert"), tiny_batches("bert", lengths=((9, 4),))
    path = "bert.encoder.layer.0.output"
    (found,) = importance(model, path, [batch], mode="hutchinson", average=None)
    assert float(found[1, 4:].max()) == 0 and float(found[1, :4].min()) > 0


def test_squared_gradients_are_those_of_finite_differences() -> None:
    """Of a model whose end was changed, so that the gradient is not 0."""
    model, (batch, *_) = tiny_model("mlp").double(), tiny_batches("mlp")
    batch = batch.double()[:2]
    reference = first_tensor(forward(model, batch)).detach()
    with torch.no_grad():
        model.second.weight.mul_(1.3)
        (found,) = squared_gradient(model, "act", [batch], [reference], MSE)
        hidden, step = model.act(model.first(batch)), 1e-6
        for row, channel in ((0, 1), (1, 5)):
            losses = []
            for sign in (1, -1):
                moved = hidden.clone()
                moved[row, channel] += sign * step
                losses.append(float(MSE(model.second(moved), reference)))
            slope = (losses[0] - losses[1]) / (2 * step)
            assert float(found[row, channel]) == pytest.approx(slope**2, rel=1e-4, abs=1e-12)


def test_the_model_is_left_alone() -> None:
    model = tiny_model("vit").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    importance(model, "vit.layers.0", tiny_batches("vit"))
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_places_of_sentences_cannot_be_averaged() -> None:
    with pytest.raises(DataError, match="give 'tokens'"):
        importance(tiny_model("llama"), "model.layers.0", tiny_batches("llama"), average="samples")


def test_what_has_no_classes_has_no_divergence_of_them() -> None:
    with pytest.raises(UnsupportedModelError, match="give 'mse'"):
        importance(tiny_model("bert").bert, "encoder.layer.0", tiny_batches("bert"))


def test_a_module_must_run_once() -> None:
    twice = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    model = nn.Sequential(twice, twice)
    with pytest.raises(UnsupportedModelError, match="it ran 2 times"):
        importance(model, "0", tiny_batches("mlp"), divergence=MSE)
