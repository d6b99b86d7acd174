"""Which candidates pay, which of them is best for what, and what to say if none does.

A candidate pays if something is gained and the loss is known to be small:

    gained   the lower bound of its speed ratio exceeds 1.03, or its peak memory or disk is at most 0.9 of the old one
    small    the upper bound of its loss is within max_loss, on the split that chose it and on the one that reports it

and if its folder reloads and, of a language model, it still writes. The best is one that pays and that no other that
pays beats (see `front`). Which one depends on the target:

- latency, throughput, memory or disk takes the largest gain of that kind, and the smallest loss among gains within 5 %
  of it (latency and throughput are both the ratio of speeds; how many rows were timed together makes the difference);
- quality takes the smallest loss;
- without a target it is latency if that pays, else disk, else memory.

If a least speedup, or a most of memory or disk, is asked for, only what surely has it pays; if nothing does, the
headline says what comes nearest.

Losses rank on the search split: the test split may reject a candidate, for its loss or because another beats it, but
never ranks them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from actkit.core.ground.estimate import Estimate
from actkit.core.ground.memory import format_bytes
from actkit.search.front import beats, point
from actkit.search.measured import Candidate

FASTER, SMALLER, EQUAL = 1.03, 0.9, 1.05

Target = Literal["latency", "throughput", "memory", "disk", "quality"]
TARGETS: tuple[Target, ...] = get_args(Target)
BY_DEFAULT: tuple[Target, ...] = ("latency", "disk", "memory")


@dataclass(frozen=True)
class Limits:
    """What a candidate must keep to, to pay.

    Attributes:
        max_loss: of quality, which the upper bound of its interval may reach.
        min_speedup: that the lower bound of its ratio of speeds must reach; None for none.
        max_peak: bytes of the process that runs it, at its peak; None for none.
        max_disk: bytes of its folder; None for none.
    """

    max_loss: float
    min_speedup: float | None = None
    max_peak: int | None = None
    max_disk: int | None = None

    def wishes(self) -> list[_Wish]:
        """What is asked for beside a small loss."""
        found = []
        if self.min_speedup is not None:
            found.append(_Wish(f"at least {self.min_speedup:g}x", "speed", "fastest", _slowness, 1 / self.min_speedup))
        for what, cost, most in (("peak memory", _peak, self.max_peak), ("disk", _disk, self.max_disk)):
            if most is not None:
                found.append(_Wish(f"at most {format_bytes(most)}", what, "smallest", cost, most))
        return found


@dataclass(frozen=True)
class _Wish:
    """One thing that is asked for.

    Attributes:
        asked: in words.
        what: it is about.
        nearest: what the candidate is called that comes nearest.
        cost: of a candidate, the less the better; None if it was not measured.
        most: that the cost may be.
    """

    asked: str
    what: str
    nearest: str
    cost: Callable[[Candidate], float | None]
    most: float

    def met(self, candidate: Candidate) -> bool:
        """Whether a candidate surely has it."""
        cost = self.cost(candidate)
        return cost is not None and cost <= self.most

    def found(self, candidate: Candidate) -> str:
        """What a candidate has."""
        if self.what == "speed":
            return "not measured" if candidate.ratio is None else times(candidate.ratio)
        cost = self.cost(candidate)
        return "not measured" if cost is None else format_bytes(cost)


def _slowness(candidate: Candidate) -> float | None:
    """The upper bound of its time over the original's."""
    return None if candidate.ratio is None or candidate.ratio.low <= 0 else 1 / candidate.ratio.low


def _peak(candidate: Candidate) -> float | None:
    return None if candidate.speed is None else candidate.speed.peak_bytes


def _disk(candidate: Candidate) -> float | None:
    return candidate.disk_bytes


@dataclass(frozen=True)
class Judgement:
    """Whether one candidate pays.

    Attributes:
        name: of the candidate.
        pays: it does.
        gains: what it gives, in words, by target.
        against: why it does not pay; empty if it does.
        beaten_by: another one that pays and is as good in everything and better in something; '' if there is none.
    """

    name: str
    pays: bool
    gains: Mapping[Target, str]
    against: tuple[str, ...]
    beaten_by: str = ""


