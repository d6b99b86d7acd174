"""Codes and weights against the formulas of the header, in numpy, for 8, 4 and 3 bits and both axes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.models import HIDDEN, KINDS


def by_hand(weight: np.ndarray, bits: int, size: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes and weights of groups along the rows of a float32 matrix, in float32 as the method computes."""
    codes, rounded = np.zeros(weight.shape), np.zeros(weight.shape, dtype=np.float32)
    top = np.float32(2**bits - 1)
    for r, row in enumerate(weight):
        for start in range(0, len(row), size):
            w = row[start : start + size]
            if symmetric:
                scale = np.abs(w).max() / np.float32(2 ** (bits - 1) - 1)
                zero = np.float32(2 ** (bits - 1))
            else:
                low, high = min(w.min(), np.float32(0)), max(w.max(), np.float32(0))
                scale = (high - low) / top
                zero = -np.round(low / scale)
            q = np.clip(np.round(w / scale) + zero, 0, top)
            codes[r, start : start + size] = q
            rounded[r, start : start + size] = (q - zero) * scale
    return codes, rounded


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_codes_are_those_of_numpy(bits: int, axis: str, symmetric: bool) -> None:
    for kind, path in (("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.0.attn.c_attn")):
        model = tiny_model(kind)
        weight = model.get_submodule(path).weight.detach()
        weight = weight if kind == "llama" else weight.t()
        recipe = RoundToNearest(bits=bits, group_size=8, group_axis=axis, symmetric=symmetric, scale_dtype="float32")
        apply(model, recipe, progress=False)
        rows = weight.numpy() if axis == "input" else weight.numpy().T
        codes, rounded = by_hand(np.ascontiguousarray(rows), bits, 8, symmetric)
        codes, rounded = (codes, rounded) if axis == "input" else (codes.T, rounded.T)
        layer = model.get_submodule(path)
        stored = layer.storage.integers()
        assert np.array_equal(stored.numpy(), codes)
        np.testing.assert_allclose(layer.dequantized().numpy(), rounded, rtol=1e-6)


def test_a_whole_row_is_one_group() -> None:
    model = tiny_model("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    apply(model, RoundToNearest(bits=4, group_size=-1, scale_dtype="float32"), progress=False)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.storage.scale.shape == (HIDDEN, 1)
    np.testing.assert_allclose(layer.dequantized().numpy(), by_hand(weight, 4, HIDDEN, False)[1], rtol=1e-6)


def test_scales_take_16_bits() -> None:
    model = tiny_model("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    apply(model, RoundToNearest(bits=4, group_size=8), progress=False)
    stored = model.model.layers[0].self_attn.q_proj.storage
    assert stored.scale.dtype == torch.float16 and stored.nbytes == weight.numel() // 2 + 3 * stored.scale.numel()
    assert torch.equal(stored.scales(), IntegerGrid(4, 8).quantize(weight)[1].half().float())


def test_every_linear_of_every_family_is_rounded_without_data() -> None:
    for kind in KINDS:
        if kind == "mlp":
            continue  # needs one batch to be traced
        model = tiny_model(kind)
        names = {path for path, _ in model.named_modules()}
        wanted = sum(len(block.linears()) for block in anatomy(tiny_model(kind)).blocks)
        apply(model, RoundToNearest(group_size=8), progress=False)
        changed = {path for path, module in model.named_modules() if isinstance(module, ActLinear)}
        assert len(changed & names) == wanted
        assert all("head" not in path and "classifier" not in path and "pooler" not in path for path in changed)
    model = tiny_model("mlp")
    apply(model, RoundToNearest(group_size=8), tiny_batches("mlp"), progress=False)
    assert isinstance(model.first, ActLinear) and isinstance(model.second, ActLinear)


def test_groups_that_do_not_divide_are_refused_by_name() -> None:
    model = tiny_model("llama")
    expected = r"model\.layers\.0\.self_attn\.q_proj: group_size: 5 does not divide the 16 inputs"
    with pytest.raises(ValueError, match=expected):
        apply(model, RoundToNearest(group_size=5), progress=False)
    assert not any(isinstance(module, ActLinear) for module in model.modules())
    with pytest.raises(ValueError, match="does not divide the 8 outputs"):  # key and value have 8 rows
        apply(model, RoundToNearest(group_size=16, group_axis="output"), progress=False)


def test_settings_out_of_bounds_are_refused() -> None:
    for settings, text in (
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"group_size": 0}, "group_size: 0 was given"),
        ({"group_axis": "rows"}, "group_axis"),
    ):
        with pytest.raises(ValidationError, match=text):
            RoundToNearest(**settings)
