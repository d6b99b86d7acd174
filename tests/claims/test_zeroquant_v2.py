"""ZeroQuant-V2's experiments on tiny sizes: recipes against `ptq_study`, random factors of one norm, what is judged."""

from __future__ import annotations

import pytest
import torch

from actkit.claims import zeroquant_v2
from actkit.claims import zeroquant_v2_training as training
from actkit.claims.subject import Subject
from actkit.claims.zeroquant_v2 import RANK, compensated, groups_of, lost, rows_of
from actkit.core.layers.linear import ActLinear
from actkit.core.recipe.runner import apply
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.zeroquant_v2.lorc import Lorc
from actkit.quantization.zeroquant_v2.ptq_study import ptq_study
from actkit.quantization.zeroquant_v2.zeroquant import ZeroQuant

METHODS = (training.NEAREST, training.GPTQ, training.LOCAL, training.GLOBAL)
TINY = zeroquant_v2.Sizes(seeds=(0, 1), calibration=1, held_out=1, steps=0, ranks=(0, 1, 8, 16))


@pytest.fixture(scope="module")
def natural(language):
    return Subject("swiglu", calibration=1, split="train", held_out=1, model=language)


def stands_in(monkeypatch, values):
    """The perplexity of a recipe is looked up: by bits and rank of weights, and by bits and scope of inputs."""

    def perplexity(_, recipe=None, seed=0):
        each = recipe if isinstance(recipe, list) else [recipe]
        key = tuple(
            f"{part.bits}{part.per}" if isinstance(part, RoundInputs) else getattr(part, "rank", None) or part.bits
            for part in each
            if part is not None
        )
        return values(key, each)

    monkeypatch.setattr(Subject, "perplexity", perplexity)


def test_what_is_lost_is_what_the_study_says(natural):
    study = ptq_study(
        natural.model,
        natural.calibration(0),
        natural.held_out,
        weights=[(4, "row"), (4, 64), None],
        inputs=[None, (8, "token"), (8, "tensor")],
        methods=["rtn"],
        ranks=[0, RANK],
        symmetric=[False],
        progress=False,
    )
    found = {(each.weights, each.inputs, each.rank): each.loss for each in study.combinations}
    tokens, static = RoundInputs(bits=8, symmetric=False), RoundInputs(bits=8, per="tensor", symmetric=False)
    for key, recipe in {
        ((4, "row"), None, 0): rows_of(4, False),
        ((4, 64), None, RANK): compensated(4),
        ((4, 64), (8, "token"), 0): [groups_of(4), tokens],
        (None, (8, "tensor"), 0): static,
    }.items():
        assert lost(natural, recipe) == found[key]


def test_random_factors_have_the_norm_of_the_others(natural):
    applied = apply(natural.model, compensated(3), undo="memory", progress=False)
    layer = next(module for module in natural.model.modules() if isinstance(module, ActLinear))
    applied.undo()
    drawn = zeroquant_v2.at_random(layer, torch.Generator().manual_seed(0))
    before, after = (each.correction.factors() for each in (layer, drawn))
    products = [(left @ right).detach().double() for left, right in (before, after)]
    assert float(products[1].norm()) == pytest.approx(float(products[0].norm()), rel=1e-5)
    assert int(torch.linalg.matrix_rank(products[1].float())) == RANK
    assert abs(float((products[0] * products[1]).sum() / products[0].norm() ** 2)) < 0.1  # other directions
    assert drawn.storage is layer.storage


def test_bytes_are_those_of_codes_scales_and_factors(natural):
    weights = [module.weight for module in natural.model.model.layers.modules() if hasattr(module, "in_features")]
    count = sum(each.numel() for each in weights)
    groups = count * 3 // 8 + count // zeroquant_v2.GROUP * 3  # a scale of 2 bytes, a zero point of 1
    assert zeroquant_v2.stored(natural, groups_of(3)) == pytest.approx(groups, rel=0.02)
    factors = sum(RANK * sum(each.shape) + 2 * RANK * 4 for each in weights)
    more = zeroquant_v2.stored(natural, compensated(3, factors=8)) - zeroquant_v2.stored(natural, groups_of(3))
    assert more == factors


