"""Anatomy: a typed view of a model, its stem, blocks and head, and in a block attention, MLP or experts, and norms.

Known families are read off a declarative row (`core/model/architectures.py`), any other module off one traced forward
pass (`core/model/tracing.py`): then the whole model is one block with linear layers that have no role.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from actkit.core.forward.example import example_of, has_example, make_example
from actkit.core.forward.hooks import refuse_compiled_or_sharded
from actkit.core.ground.errors import CoverageError
from actkit.core.ground.modules import is_within, tied_names
from actkit.core.layers.activations import is_activation
from actkit.core.layers.foreign_layers import refuse_foreign_layers
from actkit.core.model.architectures import Architecture, find_architecture, known_model_types, register_architecture
from actkit.core.model.channel_axes import FIRST
from actkit.core.model.coverage import Coverage, CoverageRow, cover
from actkit.core.model.equalization import EqualizationSet, QueryKeySet, equalization_sets, query_key_set
from actkit.core.model.parts import (
    CONVOLUTIONS,
    Attention,
    Block,
    Chain,
    Experts,
    Linear,
    LinearInput,
    Mlp,
    Norm,
    attention_implementation,
    forms_weights,
    is_linear,
    rotation_site,
)
from actkit.core.model.reading import BlockReader, submodule
from actkit.core.model.sites import SITE_NAMES, Site, Tap, read_tap, refuse_unknown_layout
from actkit.core.model.tracing import Axis, Trace, trace
from actkit.core.model.wrapping import inside

__all__ = [
    "SITE_NAMES",
    "Anatomy",
    "Attention",
    "Block",
    "Chain",
    "Coverage",
    "CoverageRow",
    "EqualizationSet",
    "Experts",
    "Linear",
    "LinearInput",
    "Mlp",
    "Norm",
    "QueryKeySet",
    "Site",
    "Tap",
    "anatomy",
    "equalization_sets",
    "has_row",
    "is_linear",
    "paths_of_end",
    "query_key_set",
    "read_tap",
    "register_architecture",
    "unread",
]


def anatomy(model: nn.Module, example: Any = None) -> Anatomy:
    """Read the anatomy of a model.

    Args:
        model: neither compiled nor sharded.
        example: one batch (a dict of keywords, or the one argument), needed if `config.model_type` has no row.

    Returns:
        Its stem, blocks and head; of a model without a row one block of linear layers and chains.

    Raises:
        CoverageError: the model does not fit its row, or cannot be traced.
        UnsupportedModelError: the model is compiled or sharded, or has adapters or quantized layers of another package.
    """
    refuse_compiled_or_sharded(model)
    refuse_foreign_layers(model)
    row = find_architecture(getattr(getattr(model, "config", None), "model_type", None))
    if row is not None:
        return _Described(model, row, example)
    return _Traced(model, _trace(model, example))


def unread(model: nn.Module) -> Anatomy:
    """Return a model as one block without parts: for what goes by modules alone, on a model that there is no row for.

    Args:
        model: neither compiled nor sharded.

    Raises:
        UnsupportedModelError: as of `anatomy`.
    """
    refuse_compiled_or_sharded(model)
    refuse_foreign_layers(model)
    return _Unread(model, 1)


def has_row(model: nn.Module) -> bool:
    """Say whether the model's architecture has a row, so that its anatomy needs no example."""
    return find_architecture(getattr(getattr(model, "config", None), "model_type", None)) is not None


def _trace(model: nn.Module, example: Any) -> Trace:
    kind = type(model).__name__
    if example is not None:
        return trace(model, example)
    if has_example(model):
        return trace(model, make_example(model))
    dummy = getattr(model, "dummy_inputs", None)
    if dummy is None:
        raise CoverageError(
            f"example: {kind} is none of the known model types ({', '.join(known_model_types())}), so it is traced: "
            f"pass example=, one batch that the model can be called with, or give the model example(rows, seed)."
        )
    try:
        return trace(model, dummy)
    except Exception as error:
        text = f"example: {kind} cannot run on its dummy inputs ({error}); pass example=, one batch."
        raise CoverageError(text) from error


