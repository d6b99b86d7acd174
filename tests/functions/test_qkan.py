"""QKAN against complex state vectors, the package `qkan`, Fourier transforms, and the models it is put into."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit import zoo
from actkit.core.ground.errors import RecipeError
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.functions.qkan.circuit import ANSATZE, Ansatz, Circuit, Measure
from actkit.functions.qkan.daruan import Daruan
from actkit.functions.qkan.network import Hqkan, Qkan
from actkit.functions.qkan.qkan_layer import QkanLayer
from actkit.functions.qkan.replace import ReplaceByHqkan
from actkit.functions.swap import swap
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_transform, tiny_batches, tiny_model
from representative import architectures

PACKAGE = json.loads(Path(__file__).with_name("qkan_package.json").read_text())
DOUBLE = torch.float64


def drawn(layer: nn.Module, seed: int = 0, scale: float = 1.0) -> Any:
    """The layer with random parameters, in float64."""
    generator = torch.Generator().manual_seed(seed)
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=DOUBLE))
    return layer


# -- the circuit -------------------------------------------------------------------------------------------------------


def state_vector(ansatz: Ansatz, reps: int, measure: Measure, theta: Tensor, read: Tensor) -> Tensor:
    """What the circuit gives, gate by gate with complex 2 x 2 matrices, for theta [rows, angles] and angles [reps]."""
    i = 1j
    x = torch.tensor([[0, 1], [1, 0]], dtype=torch.complex128)
    y = torch.tensor([[0, -i], [i, 0]], dtype=torch.complex128)
    z = torch.tensor([[1, 0], [0, -1]], dtype=torch.complex128)

    def turn(pauli: Tensor, angle: Tensor) -> Tensor:
        return torch.cos(angle / 2) * torch.eye(2, dtype=torch.complex128) - 1j * torch.sin(angle / 2) * pauli

    state = torch.full((2,), math.sqrt(0.5), dtype=torch.complex128)  # H|0>
    for number in range(reps):
        a = theta[number]
        steps = {
            "pz": lambda a=a, u=read[number]: turn(z, u) @ turn(y, a[-1]) @ turn(z, a[0]),
            "rpz": lambda a=a, u=read[number]: turn(z, u) @ turn(y, a[0]),
            "px": lambda a=a, u=read[number]: turn(x, u.acos()) @ turn(z, a[0]),
            "real": lambda a=a, u=read[number]: turn(y, u) @ z @ turn(y, a[0]) @ x,
        }
        state = steps[ansatz]() @ state
    if ansatz != "real":
        a = theta[reps]
        state = {
            "pz": lambda: turn(y, a[-1]) @ turn(z, a[0]),
            "rpz": lambda: turn(y, a[0]),
            "px": lambda: turn(z, a[0]),
        }[ansatz]() @ state
    low, high = state.abs()
    return low**2 - high**2 if measure == "z" else low - high


@pytest.mark.parametrize("measure", ["z", "fast"])
@pytest.mark.parametrize("ansatz", ANSATZE)
def test_it_is_the_state_vector(ansatz: Ansatz, measure: Measure) -> None:
    for reps in (1, 2, 5):
        circuit = Circuit(reps, ansatz, measure)
        torch.manual_seed(reps)
        theta = torch.randn(circuit.rows, circuit.angles, dtype=DOUBLE)
        frequency, phase = torch.randn(2, reps, dtype=DOUBLE) * (0.4 if ansatz == "px" else 3)
        for x in torch.linspace(-0.8, 0.9, 6, dtype=DOUBLE):
            if ansatz == "px" and bool(((frequency * x + phase).abs() > 1).any()):
                continue
            expected = state_vector(ansatz, reps, measure, theta, frequency * x + phase)
            torch.testing.assert_close(circuit(x, theta, frequency, phase), expected, atol=1e-12, rtol=0)


def test_the_fast_measure_is_finite_at_its_ends() -> None:
    circuit = Circuit(1, "pz", "fast")
    theta = torch.tensor([[[0.0], [-math.pi / 2]], [[0.0], [0.0]]], dtype=DOUBLE).squeeze(-1).requires_grad_()
    x = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)  # <Z> is 1 whatever x is
    y = circuit(x, theta, torch.ones(1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE))
    y.backward()
    assert y.item() == pytest.approx(1.0, abs=1e-6) and bool(torch.isfinite(theta.grad).all()) and x.grad is not None


@pytest.mark.parametrize(
    "case", PACKAGE["layers"], ids=lambda case: f"{case['ansatz']} {case['measure']} {case['group']}"
)
def test_the_package_gives_the_same_outputs(case: dict[str, Any]) -> None:
    """Of `qkan` 0.2.3, both measures, with and without groups, a pruned edge, drawn values everywhere."""
    layer = QkanLayer(3, 2, 3, case["ansatz"], measure=case["measure"], group=case["group"])
    values = {name: torch.tensor(case[name]) for name in ("theta", "frequency", "phase", "gain", "offset", "base")}
    with torch.no_grad():
        for name, value in values.items():
            own = getattr(layer, name)
            own.copy_(arranged(value, own.dim()) if name in ("theta", "frequency", "phase") else value)
        layer.mask.copy_(torch.tensor(case["mask"]))
    x, expected = torch.tensor(case["x"]), torch.tensor(case["output"])
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)


def arranged(theirs: Tensor, dim: int) -> Tensor:
    """[*edges, reps, ...] -> [reps, ..., *edges]."""
    inner = 2 if dim == 4 else 1
    return (
        theirs.movedim(tuple(range(theirs.dim() - inner, theirs.dim())), tuple(range(inner))).unsqueeze(inner)
        if theirs.dim() < dim
        else theirs.movedim(tuple(range(2, 2 + inner)), tuple(range(inner)))
    )


def test_the_package_s_activation_gives_the_same() -> None:
    case = PACKAGE["daruan"]
    layer = Daruan(3, 2, measure="fast")
    with torch.no_grad():
        layer.theta.copy_(torch.tensor(case["theta"]).permute(1, 2, 0))
        for name in ("frequency", "phase"):
            getattr(layer, name).copy_(torch.tensor(case[name]).T)
        for name in ("gain", "offset"):
            getattr(layer, name).copy_(torch.tensor(case[name]))
        # theirs adds its bias behind the weight
        layer.offset.div_(layer.gain)
    torch.testing.assert_close(layer(torch.tensor(case["x"])), torch.tensor(case["output"]), atol=1e-5, rtol=0)


# -- spectra -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "highest"), [((1.0, 1.0, 1.0), 3), ((1.0, 3.0, 9.0), 13)])
def test_a_spectrum_is_the_fourier_transform(weights: tuple[float, ...], highest: int) -> None:
    layer = drawn(QkanLayer(2, 3))
    with torch.no_grad():
        layer.frequency.copy_(torch.tensor(weights)[:, None, None])
        layer.base.zero_()
    found = layer.spectrum(2, 1)
    torch.testing.assert_close(found.frequencies, torch.arange(highest + 1, dtype=DOUBLE), atol=1e-9, rtol=0)
    points = torch.arange(64, dtype=DOUBLE) * (2 * math.pi / 64)
    with torch.no_grad():
        transform = torch.fft.rfft(layer.edge(2, 1, points)) / 64
    sizes = transform.abs() * torch.where(torch.arange(33) == 0, 1.0, 2.0)
    torch.testing.assert_close(sizes[: highest + 1], found.amplitudes.abs(), atol=1e-9, rtol=0)
    assert float(sizes[highest + 1 :].max()) < 1e-9 and float(sizes[: highest + 1].min()) > 1e-6


@pytest.mark.parametrize("ansatz", ["pz", "rpz", "real"])
def test_a_spectrum_sums_to_the_function_whatever_the_frequencies(ansatz: Ansatz) -> None:
    activation = drawn(Daruan(2, 4, ansatz), seed=3)
    x = torch.linspace(-3, 3, 41, dtype=DOUBLE)
    found = activation.spectrum(1)
    with torch.no_grad():
        torch.testing.assert_close(found(x), activation(x[:, None].expand(-1, 2))[:, 1], atol=1e-12, rtol=0)
    strong = found.frequencies[found.amplitudes.abs() > 1e-9]
    assert len(strong) == (2 if ansatz == "real" else (3**4 + 1) // 2)  # `real` is a constant and a single cosine


def test_a_spectrum_with_frequency_zero() -> None:
    activation = drawn(Daruan(1, 2))
    with torch.no_grad():
        activation.frequency.copy_(torch.tensor([[0.0], [2.0]]))
    found, x = activation.spectrum(0), torch.linspace(-1, 1, 9, dtype=DOUBLE)
    assert found.frequencies.tolist() == [0.0, 2.0]
    torch.testing.assert_close(found(x), activation(x[:, None]).detach()[:, 0], atol=1e-12, rtol=0)


# -- layers and networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 2])
def test_a_layer_sums_its_edges(group: int | None) -> None:
    layer = drawn(QkanLayer(5, 3, 2, group=group), scale=0.7)
    layer.mask[1, 2] = 0
    layer.rest.copy_(torch.tensor([0.1, 0.2, 0.3]))
    x = torch.randn(4, 7, 5, dtype=DOUBLE)
    with torch.no_grad():
        expected = torch.stack(
            [layer.rest[o] + sum(layer.edge(o, i, x[..., i].flatten()).view(4, 7) for i in range(5)) for o in range(3)],
            -1,
        )
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.edges(x.flatten(0, 1)).sum(-1) + layer.rest, expected.flatten(0, 1))
        assert not layer.edge(1, 2, x.flatten()).any()
    if group is not None:
        with torch.no_grad():
            activation = Daruan(group, 2).double()
            for name in ("theta", "frequency", "phase"):
                getattr(activation, name).copy_(getattr(layer, name).squeeze(-2))
            shared = activation(x[..., :2])  # inputs 0 and 2, 4 have function 0
            gain = layer.gain * layer.mask
            one = gain[0, 1] * (shared[..., 1] + layer.offset[0, 1]) + layer.base[0, 1] * F.silu(x[..., 1])
            torch.testing.assert_close(one, layer.edge(0, 1, x[..., 1].flatten()).view(4, 7))


def test_sizes_are_those_of_the_paper() -> None:
    def learned(layer: nn.Module) -> int:
        return sum(each.numel() for each in layer.parameters() if each.requires_grad)

    assert learned(QkanLayer(10, 10, trainable=())) == 800
    assert learned(Qkan((1, 1))) == 17
    assert learned(QkanLayer(10, 10, trainable=(), ansatz="rpz")) == 100 * (4 + 3)  # the phase always learns
    std = QkanLayer(60, 40).theta.std().item()
    assert std == pytest.approx(math.sqrt(2 / (100 * 8)), rel=0.02)
    assert QkanLayer(60, 40, 16, start="small").theta.std().item() == pytest.approx(0.25, rel=0.02)
    hqkan = Hqkan(512, 10)
    assert (hqkan.qkan.in_features, hqkan.qkan.out_features) == (9, 4)
    assert Hqkan(1, 1).qkan.in_features == 1 and Hqkan(8, 8, scale=4).qkan.out_features == 12


@pytest.mark.parametrize("ansatz", ["pz", "rpz"])
@pytest.mark.parametrize("group", [None, 2])
def test_more_repetitions_leave_the_function(ansatz: Ansatz, group: int | None) -> None:
    network = Qkan((3, 4, 2), reps=2, ansatz=ansatz, group=group)
    drawn(network)
    x = torch.randn(6, 3, dtype=DOUBLE)
    longer = network.extended(5)
    torch.testing.assert_close(longer(x), network(x), atol=1e-12, rtol=0)
    assert longer.layers[0].circuit.reps == 5 and network.layers[0].circuit.reps == 2
    longer(x).square().sum().backward()
    assert float(longer.layers[0].theta.grad[2:].abs().max()) > 0  # type: ignore[union-attr]
    for name, gone in (("px", 3), ("real", 3), (ansatz, 1)):
        with pytest.raises(ValueError, match=f"reps: {gone} was given to extend 2 of ansatz '{name}'"):
            QkanLayer(3, 2, 2, name).extended(gone)


def test_splines_take_over() -> None:
    torch.manual_seed(0)
    network = Qkan((2, 3, 1), reps=2)
    x = 2 * torch.rand(300, 2) - 1
    spline = network.to_kan(x, grid=10)
    with torch.no_grad():
        torch.testing.assert_close(spline(x), network(x), atol=1e-3, rtol=0)
        for each in spline:
            each.base.weight.zero_()  # type: ignore[union-attr]
        ends = torch.linspace(-1, 1, 7)
        bias = spline[0].coefficients.bias  # type: ignore[union-attr]
        assert not bias.any() and spline(x).shape == (300, 1)
        layer = network.layers[0]
        torch.testing.assert_close(
            spline[0].edge(1, 0, ends),  # type: ignore[operator]
            layer.edge(1, 0, ends) - layer.base[1, 0] * F.silu(ends),  # type: ignore[operator]
            atol=1e-3,
            rtol=0,
        )
    with pytest.raises(ValueError, match="x: layer 0 is given values from 1 to 1"):
        network.to_kan(torch.ones(4, 2))


def test_pruning_keeps_what_matters_and_the_mean_of_the_rest() -> None:
    network = drawn(Qkan((3, 4, 2), reps=2), scale=0.5)
    first, second = network.layers
    with torch.no_grad():
        for name in ("gain", "base"):  # input 2 says nothing, node 1 is steady, node 3 is not read
            getattr(first, name)[:, 2] *= 1e-4
            getattr(first, name)[1] *= 1e-5
            getattr(second, name)[:, 3] *= 1e-5
        first.offset[1] = 3.0
    x = torch.randn(500, 3, dtype=DOUBLE)
    scores = network.scores(x)
    given = first.edges(x)
    torch.testing.assert_close(scores[0][2, 1], given[:, 2, 1].std(correction=0) / (x[:, 1].std(correction=0) + 0.1))
    pruned = network.pruned(x, edges=1e-3, nodes=1e-3)
    assert pruned.widths == [3, 2, 2] and not pruned.layers[0].mask[:, 2].any()
    assert bool(pruned.layers[0].mask[:, :2].all())
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), network(x), atol=2e-3, rtol=0)
        torch.testing.assert_close(pruned(x).mean(0), network(x).mean(0), atol=1e-3, rtol=0)
    pruned(x).sum().backward()
    assert not pruned.layers[0].gain.grad[:, 2].any()
    assert network.widths == [3, 4, 2] and bool(first.mask.all())
    with pytest.raises(ValueError, match="which leaves nothing of layer 0"):
        network.pruned(x, edges=1e3)
    with pytest.raises(ValueError, match="x: no inputs were given"):
        network.pruned(x[:0])
    shares = [each / each.sum() for each in scores]
    expected = sum(s.sum() - 2 * (p * torch.log2(p + 1e-4)).sum() for s, p in zip(scores, shares, strict=True))
    torch.testing.assert_close(network.penalty(x), expected)


def test_constant_inputs_prune_without_nan() -> None:
    network = drawn(Qkan((2, 3, 1), reps=1))
    x = torch.cat((torch.randn(50, 1, dtype=DOUBLE), torch.ones(50, 1, dtype=DOUBLE)), 1)
    pruned = network.pruned(x)
    assert not pruned.layers[0].mask[:, 1].any() and bool(torch.isfinite(pruned(x)).all())
    torch.testing.assert_close(pruned(x), network(x), atol=1e-1, rtol=0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: QkanLayer(2, 2, 0), "reps: 0 was given; give 1 or more"),
        (lambda: QkanLayer(2, 2, ansatz="py"), "ansatz: 'py' was given, allowed are pz, rpz, px, real"),
        (lambda: Daruan(2, measure="x"), "measure: 'x' was given, allowed are z, fast"),
        (lambda: Daruan(2, trainable=("base",)), r"trainable: \['base'\] was given, allowed are frequency"),
        (lambda: QkanLayer(2, 2, trainable="theta"), r"trainable: \['theta'\] was given"),
        (lambda: QkanLayer(2, 2, start="zero"), "start: 'zero' was given"),
        (lambda: QkanLayer(2, 2, group=3), "group: 3 was given for 2 inputs"),
        (lambda: QkanLayer(2, 2, group=2, trainable=()), "group: 2 was given"),
        (lambda: QkanLayer(0, 2), "in_features, out_features: 0 and 2"),
        (lambda: Daruan(0), "channels: 0 was given"),
        (lambda: Qkan((3,)), r"widths: \[3\] was given"),
        (lambda: Hqkan(4, 4, scale=0), "in_features, out_features, latent, scale: 4, 4, None and 0"),
        (lambda: QkanLayer(2, 3)(torch.ones(4, 3)), r"x: \(4, 3\) was given; give \[..., 2\]"),
        (lambda: Daruan(2)(torch.ones(4, 2, dtype=torch.int64)), "x: torch.int64 was given"),
        (lambda: Daruan(1, ansatz="px")(torch.tensor([[1.5]])), r"x: abs\(w x \+ b\) is up to 1.5, and px reads"),
        (lambda: Daruan(1, ansatz="px").spectrum(0), "spectrum: ansatz 'px'"),
        (lambda: Daruan(1, measure="fast").spectrum(0), "spectrum: ansatz 'pz', measure 'fast'"),
        (lambda: Daruan(1, 13).spectrum(0), "and 13 repetitions were given"),
    ],
)
def test_bad_input(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


# -- in models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", architectures(("llama", "gpt2", "vit")))
def test_it_keeps_what_a_transform_promises(kind: str) -> None:
    rtn = RoundToNearest(bits=4, group_size=8)
    check_transform(ReplaceByHqkan(), tiny_model(kind), tiny_batches(kind), conflicting=(), repeatable=True)
    with pytest.raises(RecipeError, match="slot was filled for; put hqkan first"):
        apply(tiny_model(kind), [rtn, ReplaceByHqkan()], tiny_batches(kind), progress=False)


def test_mlps_and_heads_of_models(tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    notes = apply(model, ReplaceByHqkan(scale=2, group=3), progress=False).report.notes
    assert len(notes) == 2 and "a QKAN of 8 x 8 in place of width" in str(notes[0])
    assert isinstance(model.get_submodule("model.layers.1.mlp"), Hqkan)
    save(model, tmp_path / "llama")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "llama")(**batches[0])[0], model(**batches[0])[0], rtol=0, atol=0)
    cnn, images = zoo.load("cnn"), torch.rand(8, 1, 8, 8)
    apply(cnn, ReplaceByHqkan(where=("fc1",), reps=3), [images], progress=False)
    apply(cnn, RoundToNearest(bits=8), [images], min_coverage=0.0, progress=False)
    assert type(cnn.get_submodule("fc1.first")).__name__ == "ActLinear" and cnn(images).shape == (8, 10)


def test_an_activation_is_swapped_for_it() -> None:
    model = tiny_model("vit")
    swap(model, "gelu", Daruan)
    made = model.get_submodule("vit.layers.0.mlp.activation_fn")
    assert isinstance(made, Daruan) and made.channels == model.get_submodule("vit.layers.0.mlp.fc1").out_features
