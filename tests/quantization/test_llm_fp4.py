"""LLM-FP4 against the sheet's formulas in NumPy float64, brute force on one layer, and the exactness of its shifts."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actkit.core.grids.floats import FloatGrid
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import FloatWeight
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.quantization.llm_fp4 import Inputs, LlmFp4, shorter
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.teal import Teal
from actkit.testing import check_transform, tiny_batches, tiny_model
from actkit.zoo.outliers import outlier_twin
from representative import architectures

FEW = {"candidates": 6, "rounds": 2, "tokens": 64}


def by_hand(x: np.ndarray, e: int, m: int, bias: np.ndarray | float) -> np.ndarray:
    """Q(x) of the sheet, in float64."""
    largest = (2 - 2.0**-m) * 2.0 ** (2**e - 1 - bias)
    x = np.clip(x.astype(np.float64), -largest, largest)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(x)) + bias)
    step = 2.0 ** (np.maximum(1, exponent) - m - bias)
    return np.rint(x / step) * step


def bias_of(reach: np.ndarray, e: int, m: int) -> np.ndarray:
    """The bias by which a range ends at the largest value."""
    return 2**e - np.log2(reach) + np.log2(2 - 2.0**-m) - 1


def data(seed: int = 0, tokens: int = 48, n_in: int = 16, n_out: int = 12) -> tuple[Tensor, Tensor]:
    """Inputs whose channels differ in size, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    size = 2.0 ** torch.randint(-4, 5, (n_in,), generator=generator)
    return torch.randn(tokens, n_in, generator=generator) * size, torch.randn(n_out, n_in, generator=generator)


@pytest.mark.parametrize(("e", "m"), [(3, 0), (2, 1), (1, 2)])
@pytest.mark.parametrize("factor", [1.0, 0.6])
@pytest.mark.parametrize("search", ["range", "bias"])
def test_inputs_are_rounded_by_the_clamped_bias_of_each_channel(e, m, factor, search):
    x, _ = data()
    reach = x.abs().amax(0)
    reach[3] = 0.0  # a dead channel takes the largest shift
    x[:, 3] = 0.0
    found = LlmFp4(search=search)._inputs(FloatGrid(e, m), reach, factor)
    with np.errstate(divide="ignore"):
        own = bias_of(reach.double().numpy(), e, m)
    rho = own.min() * factor if search == "bias" else own.min() - np.log2(factor)
    used = np.clip(np.rint(own), np.rint(rho), np.rint(rho) + 2**e - 1) - np.rint(rho) + rho
    assert found.shift[3] == 2**e - 1 and int(found.shift.min()) >= 0
    np.testing.assert_array_equal(found.shift.numpy(), np.rint(used - rho))
    close = np.isclose(found.round(x).numpy(), by_hand(x.numpy(), e, m, used), rtol=1e-4, atol=1e-6)
    assert close.mean() > 0.99  # all but values at a tie


def test_the_shifted_tensor_has_one_scale():
    """Q_j(x) = 2^-k_j Q(2^k_j x), bit for bit."""
    x, _ = data()
    found = LlmFp4()._inputs(FloatGrid(2, 1), x.abs().amax(0), 0.9)
    factor = torch.exp2(found.shift.float())
    assert found.shift.unique().numel() > 1
    assert torch.equal(found.round(x), found.grid.fake(x * factor, found.scale) / factor)


@pytest.mark.parametrize("search", ["range", "bias"])
def test_the_weights_search_is_brute_force(search):
    x, weight = data()
    settings = LlmFp4(search=search, candidates=25)
    read = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))  # as if it were rounded
    formats = [FloatGrid(2, 1), FloatGrid(1, 2), FloatGrid(3, 0)]
    grid, scale = settings._best_weight(weight, read, x @ weight.t(), formats)
    y = (x @ weight.t()).double().numpy()
    least = {}
    for e, m in ((2, 1), (1, 2), (3, 0)):
        whole = bias_of(weight.abs().amax(1).double().numpy(), e, m)
        errors = []
        for i in range(25):
            factor = 0.01 + i * (1.2 - 0.01) / 25
            bias = whole * factor if search == "bias" else whole - np.log2(factor)
            rounded = by_hand(weight.numpy(), e, m, bias[:, None])
            errors.append(((read.double().numpy() @ rounded.T - y) ** 2).sum(0))
        least[e] = np.min(errors, axis=0)
    best = min(least, key=lambda e: least[e].sum())
    assert grid.exponent_bits == best
    found = ((read @ grid.fake(weight, scale).t()).double().numpy() - y) ** 2
    np.testing.assert_allclose(found.sum(0), least[best], rtol=1e-2)


def test_the_inputs_search_is_brute_force():
    x, weight = data()
    y = x @ weight.t()
    settings = LlmFp4(candidates=20)
    formats = [FloatGrid(2, 1), FloatGrid(1, 2), FloatGrid(3, 0)]
    found = settings._best_inputs(x, weight, y, x.abs().amax(0), formats)
    tried = {
        (grid.exponent_bits, factor): settings._inputs(grid, x.abs().amax(0), factor)
        for grid in formats
        for factor in settings._factors()
    }
    errors = {key: float((each.round(x) @ weight.t() - y).square().sum()) for key, each in tried.items()}
    best = min(errors, key=errors.__getitem__)
    assert found.grid.exponent_bits == best[0] and torch.equal(found.scale, tried[best].scale)


