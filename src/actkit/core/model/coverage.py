"""Coverage: every parameter of a model, once, with what it belongs to, or why actkit leaves it alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from actkit.core.ground.modules import is_within
from actkit.core.layers.conv import ActConv
from actkit.core.layers.known_layers import why_unread
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import stored_numbers
from actkit.core.model.parts import CONVOLUTIONS, Block, is_linear

if TYPE_CHECKING:
    from rich.table import Table

    from actkit.core.model.anatomy import Anatomy

Where = Literal["linear", "convolution", "experts", "norm", "stem", "head", "bias", "uncovered"]


@dataclass(frozen=True)
class CoverageRow:
    """One parameter.

    Attributes:
        parameter: its name.
        numel: how many numbers it holds.
        where: what it belongs to.
        reason: why it is left alone, if it is uncovered.
    """

    parameter: str
    numel: int
    where: Where
    reason: str | None = None


@dataclass(frozen=True)
class Coverage:
    """What every parameter belongs to.

    Attributes:
        rows: every parameter once (ties once).
        share: of the parameters inside blocks, those that are weights of linear layers, convolutions and experts.
    """

    rows: tuple[CoverageRow, ...]
    share: float

    def uncovered(self) -> tuple[CoverageRow, ...]:
        """Return the rows that no part of the anatomy describes, each with its reason."""
        return tuple(row for row in self.rows if row.where == "uncovered")

    def groups(self) -> list[tuple[str, int, int]]:
        """Return (what it belongs to, with the reason; how many numbers; how many tensors), largest first."""
        numels: Counter[str] = Counter()
        tensors: Counter[str] = Counter()
        for row in self.rows:
            key = row.where if row.reason is None else f"{row.where}: {row.reason}"
            numels[key] += row.numel
            tensors[key] += 1
        return [(key, numel, tensors[key]) for key, numel in numels.most_common()]

    def describe(self) -> str:
        """Say the share in words: '98.0% of the parameters inside blocks are ...'."""
        return f"{self.share:.1%} of the parameters inside blocks are weights of linear layers, convolutions or experts"

    def table(self) -> Table:
        """Return the parameters by what they belong to, largest first, with the reasons."""
        from rich import box
        from rich.text import Text

        from actkit.core.ground.tables import PlainTable

        table = PlainTable(title=self.describe(), title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("parameters", "tensors"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("where", overflow="fold")
        for key, numel, tensors in self.groups():
            table.add_row(f"{numel:,}", f"{tensors:,}", Text(key))
        return table


def cover(anatomy: Anatomy) -> Coverage:
    """Account for every parameter of the anatomy's model."""
    blocks = [anatomy.block(block.index) for block in anatomy.blocks]  # as they are now
    known = dict(_known(blocks))
    rows, inside, covered = [], 0, 0
    for name, numel in sizes(anatomy.model):
        where = known.get(name) or _outside(name, anatomy) or ("uncovered", _reason(name, anatomy))
        row = CoverageRow(name, numel, *where)
        rows.append(row)
        if row.where not in ("stem", "head") and any(is_within(name, block.path) for block in blocks):
            inside += numel
            covered += numel if row.where in ("linear", "convolution", "experts") else 0
    return Coverage(tuple(rows), covered / inside if inside else 0.0)


def sizes(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of parameters; weights stored in buffers count as the parameter they stand for.

    Args:
        model: any; of tied parameters the first name.
    """
    for name, parameter in model.named_parameters():
        yield name, parameter.numel()
    for path, module in model.named_modules():
        if isinstance(module, ActLinear | ActConv) and not list(module.storage.parameters()):
            yield f"{path}.weight", stored_numbers(module.storage)


def _known(blocks: list[Block]) -> Iterator[tuple[str, tuple[Where, str | None]]]:
    for block in blocks:
        for linear in block.linears():
            if isinstance(linear.module, ActLinear):
                yield f"{linear.path}.weight", ("linear", None)
            for name, _ in linear.module.named_parameters():
                yield f"{linear.path}.{name}", ("bias" if name == "bias" else "linear", None)
        for convolution in block.convolutions():
            if isinstance(convolution.module, ActConv):
                yield f"{convolution.path}.weight", ("convolution", None)
            for name, _ in convolution.module.named_parameters():
                yield f"{convolution.path}.{name}", ("bias" if name == "bias" else "convolution", None)
        for norm in block.norms:
            yield from ((f"{norm.path}.{name}", ("norm", None)) for name, _ in norm.module.named_parameters())
        yield from _of_experts(block)


def _of_experts(block: Block) -> Iterator[tuple[str, tuple[Where, str | None]]]:
    experts = block.experts
    if experts is None:
        return
    for name, _ in block.root.get_submodule(experts.router).named_parameters():
        yield f"{experts.router}.{name}", ("uncovered", "router: the choice of experts is left as it is")
    if not experts.members:
        for name, _ in experts.module.named_parameters():
            yield f"{experts.path}.{name}", ("bias" if name.endswith("_bias") else "experts", None)


def _outside(name: str, anatomy: Anatomy) -> tuple[Where, str | None] | None:
    if _any_within(name, anatomy.stem):
        return "stem", None
    return ("head", None) if _any_within(name, anatomy.head) else None


def _reason(name: str, anatomy: Anatomy) -> str:
    """Why a parameter that no part of the anatomy describes is left alone."""
    path, _, leaf = name.rpartition(".")
    module = anatomy.model.get_submodule(path)
    kind = type(module).__name__
    lowered = path.lower()
    if "crossatt" in lowered or "cross_att" in lowered:
        return f"cross attention is not described by the row {anatomy.architecture}"
    if isinstance(module, CONVOLUTIONS):
        return "convolution that is not a plain Conv1d or Conv2d of a traced model"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding: a table, not a linear layer"
    if "Norm" in kind:
        return f"norm that is not described by the row {anatomy.architecture}"
    around = path.split(".")
    for end in range(len(around), 0, -1):  # a parametrization keeps parameters in modules inside the layer
        if (unread := why_unread(anatomy.model.get_submodule(".".join(around[:end])))) is not None:
            return unread
    if any(block.attention is not None and block.attention.path == path for block in anatomy.blocks):
        return f"{leaf}: a parameter of the attention itself, not of a layer"
    if anatomy.architecture != "traced":
        return f"{kind} is not described by the row {anatomy.architecture}"
    if is_linear(module):
        tied = anatomy.tied.get(name)
        return f"tied to {tied}" if tied else "linear layer that the example never called as a layer"
    return f"{leaf} of a {kind}: not a linear layer"


def _any_within(name: str, paths: Iterable[str]) -> bool:
    return any(is_within(name, path) for path in paths)
