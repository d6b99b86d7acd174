"""What a policy costs, without a model or a disk: a simulation of one reader and one computer (EdgeMoE, 2308.14352).

    a layer begins: wrong preloads that still wait go; what is missing is read first, predictions behind it
    t = max(t, all chosen experts are there) + compute        the reader goes on meanwhile, one expert at a time

When to use it: to choose a budget, a policy and how far to preload, from traces alone, in a second.
Cost: an event for each expert that is read.
Settled here: a preload that turns out to be wrong is broken off at once, as in the runtime; reads take latency +
bytes / bandwidth. It is deterministic, and holds no more than the runtime would (`ExpertCache` decides in both).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from actkit.sparsity.edgemoe.expert_cache import ExpertCache, Key, Policy, check_budget, steps_of
from actkit.sparsity.edgemoe.path_predictor import PathPredictor, Trace

Predict = Callable[[int], Mapping[Key, float]]  # step -> how probable the experts of the next one are


@dataclass(frozen=True)
class Simulated:
    """What a simulation found.

    Attributes:
        token_ms: mean time of a token.
        hit_rate: share of chosen experts that were in memory when their router chose them.
        reads: experts that were read.
        bytes_read: in all, preloads that were not used included.
        wasted: preloaded experts that went unused.
        stall_ms: mean time of a token in which nothing was computed.
        most_bytes: the most that was held at a time.
    """

    token_ms: float
    hit_rate: float
    reads: int
    bytes_read: int
    wasted: int
    stall_ms: float
    most_bytes: int


def simulate(
    traces: Sequence[Trace],
    sizes: Mapping[Key, int],
    budget: int,
    *,
    bandwidth: float,
    latency: float = 0.0,
    compute_ms: float = 1.0,
    policy: Policy = "edgemoe",
    predictor: PathPredictor | None = None,
    preload: int = 0,
    least: float = 0.0,
    oracle: bool = False,
) -> Simulated:
    """Run traces through a cache, a reader and a computer.

    Args:
        traces: int [tokens, layers, k] each, one text after the other.
        sizes: bytes of each expert.
        budget: bytes of the cache.
        bandwidth: bytes per second of the reader.
        latency: seconds before a read.
        compute_ms: of a layer, for one token.
        policy: of the cache.
        predictor: of the next layer's experts, which 'edgemoe' also evicts by.
        preload: experts that are preloaded at most for the next layer.
        least: probability that a preloaded expert has at least.
        oracle: preload exactly what the next layer will choose, which no predictor can better.

    Returns:
        Times, and what was read.

    Raises:
        ValueError: the budget is too small.
    """
    layers, top_k = traces[0].shape[1], traces[0].shape[2]
    check_budget(budget, list(sizes.values()), top_k)
    steps = steps_of(traces)
    cache = ExpertCache(
        budget,
        policy,
        layers=layers,
        shares=None if predictor is None else predictor.shares,
        future=steps if policy == "belady" else None,
    )
    predict = partial(_exactly, steps) if oracle else _predictions(steps, layers, predictor)
    run = _Run(cache, sizes, bandwidth, latency, top_k if oracle else preload, least)
    now, hits, stall = 0.0, 0, 0.0
    for step, chosen in enumerate(steps):
        run.advance(now)
        cache.begin(chosen[0][0], chosen)
        hits += sum(key in cache.held and key != run.key for key in chosen)
        run.begin(now, chosen, predict(step))
        ready = run.wait(now, chosen)
        stall += ready - now
        now = ready + compute_ms / 1000
    tokens = len(steps) / layers
    return Simulated(
        1000 * now / tokens,
        hits / sum(map(len, steps)),
        run.reads,
        run.bytes_read,
        len(run.unused) + run.wasted,
        1000 * stall / tokens,
        run.most,
    )


def lower_bound_ms(reads: int, read_ms: float, layers: int, compute_ms: float, tokens: float) -> float:
    """The least time of a token: all that must be read, or all that must be computed, whichever is longer.

    Args:
        reads: the fewest that the budget allows, which are those of Belady's policy on demand.
        read_ms: of one expert.
        layers: of a token.
        compute_ms: of a layer.
        tokens: of the traces.
    """
    return max(reads * read_ms / tokens, layers * compute_ms)


class _Run:
    """The reader, the experts that wait for it, and what it has read."""

    def __init__(
        self, cache: ExpertCache, sizes: Mapping[Key, int], bandwidth: float, latency: float, preload: int, least: float
    ) -> None:
        self.cache, self.sizes, self.bandwidth, self.latency = cache, sizes, bandwidth, latency
        self.most_preloads, self.least = preload, least
        self.key: Key | None = None  # what is read now
        self.end = 0.0  # of that read, or of the last one
        self.demanded: list[Key] = []
        self.preloads: list[Key] = []
        self.chosen: tuple[Key, ...] = ()
        self.since = 0.0  # when what waits began to wait
        self.unused: set[Key] = set()  # preloaded, and not used since
        self.reads = self.bytes_read = self.wasted = self.most = 0

    def begin(self, now: float, chosen: tuple[Key, ...], chances: Mapping[Key, float]) -> None:
        self.cache.expect(chances)
        if self.key in self.unused and self.key[0] == chosen[0][0] and self.key not in chosen and now < self.end:
            self._break_off(now)
        self.chosen, self.since = chosen, now
        self.unused -= set(chosen)
        self.demanded = [key for key in chosen if key not in self.cache.held]
        likely = sorted((key for key in chances if chances[key] >= self.least), key=lambda key: -chances[key])
        missing = [key for key in likely if key not in self.cache.held and key not in self.demanded]
        self.preloads = missing[: self.most_preloads]

    def _break_off(self, now: float) -> None:
        """End the read of a wrong preload; what was read of it counts."""
        assert self.key is not None
        left = min(self.sizes[self.key], round((self.end - now) * self.bandwidth))
        self.cache.remove(self.key)
        self.unused.discard(self.key)
        self.wasted += 1
        self.bytes_read -= left
        self.key, self.end = None, now

    def advance(self, until: float) -> None:
        """Read what waits, as long as a read begins before `until`."""
        while True:
            if self.key is not None:
                if self.end > until:
                    return
                self.key = None
            start = max(self.end, self.since)
            if start >= until or not self._take(start):
                return

    def wait(self, now: float, chosen: tuple[Key, ...]) -> float:
        """When all chosen experts are there."""
        while self.demanded or self.key in chosen:
            if self.key is None:
                self._take(max(self.end, self.since))
                continue
            now, self.key = max(now, self.end), None
        return now

    def _take(self, start: float) -> bool:
        """Begin the next read; False if nothing waits, or nothing may go for it."""
        while self.demanded or self.preloads:
            demanded = bool(self.demanded)
            key = (self.demanded if demanded else self.preloads).pop(0)
            gone = self.cache.evict_for(self.sizes[key], self.chosen)
            if gone is None:
                continue  # a preload that only what is in use could make room for
            self.wasted += len(self.unused & set(gone))
            self.unused -= set(gone)
            self.cache.add(key, self.sizes[key])
            self.most = max(self.most, self.cache.used)
            if not demanded:
                self.unused.add(key)
            self.reads += 1
            self.bytes_read += self.sizes[key]
            self.key, self.end = key, start + self.latency + self.sizes[key] / self.bandwidth
            return True
        return False


def _exactly(steps: Sequence[tuple[Key, ...]], step: int) -> Mapping[Key, float]:
    return dict.fromkeys(steps[step + 1], 1.0) if step + 1 < len(steps) else {}


def _predictions(steps: Sequence[tuple[Key, ...]], layers: int, predictor: PathPredictor | None) -> Predict:
    if predictor is None:
        return lambda step: {}
    known: dict[tuple[tuple[Key, ...], ...], Mapping[Key, float]] = {}  # by the past, which comes again

    def predict(step: int) -> Mapping[Key, float]:
        layer, past = (step + 1) % layers, tuple(steps[max(0, step - 1) : step + 1])
        if past not in known:
            chances = predictor.predict(layer, [[e for _, e in each] for each in past])
            known[past] = {(layer, e): chance for e, chance in chances.items()}
        return known[past]

    return predict
