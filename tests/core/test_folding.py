"""Scales and shifts folded into what produces a layer's input, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from actkit.core.edit.edits import temporarily
from actkit.core.edit.folding import fold, why_no_shift
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import anatomy, equalization_sets
from actkit.testing import tiny_batches, tiny_model


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_a_shift_through_a_norm_leaves_the_function(kind: str) -> None:
    model = tiny_model(kind).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batches(kind, lengths=((9, 9),))[0].items()}
    for linear in (x for block in anatomy(model).blocks for x in block.linears() if x.role == "up"):
        if kind == "vit":
            linear.module.bias = None  # a layer without a bias gets one
    block = anatomy(model).blocks[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        expected = model(**batch).logits
        for group in (x for x in equalization_sets(block) if why_no_shift(x) is None):
            width = group.consumers[0].in_features
            scale = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
            shift = torch.randn(width, generator=generator, dtype=torch.float64)
            module = model.get_submodule(group.producer.path)
            before = module(torch.ones(1, width, dtype=torch.float64) * torch.arange(width))
            with temporarily(model, fold(block, group, scale, shift)):
                torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-9, atol=1e-10)
                after = module(torch.ones(1, width, dtype=torch.float64) * torch.arange(width))
                torch.testing.assert_close(after, (before - shift) / scale, rtol=1e-10, atol=1e-10)
                bare = [x.path for x in group.consumers if x.bias is None]
                assert all(isinstance(model.get_submodule(path), ActLinear) for path in bare)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


def test_where_no_shift_can_move_it_is_said() -> None:
    found = [why_no_shift(group) for group in equalization_sets(anatomy(tiny_model("llama")).block(0))]
    assert "LlamaRMSNorm without a bias" in str(found[0]) and "only a norm takes a shift" in str(found[1])
    model = tiny_model("llama")
    block = anatomy(model).block(0)
    group = equalization_sets(block)[0]
    with pytest.raises(ValueError, match=r"takes no shift: .* without a bias"):
        list(fold(block, group, torch.ones(16), torch.ones(16)))


def test_columns_that_read_one_channel_need_one_scale() -> None:
    model = tiny_model("llama")  # 4 query heads on 2 value heads
    block = anatomy(model).block(0)
    group = equalization_sets(block)[1]
    with pytest.raises(ValueError, match=r"scale: columns of .*o_proj that read one channel need one value"):
        list(fold(block, group, torch.rand(16) + 0.5))
