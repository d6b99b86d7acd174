"""What a model costs: bytes it holds, bytes it reads per token, bytes on disk, and the density behind the second.

Decoding reads every weight once per token, so the bytes touched are what its time follows. They are counted per token
(per example if there are no tokens), as the layers stand:

    embedding: one row.   linear layer: all of it, biases included; the head too, even if it is tied to the embedding
    ActLinear with a selection: weight * density + its scores + correction + bias + what rounds its inputs
    MLP whose activation gives exact zeros (ReLU, a threshold, a top-k): of up and down only the rows and columns of the
    units that are not 0, of a layer for gate and up together up's share
    convolution, norm, any other parameter: once, however many positions it serves
    experts: only those that were chosen, each by the share of the tokens that it got (3-D experts of a family that no
    architecture row describes count in full)

Densities are measured, not assumed: hooks count which inputs the selections keep and which units are not 0, padding
left out. They are averaged over tokens; overall, a layer counts by its weight's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from actkit.core.forward.batch import BatchContext, sequence_of
from actkit.core.forward.hooks import evaluating
from actkit.core.forward.outputs import find_head, output_of
from actkit.core.ground import processes
from actkit.core.ground.errors import DataError
from actkit.core.ground.offload import in_place
from actkit.core.ground.progress import track
from actkit.core.layers.activations import gives_zeros
from actkit.core.layers.conv import ActConv
from actkit.core.layers.embedding import QuantizedEmbedding
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import TopK
from actkit.core.model.anatomy import Anatomy, Site
from actkit.core.model.anatomy import anatomy as read_anatomy
from actkit.core.model.architectures import find_architecture
from actkit.core.model.experts import ExpertList
from actkit.core.watch.capture import observe, opened_experts
from actkit.core.watch.merging import merge
from actkit.core.watch.statistics import Density, Rows

LOW, HIGH = 0.05, 0.95


@dataclass(frozen=True)
class LayerCost:
    """One linear layer with a selection, or one module that holds other weights.

    Attributes:
        path: of the module.
        weight_bytes: what it holds.
        bytes_per_token: what is read of it; None if a density is unknown.
        dense_bytes_per_token: the same with everything read.
        density: share of its inputs that are read; None if it selects none or that was not measured.
        density_p05: 5th percentile of the density over tokens.
        density_p95: 95th percentile of the density over tokens.
        units: behind an activation that gives zeros, the share of the MLP's units that are not 0; None elsewhere, or if
            that was not measured.
        share: of the tokens that reach it, below 1 for experts.
    """

    path: str
    weight_bytes: int
    bytes_per_token: float | None
    dense_bytes_per_token: float
    density: float | None = None
    density_p05: float | None = None
    density_p95: float | None = None
    units: float | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Cost:
    """What `measure_cost` found.

    Attributes:
        weight_bytes: of all parameters and buffers that are saved, and of the sparse kernel's copies, each memory once.
        bytes_per_token: weight bytes touched per decoded token (per example without tokens); None if a density is
            unknown.
        dense_bytes_per_token: the same with everything read.
        density: share of the inputs that selections read, weighted by weight bytes; None without selections.
        density_p05: 5th percentile over tokens of a token's own density.
        density_p95: 95th percentile over tokens of a token's own density.
        disk_bytes: of all files of the folder, or None.
        layers: what it is made of.
    """

    weight_bytes: int
    bytes_per_token: float | None
    dense_bytes_per_token: float
    density: float | None
    density_p05: float | None
    density_p95: float | None
    disk_bytes: int | None
    layers: tuple[LayerCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return asdict(self)


def measure_cost(
    model: nn.Module, batches: Iterable[Any] | None = None, *, folder: str | Path | None = None, progress: bool = True
) -> Cost:
    """Count what a model holds and reads.

    Real inputs are needed for the density of thresholds, for the zeros of activations and for how often each expert is
    chosen. Without them a top-k's density is k / inputs, a threshold's and an activation's is unknown, and experts are
    chosen equally often.

    Args:
        model: what is measured.
        batches: dicts of the model's keywords, in which attention_mask tells padding; None for no data.
        folder: the saved model, for the bytes on disk.
        progress: show a bar.

    Returns:
        The bytes and the densities, also layer by layer.

    Raises:
        DataError: there are 0 batches, or the folder is not there.
        NonFiniteError: an input of a selection is NaN.
        CoverageError: the model selects inputs or has zeros to count, and its anatomy cannot be read.
    """
    disk = None if folder is None else folder_bytes(folder)
    weights = _resident_bytes(model)
    if batches is not None:
        batches = sequence_of(batches)
        if not len(batches):
            raise DataError("batches: 0 batches were given; pass at least one dict of the model's keywords.")
    with ExitStack() as stack:
        view = _view(model, batches)
        if view is not None:
            stack.enter_context(opened_experts(view))
        selecting = {path: m for path, m in _layers(model) if isinstance(m, ActLinear) and m.select is not None}
        gates = {} if view is None else dict(_gates(view))
        seen = _Seen() if batches is None else _measure(model, view, selecting, gates, batches, progress)
        layers = tuple(_cost_of(path, module, model, selecting, gates, seen) for path, module in _layers(model))
    touched = [layer.bytes_per_token for layer in layers]
    overall, low, high = seen.spread()
    if batches is None and selecting:
        overall = _known_density(selecting)
    return Cost(
        weights,
        None if None in touched else sum(size for size in touched if size is not None),
        sum(layer.dense_bytes_per_token for layer in layers),
        overall,
        low,
        high,
        disk,
        layers,
    )


def folder_bytes(folder: str | Path) -> int:
    """Return the bytes of all files of a saved model.

    Args:
        folder: of the model.

    Returns:
        Bytes.

    Raises:
        DataError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"folder: there is no folder {folder}; give the one that the model was saved to.")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# -- what is held ------------------------------------------------------------------------------------------------------


