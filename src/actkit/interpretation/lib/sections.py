"""Sections: a network cut into functions of its node layers, exactly without biases.

    node layer l = [c, f_l], c = 1        section: [c, f_l] -> [c, f_(l+1)], each bias b as c b

A constant coordinate carries the biases, so that a section at 0 is 0, which integrated gradients need to add up. A net
of linear layers, convolutions and element-wise functions in a row is cut before each layer with weights; the MLP of a
block of a transformer before its first layer, before its last, and behind it. The head of any other model is what
stands behind its last convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.model.anatomy import anatomy

Function = Callable[[Tensor, Tensor], Tensor]  # (values [rows, ...], constant [rows, 1]) -> values
WITH_WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d)
WITHOUT = (
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Hardtanh, nn.Identity, nn.Flatten),
    *(nn.AvgPool2d, nn.MaxPool2d, nn.Dropout),
)
TOLERANCE = 1e-5  # relative, of what the sections give together, beside the model
ROUGH = 5e-2  # the same of models in 16 bits, which round between their layers


@dataclass(frozen=True)
class Sections:
    """Functions one behind the other.

    Attributes:
        functions: each maps [rows, 1 + width] to [rows, 1 + next width], the constant first.
        shapes: of the values of each node layer, the last one the output.
        names: of the node layers.
    """

    functions: tuple[Callable[[Tensor], Tensor], ...]
    shapes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.functions)

    @property
    def widths(self) -> list[int]:
        """Values of each node layer."""
        return [torch.Size(shape).numel() for shape in self.shapes]

    def start(self, x: Tensor) -> Tensor:
        """Inputs as the first node layer: float64 [rows, 1 + width].

        Args:
            x: [rows, ...].
        """
        flat = x.flatten(1).double()
        return torch.cat((torch.ones_like(flat[:, :1]), flat), 1)

    def nodes(self, x: Tensor) -> list[Tensor]:
        """All node layers, the output last, each [rows, 1 + width].

        Args:
            x: [rows, ...].
        """
        found = [self.start(x)]
        for function in self.functions:
            found.append(function(found[-1]))
        return found

    def rest(self, nodes: Tensor, layer: int) -> Tensor:
        """Run from a node layer to the output: [rows, outputs], without the constant.

        Args:
            nodes: of the layer, [rows, 1 + width].
            layer: its number.
        """
        for function in self.functions[layer:]:
            nodes = function(nodes)
        return nodes[:, 1:]


def sections_of(
    model: nn.Sequential | Sequence[nn.Module], x: Tensor, *, starts: Sequence[int] | None = None
) -> Sections:
    """Cut a net before each layer with weights.

    Args:
        model: modules in a row; one with modules in a row inside counts as these.
        x: some inputs [rows, ...].
        starts: numbers of the modules, all in one row, that begin a section; None for each with weights.

    Returns:
        Its sections.

    Raises:
        ValueError: `starts` do not rise from 0, or are beyond the modules.
        UnsupportedModelError: a module is of another kind, no layer has weights, or a section does not repeat what the
            model gives.
    """
    modules = _flat(model)
    weighted = [at for at, module in enumerate(modules) if isinstance(module, WITH_WEIGHTS)]
    if not weighted:
        raise UnsupportedModelError("model: no layer in it has weights; give linear layers or convolutions in a row.")
    weighted[0] = 0  # what stands before the first one belongs to it
    bounds = [*(weighted if starts is None else starts), len(modules)]
    if bounds != sorted(set(bounds)) or bounds[0] != 0:
        raise ValueError(f"starts: {list(starts or ())} were given; give rising numbers from 0, below {len(modules)}.")
    parts = [modules[a:b] for a, b in pairwise(bounds)]
    values, functions, shapes = x.double(), [], [tuple(x.shape[1:])]
    for part in parts:
        shape = shapes[-1]
        functions.append(_joined(part, shape))
        one = torch.ones(len(values), 1, dtype=torch.float64)
        with torch.no_grad():
            for module in part:
                values = _apply(module, values, one)
        shapes.append(tuple(values.shape[1:]))
    names = ["input", *(f"layer {at}" for at in range(1, len(parts))), "output"]
    found = Sections(tuple(functions), tuple(shapes), tuple(names))
    with torch.no_grad():
        wanted = x
        for module in modules:
            wanted = module(wanted)
    _check(found, x, wanted)
    return found


def mlp_sections(model: nn.Module, block: int) -> Sections:
    """Cut the MLP of a transformer's block: before it, before its last layer, and behind it.

    Args:
        model: with a plain MLP in that block, gated or not.
        block: its number.

    Returns:
        Two sections; the node layers are the MLP's input, its hidden values and its output.

    Raises:
        ValueError: there is no such block.
        UnsupportedModelError: the block has no plain MLP, or its first layer is one with the gate.
    """
    view = anatomy(model)
    if view.blocks and not 0 <= block < len(view.blocks):
        raise ValueError(f"block: {block} was given, and the model has 0 to {len(view.blocks) - 1}; give one of these.")
    mlps = dict(view.block(block).mlps()) if view.blocks else {}
    mlp = mlps.get(None)
    if mlp is None or mlp.up_rows is not None or view.architecture == "traced":
        raise UnsupportedModelError(
            f"block: {block} of {type(model).__name__} has no plain MLP of layers of its own; choose another "
            f"block or model."
        )
    up, gate, down = (
        None if layer is None else model.get_submodule(layer.path) for layer in (mlp.up, mlp.gate, mlp.down)
    )
    act = model.get_submodule(mlp.activation)
    if type(act).__name__ == "BloomGelu":  # whose own backward pass torch.func does not take
        act = nn.GELU("tanh")

    def hidden(nodes: Tensor) -> Tensor:
        one, x = nodes[:, :1], nodes[:, 1:]
        first = _apply(up, x, one)
        made = act(first) if gate is None else act(_apply(gate, x, one)) * first
        return torch.cat((one, made), 1)

    def output(nodes: Tensor) -> Tensor:
        return torch.cat((nodes[:, :1], _apply(down, nodes[:, 1:], nodes[:, :1])), 1)

    widths = [mlp.up.weight.shape[1], mlp.down.weight.shape[1], mlp.down.weight.shape[0]]  # [out, in], Conv1D's too
    return Sections((hidden, output), tuple((width,) for width in widths), ("input", "hidden", "output"))


@dataclass(frozen=True)
class Head:
    """The last layers of a model.

    Attributes:
        sections: of them.
        paths: of the modules.
        model: that they belong to.
    """

    sections: Sections
    paths: tuple[str, ...]
    model: nn.Module

    def inputs(self, batch: Any) -> Tensor:
        """Read what its first layer gets: [rows, ...].

        Args:
            batch: for the model.
        """
        found: list[Tensor] = []

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_rows(module, next(iter((*args, *kwargs.values())))))

        with evaluating(self.model), torch.no_grad(), hooked(self.model, before={self.paths[0]: read}):
            forward(self.model, batch)
        return found[0]


def head_of(model: nn.Module, batch: Any, *, start: str | None = None) -> Head:
    """Find the layers at the end of a model, and cut them before each with weights.

    Args:
        model: whose last modules are called one behind the other, as an MLP's and a CNN's are.
        batch: some inputs.
        start: the path of the module that it begins with; None for the first linear layer with no other layer than
            linear and element-wise ones behind it.

    Returns:
        Its sections and the paths of its modules.

    Raises:
        ValueError: no module of that path is called.
        UnsupportedModelError: what comes last is no such row of layers, or gives another output than the model.
    """
    called: list[str] = []
    firsts: list[Tensor] = []

    def note(path: str) -> Any:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.append(path)
            firsts.append(next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), torch.empty(0)))

        return read

    leaves = {path: note(path) for path, module in model.named_modules() if path and not any(module.children())}
    with evaluating(model), torch.no_grad(), hooked(model, before=leaves):
        wanted = first_tensor(forward(model, batch))
    modules = [model.get_submodule(path) for path in called]
    if start is None:
        allowed = (nn.Linear, *WITHOUT)
        at = next((i + 1 for i in reversed(range(len(called))) if not isinstance(modules[i], allowed)), 0)
        at = next((i for i in range(at, len(called)) if isinstance(modules[i], nn.Linear)), len(called))
    elif start in called:
        at = called.index(start)
    else:
        raise ValueError(f"start: {start!r} was given; modules that are called are {', '.join(called[-12:])}.")
    if at == len(called):
        raise UnsupportedModelError(
            f"model: {type(model).__name__} does not end in linear layers and element-wise functions, each a module; "
            f"give an MLP, a CNN with such a head, or a transformer."
        )
    x = _rows(modules[at], firsts[at])
    sections = sections_of(modules[at:], x)
    _check(sections, x, _rows(modules[-1], wanted))
    return Head(sections, tuple(called[at:]), model)


def distance(made: Tensor, wanted: Tensor) -> float:
    """How far values are from others, beside the largest of these.

    Args:
        made: any shape.
        wanted: the same shape.
    """
    return float((made - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-12))


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer reads vectors, however many dimensions stand before."""
    return x.flatten(0, -2) if isinstance(module, nn.Linear) and x.dim() > 2 else x


