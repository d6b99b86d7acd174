"""AWQ against its steps written out again in the test: scale search, folding, clip search, order and data flow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.edit.edits import temporarily
from actkit.core.edit.folding import fold
from actkit.core.forward.batch import BatchContext
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import NonFiniteError, RecipeError
from actkit.core.layers.folding import ScaledActivation
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import Linear, anatomy, equalization_sets
from actkit.core.recipe.runner import apply
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.store.checkpoint import load, save
from actkit.core.watch.calls import Call
from actkit.quantization.awq import (
    FINALISTS,
    Awq,
    clamp_groups,
    saliency_mask,
    search_clip,
    search_scale,
)
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.wina.wina import Wina
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.transforms import close, equal, outputs

LONG = ((12, 9, 12), (10, 12))


# -- the sheet's steps, in plain torch ---------------------------------------------------------------------------------


def quantize(w: Tensor, bits: int, size: int) -> Tensor:
    """Step 1 as in the release, asymmetric: zero is not forced into the range."""
    groups = w.reshape(w.shape[0], -1, size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / (2**bits - 1)
    zero = (-torch.round(low / scale)).clamp(0, 2**bits - 1)
    return (((torch.round(groups / scale) + zero).clamp(0, 2**bits - 1) - zero) * scale).reshape(w.shape)


def search(m: Tensor, weights: list[Tensor], loss_of: Any, bits: int, size: int, n: int = 20) -> Any:
    """Steps 2 and 3: (scale, ratio, losses). loss_of(list of weights) runs the inspected module."""
    best, losses = None, []
    for i in range(n):
        r = i / n
        s = m.pow(r).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        loss = loss_of([quantize(w * s, bits, size) / s for w in weights])
        losses.append(loss)
        if best is None or loss < best[2]:
            best = (s, r, loss)
    return best[0], best[1], losses


def clip_by_hand(w: Tensor, x: Tensor, bits: int, size: int) -> Tensor:
    """Step 6, one row and one group at a time: the bounds [out, groups]."""
    bounds = torch.zeros(w.shape[0], w.shape[1] // size)
    for r in range(w.shape[0]):
        for g in range(bounds.shape[1]):
            part, columns = w[r, g * size : (g + 1) * size], x[:, g * size : (g + 1) * size]
            errors = {}
            for i in range(10):
                bound = part.abs().max() * (1 - i / 20)  # float32: clipped on both sides, the zero is on a border
                rounded = quantize(part.clamp(-bound, bound)[None], bits, size)[0]
                errors[i] = float((columns @ rounded - columns @ part).square().mean())
            best = min(range(10), key=lambda i: errors[i])
            bounds[r, g] = part.abs().max() * (1 - best / 20)
    return bounds


def call(x: Tensor, mask: Tensor | None = None) -> Call:
    context = BatchContext(len(x), x.shape[1], mask, torch.zeros(x.shape[:2]), torch.zeros(x.shape[:2]))
    return Call((x,), {}, context)


class Inspected(nn.Module):
    """Two layers that share an input, and something nonlinear after them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def salient(tokens: int = 40, seed: int = 1) -> Tensor:
    x = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 20
    return x


# -- the search of the scale -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
def test_scale_search_follows_the_sheet(bits: int) -> None:
    module, x = Inspected(), salient()
    consumers = (Linear("gate", "gate", module.gate), Linear("up", "up", module.up))
    m = x.abs().mean((0, 1))
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        target = module(x)

        def loss_of(weights: list[Tensor]) -> float:
            changed = copy.deepcopy(module)
            changed.gate.weight.copy_(weights[0])
            changed.up.weight.copy_(weights[1])
            return float((changed(x) - target).square().mean())

        scale, ratio, losses = search(m, [module.gate.weight, module.up.weight], loss_of, bits, 8)
    # the same tokens in two calls of unequal length: errors are means over tokens, not over calls
    calls = [call(x[:, :30]), call(x[:, 30:])]
    found = search_scale(
        module, consumers, calls, m, Awq(bits=bits, group_size=8, convention="llm-awq", scale_dtype="float32")
    )
    assert found[1] == ratio > 0
    torch.testing.assert_close(found[0], scale)
    assert list(found[2].values()) == pytest.approx(losses, rel=1e-4)
    assert len(losses) == 20 and found[1] <= 0.95  # r = 1 is never tried
    equal(list(module.state_dict().values()), list(before.values()), "weights after the search")


