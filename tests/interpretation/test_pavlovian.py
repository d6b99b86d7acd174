"""Association: rules against loops in float64, three modes against each other, protocols, capacities, heads by hand."""

from __future__ import annotations

import math

import pytest
import torch

from actkit.interpretation.pavlovian.attention import ConditioningMemory, PavlovianAttention, features
from actkit.interpretation.pavlovian.capacity import (
    capacity_curve,
    capacity_exponent,
    heads_needed,
    reliability,
)
from actkit.interpretation.pavlovian.head_memory import head_memory
from actkit.interpretation.pavlovian.protocols import generalisation, run_protocol
from actkit.interpretation.pavlovian.rules import NAMES, Rule, State, in_chunks, recurrent
from actkit.testing import tiny_batches, tiny_model

RULES = {
    "hebb": Rule("hebb", 0.7),
    "trace": Rule("trace", 0.7, 0.9),
    "eligibility": Rule("eligibility", 0.7, trace=0.6),
    "gated": Rule("gated", 0.7),
    "delta": Rule("delta", 0.7),
    "gated_delta": Rule("gated_delta", 0.7, 0.9),
    "oja": Rule("oja", 0.1),
}


def drawn(length=11, keys=5, values=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(2, 3, length, keys, generator=draw).double() for _ in range(2))
    value = torch.randn(2, 3, length, values, generator=draw).double()
    gate = torch.rand(2, 3, length, generator=draw).double()
    return query, features(key, "l2"), value, gate


def plain(rule: Rule, query, key, value, gate):
    """One head of one batch, as the rules are written down."""
    memory = torch.zeros(key.shape[-1], value.shape[-1], dtype=torch.float64)
    trace, out = torch.zeros(key.shape[-1], dtype=torch.float64), []
    for q, k, v, m in zip(query, key, value, gate, strict=True):
        trace = rule.trace * trace + k
        if rule.name == "oja":
            memory = memory + rule.rate * m * (torch.outer(k, v) - (memory.T @ k).square().sum() * memory)
        elif rule.name in ("delta", "gated_delta"):
            eye = torch.eye(len(k), dtype=torch.float64)
            memory = rule.retention * (eye - rule.rate * m * torch.outer(k, k)) @ memory + rule.rate * m * torch.outer(
                k, v
            )
        else:
            memory = rule.retention * memory + rule.rate * m * torch.outer(trace, v)
        out.append(memory.T @ q)
    return torch.stack(out), memory


@pytest.mark.parametrize("name", NAMES)
def test_rules_are_those_written_down(name):
    rule, (query, key, value, gate) = RULES[name], drawn()
    out, _, state = recurrent(rule, query, key, value, gate, State.empty(key, value))
    for batch in range(2):
        for head in range(3):
            wanted, memory = plain(rule, query[batch, head], key[batch, head], value[batch, head], gate[batch, head])
            torch.testing.assert_close(out[batch, head], wanted, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(state.memory[batch, head], memory, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 4, 11, 99])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "oja"])
def test_chunks_of_any_size_give_the_same(name, size):
    rule, (query, key, value, gate) = RULES[name], drawn()
    _, _, start = recurrent(rule, query, key, value, gate, State.empty(key, value))  # not from nothing
    wanted = recurrent(rule, query, key, value, gate, start)
    found = in_chunks(rule, query, key, value, gate, start, size)
    for one, other in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    for field in ("memory", "trace", "total"):
        torch.testing.assert_close(getattr(found[2], field), getattr(wanted[2], field), rtol=1e-9, atol=1e-10)


