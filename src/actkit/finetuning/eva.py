"""EVA: LoRA that begins with the principal directions of each layer's inputs (2024, arXiv:2410.07170).

    C_l = sum over tokens of (x - mean x) (x - mean x)^T,   x: what layer l reads
    C_l v_i = s_i^2 v_i,   e_li = s_i^2 / trace C_l         share of the variance that direction i explains
    of all pairs (l, i), i <= rho * rank, the rank * layers with the largest e_li are kept;
    rank_l = how many of layer l are,  A_l = [v_1 ... v_rank_l],  B_l = 0,  alpha_l / rank_l the same for all

When to use it: to train low-rank changes in few steps; compare with `lora` on your own data, as the gain was too
small to tell in our own experiment, and a model that knew the text already did worse from there. The plan is also a
picture of how many directions each layer's input fills.
Cost: one pass over `batches` batches, and one eigendecomposition per distinct input. The Gram matrices are held block
by block: inputs^2 * 8 bytes each.
The paper finds the directions by an incremental decomposition that goes over the data until they stand still (tau), as
peft does; here the Gram matrices are summed over the batches once and decomposed exactly, so that there is no tau, no
batch can be too short, and nothing can fail to converge. Both leave out the mean, so that it is a PCA, although the
paper speaks of the SVD of the inputs; `centred=False` is the literal reading.
Convolutions of a traced model are adapted too (plain Conv2d of one group): their rows are the unfolded patches.
Settled here: layers that read one tensor share one decomposition, and each of them counts in the ranking; of equal
shares those of earlier blocks and layers win. Each direction has its largest entry positive. A layer whose
directions are all outranked gets no adapter. A direction without variance is never taken, so that fewer than rank *
layers may be left. `whiten` divides row i of A by the square root of s_i, as peft does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.forward.batch import LABELS, as_batches, forward, is_tokens, main_input, sequence_of
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.forward.stream import Stream
from actkit.core.ground import processes
from actkit.core.ground.errors import DataError, NonFiniteError
from actkit.core.ground.largest import largest
from actkit.core.layers.layer_rows import rows_of
from actkit.core.model.anatomy import Block, Site, anatomy
from actkit.core.model.parts import LinearRole
from actkit.core.recipe.blockwise import record_by_block
from actkit.core.watch.merging import merge
from actkit.core.watch.spectrum import Spectrum
from actkit.finetuning.adapters import AdaptedLayer, Adapter, adaptable

if TYPE_CHECKING:
    from rich.table import Table

IGNORED = -100  # as transformers labels a token that no loss counts


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What some layers read, all the same.

    Attributes:
        site: where.
        ranks: of these layers, by path.
        tokens: how many rows were read.
        directions: the principal ones, float64 [components, in].
        singular: their singular values [components].
        explained: the share of the variance that each explains [components].
    """

    site: str
    ranks: Mapping[str, int]
    tokens: int
    directions: Tensor = field(repr=False)
    singular: Tensor = field(repr=False)
    explained: Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class EvaPlan:
    """Ranks and directions for the layers of a model.

    Attributes:
        inputs: of the layers, each distinct one once.
    """

    inputs: tuple[LayerInputs, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer, by path; 0 for one that is left as it is."""
        return {path: rank for each in self.inputs for path, rank in each.ranks.items()}

    @property
    def directions(self) -> dict[str, Tensor]:
        """The directions of each layer that has a rank, [rank, in]."""
        return {p: each.directions[:rank] for each in self.inputs for p, rank in each.ranks.items() if rank}

    @property
    def explained(self) -> float:
        """The sum of the shares of variance that all layers' directions explain."""
        return sum(float(each.explained[:rank].sum()) for each in self.inputs for rank in each.ranks.values())

    def layers(self, scale: float, *, whiten: bool = False) -> dict[str, AdaptedLayer]:
        """Return how the layers are adapted.

        Args:
            scale: alpha / rank of each.
            whiten: divide each direction by the square root of its singular value.
        """
        found = {}
        for each in self.inputs:
            rows = each.directions / each.singular.sqrt()[:, None] if whiten else each.directions
            for path, rank in each.ranks.items():
                if rank:
                    found[path] = AdaptedLayer(rank, scale * rank, rows[:rank].float())
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything but the directions, as JSON takes it."""
        return {
            "explained": self.explained,
            "inputs": [
                {
                    "site": each.site,
                    "ranks": dict(each.ranks),
                    "tokens": each.tokens,
                    "explained": each.explained.tolist(),
                }
                for each in self.inputs
            ],
        }

    def table(self) -> Table:
        """A row per distinct input: its layers' ranks, and what their directions explain of the variance."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        ranks = self.ranks
        title = f"EVA: rank {sum(ranks.values())} over {len(ranks)} layers, {sum(map(bool, ranks.values()))} adapted"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("inputs", "layers"):
            table.add_column(name, overflow="fold")
        for name in ("rank", "explained", "tokens"):
            table.add_column(name, justify="right", no_wrap=True)
        for each in self.inputs:
            most = max(each.ranks.values())
            names = ", ".join(path.rpartition(".")[2] for path in each.ranks)
            shown = "/".join(str(rank) for rank in dict.fromkeys(each.ranks.values()))
            table.add_row(each.site, names, shown, f"{float(each.explained[:most].sum()):.1%}", f"{each.tokens}")
        return table


class Eva(Adapter):
    """LoRA whose ranks and directions come from data.

    Attributes:
        rho: a layer's rank is at most rho times the mean; 1 gives all the same rank.
        batches: how many of the first training batches are read.
        whiten: divide each direction by the square root of its singular value.
        centred: of inputs minus their mean.
    """

    rho: float = Field(2.0, ge=1)
    batches: int = Field(32, ge=1)
    whiten: bool = False
    centred: bool = True

    def layers(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, AdaptedLayer]:
        return self.plan(model, batches).layers(self.scale, whiten=self.whiten)

    def plan(self, model: nn.Module, batches: Iterable[Any], *, progress: bool = True) -> EvaPlan:
        """Find ranks and directions.

        Args:
            model: in evaluation mode meanwhile.
            batches: of what it is to be trained on. Tokens that are padding or labelled -100 do not count.
            progress: show a bar.

        Returns:
            The plan.

        Raises:
            DataError: no batch, or fewer rows than directions.
            ValueError: rho * rank is more than a layer has inputs; the model has no such layers.
            NonFiniteError: an input is NaN or infinite.
        """
        components = round(self.rank * self.rho)
        inputs: list[LayerInputs] = []
        first = (
            batches.take(self.batches)
            if isinstance(batches, Stream)
            else list(islice(as_batches(batches), self.batches))
        )
        for site, paths, spectrum in inputs_of(model, first, roles=self.roles, centred=self.centred, progress=progress):
            if spectrum.channels is not None and components > spectrum.channels:
                raise ValueError(
                    f"rank: {self.rank} at rho {self.rho:g} asks for {components} directions, and {paths[0]} has "
                    f"{spectrum.channels} inputs; give a smaller rank, or leave its role out by roles=."
                )
            if spectrum.count < components:
                raise DataError(
                    f"batches: {paths[0]} read {spectrum.count} rows, which are too few for {components} directions "
                    f"(rank {self.rank} at rho {self.rho:g}); give more data, or a smaller rank."
                )
            inputs.append(_decomposed(site, paths, spectrum, components))
        ranks = allocate([each.explained for each in inputs], [len(each.ranks) for each in inputs], self.rank)
        return EvaPlan(
            tuple(
                LayerInputs(
                    each.site,
                    dict(zip(each.ranks, own, strict=True)),
                    each.tokens,
                    each.directions,
                    each.singular,
                    each.explained,
                )
                for each, own in zip(inputs, ranks, strict=True)
            )
        )


def allocate(explained: Sequence[Tensor], layers: Sequence[int], rank: int) -> list[list[int]]:
    """Give the directions that explain most, over all layers, to their layers.

    Args:
        explained: of each input, the share of variance that each direction explains, descending [components].
        layers: how many layers read each input.
        rank: the mean over layers.

    Returns:
        The rank of each layer, by input.
    """
    shares, owners = [], []
    ranks = [[0] * number for number in layers]
    for index, (own, number) in enumerate(zip(explained, layers, strict=True)):
        for layer in range(number):
            shares.append(own)
            owners += [(index, layer)] * len(own)
    values = torch.cat(shares)
    chosen = largest(values, rank * sum(layers)) & (values > 0)
    for place in chosen.nonzero().flatten().tolist():
        index, layer = owners[place]
        ranks[index][layer] += 1
    return ranks


def _decomposed(site: str, paths: Sequence[str], spectrum: Spectrum, components: int) -> LayerInputs:
    directions, singular = spectrum.directions(components)
    total = float(spectrum.scatter.diagonal().sum())
    squares = singular.square()
    squares = squares.where(squares > 1e-14 * total, 0)  # what rounding leaves of none
    explained = squares / total if total > 0 else squares
    return LayerInputs(site, dict.fromkeys(paths, 0), spectrum.count, directions, singular, explained)


def inputs_of(
    model: nn.Module,
    batches: Iterable[Any],
    chosen: set[str] | None = None,
    *,
    roles: Iterable[LinearRole] | None = None,
    centred: bool = True,
    progress: bool = True,
) -> Iterator[tuple[str, list[str], Spectrum]]:
    """Read the inputs of linear layers, block by block.

    Args:
        model: in evaluation mode meanwhile.
        batches: of which tokens that are padding or labelled -100 do not count.
        chosen: the paths of the layers; None for those that adapters can stand beside.
        roles: that these must have.
        centred: of inputs minus their mean.
        progress: show a bar.

    Yields:
        Of each distinct input the site, the layers' paths, and what was read there.

    Raises:
        DataError: no batch.
        ValueError: as `adaptable`.
    """
    given = sequence_of(batches)
    if not len(given):
        raise DataError("batches: 0 were given; give at least one, of what the model is to be trained on.")
    view = anatomy(model, given[0])
    known = {layer.path for layer in chain(*adaptable(view, roles).values())}
    chosen = known if chosen is None else chosen
    kernels = [path for path in sorted(chosen & known) if isinstance(view.model.get_submodule(path), nn.Conv2d)]
    yield from _patches(model, kernels, given, centred)

    def wanted(block: Block) -> dict[Site, Any]:
        return {
            each.site: Spectrum(centred=centred)
            for each in block.linear_inputs()
            if any(linear.path in chosen for linear in each.linears)
        }

    def labelled(batch: Any) -> Tensor | None:
        labels = batch.get(LABELS) if isinstance(batch, Mapping) else None
        if labels is None or not is_tokens(batch, model) or labels.shape != main_input(batch, model).shape:
            return None
        return labels != IGNORED

    for block, seen in record_by_block(view, wanted, given, counted=labelled, progress=progress):
        for each in block.linear_inputs():
            paths = [linear.path for linear in each.linears if linear.path in chosen]
            if paths:
                yield str(each.site), paths, seen[each.site]


def _patches(
    model: nn.Module, paths: Sequence[str], batches: Iterable[Any], centred: bool
) -> Iterator[tuple[str, list[str], Spectrum]]:
    """What convolutions read, as a row [in x kernel] for each place: one more pass."""
    spectra = {path: Spectrum(centred=centred) for path in paths}

    def reading(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def read(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = rows_of(module, args[0])[0]
            if not torch.isfinite(rows).all():
                raise NonFiniteError(f"layer.input:{path}: NaN or Inf in an image; check the data and the model.")
            spectra[path].update(rows)

        return read

    if spectra:
        with torch.no_grad(), evaluating(model), hooked(model, before={path: reading(path) for path in paths}):
            for index, batch in enumerate(batches):
                if processes.mine(index):
                    forward(model, batch)
        merge(spectra)
    for path, spectrum in spectra.items():
        yield f"layer.input:{path}", [path], spectrum
