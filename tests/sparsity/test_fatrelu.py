"""FATReLU against torch.nn.Threshold, in models; the sweep against hooks; predictors against counting by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actkit.core.ground.errors import DataError, RecipeError, UnsupportedModelError
from actkit.core.layers.activations import Activation, Thresholded
from actkit.core.layers.folding import ScaledActivation
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.data import Batches
from actkit.functions.swap import Swap, swap
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.prosparse.activation_predictor import ActivationPairs, ActivationPredictor, activation_pairs
from actkit.sparsity.prosparse.fatrelu import FatRelu, ShiftedRelu, ThresholdPoint, ThresholdSweep, sweep_threshold
from actkit.sparsity.teal import Teal
from actkit.testing import check_transform, tiny_batches, tiny_model
from representative import architectures

CHANGES = {"gpt2": "activation_function"}


def relu_model(kind: str) -> Any:
    return tiny_model(kind) if kind == "mlp" else tiny_model(kind, **{CHANGES.get(kind, "hidden_act"): "relu"})


# -- the function ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [nn.ReLU(), Activation("relu")])
@pytest.mark.parametrize("t", [0.0, 0.01, 0.5])
def test_it_is_torch_threshold_except_at_the_threshold(base: nn.Module, t: float, dtype: torch.dtype) -> None:
    """Bit-equal elsewhere; at z = t the paper keeps z, torch and vLLM give 0. The gradient is 1 where kept, else 0."""
    fat, theirs = Thresholded(base, t), nn.Threshold(t, 0.0)
    edge = torch.tensor(t, dtype=torch.float32)
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    z = torch.cat([z, torch.tensor([-0.0, 0.0, math.inf, -math.inf], dtype=dtype)])
    z = z[z.float() != edge].requires_grad_()
    assert torch.equal(fat(z), theirs(z))
    fat(z).sum().backward()
    assert torch.equal(z.grad, (z >= t).to(dtype)) if t else torch.equal(z.grad, (z > 0).to(dtype))
    if t:
        at = edge.clone()
        assert fat(at) == at and theirs(at) == 0
        assert fat(torch.nextafter(at, torch.tensor(0.0))) == 0
    assert math.isnan(fat(torch.tensor(math.nan)))


def test_shifted_relu() -> None:
    x = torch.randn(50, dtype=torch.float64)
    assert torch.equal(ShiftedRelu(0.3)(x), (x - 0.3).clamp(min=0))
    assert ShiftedRelu.from_spec(ShiftedRelu(0.3).spec()).shift == 0.3
    with pytest.raises(ValueError, match="shift: inf was given"):
        ShiftedRelu(math.inf)


@pytest.mark.parametrize(("kind", "old"), [("llama", "silu"), ("gpt2", "gelu_tanh"), ("bert", "gelu")])
def test_any_mlp_becomes_a_shifted_relu_one_and_is_saved(kind: str, old: str, tmp_path: Path) -> None:
    """Step one for gated MLPs and plain ones: the hidden values are those written out; then FATReLU goes over it."""
    model, batch = tiny_model(kind), tiny_batches(kind)[0]
    path = {
        "llama": "model.layers.1.mlp.down_proj",
        "gpt2": "transformer.h.1.mlp.c_proj",
        "bert": "bert.encoder.layer.1.output.dense",
    }[kind]
    first = {"llama": "gate_proj", "gpt2": "c_fc", "bert": "intermediate.dense"}[kind]
    parent = path.rpartition(".")[0].removesuffix(".output")
    swap(model, old, lambda: ShiftedRelu(0.4))
    seen: dict[str, Any] = {}
    handles = [
        model.get_submodule(f"{parent}.{first}").register_forward_hook(lambda m, a, out: seen.update(z=out)),
        model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.update(hidden=args[0])),
    ]
    if kind == "llama":
        up = model.get_submodule(f"{parent}.up_proj")
        handles.append(up.register_forward_hook(lambda m, a, out: seen.update(up=out)))
    with torch.no_grad():
        model(**batch)
        assert torch.equal(seen["hidden"], (seen["z"] - 0.4).clamp(min=0) * seen.get("up", 1))
        apply(model, FatRelu(threshold=0.2), min_coverage=0.3, progress=False)
        model(**batch)
        kept = (seen["z"] - 0.4).clamp(min=0)
        assert torch.equal(seen["hidden"], torch.where(kept >= 0.2, kept, 0) * seen.get("up", 1))
        for handle in handles:
            handle.remove()
        checkpoint.save(model, tmp_path / "saved")
        loaded = checkpoint.load(tmp_path / "saved")
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert swap(tiny_model(kind), old, "shifted_relu").edits  # by name, at its default


# -- the transform -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", architectures(["llama", "mlp", "bert", "mixtral", "gpt2"]))
def test_what_every_transform_promises(kind: str) -> None:
    check_transform(FatRelu(threshold=0.2), relu_model(kind), tiny_batches(kind), conflicting=[FatRelu()])


def test_in_one_recipe_with_the_swap_and_over_quantized_weights() -> None:
    batches = tiny_batches("llama")
    model = tiny_model("llama")
    steps = [Swap(where="silu", new="relu"), RoundToNearest(group_size=8), FatRelu(threshold=0.3)]
    apply(model, steps, batches, progress=False)
    mlp, x = model.model.layers[0].mlp, torch.randn(7, 16)
    gate, up, down = (getattr(mlp, f"{name}_proj").dequantized() for name in ("gate", "up", "down"))
    z = x @ gate.T
    torch.testing.assert_close(mlp(x), (torch.where(z >= 0.3, z, 0) * (x @ up.T)) @ down.T, rtol=1e-4, atol=1e-5)
    with pytest.raises(RecipeError, match="FatRelu cannot follow Teal: its thresholds or scales were calibrated"):
        apply(relu_model("llama"), [Teal(), FatRelu()], batches, progress=False)


def test_a_scale_that_an_equalization_left_stays_outside() -> None:
    model, scale = relu_model("gpt2"), torch.linspace(0.5, 3.0, 24)
    for layer in model.transformer.h:
        layer.mlp.act = ScaledActivation(layer.mlp.act, scale)
    apply(model, FatRelu(threshold=0.3), min_coverage=0.3, progress=False)
    z = torch.randn(200, 24)
    torch.testing.assert_close(model.transformer.h[1].mlp.act(z), torch.where(z >= 0.3, z, 0) / scale)


@pytest.mark.parametrize(("kind", "old"), [("llama", "silu"), ("bert", "gelu"), ("gpt2", "gelu_tanh")])
def test_other_activations_are_refused_and_nothing_is_changed(kind: str, old: str) -> None:
    model = tiny_model(kind)
    before = str(model)
    with pytest.raises(RecipeError, match=rf"is {old}, no ReLU; replace it first, swap\(model, '{old}'"):
        apply(model, FatRelu(), undo="memory", min_coverage=0.3, progress=False)
    assert str(model) == before


def test_a_traced_model_says_what_it_skips() -> None:
    model = tiny_model("mlp")
    model.act = nn.Tanh()
    report = apply(model, FatRelu(), tiny_batches("mlp"), min_coverage=0.0, progress=False).report
    assert ("act", "FatRelu", "no ReLU module") in report.skipped


@pytest.mark.parametrize("threshold", [-0.1, math.inf, math.nan])
def test_bad_threshold(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        FatRelu(threshold=threshold)


# -- the sweep ---------------------------------------------------------------------------------------------------------


def test_sweep_measures_zeros_and_perplexity_as_by_hand() -> None:
    model, batches = relu_model("llama"), tiny_batches("llama")
    before = str(model)
    sweep = sweep_threshold(model, iter(batches), [0.8, 0.3], progress=False)
    assert str(model) == before
    points = (sweep.original, *sweep.points)
    assert [point.threshold for point in points] == [0.0, 0.3, 0.8]
    for point in points:
        zeros: tuple[list[torch.Tensor], ...] = ([], [])
        losses = []
        changed = relu_model("llama")
        for found, layer in zip(zeros, changed.model.layers, strict=True):
            layer.mlp.act_fn = nn.Threshold(point.threshold, 0.0)
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0] == 0))
        for batch in batches:
            real = batch["attention_mask"].bool()
            with torch.no_grad():
                logits = changed(**batch).logits.double()
            for found in zeros:
                found[-1] = found[-1][real]
            both = real[:, 1:]
            losses.append(F.cross_entropy(logits[:, :-1][both], batch["input_ids"][:, 1:][both], reduction="none"))
        expected = sum(float(torch.cat(found).double().mean()) for found in zeros) / 2
        assert point.sparsity == pytest.approx(expected, rel=1e-9)
        assert point.perplexity == pytest.approx(math.exp(float(torch.cat(losses).mean())), rel=1e-5)
    assert sweep.original.sparsity < sweep.points[0].sparsity < sweep.points[1].sparsity
    assert sweep.to_dict()["original"]["threshold"] == 0 and sweep.table().row_count == 3
    assert len(sweep.figure().data[0].x) == 3


def test_choice_stops_at_the_first_threshold_that_costs_too_much() -> None:
    original = ThresholdPoint(0.0, 0.5, 10.0)
    points = tuple(
        ThresholdPoint(t, s, p)
        for t, s, p in [(0.1, 0.6, 10.04), (0.2, 0.7, 10.06), (0.3, 0.8, 10.0), (0.4, 0.9, 12.0)]
    )
    sweep = ThresholdSweep(original, points)
    assert sweep.choose().threshold == 0.1 and sweep.choose(0.01).threshold == 0.3
    assert sweep.choose(0.0) is original
    with pytest.raises(ValueError, match=r"max_loss: -1 was given"):
        sweep.choose(-1)


def test_sweep_refuses() -> None:
    batches = tiny_batches("llama")
    for grid in ([], [0.0], [-1.0], [math.nan]):
        with pytest.raises(ValueError, match=r"grid: .* above 0"):
            sweep_threshold(relu_model("llama"), batches, grid, progress=False)
    with pytest.raises(RecipeError, match="is silu, no ReLU"):
        sweep_threshold(tiny_model("llama"), batches, progress=False)
    with pytest.raises(UnsupportedModelError, match="writes no text"):
        sweep_threshold(relu_model("bert"), tiny_batches("bert"), progress=False)
    model = relu_model("llama")
    apply(model, FatRelu(), progress=False)
    with pytest.raises(RecipeError, match=r"is Thresholded, no ReLU"):
        sweep_threshold(model, batches, progress=False)


# -- predictors --------------------------------------------------------------------------------------------------------


def test_pairs_are_those_of_the_real_tokens() -> None:
    model, batches = relu_model("llama"), tiny_batches("llama")
    pairs = activation_pairs(model, batches, 1, progress=False)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    mlp = model.model.layers[1].mlp
    hooks = [mlp.register_forward_hook(lambda m, args, out: seen.append((args[0], m.act_fn(m.gate_proj(args[0])) > 0)))]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hooks[0].remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    x = torch.cat([each[0][mask] for each, mask in zip(seen, masks, strict=True)])
    active = torch.cat([each[1][mask] for each, mask in zip(seen, masks, strict=True)])
    torch.testing.assert_close(pairs.x, x)
    assert torch.equal(pairs.active, active)
    assert len(activation_pairs(model, batches, 0, tokens=5, progress=False).x) == 5
    with pytest.raises(DataError, match="no hidden value of block 0 is 0"):
        activation_pairs(tiny_model("llama"), batches, 0, progress=False)


def test_pairs_are_of_one_token_also_where_a_document_fills_many_rows() -> None:
    model = relu_model("llama")
    ids = torch.randint(3, 40, (24, 6), generator=torch.Generator().manual_seed(0))
    batches = Batches([{"input_ids": part} for part in ids.split(8)], [torch.zeros(8, 6, dtype=torch.int64)] * 3)
    pairs = activation_pairs(model, batches, 1, tokens=40, progress=False)
    gate = model.model.layers[1].mlp.gate_proj
    assert torch.equal(pairs.active, gate(pairs.x) > 0) and len(pairs.x) > 30


@pytest.mark.parametrize("between", ["relu", "nothing"])
def test_predictor_learns_what_its_rank_can_hold(between: Any) -> None:
    """Neurons that are on where a rank-4 map of x is positive, a fifth of the time: found on fresh inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 12, generator=generator)
    map_ = torch.randn(12, 4, generator=generator) @ torch.randn(4, 30, generator=generator)
    active = x @ map_ > 0.85 * map_.norm(dim=0)
    torch.manual_seed(0)
    predictor = ActivationPredictor(12, 30, rank=16, between=between)
    fitted = predictor.fit(
        ActivationPairs(x[:5000], active[:5000]), epochs=15, learning_rate=1e-2, batch_size=250, progress=False
    )
    assert fitted.steps == 15 * 19  # 4750 pairs, as 5 % are held out
    fresh, on = x[5000:], active[5000:]
    by_hand = predictor.second(predictor.between(predictor.first(fresh))) > 0
    assert predictor.recall(fresh, on) == pytest.approx(float((by_hand & on).sum() / on.sum()))
    assert predictor.predicted_sparsity(fresh) == pytest.approx(float((~by_hand).float().mean()), abs=1e-6)
    assert predictor.recall(fresh, on) > 0.85 and predictor.predicted_sparsity(fresh) > 0.5


def test_predictor_refuses() -> None:
    with pytest.raises(ValueError, match="rank: 0 was given"):
        ActivationPredictor(4, 6, rank=0)
    with pytest.raises(ValueError, match="between: 'gelu' was given"):
        ActivationPredictor(4, 6, between="gelu")  # type: ignore[arg-type]
    predictor = ActivationPredictor(4, 6, rank=2)
    with pytest.raises(ValueError, match=r"x \[30, 5\] and active \[30, 6\] were given"):
        predictor.fit(ActivationPairs(torch.zeros(30, 5), torch.zeros(30, 6).bool()))
    with pytest.raises(DataError, match="19 were given; give at least 20"):
        predictor.fit(ActivationPairs(torch.zeros(19, 4), torch.zeros(19, 6).bool()))
    assert math.isnan(predictor.recall(torch.zeros(3, 4), torch.zeros(3, 6).bool()))
