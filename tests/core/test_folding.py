"""Scales and shifts folded into what produces a layer's input, against the formula in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from actkit.core.edit.edits import temporarily
from actkit.core.edit.folding import fold, fold_query_key, why_no_shift
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import anatomy, equalization_sets, query_key_set
from actkit.core.recipe.runner import apply
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.models import ARCHITECTURES


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


NORMS = ("qwen3", "qwen3_moe", "olmo2", "olmoe", "exaone4", "gemma3_text", "lfm2", "phi", "cohere")
REFUSED = {**dict.fromkeys(NORMS, "go through norms"), "olmo": "clamped to", "gptj": "how many features of a head"}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_scale_between_query_and_key_leaves_the_function(kind: str) -> None:
    model, (batch,) = tiny_model(kind), tiny_batches(kind, lengths=((9, 9),))
    generator = torch.Generator().manual_seed(0)
    moved = 0
    with torch.no_grad():
        expected = model(**batch)[0]
        for block in anatomy(model).blocks:
            found = query_key_set(block)
            if found is None or found.refused:
                assert found is None or REFUSED[kind] in found.refused
                continue
            moved += 1
            scale = found.tied(torch.rand(len(found.ties), generator=generator) + 0.5)
            key = model.get_submodule(found.key.path)
            before = key(torch.ones(1, found.key.in_features))
            with temporarily(model, fold_query_key(found, scale)):
                torch.testing.assert_close(model(**batch)[0], expected, rtol=1e-4, atol=1e-4)
                factor = (key(torch.ones(1, found.key.in_features)) / before)[0]
                factor = factor if found.key_rows is None else factor[found.key_rows.indices()]
                torch.testing.assert_close(factor, scale, rtol=1e-3, atol=1e-4)
            untied = scale * torch.linspace(0.5, 2, len(scale))
            if not torch.equal(found.tied(untied), untied):  # features that turn together
                with pytest.raises(ValueError, match=r"turn together need one value"):
                    list(fold_query_key(found, untied))
    assert bool(moved) == (kind not in REFUSED and kind not in ("deepseek_v3", "plm"))  # latent attention


@pytest.mark.parametrize("kind", ["llama", "ernie4_5", "gpt_neox"])
def test_ties_are_needed(kind: str) -> None:
    """With another scale for one of two features that turn together, the function changes."""
    model = tiny_model(kind).double()
    batch = tiny_batches(kind, lengths=((9, 9),))[0]
    found = query_key_set(anatomy(model).block(0))
    assert found is not None and found.refused is None
    twins = (found.ties[None] == found.ties[:, None]).sum(1) == 2
    assert twins.any()
    scale = torch.ones(len(found.ties), dtype=torch.float64)
    scale[int(twins.nonzero()[0])] = 2
    free = replace(found, ties=torch.arange(len(scale)))
    with torch.no_grad():
        expected = model(**batch).logits
        with temporarily(model, fold_query_key(free, scale)):
            assert float((model(**batch).logits - expected).abs().max()) > 1e-4


def test_where_no_scale_moves_between_query_and_key_it_is_said() -> None:
    model = tiny_model("qwen3")
    found = query_key_set(anatomy(model).block(0))
    assert found is not None
    with pytest.raises(ValueError, match=r"query and key of .*self_attn take no scale: .* go through norms"):
        list(fold_query_key(found, torch.ones(len(found.ties))))
    model = tiny_model("llama")
    apply(model, RoundToNearest(bits=8, group_size=8), progress=False)
    found = query_key_set(anatomy(model).block(0))
    assert found is not None and "has its slot 'weight' filled" in str(found.refused)


@pytest.mark.parametrize("kind", ["gemma", "llama", "gpt2"])
def test_a_norm_that_keeps_few_digits_loses_nothing(kind: str) -> None:
    """What the layers read, times their columns, stays to half a step of bfloat16, however the norm was rounded."""
    model = tiny_model(kind).bfloat16()
    block = anatomy(model).block(0)
    group = equalization_sets(block)[0]
    norm, linear = group.producer, group.consumers[0]
    weight = model.get_submodule(norm.path).weight.detach()
    weight[:] = torch.linspace(0.05, 2, len(weight)) - norm.offset
    weight[0], weight[1] = -norm.offset, 2**-7 - norm.offset  # nothing, and what would be rounded to nothing
    scale = torch.logspace(-1, 1, len(weight), dtype=torch.float64)
    scale[1] = 1e4
    before = (weight.double() + norm.offset) * linear.weight.detach().double()
    with temporarily(model, fold(block, group, scale)):
        folded = model.get_submodule(norm.path).weight.detach().double() + norm.offset
        after = folded * linear.weight.detach().double()
    assert bool(((after - before).abs() <= 2**-8 * before.abs()).all())
    rounded = (weight.double() + norm.offset) / scale
    assert kind != "gemma" or float(((folded - rounded).abs() / rounded.abs())[2:].max()) > 2**-8
