"""intervene: what is written at a site is what plain hooks and changed weights give, and nothing of it stays."""

from __future__ import annotations

import pytest
import torch
from tiny_models import HIDDEN, INNER, build
from torch import Tensor, nn

import actkit
from actkit.core.edit.edits import Replace, apply_edit
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.layers.known_layers import hooks_of
from actkit.core.layers.linear import ActLinear
from actkit.core.measure.decoding import choose_engine
from actkit.core.model.anatomy import anatomy
from actkit.core.watch.capture import live, opened_experts, record
from actkit.core.watch.intervene import intervene
from actkit.core.watch.statistics import Moments
from actkit.testing import tiny_batches, tiny_model

IDS = torch.tensor([[3, 5, 7, 11, 2], [1, 4, 9, 16, 25]])
BATCH = {"input_ids": IDS}
# Llama's own layout, fused layers of both layouts, rotary tables of other layouts, post-norm, images, experts.
FAMILIES = (
    "llama",
    "gpt2",
    "bert",
    "vit",
    "mixtral",
    "gpt_neox",
    "falcon",
    "phi3",
    "gpt_oss",
    "glm4",
    "cohere",
    "olmo",
)


def outputs(model: nn.Module, batch=BATCH) -> Tensor:
    return first_tensor(forward(model, batch)).detach()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_written_back_changes_nothing(kind):
    model, batch = tiny_model(kind), tiny_batches(kind)[0]
    view = anatomy(model, batch)
    expected = outputs(model, batch)
    with opened_experts(view):
        sites = [site for site in view.sites() if site.name != "attention.weights"]
    assert len({site.name for site in sites}) >= 9
    for site in sites:
        seen: list[Tensor] = []
        with intervene(model, {site: lambda x: seen.append(x) or x.clone()}, anatomy=view):  # noqa: B023
            found = outputs(model, batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{site}: {text}")  # noqa: B023
    assert seen and hooks(model) == 0


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_written_is_read_again(kind):
    """A tensor written at a site is what `live`, inside, finds there."""
    model, batch = tiny_model(kind), tiny_batches(kind)[0]
    view = anatomy(model, batch)
    with opened_experts(view):
        for site in view.sites():
            if site.name in ("attention.weights", "layer.output"):  # models change what a layer gave in place
                continue
            written: list[Tensor] = []

            def half(x: Tensor) -> Tensor:
                written.append(0.5 * x + 0.01)  # noqa: B023
                return written[-1].clone()  # noqa: B023

            with intervene(model, {site: half}, anatomy=view), live(model, site, view) as found:
                outputs(model, batch)
            assert len(written) == len(found[site])
            for mine, other in zip(written, found[site], strict=True):
                torch.testing.assert_close(other, mine.expand(other.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("site", "layer", "factor"),
    [
        ("attention.query", "self_attn.q_proj", 2.0),
        ("attention.key", "self_attn.k_proj", 0.5),
        ("attention.value", "self_attn.v_proj", -1.0),
        ("attention.output", "self_attn.o_proj", 3.0),
        ("mlp.output", "mlp.down_proj", 0.25),
    ],
)
def test_a_factor_at_a_site_is_a_factor_of_the_weight(site, layer, factor):
    model = build("llama")
    with intervene(model, {f"blocks.1.{site}": lambda x: factor * x}):
        found = outputs(model)
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{layer}").weight.mul_(factor)
    torch.testing.assert_close(found, outputs(model), rtol=1e-4, atol=1e-5)


def test_a_part_of_a_fused_layer_is_a_factor_of_its_rows():
    model = build("gpt2")
    with intervene(model, {"blocks.0.attention.key": lambda x: 2 * x}):
        found = outputs(model)
    with torch.no_grad():
        layer = model.transformer.h[0].attn.c_attn  # Conv1D: [in, out], query | key | value
        layer.weight[:, HIDDEN : 2 * HIDDEN] *= 2
        layer.bias[HIDDEN : 2 * HIDDEN] *= 2
    torch.testing.assert_close(found, outputs(model), rtol=1e-4, atol=1e-5)


def test_a_tensor_takes_the_place_of_hidden_units_as_a_hook_does():
    model, wanted = build("llama"), torch.randn(INNER)
    with intervene(model, {"blocks.2.mlp.hidden": wanted}):
        found = outputs(model)
    down = model.model.layers[2].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda m, a: (wanted.expand_as(a[0]),))
    expected = outputs(model)
    handle.remove()
    assert torch.equal(found, expected)


def test_one_expert_is_changed_as_its_weights_would_be():
    model = build("mixtral")
    with intervene(model, {"blocks.0.experts.2.mlp.output": lambda x: 0 * x}):
        found = outputs(model)
    assert "ExpertList" not in {type(module).__name__ for module in model.modules()}
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2].zero_()
    torch.testing.assert_close(found, outputs(model), rtol=1e-4, atol=1e-5)


