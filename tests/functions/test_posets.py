"""Posets against brute force: orders, polytopes, the polynomial and its gradient, pooling, the transform."""

from __future__ import annotations

import json
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn import functional as F

import actkit
from actkit.core.recipe.runner import apply
from actkit.functions.posets.pooling import PosetActivation, PosetPool1d, PosetPool2d
from actkit.functions.posets.poset import Poset
from actkit.functions.posets.replace_pooling import ReplacePooling
from actkit.functions.posets.tropical import newton_polytope, poset_argmax, poset_eval, tropical
from actkit.testing import check_transform
from actkit.testing.transforms import CHECKS

UPSETS = (9, 16, 12, 6, 10, 10, 9, 6, 8, 9, 7, 7, 8, 5, 6, 7)  # of the sheet's table
FOUR = Poset.all(4)
RECORDED = json.loads(Path(__file__).with_name("poset_filters.json").read_text())


def labelled(n: int) -> list[frozenset[tuple[int, int]]]:
    """All partial orders of n labelled points, among all relations."""
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    found = []
    for mask in range(1 << len(pairs)):
        chosen = {pair for bit, pair in enumerate(pairs) if mask >> bit & 1}
        transitive = all((a, d) in chosen for a, b in chosen for c, d in chosen if b == c and a != d)
        if transitive and not any((b, a) in chosen for a, b in chosen):
            found.append(frozenset(chosen))
    return found


def test_sixteen_classes_of_219() -> None:
    orders = labelled(4)
    assert len(orders) == 219
    classes = [next(k for k, poset in enumerate(FOUR) if poset.isomorphic(Poset(4, order))) for order in orders]
    assert set(classes) == set(range(16))
    assert [[a.isomorphic(b) for b in FOUR] for a in FOUR] == np.eye(16, dtype=bool).tolist()
    assert [len(Poset.all(n)) for n in (1, 2, 3, 5)] == [1, 2, 5, 63]
    assert tuple(len(poset.upsets()) for poset in FOUR) == UPSETS
    assert [number for number, poset in enumerate(FOUR) if not poset.is_series_parallel()] == [12]


@pytest.mark.parametrize("number", range(16))
def test_an_order_by_hand(number: int) -> None:
    poset = FOUR[number]
    sets = [set(each) for size in range(5) for each in combinations(range(4), size)]
    upsets = [each for each in sets if all(high in each for low, high in poset.relations if low in each)]
    assert sorted(map(sorted, upsets)) == sorted(map(list, poset.upsets())) and poset.upsets()[0] == ()
    closed = Poset(4, frozenset(poset.cover()))
    assert closed == poset
    for pair in poset.cover():  # no cover follows from the others
        assert Poset(4, frozenset(poset.cover()) - {pair}) != poset
    polytope = poset.order_polytope()
    for corner in product((0, 1), repeat=4):
        assert polytope.contains(corner) == (corner in {tuple(each) for each in polytope.vertices.tolist()})
    objective = np.random.default_rng(number).normal(size=4)
    solved = linprog(-objective, A_ub=polytope.matrix, b_ub=polytope.bounds, bounds=(None, None))
    assert np.isclose(-solved.fun, (polytope.vertices @ objective).max())
    counts = poset.chain_antichain_counts()
    assert sum(counts["antichains"]) == len(upsets)
    assert Poset.of(str(poset) if poset.relations else 1) == poset and Poset.of(poset.spec()) == poset


@pytest.mark.parametrize("number", range(16))
def test_the_polynomial(number: int) -> None:
    """10^4 blocks against every vertex; the gradient is the up-set that is chosen."""
    poset, x = (
        FOUR[number],
        torch.randn(10_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(number)),
    )
    vertices = torch.from_numpy(poset.order_polytope().vertices).double()
    sums = (x[:, None] * vertices).sum(-1)
    x.requires_grad_()
    found = poset_eval(x, poset)
    assert torch.allclose(found, sums.amax(1), atol=1e-12)
    found.sum().backward()
    assert torch.equal(x.grad, vertices[sums.argmax(1)]) and torch.equal(poset_argmax(x, poset).double(), x.grad)
    low = x.detach()
    assert torch.allclose(poset_eval(low, poset, -torch.inf), sums[:, 1:].amax(1), atol=1e-12)
    assert torch.allclose(poset_eval(low, poset, 0.7), sums[:, 1:].amax(1).clamp(min=0.7), atol=1e-12)
    assert torch.allclose(poset_eval(low.abs(), poset), low.abs().sum(1))  # all alike where nothing is negative
    tied = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    poset_eval(tied, poset).sum().backward()
    assert not tied.grad.any()  # of equal sums the smallest set