def _resident_bytes(model: nn.Module) -> int:
    """Bytes of memory that the saved tensors and the kernel's buffers lie in; once if they share it."""
    tensors = list(model.state_dict(keep_vars=True).values())
    tensors += [part for m in model.modules() if isinstance(m, ActLinear) for part in m.packed_tensors()]
    spans: list[tuple[str, int, int]] = []
    meta: dict[int, int] = {}
    for tensor in tensors:
        if not tensor.numel():
            continue
        if tensor.is_meta:  # no memory, so no address
            meta[id(tensor)] = tensor.nbytes
            continue
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        spans.append((str(tensor.device), start, start + (last + 1) * tensor.element_size()))
    total, device, end = sum(meta.values()), "", 0
    for where, start, stop in sorted(spans):
        if where != device:
            device, end = where, 0
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


# -- what is read ------------------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with weights that are not a child's, and every ActLinear as a whole."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        if isinstance(module, ActLinear | ActConv | QuantizedEmbedding):
            inside += (f"{path}." if path else "",)
            yield path, module
        elif _own_bytes(module):
            yield path, module


def _own_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and of the saved float buffers (a norm's running statistics) of this module alone."""
    tensors: list[Tensor] = list(module.parameters(recurse=False))
    left_out = module._non_persistent_buffers_set
    named = module.named_buffers(recurse=False)
    tensors += [buffer for name, buffer in named if name not in left_out and buffer.is_floating_point()]
    return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class _Gate:
    """Which units of an MLP are 0, for a layer of it.

    Attributes:
        site: at which they are seen.
        skips: its rows or its columns.
        part: the share of its weight that belongs to these units.
    """

    site: Site
    skips: Literal["rows", "columns"]
    part: float = 1.0


def _gates(view: Anatomy) -> Iterator[tuple[str, _Gate]]:
    """The layers of which zeros of an activation skip rows or columns, by path."""
    for block in (view.block(index) for index in range(len(view.blocks))):
        for expert, mlp in block.mlps():
            if gives_zeros(view.model.get_submodule(mlp.activation)):
                site = mlp.zeros_at(block.index, expert)
                yield mlp.down.path, _Gate(site, "columns")
                if mlp.gated:
                    yield mlp.up.path, _Gate(site, "rows", mlp.width / mlp.up.out_features)


def _cost_of(
    path: str,
    module: Any,
    model: nn.Module,
    selecting: Mapping[str, nn.Module],
    gates: Mapping[str, _Gate],
    seen: _Seen,
) -> LayerCost:
    share, gate = seen.share(path, model), gates.get(path)
    units = None if gate is None else seen.units(gate)
    skipped: float | None = 0.0  # of its weight, for the zeros of units
    if gate is not None:
        skipped = None if units is None else gate.part * (1 - units)
    density = low = high = None
    if isinstance(module, ActLinear):
        bias = 0 if module.bias is None else module.bias.nbytes
        dense: float = module.weight_bytes + bias
        size = module.weight_bytes + bias
        if module.select is not None:
            size += sum(buffer.nbytes for buffer in module.select.buffers())
        if path in selecting:
            density, low, high = seen.density(path, module)
            if gate is not None and gate.skips == "columns":
                skipped = 0.0  # no selection takes an input that is 0
        unknown = skipped is None or (path in selecting and density is None)
        taken = 1.0 if density is None else density
        read = None if unknown else module.bytes_per_token(taken * (1 - skipped)) + bias  # type: ignore[operator]
    elif isinstance(module, ActConv):
        size = module.weight_bytes + (0 if module.bias is None else module.bias.nbytes)
        read = dense = float(size)
    elif isinstance(module, QuantizedEmbedding):
        size = module.storage.nbytes
        read = dense = size / module.num_embeddings
    else:
        size = _own_bytes(module)
        dense = size / (module.num_embeddings if isinstance(module, nn.Embedding) else 1)
        read = None if skipped is None else dense - (0 if gate is None else skipped * module.weight.nbytes)
    reached = 0.0 if share == 0 else None if read is None else read * share
    return LayerCost(path, size, reached, dense * share, density, low, high, units, share)


def _known_density(selecting: Mapping[str, ActLinear]) -> float | None:
    """Without data: of the layers by weight bytes, if all of them are top-k."""
    weights = [layer.storage.nbytes for layer in selecting.values()]
    shares = [_top_k_density(layer) for layer in selecting.values()]
    if None in shares:
        return None
    return sum(size * (share or 0.0) for size, share in zip(weights, shares, strict=True)) / sum(weights)


def _top_k_density(layer: ActLinear) -> float | None:
    select = layer.select
    return min(select.k, layer.in_features) / layer.in_features if isinstance(select, TopK) else None


# -- measuring ---------------------------------------------------------------------------------------------------------


class _Tally:
    """Sums over layers of one token's bytes: what its selections kept, and what they chose from."""

    def __init__(self) -> None:
        self._sums: list[tuple[Rows, Tensor, Tensor]] = []  # of the batch at hand, for each kind of rows
        self.kept: list[Tensor] = []
        self.all: list[Tensor] = []

    def add(self, rows: Rows, shares: Tensor, size: float) -> None:
        """Keys of n tokens, float64 [n] of the layer's inputs that each keeps, and the layer's weight bytes.

        Most layers of a batch share their rows, and are added up at once, as small tensors that are kept beside large
        ones that come and go leave memory in pieces.
        """
        known = next((sums for sums in self._sums if sums[0] is rows), None)
        if known is None:
            known = (rows, *torch.zeros(2, len(rows), dtype=torch.float64))
            self._sums.append(known)
        _, kept, every = known
        kept += shares.cpu() * size
        every += size

    def close_batch(self) -> None:
        """Join the layers' rows by token."""
        if not self._sums:
            return
        keys = torch.cat([torch.stack((rows.sequences, rows.positions), 1).cpu() for rows, _, _ in self._sums])
        distinct, index = keys.unique(dim=0, return_inverse=True)
        zeros = torch.zeros(len(distinct), dtype=torch.float64)
        self.kept.append(zeros.index_add(0, index, torch.cat([kept for _, kept, _ in self._sums])))
        self.all.append(zeros.index_add(0, index, torch.cat([every for _, _, every in self._sums])))
        self._sums.clear()

    def merge(self) -> None:
        """Join what several processes tallied."""
        own = {f"kept {i}": x for i, x in enumerate(self.kept)} | {f"all {i}": x for i, x in enumerate(self.all)}
        every = [tensors for _, tensors in processes.everyone("densities of tokens", own)]
        self.kept, self.all = (
            [x for tensors in every for name, x in tensors.items() if name.startswith(what)] for what in ("kept", "all")
        )


class _Reads(Density):
    """Density of a layer's inputs under its selection, added to the tally token by token.

    It knows the path of the layer, so that layers which share an input and a selection still count one by one.
    """

    _settings = ("active", "tally", "size", "path")  # type: ignore[assignment]

    def __init__(self, active: Callable[[Tensor], Tensor], tally: _Tally, size: float, path: str) -> None:
        super().__init__(active)
        self.tally, self.size, self.path = tally, size, path

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        assert rows is not None and self.active is not None
        mask = self.active(x)
        kept = mask.sum(1)
        self._per_channel += mask.sum(0)
        self._per_row += torch.bincount(kept, minlength=x.shape[1] + 1)
        self.tally.add(rows, kept.double() / x.shape[1], self.size)


@dataclass(frozen=True)
class _Seen:
    """What the batches showed.

    Attributes:
        tokens: real ones.
        reads: by path of the layer.
        experts: path of an expert -> tokens that were sent there; None without data.
        tally: of the densities of tokens.
        zeros: by site of a gate.
    """

    tokens: int = 0
    reads: Mapping[str, Density] | None = None
    experts: Mapping[str, int] | None = None
    tally: _Tally | None = None
    zeros: Mapping[Site, Density] | None = None

    def units(self, gate: _Gate) -> float | None:
        """The share of an MLP's units that are not 0."""
        found = None if self.zeros is None else self.zeros[gate.site]
        return None if found is None or not found.count else found.density

    def density(self, path: str, layer: ActLinear) -> tuple[float | None, float | None, float | None]:
        """Mean, 5th and 95th percentile over tokens of the share that a layer reads."""
        if self.reads is None:
            return _top_k_density(layer), None, None
        found = self.reads[path]
        return (found.density, found.spread(LOW), found.spread(HIGH)) if found.count else (None, None, None)

    def share(self, path: str, model: nn.Module) -> float:
        """The share of the tokens that reach a module: below 1 inside an expert."""
        parts = path.split(".")
        for depth in range(len(parts)):
            experts = model.get_submodule(".".join(parts[:depth]))
            if isinstance(experts, ExpertList) and depth < len(parts):
                if self.experts is None:
                    return _chosen(model) / len(experts)
                return self.experts[".".join(parts[: depth + 1])] / self.tokens
        return 1.0

    def spread(self) -> tuple[float | None, float | None, float | None]:
        """The density over all layers: overall, and percentiles of a token's own."""
        if self.tally is None or not self.tally.kept:
            return None, None, None
        kept, every = torch.cat(self.tally.kept), torch.cat(self.tally.all)
        low, high = np.quantile((kept / every).numpy(), (LOW, HIGH), method="inverted_cdf")
        return float(kept.sum() / every.sum()), float(low), float(high)


def _chosen(model: nn.Module) -> int:
    """How many experts a token is sent to."""
    config: Any = getattr(model, "config", None)
    for key in ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k"):
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    raise DataError(
        "batches: the configuration does not say how many experts a token is sent to, so it must be measured; "
        "pass batches."
    )


def _view(model: nn.Module, batches: Sequence[Any] | None) -> Anatomy | None:
    """The anatomy, if it is needed.

    It is for experts, for zeros of activations, and to tell padding at the inputs of selections.
    """
    row = find_architecture(getattr(getattr(model, "config", None), "model_type", None))
    selects = any(isinstance(m, ActLinear) and m.select is not None for m in model.modules())
    if row is not None and (row.experts is not None or selects or any(map(gives_zeros, model.modules()))):
        return read_anatomy(model)
    return read_anatomy(model, batches[0]) if selects and batches is not None else None


def _measure(
    model: nn.Module,
    view: Anatomy | None,
    selecting: Mapping[str, ActLinear],
    gates: Mapping[str, _Gate],
    batches: Sequence[Any],
    progress: bool,
) -> _Seen:
    """Run the batches and count. If there is nothing to count, nothing is run."""
    tally = _Tally()
    wanted: dict[Site, Any] = {}
    for path, layer in selecting.items():
        if layer.select is not None:
            chooses = in_place(model, f"{path}.select", layer.select).mask
            wanted[Site("layer.input", path=path)] = _Reads(chooses, tally, float(layer.storage.nbytes), path)
    members: dict[str, Site] = {}
    for block in () if view is None else (view.block(index) for index in range(len(view.blocks))):
        for expert, mlp in block.mlps():
            if expert is not None:
                members[mlp.path] = Site("mlp.input", block.index, expert)
    wanted |= {site: Density() for site in (*members.values(), *(gate.site for gate in gates.values()))}
    tokens = 0
    if not wanted or view is None:
        return _Seen(sum(BatchContext.of(batch, model).tokens for batch in batches), {}, {}, tally, {})
    with evaluating(model):
        head = find_head(model, batches[0])  # a pass may end before it: whole logits are the largest tensor
        with observe(view, wanted) as observer:
            row = 0
            for index, batch in enumerate(track(batches, "Measuring the density", enabled=progress)):
                context = BatchContext.of(batch, model, first_row=row)
                row += context.batch_size
                tokens += context.tokens
                if processes.mine(index):
                    observer.begin(context)
                    output_of(model, batch, head)
                    tally.close_batch()
    found = observer.statistics
    merge(found)
    tally.merge()
    reads = {path: found[Site("layer.input", path=path)] for path in selecting}
    experts = {path: found[site].count for path, site in members.items()}
    return _Seen(tokens, reads, experts, tally, {gate.site: found[gate.site] for gate in gates.values()})
