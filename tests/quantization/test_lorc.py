"""LoRC against scipy's singular values, on every quantizer, saved and loaded, with factors in floats and in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from actkit.core.ground import registry
from actkit.core.ground.errors import RecipeError
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.low_rank import captured, decompose
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import Block, anatomy
from actkit.core.recipe.runner import apply
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.store.checkpoint import load, save
from actkit.quantization.adadim.adadim import AdaDim
from actkit.quantization.awq import Awq
from actkit.quantization.gptq import Gptq
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.smooth import Smooth
from actkit.quantization.zeroquant_v2.lorc import Lorc
from actkit.sparsity.wina.wina import Wina
from actkit.testing import check_transform, tiny_batches, tiny_model
from actkit.testing.transforms import close, equal, outputs

RTN = RoundToNearest(bits=3, group_size=8)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_the_factors_are_those_of_scipy(shape: tuple[int, int]) -> None:
    error = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    spectrum = decompose(error, 4, "gram")
    left, right = spectrum.factors()
    assert left.shape == (shape[0], 4) and right.shape == (4, shape[1])
    u, s, vt = scipy.sparse.linalg.svds(error.double().numpy(), k=4)
    np.testing.assert_allclose(left @ right, (u * s) @ vt, rtol=1e-4, atol=1e-6)
    every = np.linalg.svd(error.double().numpy(), compute_uv=False)
    assert float((error - left @ right).norm()) == pytest.approx(np.sqrt((every[4:] ** 2).sum()), rel=1e-5)
    share = captured(error, spectrum.values)
    assert share == pytest.approx((every[:4] ** 2).sum() / (every**2).sum(), rel=1e-6)
    np.testing.assert_allclose(left.norm(dim=0), np.sqrt(every[:4]), rtol=1e-6)  # both get the root
    np.testing.assert_allclose(right.norm(dim=1), np.sqrt(every[:4]), rtol=1e-6)


def test_an_error_of_less_rank_is_captured_whole() -> None:
    vector = torch.arange(1.0, 9)
    matrix = torch.outer(vector, vector[:5])
    spectrum = decompose(matrix, 3, "gram")
    left, right = spectrum.factors()
    assert (
        captured(matrix, spectrum.values) == pytest.approx(1)
        and torch.isfinite(left).all()
        and torch.isfinite(right).all()
    )
    torch.testing.assert_close((left @ right).float(), torch.outer(vector, vector[:5]))
    spectrum = decompose(torch.zeros(8, 5), 3, "gram")
    left, right = spectrum.factors()
    assert captured(torch.zeros(8, 5), spectrum.values) == 1 and not left.any() and not right.any()


QUANTIZERS: dict[str, list[Any]] = {
    "rtn": [RTN],
    "awq": [Awq(bits=3, group_size=8, n_grid=4)],
    "gptq": [Gptq(bits=3, group_size=8)],
    "adadim": [AdaDim(group_size=8)],
    "smooth and rtn": [Smooth(), RTN],
    "rtn of gpt2": [RTN],
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_it_stands_behind_any_quantizer(name: str, tmp_path: Path) -> None:
    kind = "gpt2" if "gpt2" in name else "llama"
    batches = tiny_batches(kind)
    before, plain, model = outputs(tiny_model(kind), batches), tiny_model(kind), tiny_model(kind)
    apply(plain, QUANTIZERS[name], batches, progress=False)
    applied = apply(model, [*QUANTIZERS[name], Lorc(rank=4)], batches, progress=False)
    changed = outputs(model, batches)
    folded = tiny_model(kind)  # with the scales of what stands before it
    if name == "smooth and rtn":
        apply(folded, Smooth(), batches, progress=False)
    values = [found for _, method, found in applied.report.values if method == "Lorc"][-1]
    for linear in anatomy(model).block(1).linears():
        exact = linear.module.storage.dequantize()
        if name != "gptq":  # which sees the corrected blocks in front
            assert torch.equal(exact, plain.get_submodule(linear.path).dequantized())
        left, right = linear.module.correction.factors()
        if name != "awq":  # which sets scaled and clipped weights first
            original = folded.get_submodule(linear.path).weight.detach()
            error = (original.t() if kind == "gpt2" else original) - exact
            s = np.linalg.svd(error.double().numpy(), compute_uv=False)
            lost = float((error - left @ right).detach().norm())
            assert lost == pytest.approx(np.sqrt((s[4:] ** 2).sum()), rel=1e-4)
            found = values[linear.path]
            assert found["error"] == pytest.approx(float(error.norm()), rel=1e-5)
            assert found["captured"] == pytest.approx((s[:4] ** 2).sum() / (s**2).sum(), rel=1e-4)
            assert found["bytes"] == left.nbytes + right.nbytes
    loaded = load(save(model, tmp_path / "saved"))
    equal(outputs(loaded, batches), changed, "outputs")
    applied.undo()
    equal(outputs(model, batches), before, "outputs after undo")


class Compensated(Transform):
    """A quantizer and LoRC as one transform, as LoRC alone has nothing to correct."""

    tags: ClassVar[Tags] = Tags(slot=("weight", "correction"))
    rank: int = 2
    bits: Literal[8] | None = None

    def edit(self, block: Block, seen: Seen) -> Iterator[Any]:
        yield from RTN.edit(block, seen)
        rounded = replace(anatomy(block.root).block(block.index), _originals=block._originals)
        yield from Lorc(rank=self.rank, bits=self.bits).edit(rounded, seen)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_it_keeps_what_transforms_promise(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries, value = registry._entries, f"{Compensated.__module__}:Compensated"
    own = {"compensated": (EntryPoint("compensated", value, registry.METHODS),)}
    monkeypatch.setattr(registry, "_entries", lambda group: entries(group) | (own if group == registry.METHODS else {}))
    for bits in (None, 8):
        found = check_transform(Compensated(bits=bits), tiny_model(kind), tiny_batches(kind), conflicting=(RTN,))
        held = {check.name for check in found if check.outcome == "holds"}
        assert {"the same result twice", "save and load", "undo is exact", "settings are strict"} <= held


def test_it_brings_weights_closer_rank_by_rank_up_to_the_whole() -> None:
    batches = tiny_batches("llama")
    before, errors = outputs(tiny_model("llama"), batches), []
    for rank in (0, 2, 8):  # key and value have 8 outputs
        model = tiny_model("llama")
        apply(model, [RTN, Lorc(rank=rank)], batches, progress=False)
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(outputs(model, batches), before, strict=True)))
    assert errors[0] > errors[1] > errors[2]
    k_proj = model.model.layers[0].self_attn.k_proj
    left, right = k_proj.correction.factors()
    original = tiny_model("llama").model.layers[0].self_attn.k_proj.weight
    torch.testing.assert_close(k_proj.dequantized() + left @ right, original)


def test_factors_in_8_bits(tmp_path: Path) -> None:
    batches = tiny_batches("llama")
    floats, integers = tiny_model("llama"), tiny_model("llama")
    apply(floats, [RTN, Lorc(rank=4)], batches, progress=False)
    applied = apply(integers, [RTN, Lorc(rank=4, bits=8)], batches, progress=False)
    close(outputs(integers, batches), outputs(floats, batches), "outputs", 0.02)
    one, other = (model.model.layers[0].mlp.up_proj for model in (floats, integers))
    assert isinstance(other.correction, LowRank) and isinstance(other.correction.left, IntegerWeight)
    for exact, stored in zip(one.correction.factors(), other.correction.factors(), strict=True):
        axis = 0 if exact.shape[1] == 4 else 1
        step = exact.abs().amax(axis, keepdim=True) / 127
        assert bool(((exact - stored).abs() <= step * 0.501).all())
    assert other.correction.nbytes == 4 * (24 + 16) + 2 * 4 * 4 < one.correction.nbytes / 3
    loaded = load(save(integers, tmp_path / "saved"))
    equal(outputs(loaded, batches), outputs(integers, batches), "outputs")
    assert isinstance(loaded.model.layers[0].mlp.up_proj.correction.right, IntegerWeight)
    applied.undo()
    assert not any(isinstance(module, ActLinear) for module in integers.modules())


def test_it_stacks_with_a_selection() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    apply(model, [RTN, Lorc(rank=2), Wina(sparsity=0.4)], batches, progress=False)
    layers = [module for module in model.modules() if isinstance(module, ActLinear)]
    assert all(layer.filled_slots == ("weight", "select", "correction") for layer in layers)


def test_what_cannot_be_corrected_is_refused() -> None:
    batches = tiny_batches("llama")
    with pytest.raises(RecipeError, match=r"q_proj is not quantized; put a quantizer in front of it"):
        apply(tiny_model("llama"), Lorc(), progress=False)
    model = tiny_model("llama")
    apply(model, RTN, progress=False)
    quantized = outputs(model, batches)
    with pytest.raises(RecipeError, match=r"q_proj was quantized in an earlier run, and its weight before"):
        apply(model, Lorc(), progress=False)
    equal(outputs(model, batches), quantized, "outputs")
    with pytest.raises(ValueError, match=r"rank: 9 was given, and .*k_proj has 16 inputs and 8 outputs"):
        apply(tiny_model("llama"), [RTN, Lorc(rank=9)], progress=False)
    with pytest.raises(RecipeError, match=r"applied already"):
        apply(tiny_model("llama"), [RTN, Lorc(rank=2), Lorc(rank=2)], progress=False)
    report = apply(tiny_model("llama"), [RTN, Lorc(rank=0)], progress=False).report
    assert "Lorc is at its identity setting: nothing to change" in report.notes