def test_every_experiment_measures(natural):
    models = {"natural": natural}
    assert "class" in zeroquant_v2.eight_bit_weights(models).here
    assert "by groups" in zeroquant_v2.groups_beside_rows(models).here
    assert zeroquant_v2.falling(models, TINY, (2,)).here.count(": ") == 5
    assert "per percent" in zeroquant_v2.recovered(models).here
    assert not zeroquant_v2.inputs_or_weights(models, models, TINY).passed  # one family is not two
    drawn = zeroquant_v2.random_directions(models, TINY, (2,))
    assert "random" in drawn.here


@pytest.mark.parametrize(
    ("rows", "groups", "mixed", "exact", "finer", "both"),
    [(30.4, 30.2, 30.39, True, True, True), (30.4, 30.4, 30.37, False, False, False)],
)
def test_the_study_is_judged_by_what_is_lost(natural, monkeypatch, rows, groups, mixed, exact, finer, both):
    def value(key, recipe):
        if not key:
            return 30.0
        if len(key) == 2:
            return mixed
        if key == (8,):
            return 30.05 if exact else 30.2
        return rows if recipe[0].group_size == -1 else groups

    stands_in(monkeypatch, value)
    models = {"natural": natural}
    assert zeroquant_v2.eight_bit_weights(models).passed is exact
    assert zeroquant_v2.groups_beside_rows(models).passed is finer
    assert zeroquant_v2.inputs_beside_weights(models).passed is both


@pytest.mark.parametrize(
    ("static", "tokens", "passed"), [(30.2, 30.3, True), (30.01, 30.3, False), (30.2, 30.1, False)]
)
def test_inputs_must_lose_more_at_both_widths(natural, monkeypatch, static, tokens, passed):
    found = {(): 30.0, ("8tensor",): static, ("6token",): tokens, (8,): 30.05, (6,): 30.1}
    stands_in(monkeypatch, lambda key, _: found[key])
    models = dict.fromkeys(("one", "two", "three"), natural)
    assert zeroquant_v2.inputs_or_weights(models, models, TINY).passed is passed
    assert zeroquant_v2.inputs_or_weights_of_a_twin({"twin": natural}, natural, TINY).passed is passed


@pytest.mark.parametrize(
    ("three", "falls", "grows", "recovers"),
    [
        ([32, 31.9, 31.7], True, True, True),
        ([32, 32, 31.7], False, True, True),
        ([32, 31.9, 31.85], True, False, False),
    ],
)
def test_the_compensation_is_judged(natural, monkeypatch, three, falls, grows, recovers):
    ranks = (0, 1, 8)
    table = {2: [40, 39, 38], 3: three, 4: [30.5, 30.4, 30.3]}

    def value(key, _):
        if not key:
            return 30.0
        return table[key[0]][ranks.index(key[1] if len(key) == 2 else 0)]

    stands_in(monkeypatch, value)
    monkeypatch.setattr(zeroquant_v2, "beside_groups", lambda _: "")
    models, sizes = {"natural": natural}, zeroquant_v2.Sizes(ranks=ranks)
    assert zeroquant_v2.falling(models, sizes, (3, 2)).passed is falls
    assert zeroquant_v2.growing(models).passed is grows
    assert zeroquant_v2.recovered(models).passed is recovers
    assert zeroquant_v2.falling_and_recovered(models, sizes).passed is (falls and recovers)
    assert zeroquant_v2.integer_factors(models, (3, 2)).passed
    for drawn, passed in ((32.1, True), (31.9, False)):
        monkeypatch.setattr(zeroquant_v2, "with_random_factors", lambda *_, drawn=drawn: drawn)
        assert zeroquant_v2.random_directions(models, TINY, (3,)).passed is passed


