"""S-KAN: bases against scipy, pykan and the authors' layers, the choice against the sum, and exact pruning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from scipy.interpolate import BSpline
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.edit.edits import Replace
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.rule import AttachedRule
from actkit.core.recipe.runner import apply_edits
from actkit.core.store.checkpoint import load, save
from actkit.core.train.training import train
from actkit.core.univariate.bases import Bells, BSplines
from actkit.core.univariate.edge_functions import Wavelets
from actkit.functions.s_kan.basis_choice import basis_choice
from actkit.functions.s_kan.choose_basis import ChooseBasis
from actkit.functions.s_kan.edges import PrunedEdges
from actkit.functions.s_kan.pool import POOL
from actkit.functions.s_kan.s_kan_layer import PrunedLayer, SConvKan2d, SKanLayer, choosing
from actkit.testing import check_rule, tiny_batches, tiny_model

THEIRS = json.loads(Path(__file__).with_name("kan_layers.json").read_text())


class Net(nn.Module):
    """Two layers that choose."""

    def __init__(self, select: Any = "node") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = SKanLayer(3, 6, select=select), SKanLayer(6, 2, ("cheby", "fastkan"))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def batches(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.rand(16, 3, generator=generator) * 2 - 1 for _ in range(count)]
    return [{"x": x, "labels": (x[:, 0] * x[:, 1] > 0).long()} for x in xs]


# -- bases -------------------------------------------------------------------------------------------------------------


def table(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def features(name: str, x: Tensor) -> Tensor:
    """The basis of the authors' layer, written out or by scipy: [rows, channels, size]."""
    columns = x.numpy()
    if name == "bspline":
        knots = -1 + 0.4 * np.arange(-3, 9)
        rows = [BSpline.design_matrix(each, knots, 3, extrapolate=False).toarray() for each in columns.T]
        return torch.from_numpy(np.stack(rows, 1))
    if name == "cheby":
        return torch.from_numpy(np.stack([scipy.special.eval_chebyt(n, columns) for n in range(5)], -1))
    if name in ("jacobi", "gram"):
        a, degree = (1.0, 4) if name == "jacobi" else (0.0, 3)
        return torch.from_numpy(
            np.stack([scipy.special.eval_jacobi(n, a, a, np.tanh(columns)) for n in range(degree + 1)], -1)
        )
    if name == "relukan":
        low = (torch.arange(8) - 3) / 5  # parameters, which begin in float32
        high = (low + 4 / 5).double()
        return (F.relu(x[..., None] - low.double()) * F.relu(high - x[..., None]) * 6.25) ** 2
    read = F.layer_norm(x, x.shape[-1:]) if name in ("fastkan", "fasterkan") else x
    if name == "fasterkan":
        return 1 - torch.tanh((read[..., None] - torch.linspace(-1.2, 0.2, 8, dtype=torch.float64)) * 0.5) ** 2
    return torch.exp(-(((read[..., None] - torch.linspace(-2, 2, 8, dtype=torch.float64)) / (4 / 7)) ** 2))


@pytest.mark.parametrize("name", [name for name in POOL if name != "wavelet"])
def test_bases_are_the_authors(name: str) -> None:
    torch.manual_seed(0)
    branch: Any = POOL[name](4, 3).double()
    x = torch.rand(50, 4, dtype=torch.float64) * 1.8 - 0.9
    basis = features(name, x)
    expected = torch.einsum("bim,oim->bo", basis, branch.coefficients.weight.view(3, 4, basis.shape[-1]))
    if branch.coefficients.bias is not None:
        expected = expected + branch.coefficients.bias
    if branch.base is not None:
        expected = expected + F.silu(x) @ branch.base.weight.T
    torch.testing.assert_close(branch(x), expected, atol=1e-8, rtol=0)
    assert {"bspline", "fastkan", "jacobi", "gram"} >= {name} if branch.base is not None else True