def test_the_first_of_equal_losses_wins() -> None:
    module = Inspected()
    for layer in (module.gate, module.up):
        nn.init.zeros_(layer.weight)  # every ratio is exact
    found = search_scale(
        module,
        (Linear("up", "up", module.up),),
        [call(salient())],
        torch.rand(16),
        Awq(group_size=8, convention="llm-awq", scale_dtype="float32"),
    )
    assert found[1] == 0.0
    assert torch.equal(found[0], torch.ones(16))


def test_padded_tokens_do_not_count() -> None:
    module, x = Inspected(), salient()
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 25:] = False
    wild = x.clone()
    wild[~mask] = 1e3
    consumers, settings = (
        (Linear("up", "up", module.up),),
        Awq(bits=3, group_size=8, convention="llm-awq", scale_dtype="float32"),
    )
    m = x[mask].abs().mean(0)
    found = search_scale(module, consumers, [call(wild, mask)], m, settings)
    rows = search_scale(module, consumers, [call(x[mask][None])], m, settings)
    assert found[1] == rows[1]
    assert list(found[2].values()) == pytest.approx(list(rows[2].values()), rel=1e-5)


def test_duo_scaling_follows_the_sheet() -> None:
    module, x = Inspected(), salient()
    w, m = module.up.weight.detach(), x.abs().mean((0, 1))
    groups = w.abs().reshape(24, 2, 8)
    relative = (groups / groups.amax(-1, keepdim=True)).reshape(24, 16).mean(0)
    grid = [torch.ones(16)]
    for i in range(19):
        s = (m.pow(i / 18) / (relative.pow(1 - i / 18) + 1e-4)).clamp(min=1e-4)
        grid.append(s / (s.max() * s.min()).sqrt())
    with torch.no_grad():
        layer = copy.deepcopy(module)
        target, losses = module(x), []
        for s in grid:
            layer.up.weight.copy_(quantize(w * s, 3, 8) / s)
            losses.append(float((layer(x) - target).square().mean()))
    settings = Awq(bits=3, group_size=8, convention="llm-awq", scale_dtype="float32", duo_scaling=True)
    scale, _, found = search_scale(module, (Linear("up", "up", module.up),), [call(x)], m, settings)
    assert list(found.values()) == pytest.approx(losses, rel=1e-3)
    torch.testing.assert_close(scale, grid[losses.index(min(losses))], rtol=1e-4, atol=1e-5)


def test_a_search_without_a_finite_error_is_an_error_and_restores() -> None:
    module = Inspected()
    before = module.up.weight.detach().clone()
    settings = Awq(group_size=8)
    with pytest.raises(NonFiniteError, match="up: every ratio gives a NaN or Inf error"):
        search_scale(
            module, (Linear("up", "up", module.up),), [call(salient() * float("nan"))], torch.rand(16), settings
        )
    assert torch.equal(module.up.weight, before)


