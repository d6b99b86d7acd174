"""Which candidates pay, which of them is best, and what to say where none does.

A candidate pays where something is gained and the loss is known to be small:

    gained   the lower bound of its speed ratio exceeds 1.03, or its peak memory or disk is at most 0.9 of the old one
    small    the upper bound of its loss is within max_loss, on the split that chose it and on the one that reports it

and where its folder reloads and, of a language model, it still writes. The best is among those that pay with a gain
within 5 % of the largest one; there the fewest bytes per token decide, then the smaller loss on the search split. The
test split may reject a candidate, but never ranks them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actkit.core.memory import format_bytes
from actkit.core.quality import Estimate
from actkit.search.measured import Candidate

FASTER, SMALLER, EQUAL = 1.03, 0.9, 1.05


@dataclass(frozen=True)
class Judgement:
    """Of one candidate. gains: what it gives, in words; against: why it does not pay, empty where it does."""

    name: str
    pays: bool
    gains: tuple[str, ...]
    against: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """pays: whether any candidate does. best: its name, or None. headline: one sentence. speed, memory, disk, quality:
    a sentence each on what can be gained and what it costs. judgements: one per candidate, in their order."""

    pays: bool
    best: str | None
    headline: str
    speed: str
    memory: str
    disk: str
    quality: str
    judgements: tuple[Judgement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        found = {name: getattr(self, name) for name in ("pays", "best", "headline", "speed", "memory", "disk")}
        judged = [{**vars(each), "gains": list(each.gains), "against": list(each.against)} for each in self.judgements]
        return {**found, "quality": self.quality, "judgements": judged}

    def of(self, name: str) -> Judgement:
        """The judgement of a candidate."""
        return next(each for each in self.judgements if each.name == name)


def judge(candidate: Candidate, original: Candidate, max_loss: float) -> Judgement:
    """Whether one candidate pays, and why not."""
    if candidate.failed is not None:
        return Judgement(candidate.name, False, (), (f"it failed: {candidate.failed}",))
    gains = _gains(candidate, original)
    against = [] if gains else [_no_gain(candidate, original)]
    for loss, split in ((candidate.search_loss, "search"), (candidate.loss, "test")):
        if loss is None or not loss.high <= max_loss:
            against.append(_too_much(loss, split, max_loss))
            break
    if candidate.proof is not None and not candidate.proof.passed:
        against.append(f"its folder does not reload: {candidate.proof.reason}")
    if candidate.writes:
        against.append(f"it does not write: {candidate.writes}")
    return Judgement(candidate.name, not against, tuple(gains), tuple(against))


def decide(
    candidates: Sequence[Candidate], original: Candidate, *, max_loss: float, cache: int | None = None
) -> Verdict:
    """The verdict over all candidates. cache: bytes of the last-level cache, for the words on speed."""
    judged = tuple(judge(candidate, original, max_loss) for candidate in candidates)
    paying = [candidate for candidate, each in zip(candidates, judged) if each.pays]
    best = _best(paying, original)
    within = [candidate for candidate in candidates if _is_small(candidate, max_loss)]
    return Verdict(
        pays=best is not None,
        best=None if best is None else best.name,
        headline=_headline(best, candidates, original, judged),
        speed=_about_speed(candidates, within, original, cache),
        memory=_about_share("memory", "peak memory of the process", within, original),
        disk=_about_share("disk", "bytes on disk", within, original),
        quality=_about_quality(best, candidates, within, max_loss),
        judgements=judged,
    )


# -- one candidate -----------------------------------------------------------------------------------------------------


def disk_share(candidate: Candidate, original: Candidate) -> float | None:
    """Bytes on disk over the original's."""
    return _share(candidate.disk_bytes, original.disk_bytes)


def read_share(candidate: Candidate, original: Candidate) -> float | None:
    """Weight bytes read per token over the original's."""
    return _share(candidate.bytes_per_token, original.bytes_per_token)


def _share(mine: float | None, other: float | None) -> float | None:
    return None if mine is None or not other else mine / other


def ratio_of(candidate: Candidate) -> Estimate | None:
    """Its speed over the original's."""
    return None if candidate.speed is None else candidate.speed.ratio


def _gains(candidate: Candidate, original: Candidate) -> list[str]:
    gains = []
    ratio, disk = ratio_of(candidate), disk_share(candidate, original)
    if ratio is not None and ratio.low > FASTER and math.isfinite(ratio.low):
        gains.append(f"{times(ratio)} as fast")
    if candidate.peak_share is not None and candidate.peak_share <= SMALLER:
        gains.append(f"peak memory {candidate.peak_share:.0%} of the original's")
    if disk is not None and disk <= SMALLER:
        gains.append(f"{disk:.0%} of the disk")
    return gains


def _no_gain(candidate: Candidate, original: Candidate) -> str:
    ratio, disk = ratio_of(candidate), disk_share(candidate, original)
    speed = "speed not measured" if ratio is None else f"speed {times(ratio)}"
    memory = "memory not measured" if candidate.peak_share is None else f"memory {candidate.peak_share:.0%}"
    saved = "disk not measured" if disk is None else f"disk {disk:.0%}"
    return f"no gain: {speed}, {memory}, {saved}"