@pytest.mark.parametrize("name", THEIRS["layers"]["layers"])
def test_layers_are_those_of_the_authors(name: str) -> None:
    """KANConv2d's, run once at the commit that the file names; what its FasterKAN gives has a width of 1, not of 2."""
    x = table(THEIRS["layers"]["x"])
    theirs = THEIRS["layers"]["layers"][name]
    branch: Any
    if name.startswith("wavelet"):
        branch = Wavelets(4, 3, name.partition(" ")[2], base="silu").double()  # type: ignore[arg-type]
        own = {
            **{each: table(theirs[each]) for each in ("weight", "width", "shift")},
            "base.weight": table(theirs["base"]),
        }
    else:
        branch = POOL[name](4, 3).double()
        if name == "fasterkan":
            branch.basis = Bells(8, (-1.2, 0.2), 1.0, "tanh")
        own = {"coefficients.weight": table(theirs["coefficients"])}
        own |= {"base.weight": table(theirs["base"])} if "base" in theirs else {}
        own |= {"coefficients.bias": table(theirs["bias"])} if "bias" in theirs else {}
        own |= {f"basis.{each}": table(theirs[each]) for each in ("low", "high") if each in theirs}
    branch.load_state_dict({**branch.state_dict(), **own})
    output = branch(x) if theirs.get("behind") is None else F.silu(branch(x))
    torch.testing.assert_close(output, table(theirs["output"]), atol=1e-8, rtol=0)