# -- folding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama without groups", "gemma", "gpt2", "bert", "vit", "mixtral"])
def test_folding_any_scale_keeps_the_function(kind: str) -> None:
    """Random scales through every set that is not refused, in float64; which are refused is the sheet's list."""
    family = kind.split()[0]
    changes = {"num_key_value_heads": 4} if kind == "llama without groups" else {}
    model = tiny_model(family, **changes).double()
    if family == "mixtral":
        model.set_experts_implementation("eager")
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in tiny_batches(family)]
    before = outputs(model, batches)
    generator = torch.Generator().manual_seed(3)
    folded, refused = [], []

    class Folding(Transform):
        """Only the fold of AWQ, with scales of its own."""

        tags = Tags()

        @property
        def name(self) -> str:
            return "folding"

        def edit(self, block: Any, seen: Any) -> Any:
            for group in equalization_sets(block):
                names = "+".join(linear.role for linear in group.consumers[:3])
                if group.refused:
                    refused.append(names)
                    continue
                folded.append(names)
                width = group.consumers[0].in_features
                scale = group.tied(torch.exp(torch.randn(width, generator=generator)))
                yield from fold(block, group, scale)

    apply(model, Folding(), progress=False)
    bound = 1e-9 if family != "gemma" else 1e-5  # its norm computes in float32, the weight included
    for a, b in zip(outputs(model, batches), before, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < bound
    expected = {
        "llama": ({"query+key+value", "output", "gate+up", "down"}, set()),
        "llama without groups": ({"query+key+value", "output", "gate+up", "down"}, set()),
        "gemma": ({"query+key+value", "output", "gate+up", "down"}, set()),
        "gpt2": ({"query_key_value", "output", "up", "down"}, set()),
        "bert": ({"output", "down"}, {"query+key+value", "up"}),
        "vit": ({"query+key+value", "output", "up", "down"}, set()),
        "mixtral": ({"query+key+value", "output", "gate+up+gate", "down"}, set()),
    }[kind]
    assert (set(folded), set(refused)) == expected
    activations = sum(isinstance(module, ScaledActivation) for module in model.modules())
    assert activations == (2 if family in ("gpt2", "bert", "vit") else 0)


def test_only_the_value_rows_of_a_fused_layer_are_divided() -> None:
    model = tiny_model("gpt2")
    block = anatomy(model).blocks[0]
    group = next(group for group in equalization_sets(block) if group.consumers[0].role == "output")
    scale = torch.rand(16) + 0.5
    before, bias = (
        block.attention.query_key_value.weight.detach().clone(),
        model.transformer.h[0].attn.c_attn.bias.clone(),
    )
    output = block.attention.output.weight.detach().clone()
    with temporarily(model, fold(block, group, scale)):
        after = block.attention.query_key_value.weight
        assert torch.equal(after[:32], before[:32])
        torch.testing.assert_close(after[32:], before[32:] / scale[:, None])
        torch.testing.assert_close(model.transformer.h[0].attn.c_attn.bias[32:], bias[32:] / scale)
        torch.testing.assert_close(block.attention.output.weight, output * scale)


def test_a_norm_with_an_offset_keeps_it() -> None:
    model = tiny_model("gemma")
    block = anatomy(model).blocks[0]
    scale, weight = torch.rand(16) + 0.5, model.model.layers[0].input_layernorm.weight.detach().clone()
    with temporarily(model, fold(block, equalization_sets(block)[0], scale)):
        torch.testing.assert_close(model.model.layers[0].input_layernorm.weight, (1 + weight) / scale - 1)


# -- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
def test_clip_search_is_brute_force_over_rows_and_groups(bits: int) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(6, 24, generator=generator), torch.randn(50, 24, generator=generator)
    bound = search_clip(weight, x, IntegerGrid(bits, 8, convention="llm-awq"))
    assert bound.shape == (6, 3, 1)
    torch.testing.assert_close(bound[..., 0], clip_by_hand(weight, x, bits, 8))
    assert len({round(float(v), 3) for v in (bound[..., 0] / weight.abs().reshape(6, 3, 8).amax(-1)).flatten()}) > 2
    clipped = clamp_groups(weight, bound)
    for r in range(6):
        for g in range(3):
            part, limit = weight[r, g * 8 : g * 8 + 8], float(bound[r, g])
            assert torch.equal(clipped[r, g * 8 : g * 8 + 8], part.clamp(-limit, limit))


# -- the whole method --------------------------------------------------------------------------------------------------


def record(model: nn.Module, path: str, batches: list[Any]) -> list[Any]:
    """Calls of a module in plain passes over the whole model: (args, kwargs, mask)."""
    found: list[Any] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args, kwargs: found.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    handle.remove()
    return [(*found[i], batch["attention_mask"].bool()) for i, batch in enumerate(batches)]


def awq_by_hand(model: Any, batches: list[Any], index: int, bits: int, size: int) -> dict[str, Tensor]:
    """The whole method on one llama block with grouped queries, in plain torch: path -> quantized weight."""
    original, block = copy.deepcopy(model), model.model.layers[index]
    path = f"model.layers.{index}"

    def real(name: str, of: nn.Module) -> Tensor:
        return torch.cat(
            [(args or (kwargs["hidden_states"],))[0][mask] for args, kwargs, mask in record(of, name, batches)]
        )

    means = {name: real(f"{path}.{name}", original).abs().mean(0)
             for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")}  # fmt: skip
    sets = [
        ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn"),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"], "mlp"),
        ("mlp.up_proj", ["mlp.down_proj"], "mlp.down_proj"),
    ]
    with torch.no_grad():
        for producer, names, inspect in sets:
            module = block.get_submodule(inspect)
            calls = record(model, f"{path}.{inspect}", batches)

            def run(calls: Any = calls, module: nn.Module = module) -> Tensor:
                rows = []
                for args, kwargs, mask in calls:
                    output = module(*args, **kwargs)
                    rows.append((output[0] if isinstance(output, tuple) else output)[mask])
                return torch.cat(rows)

            layers = [block.get_submodule(name) for name in names]
            weights, target = [layer.weight.clone() for layer in layers], run()

            def loss_of(changed: Any, layers: Any = layers, target: Tensor = target, run: Any = run) -> float:
                for layer, weight in zip(layers, changed, strict=True):
                    layer.weight.copy_(weight)
                return float((run() - target).square().mean())

            scale, _, _ = search(means[names[0]], weights, loss_of, bits, size)
            for layer, weight in zip(layers, weights, strict=True):
                layer.weight.copy_(weight * scale)
            made = block.get_submodule(producer)
            made.weight.copy_(made.weight / (scale if made.weight.dim() == 1 else scale[:, None]))
        inputs = {name: real(f"{path}.{name}", model) for name in ORDER}  # divided by s already, nothing rounded
        found = {}
        for name in ORDER:
            weight = block.get_submodule(name).weight.clone()
            if not name.endswith(("q_proj", "k_proj")):
                bounds = clip_by_hand(weight, inputs[name], bits, size)[..., None]
                weight = weight.reshape(*bounds.shape[:2], size).clamp(-bounds, bounds).reshape(weight.shape)
            found[name] = quantize(weight, bits, size)
    return found


