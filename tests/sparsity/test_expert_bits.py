"""Widths of experts against a search by hand, and the promises of a transform."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from actkit.core.edit import changes
from actkit.core.ground.errors import CoverageError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import rounded
from actkit.core.model.anatomy import anatomy
from actkit.core.model.expert_places import expert_places
from actkit.core.model.experts import ExpertList
from actkit.core.recipe.runner import apply
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.edgemoe.expert_bits import ExpertBits, experts_of, plan_bits
from actkit.sparsity.teal import Teal
from actkit.testing import check_transform, tiny_batches, tiny_model

IDS = torch.randint(3, 40, (6, 20), generator=torch.Generator().manual_seed(0))
TEXT = [{"input_ids": IDS[:3]}, {"input_ids": IDS[3:]}]


def model(**settings: Any) -> Any:
    return tiny_model("mixtral", initializer_range=0.3, **settings)


def paths(of: Any) -> list[str]:
    return [f"{place.path}.{e}" for place in expert_places(of) for e in range(4)]


@torch.no_grad()
def loss_with(bits: dict[str, int]) -> float:
    """The loss with weights rounded in place, by our own grid, computed from the logits."""
    changed = model()
    grid = ExpertBits().grid
    for place in expert_places(changed):
        experts = changed.get_submodule(place.path)
        for e in range(4):
            width = bits.get(f"{place.path}.{e}")
            if width is not None:
                half = experts.gate_up_proj.shape[1] // 2
                for matrix in (*experts.gate_up_proj[e].split(half), experts.down_proj[e]):
                    matrix.copy_(rounded(matrix, grid(width)).dequantize())
    logits = changed(input_ids=IDS).logits[:, :-1].double()
    return float(F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))


def by_hand(tolerance: float, widths: tuple[int, ...]) -> dict[str, int]:
    every = paths(model())
    bound = loss_with({}) * (1 + tolerance)
    base = next((w for w in widths if loss_with(dict.fromkeys(every, w)) <= bound), widths[-1])
    bits = dict.fromkeys(every, base)
    alone = {path: loss_with(bits | {path: widths[0]}) for path in every}
    ranked = sorted(every, key=alone.__getitem__)
    for width in reversed([w for w in widths if w < base]):
        low, high = 0, len(ranked) + 1
        while high - low > 1:
            k = (low + high) // 2
            low, high = (k, high) if loss_with(bits | dict.fromkeys(ranked[:k], width)) <= bound else (low, k)
        ranked = ranked[:low]
        bits |= dict.fromkeys(ranked, width)
    return bits


@pytest.mark.parametrize("tolerance", [0.0001, 0.0005])
def test_widths_are_those_of_a_search_by_hand(tolerance: float) -> None:
    found = plan_bits(model(), TEXT, tolerance=tolerance)
    assert found == by_hand(tolerance, (2, 4, 8)) and len(set(found.values())) > 1


def test_the_model_is_rounded_as_planned_and_the_plan_is_recorded() -> None:
    applied = apply(model(), [ExpertBits(tolerance=0.0005)], TEXT, progress=False)
    plan = plan_bits(model(), TEXT, tolerance=0.0005)
    (entry,) = changes.of(applied.model).recipe
    assert entry["expert_bits"]["bits"] == plan
    view = anatomy(applied.model)
    for path, layers in experts_of(view.block(block.index) for block in view.blocks).items():
        assert {layer.module.storage.grid.bits for layer in layers} == {plan[path]}
    assert isinstance(applied.model.model.layers[0].mlp.experts, ExpertList)
    assert not any(isinstance(m, ActLinear) for m in applied.model.model.layers[0].self_attn.modules())
    (note,) = [note for note in applied.report.notes if "experts:" in note]
    assert "loss" in note and "at most" in note
    again = apply(model(), [ExpertBits(bits=plan)], progress=False)
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=IDS).logits, applied.model(input_ids=IDS).logits)


def test_a_bound_that_no_width_keeps_is_said() -> None:
    applied = apply(model(), [ExpertBits(tolerance=0.0, widths=(2,))], TEXT, progress=False)
    assert any("not even 2 bits keep it" in note for note in applied.report.notes)
    assert set(changes.of(applied.model).recipe[0]["expert_bits"]["bits"].values()) == {2}


def test_one_pass_ranks_by_the_error_of_the_output() -> None:
    """Against the outputs of the experts module before and after each expert alone is rounded."""
    found = apply(model(), [ExpertBits(tolerance=0.0005, importance="error")], TEXT, progress=False)
    values = next(row[2] for row in found.report.values)["importance"]
    original = model()
    calls: dict[str, list[Any]] = {place.path: [] for place in expert_places(original)}
    handles = [
        original.get_submodule(path).register_forward_pre_hook(lambda m, a, path=path: calls[path].append(a))
        for path in calls
    ]
    with torch.no_grad():
        for batch in TEXT:
            original(**batch)
        for handle in handles:
            handle.remove()
        for place in expert_places(original):
            exact = ExpertList.of(original.get_submodule(place.path), place.row)
            for e in range(4):
                changed = ExpertList.of(original.get_submodule(place.path), place.row)
                for part in ("gate", "up", "down"):
                    layer = getattr(changed[e], part)
                    setattr(changed[e], part, ActLinear.of(layer, weight=rounded(layer.weight, ExpertBits().grid(2))))
                error = sum(float((changed(*a) - exact(*a)).double().square().sum()) for a in calls[place.path])
                assert values[f"{place.path}.{e}"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_expert_bits_keep_a_transforms_promises(kind: str) -> None:
    bits = {path: (2, 4, 8)[i % 3] for i, path in enumerate(paths(tiny_model(kind)))}
    checked = (ExpertBits(bits=bits), RoundToNearest(bits=4, group_size=8))
    check_transform(checked[0], tiny_model(kind), tiny_batches(kind), conflicting=checked[1:])
    check_transform(ExpertBits(tolerance=0.01), tiny_model(kind), tiny_batches(kind))


def test_it_goes_with_methods_of_other_slots() -> None:
    bits = dict.fromkeys(paths(model()), 4)
    applied = apply(model(), [ExpertBits(bits=bits), Teal(sparsity=0.5)], TEXT, progress=False)
    layer = applied.model.model.layers[0].mlp.experts[0].down
    assert layer.storage.grid.bits == 4 and layer.select is not None


def test_bad_settings() -> None:
    for wrong in ({"widths": ()}, {"widths": (4, 4)}, {"widths": (1, 4)}):
        with pytest.raises(ValueError, match="different widths of 2 to 8 bits"):
            ExpertBits(**wrong)
    with pytest.raises(CoverageError):
        apply(tiny_model("llama"), [ExpertBits()], tiny_batches("llama"), progress=False)