def test_linear_attention_without_any_state():
    query, key, value, _ = drawn()
    out, total, _ = in_chunks(Rule(), query, key, value, None, State.empty(key, value), 4)
    weights = (query @ key.mT).tril()
    torch.testing.assert_close(out, weights @ value)
    torch.testing.assert_close(total, weights.sum(-1))


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_is_the_same_in_its_modes_goes_on_and_sees_nothing_ahead(name):
    torch.manual_seed(0)
    constants = {"rate": RULES[name].rate, "retention": RULES[name].retention, "trace": RULES[name].trace}
    layer = PavlovianAttention(12, 3, name, mode="recurrent", **constants).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    wanted = layer(x)
    first, state = layer.attend(x[:, :5])
    torch.testing.assert_close(torch.cat((first, layer.attend(x[:, 5:], state)[0]), 1), wanted)
    for mode in ("parallel", "chunk") if name != "oja" else ():
        other = PavlovianAttention(12, 3, name, mode=mode, chunk=4, **constants).double()
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(x), wanted, rtol=1e-9, atol=1e-10)
    changed = x.clone()
    changed[:, 6:] += 1
    torch.testing.assert_close(layer(changed)[:, :6], wanted[:, :6])


def test_normalised_weights_sum_to_one():
    layer = PavlovianAttention(8, 2, phi="elu1", normalise=True).double()
    torch.nn.init.zeros_(layer.value.weight)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    layer.value.register_forward_hook(lambda m, a, o: torch.ones_like(o))
    layer.output.register_forward_pre_hook(lambda m, a: (torch.testing.assert_close(a[0], torch.ones_like(a[0])), a)[1])
    layer(x)


def test_without_causality_every_token_is_tested_on_all():
    torch.manual_seed(0)
    layer = PavlovianAttention(8, 2, causal=False).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    order = torch.randperm(6)
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]))


def test_gradients_of_the_parallel_delta_rule():
    query, key, value, gate = (x[0, 0].requires_grad_() for x in drawn(6, 3, 2))

    def run(*given):
        return in_chunks(RULES["gated_delta"], *given, State.empty(key, value), 6)[0]

    assert torch.autograd.gradcheck(run, (query, key, value, gate))


# -- conditioning ------------------------------------------------------------------------------------------------------


def test_rescorla_wagner_predicts_what_is_known_of_it():
    assert run_protocol("acquisition").last("A") == pytest.approx(1, abs=0.01)
    assert run_protocol("extinction").last("A") == pytest.approx(0, abs=0.01)
    curve = run_protocol("acquisition", trials=5).responses["A"]
    assert curve == pytest.approx([1 - 0.8 ** (n + 1) for n in range(5)])
    assert run_protocol("blocking", trials=60).last("B") < 0.01
    shadowed = run_protocol("overshadowing", trials=60)
    assert shadowed.last("A") == pytest.approx(0.5, abs=1e-6) and shadowed.last("B") == pytest.approx(0.5, abs=1e-6)
    assert run_protocol("overshadowing", trials=60, salience={"A": 1.5}).last("A") > 0.6  # the stronger one wins
    assert run_protocol("inhibition", trials=200).last("B") == pytest.approx(-1, abs=0.05)
    over = run_protocol("overexpectation", trials=60)
    assert over.last("A") == pytest.approx(0.5, abs=0.01) and over.responses["A"][119] > 0.99
    assert over.trials[0] == "A+" and over.trials[-1] == "AB+"


def test_hebb_predicts_none_of_it():
    hebb = run_protocol("blocking", "hebb", trials=30)
    assert hebb.last("B") == pytest.approx(hebb.last("A") / 2)
    assert run_protocol("inhibition", "hebb").last("B") == 0
    extinct = run_protocol("extinction", "hebb")
    assert extinct.last("A") == extinct.responses["A"][29]


def test_the_response_falls_with_the_cosine():
    assert generalisation([1.0, 0.5, 0.0, -1.0]) == pytest.approx([1, 0.5, 0, -1], abs=0.01)


def test_one_pass_of_the_delta_rule_recalls_the_last_pair_alone():
    memory = ConditioningMemory(6, 3, Rule("delta", 1.0))
    draw = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(4, 6, generator=draw).double(), dim=-1)
    values = torch.randn(4, 3, generator=draw).double()
    for key, value in zip(keys, values, strict=True):
        memory.associate(key, value)
    torch.testing.assert_close(memory.probe(keys[3]), values[3])
    assert float((memory.probe(keys[0]) - values[0]).norm()) > 0.05
    memory.reset()
    assert not memory.probe(keys[3]).any()


# -- capacity ----------------------------------------------------------------------------------------------------------


