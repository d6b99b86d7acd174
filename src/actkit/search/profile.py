"""profile(model, batches): what the activations of a model look like, and which methods that suggests.

One pass, block by block, so that the statistics of one block are held at a time. `SiteProfile` and `WeightProfile` say
how each number is defined; the constants below say what counts as unusual, and why.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log10
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import Replace, temporarily
from actkit.core.forward.batch import BatchContext
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import DataError
from actkit.core.ground.memory import MemoryPlan, parse_bytes
from actkit.core.ground.modules import is_within
from actkit.core.ground.offload import onloaded, refuse_offloaded
from actkit.core.model.anatomy import Anatomy, Block, Linear, Site, equalization_sets
from actkit.core.model.anatomy import anatomy as read_anatomy
from actkit.core.model.experts import ExpertList
from actkit.core.recipe.blockwise import record_by_block
from actkit.core.recipe.proposals import INT4_POOR
from actkit.core.store.activation_store import ActivationStore
from actkit.core.watch.capture import record
from actkit.core.watch.extremes import is_massive
from actkit.core.watch.statistics import AbsMax, Density, Moments, Quantiles, Sample, Spectrum, Statistic
from actkit.search.results import Finding, Profile, SiteProfile, WeightProfile

SITES = ("block.output", "attention.input", "attention.mixed", "mlp.input", "mlp.gate", "mlp.hidden", "layer.input")
SAMPLED = 1 << 19  # values kept per site (2 MiB), for the error of rounding; 64 to 2048 rows
WIDEST_SPECTRUM = 4096  # channels; beyond it X^T X alone takes more than 128 MiB and its eigenvalues minutes
SPECTRUM_BUDGET = 1 << 30  # bytes for X^T X of one block, if max_memory says nothing
SPECTRUM_BLOCKS = 5  # blocks, evenly spread, whose spectra are taken; that of all 30 costs six plain passes
GROUP = 64
OUTLIER = 6.0  # times the median channel: LLM.int8() calls an activation an outlier from magnitude 6 on
SPARSE = 50.0  # per cent of zeros from which skipping them pays for the bookkeeping
FEW = 0.1  # up to this share of channels, outliers set the scale and make all others look small: no call for sparsity
LOW_RANK = 0.25
INT8_POOR = 20.0  # dB: an error of 10 % of the signal; a bell curve with one int8 scale leaves about 40


def profile(
    model: nn.Module,
    batches: Sequence[Any] | None = None,
    *,
    store: ActivationStore | None = None,
    sites: Iterable[Site | str] = (),
    anatomy: Anatomy | None = None,
    max_memory: int | str | None = None,
    progress: bool = True,
) -> Profile:
    """Profile the activations of a model, in one pass.

    Experts are opened for it and closed after it.

    Args:
        model: neither compiled nor sharded.
        batches: dicts of the model's keywords, or tensors.
        store: activations on disk, in place of batches: the sites that it holds are profiled, and the model is not run.
        sites: further sites or patterns to show, such as 'activation.output'; one more batch is run to see how many
            channels they have.
        anatomy: of the model, if it was read before.
        max_memory: cap for the statistics of one block, bytes or '2GB'; spectra are left out first, and noted.
        progress: show a bar.

    Returns:
        What each site and each weight is like, and what that suggests.

    Raises:
        DataError: there are no batches, or the model cannot be called with one.
        ValueError: a site is unknown, or batches or sites were given beside a store.
        CheckpointError: the store is of another model, or damaged.
        CoverageError: the model cannot be read.
        MemoryLimitError: the statistics of a block need more than `max_memory`.
        NonFiniteError: an activation is NaN or infinite.
        UnsupportedModelError: a block runs several times in one pass, or not at all.
    """
    if store is not None:
        if batches is not None or tuple(sites):
            raise ValueError(
                "store: batches or sites were given beside it; its own sites are profiled, leave them out."
            )
        return _of_store(model, store, anatomy, max_memory, progress)
    if isinstance(batches, Tensor | Mapping):
        raise DataError(f"batches: one {type(batches).__name__} was given; give a list of batches: [batch].")
    batches = batches if isinstance(batches, Sequence) else list(batches or ())
    if not len(batches):
        raise DataError("batches: none were given; give at least one.")
    view = anatomy or read_anatomy(model, batches[0])
    with _opened(view):
        blocks = [view.block(block.index) for block in view.blocks]
        widths: dict[int | None, dict[Site, int]] = {block.index: _widths(view, block) for block in blocks}
        for site, width in _widths_seen(view, sites, batches[0]).items():
            widths.setdefault(_block_of(view, site), {}).setdefault(site, width)
        plan = _Plan.of(widths, max_memory)
        findings = _Found(blocks)

        def statistics(block: Block) -> dict[Site, list[Statistic]]:
            return plan.statistics(block.index)

        for block, seen in record_by_block(view, statistics, batches, progress=progress):
            findings.add(seen, _readers(block))
            with onloaded(view.model, block.path):
                findings.weights += [_weight(linear, block.index) for linear in block.linears()]
        if outside := plan.statistics(None):
            findings.add(record(view.model, outside, batches, anatomy=view, progress=progress), {})
    rows = sum(BatchContext.of(batch, view.model).tokens for batch in batches)
    return findings.profile(view, rows, plan.notes)


def _of_store(
    model: nn.Module, store: ActivationStore, anatomy: Anatomy | None, max_memory: int | str | None, progress: bool
) -> Profile:
    """The profile of what a store holds."""
    view = anatomy or read_anatomy(model)
    widths: dict[int | None, dict[Site, int]] = {}
    for name in store.sites:
        site = view.canonical(Site.parse(name))
        width = next((x.shape[1] for x, _ in store.read(name)), 0)
        widths.setdefault(_block_of(view, site), {}).setdefault(Site.parse(name), width)
    plan = _Plan.of(widths, max_memory)
    # It is recorded before experts are opened: the store knows the model as it was given.
    every = [record(model, plan.statistics(at), store=store, anatomy=view, progress=progress) for at in widths]
    with _opened(view):
        blocks = [view.block(block.index) for block in view.blocks]
        findings = _Found(blocks)
        readers = {site: paths for block in blocks for site, paths in _readers(block).items()}
        for seen in every:
            findings.add(seen, {site: readers.get(view.canonical(site), ()) for site in seen})
        for block in blocks:
            with onloaded(view.model, block.path):
                findings.weights += [_weight(linear, block.index) for linear in block.linears()]
    notes = [f"activations of a store, {len(store.sites)} sites", *plan.notes]
    return findings.profile(view, max(store.count(name) for name in store.sites), notes)


@contextmanager
def _opened(view: Anatomy) -> Iterator[None]:
    """Open the experts of a model as long as a context lasts."""
    closed = [b.experts for b in view.blocks if b.experts and not isinstance(b.experts.module, ExpertList)]
    for experts in closed:
        refuse_offloaded(experts.module, f"{experts.path} holds all experts in one tensor")
    with temporarily(view.model, [Replace(e.path, ExpertList.of(e.module, e.row)) for e in closed]):
        yield


class _Found:
    """What was found so far.

    Args:
        blocks: of the model, experts opened.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        sets = [each for block in blocks for each in equalization_sets(block)]
        self.free = {e.consumers[0].path for e in sets if e.consumers and not e.refused and not e.shared}
        self.sites: list[SiteProfile] = []
        self.weights: list[WeightProfile] = []
        self.unseen: list[Site] = []

    def add(self, seen: Mapping[Site, Any], read_by: Mapping[Site, tuple[str, ...]]) -> None:
        """Profile sites with their statistics; read_by: the linear layers that read each."""
        for site, statistics in seen.items():
            if any(statistic.count for statistic in statistics):
                self.sites.append(_site(site, statistics, read_by.get(site, ()), self.free))
            else:
                self.unseen.append(site)

    def profile(self, view: Anatomy, rows: int, notes: Iterable[str]) -> Profile:
        """All of it."""
        unseen = [f"no token reached {', '.join(map(str, self.unseen))}"] if self.unseen else []
        kind, findings = type(view.model).__name__, find(self.sites, self.weights)
        return Profile(
            kind, view.architecture, rows, tuple(self.sites), tuple(self.weights), findings, (*notes, *unseen)
        )


