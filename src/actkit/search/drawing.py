"""The pictures of the report, as small inline SVG that follows the page's colours; titles say the numbers.

Colours are CSS classes of the page (`core/page/templates/style.css`): c0 to c7 for lines, `mark-*` for candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, isfinite, log10
from statistics import median
from typing import Literal

from actkit.core.ground.estimate import Estimate
from actkit.core.page.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, frame, scale, svg, ticks, titles
from actkit.core.page.pictures import FAINT, FULL, grid, lines_over
from actkit.search.results import Profile, SiteProfile

Kind = Literal["original", "best", "front", "other"]
RADIUS = {"original": 7.0, "best": 8.0, "front": 6.0, "other": 5.0}


@dataclass(frozen=True)
class Mark:
    """One candidate in a picture.

    Attributes:
        share: of the original's bytes or time.
        loss: of quality.
        kind: what it is drawn as.
        label: beside it.
        title: what is read out for whoever points at it.
        of: the place on the page that says more, or ''.
    """

    share: Estimate
    loss: Estimate
    kind: Kind
    label: str
    title: str
    of: str = ""


def scatter(marks: Sequence[Mark], x_title: str, limit: float) -> str:
    """Draw the loss against a share of bytes or time, with the intervals of both and the limit on the loss.

    Losses far beyond the limit stand at the upper edge, with an arrow and their value.

    Args:
        marks: the candidates.
        x_title: what the share is of.
        limit: on the loss.

    Returns:
        SVG.
    """
    highest = max((m.loss.high if isfinite(m.loss.high) else m.loss.value for m in marks), default=limit)
    top = max(1.3 * limit, min(1.05 * highest, 2.5 * limit if limit else 0.1), 1e-4)
    lowest = min((m.loss.low if isfinite(m.loss.low) else m.loss.value for m in marks), default=0.0)
    bottom = max(min(0.0, lowest), -top / 2) - 0.06 * top
    right = max((min(_end(m.share), 2 * m.share.value) for m in marks), default=1.0) * 1.06
    x = scale(0.0, right, LEFT, WIDTH - RIGHT)
    y = scale(bottom, top, HEIGHT - BOTTOM, TOP)
    parts = [frame(ticks(0.0, right), x, ticks(bottom, top), y, percent=True)]
    if bottom <= limit <= top:
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(limit):.1f}" y2="{y(limit):.1f}"/>')
        parts.append(f'<text class="limit-text" x="{LEFT + 6}" y="{y(limit) - 5:.1f}">limit {limit:.1%}</text>')
    taken: list[tuple[float, float, float, float]] = []
    drawn = sorted(marks, key=lambda mark: list(RADIUS).index(mark.kind), reverse=True)  # the best on top
    for mark in drawn:
        cx, cy = x(mark.share.value), max(TOP, min(HEIGHT - BOTTOM, y(mark.loss.value)))
        taken.append((cx - 9, cy - 9, cx + 9, cy + 9))
    parts += [_intervals(mark, x, y) for mark in drawn]  # below all labels
    parts += [_mark(mark, x, y, taken) for mark in drawn]
    parts.append(titles(x_title, "loss"))
    return svg(parts, f"Loss against {x_title}: {len(marks)} models")


def points(marks: Sequence[Mark], x_title: str, y_title: str) -> str:
    """Draw one figure with its interval against another on a logarithmic axis.

    Args:
        marks: `share` is what the x axis shows, above 0, `loss` what the y axis shows, whichever these are.
        x_title: of the x axis.
        y_title: of the y axis.

    Returns:
        SVG.
    """
    ends = [end for mark in marks for end in (mark.loss.low, mark.loss.high, mark.loss.value) if isfinite(end)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    room = 0.08 * ((high - low) or 1.0)
    low, high = low - room, high + room
    shares = [mark.share.value for mark in marks] or [1.0]
    first, last = log10(min(shares) / 1.3), log10(max(shares) * 1.3)
    logarithmic = scale(first, last, LEFT, WIDTH - RIGHT)
    y = scale(low, high, HEIGHT - BOTTOM, TOP)

    def x(value: float) -> float:
        return logarithmic(log10(value))

    steps = [factor * 10.0**power for power in range(floor(first), floor(last) + 1) for factor in (1, 2, 5)]
    kept = [round(each, 12) for each in steps if first <= log10(each) <= last]
    parts = [frame(kept, x, ticks(low, high), y, percent=False)]
    drawn = sorted(marks, key=lambda mark: list(RADIUS).index(mark.kind), reverse=True)
    places = [(x(mark.share.value), y(mark.loss.value)) for mark in drawn]
    taken = [(cx - 9, cy - 9, cx + 9, cy + 9) for cx, cy in places]
    parts += [_intervals(mark, x, y) for mark in drawn]
    parts += [_mark(mark, x, y, taken) for mark in drawn]
    parts.append(titles(x_title, y_title))
    return svg(parts, f"{y_title} against {x_title}: {len(marks)} arms")


def _mark(
    mark: Mark, x: Callable[[float], float], y: Callable[[float], float], taken: list[tuple[float, float, float, float]]
) -> str:
    cx, cy = x(mark.share.value), y(mark.loss.value)
    beyond = cy < TOP
    cy = max(TOP + 4, cy)
    label = f"{mark.label} ▲ {mark.loss.value:.0%}" if beyond else mark.label
    of = f' data-of="{escape(mark.of)}"' if mark.of else ""
    parts = [f'<g class="mark-{mark.kind}"{of}><title>{escape(mark.title)}</title>']
    radius = RADIUS[mark.kind]
    if mark.kind == "original":
        parts.append(_diamond(cx, cy, radius))
    else:
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}"/>')
    tx, ty, anchor = _place(cx, cy, 6.6 * len(label), taken, beside=mark.share.high <= mark.share.low)
    parts.append(f'<text x="{tx:.1f}" y="{ty:.1f}" text-anchor="{anchor}">{escape(label)}</text></g>')
    return "".join(parts)


def _intervals(mark: Mark, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    cx, cy = x(mark.share.value), max(TOP + 4, y(mark.loss.value))
    parts = [f'<g class="mark-{mark.kind}">']
    if isfinite(mark.loss.low) and isfinite(mark.loss.high) and y(mark.loss.value) >= TOP:
        y1, y2 = min(HEIGHT - BOTTOM, y(mark.loss.low)), max(TOP, y(mark.loss.high))
        parts.append(f'<line class="interval" x1="{cx:.1f}" x2="{cx:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>')
    if _end(mark.share) > mark.share.low:
        x1, x2 = x(mark.share.low), min(WIDTH - RIGHT, x(_end(mark.share)))
        parts.append(f'<line class="interval" x1="{x1:.1f}" x2="{x2:.1f}" y1="{cy:.1f}" y2="{cy:.1f}"/>')
    return "".join(parts) + "</g>"


def _end(share: Estimate) -> float:
    return share.high if isfinite(share.high) else share.value


def _diamond(cx: float, cy: float, radius: float) -> str:
    corners = ((cx, cy - radius), (cx + radius, cy), (cx, cy + radius), (cx - radius, cy))
    return '<polygon points="' + " ".join(f"{a:.1f},{b:.1f}" for a, b in corners) + '"/>'


def _place(
    cx: float, cy: float, width: float, taken: list[tuple[float, float, float, float]], *, beside: bool
) -> tuple[float, float, str]:
    """The place of a label of that width: beside its point, above, below, or a little further out.

    It is beside its point only if no interval lies there.
    """
    found = None
    for away in (11, 19, 28, 38):
        level = ((away, 4, "start"), (-away, 4, "end"))
        upright = ((0, -away, "middle"), (0, away + 9, "middle"))
        for dx, dy, anchor in (*level, *upright) if beside else (*upright, *level):
            for side in (0, -12, 12):
                left = cx + dx - {"start": 0, "end": width, "middle": width / 2}[anchor]
                box = (left, cy + dy + side - 11, left + width, cy + dy + side + 3)
                inside = box[0] > LEFT and box[2] < WIDTH - 2 and box[1] > 2 and box[3] < HEIGHT - BOTTOM
                if inside and not any(_overlap(box, other) for other in taken):
                    taken.append(box)
                    return cx + dx, cy + dy + side, anchor
                found = found or ((cx + dx, cy + dy + side, anchor) if inside else None)
    return found or (cx + 11, cy + 4, "start")


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@dataclass(frozen=True)
class Bar:
    """One row of `bars`.

    Attributes:
        label: above it.
        value: its length, with an interval.
        text: at its end.
    """

    label: str
    value: Estimate
    text: str


def bars(rows: Sequence[Bar]) -> str:
    """Draw horizontal bars with intervals, each with its label above and its text at the end."""
    width, step, left = 680, 46, 4
    longest = max((row.value.high if isfinite(row.value.high) else row.value.value for row in rows), default=1.0)
    x = scale(0.0, longest, left, width - 270)
    parts = []
    for index, row in enumerate(rows):
        top = 8 + step * index
        end = x(row.value.value)
        parts.append(f'<text class="bar-label" x="{left}" y="{top + 9}">{escape(row.label)}</text>')
        parts.append(
            f'<rect class="bar{" bar-base" if index == 0 else ""}" x="{left}" y="{top + 15}" width="{end - left:.1f}" '
            f'height="16" rx="3"/>'
        )
        if isfinite(row.value.low) and isfinite(row.value.high):
            low, high = x(row.value.low), x(row.value.high)
            parts.append(f'<line class="interval" x1="{low:.1f}" x2="{high:.1f}" y1="{top + 23}" y2="{top + 23}"/>')
            end = max(end, high)
        parts.append(f'<text x="{end + 8:.1f}" y="{top + 28}">{escape(row.text)}</text>')
    return svg(parts, "Speed: " + "; ".join(f"{row.label}: {row.text}" for row in rows), width, step * len(rows) + 8)


def stacked(
    rows: Sequence[tuple[str, Mapping[str, float]]], kinds: Sequence[str], words: Callable[[float], str]
) -> str:
    """Draw horizontal bars that are made of parts.

    Args:
        rows: name, and the size of each kind.
        kinds: in the order of the parts; the first is c0.
        words: that say a size.

    Returns:
        SVG; the title of a part says its numbers.
    """
    width, step, left, room = 860, 40, 4, 110
    longest = max((sum(parts.values()) for _, parts in rows), default=1.0)
    x = scale(0.0, longest or 1.0, 0.0, width - left - room)
    drawn = []
    for index, (name, parts) in enumerate(rows):
        top, at, whole = 4 + step * index, float(left), sum(parts.values())
        drawn.append(f'<text class="bar-label" x="{left}" y="{top + 11}">{escape(name)}</text>')
        for kind in kinds:
            size = parts.get(kind, 0.0)
            if not size:
                continue
            title = f"{name}, {kind}: {words(size)}, {size / whole:.0%} of its bytes"
            drawn.append(
                f'<g class="c{kinds.index(kind) % 8}"><title>{escape(title)}</title><rect class="cell" x="{at:.1f}" '
                f'y="{top + 16}" width="{max(x(size), 0.5):.1f}" height="15"/></g>'
            )
            at += x(size)
        drawn.append(f'<text x="{at + 8:.1f}" y="{top + 28}">{escape(words(whole))}</text>')
    label = "; ".join(f"{name}: {words(sum(parts.values()))}" for name, parts in rows)
    return svg(drawn, label, width, step * len(rows) + 6)


# -- the profile -------------------------------------------------------------------------------------------------------

Reader = Callable[[SiteProfile], float | None]
PANELS: tuple[tuple[str, Reader, bool], ...] = (
    ("above 1 % of the scale (%)", lambda s: 100 * s.above_one_percent, False),
    ("largest |x| over the median", lambda s: s.ratio, True),
    ("outlier channels", lambda s: len(s.outliers), False),
    ("effective rank (% of channels)", lambda s: None if s.rank_share is None else 100 * s.rank_share, False),
    ("activations in int8, one scale (dB)", lambda s: s.int8_snr, False),
)


@dataclass(frozen=True)
class Panel:
    """A small picture of a profile.

    Attributes:
        title: above it.
        svg: the picture.
        legend: of its lines: (class, name).
    """

    title: str
    svg: str
    legend: tuple[tuple[str, str], ...]


def profile_panels(profile: Profile) -> list[Panel]:
    """Draw six panels over the blocks (over the layers of a traced model).

    Args:
        profile: of a model.

    Returns:
        The panels; a line is a site, in the last panel a role.
    """
    places = list(dict.fromkeys(_place_of(site) for site in profile.sites))
    names = list(dict.fromkeys(site.name for site in profile.sites))[:8]
    legend = tuple((f"c{index}", name) for index, name in enumerate(names))
    panels = []
    for title, read, logarithmic in PANELS:
        lines = [
            _medians((places.index(_place_of(s)), read(s)) for s in profile.sites if s.name == name) for name in names
        ]
        panels.append(Panel(title, lines_over(lines, title, places, logarithmic), legend))
    if profile.weights:
        roles = list(dict.fromkeys(weight.role for weight in profile.weights))[:8]
        rows = [[w for w in profile.weights if w.role == role] for role in roles]
        lines = [
            _medians((w.block if role != "layer" else at, w.int4_snr) for at, w in enumerate(group))
            for role, group in zip(roles, rows)
        ]
        title = "weights in int4, groups of 64 (dB)"
        wide = [w.path for w in rows[0]] if roles == ["layer"] else sorted({w.block for w in profile.weights})
        panels.append(
            Panel(title, lines_over(lines, title, wide, False), tuple((f"c{i}", r) for i, r in enumerate(roles)))
        )
    return panels


def profile_grids(profile: Profile) -> list[tuple[str, str]]:
    """Draw what stands out block by block: how much is not near zero, and how large the largest value is.

    Args:
        profile: of a model.

    Returns:
        (title, SVG); none for a traced model, whose sites have one place each.
    """
    blocks = sorted({site.block for site in profile.sites if site.block is not None})
    names = list(dict.fromkeys(site.name for site in profile.sites if site.block is not None))
    if len(blocks) < 2:
        return []
    sites = {(site.name, site.block): site for site in profile.sites}
    largest = [site.ratio for site in profile.sites if site.ratio is not None and isfinite(site.ratio)]
    decades = max(1.0, log10(max(largest, default=10.0)))

    def above(site: SiteProfile) -> tuple[str, float, str]:
        share = site.above_one_percent
        return "c0", share, f"{share:.1%} above 1 % of the scale"

    def outliers(site: SiteProfile) -> tuple[str, float, str]:
        ratio = site.ratio if site.ratio is not None and isfinite(site.ratio) else None
        depth = 0.0 if ratio is None else log10(max(1.0, ratio)) / decades
        said = "no median above 0" if ratio is None else f"largest |x| {ratio:,.4g} times the median"
        return "c3", depth, f"{said}; {len(site.outliers)} outlier channels of {site.channels:,}"

    def picture(title: str, of: Callable[[SiteProfile], tuple[str, float, str]]) -> tuple[str, str]:
        def cell(row: int, column: int) -> tuple[str, float, str, bool] | None:
            site = sites.get((names[row], blocks[column]))
            if site is None:
                return None
            colour, depth, words = of(site)
            opacity = FAINT + (FULL - FAINT) * max(0.0, min(1.0, depth))
            return colour, opacity, f"block {blocks[column]}, {names[row]}: {words}", False

        return title, grid(names, [str(block) for block in blocks], title, cell)

    return [
        picture("Density: values above 1 % of the scale", above),
        picture("Outliers: largest |x| over the median, logarithmic", outliers),
    ]


def _place_of(site: SiteProfile) -> int | str:
    return site.site.partition(":")[2] if site.block is None else site.block


def _medians(points: Iterable[tuple[int, float | None]]) -> list[tuple[int, float]]:
    found: dict[int, list[float]] = {}
    for place, value in points:
        if value is not None and isfinite(value):
            found.setdefault(place, []).append(value)
    return [(place, median(values)) for place, values in sorted(found.items())]