def _too_much(loss: Estimate | None, split: str, max_loss: float) -> str:
    if loss is None:
        return f"the loss on the {split} split was not measured"
    if not math.isfinite(loss.high):
        return f"the loss on the {split} split has no interval: the data are one document"
    clearly = "" if loss.low > max_loss else ", though the loss itself may be within it; more data would tell"
    if loss.value > max_loss and not clearly:
        return f"loss {loss.value:.1%} on the {split} split, the limit is {max_loss:.1%}"
    return f"loss up to {loss.high:.1%} on the {split} split, the limit is {max_loss:.1%}{clearly}"


def _is_small(candidate: Candidate, max_loss: float) -> bool:
    losses = (candidate.search_loss, candidate.loss)
    return candidate.failed is None and all(loss is not None and loss.high <= max_loss for loss in losses)


def gain(candidate: Candidate, original: Candidate) -> float:
    """The largest of its gains, as a factor: speed by its lower bound, memory and disk by how often they fit."""
    factors = [1.0]
    ratio, disk = ratio_of(candidate), disk_share(candidate, original)
    if ratio is not None and math.isfinite(ratio.low) and ratio.low > FASTER:
        factors.append(ratio.low)
    factors += [1 / share for share in (candidate.peak_share, disk) if share is not None and share <= SMALLER]
    return max(factors)


def _best(paying: Sequence[Candidate], original: Candidate) -> Candidate | None:
    largest = max((gain(candidate, original) for candidate in paying), default=1.0)
    as_good = [candidate for candidate in paying if gain(candidate, original) * EQUAL >= largest]

    def rank(candidate: Candidate) -> tuple[float, float]:
        read = candidate.bytes_per_token if candidate.bytes_per_token is not None else math.inf
        return read, math.inf if candidate.search_loss is None else candidate.search_loss.value

    return min(as_good, key=rank, default=None)


# -- words -------------------------------------------------------------------------------------------------------------


def times(ratio: Estimate) -> str:
    """'1.24x (1.18 to 1.30)'."""
    if not (math.isfinite(ratio.low) and math.isfinite(ratio.high)):
        return f"{ratio.value:.2f}x"
    return f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def _headline(
    best: Candidate | None, candidates: Sequence[Candidate], original: Candidate, judged: Sequence[Judgement]
) -> str:
    if best is None:
        if not candidates:
            return "Nothing pays here: no method of the search applies to this model."
        if all(candidate.failed is not None for candidate in candidates):
            return "Nothing pays here: none of the candidates could be made."
        return "Nothing pays here: keep the model as it is."
    gains = next(each.gains for each in judged if each.name == best.name)
    assert best.loss is not None
    read = read_share(best, original)
    reads = "" if read is None else f", {read:.0%} of the weight bytes read per token"
    loss = f"a loss of {best.loss.value:.2%} (up to {best.loss.high:.2%})"
    ratio = ratio_of(best)
    slower = "" if ratio is None or ratio.high >= 1 else f" It is slower, though: {times(ratio)} the original's speed."
    return f"{best.name} pays: {', '.join(gains)}{reads}, for {loss}.{slower}"


def _about_speed(
    candidates: Sequence[Candidate], within: Sequence[Candidate], original: Candidate, cache: int | None
) -> str:
    timed = [(ratio, candidate) for candidate in candidates if (ratio := ratio_of(candidate)) is not None]
    if not timed:
        reason = next((each.speed_failed for each in candidates if each.speed_failed), None)
        return "speed: not measured" + (f" ({reason})" if reason else "")
    paying = [(ratio, each) for ratio, each in timed if ratio.low > FASTER and each in within]
    if paying:
        ratio, fastest = max(paying, key=lambda pair: pair[0].low)
        return f"speed: {times(ratio)} the original's with {fastest.name}"
    faster = [(ratio, each) for ratio, each in timed if ratio.low > FASTER]
    if faster:
        ratio, fastest = max(faster, key=lambda pair: pair[0].low)
        return f"speed: no gain within the limit on the loss; {fastest.name} has {times(ratio)}, and loses too much"
    held = original.weight_bytes
    if held is not None and cache is not None and held <= cache:
        return (
            f"speed: no gain; the weights ({format_bytes(held)}) fit in the last-level cache ({format_bytes(cache)}), "
            f"where nothing is saved by reading less"
        )
    ratio, fastest = max(timed, key=lambda pair: pair[0].value)
    return f"speed: no gain; the best is {fastest.name} with {times(ratio)}, and the lower bound must exceed {FASTER}"


def _about_share(what: str, long: str, within: Sequence[Candidate], original: Candidate) -> str:
    shares = [
        (share, candidate)
        for candidate in within
        if (share := candidate.peak_share if what == "memory" else disk_share(candidate, original)) is not None
    ]
    if not within:
        return f"{what}: no gain; no candidate is within the limit on the loss"
    if not shares:
        return f"{what}: not measured"
    share, smallest = min(shares, key=lambda pair: pair[0])
    if share > SMALLER:
        return f"{what}: no gain; within the limit on the loss the {long} is {share:.0%} of the original's at best"
    return f"{what}: down to {share:.0%} of the original's {long}, with {smallest.name}"


def _about_quality(
    best: Candidate | None, candidates: Sequence[Candidate], within: Sequence[Candidate], max_loss: float
) -> str:
    measured = [candidate for candidate in candidates if candidate.failed is None]
    if not measured:
        return "quality: nothing was measured"
    count = f"{len(within)} of {len(measured)} measured candidates are within the limit of {max_loss:.1%}"
    if best is None or best.loss is None:
        return f"quality: {count}, by the upper bound of the loss on both splits"
    loss = best.loss.text(".2%")
    return f"quality: {best.name} loses {loss} on the test split, which neither calibrated nor chose it; {count}"
