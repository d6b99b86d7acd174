"""Shares of active neurons and perplexities by four criteria, against hooks written out here."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

from actkit.core.ground.errors import DataError
from actkit.sparsity.sparsing_law.activation_ratio import activation_ratio, pareto
from actkit.testing import tiny_batches, tiny_model

LENGTHS = ((20, 20, 20), (20, 20))
FULL = {kind: tiny_batches(kind, lengths=LENGTHS) for kind in ("llama", "gpt2", "mixtral")}
ACTIVATIONS = {"llama": "mlp.act_fn", "gpt2": "mlp.act"}


def by_hand(kind, keep):
    """Share kept and perplexity where every nonlinearity's output s becomes s * keep(s), by hooks."""
    model = tiny_model(kind)
    blocks = model.model.layers if kind == "llama" else model.transformer.h
    kept = total = 0

    def hook(module, args, s):
        nonlocal kept, total
        mask = keep(s)
        kept, total = kept + int(mask.sum()), total + mask.numel()
        return s * mask

    for block in blocks:
        block.get_submodule(ACTIVATIONS[kind]).register_forward_hook(hook)
    nats, count = 0.0, 0
    for batch in FULL[kind]:
        with torch.no_grad():
            logits = model(**batch).logits.double()
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        nats, count = nats + float(losses.sum()), count + losses.numel()
    return kept / total, math.exp(nats / count)


def largest(share):
    def keep(s):
        order = s.abs().flatten().argsort()
        mask = torch.ones(s.numel(), dtype=torch.bool)
        mask[order[: int(s.numel() * (1 - share))]] = False
        return mask.view_as(s)

    return keep


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("method", "value", "keep"),
    [
        ("zero", 0.0, lambda s: s != 0),
        ("fat", 0.0, lambda s: s != 0),
        ("fat", 0.1, lambda s: s.abs() >= 0.1),
        ("topk", 0.3, largest(0.3)),
        ("topk", 1.0, lambda s: torch.ones_like(s, dtype=torch.bool)),
    ],
)
def test_shares_and_perplexities_are_those_of_hooks(kind, method, value, keep):
    model = tiny_model(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    found = activation_ratio(model, FULL[kind], method, value, progress=False)
    ratio, perplexity = by_hand(kind, keep)
    assert found.ratio == pytest.approx(ratio, abs=1e-6 if method != "topk" else 1e-3)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.dense_perplexity == pytest.approx(by_hand(kind, lambda s: s == s)[1], rel=1e-5)
    assert len(found.ratios) == 2
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_cett_counts_contributions_on_the_sparse_model():
    model, batches = tiny_model("llama", hidden_act="relu"), FULL["llama"]
    found = activation_ratio(model, batches, "cett", 0.2, progress=False)
    assert set(found.ratios) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    zero = activation_ratio(model, batches, "zero", progress=False)
    nothing = activation_ratio(model, batches, "cett", 0.0, progress=False)
    assert nothing.ratio == pytest.approx(zero.ratio, abs=1e-3)  # a factor of the gate may be 0 as well
    assert nothing.perplexity == pytest.approx(zero.dense_perplexity, rel=1e-6)
    assert found.ratio < zero.ratio < 0.7
    other = activation_ratio(model, batches[:1], "cett", 0.2, calibration=batches, progress=False)
    assert other.perplexity != found.perplexity


def test_padding_is_left_out_or_refused():
    padded = [{**FULL["llama"][0], "attention_mask": torch.ones(3, 20, dtype=torch.int64)}]
    padded[0]["attention_mask"][:, 12:] = 0
    short = [{key: value[:, :12] for key, value in padded[0].items()}]
    for method, value in (("zero", 0.0), ("fat", 0.05), ("cett", 0.3)):
        model = tiny_model("llama", hidden_act="relu")
        both = [activation_ratio(model, batches, method, value, progress=False) for batches in (padded, short)]
        assert both[0].ratio == pytest.approx(both[1].ratio, abs=2e-3)
        assert both[0].perplexity == pytest.approx(both[1].perplexity, rel=1e-4)
    with pytest.raises(DataError, match="'topk' chooses among all positions"):
        activation_ratio(tiny_model("llama"), padded, "topk", 0.5, progress=False)


def test_experts_count_where_they_are_reached():
    found = activation_ratio(tiny_model("mixtral"), FULL["mixtral"], "topk", 0.25, progress=False)
    assert found.ratio == pytest.approx(0.25, abs=0.01)
    assert len(found.ratios) == 8 and all("experts" in path for path in found.ratios)


def test_pareto_sets_every_method_to_the_shares_of_the_grid():
    model, grid = tiny_model("llama"), (0.2, 0.5, 0.8)
    result = pareto(model, FULL["llama"], ("zero", "fat", "topk", "cett"), grid, progress=False)
    assert [point.method for point in result.points] == ["zero"] + [m for m in ("fat", "topk", "cett") for _ in grid]
    for point, share in zip(result.points[1:], grid * 3, strict=True):
        assert point.ratio == pytest.approx(share, abs=0.03)
        again = activation_ratio(model, FULL["llama"], point.method, point.value, progress=False)
        assert (again.ratio, again.perplexity) == (point.ratio, point.perplexity)
    assert result.table().row_count == 10
    assert json.loads(json.dumps(result.to_dict()))["points"][0]["method"] == "zero"
    pytest.importorskip("plotly")
    assert [line.name for line in result.figure().data] == ["zero", "fat", "topk", "cett"]


def test_bad_input():
    model, batches = tiny_model("llama"), FULL["llama"]
    with pytest.raises(ValueError, match="method: 'median' was given, allowed are zero, fat, topk, cett"):
        activation_ratio(model, batches, "median")  # type: ignore[arg-type]
    for method, value in (("fat", -1.0), ("topk", 1.1), ("cett", -0.1), ("zero", 0.5)):
        with pytest.raises(ValueError, match=f"value: {value} was given for '{method}'"):
            activation_ratio(model, batches, method, value)
    with pytest.raises(DataError, match="batches: 0 were given"):
        activation_ratio(model, [])
    with pytest.raises(ValueError, match="no point was given"):
        pareto(model, batches, ())
