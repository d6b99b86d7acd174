"""CATS against torch.quantile, the release's rule written out, and the MLP computed by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.ground.errors import CoverageError, DataError, RecipeError
from actkit.core.layers.activations import Thresholded
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.core.recipe.runner import apply
from actkit.functions.swap import swap
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.cats.cats import Cats, ReleaseHistogram, finetune
from actkit.sparsity.cats.gate_sparsity import gate_sparsity
from actkit.sparsity.teal import Teal
from actkit.testing import check_transform, tiny_batches, tiny_model
from representative import architectures

LENGTHS = ((30, 11, 25), (28, 9))
KINDS = ("llama", "gemma", "mixtral", "gpt2", "bert", "vit")


def gates_of(model: nn.Module, path: str, batches: list[Any]) -> Tensor:
    """The outputs of an activation module on the real tokens: [tokens, channels]."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(found, batches, strict=True)])


def thresholds(model: nn.Module) -> dict[str, float]:
    return {name: float(m.threshold) for name, m in model.named_modules() if isinstance(m, Thresholded)}


# -- the threshold -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_the_threshold_is_the_quantile_of_the_magnitudes_of_real_tokens(share: float) -> None:
    """In every layer that of the original model, also where the layers before it are sparse already."""
    original, model, batches = tiny_model("llama"), tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    notes = apply(model, Cats(sparsity=share), batches, progress=False).report.notes
    for index, (path, threshold) in enumerate(thresholds(model).items()):
        values = gates_of(original, path, batches).abs().flatten()
        lower, upper = (torch.quantile(values, share, interpolation=kind) for kind in ("lower", "higher"))
        assert float(lower) * (1 - 1 / 512) <= threshold <= float(upper) * (1 + 1 / 512)  # bins are 1/512 wide
        assert abs(float((values < threshold).double().mean()) - share) < 0.01
        assert notes[index].startswith(f"{path}: threshold {threshold:.4g}: {share:.1%} of the values are zero")


def test_it_computes_the_formula() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    apply(model, Cats(sparsity=0.6), batches, progress=False)
    mlp = model.model.layers[0].mlp
    x = torch.randn(7, 16)
    gate = F.silu(x @ mlp.gate_proj.weight.T)
    gate = gate * (gate.abs() >= mlp.act_fn.threshold)
    assert 0 < (gate == 0).float().mean() < 1
    torch.testing.assert_close(mlp(x), (gate * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T)
    skipped = gate[0] != 0  # what is zero need not be read
    row = (gate[0, skipped] * (mlp.up_proj.weight[skipped] @ x[0])) @ mlp.down_proj.weight[:, skipped].T
    torch.testing.assert_close(mlp(x)[0], row)


def release_rule(values: Tensor, share: float) -> float:
    """The paper's code: a histogram of |v| over -inf, 998 points from -1 to 1, inf; left edge of the bin reached."""
    edges = torch.cat([torch.tensor([-math.inf]), torch.linspace(-1, 1, 998), torch.tensor([math.inf])])
    counts = torch.stack([((values >= a) & (values < b)).sum() for a, b in pairwise(edges)])
    cumulative = (counts.double() / counts.sum()).cumsum(0)
    return float(edges[torch.searchsorted(cumulative, torch.tensor(share, dtype=torch.double), right=True)])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_release_histogram_is_the_release_s(share: float) -> None:
    original, model, batches = tiny_model("llama"), tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    apply(model, Cats(sparsity=share, method="histogram"), batches, progress=False)
    for path in thresholds(model):
        values = gates_of(original, path, batches)
        edge = release_rule(values.abs().flatten(), share)
        assert edge > 0
        theirs = F.threshold(values, edge, 0.0) - F.threshold(-values, edge, 0.0)
        kept = Thresholded(nn.Identity(), float(model.get_submodule(path).threshold))(values)
        assert torch.equal(kept, theirs) and torch.equal(kept, values * (values.abs() > edge))


def test_the_release_histogram_saturates_and_is_coarse_where_exact_quantiles_are_not() -> None:
    large, small = ReleaseHistogram(), ReleaseHistogram()
    values = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    large.update(2 + values)
    assert large.quantile(0.5) == pytest.approx(1.0) and large.cdf(large.quantile(0.5)) == 0.0
    small.update(1e-4 * values)
    assert small.quantile(0.9) == 0.0 and small.cdf(0.0) == 0.0
    first, second = ReleaseHistogram(), ReleaseHistogram()
    first.update(values[:1000])
    second.update(values[1000:])
    whole = ReleaseHistogram()
    whole.update(values)
    assert first.merge(second).quantile(0.7) == whole.quantile(0.7) == pytest.approx(0.7, abs=0.03)
    assert whole.cdf(whole.quantile(0.7)) == pytest.approx(0.7, abs=0.01)


def test_where_the_quantile_is_zero_only_zeros_are_dropped() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    swap(model, "silu", "relu")
    original = tiny_model("llama")
    swap(original, "silu", "relu")
    notes = apply(model, Cats(sparsity=0.3), batches, progress=False).report.notes
    assert set(thresholds(model).values()) == {0.0} and "it drops nothing" in notes[0]
    for batch in batches:
        assert torch.equal(model(**batch).logits, original(**batch).logits)


# -- what it does to models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", architectures(KINDS))
def test_it_keeps_what_a_transform_promises(kind: str) -> None:
    check_transform(Cats(sparsity=0.6), tiny_model(kind), tiny_batches(kind))


@pytest.mark.parametrize("kind", architectures(KINDS))
def test_every_family_reaches_the_share(kind: str) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind, lengths=((20, 20, 20),) * 3)
    report = apply(model, Cats(sparsity=0.5), batches, min_coverage=0.0, progress=False).report
    found = gate_sparsity(model, batches, progress=False)
    assert len(found.layers) == len(report.notes) == (8 if kind == "mixtral" else 2)
    assert found.layers[0].zeros == pytest.approx(0.5, abs=0.02)
    gated = kind in ("llama", "gemma", "mixtral")
    assert all(("there is no gate" in note) != gated for note in report.notes)


