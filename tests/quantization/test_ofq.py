"""OFQ: attention by products of query and key, rounded operands, annealing, the tracker, against their formulas."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from actkit.core.edit.edits import Replace, apply_edit
from actkit.core.grids.half_integers import HalfIntegerGrid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import CoverageError, UnsupportedModelError
from actkit.core.layers.latent_product import LatentProduct
from actkit.core.layers.latent_weight import LatentWeight
from actkit.core.layers.learned_inputs import LearnedInputs
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.operand_rounding import OperandRounding
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import HalfIntegerWeight
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.core.train.rules import attached
from actkit.core.train.training import train
from actkit.quantization.fake_quantize import FakeQuantize, TrainedInputs, TrainedWeights
from actkit.quantization.freeze import Freeze
from actkit.quantization.ofq.confidence_annealing import ConfidenceAnnealing, freeze_mask
from actkit.quantization.ofq.ofq import Ofq
from actkit.quantization.ofq.query_key import QueryKeyAttention, why_no_product
from actkit.quantization.oscillation import OscillationTracker
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_rule, check_transform, tiny_batches, tiny_model
from actkit.testing.checks import run_checks
from actkit.testing.rules import CHECKS, RuleCase, changes_the_training

SETTINGS = {
    "operands": Ofq(),
    "query_key": Ofq(query_key=True),
    "bias dropped": Ofq(query_key=True, query_bias="drop"),
    "lsq": Ofq(weights=TrainedWeights(by="lsq", bits=3), inputs=TrainedInputs(by="lsq", bits=4)),
    "layers alone": Ofq(operands=False),
    "by token": Ofq(inputs=TrainedInputs(bits=4), operands=False, query_key=True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_vision_transformer_is_trained_and_frozen(name: str, tmp_path: Any) -> None:
    model, batches = tiny_model("vit"), tiny_batches("vit")
    apply(model, SETTINGS[name], batches, undo="off", progress=False)
    outputs = model(**batches[0]).logits
    outputs.sum().backward()
    without = {key for key, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    model.zero_grad()
    model.eval()
    save(model, tmp_path / "latent")
    with torch.no_grad():
        expected = model(**batches[0]).logits
        assert torch.equal(load(tmp_path / "latent")(**batches[0]).logits, expected)
        apply(model, Freeze(), batches, undo="off", progress=False)
        torch.testing.assert_close(model(**batches[0]).logits, expected, rtol=1e-4, atol=1e-5)
        save(model, tmp_path / "frozen")
        assert torch.equal(load(tmp_path / "frozen")(**batches[0]).logits, model(**batches[0]).logits)
    assert not any(isinstance(module, LatentWeight) for module in model.modules())


def test_the_input_of_a_product_is_rounded_once() -> None:
    for name, kind in (("query_key", LearnedInputs), ("by token", RoundedInputs)):
        model = apply(tiny_model("vit"), SETTINGS[name], tiny_batches("vit"), undo="off", progress=False).model
        attention = model.vit.layers[0].attention
        assert type(attention.inputs) is kind and attention.inputs.grid.bits in (2, 4)
        assert attention.product.inputs is None and attention.v_proj.inputs is None
        assert attention.o_proj.inputs is not None


@pytest.mark.parametrize("name", ["operands", "query_key"])
def test_it_keeps_what_transforms_promise(name: str) -> None:
    conflicting = [RoundToNearest(bits=4, group_size=-1), FakeQuantize()]
    check_transform(SETTINGS[name], tiny_model("vit"), tiny_batches("vit"), conflicting=conflicting)


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_the_product_gives_the_same_scores(kind: str) -> None:
    """With products on a fine grid the function is that of the model, query bias included."""
    model, batches = tiny_model(kind).double().eval(), tiny_batches(kind)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batches[0].items()}
    for block in anatomy(model).blocks:
        for linear in (block.attention.query, block.attention.key):
            nn.init.normal_(linear.module.bias)
    with torch.no_grad():
        expected = model(**batch).logits
        for block in list(anatomy(model).blocks):
            attention = block.attention
            made = QueryKeyAttention.of(
                block, IntegerGrid(8, -1), value=ActLinear.of(attention.value), output=ActLinear.of(attention.output)
            )
            stored: LatentProduct = made.product.storage
            heads = [
                attention.query.weight[i : i + attention.head_dim].T @ attention.key.weight[i : i + attention.head_dim]
                for i in range(0, attention.query.out_features, attention.head_dim)
            ]
            torch.testing.assert_close(stored.latent(), torch.cat(heads))
            stored.grid = _Exact(8)
            apply_edit(model, Replace(attention.path, made))
        torch.testing.assert_close(model(**batch).logits, expected)


class _Exact(IntegerGrid):
    """Rounds nothing."""

    def fake_straight(self, x: Tensor, scale: Any = None, zero: Any = None) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("llama", "grouped queries"),
        ("gpt2", "are one layer"),
        ("bert", "is not known to attend over whole inputs"),
        ("gemma", "rotary embedding stands between"),
    ],
)
def test_other_attention_is_refused_by_name(kind: str, text: str) -> None:
    block = anatomy(tiny_model(kind)).blocks[0]
    if kind == "gemma":
        block = _as_many_key_heads(block)
    assert text in str(why_no_product(block))


def _as_many_key_heads(block: Any) -> Any:
    from dataclasses import replace

    return replace(block, attention=replace(block.attention, key_value_heads=block.attention.heads))


def test_attention_that_computes_something_else_is_refused() -> None:
    model = tiny_model("vit")
    module = anatomy(model).blocks[0].attention.module
    module.scaling *= 2
    original = module.forward
    module.forward = lambda *args, **kwargs: tuple(2 * each if each is not None else None for each in original(*args))
    with pytest.raises(CoverageError, match="computes something else"):
        block = anatomy(model).blocks[0]
        QueryKeyAttention.of(block, HalfIntegerGrid(2), value=block.attention.value.module, output=nn.Identity())


def test_language_models_are_refused() -> None:
    with pytest.raises(CoverageError, match="generates, and its attention reads a cache"):
        apply(tiny_model("llama"), Ofq(inputs=TrainedInputs(by="lsq")), tiny_batches("llama"), progress=False)
    with pytest.raises(CoverageError, match="grouped queries"):
        settings = Ofq(inputs=TrainedInputs(by="lsq"), operands=False, query_key=True)
        apply(tiny_model("llama"), settings, tiny_batches("llama"), progress=False)


def test_operands_are_rounded_as_their_formula_says() -> None:
    """The weights of the softmax without a sign, from 1 / keys; values by channel; queries and keys by position."""
    model, batches = tiny_model("vit"), tiny_batches("vit")
    apply(model, Ofq(weights=None, inputs=TrainedInputs(by="lsq", bits=4, per="position")), batches, progress=False)
    attention = anatomy(model).blocks[0].attention
    rounding: OperandRounding = attention.module.attention_rounding
    seen: dict[str, Tensor] = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layer = attention.module.get_submodule(name)
        layer.register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: output, f"{name} in": args[0]})
        )
    with torch.no_grad():
        model(**batches[0])
        query, key, value = (rounding.rounds[name](seen[f"{name[0]}_proj"]) for name in ("query", "key", "value"))
        heads = [x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (query, key, value)]
        scores = torch.softmax(heads[0] @ heads[1].mT * attention.module.scaling, -1)
        mixed = (rounding.rounds["weights"](scores) @ heads[2]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, seen["o_proj in"])
    tokens = value.shape[1]
    assert rounding.rounds["weights"].zero is not None
    torch.testing.assert_close(rounding.rounds["weights"].step, torch.full((tokens,), 4 / tokens / 15**0.5))
    assert rounding.rounds["value"].step.shape == (value.shape[2],)
    assert rounding.rounds["query"].step.shape == (tokens,)


# -- rules -------------------------------------------------------------------------------------------------------------


class Alone(nn.Module):
    """One layer in training."""

    def __init__(self, weight: LatentWeight) -> None:
        super().__init__()
        self.layer = ActLinear(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def values(*rows: list[float]) -> Alone:
    """A layer whose weights lie at these places of a 2-bit StatsQ grid with a step of about 1."""
    return Alone(LatentWeight.of(torch.tensor(rows), HalfIntegerGrid(2)))


def test_undecided_weights() -> None:
    weight = LatentWeight.of(torch.randn(6, 40, generator=torch.Generator().manual_seed(0)), HalfIntegerGrid(3))
    step = 2 * weight.tensor.abs().mean(1, keepdim=True) / 4
    v = (weight.tensor / step / 4).clamp(-1, 1) * 4 - 0.5  # the sheet's formula, in codes
    distances = torch.stack([(v - (i + 0.5)).abs() for i in range(-4, 3)]).amin(0)
    for boundary in (0.01, 0.1, 0.3):
        assert torch.equal(freeze_mask(weight, boundary), distances > boundary)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_decided_weights_stay_bit_for_bit(optimizer: str) -> None:
    """Under momentum and weight decay too; those in the band move."""
    torch.manual_seed(0)
    model = Alone(LatentWeight.of(torch.randn(8, 64), HalfIntegerGrid(2)))
    weight = model.layer.storage
    given = {"lr": 0.01, "weight_decay": 0.1} | ({"momentum": 0.9} if optimizer == "sgd" else {})
    made = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer](model.parameters(), **given)
    x, y = torch.randn(32, 64), torch.randn(32, 8)
    (model(x) - y).square().mean().backward()
    made.step()  # so that there are moments
    with attached([ConfidenceAnnealing(boundary=0.05)], model, made) as rules:
        for _ in range(5):
            made.zero_grad()
            before, decided = weight.tensor.detach().clone(), freeze_mask(weight, 0.05)
            assert 0 < int((~decided).sum()) < decided.numel() / 2
            (model(x) - y).square().mean().backward()
            rules.after_backward(0.0)
            assert not bool(weight.tensor.grad[decided].any()) and bool(weight.tensor.grad[~decided].any())
            made.step()
            assert not torch.equal(weight.tensor[decided], before[decided])  # masking alone does not hold them
            rules.after_step(0.0)
            assert torch.equal(weight.tensor[decided], before[decided])
            assert bool((weight.tensor[~decided] != before[~decided]).all())


def test_products_outside_of_the_band_give_no_gradient() -> None:
    torch.manual_seed(0)
    product = LatentProduct(torch.randn(8, 12), torch.randn(8, 12), 2, HalfIntegerGrid(2))
    upstream = torch.randn(24, 12)
    (free,) = torch.autograd.grad((product.dequantize() * upstream).sum(), product.query)
    decided = product.from_thresholds() > 0.05
    expected = torch.autograd.grad((product.latent() * torch.where(decided, 0, upstream)).sum(), product.query)[0]
    model = Alone(product)
    with attached([ConfidenceAnnealing(boundary=0.05)], model):
        (found,) = torch.autograd.grad((product.dequantize() * upstream).sum(), product.query)
        torch.testing.assert_close(found, expected)
    (again,) = torch.autograd.grad((product.dequantize() * upstream).sum(), product.query)
    assert torch.equal(again, free) and not torch.equal(free, expected)


def oscillations(codes: list[Tensor], momentum: float) -> tuple[Tensor, Tensor]:
    """By the text of the sheet, in plain Python: the ema of each weight, and how often it flipped."""
    ema, flips = torch.zeros(codes[0].shape), torch.zeros(codes[0].shape)
    for index in range(codes[0].numel()):
        last, direction, mean, count = int(codes[0].flatten()[index]), 0, 0.0, 0
        for step in codes[1:]:
            now = int(step.flatten()[index])
            turned = (now > last) - (now < last)
            mean = (1 - momentum) * mean + momentum * (turned * direction == -1)
            direction, last, count = turned or direction, now, count + (turned != 0)
        ema.view(-1)[index], flips.view(-1)[index] = mean, count
    return ema, flips


def test_the_tracker_counts_what_the_sheet_says() -> None:
    torch.manual_seed(0)
    model = Alone(LatentWeight.of(torch.randn(4, 16), HalfIntegerGrid(2)))
    weight, seen = model.layer.storage, []
    with attached([OscillationTracker(momentum=0.1)], model) as rules:
        seen.append(weight.integers())
        for _ in range(12):
            with torch.no_grad():
                weight.tensor += 0.4 * torch.randn(4, 16)
            rules.after_step(0.0)
            seen.append(weight.integers())
        report = rules.report()["0.OscillationTracker"]
        state = copy.deepcopy(rules.state_dict())
    ema, flips = oscillations(seen, 0.1)
    assert report["all"] == report["layer"]
    assert report["all"]["oscillating"] == pytest.approx(float((ema > 0.005).float().mean()))
    assert report["all"]["flips per 1000 steps"] == pytest.approx(1000 * float(flips.mean()) / 12)
    assert sum(report["all"]["distances"]) == 64 and json.dumps(report)
    torch.testing.assert_close(state["0.OscillationTracker"]["followed"]["layer"]["ema"], ema)
    with attached([OscillationTracker(momentum=0.1)], model) as rules:
        rules.load_state_dict(state)
        assert rules.report()["0.OscillationTracker"] == report


def test_weights_that_oscillate_are_held_at_their_average_code() -> None:
    torch.manual_seed(0)
    model = Alone(LatentWeight.of(torch.randn(4, 16), IntegerGrid(3, -1, symmetric=True), learned=True))
    weight = model.layer.storage
    made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with attached([OscillationTracker(momentum=0.3, freeze_above=0.4)], model, made) as rules:
        (tracker,) = rules._rules.values()
        (followed,) = tracker.followed.values()
        for step in range(40):
            held = followed.held.clone()
            made.zero_grad()
            model(torch.randn(8, 16)).square().mean().backward()
            rules.after_backward(0.0)
            assert not bool(weight.tensor.grad[held].any())
            with torch.no_grad():
                weight.tensor[0] += (-1) ** step * 1.5 * weight.step[0]  # one row flips all the time
                weight.step *= 1.01
            made.step()
            rules.after_step(0.0)
            assert torch.equal(weight.integers()[held].float(), followed.average[held].round())
    assert bool(followed.held[0].any()) and rules.report()["0.OscillationTracker"]["all"]["held"] > 0


def labelled() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A vision transformer in training, and batches with labels."""
    batches = [{**b, "labels": torch.zeros(len(b["pixel_values"]), dtype=torch.long)} for b in tiny_batches("vit")]
    model = tiny_model("vit")
    model.config.problem_type = "single_label_classification"  # which the first call with labels sets otherwise
    return model, batches


