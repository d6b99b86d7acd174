"""Sparse autoencoders: losses and gradients against dense masked products in float64, counts, constraints, kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder
from actkit.interpretation.sparse_autoencoder.gates import GatedAutoencoder, JumpReLUAutoencoder
from actkit.interpretation.sparse_autoencoder.kinds import KINDS
from actkit.interpretation.sparse_autoencoder.top_k import BatchTopKAutoencoder, MatryoshkaAutoencoder, TopKAutoencoder
from actkit.interpretation.sparse_autoencoder.training import geometric_median, measure_autoencoder

CHANNELS, LATENTS, ROWS = 8, 24, 40
X = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(cls: type[SparseAutoencoder], *args: Any, **settings: Any) -> Any:
    """In float64, with biases that are not 0."""
    torch.manual_seed(1)
    if issubclass(cls, TopKAutoencoder | BatchTopKAutoencoder) and not args:
        args = (5,)
    found = cls(CHANNELS, LATENTS, *args, **settings).double()
    for name, parameter in found.named_parameters():
        if "bias" in name or name == "log_scale":
            torch.nn.init.normal_(parameter, std=0.2)
    return found


def gradients(autoencoder: SparseAutoencoder, loss: Tensor) -> dict[str, Tensor]:
    names = dict(autoencoder.named_parameters())
    given = torch.autograd.grad(loss, list(names.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(names, given, strict=True))


def agree(autoencoder: SparseAutoencoder, ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    found, wanted = gradients(autoencoder, ours), gradients(autoencoder, expected)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-10, msg=lambda text: f"{name}: {text}")  # noqa: B023


def top(pre: Tensor, k: int) -> Tensor:
    """Dense: what is not among the k largest is 0."""
    mask = torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
    return pre * mask


def variance(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum()


# -- the kinds, written out densely ------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
def test_topk_is_the_dense_masked_product(centred: bool) -> None:
    a = made(TopKAutoencoder, 5, centred=centred)
    pre = (X - a.decoder_bias * centred) @ a.encoder.T + a.encoder_bias
    latents = top(pre.relu(), 5)
    reconstruction = latents @ a.decoder + a.decoder_bias
    torch.testing.assert_close(a(X), reconstruction)
    torch.testing.assert_close(a.encode(X), latents)
    torch.testing.assert_close(a.decode(a.encode(X)), reconstruction)
    agree(a, a.loss(X), (X - reconstruction).square().sum() / variance(X))
    x = X.clone().requires_grad_()
    (ours,) = torch.autograd.grad(a(x).square().sum(), x)
    y = X.clone().requires_grad_()
    dense = top(((y - a.decoder_bias * centred) @ a.encoder.T + a.encoder_bias).relu(), 5) @ a.decoder + a.decoder_bias
    torch.testing.assert_close(ours, torch.autograd.grad(dense.square().sum(), y)[0])


def test_the_auxiliary_loss_predicts_what_is_left_with_its_sign() -> None:
    a = made(TopKAutoencoder, 5, auxiliary=0.5, dead_after=100)
    dead = torch.tensor([1, 4, 9, 16, 20, 23])
    a.silent[dead] = 1000
    with torch.no_grad():  # they are on in some rows, and never among the largest
        a.encoder[dead] *= 0.05
        a.encoder_bias[dead] = 0.02
    pre = (X - a.decoder_bias) @ a.encoder.T + a.encoder_bias
    latents = top(pre.relu(), 5)
    alive = (latents > 0).any(0)  # what fires in this batch is not dead in it
    residual = X - latents @ a.decoder - a.decoder_bias
    assert not bool(alive[dead].all())
    gone = torch.tensor([each for each in dead.tolist() if not alive[each]])
    most = CHANNELS // 2
    chosen = top(pre[:, gone].relu(), min(most, len(gone)))
    scale = min(len(gone) / most, 1.0)
    auxiliary = scale * (chosen @ a.decoder[gone] - residual.detach()).square().sum() / variance(X)
    agree(a, a.loss(X), residual.square().sum() / variance(X) + 0.5 * auxiliary)
    a.eval()
    assert set(a.losses(X)) == {"error", "auxiliary"} and float(a.losses(X)["auxiliary"]) == 0  # nothing to revive


def test_a_dead_direction_moves_towards_the_error() -> None:
    """One dead latent, which reads 1 everywhere: its direction goes along the mean error, not against it."""
    a = TopKAutoencoder(2, 2, 1, auxiliary=1.0, dead_after=0, centred=False).double()
    with torch.no_grad():
        a.encoder.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        a.decoder.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        a.encoder_bias.copy_(torch.tensor([5.0, 1.0]))
        a.decoder_bias.copy_(torch.tensor([-5.0, 0.0]))
    x = torch.tensor([[1.0, 3.0], [2.0, 3.0]], dtype=torch.float64)  # the error is (0, 3)
    a.silent[1] = 10
    a.loss(x).backward()
    assert a.decoder.grad is not None and float(a.decoder.grad[1, 1]) < 0


def test_standard() -> None:
    a = made(SparseAutoencoder, sparsity=0.3)
    latents = ((X - a.decoder_bias) @ a.encoder.T + a.encoder_bias).relu()
    error = (X - latents @ a.decoder - a.decoder_bias).square().sum(1).mean()
    agree(a, a.loss(X), error + 0.3 * (latents * a.decoder.norm(dim=1)).sum(1).mean())


def test_gated() -> None:
    a = made(GatedAutoencoder, sparsity=0.3)
    c = (X - a.decoder_bias) @ a.encoder.T
    gate = (c + a.encoder_bias).relu()
    latents = (c + a.encoder_bias > 0) * (a.log_scale.exp() * c + a.magnitude_bias).relu()
    error = (X - latents @ a.decoder - a.decoder_bias).square().sum(1).mean()
    frozen = (X - gate @ a.decoder.detach() - a.decoder_bias.detach()).square().sum(1).mean()
    agree(a, a.loss(X), error + 0.3 * gate.sum(1).mean() + frozen)


@pytest.mark.parametrize("target", [None, 3.0])
def test_jumprelu_and_its_straight_through_gradients(target: float | None) -> None:
    a = made(JumpReLUAutoencoder, sparsity=0.3, target=target, threshold=0.3, bandwidth=0.2)
    pre = X @ a.encoder.T + a.encoder_bias
    latents = pre * (pre > 0.3)
    count = (pre > 0.3).double().sum(1).mean()
    penalty = count if target is None else (count / target - 1) ** 2
    error = (X - latents @ a.decoder - a.decoder_bias).square().sum(1).mean()
    torch.testing.assert_close(a.loss(X), error + 0.3 * penalty)
    found = gradients(a, a.loss(X))
    plain = gradients(a, error)  # all but the threshold have the plain gradient
    for name in set(plain) - {"threshold"}:
        torch.testing.assert_close(found[name], plain[name])
    near = ((pre - 0.3).abs() < 0.1).double() / 0.2
    by_latent = torch.autograd.grad(((X - latents @ a.decoder - a.decoder_bias).square().sum(1).mean()), latents)[0]
    slope = 1.0 if target is None else float(2 * (count / target - 1) / target)
    expected = -(0.3 * near * by_latent).sum(0) - 0.3 * slope * near.sum(0) / ROWS
    torch.testing.assert_close(found["threshold"], expected)


def test_batchtopk_and_what_it_becomes() -> None:
    a = made(BatchTopKAutoencoder, 3.5, rate=0.25)
    pre = (X - a.decoder_bias) @ a.encoder.T + a.encoder_bias
    count = int(3.5 * ROWS)
    least = pre.relu().flatten().sort(descending=True).values[count - 1]
    latents = pre * (pre >= least)
    error = (X - latents @ a.decoder - a.decoder_bias).square().sum(1).mean()
    agree(a, a.loss(X), error)
    assert int((a.encode(X) > 0).sum()) == count
    assert float(a.threshold) == pytest.approx(float(least.detach()) * 0.25, rel=1e-9)
    a.eval()
    torch.testing.assert_close(a.encode(X), pre * (pre > a.threshold))
    finished = a.finished()
    assert finished.kind == "jumprelu" and finished.centred
    torch.testing.assert_close(finished(X), a(X))


def test_matryoshka_adds_the_error_of_each_width() -> None:
    a = made(MatryoshkaAutoencoder, 3.0, widths=(4, 10))
    latents = a.encode(X).detach()
    mask = (latents > 0).double()
    pre = (X - a.decoder_bias) @ a.encoder.T + a.encoder_bias
    total = torch.zeros((), dtype=torch.float64)
    for width in (4, 10, LATENTS):
        part = (pre * mask)[:, :width] @ a.decoder[:width] + a.decoder_bias
        total = total + (X - part).square().sum(1).mean()
    agree(a, a.loss(X), total)
    assert set(a.losses(X)) == {"error", "error of 4", "error of 10", "auxiliary"}


def test_batchtopk_revives_by_the_error_per_row() -> None:
    a = made(BatchTopKAutoencoder, 3.0, auxiliary=0.7, dead_after=100)
    dead = torch.tensor([2, 7])
    with torch.no_grad():
        a.encoder_bias[dead] = -20.0
    a.silent[dead] = 1000
    latents = a.encode(X)
    residual = X - latents @ a.decoder - a.decoder_bias
    pre = (X - a.decoder_bias) @ a.encoder.T + a.encoder_bias
    predicted = pre[:, dead] @ a.decoder[dead]
    auxiliary = 2 / (CHANNELS // 2) * (predicted - residual.detach()).square().sum(1).mean()
    torch.testing.assert_close(a.losses(X)["auxiliary"], 0.7 * auxiliary)


# -- what all share ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_counts_constraints_and_scale(kind: str) -> None:
    a = made(KINDS[kind])
    a.loss(X).backward()
    fired = (a.encode(X) > 0).any(0)
    assert torch.equal(a.silent == 0, fired) and bool((a.silent[~fired] == ROWS).all())
    a.constrain_gradients()
    assert not a.decoder.grad.requires_grad  # a graph of its own would keep the memory of every step
    along = (a.decoder.grad * a.decoder).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-5)  # directions were made in float32
    with torch.no_grad():
        a.decoder *= 3
        if kind == "jumprelu":
            a.threshold -= 1
    a.constrain()
    torch.testing.assert_close(a.decoder.norm(dim=1), torch.ones(LATENTS, dtype=torch.float64))
    assert kind != "jumprelu" or bool((a.threshold >= 0).all())
    a.eval()
    a.loss(X)
    assert torch.equal(a.silent == 0, fired)  # a validation counts nothing
    before, norms = a(5.0 * X), a.decoder.norm(dim=1)
    a.rescale(5.0)
    torch.testing.assert_close(a(X), before / 5)
    torch.testing.assert_close(a.decoder.norm(dim=1), norms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(CHANNELS,), (3, CHANNELS), (2, 3, CHANNELS)])
def test_any_shape_and_dtype(kind: str, shape: tuple[int, ...]) -> None:
    a = made(KINDS[kind]).float().eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert a.encode(x).shape == (*shape[:-1], LATENTS)
    assert a(x.bfloat16()).dtype == torch.bfloat16
    flat = torch.stack([a(row) for row in x.reshape(-1, CHANNELS)])
    torch.testing.assert_close(a(x).reshape(-1, CHANNELS), flat)


def test_few_positive_values_are_counted_as_they_are() -> None:
    a = TopKAutoencoder(4, 6, 5)
    with torch.no_grad():
        a.encoder.zero_()
        a.encoder_bias.copy_(torch.tensor([1.0, 2.0, -1.0, -1.0, -1.0, -1.0]))
    x = torch.randn(3, 4)
    assert (a.encode(x) > 0).sum(1).tolist() == [2, 2, 2]
    a.loss(x)
    assert a.silent.tolist() == [0, 0, 3, 3, 3, 3]
    assert measure_autoencoder(a, [x]).active == 2


def test_the_report_is_that_of_all_rows_at_once() -> None:
    a = made(TopKAutoencoder, 4).float()
    x = X.float() + 100  # far from 0
    report = measure_autoencoder(a, [x[:7], x[7:30], x[30:]])
    error = (x.double() - a(x).double()).square().sum()
    assert report.explained_variance == pytest.approx(1 - float((error / variance(x.double())).detach()), rel=1e-4)
    fired = a.encode(x) > 0
    assert report.dead == pytest.approx(float((~fired.any(0)).float().mean()))
    torch.testing.assert_close(torch.tensor(report.densities), fired.float().mean(0))
    assert report.rows == ROWS and report.to_dict()["latents"] == LATENTS and report.table().row_count == 3


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    rows = torch.cat([torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.full((5, 3), 100.0)])
    point = geometric_median(rows)
    unit = F.normalize(rows - point, dim=1).sum(0)  # the gradient of the sum of distances
    assert float(unit.norm()) < 1e-2 and float((point - rows.mean(0)).norm()) > 5


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TopKAutoencoder(4, 8, 9), "k: 9"),
        (lambda: BatchTopKAutoencoder(4, 8, 0), "k: 0"),
        (lambda: SparseAutoencoder(0, 8), "channels, latents"),
        (lambda: JumpReLUAutoencoder(4, 8, bandwidth=0), "bandwidth"),
        (lambda: MatryoshkaAutoencoder(4, 8, 2, widths=(4, 2)), "widths"),
        (lambda: TopKAutoencoder(4, 8, 2)(torch.zeros(2, 5)), "it has 5 channels"),
        (lambda: measure_autoencoder(TopKAutoencoder(4, 8, 2), []), "no rows"),
    ],
)
def test_bad_settings(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