def test_blocks_by_index() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    apply(model, Cats(sparsity={1: 0.7}), batches, min_coverage=0.0, progress=False)
    assert list(thresholds(model)) == ["model.layers.1.mlp.act_fn"]
    check_transform(Cats(sparsity={0: 0.4, 1: 0.7}), tiny_model("llama"), batches)  # YAML has texts for keys
    with pytest.raises(CoverageError, match="Cats would touch 30%"):
        apply(tiny_model("llama"), Cats(sparsity={1: 0.7}), batches, min_coverage=0.5, progress=False)
    with pytest.raises(RecipeError, match=r"sparsity: block 2 was named; the model has blocks 0 to 1"):
        apply(tiny_model("llama"), Cats(sparsity={0: 0.5, 1: 0.5, 2: 0.5}), batches, progress=False)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, math.nan, {}, {0: 1.0}, {0: -1.0}, "half"])
def test_a_share_is_from_zero_to_below_one(sparsity: Any) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        Cats(sparsity=sparsity)


def test_models_and_data_that_it_cannot_use() -> None:
    with pytest.raises(CoverageError, match="knows no MLP with an activation in this TinyMlp"):
        apply(tiny_model("mlp"), Cats(), tiny_batches("mlp"), min_coverage=0.0, progress=False)
    with pytest.raises(DataError, match="Cats calibrates on data"):
        apply(tiny_model("llama"), Cats(), progress=False)


def test_an_activation_module_that_blocks_share_gets_a_threshold_each() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    separate = tiny_model("llama")
    first, second = model.model.layers
    second.mlp.act_fn = first.mlp.act_fn
    for each in (model, separate):
        apply(each, Cats(), batches, progress=False)
    assert first.mlp.act_fn.base is second.mlp.act_fn.base
    assert thresholds(model) == thresholds(separate)


def test_an_expert_that_no_token_reaches_is_reported() -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():  # experts 0 and 1 have the largest logits whatever comes
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    skipped = apply(model, Cats(), tiny_batches("mixtral"), progress=False).report.skipped
    assert len(skipped) == 4 and all(reason == "no calibration token reached it" for _, _, reason in skipped)
    found = gate_sparsity(model, tiny_batches("mixtral"), progress=False)
    assert [layer.tokens for layer in found.layers].count(0) == 4
    assert "no token" in [str(cell) for cell in found.table().columns[1]._cells]