def test_the_two_rules() -> None:
    """Large series-parallel posets are evaluated without their up-sets, as their parts say; gradients go one way."""
    draw = torch.Generator().manual_seed(0)
    for first, second in ((FOUR[14], FOUR[3]), (FOUR[2], FOUR[8]), (FOUR[1], FOUR[13])):
        side, above = first.union(second), first.ordinal_sum(second)
        x, y = (torch.randn(50, 4, dtype=torch.float64, generator=draw) for _ in range(2))
        together = torch.cat((x, y), 1)
        assert torch.allclose(poset_eval(together, side), poset_eval(x, first) + poset_eval(y, second))
        expected = torch.maximum(poset_eval(y, second), y.sum(1) + poset_eval(x, first))
        assert torch.allclose(poset_eval(together, above), expected)
        large = side.ordinal_sum(above)  # 16 points, over the limit of those that are enumerated
        z = torch.randn(50, 16, dtype=torch.float64, generator=draw, requires_grad=True)
        rows = torch.from_numpy(large.indicators()).double()
        value, chosen = (z @ rows.T).max(1)
        found = poset_eval(z, large)
        found.sum().backward()
        assert torch.allclose(found, value) and torch.equal(z.grad, rows[chosen])
        assert torch.allclose(poset_eval(z, large, -torch.inf), (z @ rows[1:].T).amax(1))
    chain = Poset(100, frozenset((k, k + 1) for k in range(99)))
    z = torch.randn(5, 100, dtype=torch.float64, generator=draw)
    assert torch.allclose(poset_eval(z, chain), z.flip(1).cumsum(1).amax(1).clamp(min=0))


def test_written_out_and_composed() -> None:
    assert tropical(FOUR[13]) == "max(0, d, c + d, b + c + d, a + b + c + d)"
    small = newton_polytope(Poset.of("a<b", 2), [Poset.of("a<b", 2), Poset(2)])
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, dtype=torch.float64, generator=draw)
    inner = torch.stack([poset_eval(x, Poset.of("a<b", 2)), poset_eval(x, Poset(2))], 1)
    expected = poset_eval(inner, Poset.of("a<b", 2))
    assert torch.allclose((x @ torch.from_numpy(small).double().T).amax(1), expected)
    outside = {tuple(each) for each in small.tolist()}
    for corner in outside:  # none is needless
        rest = torch.tensor(sorted(outside - {corner}), dtype=torch.float64)
        assert not torch.allclose((x @ rest.T).amax(1), expected) or len(outside) == 1


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(16))
def test_as_the_release(number: int) -> None:
    """The outputs and gradients of mendozacortesgroup/Poset-filters at commit 7880d44, recorded once."""
    x = torch.tensor(RECORDED["x"], requires_grad=True)
    found = PosetPool2d(number)(x)
    assert torch.allclose(found, torch.tensor(RECORDED["out"][number]), atol=1e-6)
    found.sum().backward()
    assert torch.allclose(x.grad, torch.tensor(RECORDED["gradient"][number], dtype=torch.float32), atol=1e-6)


def test_the_arrays_of_the_release() -> None:
    """Its own two tests of N: an odd and an even size."""
    x = torch.zeros(1, 4, 5, 5)
    x[0, 0, 0::2, 0::2], x[0, 1:], x[0, 2, 1::2], x[0, 3, :, 0::2] = 1, 1, -1, -1
    found = PosetPool2d("N")(x)[0]
    assert found[0].eq(1).all() and found[1].tolist() == [[4, 4, 2], [4, 4, 2], [2, 2, 1]]
    assert found[2].tolist() == [[2, 2, 1]] * 3 and found[3].tolist() == [[2, 2, 0], [2, 2, 0], [1, 1, 0]]
    x = torch.ones(1, 3, 8, 8)
    x[0, 0, 0::2, 0::2], x[0, 1, 0::2], x[0, 2, 1::2], x[0, 2, :, 0::2] = -1, -1, -1, -1
    found = PosetPool2d("N")(x)[0]
    assert found[0].eq(3).all() and found[1:].eq(1).all()


