"""TEAL against the release's functions written out again, torch.quantile, and a plain greedy search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold, TopK
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.recipe.runner import apply
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Quantiles
from actkit.sparsity.teal import LARGEST, Teal, _error
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.models import HIDDEN, INNER

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def inputs_by_hand(model: nn.Module, path: str, batches: list[Any]) -> Tensor:
    """The real input rows of a layer, by a plain hook."""
    found: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return torch.cat([x[mask] for x, mask in zip(found, masks, strict=True)])


# -- the release, re-expressed -----------------------------------------------------------------------------------------


def sparsify_threshold(x: Tensor, threshold: float) -> Tensor:
    return x * (x.abs() > threshold)


def sparsify_top_k(x: Tensor, sparsity: float) -> Tensor:
    k = int(x.shape[-1] * (1 - sparsity))
    keep = torch.zeros_like(x)
    keep.scatter_(-1, x.abs().topk(k, dim=-1).indices, 1.0)
    return x * keep


def test_masks_equal_the_releases_bit_for_bit() -> None:
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(0))
    for sparsity in (0.0, 0.25, 0.4, 0.5, 0.65, 0.9):
        threshold = float(torch.quantile(x.abs(), sparsity))
        assert torch.equal(Threshold(threshold)(x), sparsify_threshold(x, threshold))
        assert torch.equal(TopK(int(48 * (1 - sparsity)))(x), sparsify_top_k(x, sparsity))


# -- thresholds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.65])
def test_thresholds_are_quantiles_of_real_tokens(sparsity: float) -> None:
    """Within one bin (1/512) of torch.quantile(|x|, p) on the original model's inputs, padding left out."""
    model = tiny_model("llama")
    batches = tiny_batches("llama", lengths=((30, 11, 25), (28, 9)))
    expected = {}
    for layer in (0, 1):
        for name in LAYERS:
            path = f"model.layers.{layer}.{name}"
            expected[path] = float(torch.quantile(inputs_by_hand(model, path, batches).abs(), sparsity))
    apply(model, Teal(sparsity=sparsity), batches, progress=False)
    for path, wanted in expected.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, ActLinear)
        assert isinstance(layer.select, Threshold)
        assert layer.select.score is None
        assert float(layer.select.threshold) == pytest.approx(wanted, rel=1 / 512 + 0.01)


def test_one_bin_of_many_values() -> None:
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1))
    seen = Quantiles()
    seen.update(x)
    magnitudes = x.abs().flatten().double().sort().values
    for p in (0.1, 0.25, 0.5, 0.65, 0.9):
        assert seen.quantile(p) == pytest.approx(float(magnitudes[int(p * len(magnitudes))]), rel=1 / 512)


def test_the_changed_layer_computes_the_masked_product() -> None:
    model, original = tiny_model("llama"), tiny_model("llama")
    apply(model, Teal(sparsity=0.5), tiny_batches("llama"), progress=False)
    x = torch.randn(5, INNER)
    layer = model.model.layers[1].mlp.down_proj
    weight = original.model.layers[1].mlp.down_proj.weight
    masked = sparsify_threshold(x, float(layer.select.threshold))
    torch.testing.assert_close(layer(x), F.linear(masked, weight), rtol=0, atol=0)
    assert 0 < float((masked == 0).float().mean()) < 1


def test_achieved_sparsity_on_held_out_tokens_is_close_to_the_target() -> None:
    """Calibrated on 1800 tokens, measured on others: the thresholds do not depend on the sample."""
    model = tiny_model("llama")
    long = ((32,) * 20,) * 3
    apply(model, Teal(sparsity=0.5), tiny_batches("llama", seed=1, lengths=long), progress=False)
    held_out = tiny_batches("llama", seed=2, lengths=long)
    for name in LAYERS:
        path = f"model.layers.0.{name}"
        select = model.get_submodule(path).select
        x = inputs_by_hand(model, path, held_out)
        assert float((x.abs() <= select.threshold).float().mean()) == pytest.approx(0.5, abs=0.03)


# -- which layers ------------------------------------------------------------------------------------------------------


def test_skipped_roles_stay_dense_and_unreached_experts_are_reported() -> None:
    model = tiny_model("llama")
    apply(model, Teal(skip=("output", "down")), tiny_batches("llama"), progress=False)
    changed = {path for path, module in model.named_modules() if isinstance(module, ActLinear)}
    assert changed == {
        f"model.layers.{i}.{n}" for i in (0, 1) for n in LAYERS if not n.endswith(("o_proj", "down_proj"))
    }
    moe = tiny_model("mixtral", num_experts_per_tok=1)
    report = apply(moe, Teal(), [{"input_ids": torch.tensor([[3]])}], progress=False).report
    reasons = {reason for _, _, reason in report.skipped}
    assert reasons == {"no calibration token reached it"}
    assert len(report.skipped) == 2 * 3 * 3  # two blocks, three of four experts, three layers each


def test_settings_out_of_bounds_are_refused() -> None:
    for settings in ({"sparsity": 1.0}, {"sparsity": -0.1}, {"step": 0.0}, {"skip": ("outputs",)}, {"mode": "topk"}):
        with pytest.raises(ValidationError, match=next(iter(settings))):
            Teal(**settings)
    with pytest.raises(ValidationError, match=r"0\.97 was given; greedy allocation goes up to 0\.95"):
        Teal(sparsity=0.97, allocation="greedy")


