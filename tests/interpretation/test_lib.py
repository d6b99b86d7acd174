"""The local interaction basis: identities it must keep, brute force by autograd, hidden blocks that it finds."""

from __future__ import annotations

from itertools import pairwise

import networkx
import numpy as np
import pytest
import torch
from torch import nn

from actkit.core.ground.errors import UnsupportedModelError
from actkit.interpretation.lib.basis import local_interaction_basis
from actkit.interpretation.lib.graph import accuracy, fewest_edges, interaction_graph, modules, node_curve, strongest
from actkit.interpretation.lib.lib import lib
from actkit.interpretation.lib.sections import Sections, head_of, mlp_sections, sections_of
from actkit.testing import tiny_batches, tiny_model

torch.manual_seed(0)


def net(*widths: int, act: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), act()]
    return nn.Sequential(*layers[:-1]).double()


def inputs(rows: int = 40, width: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


# -- sections ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh])
def test_sections_are_the_model_and_have_no_bias(act):
    model, x = net(5, 6, 4, 3, act=act), inputs()
    found = sections_of(model, x)
    assert found.widths == [5, 6, 4, 3] and len(found) == 3
    torch.testing.assert_close(found.nodes(x)[-1][:, 1:], model(x))
    for function, width in zip(found.functions, found.widths[:-1], strict=True):
        assert not function(torch.zeros(2, 1 + width, dtype=torch.float64)).any()  # 0 gives 0
    torch.testing.assert_close(found.rest(found.nodes(x)[1], 1), model(x))


def test_a_convolutional_head():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(2, 3)
    ).double()
    x = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    found = sections_of(model, x)
    torch.testing.assert_close(found.nodes(x)[-1][:, 1:], model(x))
    assert found.shapes[:2] == ((1, 4, 4), (3, 2, 2))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_mlp_of_a_block_is_its_module(kind):
    model = tiny_model(kind)
    found = mlp_sections(model, 1)
    x = torch.randn(7, found.widths[0])
    with torch.no_grad():
        if kind == "bert":
            layer = model.get_submodule("bert.encoder.layer.1" if hasattr(model, "bert") else "encoder.layer.1")
            wanted = layer.output.dense(layer.intermediate(x))
        else:
            path = "model.layers.1.mlp" if kind == "llama" else "transformer.h.1.mlp"
            wanted = model.get_submodule(path)(x)
        torch.testing.assert_close(found.nodes(x)[-1][:, 1:].float(), wanted, rtol=1e-5, atol=1e-6)


# -- the basis ---------------------------------------------------------------------------------------------------------


def jacobians(function, rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.autograd.functional.jacobian(lambda r: function(r[None])[0], row) for row in rows])


@pytest.mark.parametrize("centre", [True, False])
def test_in_its_basis_the_influence_of_each_direction_is_one(centre):
    """The mean of J^T J in the new coordinates is the identity, as the scale holds the influence."""
    model, x = net(5, 6, 4, 3), inputs()
    sections = sections_of(model, x)
    basis = local_interaction_basis(sections, x, centre=centre, progress=False)
    nodes = sections.nodes(x)
    for layer in range(3):
        function, to, back = sections.functions[layer], basis.to, basis.back

        def hat(fhat, function=function, layer=layer, to=to, back=back):
            return function(fhat @ back[layer]) @ to[layer + 1]

        found = jacobians(hat, nodes[layer] @ to[layer])
        mean = torch.einsum("nij,nik->jk", found, found) / len(x)
        torch.testing.assert_close(mean[1:, 1:], torch.eye(len(mean) - 1, dtype=torch.float64), rtol=0, atol=1e-6)
        projector = to[layer] @ back[layer]
        torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-6)
        assert (basis.importance[layer].diff() <= 1e-9).all()
    # what a linear layer does not read is gone, and nothing else
    torch.testing.assert_close(sections.rest(nodes[2] @ basis.to[2] @ basis.back[2], 2), model(x), rtol=0, atol=1e-6)


def test_a_linear_network_has_one_edge_for_each_direction():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    x = inputs(50, 4)
    sections = sections_of(model, x)
    basis = local_interaction_basis(sections, x, rotate_last=True, progress=False)
    first = basis.edges(x, progress=False)[0][1:, 1:]
    off = first - torch.diag(first.diagonal())
    assert float(off.abs().max()) < 1e-8 * float(first.max())