def by_hand(x: Tensor, poset: Poset, kernel: int, stride: int) -> Tensor:
    rows, sides = poset.upsets(), [(size - kernel) // stride + 1 for size in x.shape[2:]]
    out = torch.zeros(*x.shape[:2], *sides)
    for n, c, i, j in product(*map(range, out.shape)):
        window = x[n, c, i * stride : i * stride + kernel, j * stride : j * stride + kernel].flatten().tolist()
        out[n, c, i, j] = max(sum(window[k] for k in upset) for upset in rows)
    return out


def test_windows() -> None:
    x = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(0))
    nine = Poset.of("a<b b<c d<e f<h", 9)
    for poset, kernel, stride in ((FOUR[12], 2, 1), (nine, 3, 2), (FOUR[6], 2, 2)):
        pool = PosetPool2d(poset, kernel, stride, ceil=False)
        assert torch.allclose(pool(x), by_hand(x, poset, kernel, stride), atol=1e-5)
        padded = F.pad(x, (0, -(6 - kernel) % stride, 0, -(7 - kernel) % stride))
        assert torch.allclose(PosetPool2d(poset, kernel, stride)(x), by_hand(padded, poset, kernel, stride), atol=1e-5)
    assert torch.allclose(PosetPool2d(1)(x.relu()), 4 * F.avg_pool2d(F.pad(x.relu(), (0, 0, 0, 1)), 2), atol=1e-6)
    assert torch.allclose(PosetPool2d(1, normalize=True, ceil=False)(x), F.avg_pool2d(x.relu(), 2), atol=1e-6)
    turned = PosetPool2d(12, perm=(1, 3, 0, 2))(x[:, :, :6])
    assert torch.allclose(turned, by_hand(x[:, :, :6], FOUR[12].relabelled((1, 3, 0, 2)), 2, 2), atol=1e-5)
    line = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(1))
    found = PosetPool1d("chain")(line)
    assert found.shape == (2, 3, 3)
    assert (
        torch.allclose(found[..., 0], poset_eval(line[..., :4], FOUR[13]))
        and found[..., 2].eq(line[..., 8].relu() * 0).all() is not None
    )
    units = PosetActivation("diamond", dim=1)(x.repeat(1, 4, 1, 1))
    assert units.shape == (2, 3, 7, 6)
    assert torch.allclose(units[:, 0], poset_eval(x.repeat(1, 4, 1, 1)[:, :4].movedim(1, -1), FOUR[14]))


# -- the transform -----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two convolutions with pooling."""

    input_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.pool1, self.act1 = nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()
        self.conv2, self.pool2, self.act2 = nn.Conv2d(4, 8, 3, padding=1), nn.AvgPool2d(2), nn.ReLU()
        self.rest, self.fc = nn.MaxPool2d(3, 1, 1), nn.Linear(32, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.act1(self.pool1(self.conv1(pixel_values)))
        return self.fc(self.rest(self.act2(self.pool2(self.conv2(x)))).flatten(1))


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def test_the_transform_passes() -> None:
    batches: Any = [torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    checks = check_transform(ReplacePooling(), small(), batches, conflicting=(), repeatable=True)
    assert [check.name for check in checks] == list(CHECKS)


def test_it_stands_where_pooling_stood(tmp_path: Path) -> None:
    model, images = small(), torch.rand(3, 1, 8, 8)
    applied = apply(model, ReplacePooling(poset=1), progress=False)
    assert type(model.pool1) is type(model.pool2) is PosetPool2d and type(model.rest) is nn.MaxPool2d
    assert ("rest", "ReplacePooling", "it is padded or dilated") in applied.report.skipped
    actkit.save(model, tmp_path / "out")
    again = actkit.load(tmp_path / "out", base=Small)
    assert torch.equal(again(images), model(images))
    one = small()
    apply(one, ReplacePooling(poset="N", kinds=("max",), where=("pool*",)), progress=False)
    assert type(one.pool1) is PosetPool2d and type(one.pool2) is nn.AvgPool2d