class Anatomy:
    """A typed view of a model: stem, blocks and head.

    Attributes:
        model: what is described.
        architecture: the name of the row, or 'traced'.
        blocks: as they were first read.
        stem: paths of the modules before the blocks.
        head: paths of the modules behind them.

    Args:
        model: what is described.
        count: of its blocks.
    """

    architecture: str
    stem: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    _held = False

    def __init__(self, model: nn.Module, count: int) -> None:
        self.model = model
        self.blocks: tuple[Block, ...] = tuple(self.block(index) for index in range(count))

    def block(self, index: int, originals: Mapping[str, nn.Module] | None = None) -> Block:
        """Read a block again from the model as it is now; while `held` lasts, return the one in `blocks`.

        Args:
            index: of the block.
            originals: what `Block.original` answers, by full path.
        """
        if self._held and originals is None:
            return self.blocks[index]
        return self._read(index, originals)

    def _read(self, index: int, originals: Mapping[str, nn.Module] | None = None) -> Block:
        raise NotImplementedError

    @contextmanager
    def held(self) -> Iterator[None]:
        """Take blocks as they are in `blocks`: for work at many sites of a model whose modules stay as they were read.

        Yields:
            Nothing.
        """
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def refresh(self, index: int) -> None:
        """Read a block of `blocks` again: as it was first read, it keeps modules in memory that were replaced since.

        Args:
            index: of the block.
        """
        self.blocks = (*self.blocks[:index], self._read(index), *self.blocks[index + 1 :])

    def activations(self) -> tuple[str, ...]:
        """Return the paths of the activation functions that are modules; F.relu and the like have none.

        They are of a class that torch, transformers or actkit calls one (`core/layers/activations.py`), or stand at a
        nonlinearity of the anatomy. Those inside experts that are not opened are left out.
        """
        blocks = [self.block(index) for index in range(len(self.blocks))]
        known = self._nonlinearities(blocks)
        closed = [block.experts.path for block in blocks if block.experts is not None and not block.experts.members]
        return tuple(
            path
            for path, module in self.model.named_modules()
            if (is_activation(module) or path in known) and not any(is_within(path, experts) for experts in closed)
        )

    def _nonlinearities(self, blocks: Iterable[Block]) -> set[str]:
        """The paths at which this model has a nonlinearity, whatever the class of the module there."""
        return {mlp.activation for block in blocks for _, mlp in block.mlps()}

    def sites(self) -> tuple[Site, ...]:
        """Return every site: of the blocks, then of all linear layers, convolutions and activations."""
        found = [site for index in range(len(self.blocks)) for site in self.block(index).sites()]
        for path, module in self.model.named_modules():
            if is_linear(module) or isinstance(module, CONVOLUTIONS):
                found += [Site("layer.input", path=path), Site("layer.output", path=path)]
        for path in self.activations():
            found += [Site("activation.input", path=path), Site("activation.output", path=path)]
        return tuple(dict.fromkeys(found))

    def tap(self, site: Site) -> Tap:
        """Say how a site is read.

        Args:
            site: with its block or path.

        Raises:
            ValueError: this model does not have it, or does not form its tensor, or its layout is not known.
        """
        return self.taps([site])[site]

    def taps(self, sites: Iterable[Site]) -> dict[Site, Tap]:
        """Say how several sites are read, as `tap` does; each block is read once.

        Args:
            sites: with their blocks or paths.
        """
        blocks: dict[int, Block] = {}
        found: dict[Site, Tap] = {}
        for site in sites:
            if site.is_at_module:
                found[site] = self._tap_at_module(site)
                continue
            if site.block is None or not 0 <= site.block < len(self.blocks):
                raise ValueError(f"site: {site} names no block of this model, which has {len(self.blocks)}.")
            if site.block not in blocks:
                blocks[site.block] = self.block(site.block)
            found[site] = self._block_tap(site, blocks[site.block].taps)
        return found

    def _block_tap(self, site: Site, taps: Mapping[Site, Tap]) -> Tap:
        if site not in taps:
            names = ", ".join(dict.fromkeys(s.name for s in taps)) or "none"
            raise ValueError(f"site: {site} is not in this {self.architecture} model, whose blocks have {names}.")
        if site.name == "attention.weights" and not forms_weights(self.model):
            raise ValueError(
                f"site: {site} is not formed by the attention implementation {attention_implementation(self.model)!r}; "
                f"call model.set_attn_implementation('eager') first."
            )
        return taps[site]

    def _tap_at_module(self, site: Site) -> Tap:
        kind, _, side = site.name.partition(".")
        where: Any = side
        if site.path is None:
            raise ValueError(f"site: {site} stands for every {kind}; name one, as in '{site}:path.of.the.{kind}'.")
        try:
            module = self.model.get_submodule(site.path)
        except AttributeError as error:
            raise ValueError(f"site: the model has no module {site.path!r}; list them with named_modules().") from error
        if kind == "activation":
            self._check_activation(site, module)
        for block in self._blocks_around(site.path):
            experts = block.experts
            if experts is not None and site.path.startswith(experts.path + "."):
                member = site.path.removeprefix(experts.path + ".").partition(".")[0]
                return Tap(site.path, where, layout="flat", expert=f"{experts.path}.{member}")
            for _, mlp in block.mlps():
                if site.path == mlp.activation:
                    layout = block.taps[Site("mlp.preactivation", block.index)].layout
                    return Tap(site.path, where, layout=layout, copied=_is_overwritten(module, where))
            for _, mlp in block.mlps():
                if rotation_site(mlp.down) == site:
                    layout = block.taps[Site("mlp.hidden", block.index)].layout
                    return Tap(site.path, where, layout=layout)
            for inputs in block.linear_inputs():
                if inputs.site in block.taps and site.path in (linear.path for linear in inputs.linears):
                    return Tap(site.path, where, layout=block.taps[inputs.site].layout)
        if is_linear(module) or isinstance(module, CONVOLUTIONS):
            return Tap(site.path, where, layout=self._layout(site.path, module))
        return replace(self._module_tap(site.path, where, module), copied=_is_overwritten(module, where))

    def _check_activation(self, site: Site, module: nn.Module) -> None:
        known = self.activations()
        if site.path in known:
            return
        listed = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
        raise ValueError(
            f"site: {site} names a {type(module).__name__}, which is no activation; those of this model "
            f"are {listed or 'none'}. Name one of them, or use layer.{site.name.partition('.')[2]}."
        )

    def _layout(self, path: str, module: nn.Module) -> Any:
        return "channels_first" if isinstance(module, CONVOLUTIONS) else "tokens"

    def _module_tap(self, path: str, where: Any, module: nn.Module) -> Tap:
        """Of a module that is no linear layer or convolution: as a traced pass finds its tensor."""
        axis = self._axis(where, path)
        if axis is None:  # the pass did not call it: rows of channels, else it is an error when it runs
            return Tap(path, where, layout="flat", most=2)
        if axis.channels is None:
            refuse_unknown_layout(where, path, axis.dimensions)
        if axis.dimensions <= 2:
            return Tap(path, where, layout="flat", most=2)
        if axis.channels == axis.dimensions - 1:
            return Tap(path, where)
        if axis.channels == FIRST:
            return Tap(path, where, layout="channels_first")
        refuse_unknown_layout(where, path, axis.dimensions)

    def _axis(self, where: str, path: str) -> Axis | None:
        """What a traced pass found of a module's tensor; None for one that it did not call."""
        return None

    def _blocks_around(self, path: str) -> list[Block]:
        """The block that holds the module at `path`, read again; none for stem and head."""
        holding = [block.index for block in self.blocks if block.path == "" or path.startswith(block.path + ".")]
        return [self.block(index) for index in holding]

    def canonical(self, site: Site) -> Site:
        """Return the one name of a tensor that has several: a `layer.input` is called as its block calls what it reads.

        Args:
            site: any of this model.
        """
        if site.name != "layer.input" or site.path is None:
            return site
        for block in self._blocks_around(site.path):
            for inputs in block.linear_inputs():
                if any(linear.path == site.path for linear in inputs.linears):
                    return inputs.site
        return site

    def coverage(self) -> Coverage:
        """Account for every parameter of the model once: what it belongs to, or why it is left alone."""
        return cover(self)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Every norm of the blocks, then those among stem and head, as the model holds them now."""
        found = [norm for index in range(len(self.blocks)) for norm in self.block(index).norms]
        offset = found[0].offset if found else 0.0  # a family's norms are of one kind
        known = {norm.path for norm in found}
        for path in (*self.stem, *self.head):
            for name, module in self.model.get_submodule(path).named_modules():
                full = f"{path}.{name}".rstrip(".")
                if "Norm" in type(module).__name__ and full not in known:
                    found.append(Norm(full, module, "other", offset))
                    known.add(full)
        return tuple(found)

    @property
    def tied(self) -> dict[str, str]:
        """For each parameter that the model holds under several names: another of its names."""
        return tied_names(self.model)

    def __repr__(self) -> str:
        return f"Anatomy({type(self.model).__name__}, architecture={self.architecture!r}, blocks={len(self.blocks)})"


class _Unread(Anatomy):
    """The whole model is one block without parts."""

    architecture = "unread"

    def _read(self, index: int, originals: Mapping[str, nn.Module] | None = None) -> Block:
        if index != 0:
            raise IndexError(f"block: {index} was given; a model that was not read is one block, 0.")
        return Block(0, "", self.model, None, None, None, (), root=self.model, _originals=originals)


class _Traced(Anatomy):
    """The whole model is one block; its linear layers are grouped by the tensor they read."""

    def __init__(self, model: nn.Module, found: Trace) -> None:
        self.architecture = "traced"
        self._trace = found
        self.stem, self.head = paths_of_end(model, "get_input_embeddings"), paths_of_end(model, "get_output_embeddings")
        super().__init__(model, 1)

    def _read(self, index: int, originals: Mapping[str, nn.Module] | None = None) -> Block:
        if index != 0:
            raise IndexError(f"block: {index} was given; a traced model is one block, 0.")
        tied, model = self.tied, self.model
        standing = {path for path, _ in model.named_modules()}  # an edit may have taken layers out since
        groups = []
        for group in self._trace.inputs:
            own = [path for path in group if path in standing and path not in self.head]
            own = [path for path in own if f"{path}.weight" not in tied]
            linears = tuple(Linear(path, "layer", model.get_submodule(path)) for path in own)
            if linears:
                groups.append(LinearInput(Site("layer.input", path=own[0]), linears))
        chains = tuple(
            Chain(self._end(first), label, self._end(second))
            for first, label, second in self._trace.chains
            if {first, second} <= standing
        )
        norms = tuple(
            Norm(path, module)
            for path, module in model.named_modules()
            if "Norm" in type(module).__name__ and next(module.parameters(recurse=False), None) is not None
        )
        taps: dict[Site, Tap] = {}
        for path in (path for path in self._trace.dimensions if path in standing):
            layout = self._layout(path, model.get_submodule(path))
            taps[Site("layer.input", path=path)] = Tap(path, "input", layout=layout)
            taps[Site("layer.output", path=path)] = Tap(path, "output", layout=layout)
        return Block(0, "", model, None, None, None, norms, tuple(groups), chains, model, taps, originals)

    def _end(self, path: str) -> Linear | str:
        module = self.model.get_submodule(path)
        return path if isinstance(module, CONVOLUTIONS) else Linear(path, "layer", module)

    def _layout(self, path: str, module: nn.Module) -> Any:
        layout = super()._layout(path, module)
        return "flat" if layout == "tokens" and self._trace.dimensions.get(path) == 2 else layout

    def _axis(self, where: str, path: str) -> Axis | None:
        return self._trace.axes.get((where, path))

    def _nonlinearities(self, blocks: Iterable[Block]) -> set[str]:
        return {nonlinearity for _, nonlinearity, _ in self._trace.chains}


def _is_overwritten(module: nn.Module, where: str) -> bool:
    """Whether a module changes its input in place, so that whoever keeps the input needs a copy."""
    return where == "input" and bool(getattr(module, "inplace", False))


def paths_of_end(model: nn.Module, getter: str) -> tuple[str, ...]:
    """Return the path (or paths, of one module) of a transformers model's input or output embeddings.

    Args:
        model: any; one that names none has none.
        getter: "get_input_embeddings" or "get_output_embeddings".
    """
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return ()
    return tuple(path for path, other in model.named_modules() if other is module)


class _Described(Anatomy):
    """A model whose row says what is at which path; modules that no row describes are traced."""

    def __init__(self, model: nn.Module, row: Architecture, example: Any = None) -> None:
        self.architecture, self.row, self._example = row.name, row, example
        self._axes: Mapping[tuple[str, str], Axis] = {}
        prefix = getattr(model, "base_model_prefix", "")
        self._prefix = f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""
        children = {name.partition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
        self.stem = self._present(model, row.stem)
        outside = tuple(sorted(children - {self._prefix[:-1]})) if self._prefix else ()
        self.head = self._present(model, row.head) + outside
        self._blocks = inside(model, self._prefix + row.blocks)
        super().__init__(model, len(submodule(model, self._blocks, row)))  # type: ignore[arg-type]

    def _present(self, model: nn.Module, paths: tuple[str, ...]) -> tuple[str, ...]:
        """The full paths of those that this model has (a pooler is optional)."""
        modules = dict(model.named_modules())
        return tuple(self._prefix + path for path in paths if self._prefix + path in modules)

    def _read(self, index: int, originals: Mapping[str, nn.Module] | None = None) -> Block:
        path = f"{self._blocks}.{index}"
        row = self.row.of_block(self.model.config, index)
        return BlockReader(self.model, row, index, path).read(originals)

    def _axis(self, where: str, path: str) -> Axis | None:
        if (where, path) not in self._axes:  # nothing was traced, or modules were replaced since
            example = example_of(self.model, [self._example]) if self._example is not None else None
            self._axes = trace(self.model, make_example(self.model) if example is None else example).axes
        return self._axes.get((where, path))
