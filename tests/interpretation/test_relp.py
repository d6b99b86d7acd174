"""RelP: effects against plain hooks and loops, rules against closed forms, and what relevance must conserve."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import actkit
from actkit.core.forward.batch import forward
from actkit.core.model.anatomy import anatomy
from actkit.core.model.sites import Site
from actkit.core.watch.capture import live
from actkit.core.watch.intervene import intervene
from actkit.data.pairs import read_pairs
from actkit.interpretation.relp.effects import exact_effects, faithfulness, patch_effects
from actkit.interpretation.relp.metrics import LogitDifference, logits_of
from actkit.interpretation.relp.rules import RelevanceRules
from actkit.testing import tiny_batches, tiny_model

BASE = {"input_ids": torch.tensor([[3, 5, 7, 11], [1, 4, 9, 16]])}
PATCH = {"input_ids": torch.tensor([[3, 6, 7, 11], [1, 4, 2, 16]])}
METRIC = LogitDifference(torch.tensor([2, 3]), torch.tensor([5, 6]))


def effects(model, **settings):
    return patch_effects(model, BASE, PATCH, METRIC, progress=False, **settings)


@pytest.mark.parametrize(("site", "path"), [("block.output", "{}"), ("mlp.output", "{}.mlp")])
def test_exact_effects_are_those_of_a_loop_over_hooks(site, path):
    model = tiny_model("gpt2")
    found = effects(model, method="exact", sites=[site], rows=3)
    for block in range(2):
        module = model.get_submodule(path.format(f"transformer.h.{block}"))
        kept: list[Tensor] = []

        def first(output):
            return output[0] if isinstance(output, tuple) else output

        handle = module.register_forward_hook(lambda m, a, o: kept.append(first(o).clone()))  # noqa: B023
        with torch.no_grad():
            forward(model, PATCH)
            handle.remove()
            before = METRIC(model(**BASE).logits)
            for position in range(4):

                def put(module, args, output):
                    value = first(output).clone()
                    value[:, position] = kept[0][:, position]  # noqa: B023
                    return (value, *output[1:]) if isinstance(output, tuple) else value

                handle = module.register_forward_hook(put)
                after = METRIC(model(**BASE).logits)
                handle.remove()
                assert float(found.values[site][block, position]) == pytest.approx(float(after - before), abs=1e-5)
    assert found.total == pytest.approx(float(METRIC(model(**PATCH).logits) - before), abs=1e-5)


def test_attribution_is_a_difference_times_the_gradient():
    model = tiny_model("gpt2").requires_grad_(True)
    found = effects(model, method="attribution", sites=["block.output"])
    kept: list[Tensor] = []

    def keep(module, args, output):
        value = output[0] if isinstance(output, tuple) else output
        if value.requires_grad:
            value.retain_grad()
        kept.append(value)

    handle = model.transformer.h[0].register_forward_hook(keep)
    METRIC(model(**BASE).logits).backward()
    with torch.no_grad():
        model(**PATCH)
    handle.remove()
    expected = ((kept[1] - kept[0].detach()) * kept[0].grad).sum((0, 2))
    torch.testing.assert_close(found.values["block.output"][0], expected, rtol=1e-4, atol=1e-6)
    frozen = tiny_model("gpt2").requires_grad_(False)
    again = effects(frozen, method="attribution", sites=["block.output"])
    torch.testing.assert_close(again.values["block.output"], found.values["block.output"])


def test_integrated_with_one_step_is_attribution_and_with_many_nears_the_effect_of_a_whole_site():
    model = tiny_model("llama")
    once = effects(model, method="integrated", steps=1)
    plain = effects(model, method="attribution")
    for site, values in plain.values.items():
        torch.testing.assert_close(once.values[site], values, rtol=1e-4, atol=1e-6)
    many = effects(model, method="integrated", steps=200, sites=["block.output"])
    torch.testing.assert_close(many.values["block.output"].sum(1), torch.full((2,), many.total), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["attribution", "relp"])
def test_heads_add_up_to_what_attention_adds(method):
    model = tiny_model("llama")
    found = effects(model, method=method, sites=["attention.mixed", "attention.output"])
    heads = found.values["attention.mixed"]
    assert heads.shape == (2, model.config.num_attention_heads, 4)
    torch.testing.assert_close(heads.sum(1), found.values["attention.output"], rtol=1e-4, atol=1e-6)


def test_exact_heads_are_patched_one_by_one():
    model = tiny_model("llama")
    found = effects(model, method="exact", sites=["attention.mixed"]).values["attention.mixed"]
    size = model.config.hidden_size // model.config.num_attention_heads
    with torch.no_grad(), live(model, "blocks.1.attention.mixed") as seen:
        model(**PATCH)
        other = seen["blocks.1.attention.mixed"][0].clone()

        def put(value, at):
            value = value.clone()
            value[:, 2, size : 2 * size] = other[:, 2, size : 2 * size]
            return value

        before = METRIC(model(**BASE).logits)
        with intervene(model, {"blocks.1.attention.mixed": put}):
            after = METRIC(model(**BASE).logits)
    assert float(found[1, 1, 2]) == pytest.approx(float(after - before), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen2_moe", "bert", "vit", "opt", "falcon"])
def test_exact_patching_that_begins_at_its_block_is_that_of_whole_passes(kind):
    model, batch = tiny_model(kind), tiny_batches(kind)[0]
    batch = {key: value for key, value in batch.items() if key != "labels"}
    other = {key: value.flip(0) if key != "attention_mask" else value for key, value in batch.items()}

    def metric(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :7].mean()

    found = patch_effects(model, batch, other, metric, method="exact", sites=["block.output"], progress=False)
    with torch.no_grad(), live(model, "blocks.1.block.output") as seen:
        forward(model, other)
        value = seen["blocks.1.block.output"][0].clone()
        before = metric(logits_of(forward(model, batch)))
        for position in (0, 3):

            def put(x, at, position=position):
                x = x.clone()
                x[:, position] = value[:, position]
                return x

            with intervene(model, {"blocks.1.block.output": put}):
                after = metric(logits_of(forward(model, batch)))
            assert float(found.values["block.output"][1, position]) == pytest.approx(float(after - before), abs=1e-5)
    assert type(anatomy(model, batch).blocks[0].module).__name__ != "_Known"


ALL = RelevanceRules(attention="stopped")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "bert", "vit", "qwen3", "olmo2", "cohere"])
@pytest.mark.parametrize("rules", [RelevanceRules(), ALL, RelevanceRules.attnlrp()])
def test_values_stay_as_they_are_to_the_bit(kind, rules):
    model, batch = tiny_model(kind), tiny_batches(kind)[0]
    view = anatomy(model, batch)

    def output() -> Tensor:
        found = forward(model, batch)
        return next(value for value in found.values() if isinstance(value, Tensor) and value.is_floating_point())

    expected = output()
    with rules.applied(view):
        assert torch.equal(output(), expected)
    assert not any(module._forward_hooks for module in model.modules())


def relevance(model, rules, depth) -> float:
    """Sum of value times relevance over the residual stream behind a block."""
    view = anatomy(model, BASE)
    site = f"blocks.{depth}.block.output"
    with rules.applied(view), live(model, site, view) as found:
        value = METRIC(model(**BASE).logits)
        (gradient,) = torch.autograd.grad(value, found[site][0])
    return float((found[site][0] * gradient).sum()), float(value)


def test_relevance_is_conserved_without_biases_and_only_with_all_rules():
    model = tiny_model("llama", num_hidden_layers=3).double()
    for depth in range(3):
        kept, value = relevance(model, ALL, depth)
        assert kept == pytest.approx(value, rel=1e-4)
    for rules in (
        RelevanceRules(products=False, attention="stopped"),
        RelevanceRules(norms=False, attention="stopped"),
        RelevanceRules(),
    ):
        kept, value = relevance(model, rules, 0)
        assert abs(kept - value) > 1e-3 * abs(value)


def test_the_rule_of_activations_is_the_gradient_of_relu_and_a_ratio_else():
    only = RelevanceRules(norms=False, products=False)
    relu = tiny_model("gpt2", activation_function="relu")
    plain, ruled = effects(relu, method="attribution"), effects(relu, rules=only)
    for site, values in plain.values.items():
        torch.testing.assert_close(ruled.values[site], values)
    model = tiny_model("gpt2")
    view = anatomy(model)
    z = torch.tensor([-3.0, -1e-9, 0.0, 1e-9, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    activation = model.transformer.h[0].mlp.act
    with only.applied(view):
        (gradient,) = torch.autograd.grad(activation(z).sum(), z)
    near = z.detach().abs() < 1e-6
    expected = torch.where(near, 0.5, activation(z.detach()) / torch.where(near, 1.0, z.detach()))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6, dtype=torch.float64), nn.RMSNorm(6, eps=1e-6, dtype=torch.float64)])
def test_the_rule_of_norms_is_linear_in_what_they_read(norm):
    """y = (x - mean) / std * w with std held: its Jacobian in closed form."""
    from actkit.core.model.parts import Norm
    from actkit.interpretation.relp.rules import _norm

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6, generator=generator) + 0.5)
    x = torch.randn(6, generator=generator, dtype=torch.float64)
    found = torch.autograd.functional.jacobian(lambda value: _norm(Norm("n", norm), norm, value, norm(value)), x)
    mean = torch.full((6, 6), 1 / 6).double() if isinstance(norm, nn.LayerNorm) else torch.zeros(6, 6).double()
    centred = x - mean @ x
    expected = norm.weight[:, None] * (torch.eye(6).double() - mean) / (centred.square().mean() + norm.eps).sqrt()
    torch.testing.assert_close(found, expected.detach())


def test_all_nodes_are_the_whole_model_and_none_are_nothing():
    model = tiny_model("gpt2")
    found = effects(model, sites=["attention.output", "mlp.output"])
    curve = faithfulness(model, BASE, METRIC, found, [0, 4, 16])
    assert curve[0] == 0 and curve[16] == pytest.approx(1, abs=1e-5)
    heads = effects(model, sites=["attention.mixed"])
    assert faithfulness(model, BASE, METRIC, heads, [heads.values["attention.mixed"].numel()]) == {
        heads.values["attention.mixed"].numel(): pytest.approx(1, abs=1e-5)
    }


def test_the_result_is_read_and_drawn():
    found = patch_effects(tiny_model("llama"), BASE, PATCH, METRIC, tokens=["a", "b", "<c>", "d"], progress=False)
    top = found.top(3)
    assert len(top) == 3 and abs(top[0].effect) >= abs(top[1].effect)
    block, position = int(top[0].site.split(".")[1]), top[0].position
    name = top[0].site.split(".", 2)[2]
    assert float(found.values[name][block, position]) == pytest.approx(top[0].effect)
    assert found.correlate(found, "mlp.output") == pytest.approx(1)
    assert found.to_dict()["blocks"]["mlp.output"] == [0, 1]
    assert found.table().row_count == 20
    assert len(found.figure().data) == 3


def test_bad_input():
    model = tiny_model("llama")
    short = {"input_ids": PATCH["input_ids"][:, :3]}
    for call, message in (
        (lambda: patch_effects(model, BASE, short, METRIC), r"patch: its inputs are \[2, 3\], and those of the base"),
        (lambda: effects(model, method="magic"), "method: 'magic' was given, allowed are exact"),
        (lambda: effects(model, method="exact", rules=ALL), "rules: they are of method 'relp'"),
        (lambda: effects(model, sites=[]), "sites: none were given"),
        (lambda: effects(model, sites=["layer.input:lm_head"]), "is no part of a block"),
        (lambda: effects(model, sites=["attention.query"]), r"nodes are at \[batch, length, channels\]"),
        (lambda: effects(model, method="exact", rows=0), "steps, rows: 10 and 0"),
        (lambda: patch_effects(model, BASE, PATCH, lambda x: x), "metric: it gave"),
        (lambda: LogitDifference(torch.ones(2), torch.ones(3)), "right, wrong"),
        (lambda: faithfulness(model, {"input_ids": IDS1}, METRIC, effects(model), [1]), "batch: 1 input was given"),
        (lambda: faithfulness(model, BASE, lambda x: x.sum() * 0, effects(model), [1]), "same with all nodes"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(actkit.ActkitError, match="multiplies its experts by the router's weights"):
        effects(tiny_model("mixtral"))


IDS1 = BASE["input_ids"][:1]


# -- by name -----------------------------------------------------------------------------------------------------------


def test_by_name_it_is_the_mean_over_all_pairs_with_the_first_nodes_patched_exactly(tmp_path):
    rows = [
        {"clean": f"If the {a} is not a", "corrupted": f"If this {a} is not a", "right": f" {a}", "wrong": " list"}
        for a in ("file", "name", "value")
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    options = {"dtype": "float32", "progress": False}
    several = actkit.analyze("swiglu", "relp:checked=3", path, batch_size=2, html=tmp_path / "relp.html", **options)
    model, tokenizer = actkit.load("swiglu", dtype=torch.float32), actkit.load_tokenizer("swiglu")
    (pairs,) = read_pairs(path, model, tokenizer, batch_size=3)
    base, patch = {"input_ids": pairs["input_ids"]}, {"input_ids": pairs["clean_input_ids"]}
    metric = LogitDifference(pairs["right"], pairs["wrong"])
    once = patch_effects(model, base, patch, metric, progress=False)
    exact = patch_effects(model, base, patch, metric, method="exact", progress=False)
    for name, values in once.values.items():
        torch.testing.assert_close(several.values[name], values, rtol=1e-4, atol=1e-5)
    for node, effect in zip(several.top(3), several.checked, strict=True):
        site = Site.parse(node.site)
        assert effect == pytest.approx(float(exact.values[site.name][site.block, node.position]), abs=1e-4)
    assert "patched exactly" in (tmp_path / "relp.html").read_text() and len(several.to_dict()["checked"]) == 3
    assert "exact" in [column.header for column in several.table().columns]


def test_heads_are_patched_exactly_one_by_one():
    model = tiny_model("llama")
    found = effects(model, sites=["attention.mixed"], method="exact")
    again = exact_effects(model, BASE, PATCH, METRIC, found.top(5), progress=False)
    assert again == pytest.approx([node.effect for node in found.top(5)], abs=1e-6)
