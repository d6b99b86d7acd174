"""Theory against observation: codes that are really drawn, and the codes of a network's activations.

`simulate` draws random sets, without the formula that it tests, and counts overlaps. `expected_vs_observed` turns
activations into codes, stores those of one half of the documents in segments (a segment each) and matches those of the
other half against them: the theory of `pattern_theory` (2016, arXiv:1601.00720) takes ones as uniform and independent,
which the units of a network are not. How far off it is, is given as an effective n: the number of cells at which the
theory gives the observed rate.
Cost: simulations, 10^6 trials in a few seconds for a hundred ones; on a model one pass over the data and one sparse
product per site.
Our reading: the paper has no measurement on a network. Every match between tokens of different documents counts as
false here, even if the same word stands in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import plain, plotly
from actkit.core.ground.progress import track
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Sample
from actkit.sparsity.active_dendrites.pattern_theory import false_positive
from actkit.sparsity.active_dendrites.segments import DendriticSegments, sparse_code

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


CHUNK = 1 << 22  # entries of a batch of random codes
LARGEST = 1 << 40  # cells that an effective n may have


# -- simulation --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """How often something happened: `count` of `trials`.

    Attributes:
        count: how often it did.
        trials: how often it could have.
    """

    count: int
    trials: int

    @property
    def value(self) -> float:
        """The observed share."""
        return self.count / self.trials

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The exact binomial interval of Clopper and Pearson (1934)."""
        from scipy.stats import binomtest

        found = binomtest(self.count, self.trials).proportion_ci(confidence, method="exact")
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Overlaps:
    """How often a segment and a code shared 0, 1, 2, ... cells.

    Attributes:
        counts: by the number of shared cells, from 0.
    """

    counts: tuple[int, ...]

    @property
    def trials(self) -> int:
        """How many pairs were drawn."""
        return sum(self.counts)

    def matched(self, threshold: int) -> Rate:
        """How often at least `threshold` were shared: the false positive rate of random codes."""
        return Rate(sum(self.counts[threshold:]), self.trials)

    def missed(self, threshold: int) -> Rate:
        """How often fewer than `threshold` were shared: the false negative rate of stored codes."""
        return Rate(sum(self.counts[:threshold]), self.trials)


