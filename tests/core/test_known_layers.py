"""Layers whose weight does not tell what they compute are left alone by name; hooks do not vanish."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Perceptron, batches, build
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from actkit.core.ground.errors import CoverageError, EditError
from actkit.core.layers.known_layers import scales_with_weight, why_unread
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.model.anatomy import anatomy, equalization_sets, is_linear
from actkit.core.recipe.runner import apply
from actkit.functions.swap import swap
from actkit.quantization.rtn import RoundToNearest

RTN = RoundToNearest(bits=8, group_size=8)
UP = "model.layers.0.mlp.up_proj"


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 3 * super().__call__(x)


def as_kind(linear: nn.Linear, kind: type[nn.Linear]) -> nn.Linear:
    made = kind(linear.in_features, linear.out_features, linear.bias is not None)
    made.load_state_dict(linear.state_dict())
    return made


def patched(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: 3 * nn.functional.linear(x, linear.weight, linear.bias)  # type: ignore[method-assign]
    return linear


KINDS = {
    "own forward": (lambda layer: as_kind(layer, Tripled), "forward pass of its own"),
    "own call": (lambda layer: as_kind(layer, Called), "forward pass of its own"),
    "forward set on the object": (patched, "replaced on the object"),
    "parametrization": (parametrizations.weight_norm, "no parameter of its own"),
    "weight norm of old": (nn.utils.weight_norm, "no parameter of its own"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_unknown_meaning_is_left_alone_by_name(kind: str) -> None:
    change, reason = KINDS[kind]
    model, data = build("llama"), batches("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = changed = change(mlp.up_proj)
    with torch.no_grad():
        before = model(**data[0]).logits
    report = apply(model, RTN, data, progress=False).report
    assert mlp.up_proj is changed and not is_linear(changed)
    assert any(path == UP and reason in why for path, _, why in report.skipped)
    assert any(name.startswith(UP) and reason in why for name, why in report.plan.untouched)
    assert isinstance(mlp.down_proj, ActLinear)
    with torch.no_grad():
        error = (model(**data[0]).logits - before).abs().max() / before.abs().max()
    assert error < 0.03  # what 8 bits cost the other layers; 0.7 where the layer loses its factor
    sets = [
        found for found in equalization_sets(anatomy(model).block(0)) if changed in [c.module for c in found.consumers]
    ]
    assert sets and all(found.refused for found in sets)
    with pytest.raises(CoverageError, match="Leave it out"):
        ActLinear.of(changed, select=Threshold(0.1))


def test_a_traced_model_leaves_it_alone_too() -> None:
    model, data = Perceptron(), batches("mlp")
    path, linear = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    setattr(model, path, as_kind(linear, Tripled))
    report = apply(model, RTN, data, min_coverage=0.0, progress=False).report
    assert type(getattr(model, path)) is Tripled
    assert any(name == path and "forward pass of its own" in why for name, _, why in report.skipped)


def test_which_subclasses_are_linear_layers() -> None:
    assert is_linear(FalconLinear(4, 4)) and is_linear(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4))
    assert is_linear(nn.Linear(4, 4)) and is_linear(type("Named", (nn.Linear,), {})(4, 4))
    x = torch.randn(3, 4)
    falcon = FalconLinear(4, 4)
    torch.testing.assert_close(falcon(x), nn.functional.linear(x, falcon.weight, falcon.bias))
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1))
    assert "another shape" in str(why_unread(packed))
    special = nn.Linear(4, 4)
    special._parameters["weight"] = type("Packed", (nn.Parameter,), {})(torch.zeros(4, 4))
    assert "Packed" in str(why_unread(special))
    assert why_unread(nn.ReLU()) is None and not is_linear(nn.ReLU())


def twice(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


def test_hooks_do_not_vanish() -> None:
    """Refused before anything is changed; the hook's name is in the text."""
    for where in (UP, "model.layers.1.self_attn.q_proj"):
        model, data = build("llama"), batches("llama")
        handle = model.get_submodule(where).register_forward_hook(twice)
        before = {name: id(module) for name, module in model.named_modules()}
        with pytest.raises(EditError, match=rf"{where}: it has hooks \(twice\), which would be lost"):
            apply(model, RTN, data, progress=False)
        assert {name: id(module) for name, module in model.named_modules()} == before
        handle.remove()
        apply(model, RTN, data, progress=False)
    model = build("llama")
    model.model.layers[1].mlp.act_fn.register_forward_pre_hook(lambda module, args: None)
    act = model.model.layers[0].mlp.act_fn
    with pytest.raises(EditError, match="act_fn: it has hooks"):
        swap(model, "silu", "relu")
    assert model.model.layers[0].mlp.act_fn is act


class Shifted(nn.Module):
    """Multiplies by a function of its weight that is not linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:]) * self.weight.exp()


class Mine(LlamaRMSNorm):
    """A norm of one's own that scales with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_norms_take_a_scale_only_if_they_scale_with_their_weight() -> None:
    assert scales_with_weight(nn.LayerNorm(5), 0.0) and scales_with_weight(nn.RMSNorm(7), 0.0)
    assert scales_with_weight(LlamaRMSNorm(6).bfloat16(), 0.0)
    assert not scales_with_weight(LlamaRMSNorm(6), 1.0) and not scales_with_weight(Shifted(6), 0.0)
    for kind, known in ((Shifted, False), (Mine, True)):
        model = build("llama")
        model.model.layers[0].input_layernorm = kind(model.config.hidden_size)
        (found,) = [f for f in equalization_sets(anatomy(model).block(0)) if f.inspect.endswith("self_attn")]
        assert (found.refused is None) == known
        assert known or "does not scale with its weight" in str(found.refused)
