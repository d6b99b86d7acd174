"""CRReLU against its closed form, and EAFO against quadrature, samples and finite differences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from actkit.core.edit import changes
from actkit.core.ground.errors import CoverageError, EditError
from actkit.core.layers.activations import activation_function, is_activation, name_of, record_of
from actkit.core.layers.hidden_act import enter
from actkit.core.layers.moments import Density, entropy
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.core.train.training import train
from actkit.functions.crrelu.crrelu import CRReLU, crrelu, record_at
from actkit.functions.crrelu.eafo import STANDARD, correct, eafo, suggest, worst
from actkit.functions.swap import Swap, swap
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.cats.cats import Cats
from actkit.testing import check_function, tiny_batches, tiny_model

PACKAGE = json.loads(Path(__file__).with_name("ml_networks.json").read_text())


def closed(x: Tensor, epsilon: float) -> Tensor:
    return torch.where(x > 0, x, 0) + epsilon * x * torch.exp(-(x**2) / 2)


# -- the function ------------------------------------------------------------------------------------------------------


def test_the_package_gives_the_same_outputs_and_gradients() -> None:
    """ml-networks, run once at the version that the file names."""
    x, output, slope = (torch.tensor(PACKAGE[name], dtype=torch.float64) for name in ("x", "output", "slope"))
    layer = CRReLU(PACKAGE["epsilon"]).double()
    y = layer(x.requires_grad_())
    y.sum().backward()
    torch.testing.assert_close(y, output, atol=1e-12, rtol=0)
    torch.testing.assert_close(x.grad, slope, atol=1e-12, rtol=0)
    assert layer.epsilon.grad is not None
    assert float(layer.epsilon.grad) == pytest.approx(PACKAGE["to_epsilon"], abs=1e-12)
    torch.testing.assert_close(CRReLU(PACKAGE["epsilon"])(x.float()).double(), output, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("epsilon", [0.01, -0.3, 2.0])
def test_it_is_the_closed_form(epsilon: float) -> None:
    x = torch.linspace(-5, 5, 201, dtype=torch.float64)
    assert torch.allclose(crrelu(x, epsilon), closed(x, epsilon), rtol=1e-14, atol=1e-15)
    for dtype, bound in ((torch.float32, 1e-7), (torch.bfloat16, 4e-3)):
        found = CRReLU(epsilon)(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), closed(x.to(dtype).double(), epsilon), rtol=bound, atol=bound)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CRReLU(epsilon)(x.float()), crrelu(x.float(), CRReLU(epsilon).epsilon))
    large = torch.tensor([-6e4, 6e4], dtype=torch.float16)  # whose squares float16 does not hold
    assert torch.equal(crrelu(large, epsilon), torch.tensor([-0.0, 6e4], dtype=torch.float16))


def test_gradients() -> None:
    layer = CRReLU(0.3, per_channel=True, channels=4).double()
    x = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, e: crrelu(x, e), (x, layer.epsilon))
    layer(x).sum().backward()
    expected = (x * torch.exp(-(x**2) / 2)).sum(0)
    torch.testing.assert_close(layer.epsilon.grad, expected.detach())
    assert torch.autograd.gradgradcheck(lambda x, e: crrelu(x, e), (x, layer.epsilon))


def test_the_backward_pass_keeps_the_input_alone() -> None:
    """And gives what automatic differentiation of the closed form gives, in bfloat16 from float32."""
    kept: dict[int, int] = {}
    x = torch.randn(100, 50).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.update({t.data_ptr(): t.nbytes}), t)[1], lambda t: t):
        CRReLU()(x)
    assert sum(kept.values()) == x.nbytes + 4
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        epsilons = [torch.tensor(0.3, requires_grad=True) for _ in range(2)]
        ours, theirs = (torch.linspace(-4, 4, 64).to(dtype).requires_grad_() for _ in range(2))
        crrelu(ours, epsilons[0]).sum().backward()
        closed(theirs.float(), epsilons[1]).sum().backward()  # type: ignore[arg-type]
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=bound, atol=bound)
        torch.testing.assert_close(epsilons[0].grad, epsilons[1].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.01, -0.3, -1.0, -2.5, 1.0, 2.3, 5.0, 0.0])
def test_its_record_holds_at_any_epsilon(epsilon: float) -> None:
    """Left of 0 it turns at -1; right of 0 it rises throughout from -1 to 2.24, and Lambert's W says where not."""
    check_function(record_at(epsilon))
    turns = [piece.start for piece in record_at(epsilon).pieces if piece.start > 0]
    assert len(turns) == {-2.5: 1, 2.3: 2, 5.0: 2}.get(epsilon, 0)