def test_edges_by_loops_and_their_parts_add_up():
    model, x = net(5, 6, 4, act=nn.Tanh), inputs(6)
    sections = sections_of(model, x)
    basis = local_interaction_basis(sections, x, progress=False)
    found = basis.edges(x, points=12, progress=False)[0]
    at, weights = np.polynomial.legendre.leggauss(12)
    total = torch.zeros_like(found)
    fhat = sections.nodes(x)[0] @ basis.to[0]

    def hat(rows):
        return sections.functions[0](rows @ basis.back[0]) @ basis.to[1]

    for row in fhat:
        parts = torch.zeros_like(found)
        for weight, place in zip(weights / 2, (at + 1) / 2, strict=True):
            parts += weight * torch.autograd.functional.jacobian(lambda r: hat(r[None])[0], place * row) * row
        torch.testing.assert_close(parts.sum(1), hat(row[None])[0], rtol=1e-6, atol=1e-6)  # completeness
        total += parts.square()
    torch.testing.assert_close(found, total / len(x), rtol=1e-9, atol=1e-12)
    close = basis.edges(x, integration="trapezoidal", points=400, progress=False)[0]
    torch.testing.assert_close(close, found, rtol=2e-3, atol=1e-6)


def test_nothing_depends_on_how_a_hidden_layer_is_written():
    """Edges from layer 0 stay the same if the linear layer behind is written in other coordinates."""
    model, x = net(5, 6, 3), inputs()
    turned = net(5, 6, 3)
    mix = torch.randn(6, 6, dtype=torch.float64)
    other = nn.Sequential(turned[0], turned[1], nn.Linear(6, 6, bias=False), nn.Linear(6, 3)).double()
    with torch.no_grad():
        other[2].weight.copy_(mix)
        other[3].weight.copy_(turned[2].weight @ torch.linalg.inv(mix))
        other[3].bias.copy_(turned[2].bias)
    one = sections_of(model, x)
    two = sections_of(other, x)
    joined = Sections(
        (lambda n: two.functions[1](two.functions[0](n)), two.functions[2]),
        (two.shapes[0], two.shapes[2], two.shapes[3]),
        ("", "", ""),
    )
    found = [local_interaction_basis(each, x, progress=False).edges(x, progress=False)[1] for each in (one, joined)]
    torch.testing.assert_close(found[0].sort().values, found[1].sort().values, rtol=1e-4, atol=1e-8)


def test_principal_components_are_scikit_learns():
    from sklearn.decomposition import PCA

    model, x = net(5, 6, 3), inputs(60)
    basis = local_interaction_basis(sections_of(model, x), x, kind="pca", progress=False)
    theirs = PCA().fit(x.numpy())
    np.testing.assert_allclose(basis.importance[0], theirs.explained_variance_ * 59 / 60, rtol=1e-8)
    scores = (sections_of(model, x).nodes(x)[0] @ basis.to[0])[:, 1:]
    np.testing.assert_allclose(scores.abs(), np.abs(theirs.transform(x.numpy())), atol=1e-8)


# -- ablation and modules ----------------------------------------------------------------------------------------------


def test_with_all_nodes_or_edges_nothing_is_lost_and_with_none_the_constant_is_left():
    model, x = net(5, 6, 4), inputs()
    sections = sections_of(model, x)
    basis = local_interaction_basis(sections, x, progress=False)
    torch.testing.assert_close(basis.ablated_nodes(x, 1, 99), model(x), rtol=1e-6, atol=1e-6)
    full = torch.ones(basis.to[1].shape[1], basis.to[0].shape[1], dtype=torch.bool)
    torch.testing.assert_close(basis.ablated_edges(x, 0, full), model(x), rtol=1e-6, atol=1e-6)
    alone = basis.ablated_nodes(x, 0, 0)
    torch.testing.assert_close(alone, model(x.mean(0, keepdim=True)).expand_as(alone), rtol=1e-6, atol=1e-6)


def test_cut_edges_by_loops():
    model, x = net(5, 6, 4), inputs(8)
    sections = sections_of(model, x)
    basis = local_interaction_basis(sections, x, progress=False)
    edges = basis.edges(x, progress=False)[0]
    mask = strongest(edges, 9)
    assert mask[1:, 1:].sum() == 9 and not mask[0].any()
    fhat = sections.nodes(x)[0] @ basis.to[0]
    made = torch.ones(8, len(mask), dtype=torch.float64)
    for at in range(1, len(mask)):
        kept = mask[at].clone()
        kept[0] = True
        made[:, at] = (sections.functions[0]((fhat * kept) @ basis.back[0]) @ basis.to[1])[:, at]
    torch.testing.assert_close(basis.ablated_edges(x, 0, mask), sections.rest(made @ basis.back[1], 1))