def test_fewer_rows_err_alike():
    a, y, z = torch.randn(40, 6), torch.randn(40, 5), torch.randn(3, 6, 5)
    short, rest = shorter(a, y)
    assert short.shape == (6, 6) and shorter(short, rest) == (short, rest)
    errors = [((a @ each - y).square().sum(0), (short @ each - rest).square().sum(0)) for each in z]
    for one, other in pairwise(errors):
        torch.testing.assert_close(one[0] - other[0], one[1] - other[1], rtol=1e-3, atol=1e-3)


def test_factors_are_those_of_the_release():
    factors = LlmFp4()._factors()
    assert len(factors) == 100 and factors[0] == 0.01 and max(factors) < 1.2
    np.testing.assert_allclose(factors, np.linspace(0.01, 1.2, 101)[:100])


def test_the_search_is_in_the_estimate_of_time():
    assert LlmFp4(candidates=40, rounds=2, tokens=512).passes(1024, 4) == 1 + 2 * 6 * 40 / 2
    assert LlmFp4(candidates=40, rounds=2, tokens=512, input_bits=None, bits=8).passes(256, 4) == 1 + 5 * 40
    assert LlmFp4(search="none", exponent_bits=2, input_exponent_bits=2).passes(4096, 4) == 1 + 3 * 2 / 2


def twin() -> nn.Module:
    return outlier_twin(tiny_model("llama"), channels=2, factor=16.0).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten(0, 1) for batch in tiny_batches("llama")])


def test_a_layer_multiplies_rounded_inputs_and_weights():
    model = twin()
    before = {name: each.weight.detach().clone() for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    apply(model, LlmFp4(**FEW), tiny_batches("llama"), progress=False)
    path = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(path)
    assert isinstance(layer, ActLinear) and isinstance(layer.storage, FloatWeight) and layer.storage.grid.bits == 4
    shift = layer.storage.shift.double()
    x = torch.randn(5, layer.in_features)
    own = layer.inputs.scale.double() * 2.0**-shift  # the scale of each channel
    rounded = Inputs(layer.inputs.grid, layer.inputs.scale, layer.storage.shift).round(x)
    weight = layer.storage.grid.fake(before[path], layer.storage.scales())
    torch.testing.assert_close(layer(x), rounded @ weight.t())
    assert torch.equal(rounded, layer.inputs.grid.fake(x, own.float()))


def test_shifts_save_what_one_bias_for_all_channels_loses():
    exact = logits(twin())
    errors = {}
    for name, settings in {"preshift": {}, "one bias": {"preshift": False}}.items():
        model = twin()
        method = LlmFp4(bits=8, candidates=20, rounds=1, tokens=64, **settings)
        apply(model, method, tiny_batches("llama"), progress=False)
        errors[name] = float((logits(model) - exact).square().mean())
    assert errors["preshift"] < 0.7 * errors["one bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exponents_in_the_norm_change_no_bit(dtype):
    """The norm of the folded model is that of the original times 2^k; with 1 / 2^k in the layers it is the same."""
    folded, plain = twin().to(dtype), twin().to(dtype)
    apply(folded, LlmFp4(**FEW, fold=True), tiny_batches("llama"), progress=False)
    unfolded = copy.deepcopy(folded)
    moved = 0
    for block, old in zip(anatomy(unfolded).blocks, anatomy(plain).blocks, strict=True):
        for norm, before in zip(block.norms, old.norms, strict=True):
            norm.module.weight.data.copy_(before.module.weight)
        for linear in block.linears():
            layer = linear.module
            if linear.role in ("query", "key", "value", "gate", "up"):
                assert layer.inputs.divisor is None
                layer.inputs.divisor = torch.exp2(-layer.storage.shift.float())
                moved += int(layer.storage.shift.any())
    assert moved
    assert torch.equal(logits(folded), logits(unfolded))


def test_the_baselines_are_settings():
    model = twin()
    report = apply(
        model,
        LlmFp4(search="none", exponent_bits=2, input_exponent_bits=2, preshift=False),
        tiny_batches("llama"),
        progress=False,
    ).report
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    weight = twin().get_submodule("model.layers.0.self_attn.q_proj").weight.detach()
    expected = by_hand(weight.numpy(), 2, 1, bias_of(weight.abs().amax(1).double().numpy(), 2, 1)[:, None])
    np.testing.assert_allclose(layer.dequantized().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert not layer.storage.shift.any() and layer.inputs.divisor is None
    assert all("E2M1" in note for note in report.notes if "relative error" in note)


def test_weights_alone():
    model = twin()
    apply(model, LlmFp4(**FEW, input_bits=None, bits=6), tiny_batches("llama"), progress=False)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert layer.inputs is None and layer.storage.shift is None and layer.storage.grid.bits == 6
    apply(
        tiny_model("llama"), [LlmFp4(**FEW, input_bits=None), Teal(sparsity=0.3)], tiny_batches("llama"), progress=False
    )


def test_what_is_refused():
    batches = tiny_batches("llama")
    for recipe in ([Teal(sparsity=0.3), LlmFp4(**FEW)], [RoundToNearest(group_size=8), LlmFp4(**FEW)]):
        with pytest.raises(ValueError, match=r"put it first|weight slot"):
            apply(tiny_model("llama"), recipe, batches, progress=False)
    for settings in ({"bits": 3}, {"input_bits": 9}, {"exponent_bits": 6}, {"candidates": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            LlmFp4(**settings)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("kind", architectures(["llama", "mixtral", "vit", "gemma3_text", "bert", "gpt2", "mlp"]))
def test_it_keeps_its_promises(kind: str, fold: bool) -> None:
    transform = LlmFp4(candidates=4, rounds=1, tokens=32, fold=fold)
    check_transform(transform, tiny_model(kind), tiny_batches(kind), conflicting=[RoundToNearest(group_size=8)])
