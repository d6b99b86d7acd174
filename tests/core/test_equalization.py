"""Moving a scale where a set says that it can move leaves the function as it is, in float64; elsewhere it would not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import KINDS, batches, build, run
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from actkit.core.layers.folding import ScaledActivation
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import EqualizationSet, Linear, Norm, anatomy, equalization_sets
from actkit.core.model.equalization import SharedHeads
from actkit.core.model.fused_layers import PartRows
from actkit.core.recipe.runner import apply
from actkit.core.watch.capture import opened_experts

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in KINDS},
    "llama with as many value heads": ("llama", {"num_key_value_heads": 4}),
    "gpt2 with relu": ("gpt2", {"activation_function": "relu"}),
    "bert with relu": ("bert", {"hidden_act": "relu"}),
}


def columns(linear: Linear) -> Tensor:
    """A view [out, in] of the weight."""
    weight = linear.module.weight.data
    return weight.t() if isinstance(linear.module, Conv1D) else weight


def move(model: nn.Module, found: Any, by_column: Tensor) -> None:
    producer, scale = found.producer, by_column
    if found.shared is not None:  # 4 query heads read 2 value heads
        scale = by_column.view(2, 2, -1)[:, 0].flatten()
    if isinstance(producer, str):
        parent, _, name = producer.rpartition(".")
        activation = ScaledActivation(model.get_submodule(producer), scale).double()
        activation.scale = scale  # the buffer is float32; here everything is float64
        setattr(model.get_submodule(parent), name, activation)
    else:
        every = slice(0, scale.numel())
        chosen = every if found.producer_rows is None else found.producer_rows.indices()
        rows = columns(producer) if isinstance(producer, Linear) else producer.module.weight.data
        rows[chosen] /= scale[:, None] if isinstance(producer, Linear) else scale
        bias = getattr(producer.module, "bias", None)
        if bias is not None:
            bias.data[chosen] /= scale
    for consumer in found.consumers:
        columns(consumer)[:] *= by_column
    for name in found.rescaled:
        model.get_parameter(name).data *= by_column


def double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_moved_scales_leave_the_function(name):
    kind, settings = VARIANTS[name]
    model = build(kind, **settings).double()
    given = [double(batch) for batch in batches(kind)]
    generator = torch.Generator().manual_seed(0)
    moved = refused = 0
    view = anatomy(model)
    with opened_experts(view):
        expected = [run(model, batch) for batch in given]
        for index in range(len(view.blocks)):
            for found in equalization_sets(view.block(index)):
                if found.refused is not None:
                    refused += 1
                    continue
                scale = torch.rand(found.consumers[0].in_features, generator=generator, dtype=torch.float64) * 3 + 0.2
                if found.shared is not None:
                    scale = scale.view(2, 2, -1)[:, :1].expand(2, 2, -1).flatten()
                move(model, found, scale)
                moved += 1
        for batch, output in zip(given, expected, strict=True):
            torch.testing.assert_close(run(model, batch), output, rtol=1e-9, atol=1e-10)
    # per block: attention's input, value -> output, the MLP's input, up -> down
    per_block = {"llama": (4, 0), "mixtral": (7, 0), "gpt2": (4, 0), "bert": (2, 2), "vit": (4, 0)}[kind]
    assert (moved, refused) == (3 * per_block[0], 3 * per_block[1])


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {found.inspect.partition("0.")[2]: found.refused for found in equalization_sets(anatomy(model).block(0))}


def test_reasons():
    assert "post-norm" in reasons(build("bert"))["attention"]
    assert "post-norm: the residual stream reads" in reasons(build("bert"))["intermediate"]
    assert "open them first" in reasons(build("mixtral"))["mlp.experts"]


def test_columns_that_read_one_channel_have_one_scale():
    """3 query heads of 2 channels read each of 2 value heads."""
    shared = SharedHeads(heads=2, readers=3, width=2)
    assert shared.channels().tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    found = EqualizationSet(None, None, (), "", shared=shared)
    values = torch.arange(12.0)
    assert found.of_channels(values).tolist() == [4, 5, 10, 11]
    assert found.tied(values).tolist() == [4, 5, 4, 5, 4, 5, 10, 11, 10, 11, 10, 11]


def test_layers_whose_slots_are_filled_take_no_scale():
    model = build("llama")
    apply(model, "rtn", progress=False)
    assert "slot 'weight' filled" in reasons(model)["self_attn"]


def test_layers_without_a_weight_to_scale_are_refused():
    model = build("llama")
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    assert "shared with another part" in reasons(model)["mlp.down_proj"]
    model = build("gpt2")
    model.transformer.h[0].ln_1.weight = None
    assert "no weight that could take the scale" in reasons(model)["attn"]


def test_producers():
    (first, second, third, fourth) = equalization_sets(anatomy(build("gpt2")).block(0))
    assert isinstance(first.producer, Norm)
    assert (second.producer.path, second.producer_rows) == ("transformer.h.0.attn.c_attn", PartRows(32, 16))
    assert isinstance(third.producer, Norm)
    assert fourth.producer == "transformer.h.0.mlp.act"  # gelu: the scale cannot pass it
    relu = equalization_sets(anatomy(build("gpt2", activation_function="relu")).block(0))[3]
    assert relu.producer.path == "transformer.h.0.mlp.c_fc"


def test_scaled_activation():
    scale = torch.rand(8) + 0.5
    module = ScaledActivation(nn.GELU(), scale).bfloat16()
    assert module.scale.dtype == torch.float32
    x = torch.randn(3, 8).bfloat16()
    expected = (torch.nn.functional.gelu(x).float() / scale).bfloat16()
    assert torch.equal(module(x), expected)
    again = ScaledActivation.from_spec(module.spec(), nn.GELU())
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), expected)
    inner = ScaledActivation(ActLinear.of(nn.Linear(8, 8)), scale)
    assert inner.half().activation.weight.dtype == torch.float16
