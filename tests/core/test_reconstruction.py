"""Block reconstruction against least squares, and what it does with numbers that are not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.ground import registry
from actkit.core.ground.errors import NonFiniteError, RecipeError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import DenseWeight
from actkit.core.model.anatomy import Block
from actkit.core.recipe.reconstruction import Example, Learned, Learning, Rate, cosine, examples, reconstruct
from actkit.core.recipe.runner import apply
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.testing import tiny_batches, tiny_model


class OneWeight(Learned):
    """The weight of one layer, as it is; at step `ruined` it becomes NaN."""

    def __init__(self, path: str, weight: Tensor, rate: float = 0.02, ruined: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float().clone())
        self.path, self.rate, self.ruined, self.steps = path, rate, ruined, 0

    def tensors(self) -> Mapping[str, Tensor]:
        broken = self.steps == self.ruined
        self.steps += 1
        return {f"{self.path}.storage.tensor": self.weight * (float("nan") if broken else 1.0)}

    def rates(self) -> Iterator[tuple[Sequence[nn.Parameter], Rate]]:
        yield [self.weight], cosine(self.rate)


class Relearn(Transform):
    """Learns the down projection of each block anew from zeros; a test reads what it found."""

    seed: int = 0
    steps: int = 400
    rate: float = 0.02
    rows: int = 1
    keep: float = 1.0
    ruined: int | None = None

    tags: ClassVar[Tags] = Tags(slot="weight", needs_data=True, stream="both", needs_targets=True)
    found: ClassVar[list[tuple[Learning, list[Example], Tensor]]] = []

    def edit(self, block: Block, seen: Seen) -> Iterator[Edit | Skip | Note]:
        (down,) = (linear for linear in block.linears() if linear.role == "down")
        learned = OneWeight(down.path, torch.zeros_like(down.weight), self.rate, self.ruined)
        lessons = examples(seen, self.rows, originals=self.keep < 1)
        settings = {"steps": self.steps, "seed": self.seed, "keep": self.keep}
        with seen.trial([Replace(down.path, ActLinear.of(down))]):
            learning = reconstruct(block, learned, lessons, **settings)
        self.found.append((learning, lessons, learned.weight.detach()))
        yield Replace(down.path, ActLinear.of(down, weight=DenseWeight(learned.weight.detach())))


class Look(Relearn):
    """Shows what it would learn from, and changes nothing."""

    def edit(self, block: Block, seen: Seen) -> Iterator[Edit | Skip | Note]:
        weights = torch.zeros(1, 1, 16)
        weights[..., 3] = 4.0
        self.found.append((Learning(), examples(seen, 2) + examples(seen, 1, importance=weights), torch.empty(0)))
        yield from ()


class Undeclared(Relearn):
    """Reads targets that it did not ask for."""

    tags: ClassVar[Tags] = Tags(slot="weight", needs_data=True)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transforms of this file, as if a package had registered them."""
    real = registry._entries
    own = {
        cls.__name__.lower(): (EntryPoint(cls.__name__.lower(), f"{__name__}:{cls.__qualname__}", registry.METHODS),)
        for cls in (Relearn, Look, Undeclared)
    }
    monkeypatch.setattr(registry, "_entries", lambda group: real(group) | (own if group == registry.METHODS else {}))


@pytest.fixture
def found() -> Iterator[list[tuple[Learning, list[Example], Tensor]]]:
    Relearn.found.clear()
    yield Relearn.found
    Relearn.found.clear()


def run(**settings: object) -> nn.Module:
    model = tiny_model("llama")
    apply(model, Relearn(**settings), tiny_batches("llama"), progress=False)
    return model


def test_it_finds_what_least_squares_finds(found) -> None:
    """The output is linear in the weight of down: many rows, so the weight itself is the only minimum."""
    model = tiny_model("llama", num_hidden_layers=1)
    original = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    batches = [{"input_ids": torch.randint(0, 40, (8, 16), generator=torch.Generator().manual_seed(0))}]
    apply(model, Relearn(steps=1500, rate=0.05, rows=8), batches, progress=False)
    learning, _, weight = found[0]
    assert learning.losses[-1] < 1e-6 * learning.losses[0]
    torch.testing.assert_close(weight, original, atol=0.02, rtol=0.02)


def test_same_settings_same_values(found) -> None:
    run(steps=20)
    run(steps=20)
    run(steps=20, seed=1)
    weights = [weight for *_, weight in found]
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[4])


def test_the_target_is_the_float_block_on_the_float_stream(found) -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    run(steps=2)
    for index in (0, 1):
        lessons = found[index][1]
        states = [model(**batch, output_hidden_states=True).hidden_states for batch in batches]
        if index == 0:  # behind the last block transformers gives the state after the norm
            expected = torch.cat([each[1].flatten(0, 1) for each in states])
            given = torch.cat([lesson.targets[0].flatten(0, 1) for lesson in lessons])
            torch.testing.assert_close(given, expected)
        inputs = torch.cat([each[index].flatten(0, 1) for each in states])
        read = torch.cat([lesson.call.hidden.flatten(0, 1) for lesson in lessons])
        assert torch.equal(read, inputs) == (index == 0)  # the second block reads what the first one became


def test_nothing_in_the_model_is_touched_while_it_learns(found) -> None:
    model = run(steps=5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_padding_does_not_count(found) -> None:
    (batch, *_) = tiny_batches("llama", lengths=((9, 4),))
    apply(tiny_model("llama"), Look(), [batch], progress=False)
    example, mask = found[0][1][0], batch["attention_mask"].bool()
    output = example.targets[0] + torch.where(mask, 1.0, 100.0)[..., None]
    assert float(example.error(output)) == pytest.approx(1.0)


def test_importance_weighs_the_error(found) -> None:
    apply(tiny_model("llama"), Look(), tiny_batches("llama"), progress=False)
    last = found[0][1][-1]
    assert float(last.error(last.targets[0] + 1)) == pytest.approx(4 / 16)


def test_the_last_finite_values_stand(found) -> None:
    run(steps=3)
    run(steps=10, ruined=3)
    (plain, _, weight), (ruined, _, kept) = found[0], found[2]
    assert plain.stopped is None and ruined.stopped == 3 and len(ruined.losses) == 3
    # the values that gave the last finite loss: those before the third update
    assert not torch.equal(kept, weight) and torch.isfinite(kept).all()


def test_a_first_loss_that_is_not_finite_is_an_error(found) -> None:
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0: the first loss is nan"):
        run(ruined=0)


def test_states_of_both_streams_are_mixed_element_by_element(found) -> None:
    run(steps=2, keep=0.5)
    _, lessons, _ = found[1]
    from actkit.core.recipe.reconstruction import _mixed

    one = lessons[0]
    mixed = _mixed(one, 0.5, torch.Generator().manual_seed(0)).call.hidden
    edited, original = one.call.hidden, one.original
    assert original is not None
    assert bool(((mixed == edited) | (mixed == original)).all())
    assert 0.3 < float((mixed == edited).float().mean()) < 0.7


def test_targets_must_be_declared() -> None:
    with pytest.raises(RecipeError, match="needs_targets"):
        apply(tiny_model("llama"), Undeclared(), tiny_batches("llama"), progress=False)


def test_a_curve_is_the_mean_of_each_epoch() -> None:
    assert Learning([1.0, 3.0, 5.0]).curve(2) == [2.0, 5.0]
