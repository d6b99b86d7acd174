"""ActLinear's slots and their stacks against the sums written out in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.keeps_dtype import KeepsDtype, kept_parameters
from actkit.core.layers.linear import ActLinear, LowRank, pack_for_decode
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.selections import Threshold, TopK
from actkit.core.layers.weights import DenseWeight, IntegerWeight

OUT, IN, RANK = 9, 14, 3
GRIDS = {
    "dense": None,
    "int8": IntegerGrid(8, 7),
    "int4": IntegerGrid(4, -1),
    "int3_outputs": IntegerGrid(3, 3, "output"),
    "int4_symmetric": IntegerGrid(4, 2, "input", True),
}
SELECTS = ("none", "threshold", "scored_threshold", "top_k", "scored_top_k")
CORRECTIONS = ("none", "all", "dropped")


def source(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype)


def score() -> Tensor:
    return torch.rand(IN, generator=torch.Generator().manual_seed(3)) + 0.1


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def selection(kind: str):
    if kind == "none":
        return None
    weights = score() if kind.startswith("scored") else None
    return Threshold(0.6, weights) if kind.endswith("threshold") else TopK(5, weights)


def mask_by_hand(kind: str, x: np.ndarray) -> np.ndarray:
    """Which inputs are kept, row by row."""
    rank = np.abs(x) * (score().numpy() if kind.startswith("scored") else np.float32(1))
    if kind == "none":
        return np.ones(x.shape, bool)
    if kind.endswith("threshold"):
        return rank > np.float32(0.6)
    kept = np.zeros(x.shape, bool)
    for row in np.ndindex(x.shape[:-1]):
        kept[row][np.argsort(-rank[row], kind="stable")[:5]] = True
    return kept


def low_rank(of: str) -> LowRank | None:
    generator = torch.Generator().manual_seed(2)
    parts = torch.randn(OUT, RANK, generator=generator), torch.randn(RANK, IN, generator=generator)
    return None if of == "none" else LowRank(*parts, of=of)  # type: ignore[arg-type]


def layer(weight: str = "dense", select: str = "none", correction: str = "none", bias: bool = True) -> ActLinear:
    linear = source(bias)
    grid = GRIDS[weight]
    stored = None if grid is None else IntegerWeight.quantize(linear.weight, grid)
    return ActLinear.of(linear, weight=stored, select=selection(select), correction=low_rank(correction))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("weight", GRIDS)
def test_every_stack_of_slots(weight, select, correction, bias):
    changed, x = layer(weight, select, correction, bias), inputs(2, 5)
    linear, grid = source(bias), GRIDS[weight]
    w = (linear.weight if grid is None else grid.fake(linear.weight)).detach().double().numpy()
    exact = x.double().numpy()
    kept = np.where(mask_by_hand(select, x.numpy()), exact, 0)
    expected = kept @ w.T
    if bias:
        expected = expected + linear.bias.detach().double().numpy()
    if correction != "none":
        part = low_rank(correction)
        left, right = part.left.detach().double().numpy(), part.right.detach().double().numpy()
        expected = expected + (exact if correction == "all" else exact - kept) @ right.T @ left.T
    with torch.no_grad():
        np.testing.assert_allclose(changed(x).double().numpy(), expected, rtol=1e-5, atol=1e-5)
    rebuilt = ActLinear.from_spec(changed.spec())
    assert {k: (v.shape, v.dtype) for k, v in rebuilt.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in changed.state_dict().items()
    }
    rebuilt.load_state_dict(changed.state_dict())
    assert rebuilt.spec() == changed.spec()
    with torch.no_grad():
        assert torch.equal(rebuilt(x), changed(x))


HOW = (  # bits, of what a scale is, half_step, symmetric
    *((8, "token", False, True), (8, "token", True, True), (8, "tensor", False, True)),
    *((6, "token", False, True), (4, "token", False, False), (5, "tensor", False, False)),
)


def rounded(
    bits: int = 8, per: str = "token", half_step: bool = False, symmetric: bool = True, **moved
) -> RoundedInputs:
    """Inputs on a grid of tokens, or on one with the step 0.02."""
    if per == "token":
        return RoundedInputs(IntegerGrid(bits, symmetric=symmetric, half_step=half_step), **moved)
    zero = None if symmetric else torch.tensor([100], dtype=torch.uint8)
    grid = IntegerGrid(bits, symmetric=symmetric, scope="tensor", half_step=half_step)
    return RoundedInputs(grid, torch.tensor([0.02]), zero, **moved)


def rounded_by_hand(x: np.ndarray, bits: int, per: str, half_step: bool, symmetric: bool) -> np.ndarray:
    """The formulas of core/grids/integers.py, token by token, in float32 as they are computed."""
    found, middle, top = np.zeros(x.shape), 2 ** (bits - 1), 2**bits - 1
    for row in np.ndindex(x.shape[:-1]):
        low, high = min(x[row].min(), np.float32(0)), max(x[row].max(), np.float32(0))
        step = (
            np.abs(x[row]).max() / np.float32(middle - (0.5 if half_step else 1))
            if symmetric
            else (high - low) / np.float32(top)
        )
        step = np.float32(0.02) if per == "tensor" else step
        zero = middle if symmetric else 100 if per == "tensor" else -np.round(low / step)
        found[row] = (np.clip(np.round(x[row] / step) + zero, 0, top) - zero) * np.float64(step)
    return found


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("weight", ["dense", "int4", "int8 rows"])
def test_rounded_inputs(weight, how, moved, correction):
    linear, x = source(), inputs(2, 5)
    grid = IntegerGrid(8, symmetric=True) if weight == "int8 rows" else GRIDS[weight]
    stored = None if grid is None else IntegerWeight.quantize(linear.weight, grid)
    by = {"shift": score() - 0.6, "divisor": score()} if moved else {}
    part = low_rank("all") if correction else None
    changed = ActLinear.of(linear, weight=stored, correction=part, inputs=rounded(*how, **by))
    w = (linear.weight if grid is None else grid.fake(linear.weight)).detach().double().numpy()
    given = x.numpy() if not moved else ((x - by["shift"]) / by["divisor"]).numpy()
    read = rounded_by_hand(given, *how)
    expected = read @ w.T + linear.bias.detach().double().numpy()
    if part is not None:  # of what the weight reads
        expected = expected + read @ part.right.detach().double().numpy().T @ part.left.detach().double().numpy().T
    with torch.no_grad():
        np.testing.assert_allclose(changed(x).double().numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(changed(x).detach().double().numpy(), expected, rtol=1e-5, atol=1e-5)  # no integers
    rebuilt = ActLinear.from_spec(changed.spec())
    rebuilt.load_state_dict(changed.state_dict())
    assert rebuilt.spec() == changed.spec()
    assert ActLinear.of(changed).inputs is changed.inputs
    with torch.no_grad():
        assert torch.equal(rebuilt(x), changed(x))
        if changed.pack():
            for rows in (1, 8):
                np.testing.assert_allclose(
                    changed(x[0, :1].expand(rows, IN)), expected[0, :1].repeat(rows, 0), rtol=1e-4, atol=1e-5
                )
    with pytest.raises(ValueError, match="cannot hold this layer's inputs"):
        changed.dense()


@pytest.mark.parametrize("weight", ["dense", "int8 rows"])
@pytest.mark.parametrize("select", SELECTS[1:])
def test_selected_inputs_are_rounded(select, weight):
    linear, x = source(), inputs(2)
    stored = IntegerWeight.quantize(linear.weight, IntegerGrid(8, symmetric=True)) if weight == "int8 rows" else None
    changed = ActLinear.of(linear, weight=stored, select=selection(select), inputs=rounded())
    kept = np.where(mask_by_hand(select, x.numpy()), x.numpy(), np.float32(0))
    read = rounded_by_hand(kept, 8, "token", False, True)
    expected = read @ changed.dequantized().detach().double().numpy().T + linear.bias.detach().double().numpy()
    with torch.no_grad():
        np.testing.assert_allclose(changed(x).double().numpy(), expected, rtol=1e-5, atol=1e-5)
        assert changed.pack()
        np.testing.assert_allclose(changed(x).double().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_integers_are_multiplied_as_integers(monkeypatch):
    """Only weights and inputs of 8 bits, whole rows, no zero points; without gradients; never dequantized."""
    calls = []
    monkeypatch.setattr(
        IntegerWeight, "_values", lambda self: calls.append(1) or torch.zeros(OUT, IN, dtype=self.dtype)
    )
    rows, x = IntegerGrid(8, symmetric=True), inputs(9)
    for grid, how, taken in ((rows, {}, True), (rows, {"per": "tensor"}, True), (rows, {"half_step": True}, True),
                             (rows, {"bits": 7}, False), (rows, {"symmetric": False}, False),
                             (IntegerGrid(8, 7, symmetric=True), {}, False), (IntegerGrid(8), {}, False),
                             (IntegerGrid(8, -1, "output", True), {}, False)):  # fmt: skip
        changed = ActLinear.of(source(), weight=IntegerWeight.quantize(source().weight, grid), inputs=rounded(**how))
        calls.clear()
        with torch.no_grad():
            changed(x)
            assert not calls if taken else calls
        calls.clear()
        changed(x.clone().requires_grad_())
        assert calls
        with torch.no_grad():
            calls.clear()
            changed.double()(x.double())
            assert calls


def test_the_gradient_goes_straight_through_rounded_inputs():
    changed, x = ActLinear.of(source(), inputs=rounded()), inputs(4).requires_grad_()
    upstream = torch.randn(4, OUT, generator=torch.Generator().manual_seed(5))
    (changed(x) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, upstream @ source().weight.detach())
    read = changed.inputs(x).detach()
    torch.testing.assert_close(changed.storage.tensor.grad, upstream.t() @ read)


def test_a_spec_of_earlier_versions_has_no_inputs():
    spec = layer("int4", "top_k").spec()
    del spec["inputs"]
    assert ActLinear.from_spec(spec).inputs is None


@pytest.mark.parametrize("select", SELECTS[1:])
def test_masks(select):
    x = inputs(3, 4)
    np.testing.assert_array_equal(selection(select).mask(x).numpy(), mask_by_hand(select, x.numpy()))


def test_threshold_is_strict_and_keeps_nan():
    x = torch.tensor([[0.5, -0.5, 0.5000001, float("nan"), float("inf"), 0.0]])
    assert Threshold(0.5).mask(x)[0].tolist() == [False, False, True, True, True, False]
    assert Threshold(0.0).mask(x)[0].tolist() == [True, True, True, True, True, False]
    assert torch.isnan(Threshold(0.5)(x)[0, 3])


def test_top_k_takes_the_first_of_equal_ones():
    x = torch.tensor([[1.0, -2.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [float("nan"), 1, 9, 8, 7]])
    assert TopK(3).mask(x).tolist() == [
        [True, True, True, False, False],
        [True, True, True, False, False],
        [True, False, True, True, False],
    ]
    assert not TopK(0).mask(x).any()
    assert TopK(99).mask(x).all()


def test_scores_do_not_underflow_in_half_precision():
    x = torch.full((1, 2), 1e-4, dtype=torch.float16)
    select = Threshold(5e-9, torch.tensor([1e-4, 1e-5]))  # the products 1e-8 and 1e-9 are zero in float16
    assert select.mask(x)[0].tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("select", SELECTS[1:])
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_equals_plain(rows, select, dtype):
    changed = ActLinear.of(source(dtype=dtype), select=selection(select))
    x = inputs(rows, dtype=dtype)
    with torch.no_grad():
        plain = changed(x)
        assert changed.pack()
        packed = changed(x)
        assert packed.dtype == dtype
        assert packed.shape == plain.shape
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(packed, plain, rtol=tolerance, atol=tolerance)
        exact = torch.where(changed.select.mask(x), x, 0).double() @ changed.dequantized().double().t()
        torch.testing.assert_close(packed.double(), exact + changed.bias.double(), rtol=tolerance, atol=tolerance)
        three = inputs(3, dtype=dtype)
        assert torch.equal(changed(three), ActLinear.of(changed)(three))  # too many rows for the kernel
    grown = inputs(rows, dtype=dtype).requires_grad_()
    changed(grown).sum().backward()  # with gradients it computes in torch
    assert grown.grad is not None
    changed.unpack()
    with torch.no_grad():
        assert torch.equal(changed(x), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("weight", [name for name, grid in GRIDS.items() if grid is not None])
def test_packed_integers_are_the_product_with_what_the_codes_stand_for(weight, select, dtype):
    linear = source(dtype=dtype)
    stored = IntegerWeight.quantize(linear.weight, GRIDS[weight])
    changed = ActLinear.of(linear, weight=stored, select=selection(select))
    exact = GRIDS[weight].fake(linear.weight).detach().double()
    assert changed.pack()
    kernel_rows = 8 if select == "none" else 2
    for rows in (1, 2, kernel_rows):
        x = inputs(rows, dtype=dtype)
        kept = x.double() if select == "none" else torch.where(changed.select.mask(x), x, 0).double()
        with torch.no_grad():
            found = changed(x)
        assert (found.dtype, found.shape) == (dtype, (rows, OUT))
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        expected = kept @ exact.t() + linear.bias.detach().double()
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    many = inputs(kernel_rows + 1, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(changed(many), ActLinear.of(changed)(many))  # too many rows for the kernel
    grown = inputs(1, dtype=dtype).requires_grad_()
    changed(grown).sum().backward()  # with gradients it computes in torch
    assert grown.grad is not None


@pytest.mark.parametrize("grid", [IntegerGrid(4, 32), IntegerGrid(8, -1), IntegerGrid(3, 5, "output")])
def test_a_large_weight_is_widened_piece_by_piece_alike(grid):
    weight = torch.randn(1030, 512, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        given = weight.to(dtype)
        assert torch.equal(IntegerWeight.quantize(given, grid).dequantize(), grid.fake(given).to(dtype))


@pytest.mark.parametrize("weight", ["int4", "int8", "int3_outputs"])
def test_a_packed_layer_adds_its_correction(weight):
    changed, x = layer(weight, "none", "all"), inputs(3)
    with torch.no_grad():
        expected = changed(x)
        assert changed.pack()
        torch.testing.assert_close(changed(x), expected, rtol=1e-5, atol=1e-5)
    assert not layer(weight, "none", "dropped").pack()


def test_what_cannot_be_packed():
    assert not layer("dense", "none").pack()
    for stored in ("dense", "int4"):
        assert not layer(stored, "threshold", "all").pack()
        assert not layer(stored, "threshold").double().pack()
        assert not layer(stored, "threshold").to("meta").pack()
    model = nn.Sequential(layer(select="threshold"), nn.ReLU(), layer("int4"), layer(select="top_k"), layer())
    assert pack_for_decode(model) == 3


def test_a_packed_copy_does_not_outlive_the_weight():
    x = inputs(1)
    other = {name: value + 1 for name, value in layer(select="threshold").state_dict().items()}
    for change in (lambda m: m.load_state_dict(other), lambda m: m.to(torch.bfloat16), lambda m: m.double()):
        changed = layer(select="threshold")
        changed.pack()
        change(changed)
        expected = copy.deepcopy(changed)
        expected.unpack()
        with torch.no_grad():
            given = x.to(changed.storage.dtype)
            assert torch.equal(changed(given), expected(given))


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("select", ["none", "scored_threshold", "top_k"])
def test_gradients(select, correction):
    changed, x = layer("dense", select, correction).double(), inputs(4, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(4, OUT, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (changed(x) * upstream).sum().backward()
    mask = torch.from_numpy(mask_by_hand(select, x.detach().float().numpy())).double()
    w, g, exact = source().weight.detach().double(), upstream.double(), x.detach().double()
    by_input = (g @ w) * mask
    if correction != "none":
        part = low_rank(correction)
        left, right = part.left.detach().double(), part.right.detach().double()
        seen = torch.ones_like(mask) if correction == "all" else 1 - mask
        by_input = by_input + (g @ left @ right) * seen
        torch.testing.assert_close(changed.correction.left.grad.double(), g.t() @ ((exact * seen) @ right.t()))
        torch.testing.assert_close(changed.correction.right.grad.double(), (g @ left).t() @ (exact * seen))
    torch.testing.assert_close(x.grad.double(), by_input)
    torch.testing.assert_close(changed.storage.tensor.grad.double(), g.t() @ (exact * mask))
    torch.testing.assert_close(changed.bias.grad.double(), g.sum(0))


def test_gradient_of_a_quantized_layer_goes_to_its_input():
    changed, x = layer("int4"), inputs(2).requires_grad_()
    changed(x).sum().backward()
    expected = GRIDS["int4"].fake(source().weight).detach().double().sum(0).expand(2, IN)
    torch.testing.assert_close(x.grad.double(), expected)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weight", ["dense", "int4", "int8"])
def test_dtype_changes_leave_scales_and_thresholds(weight, cast):
    changed = layer(weight, "scored_threshold", "all")
    before = {name: tensor.clone() for name, tensor in changed.named_buffers()}
    changed.to(cast)
    for name, buffer in changed.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer, before[name]), name
    x = inputs(3, dtype=cast)
    assert changed.dequantized().dtype == cast
    assert changed(x).dtype == cast
    assert changed.correction.left.dtype == changed.bias.dtype == cast
    assert changed.spec()["dtype"] == str(cast).removeprefix("torch.")


def test_keeps_dtype_inside_a_model():
    class Scale(KeepsDtype):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.register_buffer("scale", torch.tensor([1 / 3]))
            self.register_buffer("nothing", None)

    model = nn.Sequential(Scale()).half()
    assert model[0].inner.weight.dtype == torch.float16
    assert torch.equal(model[0].scale, torch.tensor([1 / 3]))
    assert model.to("meta")[0].scale.is_meta


def test_coefficients_are_never_rounded_below_float32():
    class Curve(KeepsDtype):
        keeps = ("coefficients",)

        def __init__(self) -> None:
            super().__init__()
            self.coefficients = nn.Parameter(torch.tensor([1 / 3, 0.7]))
            self.other = nn.Parameter(torch.tensor([1 / 3]))

    model = nn.Sequential(Curve(), nn.Linear(2, 2))
    curve, before = model[0], torch.tensor([1 / 3, 0.7])
    (curve.coefficients.sum() / 3 + curve.other.sum()).backward()
    parameter = curve.coefficients
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)
        assert curve.coefficients is parameter and torch.equal(parameter, before)
        assert parameter.grad.dtype == torch.float32 and torch.equal(parameter.grad, torch.full((2,), 1 / 3))
        assert curve.other.dtype == model[1].weight.dtype == curve.other.grad.dtype == dtype
    assert model.double()[0].coefficients.dtype == torch.float64
    assert torch.equal(model.bfloat16()[0].coefficients, before)
    assert kept_parameters(model) == ["0.coefficients"]
    assert model.to("meta")[0].coefficients.is_meta and curve.coefficients.dtype == torch.float32
    parameter.data = before.bfloat16()  # by another library's hand
    assert model.to(torch.bfloat16)[0].coefficients.dtype == torch.float32


def test_the_grid_is_kept_and_that_of_earlier_versions_is_known():
    spec = layer("int4").spec()
    assert ActLinear.from_spec(spec).storage.grid == GRIDS["int4"]
    del spec["weight"]["convention"]
    assert ActLinear.from_spec(spec).storage.grid == IntegerGrid(4, -1, convention="llm-awq")


def test_weights_and_biases_are_shared_not_copied():
    linear = source()
    changed = ActLinear.of(linear, select=Threshold(0.1))
    assert changed.storage.tensor is linear.weight
    assert changed.bias is linear.bias
    again = ActLinear.of(changed, correction=low_rank("all"))
    assert again.storage is changed.storage
    assert again.select is changed.select
    tied = nn.ModuleDict({"head": changed, "embedding": nn.Embedding(OUT, IN)})
    tied["embedding"].weight = linear.weight
    with torch.no_grad():
        tied["embedding"].weight.fill_(1.0)
    assert (changed.dequantized() == 1).all()


def test_conv1d():
    torch.manual_seed(0)
    conv = Conv1D(OUT, IN)  # weight [in, out]
    changed, x = ActLinear.of(conv), inputs(2, 3)
    exact = x.double() @ conv.weight.detach().double() + conv.bias.detach().double()
    torch.testing.assert_close(changed(x).double(), exact, rtol=1e-5, atol=1e-5)
    assert (changed.in_features, changed.out_features) == (IN, OUT)
    assert changed.storage.tensor.data_ptr() == conv.weight.data_ptr()
    dense = changed.dense()
    assert isinstance(dense, nn.Linear)
    torch.testing.assert_close(dense(x).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", GRIDS)
@pytest.mark.parametrize("bias", [True, False])
def test_dense(weight, bias):
    changed = layer(weight, bias=bias)
    plain, x = changed.dense(), inputs(9)  # fewer rows are computed from the codes
    assert torch.equal(plain.weight, changed.dequantized())
    with torch.no_grad():
        assert torch.equal(plain(x), changed(x))
    for full in (layer(weight, "top_k"), layer(weight, "none", "all")):
        with pytest.raises(ValueError, match="cannot hold"):
            full.dense()


def test_mode_and_gradient_flags_are_those_of_the_source():
    linear = source().eval()
    linear.weight.requires_grad_(False)
    changed = ActLinear.of(linear)
    assert not changed.training
    assert not changed.storage.tensor.requires_grad
    assert changed.bias.requires_grad


def test_bytes():
    assert layer("dense").weight_bytes == OUT * IN * 4
    # codes half a byte each (rows padded to whole bytes), one float32 scale and one zero point per row
    assert layer("int4").weight_bytes == OUT * ((IN + 1) // 2) + OUT * (4 + 1)
    assert layer("int8").weight_bytes == OUT * IN + OUT * 2 * (4 + 1)
    assert layer("dense", "none", "all").weight_bytes == (OUT * IN + RANK * (OUT + IN)) * 4
    assert layer("dense", "scored_threshold").bytes_per_token(0.5) == OUT * IN * 4 * 0.5 + IN * 4
    moved = ActLinear.of(source(), inputs=rounded(8, "tensor", divisor=torch.ones(IN)))
    assert moved.weight_bytes == moved.bytes_per_token() == OUT * IN * 4 + 4 + IN * 4


def test_empty_weight_has_the_shapes_of_a_quantized_one():
    for grid in (g for g in GRIDS.values() if g is not None):
        real, empty = IntegerWeight.quantize(source().weight, grid), IntegerWeight.empty((OUT, IN), grid, torch.float32)
        assert {k: (v.shape, v.dtype) for k, v in real.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in empty.state_dict().items()
        }


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Threshold(-1.0), "threshold: -1.0 was given"),
        (lambda: Threshold(float("nan")), "threshold: nan was given"),
        (lambda: TopK(-1), "k: -1 was given"),
        (lambda: LowRank(torch.zeros(4, 2), torch.zeros(3, 4)), "do not share a rank"),
        (lambda: ActLinear.of(source(), select=Threshold(0.1, torch.ones(IN + 1))), "select: its score has shape"),
        (lambda: ActLinear.of(source(), correction=LowRank(torch.zeros(4, 2), torch.zeros(2, IN))), "correction"),
        (lambda: ActLinear.of(source(), weight=DenseWeight(torch.zeros(IN, OUT))), "weight: .* was given"),
        (lambda: ActLinear(DenseWeight(torch.zeros(OUT, IN)), torch.zeros(IN)), "bias: it has shape"),
        (lambda: RoundedInputs(IntegerGrid(8, 7)), "grid: groups of 7 were given"),
        (lambda: RoundedInputs(IntegerGrid(8, scope="tensor")), "scale: none was given for a grid of the whole tensor"),
        (lambda: ActLinear.of(source(), inputs=rounded(shift=torch.ones(IN + 1))), "inputs: their shift has shape"),
        (
            lambda: ActLinear.of(source(), select=TopK(5), inputs=rounded(shift=torch.ones(IN))),
            "inputs: they are shifted, and some are selected",
        ),
        (
            lambda: ActLinear.of(layer("dense", "top_k", "dropped"), inputs=rounded()),
            "inputs: the layer selects inputs and corrects what that loses",
        ),
        (
            lambda: ActLinear.from_spec({**layer().spec(), "inputs": {"kind": "dice"}}),
            "inputs: 'dice' is not known. Known are learned, rounded",
        ),
        (
            lambda: ActLinear.from_spec({**layer().spec(), "weight": {"kind": "fp1"}}),
            "weights: 'fp1' is not known. Known are dense, float, half_integer, integer, latent",
        ),
        (
            lambda: ActLinear.from_spec({**layer().spec(), "select": {"kind": "coin", "score": False}}),
            "selections: 'coin' is not known",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("channels", [1, 5, 64])
def test_top_k_is_what_a_stable_sort_keeps(channels):
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(3, 40, channels, generator=generator).mul(2).round()  # many are equal
    weights = torch.rand(channels, generator=generator).round(decimals=1)
    for k in (0, 1, channels // 2, channels - 1, channels, channels + 1):
        for score in (None, weights):
            scores = x.abs().numpy() * (1 if score is None else score.numpy())
            kept = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
            expected = np.zeros(x.shape, bool)
            np.put_along_axis(expected, kept, True, axis=-1)
            assert np.array_equal(TopK(k, score).mask(x).numpy(), expected)