def test_what_a_module_says_of_itself() -> None:
    assert record_of(CRReLU(0.2)).name == "crrelu(0.2)" and is_activation(CRReLU()) and name_of(CRReLU()) is None
    assert record_of(CRReLU(0.2, per_channel=True, channels=3)).name == "crrelu(0.2)"  # each has its own, but the same
    fixed = CRReLU(0.2, learned=False)
    assert not list(fixed.parameters()) and fixed.half().epsilon.dtype == torch.float32
    images = torch.randn(2, 3, 4, 5)
    by_channel = CRReLU(per_channel=True, channels=3, dim=-3)
    with torch.no_grad():
        by_channel.epsilon.copy_(torch.tensor([0.1, 0.2, 0.3]))
    for channel, epsilon in enumerate((0.1, 0.2, 0.3)):
        torch.testing.assert_close(by_channel(images)[:, channel], closed(images[:, channel], epsilon))
    assert torch.equal(
        CRReLU(per_channel=True, channels=3, dim=1)(images), CRReLU(per_channel=True, channels=3, dim=-3)(images)
    )
    for settings, message in (({"per_channel": True}, "channels: None"), ({"epsilon": math.nan}, "epsilon: nan")):
        with pytest.raises(ValueError, match=message):
            CRReLU(**settings)


# -- in models ---------------------------------------------------------------------------------------------------------