def simulate(
    cells: int,
    active: int,
    synapses: int,
    *,
    replaced: int | None = None,
    patterns: int = 1,
    trials: int = 1_000_000,
    seed: int = 0,
    progress: bool = True,
) -> Overlaps:
    """Count overlaps of random segments with random codes; every trial draws new ones.

    Args:
        cells: (n) the length of a code.
        active: (a) the ones of a code.
        synapses: (s) the cells that a segment holds of a code.
        replaced: (v) None meets the segment with an independent code; a number meets it with the code that it stores,
            after so many ones moved to cells that were off.
        patterns: (M) how many codes the segment holds; the first is the one that comes back.
        trials: how many pairs to draw.
        seed: of the draws.
        progress: show a bar.

    Returns:
        The counts.

    Raises:
        ValueError: 1 <= synapses <= active <= cells, 0 <= replaced <= active, replaced <= cells - active or patterns,
            trials >= 1 does not hold.
    """
    _check(cells, active, synapses, replaced, patterns, trials)
    generator = torch.Generator().manual_seed(seed)
    codes, subsets = partial(random_codes, generator=generator), partial(random_subsets, generator=generator)
    rows = max(1, min(trials, CHUNK // cells))
    starts = range(0, trials, rows)
    counts = torch.zeros(min(cells, patterns * synapses) + 1, dtype=torch.int64)
    for start in track(starts, "Drawing codes", enabled=progress):
        count = min(rows, trials - start)
        code = codes(count, cells, active)
        segment = subsets(code, synapses)
        for _ in range(patterns - 1):
            segment |= subsets(codes(count, cells, active), synapses)
        if replaced is None:
            met = codes(count, cells, active)
        else:
            met = code & ~subsets(code, replaced) | subsets(~code, replaced)
        counts += torch.bincount((segment & met).sum(1), minlength=len(counts))
    return Overlaps(tuple(counts.tolist()))


def random_codes(rows: int, cells: int, active: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw codes, every choice as likely.

    Floyd's algorithm (Bentley 1987): for j over the last `active` cells, a random one up to j, or j if that is taken.

    Args:
        rows: how many codes.
        cells: the length of a code.
        active: ones in each.
        generator: of the draws.

    Returns:
        bool [rows, cells].
    """
    codes = torch.zeros(rows, cells, dtype=torch.bool)
    row = torch.arange(rows)
    for last in range(cells - active, cells):
        cell = torch.randint(last + 1, (rows,), generator=generator)
        codes[row, cell.masked_fill(codes[row, cell], last)] = True
    return codes


def random_subsets(sets: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw some of the ones of each row, every choice as likely.

    Args:
        sets: bool [rows, cells], with equally many ones in each row.
        size: how many to draw.
        generator: of the draws.

    Returns:
        bool [rows, cells].
    """
    ones = sets.nonzero()[:, 1].view(len(sets), -1)
    return torch.zeros_like(sets).scatter_(1, ones, random_codes(len(sets), ones.shape[1], size, generator))


def _check(cells: int, active: int, synapses: int, replaced: int | None, patterns: int, trials: int) -> None:
    held = {
        "1 <= synapses <= active <= cells": 1 <= synapses <= active <= cells,
        "0 <= replaced <= active": replaced is None or 0 <= replaced <= active,
        "replaced <= cells - active": replaced is None or replaced <= cells - active,
        "patterns >= 1": patterns >= 1,
        "trials >= 1": trials >= 1,
    }
    broken = next((inequality for inequality, holds in held.items() if not holds), None)
    if broken:
        raise ValueError(
            f"{broken} does not hold: cells={cells}, active={active}, synapses={synapses}, replaced={replaced}, "
            f"patterns={patterns}, trials={trials} were given."
        )


# -- activations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteMatches:
    """The codes of one site.

    Attributes:
        site: where they were read.
        cells: the length of a code.
        active: its ones.
        synapses: the cells that a segment holds.
        threshold: how many of them make a match.
        stored: how many tokens were stored.
        tested: how many tokens were matched against them.
        overlaps: of each segment with each tested code.
    """

    site: str
    cells: int
    active: int
    synapses: int
    threshold: int
    stored: int
    tested: int
    overlaps: Overlaps

    @property
    def observed(self) -> float:
        """The share of pairs of a segment and a tested code that match."""
        return self.overlaps.matched(self.threshold).value

    @property
    def expected(self) -> float:
        """The same by the theory."""
        return self._theory(self.threshold)

    @property
    def factor(self) -> float:
        """Observed over expected."""
        return self.observed / self.expected

    @property
    def effective_cells(self) -> int | None:
        """The smallest number of cells at which the theory gives the observed rate or less; None if that is 0."""
        if self.observed == 0:
            return None
        low, high = self.active - 1, self.active  # the theory falls as n grows, from 1 at n = active
        while self._theory(self.threshold, high) > self.observed and high < LARGEST:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._theory(self.threshold, middle) <= self.observed else (middle, high)
        return high

    @property
    def threshold_needed(self) -> int | None:
        """The smallest threshold, not below the given one, at which no more match than the theory expects at the given.

        None if no threshold up to `synapses` has that.
        """
        thresholds = range(self.threshold, self.synapses + 1)
        return next((each for each in thresholds if self.overlaps.matched(each).value <= self.expected), None)

    def _theory(self, threshold: int, cells: int | None = None) -> float:
        return float(false_positive(cells or self.cells, self.active, self.synapses, threshold))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        settings = asdict(self)
        settings["overlaps"] = list(self.overlaps.counts)
        names = ("expected", "observed", "factor", "effective_cells", "threshold_needed")
        return {**settings, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class ExpectedVsObserved:
    """False matches of real codes at one or more sites.

    Attributes:
        sites: one per site.
    """

    sites: tuple[SiteMatches, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"sites": [site.to_dict() for site in self.sites]}

    def table(self) -> Table:
        """A row per site."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        first = self.sites[0]
        title = f"False matches of {first.synapses} synapses at threshold {first.threshold}, {first.active} active"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("site", overflow="fold")
        for name in ("cells", "expected", "observed", "factor", "effective cells", "threshold needed"):
            table.add_column(name, justify="right")
        for site in self.sites:
            rates = (f"{site.expected:.2e}", f"{site.observed:.2e}", f"{site.factor:.1f}")
            found = ("none" if each is None else str(each) for each in (site.effective_cells, site.threshold_needed))
            table.add_row(site.site, str(site.cells), *rates, *found)
        return table

    def figure(self) -> Figure:
        """Draw rates against the threshold: a line per site, and a dashed one for the theory of each size of site.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        go = plotly().graph_objects

        figure = go.Figure()
        thresholds = list(range(1, self.sites[0].synapses + 1))
        for site in self.sites:
            rates = [site.overlaps.matched(each).value or None for each in thresholds]  # a log axis has no 0
            figure.add_trace(go.Scatter(x=thresholds, y=rates, name=plain(site.site), mode="lines+markers"))
        for site in {each.cells: each for each in self.sites}.values():
            rates = [site._theory(each) for each in thresholds]
            dashed = {"dash": "dash", "color": "black"}
            figure.add_trace(go.Scatter(x=thresholds, y=rates, name=f"theory, {site.cells} cells", line=dashed))
        figure.update_yaxes(type="log", exponentformat="power")
        return figure.update_layout(xaxis_title="threshold", yaxis_title="share of pairs that match")


def expected_vs_observed(
    model: nn.Module,
    batches: Iterable[Any],
    site: str = "mlp.hidden",
    *,
    active: int = 32,
    synapses: int = 16,
    threshold: int = 4,
    tokens: int = 4000,
    by: Literal["abs", "value"] = "abs",
    seed: int = 0,
    progress: bool = True,
) -> ExpectedVsObserved:
    """Compare the false matches of a model's codes with those of random codes of the same size.

    Args:
        model: the model to read.
        batches: as in `record`.
        site: as in `record`; a bare name is measured in every block.
        active: (k) ones of a code.
        synapses: (s) cells of a segment.
        threshold: (theta) how many of them make a match.
        tokens: how many to sample at each site; one half of the documents is stored, the other tested.
        by: as in `sparse_code`.
        seed: of the sample, the halves and the synapses.
        progress: show a bar.

    Returns:
        One result per site.

    Raises:
        ValueError: 1 <= threshold <= synapses <= active <= channels of the site does not hold.
        DataError: the sample is of one document only.
        ActkitError: what `record` raises.
    """
    if not 1 <= threshold <= synapses <= active:
        raise ValueError(
            f"1 <= threshold <= synapses <= active does not hold: threshold={threshold}, synapses={synapses} and "
            f"active={active} were given."
        )
    seen = record(model, {site: Sample(tokens, seed)}, batches, progress=progress)
    found = []
    for each in track([one for one in seen if one not in seen.unseen], "Matching codes", enabled=progress):
        sample: Sample = seen[each]
        codes = sparse_code(sample.rows, active, by=by)
        stored, tested = _halves(codes, sample.documents, seed)
        segments = DendriticSegments(codes.shape[1], synapses, threshold)
        segments.learn(stored, generator=torch.Generator().manual_seed(seed))
        counts = torch.zeros(synapses + 1, dtype=torch.int64)
        for part in tested.split(max(1, CHUNK // len(stored))):
            counts += torch.bincount(segments.overlap(part).flatten(), minlength=synapses + 1).cpu()
        shape = (codes.shape[1], active, synapses, threshold, len(stored), len(tested))
        found.append(SiteMatches(str(each), *shape, Overlaps(tuple(counts.tolist()))))
    return ExpectedVsObserved(tuple(found))


def _halves(codes: Tensor, documents: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Split off the codes of a random half of the documents; return these and the others."""
    names, owner = documents.unique(return_inverse=True)
    if len(names) < 2:
        raise DataError(
            f"batches: the sample of {len(codes)} tokens is of {len(names)} document; stored and tested tokens must be "
            f"of different ones. Give more rows, or more tokens."
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).to(owner.device)
    chosen = (order < math.ceil(len(names) / 2))[owner]
    return codes[chosen], codes[~chosen]
