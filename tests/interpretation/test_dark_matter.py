"""The split of an error against lstsq and closed forms, gradient pursuit against a loop, losses against hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp_gram
from torch import Tensor
from torch.nn import functional as F

from actkit.core.ground.errors import DataError
from actkit.core.watch.capture import live
from actkit.core.watch.intervene import intervene
from actkit.interpretation.dark_matter.error_split import PARTS, split_error, split_reconstruction
from actkit.interpretation.dark_matter.gradient_pursuit import gradient_pursuit
from actkit.interpretation.dark_matter.spliced_loss import spliced_loss
from actkit.interpretation.dark_matter.widths import compare_widths
from actkit.interpretation.sparse_autoencoder.top_k import TopKAutoencoder
from actkit.testing import tiny_batches, tiny_model

CHANNELS = 6


def rows(count: int, seed: int = 0) -> Tensor:
    """With a mean, and channels of different sizes."""
    found = torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(seed))
    return found * torch.arange(1, CHANNELS + 1) + 3


def made(latents: int = 20, k: int = 3, seed: int = 0) -> TopKAutoencoder:
    torch.manual_seed(seed)
    found = TopKAutoencoder(CHANNELS, latents, k)
    torch.nn.init.normal_(found.encoder_bias, std=0.3)
    return found.eval()


def test_the_split_is_that_of_lstsq_on_all_rows() -> None:
    autoencoder = made()
    learned, measured = rows(300), rows(120, seed=1)
    found = split_error(autoencoder, list(learned.split(70)), list(measured.split(50)))
    x, y = learned.double(), measured.double()
    e, f = (each - autoencoder(each.float()).detach().double() for each in (x, y))
    w = torch.linalg.lstsq(x, e).solution
    torch.testing.assert_close(found.linear.double(), w, rtol=1e-5, atol=1e-5)
    left = f - y @ w
    total = (f - f.mean(0)).square().sum(0)
    assert found.explained == pytest.approx(float((1 - left.square().sum(0) / total).mean()), abs=1e-6)
    spread = (y - y.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(f.square().sum() / spread), rel=1e-6)
    assert found.fvu_rest == pytest.approx(float(left.square().sum() / spread), rel=1e-6)
    assert found.fvu_linear == pytest.approx(found.fvu - found.fvu_rest)

    def parts(x: Tensor, e: Tensor) -> Tensor:
        each = (x, x - e, e, x @ w, e - x @ w, x - e + e - x @ w)
        return torch.stack([part.square().sum(1) for part in each], 1)

    for ones, lengths in ((False, found.lengths), (True, found.lengths_with_intercept)):
        a, b = (torch.cat([each, torch.ones(len(each), ones, dtype=torch.float64)], 1) for each in (x, y))
        solution = torch.linalg.lstsq(a, parts(x, e)).solution
        wanted = parts(y, f)
        r2 = 1 - (wanted - b @ solution).square().sum(0) / (wanted - wanted.mean(0)).square().sum(0)
        for name, value in zip(PARTS, r2.tolist(), strict=True):
            assert lengths[name] == pytest.approx(value, abs=1e-5), name
    torch.testing.assert_close(found.sizes.double(), parts(y, f)[:, [0, 2, 4]].sqrt(), rtol=1e-5, atol=1e-5)
    latents = autoencoder.encode(measured)
    assert found.active == pytest.approx(float((latents > 0).sum()) / 120)
    assert found.dead == pytest.approx(float((latents <= 0).all(0).double().mean()))
    assert found.rows == 120 and found.table().row_count == len(PARTS)


def test_errors_that_are_linear_are_found_whole_and_dealt_out_errors_not_at_all() -> None:
    x, y = rows(4000), rows(2000, seed=1)
    w = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(2))
    found = split_reconstruction([(x, x - x @ w)], [(y, y - y @ w)])
    torch.testing.assert_close(found.linear, w, rtol=1e-4, atol=1e-4)
    assert found.explained > 1 - 1e-9 and found.fvu_rest < 1e-9
    noise = torch.Generator().manual_seed(3)
    added = [each + torch.randn(each.shape, generator=noise) for each in (x, y)]
    found = split_reconstruction([(x, added[0])], [(y, added[1])])
    assert abs(found.explained) < 0.02 and abs(found.control) < 0.02
    assert found.fvu_rest == pytest.approx(found.fvu, rel=0.02)


def test_fewer_directions_than_channels() -> None:
    """Activations of a plane: the map is the least one, and nothing is divided by 0."""
    base = torch.randn(2, CHANNELS, generator=torch.Generator().manual_seed(0))
    x, y = (torch.randn(200, 2, generator=torch.Generator().manual_seed(seed)) @ base for seed in (1, 2))
    found = split_reconstruction([(x, 0.5 * x)], [(y, 0.5 * y)])
    assert found.explained == pytest.approx(1, abs=1e-6)
    least = torch.linalg.lstsq(x.double(), 0.5 * x.double(), rcond=1e-6, driver="gelsd").solution
    torch.testing.assert_close(found.linear.double(), least, rtol=1e-4, atol=1e-5)


def test_widths_are_compared_per_token() -> None:
    autoencoders = [made(12, 2), made(40, 2, seed=1)]
    learned, measured = rows(300), rows(200, seed=1)
    found = compare_widths(autoencoders[::-1], [learned], [measured])
    assert [split.latents for split in found.splits] == [12, 40] and len(found.pairs) == 1
    one, other = (split.sizes.double().numpy() for split in found.splits)
    for more, value in (((), found.pairs[0].explained), ((one[:, 2],), found.pairs[0].with_rest)):
        x = np.stack([one[:, 1], *more, np.ones(200)], 1)
        solution = np.linalg.lstsq(x[:100], other[:100, 1], rcond=None)[0]
        left, y = other[100:, 1] - x[100:] @ solution, other[100:, 1]
        assert value == pytest.approx(1 - (left**2).sum() / ((y - y.mean()) ** 2).sum(), abs=1e-6)
    assert found.table().row_count == 2 and found.to_dict()["pairs"][0]["wide"] == 40


def looped(x: Tensor, decoder: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
    """One row and one step after another."""
    found = torch.zeros(len(x), len(decoder), dtype=x.dtype)
    for row, count in enumerate(counts):
        w = found[row]
        for _ in range(count):
            r = x[row] - bias - w @ decoder
            g = decoder @ r
            chosen = {int(place) for place in w.nonzero()[:, 0]} | {int(g.argmax())}
            masked = torch.tensor([float(value) if at in chosen else 0.0 for at, value in enumerate(g)], dtype=x.dtype)
            c = masked @ decoder
            w = (w + (c @ r) / (c @ c) * masked).relu()
        found[row] = w
    return found


def test_gradient_pursuit_is_its_loop() -> None:
    x = rows(10).double()
    decoder = F.normalize(torch.randn(30, CHANNELS, generator=torch.Generator().manual_seed(4)), dim=1).double()
    bias = torch.ones(CHANNELS, dtype=torch.float64)
    counts = [0, 1, 2, 3, 4, 5, 5, 4, 2, 1]
    found = gradient_pursuit(x, decoder, bias, torch.tensor(counts))
    torch.testing.assert_close(found, looped(x, decoder, bias, counts))
    assert bool((found >= 0).all()) and bool(((found > 0).sum(1) <= torch.tensor(counts)).all())


def test_gradient_pursuit_is_no_better_than_orthogonal_matching_pursuit() -> None:
    x = rows(40).double()
    decoder = F.normalize(torch.randn(30, CHANNELS, generator=torch.Generator().manual_seed(4)), dim=1).double()
    bias = x.mean(0)
    found = gradient_pursuit(x, decoder, bias, 3)
    ours = (x - bias - found @ decoder).square().sum()
    d = decoder.numpy()
    weights = orthogonal_mp_gram(d @ d.T, d @ (x - bias).numpy().T, n_nonzero_coefs=3).T  # of any sign
    theirs = ((x - bias).numpy() - weights @ d) ** 2
    assert float(ours) >= theirs.sum() * (1 - 1e-9)
    none = (x - bias).square().sum()
    assert float(ours) < 0.6 * float(none)


def test_losses_with_parts_of_the_error() -> None:
    model = tiny_model("llama")
    site = "blocks.0.block.output"
    torch.manual_seed(0)
    autoencoder = TopKAutoencoder(model.config.hidden_size, 40, 3).eval()
    linear = torch.randn(2 * [model.config.hidden_size], generator=torch.Generator().manual_seed(1)) / 8
    batches = tiny_batches("llama", lengths=((9, 6), (8, 8)))
    found = spliced_loss(model, batches, site, autoencoder, linear, skip=2, progress=False)
    totals: dict[str, float] = dict.fromkeys(("model", "nothing", "linear", "rest"), 0.0)
    count = 0
    for batch in batches:
        with torch.no_grad(), live(model, [site]) as seen:
            model(**batch)
        x = next(iter(seen.values()))[0]
        reconstruction = autoencoder(x).detach()
        values = {
            "model": x,
            "nothing": reconstruction,
            "linear": reconstruction + x @ linear,
            "rest": x - x @ linear,
        }
        mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
        for name, value in values.items():
            put = x.clone()
            # positions are counted among the real tokens of a row
            real = (mask.cumsum(1) - 1 >= 2) & mask.bool()
            put[real] = value[real]
            with torch.no_grad(), intervene(model, {site: put}):
                logits = model(**batch).logits
            losses = F.cross_entropy(logits[:, 2:-1].transpose(1, 2), batch["input_ids"][:, 3:], reduction="none")
            totals[name] += float(losses[mask[:, 3:].bool()].sum())
        count += int(mask[:, 3:].sum())
    assert found.tokens == count
    for name, total in totals.items():
        assert getattr(found, name) == pytest.approx(total / count, rel=1e-4), name
    assert found.table().row_count == 4
    share = (found.nothing - found.linear) / (found.nothing - found.model)
    assert found.to_dict()["recovered"]["linear"] == pytest.approx(share)


def test_bad_input() -> None:
    autoencoder, x = made(), rows(50)
    batches = [x]
    cases: list[tuple[Any, str]] = [
        (lambda: split_error(autoencoder, batches, batches), "both sides"),
        (lambda: split_error(autoencoder, [x], [x]), "both sides"),
        (lambda: split_error(autoencoder, [x[:11]], [x]), "at least 12 to learn on"),
        (lambda: split_error(autoencoder, [x], [rows(9)], ridge=-1.0), "ridge: -1"),
        (lambda: compare_widths([autoencoder], [x], [rows(9)]), "at least 2 of different"),
        (lambda: gradient_pursuit(x, torch.zeros(4, 5), torch.zeros(6), 2), "x, decoder, bias"),
        (lambda: gradient_pursuit(x, torch.zeros(4, 6), torch.zeros(6), -1), "counts: -1"),
    ]
    for make, text in cases:
        with pytest.raises(ValueError, match=text):
            make()
    dead = made(40, 2)
    with torch.no_grad():
        dead.encoder_bias[:30] = -1000
    with pytest.raises(ValueError, match="are dead"):
        compare_widths([autoencoder, dead], [x], [rows(30, seed=1)])
    with pytest.raises(DataError, match="do not vary"):
        split_error(autoencoder, [torch.ones(40, CHANNELS)], [torch.ones(9, CHANNELS)])
    with pytest.raises(DataError, match="skip: 99"):
        model = tiny_model("llama")
        wide = TopKAutoencoder(model.config.hidden_size, 40, 3)
        spliced_loss(model, tiny_batches("llama"), "blocks.0.block.output", wide, torch.zeros(16, 16), skip=99)