def test_splines_are_pykan_s() -> None:
    """Its B_batch, run once at the version that the file names."""
    x, values = (table(THEIRS["splines"][name]) for name in ("x", "values"))
    torch.testing.assert_close(BSplines(5, 3)(x), values, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", POOL)
def test_some_outputs_of_a_branch_are_those_of_the_whole(name: str) -> None:
    branch = POOL[name](4, 5)
    x = torch.rand(7, 4)
    index, factor = torch.tensor([3, 0]), torch.tensor([2.0, -0.5])
    torch.testing.assert_close(branch.of_outputs(index, factor)(x), branch(x)[:, index] * factor)


# -- choosing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["node", "layer"])
def test_a_layer_is_the_weighted_sum_of_its_branches(select: Any) -> None:
    torch.manual_seed(0)
    layer = SKanLayer(3, 5, select=select)
    with torch.no_grad():
        layer.gates.normal_()
        layer.gain.uniform_(0.5, 2)
        layer.temperature.fill_(0.7)
    x = torch.rand(8, 3)
    layer.train()(x)
    outputs = [branch(x) for branch in layer.branches.values()]
    sizes = torch.stack([each.square().mean(0).sqrt() for each in outputs], -1)
    torch.testing.assert_close(layer.sizes, sizes.detach())
    shares = (layer.gates / 0.7).softmax(-1).expand(5, -1)
    expected = sum(layer.gain * shares[:, k] * outputs[k] / sizes[:, k] for k in range(4))
    layer.eval()
    torch.testing.assert_close(layer(x), expected)
    entropy = -(shares * shares.log()).sum(-1).mean()
    torch.testing.assert_close(layer.gate_entropy(), entropy)
    layer.hard.fill_(1.0)
    largest = torch.stack(outputs, -1).gather(-1, shares.argmax(-1).expand(8, 5)[..., None]).squeeze(-1)
    scale = layer.gain / sizes.gather(-1, shares.argmax(-1)[:, None]).squeeze(-1)
    torch.testing.assert_close(layer(x), largest * scale)
    layer(x).square().sum().backward()
    assert layer.gates.grad is not None and bool(layer.gates.grad.any())  # straight-through
    assert layer.selection() == [layer.pool[k] for k in shares.argmax(-1).tolist()]


def test_a_louder_branch_is_no_more_likely_to_be_chosen() -> None:
    x = torch.rand(64, 3) * 2 - 1
    y = torch.sin(3 * x.sum(-1, keepdim=True))
    chosen, gradients = [], []
    for loud in (1.0, 100.0):
        torch.manual_seed(0)
        layer = SKanLayer(3, 1)
        with torch.no_grad():
            layer.branches["cheby"].coefficients.weight.mul_(loud)  # type: ignore[union-attr]
        loss = F.mse_loss(layer(x), y)  # sizes are measured in this pass
        loss.backward()
        gradients.append(layer.gates.grad.clone())  # type: ignore[union-attr]
        chosen.append(layer(x).detach())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*chosen, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("select", ["node", "layer"])
def test_pruning_computes_the_same_with_one_basis_for_each_node(select: Any) -> None:
    torch.manual_seed(0)
    layer = SKanLayer(3, 7, tuple(POOL), select)
    with torch.no_grad():
        layer.gates.normal_()
    x = torch.rand(4, 5, 3)
    layer(x)
    with pytest.raises(ValueError, match=r"hard: the nodes have not chosen, and the largest shares are 0\.\d+ to"):
        layer.pruned()
    layer.eval().hard.fill_(1.0)
    pruned = layer.pruned()
    torch.testing.assert_close(pruned(x), layer(x), atol=1e-6, rtol=1e-5)
    assert pruned.selection() == layer.selection() and not pruned.training
    assert sum(len(own) for own in pruned.nodes.values()) == 7
    assert len(set(layer.selection())) == len(pruned.branches) == (1 if select == "layer" else len(pruned.nodes))
    single = [sum(p.numel() for p in POOL[name](3, 7).parameters()) for name in POOL]
    assert sum(p.numel() for p in pruned.parameters()) <= max(single) + 6 * len(POOL)


def every_basis_by_edge() -> tuple[SKanLayer, Tensor]:
    """A layer of all bases whose edges have chosen, with sizes that were measured; and inputs."""
    torch.manual_seed(0)
    layer = SKanLayer(4, 6, tuple(POOL), "edge")
    x = torch.rand(9, 4) * 1.6 - 0.8
    with torch.no_grad():
        layer.gates.normal_()
        layer.gain.uniform_(0.5, 2)
        for branch in layer.branches.values():
            for parameter in branch.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    layer.train()(x)
    return layer.eval(), x


def test_edges_choose_each_for_itself() -> None:
    """Against the sum over edges, one by one, of every branch at that edge alone."""
    layer, x = every_basis_by_edge()
    layer.temperature.fill_(0.7)
    shares = (layer.gates / 0.7).softmax(-1)
    outputs = torch.stack([branch(x) for branch in layer.branches.values()], -1)
    torch.testing.assert_close(layer.sizes, outputs.square().mean(0).sqrt())
    expected = torch.zeros(9, 6)
    for k, branch in enumerate(layer.branches.values()):
        whole = branch(x)
        for i in range(4):
            kept = {name: value.clone() for name, value in branch.named_parameters()}
            for name, value in kept.items():
                if name == "coefficients.weight":
                    value.view(6, 4, -1)[:, i] = 0
                elif name in ("base.weight",) or (name == "weight" and isinstance(branch, Wavelets)):
                    value[:, i] = 0
            without = torch.func.functional_call(branch, kept, (x,))  # the difference is what these edges give
            share = layer.gain * shares[:, i, k] / layer.sizes[:, k]
            expected += (whole - without) * share
        bias = getattr(getattr(branch, "coefficients", None), "bias", None)
        if bias is not None:
            expected += bias * (layer.gain * shares[:, :, k].mean(1) / layer.sizes[:, k])
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    entropy = -(shares * shares.log()).sum(-1).mean()
    torch.testing.assert_close(layer.gate_entropy(), entropy)


def test_pruned_edges_compute_the_same_with_their_own_coefficients_alone() -> None:
    layer, x = every_basis_by_edge()
    with pytest.raises(ValueError, match="hard: the nodes have not chosen"):
        layer.pruned()
    layer.hard.fill_(1.0)
    layer(x).square().sum().backward()
    assert layer.gates.grad is not None and bool(layer.gates.grad.any())  # straight-through
    pruned = layer.pruned()
    assert isinstance(pruned, PrunedEdges) and set(pruned.branches) == set(POOL)
    torch.testing.assert_close(pruned(x), layer(x), atol=1e-5, rtol=1e-4)
    assert pruned.selection() == layer.selection() and len(pruned.selection()) == 24
    for name, branch in pruned.branches.items():
        edges = len(pruned.edges[name])
        own = [p for key, p in branch.named_parameters() if key in ("coefficients", "base", "weight", "shift", "width")]
        assert own and all(len(parameter) == edges for parameter in own)
    assert torch.equal(pruned(x.view(3, 3, 4)), pruned(x).view(3, 3, 6))
    assert basis_choice(nn.Sequential(pruned)).layers[0].chosen == tuple(pruned.selection())


def test_a_training_of_edges_is_pruned_and_saved(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return Net("edge")

    net = build()
    train(net, batches(), validation=batches(2), epochs=3, rules=[ChooseBasis()], progress=False)
    assert isinstance(net.first, PrunedEdges) and isinstance(net.second, PrunedLayer)
    x = torch.rand(5, 3)
    save(net.eval(), tmp_path / "pruned")
    assert torch.equal(load(tmp_path / "pruned", base=build)(x), net(x))
    image = SConvKan2d(1, 2, 2, select="edge").eval()
    patches = F.unfold(x[None, None], 2).transpose(1, 2)
    torch.testing.assert_close(image(x[None, None]).flatten(2), image.layer(patches).transpose(1, 2))


def test_a_convolution_is_the_layer_on_every_patch() -> None:
    torch.manual_seed(0)
    layer = SConvKan2d(2, 3, 3, stride=2, padding=1)
    x = torch.rand(2, 2, 7, 6)
    found = layer(x)
    assert found.shape == (2, 3, 4, 3)
    layer.eval()
    padded = F.pad(x, (1, 1, 1, 1))
    for i, j in ((0, 0), (3, 2), (1, 2)):
        patch = padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].flatten(1)
        torch.testing.assert_close(layer(x)[:, :, i, j], layer.layer(patch))
    with pytest.raises(ValueError, match=r"x: \(2, 7, 6\) was given; give \[batch, 2, height, width\]"):
        layer(x[0])
    with pytest.raises(ValueError, match="in_channels, out_channels, kernel, stride, padding: 2, 3, 0, 1 and 0"):
        SConvKan2d(2, 3, 0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"pool": ()}, r"pool: \[\] was given"),
        ({"pool": ("rbf", "rbf")}, r"pool: \['rbf', 'rbf'\] was given"),
        ({"pool": ("sine",)}, r"pool: \['sine'\] was given"),
        ({"select": "channel"}, "select: 'channel' was given"),
    ],
)
def test_bad_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SKanLayer(3, 2, **settings)


