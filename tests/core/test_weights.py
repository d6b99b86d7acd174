"""A way to store weights, and one to select inputs, that actkit does not know: registered, they work like its own."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import pytest
import torch
from tiny_models import build
from torch import nn

from actkit.core.edit.edits import Replace, apply_edit, describe
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.grids.floats import FloatGrid, fp4, fp8, mxfp4, nvfp4
from actkit.core.grids.grid import Grid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.packing import pack_codes
from actkit.core.ground import registry
from actkit.core.ground.errors import ActkitError
from actkit.core.layers.linear import ActLinear, pack_for_decode
from actkit.core.layers.selections import Selection
from actkit.core.layers.weights import DenseWeight, FloatWeight, IntegerWeight, WeightStorage, widened
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


CODED = {
    "int4": IntegerGrid(4, 8),
    "int8": IntegerGrid(8, -1, symmetric=True),
    "int3, 16-bit scales": IntegerGrid(3, 8, scale_dtype="float16"),
    "int2 along outputs": IntegerGrid(2, 4, "output", scale_dtype="bfloat16"),
    "int6": IntegerGrid(6),
    "fp4": fp4(8),
    "fp8": fp8(),
    "mxfp4": mxfp4(),
    "nvfp4": nvfp4(),
    "e3m0 along outputs": FloatGrid(3, 0, 4, "output", scale_dtype="bfloat16"),
}


def coded(grid: Grid, tensor: torch.Tensor) -> IntegerWeight | FloatWeight:
    return (IntegerWeight if isinstance(grid, IntegerGrid) else FloatWeight).quantize(tensor, grid)


@pytest.mark.parametrize("grid", CODED.values(), ids=CODED)
@pytest.mark.parametrize("shape", [(8, 64), (1028, 512)])  # the second is widened in tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_stand_for_what_the_grid_rounds_to(grid, shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = coded(grid, tensor)
    assert torch.equal(stored.dequantize(), grid.fake(tensor))
    bits = grid.bits * tensor.numel() / 8
    parameters = stored.scale.numel() * {"float32": 4, "e8m0": 1, "e4m3": 1}.get(grid.scale_dtype, 2)
    assert stored.nbytes == bits + parameters + (stored.scale.numel() if grid.has_zeros else 0) + 4 * (
        grid.scale_dtype == "e4m3"
    )
    x, bias = torch.randn(20, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    with torch.no_grad():
        whole = nn.functional.linear(x, stored.dequantize(), bias)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]  # sums may be taken in another order
    torch.testing.assert_close(stored.linear(x, bias).detach(), whole, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(stored.linear(x, bias), whole, rtol=tolerance, atol=tolerance)
    again = type(stored).from_spec(json.loads(json.dumps(stored.spec())), stored.shape, dtype)
    again.load_state_dict(stored.state_dict())
    assert torch.equal(again.dequantize(), stored.dequantize()) and again.describe() == stored.describe()


def test_a_whole_weight_is_not_widened_for_many_rows():
    stored = coded(IntegerGrid(4, 64), torch.randn(4096, 512))
    largest, rows = [], type(stored).rows
    stored.rows = lambda tile: largest.append(rows(stored, tile)) or largest[-1]
    with torch.no_grad():
        stored.linear(torch.randn(64, 512), None)
    assert len(largest) == 8 and max(each.numel() for each in largest) == 1 << 18


def test_scales_that_16_bits_cannot_hold_stay_float32():
    weight = torch.randn(8, 64)
    for factor, kept in ((1.0, torch.float16), (1e-6, torch.float32), (1e6, torch.float32)):
        stored = IntegerWeight.quantize(factor * weight, IntegerGrid(4, 16, scale_dtype="float16"))
        assert stored.scale.dtype == kept
        assert stored.grid.scale_dtype == str(kept).removeprefix("torch.")
        assert torch.equal(stored.dequantize(), stored.grid.fake(factor * weight))


@pytest.mark.parametrize(("bits", "before"), [(2, 4), (3, 4), (4, 4), (5, 8), (6, 8), (8, 8)])
def test_folders_of_earlier_versions_are_read(bits, before):
    """They kept 2 and 3 bits in 4, and 5 to 7 in a byte, and did not say so."""
    new = IntegerWeight.quantize(torch.randn(8, 24), IntegerGrid(bits, 8))
    spec = {name: new.spec()[name] for name in ("kind", "bits", "group_size", "group_axis", "symmetric", "convention")}
    old = IntegerWeight.from_spec(spec, new.shape, new.dtype)
    old.load_state_dict(new.state_dict() | {"codes": pack_codes(new.integers(), before)})
    assert torch.equal(old.dequantize(), new.dequantize())
    assert old.spec()["stored_bits"] == before  # saved again it is what it was
    assert torch.equal(old.packed(False).dense(), new.packed(False).dense())


def test_shifted_columns_stand_for_less_by_powers_of_two():
    stored = coded(fp4(), torch.randn(1028, 512))
    shift = torch.randint(-3, 8, (512,), dtype=torch.int8)
    shifted = stored.shifted(shift)
    assert torch.equal(shifted.dequantize(), stored.dequantize() * 2.0**-shift)
    assert torch.equal(shifted.shifted(-shift).dequantize(), stored.dequantize())
    again = FloatWeight.from_spec(shifted.spec(), shifted.shape, shifted.dtype)
    again.load_state_dict(shifted.state_dict())
    assert torch.equal(again.dequantize(), shifted.dequantize())


@pytest.mark.parametrize("grid", CODED.values(), ids=CODED)
def test_every_kind_comes_back_from_its_spec(grid):
    layer = nn.Linear(32, 8)
    for weight in (DenseWeight(layer.weight), coded(grid, layer.weight)):
        again = registry.weight_class(weight.kind).from_spec(weight.spec(), weight.shape, weight.dtype)
        assert type(again) is type(weight) and again.spec() == weight.spec()
        assert {name: each.shape for name, each in again.state_dict().items()} == {
            name: each.shape for name, each in weight.state_dict().items()
        }
