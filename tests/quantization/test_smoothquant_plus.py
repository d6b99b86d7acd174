"""The search of the strength against one written by hand on copies of the model, and the promises of the transform."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from actkit.core.recipe.runner import apply
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.smoothquant_plus import SmoothQuantPlus
from actkit.testing import check_transform, tiny_batches, tiny_model
from actkit.zoo.outliers import outlier_twin
from representative import architectures

LONG = ((9, 9), (9, 9))


def rounded(weight: np.ndarray, bits: int, size: int) -> np.ndarray:
    groups = weight.reshape(len(weight), -1, size)
    low, high = np.minimum(groups.min(-1, keepdims=True), 0), np.maximum(groups.max(-1, keepdims=True), 0)
    scale = (high - low) / np.float32(2**bits - 1)
    zero = -np.round(low / scale)
    return ((np.clip(np.round(groups / scale) + zero, 0, 2**bits - 1) - zero) * scale).reshape(weight.shape)


def by_hand(model: Any, batches: list[Any], alpha: float | None, bits: int, size: int) -> Any:
    """A copy of a llama smoothed by alpha (None: not at all), every linear layer of its blocks rounded."""
    changed = copy.deepcopy(model)
    for index, layer in enumerate(changed.model.layers):
        sets = (
            (layer.input_layernorm, "self_attn", ("q_proj", "k_proj", "v_proj")),
            (layer.post_attention_layernorm, "mlp", ("gate_proj", "up_proj")),
        )
        for norm, part, names in sets if alpha is not None else ():
            found: list[torch.Tensor] = []
            watched = getattr(getattr(model.model.layers[index], part), names[0])
            handle = watched.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].flatten(0, 1)))
            for batch in batches:
                model(**batch)
            handle.remove()
            largest = torch.cat(found).abs().amax(0).double()
            linears = [getattr(getattr(layer, part), name) for name in names]
            columns = torch.stack([linear.weight.abs().amax(0) for linear in linears]).amax(0).double()
            scale = largest**alpha / columns ** (1 - alpha)
            norm.weight.copy_(norm.weight / scale)
            for linear in linears:
                linear.weight.copy_(linear.weight * scale)
        for linear in (x for x in layer.modules() if isinstance(x, torch.nn.Linear)):
            linear.weight.copy_(torch.from_numpy(rounded(linear.weight.numpy(), bits, size)))
    return changed


@torch.no_grad()
@pytest.mark.parametrize("loss", ["hidden", "kl", "ce"])
def test_the_strength_is_the_best_of_the_whole_model(loss: str) -> None:
    model = outlier_twin(tiny_model("llama"), channels=2, factor=10.0).eval()
    batches = [{"input_ids": batch["input_ids"]} for batch in tiny_batches("llama", lengths=LONG)]
    expected = {}
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0, None):
        changed, total, count = by_hand(model, batches, alpha, 3, 8), 0.0, 0
        for batch in batches:
            if loss == "hidden":
                error = changed.model(**batch).last_hidden_state - model.model(**batch).last_hidden_state
                total, count = total + float(error.double().square().sum()), count + error.numel()
                continue
            q = torch.log_softmax(changed(**batch).logits.double(), -1)
            if loss == "ce":
                one = torch.nn.functional.cross_entropy(q[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
                total, count = total + float(one) * 16, count + 16
            else:
                p = torch.log_softmax(model(**batch).logits.double(), -1)
                total, count = total + float((p.exp() * (p - q)).sum()), count + 18
        expected[alpha] = total / count
    grid = {"bits": 3, "group_size": 8, "scale_dtype": "float32"}
    settings = SmoothQuantPlus(**grid, steps=5, loss=loss, include_identity=True)
    report = apply(copy.deepcopy(model), settings, batches, progress=False).report
    best = min(expected, key=expected.__getitem__)
    (note,) = [note for note in report.notes if "strength" in note]
    assert f"strength {'none' if best is None else best} of" in note
    tried = dict(each.split(": ") for each in note.split("(")[1].rstrip(")").split(", "))
    for alpha, value in expected.items():
        assert float(tried["none" if alpha is None else f"{alpha:g}"]) == pytest.approx(value, rel=2e-3)


@torch.no_grad()
def test_the_changed_model_is_the_one_that_was_searched() -> None:
    model = outlier_twin(tiny_model("llama"), channels=2, factor=10.0).eval()
    batches = [{"input_ids": batch["input_ids"]} for batch in tiny_batches("llama", lengths=LONG)]
    expected = by_hand(model, batches, 0.5, 4, 8)
    apply(model, SmoothQuantPlus(group_size=8, alpha=0.5, scale_dtype="float32"), batches, progress=False)
    for batch in batches:
        torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=1e-3, atol=1e-4)


def test_another_quantizer_may_follow_the_search() -> None:
    batches = tiny_batches("llama", lengths=LONG)
    searched = SmoothQuantPlus(group_size=8, steps=3, round=False)
    model = tiny_model("llama")
    apply(model, [searched, RoundToNearest(group_size=8)], batches, progress=False)
    other = tiny_model("llama")
    apply(other, SmoothQuantPlus(group_size=8, steps=3), batches, progress=False)
    for (name, value), same in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, same), name


@pytest.mark.parametrize("kind", architectures(["llama", "mixtral", "vit", "gemma3_text", "gpt2"]))
def test_it_keeps_its_promises(kind: str) -> None:
    transform = SmoothQuantPlus(group_size=8, steps=3)
    check_transform(transform, tiny_model(kind), tiny_batches(kind), conflicting=[RoundToNearest(group_size=8)])
