"""A way to store weights, and one to select inputs, that actkit does not know: registered, they work like its own."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch
from tiny_models import build
from torch import nn

from actkit.core.edit.edits import Replace, apply_edit, describe
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground import registry
from actkit.core.ground.errors import ActkitError
from actkit.core.layers.linear import ActLinear, pack_for_decode
from actkit.core.layers.selections import Selection
from actkit.core.layers.weights import DenseWeight, IntegerWeight, WeightStorage, widened
from actkit.core.measure.decoding import choose_engine
from actkit.core.measure.generation import generate_ids
from actkit.core.measure.summary import summarise
from actkit.core.model.anatomy import anatomy
from actkit.core.store import checkpoint
from actkit.core.store.pretrained import record

IDS = torch.tensor([[3, 5, 7, 11, 2]])


class SignWeight(WeightStorage):
    """Signs and a scale per output: W = scale * sign."""

    kind = "sign"

    def __init__(self, signs: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.shape = tuple(signs.shape)
        self.register_buffer("signs", signs)
        self.register_buffer("scale", scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        return self.signs.nbytes + self.scale.nbytes

    def _values(self) -> torch.Tensor:
        return self.signs.to(self.dtype) * self.scale

    @classmethod
    def from_spec(cls, spec, shape, dtype):
        return cls(torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[0], 1, dtype=dtype))


class Positive(Selection):
    """Keeps what is above 0."""

    kind = "positive"

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        return x > 0

    @classmethod
    def from_spec(cls, spec, in_features):
        return cls()


@pytest.fixture
def registered(monkeypatch):
    own = {registry.WEIGHTS: SignWeight, registry.SELECTIONS: Positive}
    real = registry._entries

    def entries(group):
        found = dict(real(group))
        if group in own:
            cls = own[group]
            found[cls.kind] = (EntryPoint(cls.kind, f"{__name__}:{cls.__name__}", group),)
        return found

    monkeypatch.setattr(registry, "_entries", entries)
    registry._load.cache_clear()
    yield
    registry._load.cache_clear()


def changed():
    """A Llama whose down projections hold signs and read what is positive; and the same as plain modules."""
    model, plain, edits = build("llama"), build("llama"), []
    for linear in [each for block in anatomy(model).blocks for each in block.linears() if each.role == "down"]:
        weight = linear.weight.detach()
        stored = SignWeight(weight.sign().to(torch.int8), weight.abs().mean(1, keepdim=True))
        edits.append(Replace(linear.path, ActLinear.of(linear, weight=stored, select=Positive())))
        layer = plain.get_submodule(linear.path)
        with torch.no_grad():
            layer.weight.copy_(weight.sign() * weight.abs().mean(1, keepdim=True))
        layer.register_forward_pre_hook(lambda module, args: (args[0].clamp(min=0),))
    described = [describe(edit) for edit in edits]
    for edit in edits:
        apply_edit(model, edit)
    record(model, described, [], "llama")
    return model, plain


def test_it_computes_saves_loads_and_writes_text(tmp_path, registered):
    model, plain = changed()
    with torch.no_grad():
        expected = first_tensor(forward(plain, {"input_ids": IDS}))
        torch.testing.assert_close(first_tensor(forward(model, {"input_ids": IDS})), expected)
        folder = checkpoint.save(model, tmp_path / "sign")
        loaded = checkpoint.load(folder)
        assert torch.equal(
            first_tensor(forward(loaded, {"input_ids": IDS})), first_tensor(forward(model, {"input_ids": IDS}))
        )
        with widened(loaded):
            torch.testing.assert_close(first_tensor(forward(loaded, {"input_ids": IDS})), expected)
    assert pack_for_decode(loaded) == 0  # no kernel knows it
    assert any("sign" in kind and "positive" in kind for kind in summarise(loaded).linears)
    assert anatomy(loaded).coverage().share == pytest.approx(anatomy(build("llama")).coverage().share)
    engine = choose_engine(loaded, capacity=12)
    tokens = list(generate_ids(loaded, IDS[0], max_new_tokens=4, end=(), decoder=engine.decoder))
    greedy = plain.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens == greedy[0, IDS.shape[1] :].tolist()


def test_where_it_is_not_registered_a_folder_says_so(tmp_path, registered, monkeypatch):
    folder = checkpoint.save(changed()[0], tmp_path / "sign")
    monkeypatch.undo()
    registry._load.cache_clear()
    with pytest.raises(ActkitError, match=r"the edits do not fit .*'(sign|positive)' is not known"):
        checkpoint.load(folder)


@pytest.mark.parametrize("grid", [IntegerGrid(4, 8), IntegerGrid(8, -1, symmetric=True)])
def test_every_kind_comes_back_from_its_spec(grid):
    layer = nn.Linear(16, 8)
    for weight in (DenseWeight(layer.weight), IntegerWeight.quantize(layer.weight, grid)):
        again = registry.weight_class(weight.kind).from_spec(weight.spec(), weight.shape, weight.dtype)
        assert type(again) is type(weight) and again.spec() == weight.spec()
        assert {name: each.shape for name, each in again.state_dict().items()} == {
            name: each.shape for name, each in weight.state_dict().items()
        }
