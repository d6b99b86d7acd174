"""The geometry of representations: is it that of the inputs, or that of the targets?

    input alignment = CKA(K_z, K_x),  target alignment = CKA(K_z, K_y)          kernels of conditions, centred
    for each target: parallelism, CCGP, decodability;  shattering: decodability of what was not trained

From "Task structure and nonlinearity jointly determine learned representational geometry" (2024, arXiv:2401.13558):
nets of tanh come to the geometry of their targets (abstract: high parallelism and CCGP), nets of ReLU keep more of
their inputs'. `kernels` and `dichotomies` say what the measures are, `tasks` makes tasks of known geometry.

When to use it: to compare a model before and after a change of its activation function, or along a training (rule
`meter`); at any site, whatever the model.
Cost: one forward pass, and ten linear classifiers for each target.
Settled here: kernels are of noise-free inputs if they are given (`clean`), else of means over the samples of a
condition, which add noise to the diagonal. All kernels are centred.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actkit.core.forward.batch import main_input, sequence_of
from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import plotly
from actkit.core.model.anatomy import anatomy
from actkit.core.page.page import Page, Picture, Pictures
from actkit.core.page.page import Table as Sorted
from actkit.core.page.pictures import lines_over
from actkit.core.watch.by_example import ByExample
from actkit.core.watch.capture import record
from actkit.interpretation.representational_geometry.dichotomies import ccgp, decodability, parallelism, shattering
from actkit.interpretation.representational_geometry.kernels import Matrix, cka, kernel, participation_ratio

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True)
class TargetGeometry:
    """One binary target at one site.

    Attributes:
        parallelism: -1 to 1; None if its halves are unequal or have one condition.
        dropped: pairs of equal states, which parallelism leaves out.
        ccgp: accuracy on conditions that were not trained; None if a side has one condition.
        decodability: accuracy on samples that were not trained.
    """

    parallelism: float | None
    dropped: int
    ccgp: float | None
    decodability: float


@dataclass(frozen=True)
class SiteGeometry:
    """The geometry at one site.

    Attributes:
        site: where.
        units: of the representation.
        input_alignment: CKA with the inputs; None if these are no numbers.
        target_alignment: CKA with the targets.
        participation_ratio: dimensions over which the conditions spread.
        targets: one for each.
        shattering: mean decodability of balanced dichotomies that are no target; None for an odd number of conditions.
    """

    site: str
    units: int
    input_alignment: float | None
    target_alignment: float
    participation_ratio: float
    targets: tuple[TargetGeometry, ...]
    shattering: float | None


@dataclass(frozen=True)
class RepresentationalGeometry:
    """The geometry at all sites.

    Attributes:
        conditions: how many.
        samples: that classifiers were fitted and scored on.
        sites: in the order of the model.
        input_decodability: of each target from the raw inputs: how hard the task is; empty if these are no numbers.
    """

    conditions: int
    samples: int
    sites: tuple[SiteGeometry, ...]
    input_decodability: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        found = asdict(self)
        sites = [{**site, "targets": list(site["targets"])} for site in found["sites"]]
        return {**found, "sites": sites, "input_decodability": list(self.input_decodability)}

    def table(self) -> Table:
        """A row per site; of several targets the mean."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Geometry of {self.conditions} conditions, {self.samples} samples"
        if self.input_decodability:
            title += f"; from inputs {_mean(self.input_decodability):.1%} are decoded"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("site", overflow="fold")
        for name in ("like\ninputs", "like\ntargets", "dims", "parallel", "CCGP", "decoded", "untrained"):
            table.add_column(name, justify="right", no_wrap=True)
        for site in self.sites:
            means = [_mean(getattr(target, name) for target in site.targets) for name in ("parallelism", "ccgp")]
            decoded = _mean(target.decodability for target in site.targets)
            table.add_row(
                site.site,
                _text(site.input_alignment, ".3f"),
                f"{site.target_alignment:.3f}",
                f"{site.participation_ratio:.1f}",
                _text(means[0], ".3f"),
                _text(means[1], ".1%"),
                _text(decoded, ".1%"),
                _text(site.shattering, ".1%"),
            )
        return table

    def page(self) -> Page:
        """The alignments site by site, and all numbers, of each target too."""
        places = [site.site for site in self.sites]
        lines = [[(at, site.target_alignment) for at, site in enumerate(self.sites)]]
        legend = [("c0", "like the targets")]
        if all(site.input_alignment is not None for site in self.sites):
            lines.append([(at, site.input_alignment or 0.0) for at, site in enumerate(self.sites)])
            legend.append(("c1", "like the inputs"))
        drawn = (Picture("CKA", lines_over(lines, "alignment", places, False)),)
        headings = ("number", "site", "units", "like inputs", "like targets", "dimensions", "untrained")
        rows, each = [], []
        for at, site in enumerate(self.sites, start=1):
            alike = (_cell(site.input_alignment), site.target_alignment)
            rows.append((at, site.site, site.units, *alike, site.participation_ratio, _cell(site.shattering)))
            for number, target in enumerate(site.targets):
                measures = (target.parallelism, target.ccgp, target.decodability)
                raw = self.input_decodability[number] if self.input_decodability else None
                each.append((site.site, number, *map(_cell, measures), _cell(raw)))
        return Page(
            "Representational geometry",
            f"{self.conditions} conditions, {self.samples} samples.",
            (
                Pictures("Alignment", drawn, "Sites by their number in the table below.", legend, small=True),
                Sorted("Sites", headings, rows, "untrained: mean decodability of dichotomies that are no target."),
                Sorted("Targets", ("site", "target", "parallelism", "CCGP", "decoded", "decoded from inputs"), each),
            ),
        )

    def figure(self) -> Figure:
        """Draw the alignments with inputs and targets, site by site.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        names = [site.site for site in self.sites]
        figure = graph_objects.Figure(
            graph_objects.Scatter(x=names, y=[site.target_alignment for site in self.sites], name="like the targets")
        )
        figure.add_trace(
            graph_objects.Scatter(x=names, y=[site.input_alignment for site in self.sites], name="like the inputs")
        )
        return figure.update_yaxes(title="CKA", range=[-0.02, 1.02])


def _cell(value: float | None) -> float | str:
    return "" if value is None else value


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _text(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def representational_geometry(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sites: tuple[str, ...] | None = None,
    position: Literal["mean", "first", "last", "flat"] = "mean",
    conditions: Tensor | None = None,
    targets: Tensor | None = None,
    clean: Iterable[Any] | None = None,
    splits: int = 10,
    untrained: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> RepresentationalGeometry:
    """Measure the geometry of a model's representations of labelled conditions.

    Args:
        model: in evaluation mode meanwhile.
        batches: noisy samples, as for the model; "labels" [batch] are their conditions, from 0.
        sites: names, patterns, or paths such as 'activation.output:act'; None for what blocks give, or, in a model
            without blocks, what its layers give.
        position: which row of an example is read: 'mean' over tokens or pixels, 'first', 'last', or all, 'flat'.
        conditions: of each sample [samples], instead of labels.
        targets: 0 and 1 [conditions, targets]; None for one of each condition against all others.
        clean: noise-free inputs, one for each condition in their order; None for means over samples.
        splits: of conditions, for CCGP.
        untrained: balanced dichotomies that shattering is a mean over.
        seed: of all that is drawn.
        progress: show a bar.

    Returns:
        The geometry at each site.

    Raises:
        DataError: a condition has no sample, labels or targets do not fit, or all states at a site are the same.
        ValueError: an unknown site or position.
        ImportError: scikit-learn (the extra `interpretation`) is missing.
        ActkitError: what `record` raises.
    """
    given = sequence_of(batches)
    owner = _owner(given, conditions)
    count = int(owner.max()) + 1
    goals = np.eye(count, dtype=bool) if targets is None else _targets(targets, count)
    view = anatomy(model, given[0] if len(given) else None)
    if sites is None:
        sites = ("layer.output",) if view.architecture == "traced" else ("block.output",)
    wanted = {site: ByExample(position) for site in sites}
    seen = record(model, wanted, given, anatomy=view, progress=progress)
    noise_free = None
    if clean is not None:
        noise_free = record(model, wanted, sequence_of(clean), anatomy=view, progress=False)
    # targets as -1 and 1; one against all others has the same centred kernel
    target_kernel = kernel(2.0 * goals - 1)
    dichotomies = [goals[:, at] for at in range(goals.shape[1])]
    vectors: dict[Any, Matrix] = {}
    for site, statistic in seen.items():
        assert isinstance(statistic, ByExample)
        vectors[site] = statistic.vectors.double().numpy()
        if len(vectors[site]) != len(owner):
            raise DataError(f"conditions: {len(owner)} were given for {len(vectors[site])} samples; give one for each.")
    inputs = _inputs(given, model, owner, None if clean is None else sequence_of(clean))
    found = []
    for site, values in vectors.items():
        points = _means(values, owner, count)
        if noise_free is not None:
            points = noise_free[site].vectors.double().numpy()
            if len(points) != count:
                raise DataError(
                    f"clean: it has {len(points)} inputs for {count} conditions; give one for each, in order."
                )
        states = kernel(points)
        found.append(
            SiteGeometry(
                str(site),
                values.shape[1],
                None if inputs is None else cka(states, kernel(inputs[1])),
                cka(states, target_kernel),
                participation_ratio(points),
                tuple(_target(points, values, owner, each, splits, seed) for each in dichotomies),
                _shattering(values, owner, dichotomies, untrained, seed),
            )
        )
    raw = () if inputs is None else tuple(decodability(inputs[0], owner, each, seed=seed) for each in dichotomies)
    return RepresentationalGeometry(count, len(owner), tuple(found), raw)


def _owner(batches: Sequence[Any], conditions: Tensor | None) -> NDArray[np.int64]:
    """The condition of each sample."""
    if conditions is None:
        if not batches or not all(
            isinstance(each, dict) and isinstance(each.get("labels"), Tensor) for each in batches
        ):
            raise DataError('conditions: none were given, and not all batches have "labels" [batch]; give either.')
        conditions = torch.cat([each["labels"] for each in batches])
    if conditions.dim() != 1 or conditions.is_floating_point() or int(conditions.min()) < 0:
        raise DataError(
            f"conditions: {conditions.dtype} {list(conditions.shape)} were given; give whole numbers from 0, one for "
            f"each sample."
        )
    owner = conditions.cpu().numpy().astype(np.int64)
    empty = sorted(set(range(int(owner.max()) + 1)) - set(owner.tolist()))
    if empty or owner.max() < 1:
        raise DataError(f"conditions: {empty[:5]} have no sample; give two or more, numbered from 0 without a gap.")
    return owner


def _targets(targets: Tensor, count: int) -> NDArray[np.bool_]:
    values = targets if targets.dim() == 2 else targets[:, None]
    if len(values) != count or not bool(((values == 0) | (values == 1)).all()) or not bool((values.std(0) > 0).all()):
        raise DataError(
            f"targets: {list(targets.shape)} were given for {count} conditions; give 0 and 1 [conditions, targets], "
            f"both in each target."
        )
    return values.bool().cpu().numpy()


def _inputs(
    batches: Sequence[Any], model: nn.Module, owner: NDArray[np.int64], clean: Sequence[Any] | None
) -> tuple[Matrix, Matrix] | None:
    """Raw inputs of the samples and of the conditions, flat; None if they are token ids."""

    def flat(given: Sequence[Any]) -> Matrix | None:
        mains = [main_input(batch, model) for batch in given]
        if not all(main.is_floating_point() for main in mains) or len({main.shape[1:] for main in mains}) > 1:
            return None
        return torch.cat([main.flatten(1) for main in mains]).double().cpu().numpy()

    samples = flat(batches)
    if samples is None:
        return None
    points = _means(samples, owner, int(owner.max()) + 1) if clean is None else flat(clean)
    return None if points is None else (samples, points)


def _means(values: Matrix, owner: NDArray[np.int64], count: int) -> Matrix:
    return np.stack([values[owner == condition].mean(0) for condition in range(count)])


def _target(
    points: Matrix,
    values: Matrix,
    owner: NDArray[np.int64],
    dichotomy: NDArray[np.bool_],
    splits: int,
    seed: int,
) -> TargetGeometry:
    sides = int(dichotomy.sum()), int((~dichotomy).sum())
    several = min(sides) >= 2
    parallel = parallelism(points, dichotomy) if several and sides[0] == sides[1] else None
    return TargetGeometry(
        None if parallel is None else parallel.score,
        0 if parallel is None else parallel.dropped,
        ccgp(values, owner, dichotomy, splits=splits, seed=seed) if several else None,
        decodability(values, owner, dichotomy, seed=seed),
    )


def _shattering(
    values: Matrix, owner: NDArray[np.int64], dichotomies: Sequence[NDArray[np.bool_]], limit: int, seed: int
) -> float | None:
    conditions = int(owner.max()) + 1
    if conditions % 2 or conditions < 4 or limit < 1:
        return None
    return shattering(values, owner, trained=dichotomies, limit=limit, seed=seed)
