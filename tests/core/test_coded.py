"""What keeps codes for the backward pass: the forward pass to the bit, gradients beside autograd's, what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import batches, build
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from actkit.core.edit.edits import Configure, temporarily
from actkit.core.forward.batch import first_tensor
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers import known_functions as known
from actkit.core.layers.coded import (
    CodedActivation,
    CodedInputs,
    CodedSoftmax,
    FrozenNorm,
    RedrawnDropout,
    coded_slopes,
)
from actkit.core.layers.coded_attention import CodedAttention
from actkit.core.layers.packed_codes import AffineCodes, DerivativeCode
from actkit.core.measure.saved_tensors import saved_tensors

FINE = AffineCodes(8, 64)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of input and parameters."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    y = module(x)
    y.backward(upstream)
    assert x.grad is not None
    found = {name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None}
    return y.detach(), {"x": x.grad, **found}


def codes_of(bits: int) -> AffineCodes:
    return AffineCodes(bits, 64, rows=True)


STAND_INS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "gelu": (nn.GELU, lambda m: CodedActivation(m, DerivativeCode.fit(known.GELU, 8, grid=1024)), (4, 7, 32)),
    "layer norm": (lambda: nn.LayerNorm(32), lambda m: CodedInputs(m, codes_of(8)), (4, 7, 32)),
    "rms norm": (lambda: nn.RMSNorm(32), lambda m: CodedInputs(m, codes_of(8)), (4, 7, 32)),
    "linear": (lambda: nn.Linear(32, 5), lambda m: CodedInputs(m, FINE), (4, 7, 32)),
    "softmax": (lambda: nn.Softmax(-1), lambda m: CodedSoftmax(m, FINE), (4, 7, 32)),
}


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_are_the_same_bits_and_gradients_near_with_eight_bits(name: str, dtype: torch.dtype) -> None:
    make, coded, shape = STAND_INS[name]
    torch.manual_seed(0)
    module = make().to(dtype)
    x = drawn(*shape, dtype=dtype)
    upstream = drawn(*module(x).shape, seed=1, dtype=dtype)
    expected, exact = gradients(module, x, upstream)
    found, near = gradients(coded(module), x, upstream)
    assert torch.equal(found, expected) and exact.keys() == near.keys()
    for key, value in near.items():
        assert value.dtype == exact[key].dtype
        assert float((value - exact[key]).norm() / exact[key].norm()) < 1e-2, key


def test_a_mask_is_drawn_again() -> None:
    module, x = nn.Dropout(0.3).train(), drawn(6, 4, 10).transpose(0, 1)  # not contiguous
    upstream = drawn(4, 6, 10, seed=1)
    expected, exact = gradients(module, x, upstream)
    found, near = gradients(RedrawnDropout(module), x, upstream)
    assert torch.equal(found, expected)
    torch.testing.assert_close(near["x"], exact["x"])
    torch.manual_seed(0)
    y = RedrawnDropout(module)(x.requires_grad_())
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(RedrawnDropout(module.eval())(x), x)


@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_norm_is_a_batch_norm_in_evaluation_mode(affine: bool) -> None:
    norm = nn.BatchNorm2d(5, affine=affine).double()
    norm(3 + drawn(8, 5, 4, 4, dtype=torch.float64))  # statistics
    norm.eval()
    if affine:
        with torch.no_grad():
            norm.weight.copy_(drawn(5, seed=2))
        norm.weight.requires_grad_(False)
    x = drawn(3, 5, 4, 4, seed=3, dtype=torch.float64).to(memory_format=torch.channels_last)
    upstream = drawn(3, 5, 4, 4, seed=1, dtype=torch.float64)
    expected, exact = gradients(norm, x, upstream)
    frozen = FrozenNorm(norm).train()
    mean = norm.running_mean.clone()
    with saved_tensors(frozen) as saved:
        found, ours = gradients(frozen, x, upstream)
    assert torch.equal(found, expected) and saved.bytes == 0 and torch.equal(norm.running_mean, mean)
    assert exact.keys() == ours.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, exact[key], rtol=1e-6, atol=1e-9)


def test_nibbles_are_half_a_byte_and_nothing_else_is_kept() -> None:
    x = drawn(16, 128, 64).requires_grad_()
    for module, bound in (
        (CodedActivation(nn.GELU(), DerivativeCode.fit(known.GELU, 4)), 0.5),
        (CodedActivation(nn.ReLU(), DerivativeCode.fit(known.RELU, 4)), 0.125),
        (CodedInputs(nn.LayerNorm(64), AffineCodes(4, 64)), 0.5 + 4 / 64),
    ):
        with saved_tensors(module) as saved:
            y = module(x)
        assert saved.bytes == pytest.approx(bound * x.numel(), abs=8)
        del y


def test_a_module_that_works_in_place_leaves_its_input() -> None:
    module, x = nn.ReLU(inplace=True), drawn(3, 4)
    stand_in = CodedActivation(module, DerivativeCode.fit(known.RELU, 1))
    y = stand_in(x.clone().requires_grad_() * 1)
    assert torch.equal(y, x.relu()) and module.inplace
    y.sum().backward()


def test_a_stand_in_shows_what_it_stands_for() -> None:
    norm = nn.LayerNorm(8)
    stand_in = CodedInputs(norm, FINE)
    assert stand_in.weight is norm.weight and stand_in.eps == norm.eps and "LayerNorm" in repr(stand_in)
    assert list(stand_in.state_dict()) == list(norm.state_dict())
    stand_in.eval()
    assert not norm.training
    again = copy.deepcopy(stand_in)
    assert again.weight is again.inner.weight and again.weight is not norm.weight
    with pytest.raises(AttributeError):
        _ = stand_in.no_such_thing


def test_a_second_derivative_is_refused() -> None:
    x = drawn(4).requires_grad_()
    y = coded_slopes(F.gelu, x, DerivativeCode.fit(known.GELU, 4))
    with pytest.raises(UnsupportedModelError, match=r"create_graph=True.*detach the rule"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def net() -> nn.Module:
    torch.manual_seed(0)
    norm = CodedInputs(nn.LayerNorm(16), AffineCodes(4, 64, rows=True))
    act = CodedActivation(nn.GELU(), DerivativeCode.fit(known.GELU, 4))
    return nn.Sequential(nn.Linear(8, 16), norm, act, RedrawnDropout(nn.Dropout(0.2)), nn.Linear(16, 3)).train()


def test_checkpointing_gives_the_same_gradients_and_keeps_no_codes() -> None:
    model, x = net(), drawn(5, 8)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]

    upstream = drawn(5, 3, seed=1)
    expected, plain = gradients(model, x, upstream)
    again = Checkpointed()
    found, ours = gradients(again, x, upstream)
    assert torch.equal(found, expected)
    for name, value in plain.items():
        assert torch.equal(ours[name if name == "x" else f"inner.{name}"], value)
    with saved_tensors(again) as saved:
        y = again(x.requires_grad_())
    assert saved.bytes <= x.numel() * 4
    del y


def test_autocast_holds_in_the_backward_pass() -> None:
    model, x = net(), drawn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert all(each.grad is not None and each.grad.dtype == torch.float32 for each in model.parameters())


def test_a_compiled_model_trains() -> None:
    model, x = net(), drawn(5, 8)
    model[3] = nn.Identity()
    expected, plain = gradients(model, x, drawn(5, 3, seed=1))
    compiled = torch.compile(model, backend="aot_eager")
    found, ours = gradients(compiled, x, drawn(5, 3, seed=1))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours["x"], plain["x"])


@pytest.mark.parametrize("kind", ["bert", "vit", "llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_is_the_same_bits_and_its_gradients_near(kind: str, dropout: float) -> None:
    if kind == "llama" and dropout:
        settings: dict[str, Any] = {"attention_dropout": dropout}
    else:
        settings = {
            "bert": {"attention_probs_dropout_prob": dropout, "hidden_dropout_prob": 0.0},
            "vit": {"attention_probs_dropout_prob": dropout},
            "gpt2": {"attn_pdrop": dropout, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        }.get(kind, {})
    model, batch = build(kind, **settings).train(), batches(kind)[0]

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        y = first_tensor(model(**batch))
        (y * drawn(*y.shape)).sum().backward()
        return y.detach(), torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])

    expected, exact = run()
    before = model.config._attn_implementation
    coded = {"name": "actkit_coded", "inner": before, "bits": 8}
    with temporarily(model, [Configure("attn_implementation", coded)]):
        found, near = run()
        model.eval()
        with torch.no_grad():
            model(**batch)
    assert model.config._attn_implementation == before
    assert torch.equal(found, expected)
    assert float((near - exact).norm() / exact.norm()) < 1e-2


def test_attention_that_cannot_be_coded_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'eager' is computed by the model's own code"):
        CodedAttention("eager")
    with pytest.raises(ValueError, match="bits: 9 was given"):
        CodedAttention(bits=9)


def test_a_norm_without_statistics_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="keeps no running statistics"):
        FrozenNorm(nn.BatchNorm2d(3, track_running_stats=False))
