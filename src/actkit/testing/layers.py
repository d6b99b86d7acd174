"""What every layer must satisfy that methods put into models: `check_layer`, one small function per property.

    from actkit.testing import check_layer

    def test_my_layer():
        check_layer(lambda: Clipped(nn.ReLU(), 1.5), [torch.randn(3, 5, 16)], original=nn.ReLU)

A layer is a plain `torch.nn.Module`. It is given as a function that makes it, so that two of them can be compared.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from actkit.core.forward.batch import first_tensor
from actkit.core.forward.hooks import evaluating
from actkit.core.ground import registry
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.layers.activation_function import ActivationFunction
from actkit.core.layers.activations import groups_of, mixes_of, record_of, says_what_it_mixes
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.selections import Selection
from actkit.core.layers.weights import WeightStorage
from actkit.testing.checks import (
    COMPILED,
    Check,
    NotApplicable,
    State,
    close,
    equal,
    in_dtype,
    random_numbers,
    run_checks,
    storages_of,
    tensors_in,
)
from actkit.testing.functions import check_function

CPU = torch.device("cpu")
FEW = 3  # records of a layer that holds many functions
OF_TORCH = frozenset(vars(nn.Module()))  # attributes that every module has


@dataclass(frozen=True)
class LayerCase:
    """What all checks share; most is as in `check_layer`.

    Attributes:
        make: builds the layer.
        inputs: what it is called with.
        original: builds what it replaces.
        shape: of the output.
        rows: the input may have any number of dimensions.
        smooth: its gradient is that of its function.
        compile_backend: for torch.compile; None for no check.
        export: check torch.export.
    """

    make: Callable[[], nn.Module]
    inputs: Sequence[Any]
    original: Callable[[], nn.Module] | None = None
    shape: Callable[[tuple[int, ...]], Sequence[int]] = tuple
    rows: bool = True
    smooth: bool = True
    compile_backend: str | None = None
    export: bool = False

    def made(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A new layer in evaluation mode; random values are those of every other one."""
        with own_random_numbers(CPU, 0):
            return self.make().eval().to(dtype)

    def outputs(self, layer: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """What a layer gives on each of the inputs, in evaluation mode without gradients."""
        with evaluating(layer):
            return [call(layer, in_dtype(copy.deepcopy(given), dtype)).detach() for given in self.inputs]

    @cached_property
    def expected(self) -> list[Tensor]:
        """The outputs of a new layer, in float32."""
        return self.outputs(self.made())


def check_layer(
    make: Callable[[], nn.Module],
    inputs: Iterable[Any],
    *,
    original: Callable[[], nn.Module] | None = None,
    shape: Callable[[tuple[int, ...]], Sequence[int]] = tuple,
    rows: bool = True,
    smooth: bool = True,
    compile_backend: str | None = None,
    export: bool = False,
) -> list[Check]:
    """Check everything that a layer promises.

    A class may say `compiles = False` or `exports = False`; and `trains = False` if it refuses gradients: it is called
    without then.

    Args:
        make: builds the layer in float32, at settings at which it does something.
        inputs: what it is called with: tensors, tuples of arguments or dicts of keywords, in float32.
        original: builds what stands in its place in the unchanged model, as `from_spec` is given it.
        shape: the shape of the output for that of the first input; the same one by default.
        rows: the input is [..., channels] with any number of dimensions before the last.
        smooth: its gradient is that of its function; False for one that rounds or passes gradients by.
        compile_backend: check torch.compile too ('aot_eager' is fast, 'inductor' the real thing).
        export: check torch.export too.

    Returns:
        What was checked, and what did not apply and why.

    Raises:
        AssertionError: it begins with the name of the first property that fails.
    """
    case = LayerCase(make, list(inputs), original, shape, rows, smooth, compile_backend, export)
    return run_checks(CHECKS, case)


def call(layer: nn.Module, given: Any) -> Tensor:
    """Call a layer with a tensor, a tuple of arguments or a dict of keywords, and return its first output."""
    args, kwargs = _arguments(given)
    return first_tensor(layer(*args, **kwargs))


# -- the properties ----------------------------------------------------------------------------------------------------


def same_result_twice(case: LayerCase) -> None:
    """A call in evaluation mode gives the same in any order; layer, inputs and random numbers stay as they were."""
    layer = case.made()
    before, numbers = State.of(layer), random_numbers()
    first = case.outputs(layer)
    assert random_numbers() == numbers, "a call in evaluation mode draws random numbers"
    before.compare(layer, "after a call in evaluation mode")
    given = copy.deepcopy(case.inputs)
    with evaluating(layer):
        again = [call(layer, each) for each in reversed(given)][::-1]
    equal(tensors_in(given), tensors_in(case.inputs), "after a call its inputs")
    equal(again, first, "the outputs in another order")
    if first[0].is_floating_point():
        with _as_in_training(layer):
            close([call(layer, each).detach() for each in given], first, "the output with gradients on")


def shapes_are_as_promised(case: LayerCase) -> None:
    """The output has the promised shape, however rows are arranged before the last dimension, and if there are none."""
    layer = case.made()
    for given, output in zip(case.inputs, case.expected, strict=True):
        x = _first(given)
        promised = tuple(case.shape(tuple(x.shape)))
        assert output.shape == promised, f"{tuple(output.shape)} for {tuple(x.shape)}, {promised} was promised"
        if not case.rows:
            continue
        flat, rows = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
        with evaluating(layer):
            for part, expected in ((flat, rows), (flat[0], rows[0]), (flat[:1, None], rows[:1, None])):
                close([call(layer, part)], [expected], f"the output for {tuple(part.shape)}")
            empty = call(layer, flat[:0])
        assert empty.shape == rows[:0].shape, f"{tuple(empty.shape)} for {tuple(flat[:0].shape)}"


def class_is_true(case: LayerCase) -> None:
    """`mixes`: what an output depends on besides its own input. `gives_zeros = True`: some outputs are exactly 0."""
    layer = case.made()
    says, zeros = says_what_it_mixes(layer), getattr(layer, "gives_zeros", False)
    if not (says or zeros):
        raise NotApplicable("its class says neither `mixes` nor gives_zeros = True")
    for given, output in zip(case.inputs, case.expected, strict=True):
        assert not zeros or bool((output == 0).any()), "gives_zeros: no output is 0"
        if says:
            _mixes_no_more(layer, _first(given), output, mixes_of(layer) or ())


def _mixes_no_more(layer: nn.Module, x: Tensor, output: Tensor, mixes: Sequence[str]) -> None:
    """Inputs [batch, channels] or [batch, positions, channels] alone give what they give among others."""
    with evaluating(layer):
        for seed in range(3) if not mixes else ():
            changed = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
            others = call(layer, torch.where(changed, x + 1, x))
            close([others[~changed]], [output[~changed]], "element-wise: the output once other inputs have changed")
        if "batch" not in mixes and x.dim() > 1:
            close([call(layer, x[:1])], [output[:1]], f"mixes = {mixes}: the output for one of the batch")
        if "positions" not in mixes and x.dim() == 3:
            close([call(layer, x[:, :1])], [output[:, :1]], f"mixes = {mixes}: the output for one position")


def record_is_true(case: LayerCase) -> None:
    """What `record()` answers, of some groups too, computes what the layer does, and `check_function` holds it."""
    layer = case.made(torch.float64)
    groups, dim = groups_of(layer), getattr(layer, "dim", -1)
    asked = {record: group for group in (None, *range(groups)) if (record := _record(layer, group)) is not None}
    if not asked:
        raise NotApplicable("it is no activation function with a record")
    for record, group in list(asked.items())[:FEW]:
        for given, output in zip(case.inputs, case.outputs(layer, torch.float64), strict=True):
            expected = record.function(_first(given).double())
            if group is not None:
                expected, output = (each.chunk(groups, dim)[group] for each in (expected, output))
            close([expected], [output], "the function of its record", 1e-6)
        check_function(record)


def _record(layer: nn.Module, group: int | None) -> ActivationFunction | None:
    return record_of(layer, group) if says_what_it_mixes(layer) else None


def large_inputs_stay_finite(case: LayerCase) -> None:
    """In float16 and bfloat16 an activation function is finite at inputs of 1e4, and so is its gradient, if it fits."""
    if not says_what_it_mixes(case.made()):
        raise NotApplicable("it is no activation function")
    x = torch.where(_first(case.inputs[0]) < 0, -1e4, 1e4)
    with evaluating(wide := case.made(torch.float64)):
        exact = call(wide, x.double())
    for dtype in (torch.float16, torch.bfloat16):
        large = x.to(dtype).requires_grad_()
        output = call(case.made(dtype), large)
        fits = exact.abs() < torch.finfo(dtype).max / 2
        assert bool(torch.isfinite(output[fits]).all()), f"at 1e4 in {dtype} an output that fits is not finite"
        if output.requires_grad:
            output[fits].float().sum().backward()
            assert large.grad is None or bool(torch.isfinite(large.grad).all()), f"its gradient at 1e4 in {dtype}"


def dtype_is_kept(case: LayerCase) -> None:
    """The output has the dtype of layer and inputs, what `keeps` names is float32; float32 agrees with float64."""
    for dtype in (torch.float32, torch.bfloat16):
        made = case.made(dtype)
        for name in getattr(made, "keeps", ()):
            kept = getattr(made, name, None)
            known = isinstance(kept, Tensor | None) and hasattr(made, name)  # a buffer, if it is not learned
            assert known, f"keeps: {name!r} is no parameter"
            assert kept is None or kept.dtype == torch.float32, f"{name} is {kept.dtype} in a {dtype} layer"
        for output in case.outputs(made, dtype):
            if not output.is_floating_point():
                raise NotApplicable("its outputs are no floats")
            assert output.dtype == dtype, f"the output is {output.dtype} in a {dtype} layer"
            assert bool(torch.isfinite(output).all()), f"the output holds NaN or Inf in a {dtype} layer"
    wide = case.outputs(case.made(torch.float64), torch.float64)
    assert wide[0].dtype == torch.float64, f"the output is {wide[0].dtype} in a float64 layer"
    if case.smooth:  # a value at a step may fall to either side of it
        close([output.double() for output in case.expected], wide, "the float32 output", 1e-4)


def gradients_match_differences(case: LayerCase) -> None:
    """In float64, the gradients of inputs and trainable parameters are those of finite differences."""
    if not getattr(case.made(), "trains", True):
        raise NotApplicable("its class says trains = False")
    if not case.smooth:
        raise NotApplicable("its gradient is said not to be that of its function (smooth=False)")
    if not case.expected[0].is_floating_point():
        raise NotApplicable("its outputs are no floats")
    layer = case.made(torch.float64)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    tensors = [layer.get_parameter(name).detach().clone() for name in names]
    given = in_dtype(case.inputs[0], torch.float64)
    args, kwargs = _arguments(given)
    places: list[int | str] = [*range(len(args)), *kwargs]
    wanted = [at for at in places if _is_float(args[at] if isinstance(at, int) else kwargs[at])]
    tensors += [(args[at] if isinstance(at, int) else kwargs[at]).detach().clone() for at in wanted]
    if not tensors:
        raise NotApplicable("neither inputs nor trainable parameters are floats")

    def output(*values: Tensor) -> Tensor:
        now = dict(zip(wanted, values[len(names) :], strict=True))
        positional = tuple(now.get(at, arg) for at, arg in enumerate(args))
        named = {key: now.get(key, value) for key, value in kwargs.items()}
        return first_tensor(functional_call(layer, dict(zip(names, values, strict=False)), positional, named))

    for tensor in tensors:
        tensor.requires_grad_()
    with own_random_numbers(CPU, 0):  # the directions
        try:
            torch.autograd.gradcheck(output, tensors, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
        except RuntimeError as error:
            of = ", ".join([*names, *(f"input {at}" for at in wanted)])
            raise AssertionError(f"of {of}: {' '.join(str(error).split())[:300]}") from error


def runs_under_autocast(case: LayerCase) -> None:
    """Under torch.autocast inputs in float32 and bfloat16 give finite outputs and gradients."""
    if not case.expected[0].is_floating_point():
        raise NotApplicable("its outputs are no floats")
    for dtype in (torch.float32, torch.bfloat16):
        layer = case.made()
        for given in case.inputs:
            given = in_dtype(given, dtype)
            leaves = [tensor.requires_grad_() for tensor in tensors_in(given) if tensor.is_floating_point()]
            with torch.autocast("cpu", torch.bfloat16), _as_in_training(layer):
                output = call(layer, given)
            assert output.dtype in (torch.float32, torch.bfloat16), f"the output is {output.dtype}"
            assert bool(torch.isfinite(output).all()), f"the output holds NaN or Inf for {dtype} inputs"
            if output.requires_grad:
                output.float().sum().backward()
            for tensor in (*leaves, *layer.parameters()):
                assert tensor.grad is None or bool(torch.isfinite(tensor.grad).all()), f"a gradient is NaN for {dtype}"
                tensor.requires_grad_(False).grad = None


def _as_in_training(layer: nn.Module) -> AbstractContextManager[Any]:
    """With gradients, unless the class of a layer refuses them."""
    return nullcontext() if getattr(layer, "trains", True) else torch.no_grad()


def nothing_is_shared(case: LayerCase) -> None:
    """Two layers, and a layer and its copy, share no memory; using and changing one leaves the other as it was."""
    used, other = case.made(), case.made()
    copied = copy.deepcopy(used)
    for what, second in (("another layer", other), ("a deep copy", copied)):
        shared = storages_of(used).keys() & storages_of(second).keys()
        assert not shared, f"{what} shares {storages_of(used)[min(shared)]}"
    equal(case.outputs(copied), case.expected, "the outputs of a deep copy")
    used.train()
    for given in case.inputs:
        with _as_in_training(used):
            output = call(used, given)
        if output.requires_grad:
            output.sum().backward()
    with torch.no_grad():
        for tensor in _stored(used).values():
            if tensor.is_floating_point():
                tensor.mul_(0.5).add_(0.25)
    for what, second in (("another layer", other), ("a deep copy", copied), ("a new layer", case.made())):
        equal(case.outputs(second), case.expected, f"once a layer was used and changed, the outputs of {what}")


def state_holds_everything(case: LayerCase) -> None:
    """A state dict, by way of a file, gives another layer the same outputs; no tensor is a plain attribute."""
    layer = case.made()
    case.outputs(layer)
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if name not in OF_TORCH and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                where = f"{path}.{name}".removeprefix(".")
                raise AssertionError(f"{where} is a tensor in a plain attribute; make it a parameter or a buffer")
    _move(layer)
    other = case.made()
    _load(other, layer)
    equal(case.outputs(other), case.outputs(layer), "the outputs of a layer that loaded the state")


def settings_are_json(case: LayerCase) -> None:
    """`spec()` gives a dict that JSON gives back as it was."""
    spec = _spec(case.made())
    assert isinstance(spec, dict), f"spec() gave a {type(spec).__name__}, not a dict"
    try:
        again = json.loads(json.dumps(spec, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"spec() gave {spec}: {error}") from error
    assert again == spec, f"JSON gives {again} back for {spec}"


def rebuilt_from_settings(case: LayerCase) -> None:
    """Settings and state dict rebuild the layer, in float32 and bfloat16, under the name that it is registered by."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = case.made(dtype)
        _move(layer)
        spec = json.loads(json.dumps(_spec(layer)))
        original = None if case.original is None else case.original().eval().to(dtype)
        build: Any = type(layer)
        rebuilt = build.from_spec(copy.deepcopy(spec), original).eval()
        assert type(rebuilt) is type(layer), f"from_spec() built a {type(rebuilt).__name__}"
        assert _spec(rebuilt) == spec, f"the rebuilt layer's spec() is {_spec(rebuilt)}, it was {spec}"
        _load(rebuilt, layer)
        equal(case.outputs(rebuilt, dtype), case.outputs(layer, dtype), f"the outputs of the rebuilt {dtype} layer")
    name = registry.module_name(type(layer))
    found = registry.module_class(name)
    assert found is type(layer), f"{name!r} is registered for {found.__module__}:{found.__name__}"


def compiles(case: LayerCase) -> None:
    """It runs under torch.compile(fullgraph=True)."""
    if case.compile_backend is None:
        raise NotApplicable("it was not requested (compile_backend=)")
    layer = case.made()
    if not getattr(layer, "compiles", True):
        raise NotApplicable("its class says compiles = False")
    torch.compiler.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, dynamic=False, backend=case.compile_backend)  # type: ignore[arg-type]
    _close_or_equal(case.outputs(compiled), case.expected, "the output of the compiled layer")


def exports(case: LayerCase) -> None:
    """torch.export makes a program of it that computes the same."""
    if not case.export:
        raise NotApplicable("it was not requested (export=)")
    layer = case.made()
    if not getattr(layer, "exports", True):
        raise NotApplicable("its class says exports = False")
    args, kwargs = _arguments(case.inputs[0])
    with evaluating(layer):
        program = torch.export.export(layer, args, kwargs, strict=False).module()
        found = first_tensor(program(*args, **kwargs))
    _close_or_equal([found], case.expected[:1], "the output of the exported program")


CHECKS: dict[str, Callable[[LayerCase], None]] = {
    "the same result twice": same_result_twice,
    "the shapes are as promised": shapes_are_as_promised,
    "what its class says is true": class_is_true,
    "its record is true": record_is_true,
    "large inputs stay finite": large_inputs_stay_finite,
    "the dtype is kept": dtype_is_kept,
    "gradients match differences": gradients_match_differences,
    "it runs under autocast": runs_under_autocast,
    "nothing is shared between layers": nothing_is_shared,
    "the state holds everything": state_holds_everything,
    "settings are JSON": settings_are_json,
    "it is rebuilt from its settings": rebuilt_from_settings,
    "it compiles": compiles,
    "it exports": exports,
}


# -- how layers are read and filled ------------------------------------------------------------------------------------


def _arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Mapping):
        return (), dict(given)
    return given if isinstance(given, tuple) else (given,), {}


def _first(given: Any) -> Tensor:
    return tensors_in(given)[0]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _spec(layer: nn.Module) -> Any:
    if isinstance(layer, Selection | RoundedInputs | WeightStorage):
        raise NotApplicable("it is a slot of a layer, and is rebuilt with it")
    if not (hasattr(layer, "spec") and hasattr(layer, "from_spec")):
        raise NotApplicable("it has no spec() and from_spec(), so it stands in no checkpoint")
    if registry.model_name(type(layer)) is not None:
        raise NotApplicable("it is registered as a model; check_model checks how it is rebuilt")
    return layer.spec()  # type: ignore[operator]


def _stored(layer: nn.Module) -> dict[str, Tensor]:
    """What the state dict holds: the tensors themselves."""
    return layer.state_dict(keep_vars=True)


def _move(layer: nn.Module) -> None:
    """Other values than the layer was made with, so that what is not loaded shows."""
    with torch.no_grad():
        for tensor in _stored(layer).values():
            if tensor.is_floating_point():
                tensor.mul_(0.75)


def _load(layer: nn.Module, source: nn.Module) -> None:
    """Empty a layer, and give it the state of another by way of a file's bytes; dtypes must be those of the source."""
    with torch.no_grad():
        for tensor in _stored(layer).values():
            tensor.zero_()
    state = {name: tensor.detach().clone().contiguous() for name, tensor in source.state_dict().items()}
    for name, tensor in layer.state_dict().items():
        assert name not in state or tensor.dtype == state[name].dtype, (
            f"{name} is {tensor.dtype}, not {state[name].dtype}"
        )
    layer.load_state_dict(safetensors.torch.load(safetensors.torch.save(state)), strict=True)


def _close_or_equal(found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    if expected[0].is_floating_point():
        close(found, expected, what, COMPILED)
    else:
        equal(found, expected, what)
