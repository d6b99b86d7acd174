"""The parts of a model that methods handle: linear layers, norms, attention, MLP, experts, and the block around them.

All are handles: they hold a module and its full path, copy nothing, and describe the model as it is when they are
made. After edits, `Anatomy.block(i)` reads the block again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from actkit.core.ground.errors import CoverageError, UnsupportedModelError
from actkit.core.layers.conv import PLAIN_CONVOLUTIONS, ActConv, why_no_plain_convolution
from actkit.core.layers.known_layers import why_unread
from actkit.core.layers.linear import ActLinear
from actkit.core.model.architectures import ExpertsRow, Role
from actkit.core.model.fused_layers import PartRows
from actkit.core.model.sites import Site, Tap

LinearRole = Literal["query", "key", "value", "query_key_value", "output", "gate", "up", "gate_up", "down", "layer"]
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    ActConv,
)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer that actkit can read: nn.Linear, transformers' Conv1D or ActLinear.

    What may compute something else behind a weight (`known_layers.why_unread`) is not.
    """
    if isinstance(module, ActLinear):
        return type(module).forward is ActLinear.forward
    return isinstance(module, nn.Linear | Conv1D) and why_unread(module) is None


@dataclass(frozen=True)
class Linear:
    """A linear layer of the model. expert: its index where the layer belongs to an expert."""

    path: str
    role: LinearRole
    module: nn.Module = field(repr=False)
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """[out, in]: the parameter itself, transposed view for Conv1D, dequantized for ActLinear.

        Raises CoverageError for a module that actkit does not read as a linear layer, UnsupportedModelError for one
        whose weight is on the meta device, as accelerate's offload leaves it.
        """
        if any(tensor.is_meta for tensor in (*self.module.parameters(), *self.module.buffers())):
            raise UnsupportedModelError(
                f"{self.path}: its weight is read here, and is not in place: accelerate offloads it, or it was never "
                f"loaded. Load the model without offload for this (without device_map, or with enough max_memory)."
            )
        if isinstance(self.module, ActLinear):
            return self.module.dequantized()
        if not is_linear(self.module):
            reason = why_unread(self.module)
            raise CoverageError(
                f"{self.path}: a {type(self.module).__name__} stands here, whose weight actkit does not read"
                f"{'' if reason is None else f' ({reason})'}. "
                f"Leave it out, or undo what replaced the linear layer."
            )
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.t() if isinstance(self.module, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:
        """[out], or None."""
        return getattr(self.module, "bias", None)

    @property
    def in_features(self) -> int:
        """Channels of its input."""
        return self.module.nx if isinstance(self.module, Conv1D) else self.module.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """Channels of its output."""
        return self.module.nf if isinstance(self.module, Conv1D) else self.module.out_features  # type: ignore[return-value]


@dataclass(frozen=True)
class Convolution:
    """A convolution of a traced model: Conv1d, Conv2d or ActConv."""

    path: str
    module: Any = field(repr=False)

    @property
    def weight(self) -> Tensor:
        """The kernel laid out flat: [out, in / groups x kernel]."""
        return self.module.weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """[out], or None."""
        return self.module.bias


@dataclass(frozen=True)
class LinearInput:
    """Linear layers that read one and the same tensor, the one at `site`."""

    site: Site
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Norm:
    """A norm. role: what reads it ('both': attention and MLP). offset: added to its weight before use (1 in Gemma).
    feeds_residual: post-norm."""

    path: str
    module: nn.Module = field(repr=False)
    role: Role = "other"
    offset: float = 0.0
    feeds_residual: bool = False


@dataclass(frozen=True)
class Attention:
    """Attention: query, key and value, or query_key_value.

    norm: what its input comes from, None where that is outside the block (post-norm). value_rows: which output rows of
    query_key_value are the value's, None where that is not known (and where value is a layer of its own). limit: to
    which query, key and value are clamped before anything else, None for not at all.
    """

    path: str
    module: nn.Module = field(repr=False)
    query: Linear | None
    key: Linear | None
    value: Linear | None
    query_key_value: Linear | None
    output: Linear
    heads: int
    key_value_heads: int
    head_dim: int
    norm: Norm | None
    value_rows: PartRows | None = None
    limit: float | None = None

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The layers that read `attention.input`."""
        return tuple(x for x in (self.query, self.key, self.value, self.query_key_value) if x is not None)


@dataclass(frozen=True)
class Mlp:
    """down(activation(up)), or down(activation(gate) * up) where gated. activation: path of the nonlinearity.

    up_rows: where one layer computes gate and up, it stands as `up` with the role gate_up, and these are up's rows.
    """

    path: str
    module: nn.Module = field(repr=False)
    gate: Linear | None
    up: Linear
    down: Linear
    activation: str
    norm: Norm | None
    up_rows: PartRows | None = None

    @property
    def gated(self) -> bool:
        """Whether it has a gate, as a layer of its own or fused with up."""
        return self.gate is not None or self.up_rows is not None

    @property
    def width(self) -> int:
        """The number of hidden units."""
        return self.down.in_features

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The layers that read `mlp.input`."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def zeros_at(self, block: int, expert: int | None = None) -> Site:
        """Where its zeros are seen: at its gate, or without one at its activation's output."""
        return Site("mlp.gate" if self.gated else "mlp.hidden", block, expert)


@dataclass(frozen=True)
class Experts:
    """A choice of MLPs. module: 3-D parameters, or the ExpertList they were opened as; then `members` are its MLPs.

    router: path of the module that chooses. norm: what feeds router and experts. row: how the parameters are stored.
    """

    path: str
    module: nn.Module = field(repr=False)
    router: str
    count: int
    members: tuple[Mlp, ...]
    norm: Norm | None
    row: ExpertsRow = field(repr=False)


@dataclass(frozen=True)
class Chain:
    """Traced models: first -> nonlinearity -> second, with nothing but norms, sums and reshapes between.

    first, second: a Linear, or the path of a convolution. nonlinearity: the path of its module, or the name of the
    function ('relu').
    """

    first: Linear | str
    nonlinearity: str
    second: Linear | str


@dataclass(frozen=True)
class Block:
    """One block. path: full path in the model ('' is the whole model, as a traced model is one block)."""

    index: int
    path: str
    module: nn.Module = field(repr=False)
    attention: Attention | None
    mlp: Mlp | None
    experts: Experts | None
    norms: tuple[Norm, ...]
    other: tuple[LinearInput, ...] = ()
    chains: tuple[Chain, ...] = ()
    root: nn.Module = field(default=None, repr=False, compare=False)  # type: ignore[assignment]
    taps: Mapping[Site, Tap] = field(default_factory=dict, repr=False, compare=False)
    _originals: Mapping[str, nn.Module] | None = field(default=None, repr=False, compare=False)

    def linear_inputs(self) -> tuple[LinearInput, ...]:
        """The tensors that linear layers read, in the order of computation, each with its layers.

        Layers of a kind that actkit does not read are left out; `coverage()` names them.
        """
        return tuple(_readable(self._linear_inputs()))

    def _linear_inputs(self) -> Iterator[LinearInput]:
        if self.attention is not None:
            yield LinearInput(Site("attention.input", self.index), self.attention.inputs)
            yield LinearInput(Site("attention.mixed", self.index), (self.attention.output,))
        for expert, mlp in self.mlps():
            yield LinearInput(Site("mlp.input", self.index, expert), mlp.inputs)
            yield LinearInput(Site("mlp.hidden", self.index, expert), (mlp.down,))
        yield from self.other

    def unread(self) -> tuple[tuple[str, str], ...]:
        """Paths of the block's linear layers that actkit does not read, each with the reason."""
        found = {linear.path: linear.module for group in self._linear_inputs() for linear in group.linears}
        known = {id(module) for module in found.values()}
        found |= {
            f"{self.path}.{path}".removeprefix("."): module
            for path, module in self.module.named_modules()
            if path and id(module) not in known and why_unread(module) is not None
        }
        standing = {path: why_unread(module) for path, module in found.items() if not is_linear(module)}
        return tuple(
            (
                path,
                reason or f"a {type(found[path]).__name__} stands there, which actkit does not read as a linear layer",
            )
            for path, reason in standing.items()
        )

    def mlps(self) -> tuple[tuple[int | None, Mlp], ...]:
        """The block's MLP with None, or its opened experts with their indices."""
        if self.mlp is not None:
            return ((None, self.mlp),)
        return () if self.experts is None else tuple(enumerate(self.experts.members))

    def norm_readers(self) -> tuple[tuple[Norm | None, tuple[Linear, ...]], ...]:
        """Of attention and MLP: the norm that produces their input, with all layers that read it; where attention and
        MLP stand side by side behind one norm, that norm once."""
        found: list[tuple[Norm | None, tuple[Linear, ...]]] = []
        for part in (self.attention, self.mlp):
            if part is None:
                continue
            if found and part.norm is not None and found[-1][0] == part.norm:
                found[-1] = (part.norm, found[-1][1] + part.inputs)
            else:
                found.append((part.norm, part.inputs))
        return tuple(found)

    def nonlinearities(self) -> tuple[str, ...]:
        """Return the paths of the activation functions of MLPs (of opened experts too) and chains, each once.

        A function that is no module goes by its name, such as 'relu'.
        """
        found = [mlp.activation for _, mlp in self.mlps()] + [chain.nonlinearity for chain in self.chains]
        return tuple(dict.fromkeys(found))

    def around(self, nonlinearity: str) -> tuple[str, ...]:
        """Return the paths of the linear layers and convolutions that an activation function stands between.

        Args:
            nonlinearity: one of `nonlinearities()`; any other path has none.
        """
        found = [x.path for _, mlp in self.mlps() if mlp.activation == nonlinearity for x in (*mlp.inputs, mlp.down)]
        ends = [end for x in self.chains if x.nonlinearity == nonlinearity for end in (x.first, x.second)]
        found += [end if isinstance(end, str) else end.path for end in ends]
        return tuple(dict.fromkeys(found))

    def linears(self) -> tuple[Linear, ...]:
        """All linear layers that actkit can read, those of opened experts included."""
        return tuple(linear for inputs in self.linear_inputs() for linear in inputs.linears)

    def convolutions(self) -> tuple[Convolution, ...]:
        """The plain convolutions of a traced model; a family with a row may call its own by their weights alone."""
        if self.path:  # one of several blocks, read off a row
            return ()
        return tuple(
            Convolution(f"{self.path}.{path}".removeprefix("."), module)
            for path, module in self.module.named_modules()
            if isinstance(module, (*PLAIN_CONVOLUTIONS, ActConv)) and why_no_plain_convolution(module) is None
        )

    def sites(self) -> tuple[Site, ...]:
        """The sites that can be read now (attention.weights only where the implementation forms them)."""
        return tuple(site for site in self.taps if site.name != "attention.weights" or forms_weights(self.root))

    def original(self, path: str) -> nn.Module:
        """The module that stood at `path` (full path) before the run replaced it; else the module itself.

        What was set in it before that is in it: a scale that was folded into it belongs to what it computes now.
        """
        if self._originals is not None and path in self._originals:
            return self._originals[path]
        return self.root.get_submodule(path)


def _readable(groups: Iterator[LinearInput]) -> Iterator[LinearInput]:
    for group in groups:
        linears = tuple(linear for linear in group.linears if is_linear(linear.module))
        if linears:
            yield LinearInput(group.site, linears)


def attention_implementation(model: nn.Module) -> str | None:
    """The name of the attention implementation of a transformers model."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None)


def forms_weights(model: nn.Module) -> bool:
    """Whether the model's attention forms its weights, so that they can be read."""
    return attention_implementation(model) == "eager"