def logits(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def test_in_a_model_by_name(tmp_path: Path) -> None:
    """Swapped in with one line, trained, stacked with CATS and rounding, saved, loaded and undone."""
    model, batches = tiny_model("llama"), tiny_batches("llama")
    before = logits(model, batches[0])
    applied = swap(model, "silu", "crrelu")
    places = [module for module in model.modules() if isinstance(module, CRReLU)]
    assert len({id(place.epsilon) for place in places}) == len(places) == 2 and model.config.hidden_act == "crrelu"
    assert torch.equal(logits(applied.undo(), batches[0]), before) and model.config.hidden_act == "silu"
    swap(model, "silu", "crrelu")
    train(model, batches, validation=[*tiny_batches("llama", lengths=((5, 5),))], steps=3, learning_rate=0.01)
    places = [module for module in model.modules() if isinstance(module, CRReLU)]
    assert all(float(place.epsilon.detach()) != CRReLU().start for place in places)
    apply(model, [Cats(sparsity=0.3), RoundToNearest(bits=8, group_size=-1)], batches, progress=False)
    checkpoint.save(model, tmp_path / "stacked")
    assert torch.equal(logits(checkpoint.load(tmp_path / "stacked"), batches[0]), logits(model, batches[0]))
    assert next(iter(changes.of(model).recipe[0])) == "swap"  # type: ignore[union-attr]


def test_built_by_its_name_in_a_config() -> None:
    enter("crrelu")
    model = tiny_model("llama", hidden_act="crrelu").bfloat16()
    assert {module.epsilon.dtype for module in model.modules() if isinstance(module, CRReLU)} == {torch.float32}
    assert logits(model, tiny_batches("llama")[0]).dtype == torch.bfloat16


def test_one_for_each_channel_is_told_how_many() -> None:
    model = tiny_model("llama")
    apply(model, Swap(where=("silu",), new={"module": "crrelu", "spec": {"per_channel": True}}), progress=False)
    width = model.config.intermediate_size
    assert {module.epsilon.shape for module in model.modules() if isinstance(module, CRReLU)} == {(width,)}
    unknown = nn.Sequential(nn.Bilinear(2, 2, 3), nn.ReLU())
    with pytest.raises(EditError, match="nothing can be made for 1: channels: None"):
        apply(unknown, Swap(where=("relu",), new={"module": "crrelu", "spec": {"per_channel": True}}), progress=False)


# -- EAFO --------------------------------------------------------------------------------------------------------------


def test_the_correction_of_a_relu_is_its_own_term() -> None:
    """Where a ReLU is the identity: eta = u exp(-u^2 / 2) / sqrt(2 pi), and the function changes by its negative."""
    u = torch.linspace(-3, 3, 31, dtype=torch.float64)
    found = correct(activation_function("identity"), Density.normal())
    term = u * torch.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(found.of_inverse(u), term, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.of_function(u), -term, rtol=1e-10, atol=1e-14)
    given = suggest(Density.normal())
    assert given.epsilon == pytest.approx(STANDARD, abs=1e-10) and given.fit == pytest.approx(1, abs=1e-10)
    wide = suggest(Density.normal(0.5, 2.0))

    def integral(values: Any) -> float:
        return float(quad(values, 0, 20, epsabs=1e-13)[0])

    def p(u: float) -> float:
        return math.exp(-(((u - 0.5) / 2) ** 2) / 2) / (2 * math.sqrt(2 * math.pi))

    term_of = lambda u: u * math.exp(-(u**2) / 2)  # noqa: E731
    expected = integral(lambda u: p(u) * term_of(u) * -(u - 0.5) / 4 * p(u)) / integral(
        lambda u: p(u) * term_of(u) ** 2
    )
    assert wide.epsilon == pytest.approx(expected, abs=1e-10) and 0 < wide.fit < 1
    assert suggest(Density.normal(-50.0)) == suggest(Density.normal(-60.0))  # nothing is above 0


@pytest.mark.parametrize("name", ["softplus", "sigmoid", "tanh", "identity"])
def test_the_correction_lowers_the_entropy(name: str) -> None:
    """Of the function changed by a small step of df, by quadrature; and a step the other way raises it."""
    record, density = activation_function(name), Density.normal()
    change = correct(record, density).of_function
    step = 1e-3

    def moved(by: float) -> float:
        slope_of_change = lambda x: (change(x + 1e-4) - change(x - 1e-4)) / 2e-4  # noqa: E731
        x, weights = density.rule()
        kept = weights > 1e-15
        x, weights = x[kept], weights[kept]
        return density.entropy() + float((weights * (record.derivative(x) + by * slope_of_change(x)).log()).sum())  # type: ignore[misc]

    assert moved(step) < moved(0.0) < moved(-step)
    assert moved(0.0) == pytest.approx(entropy(record, density), abs=1e-9)


def test_by_bisection_and_for_any_function() -> None:
    record, y = activation_function("softplus"), torch.linspace(0.1, 3, 12, dtype=torch.float64)
    for density in (Density.normal(), Density.measured(torch.randn(500, generator=torch.Generator().manual_seed(0)))):
        ours, theirs = correct(record, density), correct(record.function, density)
        torch.testing.assert_close(ours.of_inverse(y), theirs.of_inverse(y), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ours.of_function(y), theirs.of_function(y), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="does not rise"):
        correct(activation_function("gelu"), Density.normal())


def test_the_worst_function_makes_its_output_uniform() -> None:
    """Also of measured inputs; nothing corrects it, as its entropy is the largest."""
    x = (torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2).exp()
    for density, values in ((Density.normal(), torch.randn(4000, dtype=torch.float64)), (Density.measured(x), x)):
        found = worst(density, -1.0, 3.0)
        share = ((found(values) + 1) / 4).sort().values
        assert float((share - torch.linspace(0, 1, len(share))).abs().max()) < 0.05  # Kolmogorov and Smirnov
        assert entropy(found, density) == pytest.approx(math.log(4), abs=1e-6)
    assert correct(worst(Density.normal()), Density.normal()).of_inverse(torch.tensor([0.2, 0.9])).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"low, high: 1\.0 and 0\.0"):
        worst(Density.normal(), 1.0, 0.0)


def test_the_layers_of_a_model() -> None:
    """Each row is that of the values that a hook sees; padding is left out."""
    model, batches = tiny_model("llama", hidden_act="relu"), tiny_batches("llama")
    result = eafo(model, batches, progress=False)
    assert [layer.path for layer in result.layers] == [f"model.layers.{i}.mlp.act_fn" for i in range(2)]
    seen: list[Tensor] = []
    act = model.model.layers[1].mlp.act_fn
    handle = act.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for batch in batches:
        logits(model, batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    values = torch.cat([x[mask].flatten() for x, mask in zip(seen, masks, strict=True)]).double()
    layer = result.layers[1]
    assert result.values == values.numel() and layer.function == "relu"
    assert layer.mean == pytest.approx(float(values.mean()), abs=2e-3)
    assert layer.deviation == pytest.approx(float(values.std()), rel=2e-3)
    assert layer.zeros == pytest.approx(float((values <= 0).double().mean()), abs=1e-12)
    expected = suggest(Density.measured(values))
    assert layer.epsilon == pytest.approx(expected.epsilon, abs=0.02)
    with pytest.raises(CoverageError, match="no activation function that is a module"):
        eafo(nn.Sequential(nn.Linear(3, 3)), [torch.randn(2, 3)], progress=False)
