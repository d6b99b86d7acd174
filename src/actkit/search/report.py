"""index.html: what a search found, on one page that needs nothing else: no font, no package, no network.

The page is `templates/report.html`; this module gives it words and numbers, so that the template only arranges them.
The script of all pages reads out what is pointed at and sorts the table; without it all is there.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import yaml

from actkit.core.ground.estimate import Estimate
from actkit.core.ground.memory import format_bytes
from actkit.core.ground.yaml_files import shorten
from actkit.core.page.templating import about_machine, template
from actkit.search.drawing import Bar, Kind, Mark, bars, profile_grids, profile_panels, scatter, stacked
from actkit.search.figures import interval
from actkit.search.measured import Candidate
from actkit.search.mixing.drawing import chosen_grid, colours_of, damage_grid
from actkit.search.verdict import times

if TYPE_CHECKING:
    from actkit.core.measure.speed import Speed
    from actkit.search.mixing.mixing import Mixing
    from actkit.search.results import Optimization


APART = 0.05  # an axis on which all stand closer together shows nothing


def render(result: Optimization) -> str:
    """Write the page.

    Args:
        result: of a search.

    Returns:
        HTML.

    Raises:
        ImportError: jinja2 (the extra `report`) is missing.
    """
    page = template("report.html", "actkit.search")
    from markupsafe import Markup

    rows = _rows(result)
    return page.render(
        r=result,
        rows=rows,
        best=next((row for row in rows if row["kind"] == "best"), None),
        pictures=[(title, Markup(svg)) for title, svg in _pictures(result)],
        bytes_read=_bytes_read(result, Markup),
        heat=[(title, Markup(svg)) for title, svg in profile_grids(result.profile)],
        panels=[(panel.title, Markup(panel.svg), panel.legend) for panel in profile_panels(result.profile)],
        speed_bars=None if result.speed_row is None else Markup(_speed_bars(result)),
        densities=_densities(result),
        writing=_writing(result),
        recipe=_recipe(result),
        commands=_commands(result),
        conditions=_conditions(result),
        layers=_layers(result),
        answers=result.answers.rows(),
        mixing=_mixing(result, Markup),
        bytes=format_bytes,
    )


def _kind(candidate: Candidate, result: Optimization) -> Kind:
    if candidate is result.original:
        return "original"
    if candidate.name == result.verdict.best:
        return "best"
    return "front" if candidate.name in result.front else "other"


def _rows(result: Optimization) -> list[dict[str, Any]]:
    """The table of candidates: a number (as in the pictures), words, and what they rest on."""
    rows = []
    mixed = len({speed.engine for speed in _speeds(result)}) > 1
    for number, candidate in enumerate((result.original, *result.candidates)):
        kind = _kind(candidate, result)
        judgement = None if kind == "original" else result.verdict.of(candidate.name)
        original, ratio = result.original, candidate.ratio
        rows.append(
            {
                "number": number or "",
                "place": _place(number),
                "kind": kind,
                "numbers": _numbers(candidate, original),
                "name": candidate.name,
                "on_front": candidate.name in result.front,
                "why": candidate.why,
                "failed": candidate.failed,
                "stopped": candidate.stopped,
                "seconds": f"{candidate.seconds:.0f} s",
                "passes": "" if candidate.passes is None else f"{candidate.passes:.1f}",
                "metrics": [
                    (name.replace("_", " "), interval(each, ".4g")) for name, each in candidate.metrics.items()
                ],
                "level": _level(candidate),
                "search_loss": None if candidate.search_loss is None else interval(candidate.search_loss, ".2%"),
                "loss": _split(None if candidate.loss is None else interval(candidate.loss, ".2%")),
                "disk": _amount(candidate.disk_bytes, candidate.disk_share(original)),
                "read": _amount(candidate.bytes_per_token, candidate.read_share(original)),
                "memory": "" if candidate.peak_share is None else f"{candidate.peak_share:.0%}",
                "rate": "" if candidate.speed is None else _rate(candidate.speed),
                "engine": "" if candidate.speed is None or not mixed else candidate.speed.engine,
                "speed": _split(None if ratio is None else times(ratio)),
                "noisy": candidate.speed is not None and candidate.speed.noisy,
                "speed_failed": candidate.speed_failed,
                "density": "" if candidate.density is None else f"{candidate.density:.0%}",
                "pays": judgement is not None and judgement.pays,
                "gains": () if judgement is None else tuple(judgement.gains.values()),
                "beaten_by": "" if judgement is None else judgement.beaten_by,
                "against": () if judgement is None else judgement.against,
                "proof": None if candidate.proof is None else candidate.proof,
                "coverage": ", ".join(f"{name} {share:.0%}" for name, share in candidate.coverage.items()),
                "changed": candidate.changed,
                "skipped": candidate.skipped,
                "notes": candidate.notes,
                "recipe": yaml.safe_dump(candidate.methods.dump(), sort_keys=False) if candidate.recipe else "",
            }
        )
    return rows


def _place(number: int) -> str:
    """Where the page says more of a candidate; of the original in the table alone."""
    return f"candidate-{number}"


def _numbers(candidate: Candidate, original: Candidate) -> dict[str, float]:
    """What the table is sorted by; nan for what was not measured, and of a failed one."""
    found = {
        "loss": None if candidate.loss is None else candidate.loss.value,
        "speed": candidate.ratio.value if candidate.ratio else 1.0 if candidate is original else None,
        "memory": candidate.peak_share,
        "disk": candidate.disk_share(original),
        "read": candidate.read_share(original),
    }
    return {name: math.nan if value is None or candidate.failed else value for name, value in found.items()}


def _rate(speed: Speed) -> str:
    """'52.3 tokens/s, the first after 0.11 s'."""
    first = speed.first_token_seconds
    return f"{speed.rate.value:.4g} {speed.unit}" + ("" if first is None else f", the first after {first.value:.2g} s")


def _speeds(result: Optimization) -> list[Speed]:
    return [each.speed for each in (result.original, *result.candidates) if each.speed is not None]


def _level(candidate: Candidate) -> str:
    """The metric that means something without the original."""
    found = ((name, candidate.metrics.get(name)) for name in ("perplexity", "accuracy"))
    return next((f"{name} {each.value:.4g}" for name, each in found if each is not None), "")


def _split(text: str | None) -> tuple[str, str]:
    """'0.4% (0.3% to 0.5%)' as its value and its interval."""
    value, _, rest = (text or "").partition(" (")
    return value, rest.removesuffix(")")


def _amount(size: float | None, share: float | None) -> tuple[str, str]:
    """A size, and its share of the original's."""
    return "" if size is None else format_bytes(size), "" if share is None else f"{share:.0%}"


