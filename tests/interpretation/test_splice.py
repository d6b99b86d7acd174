"""Sparse autoencoders in models: what is put in their place, and their latents as nodes of RelP."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.ground.fingerprint import model_fingerprint
from actkit.core.watch.capture import live
from actkit.core.watch.intervene import intervene
from actkit.interpretation.relp.effects import patch_effects
from actkit.interpretation.relp.latents import latent_effects
from actkit.interpretation.relp.metrics import LogitDifference
from actkit.interpretation.sparse_autoencoder.splice import Splice
from actkit.interpretation.sparse_autoencoder.top_k import TopKAutoencoder
from actkit.testing import tiny_batches, tiny_model

SITE = "blocks.0.block.output"
BASE = {"input_ids": torch.tensor([[3, 5, 7, 11], [1, 4, 9, 16]])}
PATCH = {"input_ids": torch.tensor([[3, 6, 7, 11], [1, 4, 2, 16]])}
METRIC = LogitDifference(torch.tensor([2, 3]), torch.tensor([5, 6]))


def made(model: Any, k: int = 3) -> TopKAutoencoder:
    torch.manual_seed(0)
    found = TopKAutoencoder(model.config.hidden_size, 40, k).eval()
    torch.nn.init.normal_(found.encoder_bias, std=0.1)
    return found


def at_site(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad(), live(model, [SITE]) as found:
        model(**batch)
    return next(iter(found.values()))[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_put_there(kind: str) -> None:
    model = tiny_model(kind)
    autoencoder = made(model)
    linear = torch.randn(2 * [model.config.hidden_size], generator=torch.Generator().manual_seed(1)) / 8
    x = at_site(model, BASE)
    made_of_it = autoencoder(x).detach()
    error = x - made_of_it
    expected = {
        "nothing": made_of_it,
        "linear": made_of_it + x @ linear,
        "rest": x - x @ linear,
    }
    plain = model(**BASE).logits
    for keep, value in expected.items():
        splice = Splice(autoencoder, keep=keep, linear=None if keep == "nothing" else linear)  # type: ignore[arg-type]
        with torch.no_grad(), intervene(model, {SITE: splice}):
            found = model(**BASE).logits
        with torch.no_grad(), intervene(model, {SITE: value}):
            torch.testing.assert_close(found, model(**BASE).logits)
    with torch.no_grad(), intervene(model, {SITE: Splice(autoencoder, keep="error")}):
        assert torch.equal(model(**BASE).logits, plain)  # to the bit
    latents = autoencoder.encode(x)
    with torch.no_grad(), intervene(model, {SITE: Splice(autoencoder, keep="error", without=[4, 7])}):
        found = model(**BASE).logits
    latents[..., [4, 7]] = 0
    with torch.no_grad(), intervene(model, {SITE: (autoencoder.decode(latents) + error).detach()}):
        torch.testing.assert_close(found, model(**BASE).logits)


def test_gradients_go_through_the_autoencoder_and_not_through_the_error() -> None:
    model = tiny_model("llama")
    autoencoder = made(model).requires_grad_(True)
    with intervene(model, {SITE: Splice(autoencoder, keep="error")}):
        METRIC(model(**BASE).logits).backward()
    assert autoencoder.decoder.grad is not None and float(autoencoder.decoder.grad.abs().sum()) > 0


def test_positions_and_padding() -> None:
    model = tiny_model("llama")
    autoencoder = made(model)
    batch = tiny_batches("llama", lengths=((5, 3),))[0]
    plain = model(**batch).logits
    with torch.no_grad(), intervene(model, {SITE: Splice(autoencoder, positions=[2])}):
        found = model(**batch).logits
    assert torch.equal(found[:, :2], plain[:, :2]) and not torch.equal(found[:, 2:], plain[:, 2:])


@pytest.mark.parametrize("method", ["relp", "attribution"])
def test_latents_and_error_add_up_to_the_effect_of_the_site(method: str) -> None:
    model = tiny_model("llama")
    autoencoder = made(model)
    found = latent_effects(model, BASE, PATCH, METRIC, {SITE: autoencoder}, method=method, progress=False)  # type: ignore[arg-type]
    whole = patch_effects(model, BASE, PATCH, METRIC, sites=["block.output"], method=method, progress=False)  # type: ignore[arg-type]
    assert whole.blocks["block.output"][0] == 0
    torch.testing.assert_close(
        found.values[SITE].sum(0) + found.errors[SITE], whole.values["block.output"][0], rtol=1e-4, atol=1e-5
    )
    assert (found.base, found.patch) == (whole.base, whole.patch)
    assert found.table().row_count == 20 and set(found.to_dict()["values"]) == {SITE}


def test_exact_effects_are_those_of_a_loop() -> None:
    model = tiny_model("llama")
    autoencoder = made(model)
    found = latent_effects(model, BASE, PATCH, METRIC, {SITE: autoencoder}, exact=12, progress=False)
    assert [abs(node.effect) for node in found.checked] == sorted((abs(n.effect) for n in found.checked), reverse=True)
    base, patch = at_site(model, BASE), at_site(model, PATCH)
    change = (autoencoder.encode(patch) - autoencoder.encode(base)).detach()
    left = patch - base - change @ autoencoder.decoder.detach()
    for node in found.checked:
        value = base.clone()
        if node.latent is None:
            value[:, node.position] += left[:, node.position]
        else:
            step = change[:, node.position, node.latent, None] * autoencoder.decoder[node.latent].detach()
            value[:, node.position] += step
        with torch.no_grad(), intervene(model, {SITE: value}):
            after = float(METRIC(model(**BASE).logits))
        assert node.exact == pytest.approx(after - found.base, abs=1e-5)


def test_bad_input() -> None:
    model = tiny_model("llama")
    autoencoder = made(model)
    autoencoder.site = "blocks.1.block.output"
    with pytest.raises(ValueError, match=r"trained on blocks\.1"), intervene(model, {SITE: Splice(autoencoder)}):
        model(**BASE)
    with pytest.raises(ValueError, match=r"trained on blocks\.1"):
        latent_effects(model, BASE, PATCH, METRIC, {SITE: autoencoder}, progress=False)
    autoencoder.site, autoencoder.model = None, "0" * 64
    with pytest.raises(UnsupportedModelError, match="another model"):
        latent_effects(model, BASE, PATCH, METRIC, {SITE: autoencoder}, progress=False)
    autoencoder.model = model_fingerprint(model)
    latent_effects(model, BASE, PATCH, METRIC, {SITE: autoencoder}, progress=False)
    with pytest.raises(ValueError, match="method: 'exact'"):
        latent_effects(model, BASE, PATCH, METRIC, {SITE: autoencoder}, method="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none were given"):
        latent_effects(model, BASE, PATCH, METRIC, {})
    wide = TopKAutoencoder(5, 10, 2)
    with pytest.raises(ValueError, match="it has 16 channels"), intervene(model, {SITE: Splice(wide)}):
        model(**BASE)
    for settings, text in (
        ({"keep": "some"}, "keep: 'some'"),
        ({"keep": "linear"}, "linear: give the map"),
        ({"without": [40]}, "without: 40"),
    ):
        with pytest.raises(ValueError, match=text):
            Splice(autoencoder, **settings)  # type: ignore[arg-type]
