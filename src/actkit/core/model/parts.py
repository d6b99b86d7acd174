"""The parts of a model that methods handle: linear layers, norms, attention, MLP, experts, and the block around them.

All are handles: they hold a module and its full path, copy nothing, and describe the model as it is when they are
made. After edits, `Anatomy.block(i)` reads the block again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from actkit.core.ground.errors import CoverageError, UnsupportedModelError
from actkit.core.layers.attention_function import function_of
from actkit.core.layers.conv import PLAIN_CONVOLUTIONS, ActConv, why_no_plain_convolution
from actkit.core.layers.conv1d import is_conv1d
from actkit.core.layers.known_layers import why_unread
from actkit.core.layers.linear import ActLinear
from actkit.core.model.architectures import ExpertsRow, Role
from actkit.core.model.fused_layers import PartRows
from actkit.core.model.sites import Pairs, Site, Tap

LinearRole = Literal["query", "key", "value", "query_key_value", "output", "gate", "up", "gate_up", "down", "layer"]
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    ActConv,
)
WATCHED = "actkit watches "  # before the name of an attention function that is watched inside for a while


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer that actkit can read: nn.Linear, transformers' Conv1D or ActLinear.

    Args:
        module: any; what may compute something else behind a weight (`known_layers.why_unread`) is not.
    """
    if isinstance(module, ActLinear):
        return type(module).forward is ActLinear.forward
    return (isinstance(module, nn.Linear) or is_conv1d(module)) and why_unread(module) is None


@dataclass(frozen=True)
class Linear:
    """A linear layer of the model.

    Attributes:
        path: of its module.
        role: what it computes in its block.
        module: nn.Linear, Conv1D or ActLinear.
        expert: the index of the expert that it belongs to, if it does.
    """

    path: str
    role: LinearRole
    module: nn.Module = field(repr=False)
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """The weight [out, in]: the parameter itself, a transposed view for Conv1D, dequantized for ActLinear.

        Raises:
            CoverageError: actkit does not read the module as a linear layer.
            UnsupportedModelError: the weight is on the meta device, as accelerate's offload leaves it.
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
        return weight.t() if is_conv1d(self.module) else weight

    @property
    def bias(self) -> Tensor | None:
        """The bias [out], or None."""
        return getattr(self.module, "bias", None)

    @property
    def in_features(self) -> int:
        """Channels of its input."""
        return self.module.nx if is_conv1d(self.module) else self.module.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """Channels of its output."""
        return self.module.nf if is_conv1d(self.module) else self.module.out_features  # type: ignore[return-value]


@dataclass(frozen=True)
class Convolution:
    """A convolution of a traced model.

    Attributes:
        path: of its module.
        module: Conv1d, Conv2d or ActConv.
    """

    path: str
    module: Any = field(repr=False)

    @property
    def weight(self) -> Tensor:
        """The kernel laid out flat: [out, in / groups x kernel]."""
        return self.module.weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """The bias [out], or None."""
        return self.module.bias


@dataclass(frozen=True)
class LinearInput:
    """Linear layers that read one and the same tensor.

    Attributes:
        site: of the tensor.
        linears: the layers.
    """

    site: Site
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Norm:
    """A norm.

    Attributes:
        path: of its module.
        module: computes it.
        role: what reads it ('both': attention and MLP).
        offset: added to its weight before use (1 in Gemma).
        feeds_residual: the residual stream reads it too (post-norm).
    """

    path: str
    module: nn.Module = field(repr=False)
    role: Role = "other"
    offset: float = 0.0
    feeds_residual: bool = False


@dataclass(frozen=True)
class Attention:
    """Attention: query, key and value, or query_key_value.

    Attributes:
        path: of its module, inside of what wraps it.
        module: computes it.
        query: a layer.
        key: a layer.
        value: a layer.
        query_key_value: one layer for all three.
        output: the layer that mixes the heads.
        heads: of the queries.
        key_value_heads: of key and value.
        head_dim: channels of a head.
        norm: produces its input; None if that comes from outside of the block (post-norm) or through a wrapper.
        value_rows: which output rows of query_key_value are the value's; None if that is not known, or value is a
            layer.
        limit: query, key and value are clamped to it before anything else; None for not at all.
        query_rows: which output rows of query_key_value are the query's, as `value_rows`.
        key_rows: the same of the key.
        pairs: which two features of query and key the rotary embedding turns together; None if there is none.
        head_norms: query and key go through norms.
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
    query_rows: PartRows | None = None
    key_rows: PartRows | None = None
    pairs: Pairs | None = None
    head_norms: bool = False

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The layers that read `attention.input`."""
        return tuple(x for x in (self.query, self.key, self.value, self.query_key_value) if x is not None)


@dataclass(frozen=True)
class Mlp:
    """An MLP: down(activation(up)), or down(activation(gate) * up) if it is gated.

    Attributes:
        path: of its module, inside of what wraps it.
        module: computes it.
        gate: a layer, or None.
        up: a layer; one that computes gate and up has the role gate_up.
        down: a layer.
        activation: path of the nonlinearity.
        norm: produces its input, as in Attention.
        up_rows: the rows of up, if one layer computes gate and up.
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
        """Return the site at which its zeros are seen: its gate, or without one its activation's output."""
        return Site("mlp.gate" if self.gated else "mlp.hidden", block, expert)


