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
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.watch.capture import live, opened_experts, record
from actkit.core.watch.intervene import At, intervene
from actkit.core.watch.passes import Passes
from actkit.core.watch.site_changes import Add, Detach, Put, Scale, Zero
from actkit.core.watch.statistics import Moments
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.models import ARCHITECTURES

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


def sites_of(view, *, scores: bool = True) -> list[Site]:
    """Every site of a model once, the scores of its attentions too."""
    with opened_experts(view):
        sites = list(view.sites())
        taps = view.taps(view.canonical(site) for site in sites)
        once = {taps[view.canonical(site)]: site for site in reversed(sites)}
    never = "conv.conv"  # of which LFM2 reads the weight, and does not call it
    left_out = ("attention.scores", "attention.weights")
    found = [site for site in once.values() if site.name not in left_out and not str(site.path).endswith(never)]
    if scores and computes_by_name(view.model):
        found += [site for block in view.blocks for site in block.taps if site.name == "attention.scores"]
    return found


def computes_by_name(model) -> bool:
    """Whether the model calls transformers' attention functions, and its weights are the softmax of its scores."""
    return model._can_set_attn_implementation() and model.config.model_type != "gpt_oss"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_changes_nothing_leaves_the_output_to_the_bit(kind):
    model, batch = tiny_model(kind), tiny_batches(kind)[0]
    view = anatomy(model, batch)
    sites = sites_of(view)
    with opened_experts(view):  # which sum in another order than closed ones
        expected = outputs(model, batch)
        for change in (lambda x, at: x.clone(), lambda x, at: None, Scale(1.0)):
            with intervene(model, dict.fromkeys(sites, change), anatomy=view):
                assert torch.equal(outputs(model, batch), expected)
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_site_has_the_gradient_of_finite_differences(kind):
    """Along one random direction for each site of the last block, in float64."""
    wide = {"clip_qkv": 1e3} if kind == "olmo" else {}  # no gradient at the bounds of a range
    model, batch = tiny_model(kind, **wide).double(), dict(tiny_batches(kind)[0])
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    batch.pop("attention_mask", None)
    view = anatomy(model, batch)
    sites = [site for site in sites_of(view) if site.block == 1]
    if view.blocks[1].experts is not None:  # what stands before the router may change its choice
        sites = [site for site in sites if site.expert is not None or site.name in ("mlp.output", "block.output")]
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        found = first_tensor(forward(model, batch))
        return (found * torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)).sum()

    with opened_experts(view):
        with live(model, sites, anatomy=view) as found:
            tensors = {}
            value = loss()
            for site in sites:
                if len(found[site]) == 1 and found[site][0].requires_grad:  # not an expert without tokens, nor an image
                    tensors[site] = found[site][0]
            given = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
        assert len(tensors) >= 6, list(tensors)
        for (site, tensor), gradient in zip(tensors.items(), given, strict=True):
            if gradient is None and site.name == "layer.output":  # changed in place afterwards
                continue
            direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            at_step: dict[int, float] = {}
            for steps in (-2, -1, 1, 2):  # wide, as norms and rotary tables are computed in float32
                added = 1e-3 * steps * direction
                with torch.no_grad(), intervene(model, {site: lambda x, at: x + added}):  # noqa: B023
                    at_step[steps] = float(loss())
            slope = (8 * (at_step[1] - at_step[-1]) - (at_step[2] - at_step[-2])) / (12 * 1e-3)
            assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-2, abs=1e-2), site


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_written_is_read_again(kind):
    """A tensor written at a site is what `live`, inside, finds there."""
    model, batch = tiny_model(kind), tiny_batches(kind)[0]
    view = anatomy(model, batch)
    with opened_experts(view):
        for site in view.sites():
            if site.name in ("attention.weights", "attention.scores", "layer.output"):
                continue  # models change what a layer gave in place
            written: list[Tensor] = []

            def half(x: Tensor, at: At) -> Tensor:
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
    with intervene(model, {f"blocks.1.{site}": lambda x, at: factor * x}):
        found = outputs(model)
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{layer}").weight.mul_(factor)
    torch.testing.assert_close(found, outputs(model), rtol=1e-4, atol=1e-5)