def test_the_fewest_edges_are_the_fewest():
    model, x = net(5, 8, 3), inputs(60)
    labels = model(x).argmax(-1)
    basis = local_interaction_basis(sections_of(model, x), x, progress=False)
    edges, score = basis.edges(x, progress=False)[0], accuracy(labels)
    found = fewest_edges(basis, edges, 0, x, score, 0.05)
    assert score(basis.ablated_edges(x, 0, strongest(edges, found))) >= 0.95
    assert score(basis.ablated_edges(x, 0, strongest(edges, found - 1))) < 0.95
    curve = node_curve(basis, 1, x, score, [0, 2, 8])
    assert curve[8] == 1.0 > curve[0]


def hidden_blocks(width: int = 4, depth: int = 4, seed: int = 0) -> tuple[nn.Sequential, torch.Tensor]:
    """Two independent nets side by side; behind every ReLU a rotation that the next layer takes back."""
    draw = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    back = torch.eye(2 * width, dtype=torch.float64)
    for _ in range(depth):
        weight = torch.block_diag(*(torch.randn(width, width, generator=draw).double() for _ in range(2)))
        layer = nn.Linear(2 * width, 2 * width).double()
        turn = torch.linalg.qr(torch.randn(2 * width, 2 * width, generator=draw).double()).Q
        rotation = nn.Linear(2 * width, 2 * width, bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(weight @ back.T)
            layer.bias.copy_(0.3 * torch.randn(2 * width, generator=draw))
            rotation.weight.copy_(turn)
        layers += [layer, nn.ReLU(), rotation]
        back = turn
    halves = [torch.randn(12, width, generator=draw).double() for _ in range(2)]
    pairs = torch.cartesian_prod(torch.arange(12), torch.arange(12))  # exactly independent
    return nn.Sequential(*layers[:-1]), torch.cat([half[pairs[:, at]] for at, half in enumerate(halves)], 1)


def test_it_finds_two_networks_that_rotations_hide():
    model, x = hidden_blocks()
    sections = sections_of(model, x, starts=range(0, len(model), 3))  # node layers are behind the rotations
    basis = local_interaction_basis(sections, x, progress=False)
    edges = basis.edges(x, progress=False)
    neurons = local_interaction_basis(sections, x, kind="neuron", progress=False).edges(x, progress=False)
    parts = []
    for each in (edges, neurons):
        smallest = 1e-6 * max(float(matrix[1:, 1:].max()) for matrix in each)
        parts.append(list(networkx.connected_components(interaction_graph(each, smallest))))
    assert len(parts[0]) == 2 and len(parts[1]) == 1
    found = modules(edges, smallest)
    assert found.modularity > 0.45 and all(any(group <= part for part in parts[0]) for group in found.groups)


# -- random combinations, some edges, ranks ----------------------------------------------------------------------------


def influence(basis, layer: int) -> torch.Tensor:
    """M behind a basis, in neurons: as colour, it does not depend on the order or sign of directions."""
    back = basis.back[layer][1:, 1:]
    return back.T @ torch.diag(basis.importance[layer] ** 2) @ back


def test_random_combinations_estimate_the_exact_jacobian():
    model, x = net(5, 12, 9, 7), inputs(300)
    sections = sections_of(model, x)
    exact = local_interaction_basis(sections, x, progress=False)
    off = {}
    for sources in (1, 6):
        found = [
            local_interaction_basis(sections, x, sources=sources, seed=seed, progress=False).importance[2]
            for seed in range(8)
        ]
        off[sources] = float((torch.stack(found).sum(1) / exact.importance[2].sum() - 1).square().mean().sqrt())
    assert 0 < off[6] < off[1] < 0.1
    mean = torch.stack(
        [influence(local_interaction_basis(sections, x, sources=4, seed=s, progress=False), 2) for s in range(30)]
    ).mean(0)
    assert float((mean - influence(exact, 2)).norm() / influence(exact, 2).norm()) < 0.02
    same = local_interaction_basis(sections, x, sources=13, progress=False)  # as many as there are: exact
    torch.testing.assert_close(same.importance[0], exact.importance[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["lib", "neuron"])
def test_edges_of_some_directions_are_those_of_all(kind):
    model, x = net(5, 8, 6, 3), inputs()
    basis = local_interaction_basis(sections_of(model, x), x, kind=kind, progress=False)
    for some, whole in zip(basis.edges(x, directions=3, progress=False), basis.edges(x, progress=False), strict=True):
        there = some > 0
        assert there[1:, 1:].sum() <= 9
        torch.testing.assert_close(some[there], whole[there], rtol=1e-9, atol=1e-12)
        assert not some[~there].any()


def test_the_neurons_that_are_kept_are_the_largest():
    model, x = net(5, 8, 3), inputs()
    sections = sections_of(model, x)
    basis = local_interaction_basis(sections, x, kind="neuron", progress=False)
    hidden = sections.nodes(x)[1][:, 1:]
    largest = hidden.square().mean(0).argsort(descending=True)[:3]
    kept = torch.zeros_like(hidden)
    kept[:, largest] = hidden[:, largest]
    torch.testing.assert_close(basis.ablated_nodes(x, 1, 3), model[2](kept))
    assert (basis.importance[1].diff() <= 0).all()


# -- the analysis ------------------------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.flat = nn.Conv2d(1, 2, 3), nn.Flatten()
        self.first, self.act, self.second = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.act(self.first(self.flat(self.conv(x)))))


class Functional(Convolutional):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.relu(self.first(self.flat(self.conv(x)))))


