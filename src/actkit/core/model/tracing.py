"""The anatomy of any module, found from one traced forward pass.

Every tensor carries its origins: which layers (linear or convolution) it comes from, and through which nonlinearity.
A layer's output starts afresh; norms, sums, reshapes, pooling and dropout pass origins on; a nonlinearity marks them;
a second one, softmax and whatever gives integers end them. What a layer finds at its input makes the chains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.layers.activations import says_what_it_mixes
from actkit.core.model.channel_axes import ChannelAxes, axis_of_class
from actkit.core.model.parts import CONVOLUTIONS, is_linear

# names of torch functions and methods; a trailing underscore (in place) is dropped before the look-up
# fmt: off
NONLINEAR = frozenset([
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "gelu", "silu", "mish", "sigmoid", "logsigmoid",
    "hardsigmoid", "hardswish", "hardtanh", "tanh", "tanhshrink", "elu", "selu", "celu", "softplus", "softsign",
    "softshrink", "hardshrink", "threshold", "erf", "exp", "sin", "cos", "abs", "square", "pow", "clamp",
    "clamp_min", "clamp_max", "clip", "sign", "where", "maximum", "minimum",
])
# fmt: on
ENDS = frozenset(["softmax", "log_softmax", "argmax", "argmin", "topk", "sort", "multinomial", "bernoulli"])

Pass = tuple[str, int]  # a nonlinearity that was passed: its name, and which of its calls
Origins = Mapping[str, Pass | None]  # layer path -> the nonlinearity passed since, or None


@dataclass(frozen=True)
class Trace:
    """What one traced pass found.

    Attributes:
        inputs: groups of linear layers that read the same tensor, in the order of the pass.
        chains: (first, nonlinearity, second), layers by path.
        dimensions: how many dimensions the input of each layer had.
        axes: what is known of the first tensor at the ('input' or 'output', path) of every module that ran.
    """

    inputs: tuple[tuple[str, ...], ...]
    chains: tuple[tuple[str, str, str], ...]
    dimensions: Mapping[str, int]
    axes: Mapping[tuple[str, str], Axis]


@dataclass(frozen=True)
class Axis:
    """Where the channels of a tensor are.

    Attributes:
        dimensions: how many the tensor has; the most, if the calls of its module differ.
        channels: the dimension that holds the channels; None if that is not known, or if the calls of its module
            differ in it or in the number of channels.
        width: how many channels it has; None if `channels` is.
    """

    dimensions: int
    channels: int | None
    width: int | None


def trace(model: nn.Module, example: Any) -> Trace:
    """Run a model once in evaluation mode and watch.

    Args:
        model: any module; what it raises is passed on.
        example: a dict of keywords, or the one argument.

    Raises:
        UnsupportedModelError: the model is compiled or sharded.
    """
    layers = {path for path, module in model.named_modules() if is_linear(module) or isinstance(module, CONVOLUTIONS)}
    inner = {path for path, _ in model.named_modules() if any(path.startswith(layer + ".") for layer in layers)}
    origins = _Origins({path for path, _ in model.named_modules()} - _around(layers), model)
    watched = [path for path, _ in model.named_modules() if path not in inner]
    watcher = _Watcher(origins, layers)
    before = {path: watcher.before(path) for path in watched}
    after = {path: watcher.after(path) for path in watched}
    with evaluating(model), hooked(model, before=before, after=after), origins:
        forward(model, example)
    linears = [path for path in watcher.calls if is_linear(model.get_submodule(path))]
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path in linears:  # shared means: the same tensor at every call, not only at one of them
        groups.setdefault(tuple(watcher.calls[path]), []).append(path)
    return Trace(
        tuple(map(tuple, groups.values())), tuple(dict.fromkeys(watcher.chains)), watcher.dimensions, watcher.axes
    )


def _around(layers: Iterable[str]) -> set[str]:
    """The layers and every module that contains one."""
    return {path for layer in layers for path in _prefixes(layer)}


def _prefixes(path: str) -> Iterator[str]:
    yield ""
    parts = path.split(".")
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


class _Origins(TorchFunctionMode):
    """Follows the origins of tensors through every torch function."""

    def __init__(self, free: set[str], model: nn.Module) -> None:
        super().__init__()
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        self.free = {path for path in free if path and not isinstance(model.get_submodule(path), containers)}
        self.of: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.axes = ChannelAxes()
        self.stack: list[Pass] = []  # the running modules, outermost first
        self.numbers = count()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").rstrip("_")
        self.axes.follow(name, args, kwargs or {}, result)
        found = self.merged((args, kwargs))
        if found:
            self.give(args[0] if name.endswith("setitem") else result, self._through(name, found))
        return result

    def merged(self, values: Any) -> dict[str, Pass | None]:
        """The origins of all tensors in `values`; for one that came both ways, that through the nonlinearity."""
        merged: dict[str, Pass | None] = {}
        for tensor in tensors(values):
            for path, passed in self.of.get(tensor, {}).items():
                merged[path] = merged.get(path) or passed
        return merged

    def give(self, values: Any, origins: Origins) -> None:
        for tensor in tensors(values):
            if tensor.is_floating_point():
                self.of[tensor] = origins

    def _through(self, name: str, found: Origins) -> Origins:
        if name in ENDS:
            return {}
        return self.marked(found, self.module_in_charge() or (name, next(self.numbers))) if name in NONLINEAR else found

    def marked(self, found: Origins, passing: Pass) -> Origins:
        """After a nonlinearity; what passed another one before is forgotten."""
        return {path: passing for path, passed in found.items() if passed in (None, passing)}

    def module_in_charge(self) -> Pass | None:
        """The outermost running module without layers inside: a user's own activation class counts as one."""
        return next((running for running in self.stack if running[0] in self.free), None)