def test_a_part_of_a_fused_layer_is_a_factor_of_its_rows():
    model = build("gpt2")
    with intervene(model, {"blocks.0.attention.key": lambda x, at: 2 * x}):
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
    with intervene(model, {"blocks.0.experts.2.mlp.output": lambda x, at: 0 * x}):
        found = outputs(model)
    assert "ExpertList" not in {type(module).__name__ for module in model.modules()}
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2].zero_()
    torch.testing.assert_close(found, outputs(model), rtol=1e-4, atol=1e-5)


def test_contexts_nest_and_are_undone_also_after_an_error():
    model, plain = build("llama"), outputs(build("llama"))
    seen: list[float] = []

    def add(number: float):
        def change(x: Tensor, at: At) -> Tensor:
            seen.append(number)
            return x + number

        return change

    with intervene(model, {"blocks.1.block.output": add(1.0)}):
        outer = outputs(model)
        with intervene(model, {"blocks.1.block.output": add(2.0)}):
            inner = outputs(model)
        assert torch.equal(outputs(model), outer)
    assert seen == [1.0, 1.0, 2.0, 1.0]
    with intervene(model, {"blocks.1.block.output": lambda x, at: (x + 1.0) + 2.0}):
        assert torch.equal(outputs(model), inner)
    with pytest.raises(ZeroDivisionError), intervene(model, {"mlp.hidden": lambda x, at: x / (1 // 0)}):
        outputs(model)
    assert hooks(model) == 0 and torch.equal(outputs(model), plain)


def test_patterns_and_sites_of_all_blocks():
    model, paths = build("llama"), []
    with intervene(model, {"blocks.*.mlp.output": lambda x, at: paths.append(1) or x}):
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
    with intervene(model, {"blocks.1.block.output": lambda x, at: x + steer}):
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
    with intervene(model, {"blocks.2.block.output": lambda x, at: x.flip(-1)}):
        engine = choose_engine(model, capacity=16)
        assert engine.decoder is None and "hook" in engine.describe()
        found = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=True)
        slow = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(found, slow)
    assert choose_engine(model, capacity=16).decoder is not None


def test_a_layer_that_is_intervened_on_is_not_replaced_in_silence():
    model = build("llama")
    path = "model.layers.0.mlp.down_proj"
    with intervene(model, {"blocks.0.mlp.hidden": lambda x, at: x}):
        layer = model.get_submodule(path)
        assert len(hooks_of(layer)) == 1
        with pytest.raises(actkit.ActkitError, match="hook"):
            apply_edit(model, Replace(path, ActLinear.of(anatomy(model).block(0).linears()[-1])))
    with record_nothing(model):
        assert hooks_of(model.get_submodule(path)) == []


def record_nothing(model):
    return live(model, "mlp.hidden")


def generated(model, ids, mask=None, **settings) -> Tensor:
    return model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, **settings)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("site", ["blocks.0.block.output", "blocks.1.attention.query", "blocks.1.mlp.hidden"])
@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last", [0, 2, 5], [-1, -3]])
def test_text_is_the_same_with_a_cache_without_one_and_behind_padding(kind, site, positions):
    model = tiny_model(kind, pad_token_id=0)
    change = Scale(-3.0, positions=positions)
    with intervene(model, {site: change}):
        alone = generated(model, IDS[:1])
        assert torch.equal(generated(model, IDS[:1], use_cache=False), alone)
        padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), IDS[:1]), 1)
        mask = (padded != 0).long()
        assert torch.equal(generated(model, padded, mask)[:, 3:], alone)
    if positions == "prompt" and "query" not in site:
        assert not torch.equal(generated(model, IDS[:1]), alone)