# -- the training ------------------------------------------------------------------------------------------------------


def test_the_rule_keeps_what_a_rule_promises() -> None:
    model: Any = tiny_model("vit")
    model.config.problem_type = "single_label_classification"  # which a call with labels sets
    head = model.classifier
    torch.manual_seed(0)
    edit = Replace("classifier", SKanLayer(head.in_features, head.out_features))
    apply_edits(model, [edit], lambda: anatomy(model).architecture)
    data = tiny_batches("vit", lengths=((0,) * 4,) * 6)
    for number, batch in enumerate(data):
        batch["labels"] = (torch.arange(4) + number) % head.out_features
    check_rule(ChooseBasis(full=0.25, entropy=0.5), model, data)


def test_the_phases() -> None:
    net = Net()
    rule = ChooseBasis(full=0.4, entropy=0.5, coldest=0.1)
    running: AttachedRule = rule.attach(net)
    for progress, temperature, hard in ((0.0, 1.0, 0), (0.4, 1.0, 0), (0.7, 0.1**0.5, 0), (0.9, 0.1 ** (5 / 6), 1)):
        running.before_step(progress)
        assert float(net.first.temperature) == pytest.approx(temperature) and float(net.second.hard) == hard
        penalty = running.penalty()
        entropies = [float(layer.gate_entropy().detach()) for layer in choosing(net).values()]
        assert (penalty is None) == (progress <= 0.4)
        assert penalty is None or float(penalty.detach()) == pytest.approx(0.5 * sum(entropies) / 2)
        assert running.report() == {"gate_entropy": pytest.approx(sum(entropies) / 2)}
    with pytest.raises(UnsupportedModelError, match="choose_basis: Linear has no SKanLayer"):
        rule.attach(nn.Linear(2, 2))


def test_a_training_ends_with_pruned_layers_that_are_saved_and_counted(tmp_path: Path) -> None:
    net = Net()
    before = basis_choice(net)
    trained = train(net, batches(), validation=batches(2), epochs=3, rules=[ChooseBasis()], progress=False)
    assert len(trained.history) and isinstance(net.first, PrunedLayer) and isinstance(net.second, PrunedLayer)
    found = basis_choice(net)
    assert [layer.path for layer in found.layers] == ["first", "second"]
    assert [layer.pruned for layer in before.layers + found.layers] == [False, False, True, True]
    assert found.layers[0].parameters < before.layers[0].parameters / 2
    assert sum(found.layers[0].counts.values()) == 6 and found.table().row_count == sum(
        len(layer.counts) for layer in found.layers
    )
    x = torch.rand(5, 3)
    save(net.eval(), tmp_path / "pruned")
    again = load(tmp_path / "pruned", base=Net)
    assert torch.equal(again(x), net(x))
    with pytest.raises(UnsupportedModelError, match="model: Linear has no S-KAN layer"):
        basis_choice(nn.Linear(2, 2))