def snr(x: Tensor, rounded: Tensor) -> float | None:
    """Return the signal-to-noise ratio in dB, 10 log10(sum x^2 / sum (x - rounded)^2).

    Args:
        x: exact values.
        rounded: the same, rounded.

    Returns:
        dB; None if either sum is 0.
    """
    signal, noise = float(x.double().square().sum()), float((x.double() - rounded.double()).square().sum())
    return 10 * log10(signal / noise) if signal and noise else None


def _readers(block: Block) -> dict[Site, tuple[str, ...]]:
    """The linear layers that read each site; those of all experts for the block's mlp.input."""
    found: dict[Site, tuple[str, ...]] = {}
    for inputs in block.linear_inputs():
        site = Site("mlp.input", block.index) if inputs.site.name == "mlp.input" else inputs.site
        found[site] = (*found.get(site, ()), *(linear.path for linear in inputs.linears))
    return found


def _widths(view: Anatomy, block: Block) -> dict[Site, int]:
    """The sites to watch in a block, with their numbers of channels."""
    widths = {inputs.site: inputs.linears[0].in_features for inputs in block.linear_inputs()}
    hidden = next(iter(widths.values()), 0)  # the first linear layer reads the residual stream
    found: dict[Site, int] = {}
    for site in dict.fromkeys(view.canonical(site) for site in block.sites()):
        if site.name not in SITES or (site.name == "mlp.input" and site.expert is not None):
            continue  # what an expert reads is some rows of the block's mlp.input
        if site.name == "layer.input" and site not in widths:  # a convolution, or the head
            module: Any = view.model.get_submodule(site.path or "")
            found[site] = getattr(module, "in_channels", getattr(module, "in_features", hidden))
        elif site.name == "mlp.gate":
            found[site] = widths[Site("mlp.hidden", site.block, site.expert)]
        else:
            found[site] = widths.get(site, hidden)
    return found