def test_positions_are_those_that_a_plain_pass_names():
    model = build("llama")
    padded = torch.tensor([[0, 0, 3, 5, 7], [1, 4, 9, 16, 25]])
    batch = {"input_ids": padded, "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}
    prompt_mask = torch.tensor([[False, False, True, False, True], [False, True, False, False, False]])
    wanted = {
        "all": torch.ones(2, 5, dtype=torch.bool),
        "prompt": batch["attention_mask"].bool(),
        "generated": torch.zeros(2, 5, dtype=torch.bool),
        "last": torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]).bool(),
        (0, 3): torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 1, 0]]).bool(),
        (-1, -4): torch.tensor([[0, 0, 0, 0, 1], [0, 1, 0, 0, 1]]).bool(),
        prompt_mask: prompt_mask,
    }
    for positions, expected in wanted.items():
        with intervene(model, {"blocks.1.block.output": Put(torch.full((HIDDEN,), 7.0), positions=positions)}):
            with live(model, "blocks.1.block.output") as found:
                outputs(model, batch)
        assert torch.equal((found["blocks.1.block.output"][0] == 7).all(-1), expected)
    right = {"input_ids": padded.flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    with intervene(model, {"blocks.1.block.output": Zero(positions="last")}):
        with live(model, "blocks.1.block.output") as found:
            outputs(model, right)
    assert torch.equal((found["blocks.1.block.output"][0] == 0).all(-1).nonzero(), torch.tensor([[0, 2], [1, 4]]))


def test_rows_have_their_own_factors_also_inside_experts():
    model, steer = build("mixtral"), torch.linspace(-1, 1, HIDDEN)
    for site in ("blocks.0.block.output", "blocks.0.experts.1.mlp.output"):
        single = []
        for row, factor in ((0, 2.0), (1, -0.5)):
            with intervene(model, {site: Add(steer, factor=factor)}):
                single.append(outputs(model, {"input_ids": IDS[row : row + 1]}))
        with intervene(model, {site: Add(steer, factor=torch.tensor([2.0, -0.5]))}):
            together = outputs(model)
        torch.testing.assert_close(together, torch.cat(single), rtol=1e-4, atol=1e-5)


def test_heads_are_those_of_the_weight():
    model, size = build("llama"), HIDDEN // 4
    assert model.config.num_attention_heads == 4
    for site in ("blocks.0.attention.mixed", "blocks.0.attention.weights"):
        model.set_attn_implementation("eager")
        with intervene(model, {site: Zero(heads=[1, 3])}):
            found = outputs(model)
        with torch.no_grad():
            weight = model.model.layers[0].self_attn.o_proj.weight
            kept = weight.clone()
            weight[:, size : 2 * size] = 0
            weight[:, 3 * size :] = 0
            torch.testing.assert_close(found, outputs(model), rtol=1e-4, atol=1e-5)
            weight.copy_(kept)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bert", "vit"])
def test_scores_are_what_weights_are_the_softmax_of(kind, implementation):
    """A written score of all keys but a query's own makes it read that one: its value is what is mixed."""
    model, batch = tiny_model(kind), tiny_batches(kind)[0]
    if kind == "gemma2" and implementation == "sdpa":
        pytest.skip("its scores are capped, which sdpa does not compute")
    model.set_attn_implementation(implementation)
    view = anatomy(model, batch)

    def only_own(x: Tensor, at: At) -> Tensor:
        return torch.where(torch.eye(x.shape[-1]).bool(), 0.0, -1e4).expand(x.shape).to(x.dtype)

    names = [f"blocks.0.attention.{name}" for name in ("value", "mixed")]
    with intervene(model, {"blocks.0.attention.scores": only_own}, anatomy=view), live(model, names, view) as found:
        outputs(model, {key: value for key, value in batch.items() if key != "attention_mask"})
    value, mixed = (found[name][0] for name in names)
    heads = view.blocks[0].attention.heads
    expected = value.repeat_interleave(heads // value.shape[1], 1).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, expected.expand(mixed.shape), rtol=1e-4, atol=1e-5)
    with live(model, "attention.scores", view) as found:
        outputs(model, batch)
    assert len(found["blocks.1.attention.scores"]) == 1
    if implementation == "eager":
        with live(model, ["attention.scores", "attention.weights"], view) as found:
            outputs(model, {key: value for key, value in batch.items() if key != "attention_mask"})
        scores, weights = (found[f"blocks.0.attention.{name}"][0] for name in ("scores", "weights"))
        hidden = weights == 0
        expected = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


def test_weights_have_the_gradient_of_finite_differences():
    model, site = build("llama").double(), "blocks.1.attention.weights"
    model.set_attn_implementation("eager")
    with live(model, site) as found:
        value = model(**BATCH).logits.pow(2).sum()
        (gradient,) = torch.autograd.grad(value, found[site])
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).double()
    ends = []
    for sign in (1, -1):
        with torch.no_grad(), intervene(model, {site: lambda x, at: x + sign * 1e-3 * direction}):  # noqa: B023
            ends.append(float(model(**BATCH).logits.pow(2).sum()))
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2)


def test_scores_are_recorded_also_where_sdpa_forms_none():
    model = build("llama")
    batch = {"input_ids": IDS}
    seen = record(model, {"attention.scores": Moments()}, [batch], progress=False)
    assert len(seen) == model.config.num_hidden_layers
    assert not any("attention.scores" in str(site) for site in anatomy(model).sites())