IMAGES = [torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def test_the_head_of_a_model_is_found_and_may_begin_earlier():
    model = Convolutional()
    head = head_of(model, IMAGES[0])
    assert head.paths == ("first", "act", "second") and head.sections.widths == [8, 6, 3]
    torch.testing.assert_close(head.inputs(IMAGES[1]), model.flat(model.conv(IMAGES[1])))
    whole = head_of(model, IMAGES[0], start="conv")
    assert whole.sections.widths == [16, 8, 6, 3]
    assert len(head_of(net(5, 6, 4).float(), inputs().float()).paths) == 3


def test_the_head_of_a_model_beside_its_sections():
    model = Convolutional()
    found = lib(model, IMAGES, progress=False)
    (network,) = found.networks
    assert (found.rows, found.held_out, network.name) == (18, 18, "first to second")
    head, held = head_of(model, IMAGES[0]), torch.cat(IMAGES[1::2])
    x, other = (model.flat(model.conv(torch.cat(part))).detach() for part in (IMAGES[::2], IMAGES[1::2]))
    basis = local_interaction_basis(head.sections, x, kind="pca", progress=False)
    before, after = (y.log_softmax(-1) for y in (model(held).double(), basis.ablated_nodes(other, 0, 4)))
    wanted = float((before.exp() * (before - after)).sum(-1).mean())
    curve = network.layers[0].nodes["pca"]
    assert curve.divergence[curve.kept.index(4)] == pytest.approx(wanted, rel=1e-4)
    assert all(layer.nodes["neuron"].divergence[-1] < 1e-9 for layer in network.layers[:-1])
    shares = [sum(edge.share for edge in network.edges if edge.layer == layer) for layer in (0, 1)]
    assert min(shares) >= 0.9 and len(network.layers[2].importance) == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_mlps_of_several_blocks_are_cut_in_the_running_model(kind):
    model, batches = tiny_model(kind), tiny_batches(kind, lengths=((9, 4, 6), (7, 2)))
    found = lib(model, batches, blocks=(0, 1), progress=False)
    assert [network.name for network in found.networks] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert found.rows == 19 and found.held_out == 9
    path = "model.layers.0.mlp" if kind == "llama" else "transformer.h.0.mlp"
    mask = batches[1]["attention_mask"].bool() if "attention_mask" in batches[1] else None

    def cut(module, args, output):
        return changed(args[0]).to(output.dtype).view_as(output)

    sample = lib_rows(model, path, batches[0])
    basis = local_interaction_basis(mlp_sections(model, 0), sample, kind="pca", progress=False)

    def changed(x):
        return basis.ablated_nodes(x.flatten(0, -2), 1, 4)

    with torch.no_grad():
        before = model(**batches[1]).logits.log_softmax(-1)
        handle = model.get_submodule(path).register_forward_hook(cut)
        after = model(**batches[1]).logits.log_softmax(-1)
        handle.remove()
    rows = (before.exp() * (before - after)).sum(-1)
    wanted = float(rows[mask].mean() if mask is not None else rows.mean())
    curve = found.networks[0].layers[1].nodes["pca"]
    assert curve.divergence[curve.kept.index(4)] == pytest.approx(wanted, rel=2e-3)


def lib_rows(model, path: str, batch) -> torch.Tensor:
    """What the MLP reads at real tokens."""
    found = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return found[0][batch["attention_mask"].bool()] if "attention_mask" in batch else found[0].flatten(0, 1)


def test_its_page_names_each_direction_and_draws_the_graph():
    found = lib(Convolutional(), IMAGES, progress=False)
    page = found.page().html()
    for text in ("what may be cut", "direction 1", "principal components", "strongest from"):
        assert text in page
    assert page.count("<circle") > 20


def test_a_model_that_calls_a_function_in_between_is_refused():
    with pytest.raises(UnsupportedModelError, match="give another output"):
        lib(Functional(), IMAGES, progress=False)