def test_contexts_nest_and_are_undone_also_after_an_error():
    model, plain = build("llama"), outputs(build("llama"))
    seen: list[float] = []

    def add(number: float):
        def change(x: Tensor) -> Tensor:
            seen.append(number)
            return x + number

        return change

    with intervene(model, {"blocks.1.block.output": add(1.0)}):
        outer = outputs(model)
        with intervene(model, {"blocks.1.block.output": add(2.0)}):
            inner = outputs(model)
        assert torch.equal(outputs(model), outer)
    assert seen == [1.0, 1.0, 2.0, 1.0]
    with intervene(model, {"blocks.1.block.output": lambda x: (x + 1.0) + 2.0}):
        assert torch.equal(outputs(model), inner)
    with pytest.raises(ZeroDivisionError), intervene(model, {"mlp.hidden": lambda x: x / (1 // 0)}):
        outputs(model)
    assert hooks(model) == 0 and torch.equal(outputs(model), plain)


def test_patterns_and_sites_of_all_blocks():
    model, paths = build("llama"), []
    with intervene(model, {"blocks.*.mlp.output": lambda x: paths.append(1) or x}):
        outputs(model)
    assert len(paths) == model.config.num_hidden_layers
    with intervene(model, {"mlp.output": 0 * torch.ones(HIDDEN)}):
        found = outputs(model)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.zero_()
    assert torch.equal(found, outputs(model))


def test_gradients_go_through():
    model, steer = build("llama"), torch.zeros(HIDDEN, requires_grad=True)
    with intervene(model, {"blocks.1.block.output": lambda x: x + steer}):
        model(**BATCH).logits.pow(2).sum().backward()
    found = steer.grad.clone()
    kept: list[Tensor] = []

    def keep(module, args, output):
        output.retain_grad()
        kept.append(output)

    handle = model.model.layers[1].register_forward_hook(keep)
    model(**BATCH).logits.pow(2).sum().backward()
    handle.remove()
    torch.testing.assert_close(found, kept[0].grad.sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_recording_sees_what_was_written():
    model = build("llama")
    with intervene(model, {"blocks.0.mlp.hidden": torch.full((INNER,), 2.0)}):
        seen = record(model, {"blocks.0.mlp.hidden": Moments()}, [BATCH], progress=False)
    assert torch.equal(seen["blocks.0.mlp.hidden"].mean, torch.full((INNER,), 2.0, dtype=torch.float64))


def test_text_is_written_through_transformers_and_changed():
    model = build("llama")
    with intervene(model, {"blocks.2.block.output": lambda x: x.flip(-1)}):
        engine = choose_engine(model, capacity=16)
        assert engine.decoder is None and "hook" in engine.describe()
        found = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=True)
        slow = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(found, slow)
    assert choose_engine(model, capacity=16).decoder is not None


def test_a_layer_that_is_intervened_on_is_not_replaced_in_silence():
    model = build("llama")
    path = "model.layers.0.mlp.down_proj"
    with intervene(model, {"blocks.0.mlp.hidden": lambda x: x}):
        layer = model.get_submodule(path)
        assert len(hooks_of(layer)) == 1
        with pytest.raises(actkit.ActkitError, match="hook"):
            apply_edit(model, Replace(path, ActLinear.of(anatomy(model).block(0).linears()[-1])))
    with record_nothing(model):
        assert hooks_of(model.get_submodule(path)) == []


def record_nothing(model):
    return live(model, "mlp.hidden")


def test_bad_input():
    model = build("llama")
    for change, message in (
        (lambda x: x[:, :2], r"\[2, 2, 32\] was given for blocks.0.mlp.hidden, which is \[2, 5, 32\] here"),
        (torch.ones(3), r"\[3\] was given for blocks.0.mlp.hidden"),
        (lambda x: None, "the function for blocks.0.mlp.hidden returned a NoneType; return a tensor"),
    ):
        with intervene(model, {"blocks.0.mlp.hidden": change}), pytest.raises(ValueError, match=message):
            outputs(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"attention.weights can only be read"):
        with intervene(model, {"attention.weights": lambda x: x}):
            pass
    with pytest.raises(ValueError, match="site: "):
        with intervene(model, {"blocks.9.mlp.hidden": lambda x: x}):
            pass
    assert hooks(model) == 0