ORDER = (*tuple(f"self_attn.{n}_proj" for n in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def test_the_whole_method_is_the_sheets() -> None:
    """Both blocks; the second is calibrated on the original model's hidden states."""
    batches = tiny_batches("llama", lengths=LONG)
    model = tiny_model("llama")
    apply(model, Awq(bits=3, group_size=8, convention="llm-awq", scale_dtype="float32"), batches, progress=False)
    for index in (0, 1):
        for name, expected in awq_by_hand(tiny_model("llama"), batches, index, 3, 8).items():
            found = model.get_submodule(f"model.layers.{index}.{name}").dequantized()
            # a weight on the border of two codes, or a group between two clips, may fall either way, as products were
            # rounded in another order
            close = (found - expected).abs() <= 1e-4 * expected.abs().max()
            assert float(close.float().mean()) > 0.98, name


def test_it_beats_rounding_where_channels_stand_out() -> None:
    from actkit.zoo.outliers import outlier_twin

    twin = outlier_twin(tiny_model("llama"), channels=2, factor=30.0)
    batches = tiny_batches("llama", lengths=LONG)
    reference = outputs(twin, batches)
    errors = {}
    for recipe in (RoundToNearest(bits=4, group_size=8), Awq(bits=4, group_size=8)):
        model = copy.deepcopy(twin)
        apply(model, recipe, batches, progress=False)
        errors[type(recipe).__name__] = sum(
            float((a - b).square().mean()) for a, b in zip(outputs(model, batches), reference, strict=True)
        )
    assert errors["Awq"] < 0.7 * errors["RoundToNearest"]


def test_what_cannot_take_a_scale_is_noted() -> None:
    for kind, texts in {
        "llama": ["2 query heads read each value head"],
        "bert": ["post-norm"],
        "qwen2_moe": ["an expert that every token goes to"],
    }.items():
        recipe = Awq(bits=4, group_size=8, n_grid=2)
        report = apply(tiny_model(kind), recipe, tiny_batches(kind), progress=False).report
        notes = [note for note in report.notes if "rounded without a scale" in note]
        for text in texts:
            assert any(text in note for note in notes), kind


def test_padding_inside_experts_does_not_count() -> None:
    """What stands on padded positions changes no expert's scale or clip."""
    plain = tiny_batches("mixtral", lengths=LONG)
    other = [
        {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])} for batch in plain
    ]
    found = []
    for batches in (plain, other):
        model = tiny_model("mixtral", num_hidden_layers=1)
        apply(model, Awq(bits=3, group_size=8, n_grid=8), batches, progress=False)
        found.append(dict(model.state_dict().items()))
    for name, value in found[0].items():  # the order of sums differs with the rows that padding is sent along with
        (close if value.is_floating_point() else equal)([value], [found[1][name]], name)