# -- greedy ------------------------------------------------------------------------------------------------------------


def greedy_by_hand(model: Any, batches: list[Any], sparsity: float, step: float) -> list[float]:
    """The sheet's greedy search for the first block of a llama, in plain torch on stored inputs."""
    block = model.model.layers[0]
    names = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
             ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip
    sizes = [sum(block.get_submodule(n).weight.numel() for n in group) for group in names]
    magnitudes = [inputs_by_hand(model, f"model.layers.0.{group[0]}", batches).abs().flatten() for group in names]
    stored: list[Any] = []
    handle = block.register_forward_pre_hook(lambda m, args, kwargs: stored.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]

    def run(shares: list[float]) -> list[Tensor]:
        seen = Quantiles()
        handles = []
        for group, p, values in zip(names, shares, magnitudes, strict=True):
            if p == 0:
                continue
            seen = Quantiles()
            seen.update(values[:, None])
            threshold = seen.quantile(p)
            for n in group:
                mask = lambda m, args, t=threshold: (args[0] * (args[0].abs() > t),)  # noqa: E731
                handles.append(block.get_submodule(n).register_forward_pre_hook(mask))
        with torch.no_grad():
            outputs = [block(*args, **kwargs) for args, kwargs in stored]
        for h in handles:
            h.remove()
        return [output[0] if isinstance(output, tuple) else output for output in outputs]

    def damage(outputs: list[Tensor], dense: list[Tensor]) -> float:
        total = 0.0
        for a, b, mask in zip(outputs, dense, masks, strict=True):
            norms = []
            for row in range(len(mask)):
                length = int(mask[row].sum())  # padded on the right
                last = slice(length - max(1, length // 4), length)
                norms.append((a[row, last] - b[row, last]).norm(dim=0))
            total += float(torch.stack(norms).mean())
        return total

    dense, shares = run([0.0] * 4), [0.0] * 4
    while sum(p * s for p, s in zip(shares, sizes, strict=True)) / sum(sizes) < sparsity - 1e-6:
        missing = sparsity * sum(sizes) - sum(p * s for p, s in zip(shares, sizes, strict=True))
        trials = []
        for i in range(4):
            p = min(shares[i] + min(step * max(sizes) / sizes[i], missing / sizes[i]), LARGEST)
            if p > shares[i]:
                trials.append([*shares[:i], p, *shares[i + 1 :]])
        shares = min(trials, key=lambda trial: damage(run(trial), dense))
    return shares


def test_greedy_allocation_is_that_of_a_plain_search_and_meets_the_target() -> None:
    batches = tiny_batches("llama", lengths=((30, 11, 25), (28, 9)))
    expected = greedy_by_hand(tiny_model("llama"), batches, 0.5, 0.1)
    model = tiny_model("llama")
    notes = apply(model, Teal(allocation="greedy", step=0.1), batches, progress=False).report.notes
    found = [float(part.split()[-1]) for part in notes[0].split(": ")[-1].split(", ")]
    assert found == pytest.approx(expected, abs=0.006)  # the note has two decimals
    sizes = [2 * HIDDEN * HIDDEN, HIDDEN * HIDDEN, 2 * HIDDEN * INNER, HIDDEN * INNER]
    assert sum(p * s for p, s in zip(expected, sizes, strict=True)) / sum(sizes) == pytest.approx(0.5, abs=1e-4)
    assert len({round(p, 2) for p in expected}) > 1
    for p, name in zip(expected, (LAYERS[0], LAYERS[3], LAYERS[4], LAYERS[6]), strict=True):
        x = inputs_by_hand(tiny_model("llama"), f"model.layers.0.{name}", batches).abs()
        threshold = float(model.get_submodule(f"model.layers.0.{name}").select.threshold)
        assert float((x <= threshold).float().mean()) == pytest.approx(p, abs=0.01)


def test_the_greedy_error_is_the_releases_without_padding_and_ignores_padding() -> None:
    dense, sparse = torch.randn(3, 12, 5), torch.randn(3, 12, 5)
    release = (dense - sparse)[:, -3:].norm(dim=1).mean()
    assert _error(sparse, dense, None) == pytest.approx(float(release))
    for side in ("right", "left"):
        mask = torch.ones(3, 12, dtype=torch.bool)
        mask[1, (slice(8, None) if side == "right" else slice(0, 4))] = False
        kept = [(dense - sparse)[r][mask[r]] for r in range(3)]
        by_hand = torch.stack([rows[-(len(rows) // 4) :].norm(dim=0) for rows in kept]).mean()
        assert _error(sparse, dense, mask) == pytest.approx(float(by_hand))


def test_sites_are_those_of_the_layers() -> None:
    model = tiny_model("vit")
    view = anatomy(model)
    groups = [group for block in view.blocks for group in Teal().groups(block)]
    for group in groups:
        for linear in group.linears:
            both = record(
                model, {group.site: Quantiles(), Site("layer.input", path=linear.path): Quantiles()},
                tiny_batches("vit"), progress=False,
            )  # fmt: skip
            assert len({seen.quantile(0.5) for seen in both.values()}) == 1
