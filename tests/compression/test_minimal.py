"""Reduced attention against torch's, collapses in float64, and what stands on a stripped or collapsed model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from actkit.compression.minimal.budget import overdetermination, parameter_budget
from actkit.compression.minimal.collapse import CollapseAttention, collapse_stack, collapsed
from actkit.compression.minimal.minimal_vit import MinimalViT, ReducedEncoder
from actkit.compression.minimal.reduced_attention import ONE_HEAD, QueryKey, ReducedAttention, ValueOutput
from actkit.compression.minimal.strip_mlp import StripMlp
from actkit.core.ground.errors import CoverageError, EditError, RecipeError
from actkit.core.layers.nothing import Nothing, PassThrough
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_model, check_transform, tiny_batches, tiny_model

N = 16
VIT: dict[str, Any] = {"image": 8, "patch": 4, "features": N, "depth": 2, "classes": 10, "channels": 1}


def tokens(rows: int = 3, length: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, length, N, dtype=dtype, generator=torch.Generator().manual_seed(0))


def disturbed(module: Any) -> Any:
    """Random values in float64, biases too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def mask() -> Tensor:
    """Of 3 rows of 5, 3 and 4 tokens."""
    return torch.arange(5) < torch.tensor([5, 3, 4])[:, None]


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_the_full_form_is_torchs_attention(heads: int, bias: bool) -> None:
    theirs = disturbed(nn.MultiheadAttention(N, heads, bias=bias, batch_first=True)).float()
    ours, x = ReducedAttention.of(theirs), tokens(dtype=torch.float32)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for real, masked in ((None, None), (mask(), None), (None, causal), (mask(), causal)):
        hidden = None if real is None else ~real
        expected = theirs(x, x, x, key_padding_mask=hidden, attn_mask=masked, need_weights=False)[0]
        torch.testing.assert_close(ours(x, real, causal=masked is not None), expected, rtol=1e-6, atol=1e-6)


def test_the_shared_form_is_torchs_attention_with_equal_query_and_key() -> None:
    shared = disturbed(ReducedAttention(N, 4, qk="shared"))
    theirs = nn.MultiheadAttention(N, 4, batch_first=True).double()
    with torch.no_grad():
        layers = (shared.query, shared.query, shared.value)
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        theirs.out_proj.load_state_dict(shared.output.state_dict())
    x = tokens()
    torch.testing.assert_close(shared(x), theirs(x, x, x, need_weights=False)[0], rtol=1e-12, atol=1e-12)


def literal(attention: ReducedAttention, x: Tensor, real: Tensor, causal: bool) -> Tensor:
    """One head, by loops over rows and tokens, from W of the scores."""
    settings = attention.settings
    matrix = attention.matrix()
    outputs = torch.zeros_like(x)
    for b, i in itertools.product(range(len(x)), range(x.shape[1])):
        keys = [j for j in range(x.shape[1]) if real[b, j] and (j <= i or not causal)]
        if settings["qk"] == "cholesky":
            scores = [x[b, i] @ matrix @ matrix.T @ x[b, j] for j in keys]
        elif settings["qk"] == "symmetric":
            assert torch.equal(matrix, matrix.T)
            scores = [x[b, i] @ matrix @ x[b, j] for j in keys]
        else:
            q = attention.query(x[b, i])
            k = {"full": attention.key, "shared": attention.query, "collapsed": nn.Identity()}[settings["qk"]]
            scores = [q @ k(x[b, j]) for j in keys]
        weights = torch.stack(scores).div(N**0.5).softmax(0)
        values = [x[b, j] if attention.value is None else attention.value(x[b, j]) for j in keys]
        mixed = sum(weight * value for weight, value in zip(weights, values, strict=True))
        outputs[b, i] = mixed if attention.output is None else attention.output(mixed)
    return outputs


