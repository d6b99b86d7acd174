"""What claims to keep a model's function is compared block by block when it is applied, and refused if it does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Set
from actkit.core.ground.errors import EditError
from actkit.core.recipe.runner import apply
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.quantization.rotate import Rotate
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.transforms import State


class Scaling(Transform):
    """Multiplies up by `up` and down by `down`, as far as `block` says: exact with ReLU if up * down is 1."""

    tags: ClassVar[Tags] = Tags(changes_function="exact", least_coverage=0.0)
    up: float = 2.0
    down: float = 0.5
    last: bool = False

    @property
    def name(self) -> str:
        return "scaling"

    def edit(self, block: Any, seen: Any) -> Iterable[Edit]:
        if self.last and not block.index:
            return
        for linear, factor in ((block.mlp.up, self.up), (block.mlp.down, self.down)):
            yield Set(f"{linear.path}.weight", linear.module.weight.detach() * factor)


class Spanning(Scaling):
    tags: ClassVar[Tags] = Tags(changes_function="exact", spans_blocks=True, least_coverage=0.0)


class Approximate(Scaling):
    tags: ClassVar[Tags] = Tags(least_coverage=0.0)


def run(model: nn.Module, transform: Any, data: Any) -> Any:
    return apply(model, transform, data, undo="memory", progress=False)


@pytest.mark.parametrize("data", [True, False])
def test_what_is_exact_is_reported_with_its_largest_difference(data: bool) -> None:
    report = run(tiny_model("llama"), Scaling(), tiny_batches("llama") if data else None).report
    (note,) = (note for note in report.notes if "claims" not in note and note.startswith("Scaling: what blocks give"))
    ((where, method, values),) = report.values
    assert (where, method) == ("model", "Scaling") and values["difference"] <= 1e-6 and f"({values['at']})" in note


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("settings", [{"down": 0.51}, {"down": 0.51, "last": True}])
def test_what_is_not_is_refused_by_block_and_the_model_restored(settings: dict[str, Any], data: bool) -> None:
    model = tiny_model("llama")
    before = State.of(model)
    block = rf"^model\.layers\.{int('last' in settings)}: Scaling claims .* \(0\.0001 is allowed in float32"
    with pytest.raises(EditError, match=block):
        run(model, Scaling(**settings), tiny_batches("llama") if data else None)
    before.compare(model, "after the refusal")
    assert run(model, Approximate(**settings), None).edits  # which claims nothing


def test_others_of_the_recipe_do_not_count() -> None:
    transforms = [Approximate(down=0.7), Scaling(up=4.0, down=0.25)]
    report = run(tiny_model("llama"), transforms, tiny_batches("llama")).report
    assert [row[1] for row in report.values] == ["Scaling"]
    with pytest.raises(EditError, match=r"layers\.0: Scaling claims"):
        run(tiny_model("llama"), [Approximate(down=0.7), Scaling(down=0.6)], None)


def test_edits_of_all_blocks_are_compared_by_what_the_model_gives() -> None:
    report = run(tiny_model("llama"), Rotate(), tiny_batches("llama")).report
    assert any(note.startswith("Rotate: what the model gives on a probe batch moved by") for note in report.notes)
    with pytest.raises(EditError, match=r"^the model: Spanning claims"):
        run(tiny_model("llama"), Spanning(down=0.6), None)
    wide = run(tiny_model("llama").bfloat16(), Spanning(up=3.0, down=1 / 3), None).report
    assert 0 < wide.values[0][2]["difference"] < 0.1


def test_sixteen_bits_are_given_room() -> None:
    model = tiny_model("llama").bfloat16()
    assert run(model, Scaling(up=3.0, down=1 / 3), None).report.values[0][2]["difference"] < 5e-2
    with pytest.raises(EditError, match="is allowed in bfloat16"):
        run(tiny_model("llama").bfloat16(), Scaling(down=2.0), None)


class Unsaid(nn.Module):
    """A model that does not say what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.layer(one) + other


class Flips(Transform):
    """Changes a sign, by the path of a module alone."""

    tags: ClassVar[Tags] = Tags(changes_function="exact", parts=False)

    @property
    def name(self) -> str:
        return "flips"

    def targets(self, block: Any) -> Iterable[str]:
        return ["layer"]

    def edit(self, block: Any, seen: Any) -> Iterable[Edit]:
        yield Set("layer.weight", -block.root.layer.weight.detach())


def test_a_model_that_cannot_be_called_is_not_compared_and_the_report_says_so() -> None:
    report = run(Unsaid(), Flips(), None).report
    assert "Flips: outputs before and after were not compared, as no data were given" in report.notes[-1]
    with pytest.raises(EditError, match=r"^the model: Flips claims"):
        run(Unsaid(), Flips(), [(torch.ones(3, 4), torch.ones(3, 4))])


class Folds(Scaling):
    tags: ClassVar[Tags] = Tags(changes_function="exact", evaluated=True, least_coverage=0.0)


def test_what_folds_needs_the_model_in_evaluation_mode() -> None:
    model = tiny_model("llama")
    model.model.layers[1].train()
    with pytest.raises(EditError, match=r"^Folds: model\.layers\.1 is in training mode"):
        run(model, Folds(), None)
    assert run(model.eval(), Folds(), None).edits