class _Watcher:
    """What happens at the calls of modules."""

    def __init__(self, origins: _Origins, layers: set[str]) -> None:
        self.origins, self.layers = origins, layers
        self.calls: dict[str, list[tuple[Any, ...]]] = {}
        self.chains: list[tuple[str, str, str]] = []
        self.dimensions: dict[str, int] = {}
        self.axes: dict[tuple[str, str], Axis] = {}
        self._kept: list[Tensor] = []  # so that no storage is reused under the same key

    def before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.origins.stack.append((path, next(self.origins.numbers)))
            self._see_axis("input", path, module, next(tensors((args, kwargs)), None))
            if path in self.layers:
                x = next(tensors((args, kwargs)))
                self._kept.append(x)
                self.calls.setdefault(path, []).append(_identity(x))
                self.dimensions[path] = x.dim()
                origins = self.origins.merged(x)
                self.chains += [(first, passed[0], path) for first, passed in origins.items() if passed is not None]

        return hook

    def after(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            running = self.origins.stack.pop()
            x, y = next(tensors((args, kwargs)), None), next(tensors(output), None)
            axes = self.origins.axes
            if x is not None and y is not None and path in self.origins.free and x.shape == y.shape:
                axes.give(y, axes.of(x) if axes.of(y) is None else None)  # what it does cannot be followed
            self._see_axis("output", path, module, y)
            if path in self.layers:
                self.origins.give(output, {path: None})
            elif path in self.origins.free and (
                says_what_it_mixes(module) or not any(x in self.origins.of for x in tensors(output))
            ):
                # it says that it is an activation, though it may be made of products and sums; or what it does cannot
                # be followed (an autograd.Function, an own operator)
                passing = self.origins.module_in_charge() or running
                self.origins.give(output, self.origins.marked(self.origins.merged((args, kwargs)), passing))

        return hook

    def _see_axis(self, where: str, path: str, module: nn.Module, x: Tensor | None) -> None:
        if x is None:
            return
        if self.origins.axes.of(x) is None and x.is_floating_point():
            self.origins.axes.give(x, axis_of_class(module))
        axis = (
            x.dim() - 1 if 0 < x.dim() <= 2 else self.origins.axes.of(x)
        )  # rows: the channels are last, whatever stands before them
        width = None if axis is None else x.shape[axis]
        known = self.axes.setdefault((where, path), Axis(x.dim(), axis, width))
        if known != Axis(x.dim(), axis, width):
            self.axes[where, path] = Axis(max(known.dimensions, x.dim()), None, None)


def _identity(x: Tensor) -> tuple[Any, ...]:
    """Equal for two views of the same values: same memory, same shape, not written in between."""
    version = 0 if x.is_inference() else x._version
    return x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride(), version


def tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors(value)