def _pictures(result: Optimization) -> list[tuple[str, str]]:
    """The front: the loss against each of the costs that differ, as shares of the original's."""
    axes: list[tuple[str, Callable[[Candidate], Estimate | None]]] = [
        ("time", _time),
        ("bytes on disk", lambda each: _exactly(each.disk_share(result.original))),
        ("peak memory", lambda each: _exactly(each.peak_share)),
    ]
    found = []
    for title, share_of in axes:
        marks = []
        for number, candidate in enumerate((result.original, *result.candidates)):
            share = share_of(candidate)
            if candidate.loss is None or share is None or candidate.failed is not None:
                continue
            label = "original" if number == 0 else str(number)
            text = _said(candidate, label, result.original)
            marks.append(Mark(share, candidate.loss, _kind(candidate, result), label, text, _place(number)))
        shares = [mark.share.value for mark in marks]
        if marks and max(shares) - min(shares) >= APART:
            svg = scatter(marks, f"{title}, share of the original's", float(result.settings["max_loss"]))
            found.append((title, svg))
    return found


def _said(candidate: Candidate, label: str, original: Candidate) -> str:
    """All that a point of the front stands for, in a line: numbers, intervals and the recipe."""
    name = candidate.name if label == "original" else f"{label}. {candidate.name}"
    parts = [] if candidate.loss is None else [f"loss {interval(candidate.loss, '.2%')}"]
    if candidate.ratio is not None:
        parts.append(f"{times(candidate.ratio)} as fast")
    for share, of in (
        (candidate.peak_share, "peak memory"),
        (candidate.disk_share(original), "disk"),
        (candidate.read_share(original), "bytes read per token"),
    ):
        if share is not None:
            parts.append(f"{share:.0%} of the {of}")
    if candidate.recipe:
        parts.append(shorten(yaml.safe_dump(candidate.recipe, default_flow_style=True, width=math.inf).strip()))
    return f"{name}: {'; '.join(parts)}"