@pytest.mark.parametrize(("qk", "vo"), [*itertools.product(get_args(QueryKey), get_args(ValueOutput))])
def test_every_form_is_the_literal_one(qk: QueryKey, vo: ValueOutput) -> None:
    attention, x = disturbed(ReducedAttention(N, qk=qk, vo=vo)), tokens()
    with torch.no_grad():
        for causal in (False, True):
            expected = literal(attention, x, mask(), causal)
            torch.testing.assert_close(attention(x, mask(), causal)[:, :1], expected[:, :1], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(attention(x, mask(), causal), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("qk", "vo"), [*itertools.product(get_args(QueryKey), get_args(ValueOutput))])
def test_numbers_are_those_of_the_formulas(qk: QueryKey, vo: ValueOutput) -> None:
    numbers = {"full": 2 * N**2, "shared": N**2, "collapsed": N**2, "symmetric": N * (N + 1) // 2}
    numbers["cholesky"] = numbers["symmetric"]
    of_values = {"full": 2 * N**2, "collapsed": N**2, "none": 0}
    found = sum(parameter.numel() for parameter in ReducedAttention(N, qk=qk, vo=vo, bias=False).parameters())
    assert found == numbers[qk] + of_values[vo]
    biases = {"full": 2, "shared": 1, "collapsed": 1, "symmetric": 0, "cholesky": 0}[qk]
    biases += {"full": 2, "collapsed": 1, "none": 0}[vo]
    assert sum(p.numel() for p in ReducedAttention(N, qk=qk, vo=vo).parameters()) == found + N * biases


def test_scores_of_a_triangular_form_begin_at_the_size_of_one() -> None:
    attention, x = ReducedAttention(N, qk="cholesky"), tokens(dtype=torch.float32)
    matrix = attention.matrix()
    scores = x @ matrix @ matrix.mT @ x.mT / N**0.5
    torch.testing.assert_close(scores, x @ x.mT / N)


@pytest.mark.parametrize("what", [("qk", "vo"), ("qk",), ("vo",)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_collapse_is_exact(what: Any, bias: bool) -> None:
    attention, x = disturbed(ReducedAttention(N, bias=bias)), tokens()
    small = collapsed(attention, what)
    for causal in (False, True):
        expected = attention(x, mask(), causal).detach()
        gap = (small(x, mask(), causal) - expected).detach().abs().max() / expected.abs().max()
        assert float(gap) < 1e-11
    numbers = [sum(p.numel() for p in each.parameters() if p.dim() == 2) for each in (attention, small)]
    assert numbers == [4 * N**2, (4 - len(what)) * N**2]
    narrow = collapsed(attention.float(), what)
    expected = attention(x.float(), mask()).detach()
    assert float((narrow(x.float(), mask()) - expected).detach().abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("qk", get_args(QueryKey))
def test_a_bare_stack_has_one_matrix_a_layer_and_one_at_the_end(qk: QueryKey) -> None:
    encoder, x = disturbed(ReducedEncoder(N, 3, None, "bare", qk=qk)), tokens()
    stack = collapse_stack(encoder)
    expected = encoder(x, mask()).detach()
    assert float((stack(x, mask()) - expected).detach().abs().max() / expected.abs().max()) < 1e-11
    assert sum(p.numel() for p in stack.parameters() if p.dim() == 2) == 4 * N**2  # S + 1 of them
    with pytest.raises(EditError, match="norms and residual sums"):
        collapse_stack(ReducedEncoder(N, 2, None))


def single(kind: str) -> Any:
    return tiny_model(kind, num_attention_heads=1)


@pytest.mark.parametrize("kind", ["vit", "bert", "opt"])
def test_layers_of_a_model_are_collapsed_behind_any_mask(kind: str) -> None:
    model, batches = single(kind), tiny_batches(kind)
    before = [model(**batch)[0].detach() for batch in batches]
    report = apply(model, CollapseAttention(), progress=False).report
    for batch, expected in zip(batches, before, strict=True):
        torch.testing.assert_close(model(**batch)[0], expected, rtol=1e-4, atol=1e-4)
    (values,) = {(v["before"], v["after"]) for _, _, v in report.values if "before" in v}
    assert values == (4 * N * (N + 1), 2 * N * (N + 1))
    assert sum(isinstance(module, PassThrough) for module in model.modules()) == 4


def test_transforms_keep_what_they_promise() -> None:
    batches = tiny_batches("vit")
    check_transform(CollapseAttention(), single("vit"), batches, compile_backend="aot_eager", export=True)
    check_transform(CollapseAttention(what="vo"), single("bert"), tiny_batches("bert"))
    check_transform(StripMlp(), tiny_model("vit"), batches, compile_backend="aot_eager", export=True)
    check_transform(StripMlp(), tiny_model("llama"), tiny_batches("llama"))


def test_a_model_of_your_own_is_collapsed_and_saved(tmp_path: Path) -> None:
    model = MinimalViT(**VIT, mlp_ratio=2).eval()
    images = model.example(4, 0)
    expected = model(**images).detach()
    apply(model, CollapseAttention(), [images], progress=False)
    assert [module.settings["qk"] for module in model.modules() if isinstance(module, ReducedAttention)] == [
        "collapsed"
    ] * 2
    torch.testing.assert_close(model(**images), expected, rtol=1e-5, atol=1e-6)
    save(model, tmp_path / "small")
    assert torch.equal(load(tmp_path / "small")(**images), model(**images))


def test_quantizers_take_what_is_left(tmp_path: Path) -> None:
    model, batches = single("vit"), tiny_batches("vit")
    stack = [CollapseAttention(), Awq(bits=8, group_size=8, n_grid=2)]
    before = model(**batches[0]).logits.detach()
    apply(model, stack, batches, progress=False)
    assert float((model(**batches[0]).logits - before).detach().abs().max() / before.abs().max()) < 0.1
    save(model, tmp_path / "small")
    assert torch.equal(load(tmp_path / "small")(**batches[0]).logits, model(**batches[0]).logits)
    with pytest.raises(RecipeError, match="collapse first"):
        apply(single("vit"), [RoundToNearest(bits=8, group_size=-1), CollapseAttention()], progress=False)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: tiny_model("vit"), "heads: it has 4, .* larger than before"),
        (lambda: tiny_model("llama", num_attention_heads=1, num_key_value_heads=1), "rotary embedding"),
        (lambda: tiny_model("gpt2", n_head=1), "one layer here"),
        (lambda: tiny_model("vit", num_attention_heads=2), "as large as before"),
    ],
)
def test_what_is_not_exact_or_no_gain_is_refused(make: Any, text: str) -> None:
    model = make()
    with pytest.raises(EditError, match=text):
        apply(model, CollapseAttention(), progress=False)


def test_a_collapse_comes_once() -> None:
    model = single("vit")
    apply(model, CollapseAttention(), progress=False)
    with pytest.raises(RecipeError, match="applied already"):
        apply(model, CollapseAttention(), progress=False)
    with pytest.raises(EditError, match="only 'full' has two"):
        collapsed(ReducedAttention(N, qk="collapsed", vo="none"))
    with pytest.raises(EditError, match="heads: it has 2"):
        collapsed(ReducedAttention(N, 2))


def test_a_model_without_mlps_is_its_attention() -> None:
    model, batch = tiny_model("vit"), tiny_batches("vit")[0]
    zeroed = tiny_model("vit")
    with torch.no_grad():
        for layer in zeroed.vit.layers:
            layer.mlp.fc2.weight.zero_()
            layer.mlp.fc2.bias.zero_()
    report = apply(model, StripMlp(), progress=False).report
    assert torch.equal(model(**batch).logits, zeroed(**batch).logits)
    assert sum(isinstance(module, Nothing) for module in model.modules()) == 2
    gone = sum(values["parameters"] for _, _, values in report.values)
    assert gone == 2 * (2 * N * 24 + 24 + N + 2 * N)  # layers and norm
    assert anatomy(model).blocks[0].mlp is None
    with pytest.raises(CoverageError):  # its residual sum is inside
        apply(tiny_model("bert"), StripMlp(), progress=False)


def test_one_block_alone_is_stripped() -> None:
    model = tiny_model("vit")
    apply(model, StripMlp(only={"block": 1}), progress=False)
    assert [isinstance(layer.mlp, Nothing) for layer in model.vit.layers] == [False, True]


def test_settings_that_do_not_go_together_are_refused() -> None:
    for form in ONE_HEAD:
        with pytest.raises(ValueError, match="qk='shared', the symmetric form of several heads"):
            ReducedAttention(N, 4, qk=form)
    for form in ("collapsed", "none"):
        with pytest.raises(ValueError, match="mixes whole tokens"):
            ReducedAttention(N, 4, vo=form)
    with pytest.raises(ValueError, match="a bare layer has attention alone"):
        ReducedEncoder(N, 2, norm="bare")
    with pytest.raises(ValueError, match="give a divisor of both"):
        MinimalViT(**{**VIT, "patch": 3})


@pytest.mark.parametrize(
    "settings",
    [
        {"heads": 4},
        {"qk": "cholesky", "vo": "none", "mlp_ratio": None, "norm": "post"},
        {"qk": "symmetric", "mlp_ratio": None, "norm": "bare"},
    ],
)
def test_it_is_a_model_that_methods_work_on(settings: dict[str, Any]) -> None:
    def make() -> nn.Module:
        return MinimalViT(**{**VIT, **settings})

    check_model(make, [{**make().example(4, 0), "labels": torch.arange(4)}])


def test_the_budget_counts_every_parameter_once() -> None:
    model = MinimalViT(**VIT)
    budget = parameter_budget(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert budget.parameters == total == sum(each.parameters for each in budget.components)
    found = {each.name: (each.modules, each.parameters) for each in budget.components}
    assert found["encoder.layers.*.mlp.*"] == (4, 2 * (8 * N**2 + 5 * N))
    assert found["encoder.layers.*.attention.query"] == (2, 2 * (N**2 + N)) and found["positions"] == (1, 4 * N)
    assert sum(each.share for each in budget.components) == pytest.approx(1)
    assert [each.parameters for each in budget.components] == sorted(
        (each.parameters for each in budget.components), reverse=True
    )
    tied = tiny_model("llama")
    assert parameter_budget(tied).parameters == sum(parameter.numel() for parameter in tied.parameters())
    rounded = apply(tied, RoundToNearest(bits=8, group_size=-1), progress=False).model
    assert parameter_budget(rounded).parameters == parameter_budget(tiny_model("llama")).parameters


def test_examples_over_parameters() -> None:
    model = nn.Linear(9, 10)
    assert overdetermination(model, 50, 10) == 5.0
    with pytest.raises(ValueError, match="examples, outputs"):
        overdetermination(model, 0, 10)