def test_middle_is_the_sum_of_the_stream_and_attention():
    """For every architecture that has it and scales nothing; what is added there is added to both that read it."""
    for kind in ARCHITECTURES:
        model, batch = tiny_model(kind), tiny_batches(kind)[0]
        view = anatomy(model, batch)
        names = [f"blocks.1.{name}" for name in ("block.input", "attention.output", "block.middle")]
        if not all(Site.parse(name) in view.sites() for name in names) or kind in ("granite", "bert", "roberta"):
            continue
        with live(model, names, view) as found:
            outputs(model, batch)
        x, attention, middle = (found[name][0] for name in names)
        torch.testing.assert_close(x + attention.reshape(x.shape), middle.reshape(x.shape), rtol=1e-5, atol=1e-5)
        added = torch.linspace(-1, 1, x.shape[-1])
        with intervene(model, {"blocks.1.attention.output": Add(added)}):
            expected = outputs(model, batch)
        with intervene(model, {"blocks.1.block.middle": Add(added)}):
            torch.testing.assert_close(outputs(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_side_by_side_there_is_no_middle():
    for kind, changes in (("gpt_neox", {}), ("cohere", {}), ("falcon", {}), ("phi", {})):
        assert "block.middle" not in {site.name for site in anatomy(tiny_model(kind, **changes)).sites()}, kind
    after = tiny_model("gpt_neox", use_parallel_residual=False)
    assert "block.middle" in {site.name for site in anatomy(after).sites()}


def test_names_of_transformer_lens():
    model = build("llama")
    for theirs, ours in (
        ("blocks.1.hook_resid_pre", "blocks.1.block.input"),
        ("hook_resid_mid", "block.middle"),
        ("blocks.0.attn.hook_z", "blocks.0.attention.mixed"),
        ("blocks.0.mlp.hook_post", "blocks.0.mlp.hidden"),
    ):
        assert Site.parse(theirs) == Site.parse(ours)
    with intervene(model, {"blocks.*.hook_mlp_out": Zero()}):
        found = outputs(model)
    with intervene(model, {"mlp.output": Zero()}):
        assert torch.equal(found, outputs(model))
    for name, message in (
        ("blocks.0.ln1.hook_normalized", "before the norm's weight"),
        ("attn.hook_q", "before the rotary embedding"),
        ("hook_embed", "of TransformerLens' names"),
    ):
        with pytest.raises(ValueError, match=message):
            Site.parse(name)


def test_the_order_of_naming_does_not_matter():
    model = build("gpt2")
    changes = {
        "blocks.0.attention.query": Scale(2.0),
        "layer.output:transformer.h.0.attn.c_attn": Add(torch.ones(3 * HIDDEN)),
        "blocks.0.attention.value": Zero(),
        "blocks.0.block.middle": Scale(0.5),
        "blocks.0.block.output": Scale(3.0),
        "blocks.1.block.input": Add(torch.ones(HIDDEN)),
    }
    with intervene(model, changes):
        expected = outputs(model)
    with intervene(model, dict(reversed(changes.items()))):
        assert torch.equal(outputs(model), expected)


def test_a_change_asks_for_other_sites_and_for_where_it_stands():
    model, phases = build("llama"), []

    def patch(x: Tensor, at: At) -> Tensor:
        phases.append((at.phase, at.positions[0].tolist(), at.mask.all().item()))
        return at["blocks.0.block.output"]

    with intervene(model, {"blocks.2.block.output": patch}, reads=["blocks.0.block.output"]):
        with live(model, ["blocks.0.block.output", "blocks.2.block.output"]) as found:
            outputs(model)
    assert torch.equal(found["blocks.0.block.output"][0], found["blocks.2.block.output"][0])
    assert phases == [("prompt", [0, 1, 2, 3, 4], True)]
    late = intervene(model, {"blocks.0.block.output": lambda x, at: at["blocks.2.mlp.output"]}, reads=["mlp.output"])
    with late, pytest.raises(ValueError, match=r"blocks.2.mlp.output was not read before blocks.0.block.output"):
        outputs(model)
    with intervene(model, {"blocks.1.block.output": lambda x, at: phases.append((at.phase, at.positions[0].tolist()))}):
        phases.clear()
        generated(model, IDS[:1])
    assert phases[:2] == [("prompt", [0, 1, 2, 3, 4]), ("generated", [5])]


def test_gradients_are_cut_off():
    model = build("llama")
    model.requires_grad_(True)
    with intervene(model, {"blocks.1.block.output": Detach()}):
        model(**BATCH).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is None
    assert model.model.layers[2].mlp.up_proj.weight.grad is not None


def test_a_text_that_nobody_reads_to_its_end_leaves_nothing():
    model = build("llama")
    plain = outputs(model)

    def passes():
        with intervene(model, {"blocks.1.block.output": Zero(), "blocks.0.attention.scores": Zero()}):
            for _ in range(9):
                yield outputs(model)

    reading = passes()
    changed = next(reading)
    assert not torch.equal(changed, plain)
    reading.close()
    assert torch.equal(outputs(model), plain) and hooks(model) == 0
    assert model.config._attn_implementation == "sdpa"


def test_a_new_text_begins_with_a_prompt():
    passes = Passes(build("llama"))
    for tokens, prompt in (([3, 5], 2), ([3, 5, 7], 2), ([3, 5, 7, 9], 2), ([3, 5, 7], 3), ([4, 5, 7, 1], 4)):
        passes.begin(None, (), {"input_ids": torch.tensor([tokens])})
        assert passes.now.prompt == prompt


def test_bad_input():
    model = build("llama")
    for change, message in (
        (lambda x, at: x[:, :2], r"\[2, 2, 32\] was given for blocks.0.mlp.hidden, which is \[2, 5, 32\] here"),
        (torch.ones(3), r"\[3\] was given for blocks.0.mlp.hidden"),
        (lambda x, at: 3, "the function for blocks.0.mlp.hidden returned a int; return a tensor or None"),
        (lambda x, at: x.half(), r"returned torch.float16 on cpu, and torch.float32"),
        (lambda x, at: x.mul_(2), "wrote into the tensor that it was given; return a new one"),
        (Add(torch.ones(3)), r"\[3\] was given for blocks.0.mlp.hidden"),
        (Scale(torch.ones(3)), r"factor: \[3\] was given for blocks.0.mlp.hidden"),
        (Zero(heads=[0]), "heads: blocks.0.mlp.hidden has none"),
        (Zero(positions=torch.ones(2, 3).bool()), r"the mask is \[2, 3\], and the prompt \[2, 5\]"),
    ):
        with intervene(model, {"blocks.0.mlp.hidden": change}), pytest.raises(ValueError, match=message):
            outputs(model)
    with intervene(model, {"mlp.hidden": lambda x, at: x / 0}), pytest.raises(actkit.ActkitError, match="NaN or Inf"):
        outputs(model)
    for change, message in ((lambda x: x, "does not take two arguments"), (3, "changes: a int was given")):
        with pytest.raises(ValueError, match=message), intervene(model, {"mlp.hidden": change}):
            pass
    with pytest.raises(ValueError, match="positions: 'first' was given, allowed are all, prompt"):
        Zero(positions="first")
    with pytest.raises(ValueError, match=r"attention.weights is not formed by the attention implementation 'sdpa'"):
        with intervene(model, {"attention.weights": lambda x, at: x}):
            pass
    with pytest.raises(ValueError, match="name one tensor, and two changes were given"):
        with intervene(
            model, {"blocks.0.attention.input": Zero(), "layer.input:model.layers.0.self_attn.v_proj": Zero()}
        ):
            pass
    with pytest.raises(ValueError, match=r"blocks.1.mlp.hidden did not come by in any pass"):
        with intervene(model, {"blocks.1.mlp.hidden": Zero()}):
            model.model.layers[1].forward, kept = (lambda x, **_: x), model.model.layers[1].forward
            outputs(model)
    model.model.layers[1].forward = kept
    for kind, message in (("gpt_oss", "has sinks"), ("falcon", "computes attention by itself")):
        other = tiny_model(kind)
        with pytest.raises(actkit.ActkitError, match=message):
            with intervene(other, {"attention.scores": Zero()}):
                outputs(other, tiny_batches(kind)[0])
    cnn_like, images = tiny_model("vit"), tiny_batches("vit")[0]
    with (
        intervene(cnn_like, {"mlp.hidden": Zero(positions="last")}),
        pytest.raises(ValueError, match="was not given tokens"),
    ):
        outputs(cnn_like, images)
    with pytest.raises(ValueError, match="site: "):
        with intervene(model, {"blocks.9.mlp.hidden": lambda x, at: x}):
            pass
    assert hooks(model) == 0