def _bytes_read(result: Optimization, markup: Callable[[str], Any]) -> tuple[Any, list[tuple[str, str]]] | None:
    """The picture of what a token reads, and its legend."""
    read = [each for each in (result.original, *result.candidates) if each.reads and not each.failed]
    kinds = sorted({kind for each in read for kind, size in each.reads.items() if size})
    if not kinds:
        return None
    rows = [(each.name, each.reads) for each in read]
    return markup(stacked(rows, kinds, format_bytes)), [(f"c{at % 8}", kind) for at, kind in enumerate(kinds)]


def _exactly(share: float | None) -> Estimate | None:
    return None if share is None else Estimate(share, share, share)


def _time(candidate: Candidate) -> Estimate | None:
    """Time per token or example over the original's: what a speed ratio is the other way round."""
    if candidate.speed is None:
        return None
    ratio = candidate.ratio or Estimate(1.0, 1.0, 1.0)  # the original's own
    return Estimate(1 / ratio.value, 1 / ratio.high, 1 / ratio.low if ratio.low > 0 else math.inf)


def _speed_bars(result: Optimization) -> str:
    assert result.speed_row is not None
    rows = []
    for row in result.speed_row.rows:
        label = f"{_drops(row.share)}, {row.engine}"
        text = f"{row.tokens_per_second.value:.1f} tokens/s"
        rows.append(Bar(label, row.tokens_per_second, text if row.ratio is None else f"{text}, {times(row.ratio)}"))
    return bars(rows)


def _drops(share: float) -> str:
    return f"{share:.0%} of the inputs dropped" if share else "dense"


def _densities(result: Optimization) -> list[tuple[str, str, str]]:
    """Name, achieved density, and its spread over tokens, of the candidates that choose inputs."""
    found = []
    for candidate in result.candidates:
        if candidate.density is None:
            continue
        low, high = candidate.density_p05, candidate.density_p95
        spread = "" if low is None or high is None else f"{low:.1%} to {high:.1%}"
        found.append((candidate.name, f"{candidate.density:.1%}", spread))
    return found


def _writing(result: Optimization) -> dict[str, Any] | None:
    """How the original and the best (or, if nothing pays, the least lossy) go on from the same prompt."""
    if result.original.text is None or result.prompt is None:
        return None
    written = [
        candidate for candidate in result.candidates if candidate.text is not None and candidate.loss is not None
    ]
    shown = next((candidate for candidate in written if candidate.name == result.verdict.best), None)
    shown = shown or min(written, key=lambda candidate: candidate.loss.value, default=None)  # type: ignore[union-attr]
    return {
        "prompt": result.prompt,
        "original": result.original.text,
        "name": None if shown is None else shown.name,
        "changed": None if shown is None else shown.text,
        "reason": None if shown is None else shown.writes,
    }


def _recipe(result: Optimization) -> str | None:
    if result.verdict.best is None:
        return None
    return yaml.safe_dump(result.candidate(result.verdict.best).methods.dump(), sort_keys=False)


def _commands(result: Optimization) -> list[tuple[str, str]]:
    """What each command does, and the command."""
    settings, data = result.settings, result.data["calibration"]
    name = shlex.quote(result.name)
    source = "" if settings.get("data") is None else f" --data {shlex.quote(settings['data'])}"
    stored = "" if settings.get("given_dtype") is None else f" --dtype {settings['given_dtype']}"
    target = "" if settings.get("target") is None else f" --target {settings['target']}"
    least = "" if settings.get("min_speedup") is None else f" --min-speedup {settings['min_speedup']:g}"
    for option in ("max_peak", "max_disk", "prompt", "max_new_tokens", "batch"):
        if settings.get(option) is not None:
            least += f" --{option.replace('_', '-')} {settings[option]}"
    least += "" if settings.get("prefill", "sparse") == "sparse" else f" --prefill {settings['prefill']}"
    common = f"{source}{stored} --threads {settings['threads']} --seed {settings['seed']}"
    found = [
        (
            "this search",
            f"actkit optimize {name} --out again --max-loss {settings['max_loss']:g} "
            f"--max-recipes {settings['max_recipes']}{target}{least}{common}",
        )
    ]
    if result.verdict.best is not None:
        length = "" if settings.get("length") is None else f" --length {settings['length']}"
        rows = f" --sequences {data['rows']}{length} --batch-size {settings['batch_size']}"
        found.append(("the best model again", f"actkit apply {name} --recipe recipe.yaml --out smaller{rows}{common}"))
        found.append(("its quality and speed", f"actkit evaluate best --against {name} --speed{source}"))
    return found