@dataclass(frozen=True)
class Verdict:
    """Which candidate is best, and what can be gained.

    Attributes:
        pays: whether any candidate does, for the target.
        best: its name, or None.
        target: what the best was chosen for.
        runner_up: what would be the best without it, or None.
        headline: a few sentences.
        speed: a sentence on the speed that can be gained and what it costs.
        memory: the same of memory.
        disk: the same of the disk.
        quality: the same of quality.
        judgements: one per candidate, in their order.
    """

    pays: bool
    best: str | None
    target: Target
    runner_up: str | None
    headline: str
    speed: str
    memory: str
    disk: str
    quality: str
    judgements: tuple[Judgement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        names = ("pays", "best", "target", "runner_up", "headline", "speed", "memory", "disk", "quality")
        judged = [{**vars(each), "gains": dict(each.gains), "against": list(each.against)} for each in self.judgements]
        return {**{name: getattr(self, name) for name in names}, "judgements": judged}

    def of(self, name: str) -> Judgement:
        """Return the judgement of a candidate."""
        return next(each for each in self.judgements if each.name == name)


def judge(candidate: Candidate, original: Candidate, limits: Limits) -> Judgement:
    """Judge whether one candidate pays.

    Args:
        candidate: measured.
        original: measured.
        limits: that it must keep to.

    Returns:
        Whether it pays, and why not.
    """
    if candidate.failed is not None:
        return Judgement(candidate.name, False, {}, (f"it failed: {candidate.failed}",))
    if candidate.stopped is not None:
        return Judgement(candidate.name, False, {}, (candidate.stopped,))
    gains = _gains(candidate, original)
    against = [] if gains else [_no_gain(candidate, original)]
    for wish in limits.wishes():
        if not wish.met(candidate):
            against.append(f"{wish.what} {wish.found(candidate)}, {wish.asked} was asked for")
    for loss, split in ((candidate.search_loss, "search"), (candidate.loss, "test")):
        if loss is None or not loss.high <= limits.max_loss:
            against.append(_too_much(loss, split, limits.max_loss))
            break
    if candidate.proof is not None and not candidate.proof.passed:
        against.append(f"its folder does not reload: {candidate.proof.reason}")
    if candidate.writes:
        against.append(f"it does not write: {candidate.writes}")
    return Judgement(candidate.name, not against, gains, tuple(against))


def decide(
    candidates: Sequence[Candidate],
    original: Candidate,
    limits: Limits,
    *,
    target: Target | None = None,
    cache: int | None = None,
) -> Verdict:
    """Decide over all candidates.

    Args:
        candidates: measured.
        original: measured.
        limits: that they must keep to.
        target: what the best is chosen for; None for latency if that pays, else disk, else memory.
        cache: bytes of the last-level cache, for the words on speed.

    Returns:
        The verdict.
    """
    max_loss = limits.max_loss
    judged = [judge(candidate, original, limits) for candidate in candidates]
    paying = [candidate for candidate, each in zip(candidates, judged) if each.pays]
    beaten = {candidate.name: _beaten_by(candidate, paying, original) for candidate in paying}
    judged = [replace(each, beaten_by=beaten.get(each.name, "")) for each in judged]
    unbeaten = [candidate for candidate in paying if not beaten[candidate.name]]
    chosen = target if target is not None else _default(unbeaten, original)
    best = _pick(chosen, _for(chosen, unbeaten, original), original)
    others = [candidate for candidate in unbeaten if candidate is not best]
    kinds = (chosen, *BY_DEFAULT)
    second = next((found for kind in kinds if (found := _pick(kind, _for(kind, others, original), original))), None)
    within = [candidate for candidate in candidates if _is_small(candidate, max_loss)]
    if best is None:
        headline = _refusal(target, second, candidates, original)
        wishes = limits.wishes()
        headline += "".join(_nearest(candidates, within, wish, max_loss) for wish in wishes)
        headline += _nearest_together(within, wishes)
    else:
        headline = _headline(best, second, chosen, len(paying), original)
    return Verdict(
        pays=best is not None,
        best=None if best is None else best.name,
        target=chosen,
        runner_up=None if second is None else second.name,
        headline=headline,
        speed=_about_speed(candidates, within, original, cache),
        memory=_about_share("memory", "peak memory of the process", within, original),
        disk=_about_share("disk", "bytes on disk", within, original),
        quality=_about_quality(best, candidates, within, max_loss),
        judgements=tuple(judged),
    )


# -- one candidate -----------------------------------------------------------------------------------------------------


def gain(candidate: Candidate, original: Candidate, target: Target) -> float | None:
    """Compute how much a candidate gives of what a target asks for, as a factor.

    Args:
        candidate: measured.
        original: measured.
        target: what is asked for.

    Returns:
        For speed the lower bound of its ratio; for memory and disk how often it fits in the original's; for quality the
            largest of the three. None if that is no gain.
    """
    if target == "quality":
        return max((each for kind in BY_DEFAULT if (each := gain(candidate, original, kind))), default=None)
    if target in ("latency", "throughput"):
        low = -math.inf if candidate.ratio is None else candidate.ratio.low
        return low if math.isfinite(low) and low > FASTER else None
    share = candidate.peak_share if target == "memory" else candidate.disk_share(original)
    return 1 / share if share is not None and share <= SMALLER else None


def _gains(candidate: Candidate, original: Candidate) -> dict[Target, str]:
    """What it gives, in words, by target."""
    return {
        kind: _words(candidate, original, kind)
        for kind in ("latency", "memory", "disk")
        if gain(candidate, original, kind) is not None
    }


def _words(candidate: Candidate, original: Candidate, kind: Target) -> str:
    if kind == "latency" and candidate.ratio is not None:
        return f"{times(candidate.ratio)} as fast"
    if kind == "memory":
        return f"peak memory {candidate.peak_share:.0%} of the original's"
    return f"{candidate.disk_share(original):.0%} of the disk"


def _no_gain(candidate: Candidate, original: Candidate) -> str:
    ratio, disk = candidate.ratio, candidate.disk_share(original)
    speed = "speed not measured" if ratio is None else f"speed {times(ratio)}"
    if candidate.speed is not None and candidate.speed.noisy:
        speed += ", which this machine is too noisy to tell"
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


# -- the choice --------------------------------------------------------------------------------------------------------


def _beaten_by(candidate: Candidate, paying: Sequence[Candidate], original: Candidate) -> str:
    """The name of one that pays and beats it; of several the one with the smallest loss."""
    mine = point(candidate, original)
    found = [each for each in paying if (other := point(each, original)) and mine and beats(other, mine)]
    return min(found, key=_search_loss).name if found else ""


def _default(candidates: Sequence[Candidate], original: Candidate) -> Target:
    """The target if none was given: the first that something pays for."""
    return next((kind for kind in BY_DEFAULT if _for(kind, candidates, original)), BY_DEFAULT[0])


def _for(target: Target, candidates: Sequence[Candidate], original: Candidate) -> list[Candidate]:
    """Those that gain what the target asks for."""
    return [candidate for candidate in candidates if gain(candidate, original, target) is not None]


def _pick(target: Target, candidates: Sequence[Candidate], original: Candidate) -> Candidate | None:
    """The best of those that gain what the target asks for."""
    gains = {candidate.name: gain(candidate, original, target) or 1.0 for candidate in candidates}
    if target == "quality":
        return min(candidates, key=lambda each: (_search_loss(each), -gains[each.name]), default=None)
    largest = max(gains.values(), default=1.0)
    as_good = [candidate for candidate in candidates if gains[candidate.name] * EQUAL >= largest]
    return min(as_good, key=lambda each: (_search_loss(each), -gains[each.name]), default=None)


def _search_loss(candidate: Candidate) -> float:
    """As precise as losses are shown, so that no difference behind that decides."""
    return math.inf if candidate.search_loss is None else round(candidate.search_loss.value, 4)


# -- words -------------------------------------------------------------------------------------------------------------


def times(ratio: Estimate) -> str:
    """Say '1.24x (1.18 to 1.30)'."""
    if not (math.isfinite(ratio.low) and math.isfinite(ratio.high)):
        return f"{ratio.value:.2f}x"
    return f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def _offer(candidate: Candidate, original: Candidate) -> str:
    """All that it gives, and what that costs."""
    assert candidate.loss is not None
    ratio = candidate.ratio
    gains = list(_gains(candidate, original).values())
    if ratio is not None and ratio.high < 1:
        gains.append(f"but only {times(ratio)} as fast")
    return f"{', '.join(gains)}, for a loss of {candidate.loss.value:.2%} (up to {candidate.loss.high:.2%})"


def _headline(best: Candidate, second: Candidate | None, target: Target, paying: int, original: Candidate) -> str:
    if second is not None:
        runner_up = f"Runner-up: {second.name}, {_offer(second, original)}."
    elif paying > 1:
        runner_up = "There is no runner-up: it beats all others that pay."
    else:
        runner_up = "There is no runner-up: no other candidate pays."
    return f"{best.name} pays, chosen for {target}: {_offer(best, original)}. {runner_up}"


def _refusal(
    target: Target | None, second: Candidate | None, candidates: Sequence[Candidate], original: Candidate
) -> str:
    """Why there is no best. second: what pays for another target."""
    if not candidates:
        return "Nothing pays here: no method of the search applies to this model."
    if all(candidate.failed is not None for candidate in candidates):
        return "Nothing pays here: none of the candidates could be made."
    if second is None:
        return "Nothing pays here: keep the model as it is."
    other = next(kind for kind in BY_DEFAULT if gain(second, original, kind) is not None)
    return (
        f"Nothing pays for {target} here. {second.name} pays for {other} (target={other!r}, --target {other}): "
        f"{_offer(second, original)}."
    )


def _nearest(candidates: Sequence[Candidate], within: Sequence[Candidate], wish: _Wish, max_loss: float) -> str:
    """What comes nearest to a wish that nothing grants within the limit on the loss; '' if something does."""
    if any(wish.met(each) for each in within):
        return ""
    texts = []
    known = [(cost, each) for each in within if (cost := wish.cost(each)) is not None]
    if known:
        _, closest = min(known, key=lambda found: found[0])
        texts.append(f"within a loss of {max_loss:.1%} the {wish.nearest} is {closest.name} with {wish.found(closest)}")
    met = [each for each in candidates if wish.met(each) and each.search_loss is not None]
    if met:
        closest = min(met, key=_search_loss)
        assert closest.search_loss is not None
        texts.append(f"{closest.name} has the {wish.what}, for a loss of {closest.search_loss.value:.1%}")
    if not texts:
        return f" Asked for: {wish.what} of {wish.asked}; no candidate comes near."
    return f" Asked for: {wish.what} of {wish.asked}. Nearest: {'; '.join(texts)}."


def _nearest_together(within: Sequence[Candidate], wishes: Sequence[_Wish]) -> str:
    """What comes nearest to wishes that are granted one by one, and never together; '' if that is not so."""
    if len(wishes) < 2 or not all(any(wish.met(each) for each in within) for wish in wishes):
        return ""
    if any(all(wish.met(each) for wish in wishes) for each in within):
        return ""

    def excess(candidate: Candidate) -> float:
        costs = [wish.cost(candidate) for wish in wishes]
        return max(math.inf if cost is None else cost / wish.most for cost, wish in zip(costs, wishes, strict=True))

    closest = min(within, key=excess)
    asked = " and ".join(f"{wish.what} of {wish.asked}" for wish in wishes)
    has = " and ".join(f"{wish.what} {wish.found(closest)}" for wish in wishes)
    return f" Asked for: {asked}, which no candidate has together. Nearest: {closest.name} with {has}."


def _about_speed(
    candidates: Sequence[Candidate], within: Sequence[Candidate], original: Candidate, cache: int | None
) -> str:
    timed = [(ratio, candidate) for candidate in candidates if (ratio := candidate.ratio) is not None]
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
    ratio, fastest = max(timed, key=lambda pair: pair[0].value)
    if fastest.speed is not None and fastest.speed.noisy:
        return f"speed: this machine is too noisy to tell; the best is {fastest.name} with {times(ratio)}"
    held = original.weight_bytes
    if held is not None and cache is not None and held <= cache:
        return (
            f"speed: no gain; the weights ({format_bytes(held)}) fit in the last-level cache ({format_bytes(cache)}), "
            f"where nothing is saved by reading less"
        )
    return f"speed: no gain; the best is {fastest.name} with {times(ratio)}, and the lower bound must exceed {FASTER}"


def _about_share(what: str, long: str, within: Sequence[Candidate], original: Candidate) -> str:
    shares = [
        (share, candidate)
        for candidate in within
        if (share := candidate.peak_share if what == "memory" else candidate.disk_share(original)) is not None
    ]
    if not within:
        return f"{what}: no gain; no candidate is within the limit on the loss"
    if not shares:
        return f"{what}: not measured"
    share, smallest = min(shares, key=lambda pair: (round(pair[0], 2), _search_loss(pair[1])))
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
