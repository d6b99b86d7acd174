"""FATReLU: a ReLU whose small outputs are 0 too, put in after training (ProSparse, 2024, arXiv:2402.13516).

    FATReLU_t(z) = z if z >= t, else 0

The last of ProSparse's three steps (`prosparse` has the others): more zeros, no training; what is kept is not shifted.
The paper takes t = 0.01 for 7B and 13B. The function is older (Kurtz et al. 2020). Here it is
`core.layers.activations.Thresholded` around the ReLU; it differs from torch.nn.Threshold(t, 0) and from vLLM's kernel
at z = t alone, which they set to 0 and the paper keeps.
When to use it: after training a ReLU model, for more zeros at once.
Cost: one comparison per hidden value; for a hidden value of zero, the row of the up projection and the column of the
down projection need not be read. The paper does not say how to choose t: `sweep_threshold` measures a grid, on text
that is neither trained on nor used for the final number. ShiftedRelu is the alternative that the paper compares with;
its shift is our choice, as the paper names none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module, temporarily
from actkit.core.forward.batch import sequence_of
from actkit.core.ground.errors import RecipeError, UnsupportedModelError
from actkit.core.ground.figures import plotly
from actkit.core.ground.progress import track
from actkit.core.layers.activation_function import ActivationFunction, Axis
from actkit.core.layers.activations import Thresholded, name_of
from actkit.core.layers.folding import ScaledActivation
from actkit.core.layers.known_functions import shifted_relu
from actkit.core.measure.quality import measure_quality, task_of
from actkit.core.model.anatomy import Block, anatomy
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.capture import opened_experts, record
from actkit.core.watch.statistics import Density

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


GRID = (0.005, 0.01, 0.02, 0.03)  # the paper's sweep


class ShiftedRelu(nn.Module):
    """relu(x - shift): 0 below the shift; what is kept is lowered by it.

    Args:
        shift: in units of x; the paper names none.

    Raises:
        ValueError: the shift is not finite.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ()
    gives_zeros: ClassVar[bool] = True

    def __init__(self, shift: float = 0.1) -> None:
        super().__init__()
        if not isfinite(shift):
            raise ValueError(f"shift: {shift} was given; give a finite number.")
        self.shift = float(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x, of any shape."""
        return F.relu(x - self.shift)

    def record(self) -> ActivationFunction:
        """What is known of it."""
        return shifted_relu(self.shift)

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {"shift": self.shift}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> ShiftedRelu:
        """Make the function that `spec` described."""
        return cls(spec["shift"])

    def extra_repr(self) -> str:
        return f"shift={self.shift:g}"


class FatRelu(Transform):
    """Set the outputs of every MLP's ReLU below a threshold to 0.

    In a traced model, the ReLU modules between two layers are changed and other activations are skipped.

    Attributes:
        threshold: in units of the ReLU's output; 0 leaves the model as it is.

    Raises:
        RecipeError: when applied, an MLP's activation is no ReLU.
    """

    threshold: float = Field(0.01, ge=0, allow_inf_nan=False)

    tags: ClassVar[Tags] = Tags(least_coverage=0.25)
    not_proposed: ClassVar[str] = (
        "it fits models with ReLU alone, and how much it may drop is yours to choose (`sweep_threshold`)"
    )

    @classmethod
    def identity(cls) -> Self:
        return cls(threshold=0.0)

    def targets(self, block: Block) -> Iterable[str]:
        return block.nonlinearities()

    def conflicts(self, earlier: Transform) -> str | None:
        if {"select", "inputs"} & set(earlier.slots):
            return "its thresholds or scales were calibrated on activations that FATReLU would change; FATReLU first"
        return super().conflicts(earlier)

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        places = relus(block)
        for chain in block.chains:
            if chain.nonlinearity not in places:
                yield Skip(chain.nonlinearity, "no ReLU module")
        if not places:
            yield Skip(block.path or "model", "no MLP with a ReLU")
        for path, relu in places.items():
            yield Replace(path, Thresholded(relu, self.threshold))


def relus(block: Block) -> dict[str, nn.Module]:
    """Find the ReLU modules of the block's MLPs; in a traced block, those between two layers.

    A scale that an equalization divides by stays outermost.

    Args:
        block: the block to look in.

    Returns:
        path -> module.

    Raises:
        RecipeError: an MLP's activation is no ReLU.
    """
    found: dict[str, nn.Module] = {}
    for _, mlp in block.mlps():
        path = mlp.activation
        while isinstance(get_module(block.root, path), ScaledActivation):
            path += ".activation"
        found[path] = module = get_module(block.root, path)
        if not _is_relu(module):
            name = name_of(module)
            raise RecipeError(
                f"FatRelu: the activation at {path} is {name or type(module).__name__}, no ReLU; replace it first, "
                f"swap(model, {name or path!r}, 'relu'), and train."
            )
    modules = dict(block.module.named_modules()) if block.chains else {}
    for chain in block.chains:
        if _is_relu(modules.get(chain.nonlinearity)):
            found[chain.nonlinearity] = modules[chain.nonlinearity]
    return found


def _is_relu(module: nn.Module | None) -> bool:
    return isinstance(module, ShiftedRelu) or (module is not None and name_of(module) == "relu")


# -- which threshold ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ThresholdPoint:
    """What one threshold gives.

    Attributes:
        threshold: in units of the ReLU's output.
        sparsity: share of exact zeros in the hidden values, mean over the MLPs.
        perplexity: of the model.
    """

    threshold: float
    sparsity: float
    perplexity: float


@dataclass(frozen=True)
class ThresholdSweep:
    """What each threshold gives, in rising order.

    Attributes:
        original: the model without a threshold.
        points: one per threshold.
    """

    original: ThresholdPoint
    points: tuple[ThresholdPoint, ...]

    def choose(self, max_loss: float = 0.005) -> ThresholdPoint:
        """Return the largest threshold up to which the perplexity stays within `max_loss` of the original's.

        Args:
            max_loss: the largest rise of the perplexity, as a share of the original's.

        Returns:
            The point; the original if the first threshold exceeds the limit.

        Raises:
            ValueError: max_loss is below 0.
        """
        if not max_loss >= 0:
            raise ValueError(f"max_loss: {max_loss} was given; it is a share of the perplexity, give 0 or more.")
        chosen = self.original
        for point in self.points:
            if point.perplexity > self.original.perplexity * (1 + max_loss):
                break
            chosen = point
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)

    def table(self) -> Table:
        """A row per threshold: sparsity, perplexity, and the change of it."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        table = PlainTable(title="FATReLU thresholds", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("threshold", "zeros", "perplexity", "change"):
            table.add_column(name, justify="right", no_wrap=True)
        for point in (self.original, *self.points):
            change = f"{point.perplexity / self.original.perplexity - 1:+.2%}"
            label = "none" if point is self.original else f"{point.threshold:g}"
            table.add_row(label, f"{point.sparsity:.2%}", f"{point.perplexity:.2f}", change)
        return table

    def figure(self) -> Figure:
        """Draw perplexity over sparsity, a marker per threshold.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        points = (self.original, *self.points)
        figure = graph_objects.Figure(
            graph_objects.Scatter(
                x=[100 * point.sparsity for point in points],
                y=[point.perplexity for point in points],
                text=[f"t = {point.threshold:g}" for point in points],
                mode="lines+markers",
            )
        )
        figure.update_layout(xaxis_title="zeros in the hidden values (%)", yaxis_title="perplexity")
        return figure


def sweep_threshold(
    model: nn.Module, batches: Iterable[Any], grid: Sequence[float] = GRID, *, progress: bool = True
) -> ThresholdSweep:
    """Measure zeros and perplexity of a language model under FATReLU at each threshold of a grid.

    The model stays as it is.

    Args:
        model: a language model with ReLU.
        batches: dicts of the model's keywords, read twice per threshold; not those of the final measurement, if the
            threshold is chosen by them.
        grid: thresholds above 0, in any order.
        progress: show a bar.

    Returns:
        One point per threshold, and the original's.

    Raises:
        ValueError: the grid is empty, or a threshold is out of bounds.
        RecipeError: an activation is no ReLU.
        UnsupportedModelError: the model is no language model, or has no MLP that actkit knows.
    """
    if not grid or not all(0 < threshold < float("inf") for threshold in grid):
        raise ValueError(f"grid: {list(grid)} was given; give at least one threshold, each above 0 and finite.")
    if task_of(model) != "language":
        raise UnsupportedModelError(f"model: {type(model).__name__} writes no text, so it has no perplexity.")
    batches = sequence_of(batches)
    view = anatomy(model)
    with opened_experts(view):
        places = {path: relu for block in view.blocks for path, relu in relus(view.block(block.index)).items()}
        if not places:
            raise UnsupportedModelError(f"model: no MLP with a ReLU was found in {type(model).__name__}.")

        def measured(threshold: float) -> ThresholdPoint:
            edits = [Replace(path, Thresholded(relu, threshold)) for path, relu in places.items()]
            with temporarily(model, edits):
                seen = record(model, {"mlp.hidden": Density()}, batches, anatomy=view, progress=False)
                quality = measure_quality(model, batches, task="language", resamples=1, progress=False)
            zeros = mean(1 - density.density for density in seen.values() if density.count)
            return ThresholdPoint(threshold, zeros, quality.metrics["perplexity"].value)

        thresholds = [0.0, *sorted(set(grid))]
        original, *points = map(measured, track(thresholds, "Sweeping thresholds", enabled=progress))
    return ThresholdSweep(original, tuple(points))
