"""The errors that RoSTE goes by against sums written out, what it chooses, and the recipe up to integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import actkit
from actkit.core.ground.errors import DataError, RecipeError
from actkit.core.layers.cache_rounding import CHILD
from actkit.core.layers.hadamard import Rotation, hadamard
from actkit.core.layers.linear import ActLinear
from actkit.core.recipe.runner import apply
from actkit.core.train.training import train
from actkit.quantization.fake_quantize import FakeQuantize, TrainedInputs, TrainedWeights
from actkit.quantization.freeze import Freeze
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.quantization.roste import Roste
from actkit.quantization.rotate import Rotate
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_transform, tiny_batches, tiny_model
from representative import architectures


def lost(x: np.ndarray, bits: int, zeros: bool = True) -> float:
    """The squared error of rounding rows, with a zero point or symmetrically."""
    if zeros:
        low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
        scale = (high - low) / (2**bits - 1)
        zero = np.round(-low / scale)
        rounded = (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale
    else:
        scale = np.abs(x).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        rounded = np.round(x / scale) * scale
    return float(np.square(rounded - x).sum())


def dense(size: int, text: str) -> np.ndarray:
    rotation = Rotation.drawn(size, text)
    return (torch.diag(rotation.signs.double()) @ hadamard(size).double() / size**0.5).numpy()


def recorded(model: Any, batch: Any) -> dict[str, Tensor]:
    """What the parts of the first block read and give; keys behind the rotary embedding."""
    seen: dict[str, Tensor] = {}
    layer, keys = model.model.layers[0], {}
    real = model.config._attn_implementation
    from transformers import AttentionInterface

    def keep(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        keys.setdefault("key", key)
        keys.setdefault("value", value)
        return AttentionInterface()[real](module, query, key, value, mask, **settings)

    AttentionInterface.register("kept_by_hand", keep)
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.setdefault("mixed", given[0])),
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.setdefault("hidden", given[0])),
    ]
    model.set_attn_implementation("kept_by_hand")
    with torch.no_grad():
        model(**batch)
    model.set_attn_implementation(real)
    for handle in handles:
        handle.remove()
    return seen | keys


def test_errors_are_the_sums_of_the_formula() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
    seen = {name: x.double().numpy() for name, x in recorded(model, {"input_ids": ids}).items()}
    layer = model.model.layers[0]
    weights = {
        name: layer.get_submodule(path).weight.detach().double().numpy()
        for name, path in {"v": "self_attn.v_proj", "o": "self_attn.o_proj", "down": "mlp.down_proj"}.items()
    }
    expected: dict[str, list[float]] = {"R2": [], "R3": [], "R4": []}
    for turned in (False, True):
        head = dense(4, "0 R2 model.layers.0") if turned else np.eye(4)
        of_keys = dense(4, "0 R3 model.layers.0") if turned else np.eye(4)
        hidden = dense(24, "0 R4 model.layers.0.mlp.down_proj") if turned else np.eye(24)
        v = head.T @ weights["v"].reshape(2, 4, -1)
        o = (weights["o"].reshape(-1, 4, 4) @ head).reshape(weights["o"].shape)
        mixed = (seen["mixed"].reshape(-1, 4, 4) @ head).reshape(-1, 16)
        inside = lost(mixed, 4) + lost(seen["value"] @ head, 4, zeros=False)
        expected["R2"].append(lost(v.reshape(weights["v"].shape), 3) + lost(o, 3) + inside / 2)  # of two sequences
        expected["R3"].append(lost(seen["key"] @ of_keys, 4, zeros=False) / 2)
        expected["R4"].append(lost(weights["down"] @ hidden, 3) + lost(seen["hidden"].reshape(-1, 24) @ hidden, 4) / 2)
    report = apply(model, Roste(weight_bits=3), [{"input_ids": ids}], progress=False).report
    found = {values["site"]: values for path, _, values in report.values if ".0." in path}
    for site, (plain, rotated) in expected.items():
        assert found[site]["plain"] == pytest.approx(plain, rel=1e-4)
        assert found[site]["rotated"] == pytest.approx(rotated, rel=1e-4)


def test_what_a_sample_leaves_out_counts_too() -> None:
    """A sample of few tokens stands for all of them: the errors stay about as large."""
    found = []
    for rows in (4, 512):
        report = apply(
            tiny_model("llama"), Roste(rows=rows), tiny_batches("llama", lengths=((9, 9),) * 8), progress=False
        ).report
        found.append(sum(values["plain"] for _, _, values in report.values if "plain" in values))
    assert 0.7 < found[0] / found[1] < 1.4


@torch.no_grad()
def test_each_site_is_rotated_where_its_error_is_smaller() -> None:
    """Hidden units of many sizes are spread; those of one size, which the grid holds exactly, are left."""
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=((9, 9),))
    first, second = (layer.mlp for layer in model.model.layers)
    second.down_proj.weight.copy_(second.down_proj.weight.sign())
    second.up_proj.weight[:] = second.up_proj.weight[:1]
    second.gate_proj.weight[:] = second.gate_proj.weight[:1]  # all hidden units are equal
    before = model(**batches[0]).logits
    report = apply(model, Roste(), batches, progress=False).report
    torch.testing.assert_close(model(**batches[0]).logits, before, rtol=1e-4, atol=1e-4)
    notes = [note for note in report.notes if "R4" in note]
    assert "R4 rotated" in notes[0] and "R4 left" in notes[1]
    assert isinstance(first.down_proj, ActLinear) and first.down_proj.inputs.rotation is not None
    assert not isinstance(second.down_proj, ActLinear)
    for values in (values for _, _, values in report.values if "plain" in values):
        assert {"site", "plain", "rotated"} == values.keys()


def test_only_what_was_asked_for_is_decided() -> None:
    model = tiny_model("llama")
    apply(model, Roste(sites=("R4",)), tiny_batches("llama"), progress=False)
    assert not any(hasattr(layer.self_attn, CHILD) for layer in model.model.layers)
    assert model.config._attn_implementation == "sdpa"


def test_it_needs_data_and_stands_before_what_rounds() -> None:
    with pytest.raises(DataError, match="Roste calibrates on data"):
        apply(tiny_model("llama"), Roste(), progress=False)
    with pytest.raises(RecipeError, match=r"Roste cannot follow RoundToNearest: .* put it first"):
        apply(tiny_model("llama"), [RoundToNearest(group_size=8), Roste()], tiny_batches("llama"), progress=False)


@pytest.mark.parametrize("kind", architectures(["llama", "gemma3_text", "mixtral"]))
def test_it_keeps_its_promises(kind: str) -> None:
    check_transform(Roste(rows=32), tiny_model(kind), tiny_batches(kind), conflicting=[RoundToNearest(group_size=8)])


@torch.no_grad()
def test_it_stands_behind_a_rotated_residual_stream() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    before = model(**batches[0]).logits
    apply(model, [Rotate(sites=("R1",)), Roste(rows=64)], batches, progress=False)
    torch.testing.assert_close(model(**batches[0]).logits, before, rtol=1e-4, atol=1e-4)


def test_a_model_is_rotated_trained_and_frozen(tmp_path: Path) -> None:
    """The recipe of recipes/roste.yaml: the loss falls, and integers compute what was trained."""
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=((9, 9), (9, 9)))
    rounding = FakeQuantize(weights=TrainedWeights(bits=4), inputs=TrainedInputs(bits=4))
    recipe = [Rotate(sites=("R1",)), Roste(rows=64), QuantizeCache(bits=4), rounding]
    apply(model, recipe, batches, progress=False)
    tied = model.model.embed_tokens.storage
    assert tied is model.lm_head.storage and all(p.requires_grad for p in tied.parameters())
    before = tied.tensor.detach().clone()
    settings = {"steps": 12, "learning_rate": 1e-2, "keep": "last", "evaluate_every": 6}
    held_out = [{"input_ids": torch.arange(18).view(2, 9)}]
    trained = train(model, batches, validation=held_out, progress=False, **settings)
    losses = [step.loss for step in trained.history if step.loss is not None]
    assert losses[-1] < losses[0] and not torch.equal(tied.tensor, before)
    with torch.no_grad():
        expected = model(**batches[0]).logits
        apply(model, Freeze(), progress=False)
        torch.testing.assert_close(model(**batches[0]).logits, expected, rtol=1e-4, atol=1e-4)
        rotated = [layer.mlp.down_proj.inputs.rotation is not None for layer in model.model.layers]
        assert any(rotated) and all(layer.mlp.down_proj.storage.kind == "integer" for layer in model.model.layers)
        actkit.save(model, tmp_path / "small")
        again = actkit.load(tmp_path / "small")
        assert torch.equal(again(**batches[0]).logits, model(**batches[0]).logits)