def _conditions(result: Optimization) -> list[tuple[str, str]]:
    """How it was measured: label and words."""
    info, settings = result.machine, result.settings
    stored = "as stored" if settings.get("given_dtype") is None else "as asked for"
    rows = [
        *about_machine(info),
        ("threads, dtype, seed", f"{settings['threads']}, {settings['dtype']} {stored}, {settings['seed']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
    ]
    for name, words in (("calibration", "to calibrate"), ("search", "to choose"), ("test", "to report")):
        part = result.data[name]
        rows.append((f"data {words}", f"{part['data']} (SHA-256 {part['fingerprint'][:12]})"))
    speeds = _speeds(result)
    if speeds:
        speed = speeds[0]
        shape = f"{speed.batch} x {speed.prompt} tokens" if speed.prompt else f"{speed.batch} at a time"
        new = f", then {speed.new_tokens} new ones" if speed.new_tokens else ""
        rows.append(("speed", f"{speed.kind}: {shape}{new}; {speed.rounds} rounds, in turns with the original"))
        rows.append(("engine of the speed", "; ".join(dict.fromkeys(each.through for each in speeds))))
    rows.append(("time", f"{result.seconds:.0f} s in this run"))
    return rows


def _mixing(result: Optimization, markup: Callable[[str], Any]) -> dict[str, Any] | None:
    """Pictures and a table of the mixes."""
    mixing = result.mixing
    if mixing is None:
        return None
    # what one setting alone loses made its factor, so only stacks can differ from what is expected
    whole = [each for each in result.candidates if len(each.recipe) > 1 and mixing.expected(each) is not None]
    named = {mix.name: mix for mix in mixing.mixes}
    rows = []
    for candidate in (*whole, *(each for each in result.candidates if each.name in named)):
        mix = named.get(candidate.name)
        loss = mix.loss if mix is not None else math.expm1(mixing.expected(candidate) or 0.0)
        seconds = mix.seconds if mix is not None else mixing.times.seconds(candidate.reads) if candidate.reads else None
        base = mixing.times.seconds(result.original.reads)
        measured = candidate.search_loss
        rows.append(
            (
                candidate.name,
                f"{loss:.2%}",
                "" if measured is None else interval(measured, ".2%"),
                "" if not seconds else f"{base / seconds:.2f}x",
                "" if candidate.ratio is None else times(candidate.ratio),
            )
        )
    return {
        "damage": [(f"Damage of {each.name}", markup(damage_grid(mixing, each.name))) for each in mixing.ingredients],
        "chosen": [(f"What {mix.name} gives each part", markup(chosen_grid(mixing, mix))) for mix in mixing.mixes],
        "legend": [(colour, name) for name, colour in colours_of(mixing).items()],
        "rows": rows,
        "notes": [*mixing.notes, *_errors_of_times(mixing)],
    }


def _errors_of_times(mixing: Mixing) -> list[str]:
    """How far the model of time was off, on what it had not seen."""
    errors = [abs(each) for each in mixing.times.errors.values()]
    if not errors:
        return []
    return [
        f"The model of time was off by {sorted(errors)[len(errors) // 2]:.0%} (median) and at most {max(errors):.0%} "
        f"on {len(errors)} settings, each estimated from the others."
    ]


def _layers(result: Optimization) -> list[tuple[str, str]]:
    """Of the best: what was left alone, and why."""
    if result.verdict.best is None:
        return []
    return [(path, reason) for path, _, reason in result.candidate(result.verdict.best).skipped]