def test_capacities_are_those_of_the_derivation():
    worst = capacity_curve("hebb", 64, range(1, 30), trials=100)
    assert worst.capacity() == pytest.approx(1 + math.sqrt(math.pi * 64 / 2), rel=0.05)
    mean_square = capacity_curve("hebb", 64, range(1, 40, 4), criterion="mse", trials=100)
    assert mean_square.capacity() == pytest.approx(1 + 64 / 4, rel=0.1)
    for stored, value in zip(mean_square.stored, mean_square.values, strict=True):
        assert value == pytest.approx((stored - 1) / 64, rel=0.1, abs=1e-12)


def test_orthogonal_keys_interfere_never_and_repeated_corrections_vanish():
    exact = capacity_curve("hebb", 16, [1, 8, 16], keys="orthogonal", criterion="mse", trials=3)
    assert max(exact.values) < 1e-20
    repeated = capacity_curve("delta", 16, [8], criterion="mse", passes=60, trials=5)
    once = capacity_curve("hebb", 16, [8], criterion="mse", trials=5)
    assert repeated.values[0] < 1e-4 < 0.3 < once.values[0]


def test_exponents_are_slopes():
    assert capacity_exponent([4, 16, 64], [2 * size**0.5 for size in (4, 16, 64)]) == pytest.approx(0.5)


@pytest.mark.parametrize("head_model", ["any", "majority"])
def test_reliability_by_simulation(head_model):
    draw = torch.Generator().manual_seed(0)
    right = (torch.rand(20000, 3, 5, generator=draw) >= 0.2).sum(-1)
    layers = right >= (1 if head_model == "any" else 3)
    assert reliability(0.2, 5, 3, head_model) == pytest.approx(float(layers.all(1).double().mean()), abs=0.01)


def test_so_many_heads_are_enough():
    heads = heads_needed(0.3, 12, 0.01)
    assert 1 - reliability(0.3, heads, 12) <= 0.01 < 1 - reliability(0.3, heads - 1, 12)


# -- heads of a model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_heads_by_loops_over_texts(kind):
    model, batches = tiny_model(kind), tiny_batches(kind)
    found = head_memory(model, batches, progress=False)
    captured = {}
    from actkit.core.edit.edits import ATTENTION, Configure, temporarily
    from actkit.core.watch.capture import live

    sites = [f"blocks.1.attention.{part}" for part in ("key", "value", "weights")]
    with torch.no_grad(), temporarily(model, [Configure(ATTENTION, "eager")]), live(model, sites) as seen:
        for batch in batches:
            model(**batch)
        captured = {name.rsplit(".", 1)[1]: list(seen[name]) for name in sites}
    head, load, spread, cross, cosine, first, queries, texts = 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0
    for at, batch in enumerate(batches):
        key, value, weights = (captured[part][at].double() for part in ("key", "value", "weights"))
        group = weights.shape[1] // key.shape[1]
        for row, mask in enumerate(batch["attention_mask"].bool()):
            k, v = key[row, head // group][mask], value[row, head // group]
            unit = k / k.norm(dim=1, keepdim=True)
            alike = unit @ unit.T
            spread += len(k) ** 2 / float((unit.T @ unit).square().sum())
            texts += 1
            cross += float(alike.abs().sum() - alike.diagonal().sum())
            for query in mask.nonzero().flatten():
                w = weights[row, head, query]
                load += int((w > 0).sum()) / k.shape[1]
                told, target = w @ v, v[int(w.argmax())]
                cosine += float(told @ target / told.norm() / target.norm())
                first += float(w.max())
                queries += 1
    mine = next(each for each in found.heads if (each.block, each.head) == (1, head))
    assert found.queries == queries and found.size == key.shape[-1]
    assert (mine.load, mine.dimension) == (pytest.approx(load / queries), pytest.approx(spread / texts))
    assert (mine.crosstalk, mine.first) == (pytest.approx(cross / queries), pytest.approx(first / queries))
    assert mine.fidelity == pytest.approx(cosine / queries)
    assert {each.block for each in head_memory(model, batches, blocks=(1,), progress=False).heads} == {1}
