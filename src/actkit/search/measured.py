"""What is known of one candidate: its recipe, why it was tried, and every number measured of it.

Plain values throughout, so that a line of the journal holds all of it and gives all of it back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from actkit.core.ground.estimate import Estimate
from actkit.core.measure.cost import Cost
from actkit.core.measure.proof import Proof
from actkit.core.measure.speed import Speed
from actkit.core.recipe.recipe import Recipe


@dataclass(frozen=True)
class Candidate:
    """A recipe and what it gave. `original` is one too, with no recipe.

    Attributes:
        name: short, unique in a run.
        recipe: its transforms as in the YAML form.
        why: what in the profile or the shapes suggests it.
        failed: why there is nothing to measure, or None.
        stopped: why it was not measured further than `search_loss`, which may be of a part of the search split, or
            None.
        search_loss: on the search split; what max_loss limits, see `Quality.loss`.
        loss: the same on the test split.
        metrics: of the test split.
        disk_bytes: of the whole saved folder.
        weight_bytes: held in memory.
        bytes_per_token: see `Cost`.
        dense_bytes_per_token: see `Cost`.
        reads: bytes per token by the kind of kernel that reads them.
        density: see `Cost`.
        density_p05: see `Cost`.
        density_p95: see `Cost`.
        speed: against the original in fresh processes.
        speed_failed: why there is no speed.
        peak_share: peak memory of the process over the original's, measured in the same rounds.
        proof: of the reload.
        writes: '' if the generation check passed, else why it did not; None if the model writes no text.
        text: what it wrote after the prompt.
        coverage: share of the parameters in blocks by method.
        changed: edits made.
        skipped: (path, method, reason).
        notes: what else is worth knowing.
        seconds: of making and measuring it, without the speed.
        parts: the seconds by what they went into ('make', 'search', 'test', 'rest').
        passes: the seconds in plain forward passes over the test split; None if that was not timed.
    """

    name: str
    recipe: list[dict[str, Any]] = field(default_factory=list)
    why: str = ""
    failed: str | None = None
    stopped: str | None = None
    search_loss: Estimate | None = None
    loss: Estimate | None = None
    metrics: dict[str, Estimate] = field(default_factory=dict)
    disk_bytes: int | None = None
    weight_bytes: int | None = None
    bytes_per_token: float | None = None
    dense_bytes_per_token: float | None = None
    reads: dict[str, float] = field(default_factory=dict)
    density: float | None = None
    density_p05: float | None = None
    density_p95: float | None = None
    speed: Speed | None = None
    speed_failed: str | None = None
    peak_share: float | None = None
    proof: Proof | None = None
    writes: str | None = None
    text: str | None = None
    coverage: dict[str, float] = field(default_factory=dict)
    changed: int = 0
    skipped: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    passes: float | None = None

    @property
    def methods(self) -> Recipe:
        """The recipe as transforms.

        Raises:
            RecipeError: it is the original, which has none.
        """
        return Recipe.parse({"actkit": 1, "transforms": self.recipe})

    @property
    def ratio(self) -> Estimate | None:
        """Its speed over the original's."""
        return None if self.speed is None else self.speed.ratio

    def disk_share(self, original: Candidate) -> float | None:
        """Return its bytes on disk over the original's."""
        return _share(self.disk_bytes, original.disk_bytes)

    def read_share(self, original: Candidate) -> float | None:
        """Return its weight bytes read per token over the original's."""
        return _share(self.bytes_per_token, original.bytes_per_token)

    def with_cost(self, cost: Cost) -> Candidate:
        """Return the same with what `measure_cost` found."""
        names = ("disk_bytes", "weight_bytes", "bytes_per_token", "dense_bytes_per_token", "density")
        found = {name: getattr(cost, name) for name in (*names, "density_p05", "density_p95")}
        return replace(self, **found)

    def with_speed(self, speed: Speed, original: Speed) -> Candidate:
        """Return the same with a speed, and the original's from the same rounds."""
        return replace(self, speed=speed, speed_failed=None, peak_share=speed.peak_bytes / original.peak_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it; None for what is not known."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Candidate:
        """Read what `to_dict` gave, also after a way through JSON."""
        found = {item.name: content[item.name] for item in fields(cls) if item.name in content}
        for name in ("search_loss", "loss"):
            found[name] = estimate(found.get(name))
        found["metrics"] = {name: estimate(value) for name, value in (found.get("metrics") or {}).items()}
        if found.get("speed") is not None:
            found["speed"] = speed_from(found["speed"])
        if found.get("proof") is not None:
            found["proof"] = Proof(**found["proof"])
        return cls(**found)


def estimate(content: Mapping[str, float | None] | None) -> Estimate | None:
    """Read an Estimate from its dictionary, in which a bound that is not known is None."""
    if content is None:
        return None
    value, low, high = (content[name] for name in ("value", "low", "high"))
    return Estimate(
        math.nan if value is None else value, -math.inf if low is None else low, math.inf if high is None else high
    )


def speed_from(content: Mapping[str, Any]) -> Speed:
    """Read a Speed from its dictionary."""
    names = ("rate", "first_token_seconds", "ratio")
    return Speed(**{**content, **{name: estimate(content[name]) for name in names}})  # type: ignore[arg-type]


def _share(mine: float | None, other: float | None) -> float | None:
    return None if mine is None or not other else mine / other


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