def test_annealing_keeps_what_rules_promise() -> None:
    model, batches = labelled()
    apply(model, Ofq(), batches, undo="off", progress=False)
    check_rule(ConfidenceAnnealing(boundary=0.1), model, batches)


def test_the_tracker_keeps_what_rules_promise() -> None:
    """All but that it changes the training, which it does not."""
    model, batches = labelled()
    apply(model, Ofq(), batches, undo="off", progress=False)
    case = RuleCase(OscillationTracker(), model, batches)
    run_checks({name: check for name, check in CHECKS.items() if check is not changes_the_training}, case)
    with pytest.raises(AssertionError, match="the training is the same without it"):
        changes_the_training(case)


def test_rules_of_plain_models_are_refused() -> None:
    for rule in (OscillationTracker(), ConfidenceAnnealing()):
        with pytest.raises(UnsupportedModelError, match="no weights in training; apply fake_quantize or ofq"):
            rule.attach(tiny_model("vit"))


def test_training_under_both_is_reported() -> None:
    model, batches = labelled()
    apply(model, Ofq(query_key=True), batches, undo="off", progress=False)
    rules = [OscillationTracker(), ConfidenceAnnealing(boundary=0.02)]
    trained = train(model, batches[:1], validation=batches[1:], steps=3, evaluate_every=1, rules=rules, progress=False)
    figures = trained.history[-1].reports
    assert {"oscillating", "flips per 1000 steps", "near a threshold", "distances"} <= figures["0.OscillationTracker"][
        "all"
    ].keys()
    assert any(path.endswith("product") for path in figures["0.OscillationTracker"])
    assert 0 < figures["1.ConfidenceAnnealing"]["undecided"] < 0.2
    apply(model, Freeze(), batches, undo="off", progress=False)
    assert any(isinstance(module, HalfIntegerWeight) for module in model.modules())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"query_key": True, "weights": {"by": "lsq", "bits": 2}}, "give weights by statsq"),
        ({"query_key": True, "skip": ("output",)}, "takes all of attention"),
        ({"inputs": None}, "operands: they are rounded as inputs"),
    ],
)
def test_settings_without_a_meaning_are_refused(given: dict, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        Ofq(**given)


@pytest.mark.slow(reason="the compiler and the exporter of torch run")
@pytest.mark.parametrize("name", ["operands", "query_key"])
def test_it_compiles_and_is_exported_by_torch(name: str) -> None:
    model = tiny_model("vit", num_hidden_layers=1)
    check_transform(SETTINGS[name], model, tiny_batches("vit"), compile_backend="aot_eager", export=True)