def _widths_seen(view: Anatomy, sites: Iterable[Site | str], batch: Any) -> dict[Site, int]:
    """Sites by their own names, with the numbers of channels that one batch has there (0 if nothing came by)."""
    sites = list(sites)
    if not sites:
        return {}
    seen = record(view.model, dict.fromkeys(sites, AbsMax()), [batch], anatomy=view, progress=False)
    return {view.canonical(site): statistic.channels or 0 for site, statistic in seen.items()}


def _block_of(view: Anatomy, site: Site) -> int | None:
    """The block in which a site is read; None for stem and head."""
    if site.block is not None:
        return site.block
    return next((block.index for block in view.blocks if is_within(site.path or "", block.path)), None)


@dataclass(frozen=True)
class _Plan:
    """What is recorded of each block.

    Attributes:
        widths: the sites of each block, with their numbers of channels; those outside of all blocks under None.
        spectra: the sites whose spectrum is taken.
        notes: what is left out, and why.
    """

    widths: Mapping[int | None, Mapping[Site, int]]
    spectra: frozenset[Site]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, widths: Mapping[int | None, Mapping[Site, int]], max_memory: int | str | None) -> _Plan:
        """Spectra, narrow sites first, as long as there is room; of some blocks, evenly spread.

        Raises:
            MemoryLimitError: what else is recorded of a block needs more than `max_memory`.
        """
        blocks = [index for index in widths if index is not None]
        notes: list[str] = []
        last = SPECTRUM_BLOCKS - 1
        spread = {blocks[round(i * (len(blocks) - 1) / last)] for i in range(SPECTRUM_BLOCKS)} if blocks else set()
        if len(spread) < len(blocks):
            numbers = ", ".join(map(str, sorted(spread)))
            notes.append(f"effective rank measured in {len(spread)} of {len(blocks)} blocks, evenly spread: {numbers}")
        spectra: set[Site] = set()
        without: list[Site] = []
        for index, sites in widths.items():
            rows = [(str(s), type(each).__name__, each.memory(w)) for s, w in sites.items() for each in _statistics(w)]
            plan = MemoryPlan(tuple(rows))
            if max_memory is not None:
                plan.check(max_memory)
            left = SPECTRUM_BUDGET if max_memory is None else parse_bytes(max_memory) - plan.total
            if index is not None and index not in spread:
                continue
            for site, width in sorted(sites.items(), key=lambda item: item[1]):
                left -= Spectrum().memory(width)
                fits = width <= WIDEST_SPECTRUM and left >= 0
                spectra.add(site) if fits else without.append(site)
        if without:
            more = f" and {len(without) - 4} more" if len(without) > 4 else ""
            notes.append(
                f"effective rank not measured at {', '.join(map(str, without[:4]))}{more}: more than "
                f"{WIDEST_SPECTRUM} channels, or past the memory"
            )
        return cls(widths, frozenset(spectra), tuple(notes))

    def statistics(self, block: int | None) -> dict[Site, list[Statistic]]:
        """Fresh ones for the sites of a block by its number, or for those outside of all."""
        return {
            site: [*_statistics(width), *([Spectrum()] if site in self.spectra else [])]
            for site, width in self.widths.get(block, {}).items()
        }