def _flat(model: nn.Sequential | Sequence[nn.Module]) -> list[nn.Module]:
    found: list[nn.Module] = []
    for module in model:
        if isinstance(module, nn.Sequential):
            found += _flat(module)
        elif isinstance(module, (*WITH_WEIGHTS, *WITHOUT)):
            found.append(module)
        else:
            raise UnsupportedModelError(
                f"model: a {type(module).__name__} is in it, whose biases are not known; give linear "
                f"layers, convolutions, pooling and element-wise functions in a row."
            )
    return found


def _joined(modules: list[nn.Module], shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def function(nodes: Tensor) -> Tensor:
        one, x = nodes[:, :1], nodes[:, 1:].unflatten(1, shape)
        for module in modules:
            x = _apply(module, x, one)
        return torch.cat((one, x.flatten(1)), 1)

    return function


def _apply(module: nn.Module | None, x: Tensor, one: Tensor) -> Tensor:
    """A module in float64, its bias times the constant."""
    assert module is not None
    if type(module).__name__ == "Conv1D":  # of transformers, weight [in, out]
        weights = dict(module.named_parameters())
        return x @ weights["weight"].detach().double() + one * weights["bias"].detach().double()
    if not isinstance(module, WITH_WEIGHTS):
        return x if isinstance(module, nn.Dropout) else module(x)  # type: ignore[no-any-return]
    weight = module.weight.detach().double()
    if isinstance(module, nn.Linear):
        made = x @ weight.T
        return made if module.bias is None else made + one * module.bias.detach().double()
    convolve = nn.functional.conv1d if isinstance(module, nn.Conv1d) else nn.functional.conv2d
    settings = (module.stride, module.padding, module.dilation, module.groups)
    made = convolve(x, weight, None, *settings)  # type: ignore[arg-type]
    if module.bias is None:
        return made
    spread = (-1, *(1,) * (made.dim() - 1))
    return made + one.view(spread) * module.bias.detach().double().view(1, -1, *(1,) * (made.dim() - 2))


def _check(sections: Sections, x: Tensor, wanted: Tensor) -> None:
    with torch.no_grad():
        found = sections.nodes(x)[-1][:, 1:]
    off = distance(found, wanted.flatten(1))
    if not off <= (TOLERANCE if wanted.dtype in (torch.float32, torch.float64) else ROUGH):
        raise UnsupportedModelError(
            f"model: its sections give another output than it does, off by {off:.1e} of the largest; put it in "
            f"evaluation mode."
        )