def test_a_saved_stack_loads_and_computes_the_same(tmp_path: Any) -> None:
    model, batches = tiny_model("gpt2"), tiny_batches("gpt2")
    apply(model, [Awq(bits=4, group_size=8, n_grid=4), Wina(sparsity=0.4)], batches, progress=False)
    loaded = load(save(model, tmp_path / "stack"))
    equal(outputs(loaded, batches), outputs(model, batches), "outputs")
    layers = [module for module in loaded.modules() if isinstance(module, ActLinear)]
    assert len(layers) == 8 and all(isinstance(m.storage, IntegerWeight) and m.select is not None for m in layers)


def test_it_may_not_follow_what_it_would_break() -> None:
    batches, awq = tiny_batches("llama"), Awq(group_size=8)
    for earlier, text in ((Wina(), "put it first"), (RoundToNearest(group_size=8), "weight slot"), (awq, "already")):
        with pytest.raises(RecipeError, match=text):
            apply(tiny_model("llama"), [earlier, awq], batches, progress=False)

    class Corrects(Transform):
        tags = Tags(slot="correction")

    assert "put it first" in str(awq.conflicts(Corrects()))


def test_settings_and_groups_are_checked() -> None:
    for settings, text in (({"bits": 9}, "bits"), ({"n_grid": 0}, "n_grid"), ({"group_size": 0}, "group_size: 0 was")):
        with pytest.raises(ValidationError, match=text):
            Awq(**settings)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"q_proj: group_size: 7 does not divide the 16 inputs; choose a divisor"):
        apply(model, Awq(group_size=7), tiny_batches("llama"), progress=False)
    assert not any(isinstance(module, ActLinear) for module in model.modules())


def test_saliency_mask_picks_the_right_channels() -> None:
    mean_abs, weight = torch.tensor([1.0, 9.0, 2.0, 3.0]), torch.tensor([[1.0, 0.0, 7.0, 1.0], [1.0, 1.0, 0.0, 8.0]])
    assert saliency_mask(mean_abs, weight, 0.25).tolist() == [False, True, False, False]
    assert saliency_mask(mean_abs, weight, 0.5, "weight").tolist() == [False, False, True, True]
    assert int(saliency_mask(mean_abs, weight, 0.5, "random", seed=1).sum()) == 2
    with pytest.raises(ValueError, match="share: 0 was given"):
        saliency_mask(mean_abs, weight, 0)


def test_a_screen_leaves_all_but_the_best_ratios_out() -> None:
    """The finalists' losses are those on all tokens; a screen that saw no token leaves none out."""
    module, x = Inspected(), salient()
    consumers = (Linear("gate", "gate", module.gate), Linear("up", "up", module.up))
    m, settings = x.abs().mean((0, 1)), Awq(bits=3, group_size=8)
    _, _, every = search_scale(module, consumers, [call(x)], m, settings)
    _, _, few = search_scale(module, consumers, [call(x[:, :10])], m, settings)
    _, ratio, losses = search_scale(module, consumers, [call(x)], m, settings, screen=[call(x[:, :10])])
    best = sorted(few, key=few.__getitem__)[: FINALISTS - 1]
    assert losses == {step: every[step] for step in sorted({0, *best})}
    assert ratio == min(losses, key=losses.__getitem__) / 20
    unseen = search_scale(module, consumers, [call(x)], m, settings, screen=[])
    assert unseen[2] == every


def test_the_estimate_counts_the_tokens_that_are_searched() -> None:
    assert Awq(screen_tokens=None).passes(10_000, 40) == Awq(screen_tokens=1000).passes(500, 2) == 1 + 20 + 4
    assert Awq(screen_tokens=1000).passes(10_000, 40) == pytest.approx(1 + 2 + 4 + 4)
    assert Awq(search_tokens=1000).passes(10_000, 40) == pytest.approx(1 + 2.4)