def _statistics(width: int) -> list[Statistic]:
    """What is recorded at every site of so many channels."""
    return [AbsMax(), Moments(), Density(), Quantiles(), Sample(min(2048, max(64, SAMPLED // max(1, width))))]


def _site(site: Site, seen: Sequence[Any], read_by: tuple[str, ...], free: Container[str]) -> SiteProfile:
    absmax, moments, density, quantiles, sample, *spectrum = seen
    values = absmax.value.float()
    largest, middle, scale = float(absmax.overall), float(quantiles.quantile(0.5)), float(quantiles.quantile(0.999))
    channel = float(values.median())
    kurtosis = moments.kurtosis[torch.isfinite(moments.kurtosis)]
    ratio = largest / middle if middle else None
    rows = sample.rows.float()
    return SiteProfile(
        site=str(site),
        name=site.name,
        block=site.block,
        rows=int(density.count),
        channels=len(values),
        density=float(density.density),
        above_one_percent=1 - float(quantiles.cdf(0.01 * scale)) if scale else 0.0,
        scale=scale,
        dead=_indices(values == 0),
        largest=largest,
        largest_channel=int(values.argmax()),
        median=middle,
        ratio=ratio,
        massive=is_massive(largest, middle),
        outliers=_indices(values > OUTLIER * channel) if channel else (),
        kurtosis_median=float(kurtosis.median()) if len(kurtosis) else None,
        kurtosis_max=float(kurtosis.max()) if len(kurtosis) else None,
        effective_rank=float(spectrum[0].effective_rank) if spectrum and largest else None,
        int8_snr=_activation_snr(rows, largest, 8),
        int4_snr=_activation_snr(rows, largest, 4),
        thresholds={f"{share:.0%}": float(quantiles.quantile(share)) for share in (0.25, 0.5, 0.7)},
        read_by=read_by,
        scalable=any(path in free for path in read_by),
    )


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())


def _activation_snr(rows: Tensor, largest: float, bits: int) -> float | None:
    """One symmetric scale for all: the largest |x| of all rows goes in beside the sample, so that it sets the scale."""
    grid = IntegerGrid(bits, symmetric=True)
    rounded = grid.fake(torch.cat((rows.flatten(), rows.new_tensor([largest])))[None])[0, :-1]
    return snr(rows.flatten(), rounded)


def _weight(linear: Linear, block: int) -> WeightProfile:
    weight = linear.weight.detach().float()
    size = -1 if weight.shape[1] % GROUP else GROUP
    int8, int4 = (snr(weight, IntegerGrid(bits, size).fake(weight)) for bits in (8, 4))
    return WeightProfile(linear.path, linear.role, block, size, int8, int4)


def _remarks(s: SiteProfile) -> Iterator[tuple[str, float, str]]:
    """What stands out at one site: (what, number, suggestion), with {} for the number if the text holds it."""
    zeros, small = 100 * (1 - s.density), 100 * (1 - s.above_one_percent)
    if s.massive and s.ratio:
        advice = "round weights only (rtn, awq): one scale for these activations loses everything else"
        yield "massive activations, {} times the median", s.ratio, advice
    if not s.read_by:
        return
    if zeros >= SPARSE:
        yield "{} % of the values are exactly 0", zeros, "input sparsity is nearly free there: try teal or wina at {} %"
    elif small >= SPARSE and not 0 < len(s.outliers) <= FEW * s.channels:
        advice = "input sparsity should cost little there: try teal or wina at {} %, and measure the loss"
        yield "{} % of the values are below 1 % of the scale", small, advice
    if s.dead:
        advice = "teal and wina skip them for nothing; profile more data before calling them dead for good"
        yield "channels never active on the {rows} rows seen: {}", len(s.dead), advice
    if s.outliers:
        advice = "awq before rounding to 4 bits" if s.scalable else "rtn at 8 bits: awq cannot move a scale from there"
        yield "outlier channels, above 6 times the median one: {} ({outliers})", len(s.outliers), advice
    if s.int8_snr is not None and s.int8_snr < INT8_POOR:
        advice = "keep these activations in floating point; rtn and awq round weights only"
        yield "one int8 scale for the tensor leaves {} dB", s.int8_snr, advice
    if s.rank_share is not None and s.rank_share < LOW_RANK and s.rows >= s.channels:
        advice = "few directions carry it; worth knowing, but no registered method makes use of that yet"
        yield "effective rank is {} % of the channels", 100 * s.rank_share, advice


def find(sites: Sequence[SiteProfile], weights: Sequence[WeightProfile]) -> tuple[Finding, ...]:
    """Say what stands out, in words, from the first block on.

    Args:
        sites: their profiles.
        weights: their profiles.

    Returns:
        The findings; what several blocks have in common is one of them.
    """
    groups: dict[tuple[str, str, str], list[tuple[SiteProfile, float]]] = {}
    for site in sites:
        name = site.site if site.block is None else f"experts' {site.name}" if ".experts." in site.site else site.name
        for what, number, suggestion in _remarks(site):
            groups.setdefault((what, suggestion, name), []).append((site, number))
    findings = []
    for (what, suggestion, name), found in groups.items():
        numbers = [number for _, number in found]
        outliers = sorted({channel for site, _ in found for channel in site.outliers})
        listed = ", ".join(map(str, outliers[:8])) + ", ..." * (len(outliers) > 8)
        text = what.format(spread(numbers), rows=spread([site.rows for site, _ in found]), outliers=listed)
        advice = suggestion.format(int(min(*numbers, 90) // 10 * 10))
        findings.append(Finding(name + in_blocks(site.block for site, _ in found), text, float(min(numbers)), advice))
    findings += _about_weights(weights)
    return tuple(findings) or (Finding("the whole model", "nothing unusual", 0.0, "no method suggests itself"),)


def _about_weights(weights: Sequence[WeightProfile]) -> list[Finding]:
    hard = [w for w in weights if w.int4_snr is not None and w.int4_snr < INT4_POOR]
    if not hard:
        return []
    numbers = [w.int4_snr for w in hard if w.int4_snr is not None]
    roles = ", ".join(dict.fromkeys(w.role for w in hard))
    where = f"weights of {roles}" + in_blocks(w.block for w in hard)
    what = f"4 bits in groups of {GROUP} leave {spread(numbers)} dB; a bell curve would leave 20"
    return [Finding(where, what, min(numbers), "rtn at 8 bits, or awq at 4")]


def spread(numbers: Sequence[float]) -> str:
    """Say '12', or '12-40': the range of several numbers, to three digits."""
    texts = [f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}" for number in (min(numbers), max(numbers))]
    return "-".join(dict.fromkeys(texts))


def in_blocks(blocks: Iterable[int | None]) -> str:
    """Say ' of blocks 0-3, 5', or '' if the sites have no block."""
    indices = sorted({block for block in blocks if block is not None})
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    listed = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f" of block{'s' * (len(indices) > 1)} {listed}" if indices else ""