def test_over_quantized_weights_and_beside_sparse_attention() -> None:
    batches = tiny_batches("llama", lengths=LENGTHS)
    skip = ("gate", "up", "down")
    for first in (RoundToNearest(group_size=8), Awq(group_size=8, n_grid=3)):
        for recipe in ([first, Cats(), Teal(skip=skip)], [Teal(skip=skip), Cats()], [Cats(), first]):
            model = tiny_model("llama")
            report = apply(model, recipe, batches, min_coverage=0.0, progress=False).report
            assert len(thresholds(model)) == 2 and not any("selects its inputs" in note for note in report.notes)
            if first in recipe:
                assert isinstance(model.model.layers[0].mlp.up_proj.storage, IntegerWeight)
            if len(recipe) == 3:
                layer = model.model.layers[0].self_attn.q_proj
                assert isinstance(layer, ActLinear) and layer.select is not None
    notes = apply(tiny_model("llama"), [Teal(), Cats()], batches, progress=False).report.notes
    assert "down_proj selects its inputs already" in notes[0]


# -- how many weights are read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_that_a_decode_step_reads(kind: str) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind, lengths=LENGTHS)
    apply(model, Cats(sparsity=0.7), batches, min_coverage=0.0, progress=False)
    paths = list(thresholds(model))
    found = gate_sparsity(model, batches, progress=False)
    d, inner = 16, 24
    attention = 4 * d * d if kind == "gpt2" else 2 * d * d + 2 * d * 8
    read = 0.0
    for path, layer in zip(paths, found.layers, strict=True):
        gates = gates_of(model, path, batches)
        zeros = (gates == 0).double()
        assert layer.tokens == found.tokens == len(gates)
        assert layer.zeros == pytest.approx(float(zeros.mean()))
        own = zeros.mean(1).sort().values
        assert own[0] <= layer.zeros_p05 <= layer.zeros <= layer.zeros_p95 <= own[-1]
        assert float((own <= layer.zeros_p95 + 1e-9).double().mean()) >= 0.95
        kept = 1 - layer.zeros
        read += (d * inner) * (1 + kept * (2 if kind == "llama" else 1))
    mlps = 2 * d * inner * (3 if kind == "llama" else 2)
    assert found.mlp_traffic == pytest.approx(read / mlps)
    assert found.block_traffic == pytest.approx((2 * attention + read) / (2 * attention + mlps))
    assert found.to_dict()["layers"][0]["path"] == found.layers[0].path
    assert found.table().row_count == 2 and len(found.figure().data[0].y) == 2


def test_quantized_weights_count_as_they_are_stored() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    dense = gate_sparsity(model, batches, progress=False)
    assert dense.mlp_traffic == dense.block_traffic == 1.0 and dense.zeros == 0.0
    apply(model, [RoundToNearest(bits=4, group_size=8), Cats()], batches, progress=False)
    mlp = model.model.layers[0].mlp
    found = gate_sparsity(model, batches, progress=False)
    sizes = [layer.storage.nbytes for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    kept = 1 - found.layers[0].zeros
    assert found.layers[0].traffic == pytest.approx((sizes[0] + kept * (sizes[1] + sizes[2])) / sum(sizes))
    with pytest.raises(CoverageError, match="no MLP"):
        gate_sparsity(nn.Sequential(nn.Linear(4, 4)), [torch.randn(2, 4)], progress=False)


# -- training ----------------------------------------------------------------------------------------------------------


def test_finetuning_recovers_loss_and_leaves_an_ordinary_model() -> None:
    pytest.importorskip("peft")
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    apply(model, Cats(sparsity=0.7), batches, progress=False)
    frozen = thresholds(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = finetune(
        model, batches, validation=list(batches), rank=2, steps=20, learning_rate=1e-2, progress=False, keep="best"
    )
    assert trained.validation < trained.history[0].validation
    assert thresholds(model) == frozen
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    wanted = ("q_proj", "k_proj", "gate_proj", "down_proj")
    assert {name.split(".")[-2] for name in moved} == set(wanted) and len(moved) == 8
    assert all(parameter.requires_grad for parameter in model.parameters()) and not hasattr(model, "peft_config")
    for name in moved:
        assert torch.linalg.matrix_rank(model.get_parameter(name) - before[name], atol=1e-5) <= 2
    again = tiny_model("llama")
    apply(again, Cats(sparsity=0.7), batches, progress=False)
    finetune(
        again, batches, validation=list(batches), rank=2, steps=20, learning_rate=1e-2, progress=False, keep="best"
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_finetuning_refuses_quantized_weights_by_name() -> None:
    pytest.importorskip("peft")
    model, batches = tiny_model("llama"), tiny_batches("llama")
    apply(model, [RoundToNearest(group_size=8), Cats()], batches, progress=False)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj \(ActLinear\).*quantize.*after"):
        finetune(model, batches, validation=list(batches), steps=1, progress=False)