def test_of_a_collapsed_real_model_no_gain_counts(natural, monkeypatch):
    found = {(): 30.0, (2,): 9e5, (2, 8): 8e5, (3,): 130.0, (3, 8): 120.0, (4,): 32.0, (4, 8): 31.0}
    stands_in(monkeypatch, lambda key, _: found[key])
    assert zeroquant_v2.growing({"natural": natural}).passed
    monkeypatch.setattr(natural, "name", "smollm2")
    assert not zeroquant_v2.growing({"twin": natural}).passed


def test_a_rank_is_added_as_lorc_adds_it(natural):
    before = {name: value.clone() for name, value in natural.model.state_dict().items()}
    nearest = training.recipe(training.NEAREST, 3, 8, 64)
    without, ranked = training.with_rank(natural, nearest)
    assert without == natural.perplexity(nearest)
    both = [nearest[0], Lorc(rank=RANK), nearest[1]]
    assert ranked == pytest.approx(natural.perplexity(both), rel=1e-6) and ranked != without
    assert all(torch.equal(value, before[name]) for name, value in natural.model.state_dict().items())


def test_recipes_of_the_methods_round_alike():
    found = {method: training.recipe(method, 4, 8) for method in METHODS}
    assert len({(each[0].bits, each[0].group_size, each[0].symmetric) for each in found.values()}) == 1
    assert [each[-1].bits for each in (found[training.NEAREST], found[training.GPTQ])] == [8, 8]
    learned = [found[name][0] for name in (training.LOCAL, training.GLOBAL)]
    assert [(each.inputs, each.input_bits, each.steps) for each in learned] == [("local", 8, 60), ("global", 8, 60)]


@pytest.mark.parametrize(
    ("alone", "beside", "held"),
    [
        ((30.4, 30.15, 30.3, 30.2), (30.5, 30.4, 30.3, 30.25), (True, True, True)),
        ((30.4, 30.09, 30.3, 30.2), (30.5, 30.4, 30.3, 30.25), (False, True, True)),  # gptq restores it
        ((30.4, 30.15, 30.4, 30.2), (30.5, 30.4, 30.3, 30.25), (True, False, True)),  # local training gains nothing
        ((30.4, 30.35, 30.3, 30.36), (30.5, 30.4, 30.3, 30.25), (True, True, False)),  # training is better alone
        ((30.4, 30.15, 30.3, 30.2), (30.5, 30.2, 30.3, 30.25), (True, True, False)),  # gptq is better beside inputs
    ],
)
def test_training_is_judged_by_what_is_lost(natural, monkeypatch, alone, beside, held):
    table = {
        repr(training.recipe(method, 4, inputs)): value
        for inputs, values in ((None, alone), (8, beside))
        for method, value in zip(METHODS, values, strict=True)
    }
    monkeypatch.setattr(Subject, "perplexity", lambda _, each=None: 30.0 if each is None else table[repr(each)])
    found = [measure(natural).passed for measure in (training.unrestored, training.trained, training.best)]
    assert tuple(found) == held


@pytest.mark.parametrize(("worse", "passed"), [(None, True), (2, False), (8, False)])
def test_a_rank_must_help_in_every_case(natural, monkeypatch, worse, passed):
    def with_rank(_, chosen):
        method = chosen[0]
        fails = isinstance(method, ZeroQuant) and worse is not None and worse in (method.bits, method.input_bits)
        return 31.0, 31.1 if fails else 30.9

    monkeypatch.setattr(training, "with_rank", with_rank)
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)
    assert training.compensated(natural).passed is passed


def test_training_is_asked_without_the_other_models(monkeypatch):
    monkeypatch.setattr(zeroquant_v2, "trained", lambda _: pytest.fail("the small model was trained"))
    monkeypatch.setattr(training, "lost", lambda _: dict.fromkeys(training.ROWS, dict.fromkeys(METHODS, 0.2)))
    monkeypatch.setattr(training, "with_rank", lambda *_: (31.0, 30.9))
    outcome = zeroquant_v2.run(subject="swiglu", progress=False, sizes=TINY)
    assert outcome.subjects == ["swiglu"] and [claim.passed for claim in outcome.claims] == [True, False, False, True]