@dataclass(frozen=True)
class Experts:
    """A choice of MLPs.

    Attributes:
        path: of the module that holds them, inside of what wraps it.
        module: 3-D parameters, or the ExpertList that they were opened as.
        router: path of the module that chooses.
        count: how many there are.
        members: their MLPs, if they are opened.
        norm: feeds router and experts, as in Attention.
        row: how the parameters are stored.
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
    """Two layers of a traced model with a nonlinearity, and nothing else but norms, sums and reshapes, between them.

    Attributes:
        first: a Linear, or the path of a convolution.
        nonlinearity: the path of its module, or the name of the function ('relu').
        second: as first.
    """

    first: Linear | str
    nonlinearity: str
    second: Linear | str


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        index: among the blocks.
        path: full path in the model ('' is the whole model, as a traced model is one block).
        module: stands there, with what wraps it.
        attention: None if there is none, or it is not described.
        mlp: None if there is none, or it is not described.
        experts: None if there are none.
        norms: all that the row names.
        other: linear layers that belong to none of these parts.
        chains: of traced models.
        root: the model.
        taps: how each site of the block is read.
    """

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
    _limit: frozenset[str] | None = field(default=None, repr=False, compare=False)

    def limited(self, paths: frozenset[str]) -> Block:
        """Return the same block, as if it had these linear layers alone.

        That holds for what lists linear layers (`linears`, `linear_inputs`); its parts stay whole.

        Args:
            paths: of linear layers.
        """
        return replace(self, _limit=paths)

    def linear_inputs(self) -> tuple[LinearInput, ...]:
        """Return the tensors that linear layers read, in the order of computation, each with its layers.

        Layers of a kind that actkit does not read are left out; `coverage()` names them.
        """
        found = tuple(_readable(self._linear_inputs()))
        if self._limit is None:
            return found
        kept = ((each.site, tuple(x for x in each.linears if x.path in self._limit)) for each in found)
        return tuple(LinearInput(site, linears) for site, linears in kept if linears)

    def _linear_inputs(self) -> Iterator[LinearInput]:
        if self.attention is not None:
            yield LinearInput(Site("attention.input", self.index), self.attention.inputs)
            yield LinearInput(Site("attention.mixed", self.index), (self.attention.output,))
        for expert, mlp in self.mlps():
            yield LinearInput(Site("mlp.input", self.index, expert), mlp.inputs)
            yield LinearInput(_read_by(mlp.down, Site("mlp.hidden", self.index, expert)), (mlp.down,))
        yield from self.other

    def unread(self) -> tuple[tuple[str, str], ...]:
        """Return the paths of the block's linear layers that actkit does not read, each with the reason."""
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
        """Return the block's MLP with None, or its opened experts with their indices."""
        if self.mlp is not None:
            return ((None, self.mlp),)
        return () if self.experts is None else tuple(enumerate(self.experts.members))

    def norm_readers(self) -> tuple[tuple[Norm | None, tuple[Linear, ...]], ...]:
        """Return the norm that produces the input of attention and of the MLP, with all layers that read it.

        If attention and MLP stand side by side behind one norm, that norm is there once.
        """
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
        """Return all linear layers that actkit can read, those of opened experts included."""
        return tuple(linear for inputs in self.linear_inputs() for linear in inputs.linears)

    def convolutions(self) -> tuple[Convolution, ...]:
        """Return the plain convolutions of a traced model.

        A family with a row may call its own by their weights alone.
        """
        if self.path or self._limit is not None:  # one of several blocks, read off a row; or single layers are meant
            return ()
        return tuple(
            Convolution(f"{self.path}.{path}".removeprefix("."), module)
            for path, module in self.module.named_modules()
            if isinstance(module, (*PLAIN_CONVOLUTIONS, ActConv)) and why_no_plain_convolution(module) is None
        )

    def sites(self) -> tuple[Site, ...]:
        """Return the sites that a module of the model is given or gives; attention.weights only if they are formed.

        attention.scores are read by that name.
        """
        formed = forms_weights(self.root)
        given = (site for site in self.taps if site.name != "attention.scores")
        return tuple(site for site in given if formed or site.name != "attention.weights")

    def original(self, path: str) -> nn.Module:
        """Return the module that stood at a path before the run replaced it; else the module itself.

        What was set in it before that is in it: a scale that was folded into it belongs to what it computes now.

        Args:
            path: full path in the model.
        """
        if self._originals is not None and path in self._originals:
            return self._originals[path]
        return self.root.get_submodule(path)


def rotation_site(linear: Linear) -> Site | None:
    """Return the site of what a layer's weight is multiplied with, if the layer rotates its inputs first.

    Args:
        linear: the layer.
    """
    inputs = linear.module.inputs if isinstance(linear.module, ActLinear) else None
    rotates = inputs is not None and inputs.rotation is not None
    return Site("layer.output", path=f"{linear.path}.inputs.rotation") if rotates else None


def _read_by(linear: Linear, site: Site) -> Site:
    """Where to see what the weight of a layer reads, which is called at `site`."""
    return rotation_site(linear) or site


def _readable(groups: Iterator[LinearInput]) -> Iterator[LinearInput]:
    for group in groups:
        linears = tuple(linear for linear in group.linears if is_linear(linear.module))
        if linears:
            yield LinearInput(group.site, linears)


def attention_implementation(model: nn.Module) -> str | None:
    """Return the name of the attention implementation of a transformers model; also while it is watched inside."""
    config: Any = getattr(model, "config", None)
    name: str | None = getattr(config, "_attn_implementation", None)
    return name if name is None else name.removeprefix(WATCHED)


def forms_weights(model: nn.Module) -> bool:
    """Say whether the model's attention forms its weights, so that they can be read."""
    function = function_of(model)
    return attention_implementation(model) == "eager" if function is None else function.forms_weights(model)
