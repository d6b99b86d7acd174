"""How results of this package are shown on the terminal, and the profile as a plotly figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from actkit.core.ground.estimate import Estimate
from actkit.core.ground.figures import all_plain, plain, plotly
from actkit.core.ground.tables import PlainTable
from actkit.search.measured import Candidate
from actkit.search.verdict import times

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from actkit.search.results import Optimization, Profile, SiteProfile, WeightProfile

LONGEST_TABLE = 60  # rows; a longer one has a row per name instead, with medians over its sites
ABOUT_SITES = (
    "\nActivations. active: share not 0; >1 %: share above 1 % of the scale (the 99.9th percentile of |x|); dead: "
    "channels always 0; outliers: channels that reach above 6 times the median one; median: of |x|; kurtosis: 3 is a "
    "bell curve; rank: effective, share of the channels; int8, int4: dB left by rounding with one scale; !: massive "
    "(above 100, and above 1000 times the median).\n"
)
ABOUT_WEIGHTS = "\nWeights. dB left by rounding to nearest in groups of 64 inputs (*: whole rows).\n"
# One colour per site in every panel (Okabe and Ito's, told apart by colour-blind readers).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")


def profile_table(profile: Profile) -> Table:
    """Show sites, weights, findings and notes, one below the other, for 80 columns."""
    page = Table.grid()
    page.add_row(Text(f"{profile.model} ({profile.architecture}), {profile.rows:,} tokens or images", style="bold"))
    page.add_row(ABOUT_SITES)
    page.add_row(_sites(profile.sites))
    if profile.weights:
        page.add_row(ABOUT_WEIGHTS)
        page.add_row(_weights(profile.weights))
    for finding in profile.findings:
        where = Text.assemble("\n", (finding.site, "bold"), f": {finding.what}\n  -> {finding.suggestion}")
        page.add_row(where)
    if profile.notes:
        page.add_row(Group("", *(Text(f"note: {note}", style="dim") for note in profile.notes)))
    return page


def _plain(first: str, columns: Sequence[str]) -> Table:
    table = PlainTable(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    table.add_column(first, overflow="fold", min_width=17)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _sites(sites: Sequence[SiteProfile]) -> Table:
    columns = ("active", ">1 %", "dead", "out-\nliers", "median", "max/\nmedian", "kur-\ntosis", "rank", "int8", "int4")
    groups, label = [[site] for site in sites], "site, by block"
    if len(groups) > LONGEST_TABLE:
        label = "site, medians"
        names = dict.fromkeys(site.name for site in sites)
        groups = [[site for site in sites if site.name == name] for name in names]
    table = _plain(label, columns)
    previous = None
    for group in groups:
        first = group[0]
        if len(group) == 1 and previous is not None and first.block != previous:
            table.add_section()
        previous = first.block
        name = first.site.removeprefix("blocks.") if len(group) == 1 else f"{first.name} ({len(group)})"
        table.add_row(name, *_cells(group))
    return table


def _cells(group: Sequence[SiteProfile]) -> list[str]:
    def cell(read: Callable[[SiteProfile], float | None], form: str) -> str:
        numbers = [number for number in map(read, group) if number is not None]
        return format(median(numbers), form) if numbers else "-"

    return [
        cell(lambda s: s.density, ".0%"),
        cell(lambda s: s.above_one_percent, ".0%"),
        cell(lambda s: len(s.dead), ".0f"),
        cell(lambda s: len(s.outliers), ".0f"),
        cell(lambda s: s.median, ".2g"),
        cell(lambda s: s.ratio, ",.0f") + ("!" if any(s.massive for s in group) else ""),
        cell(lambda s: s.kurtosis_median, ".1f"),
        cell(lambda s: s.rank_share, ".0%"),
        cell(lambda s: s.int8_snr, ".1f"),
        cell(lambda s: s.int4_snr, ".1f"),
    ]


def _weights(weights: Sequence[WeightProfile]) -> Table:
    table = _plain("role", ("layers", "int8 worst", "int8 median", "int4 worst", "int4 median"))
    for role in dict.fromkeys(weight.role for weight in weights):
        group = [weight for weight in weights if weight.role == role]
        cells = []
        for numbers in ([w.int8_snr for w in group], [w.int4_snr for w in group]):
            known = [number for number in numbers if number is not None]
            cells += [f"{min(known):.1f}", f"{median(known):.1f}"] if known else ["-", "-"]
        table.add_row(role + "*" * any(w.group_size == -1 for w in group), str(len(group)), *cells)
    return table


def profile_figure(profile: Profile) -> Figure:
    """Draw six panels over the blocks (over the layers of a traced model), a line per site.

    Args:
        profile: of a model.

    Returns:
        A figure of plotly.

    Raises:
        ImportError: plotly is missing.
    """
    subplots = plotly().subplots
    panels: list[tuple[str, Callable[[SiteProfile], float | None]]] = [
        ("Values above 1 % of the scale (%)", lambda s: 100 * s.above_one_percent),
        ("Largest |x| over median |x|", lambda s: s.ratio),
        ("Outlier channels", lambda s: len(s.outliers)),
        ("Effective rank (% of channels)", lambda s: None if s.rank_share is None else 100 * s.rank_share),
        ("Activations, int8, one scale (dB)", lambda s: s.int8_snr),
    ]
    last = "Weights, int4, groups of 64 (dB)"
    figure = subplots.make_subplots(rows=2, cols=3, subplot_titles=[*(title for title, _ in panels), last])
    names = list(dict.fromkeys(site.name for site in profile.sites))
    for number, (_, read) in enumerate(panels):
        for name, colour in zip(names, COLOURS, strict=False):
            points = [(_where(s), read(s)) for s in profile.sites if s.name == name]
            _line(figure, number, points, name=name, colour=colour, legend="legend", first=number == 0)
    roles = list(dict.fromkeys(weight.role for weight in profile.weights))
    for role, colour in zip(roles, COLOURS, strict=False):
        weights = [(w.path if role == "layer" else w.block, w.int4_snr) for w in profile.weights if w.role == role]
        _line(figure, len(panels), weights, name=role, colour=colour, legend="legend2", first=True)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(type="log", row=1, col=2)
    blocks = any(site.block is not None for site in profile.sites)
    figure.update_xaxes(title_text="block" if blocks else None, dtick=None if not blocks else _step(profile))
    legends: dict[str, Any] = {
        "legend": {"orientation": "h", "y": -0.14, "title": {"text": "activations  "}},
        "legend2": {"orientation": "h", "y": -0.22, "title": {"text": "weights  "}},
    }
    title = f"{plain(profile.model)}: {profile.rows:,} tokens or images"
    return figure.update_layout(template="plotly_white", height=720, title=title, margin={"b": 140}, **legends)


def _where(site: SiteProfile) -> int | str:
    return site.site.partition(":")[2] if site.block is None else site.block


def _line(
    figure: Any,
    panel: int,
    points: Sequence[tuple[int | str, float | None]],
    *,
    name: str,
    colour: str,
    legend: str,
    first: bool,
) -> None:
    """One line in a panel; several points of one block (experts) become their median."""
    by_place: dict[int | str, list[float]] = {}
    for place, number in points:
        by_place.setdefault(place, []).extend([] if number is None else [number])
    values = [median(numbers) if numbers else None for numbers in by_place.values()]
    figure.add_scatter(
        x=all_plain(by_place),
        y=values,
        mode="lines+markers",
        name=plain(name),
        line={"color": colour},
        legend=legend,
        legendgroup=f"{legend}:{name}",
        showlegend=first,
        row=panel // 3 + 1,
        col=panel % 3 + 1,
    )


def _step(profile: Profile) -> int:
    """Ticks at whole blocks, about eight of them."""
    return max(1, (1 + max(site.block or 0 for site in profile.sites)) // 8)


def optimization_table(result: Optimization) -> Table:
    """Show the verdict, every candidate with what it gives, and why some do not pay, for 80 columns."""
    verdict = result.verdict
    said = [Text(f"  {line}") for line in (verdict.speed, verdict.memory, verdict.disk, verdict.quality)]
    table = _plain("candidate", ("loss on test", "disk", "mem.", "speed ratio", ""))
    reasons = []
    for candidate in (result.original, *result.candidates):
        best = verdict.best == candidate.name
        word = ""
        if candidate is not result.original:
            judgement = verdict.of(candidate.name)
            word = "best" if best else "pays" if judgement.pays else "no"
            reason = f"{judgement.beaten_by} beats it" if judgement.beaten_by else "; ".join(judgement.against)
            if reason:
                reasons.append(Text.assemble((candidate.name, "bold"), f": {reason}"))
        mark = "* " if candidate.name in result.front else "  "
        table.add_row(mark + candidate.name, *_candidate_cells(candidate, result), word, style="bold" if best else "")
    headline = Text(verdict.headline, style="bold green" if verdict.pays else "bold yellow")
    about = "* on the front; disk, peak memory and speed against the original's; intervals are 95 %"
    if any(each.stopped for each in result.candidates):
        about += "; losses of candidates that were stopped are of the search split"
    page = Table.grid()
    for line in (headline, *said, Text("")):
        page.add_row(line)
    page.add_row(table)
    for line in (Text(f"\n{about}\n", style="dim"), *reasons, *_afterwards(result)):
        page.add_row(line)
    return page


def _candidate_cells(candidate: Candidate, result: Optimization) -> list[str]:
    if candidate.stopped is not None and candidate.search_loss is not None:
        return [_narrow(candidate.search_loss, 100, "%", 1), "-", "-", "-"]  # what is known: of the search split
    if candidate.failed is not None or candidate.loss is None:
        return ["not made" if candidate.stopped else "failed", "-", "-", "-"]
    disk, ratio = candidate.disk_share(result.original), candidate.ratio
    return [
        "-" if candidate is result.original else _narrow(candidate.loss, 100, "%", 1),
        "-" if disk is None else f"{disk:.0%}",
        "-" if candidate.peak_share is None else f"{candidate.peak_share:.0%}",
        "-" if ratio is None else _narrow(ratio, 1, "", 2),
    ]


def _narrow(estimate: Estimate, scale: float, unit: str, digits: int) -> str:
    """'0.5% [0.3, 0.7]', with one digit less from 10 on, so that names have the room that they need."""
    digits -= abs(scale * estimate.value) >= 10
    value, low, high = (
        _unsigned(f"{scale * number:.{digits}f}") for number in (estimate.value, estimate.low, estimate.high)
    )
    known = isfinite(estimate.low) and isfinite(estimate.high)
    return f"{value}{unit} [{low}, {high}]" if known else f"{value}{unit}"


def _afterwards(result: Optimization) -> list[Text]:
    """What the speeds were measured with, the speed at the larger shape, the best model's folder, what was left out."""
    speeds = [each.speed for each in (result.original, *result.candidates) if each.speed is not None]
    lines = [Text(f"speed through: {words}") for words in dict.fromkeys(each.through for each in speeds)]
    if result.speed_row is not None:
        for row in result.speed_row.rows:
            if row.ratio is not None:
                what = f"{row.share:.0%} of the inputs dropped" if row.share else f"dense, through {row.engine}"
                about = "at 0.5B parameters (random weights: speed only)"
                lines.append(Text(f"{about}, {what}: {times(row.ratio)} as fast"))
    lines += [Text(line) for line in result.answers.lines()]
    if result.best is not None and result.proof is not None:
        lines.append(Text(f"saved: {result.proof.describe()}"))
    lines += [Text(f"not tried: {each.what}: {each.reason}", style="dim") for each in result.left_out]
    lines += [Text(f"note: {note}", style="dim") for note in result.notes]
    return [Text(""), *lines] if lines else []


def interval(estimate: Estimate, form: str) -> str:
    """Say '0.5% (0.3% to 0.7%)', without the interval if it is not known."""
    value, low, high = (_unsigned(f"{number:{form}}") for number in (estimate.value, estimate.low, estimate.high))
    known = isfinite(estimate.low) and isfinite(estimate.high)
    return f"{value} ({low} to {high})" if known else value


def _unsigned(text: str) -> str:
    """Without the sign of what is shown as zero: '-0.0%' is '0.0%'."""
    return text.removeprefix("-") if not text.strip("-0.%") else text
