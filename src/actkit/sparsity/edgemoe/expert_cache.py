"""Which experts stay in memory: a budget of bytes, and what goes if it is used up (EdgeMoE, 2023, arXiv:2308.14352).

    out goes the expert with the highest d / f
    d = (layer of the expert - layer that runs) mod layers     how soon its layer comes again
    f = how often it is chosen

When to use it: a model is worked through layer by layer, again and again, so that what was used last is what is needed
last: LRU throws away what comes next. `edgemoe` keeps what is chosen often and comes soon.
Cost: a look at every expert in memory for each that goes.
Our own reading: the published formula was not seen. The paper says that frequency and the distance of the layer are
both used, and that rarely used experts of distant layers go; d / f is the simplest score that does that. For an expert
of the next layer f is the chance that the path gives it, if someone predicts (`expect`); for others the share of tokens
that chose it, of which RECENT counts the last tokens, by half for each HALF_LIFE. For the layer that runs d is the
number of layers, not 0: those that were chosen are kept by other means, and the others come again after all layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal

Key = tuple[int, int]  # (which of the layers that have experts, index of the expert)
Policy = Literal["edgemoe", "lru", "lfu", "fifo", "belady"]
POLICIES = ("edgemoe", "lru", "lfu", "fifo", "belady")
NEVER = 1 << 60
RECENT, HALF_LIFE = 0.2, 3.0  # how much the last tokens count, and after how many of them half as much
SMALL = 0.02  # added to each frequency


class ExpertCache:
    """What is in memory, by the bytes that it takes there. It reads nothing, and is no lock: its owner has one.

    Args:
        budget: bytes.
        policy: what goes: 'edgemoe'; the least recently ('lru') or least often ('lfu') used; what came first ('fifo');
            or what is used again last ('belady'), which needs `future`.
        layers: how many layers have experts.
        shares: of tokens that chose each expert, of statistics; None for those of the run.
        future: for 'belady' the experts that each step will choose, a step being one layer for one token.

    Attributes:
        held: bytes by expert, in the order in which they came.
        used: bytes in all; never more than the budget.
        evictions: how many experts went.

    Raises:
        ValueError: an unknown policy, or 'belady' without a future.
    """

    def __init__(
        self,
        budget: int,
        policy: Policy = "edgemoe",
        *,
        layers: int,
        shares: Mapping[Key, float] | None = None,
        future: Iterable[Collection[Key]] | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy: {policy!r} was given; choose one of {', '.join(POLICIES)}.")
        if (policy == "belady") != (future is not None):
            raise ValueError("policy, future: 'belady' needs the experts of all steps as future=, and no other does.")
        self.budget, self.policy, self.layers = budget, policy, layers
        self.held: dict[Key, int] = {}
        self.used = self.evictions = 0
        self._layer, self._step = 0, -1
        self._shares, self._expected = shares, dict[Key, float]()
        self._recent: dict[Key, tuple[float, int]] = {}  # a decayed share, and the token that it is of
        self._uses: Counter[Key] = Counter()  # of the run
        self._last: dict[Key, int] = {}  # step of the last use
        self._next = _uses_by_key(future or ())
        scores: dict[str, Callable[[Key], float]] = {
            "edgemoe": lambda key: self.distance(key) / (self.frequency(key) + SMALL),
            "lru": lambda key: 0,
            "lfu": lambda key: -self._uses[key],
            "fifo": lambda key: 0,
            "belady": self._next_use,
        }
        self._score = scores[policy]

    def distance(self, key: Key) -> int:
        """After how many layers the layer of an expert comes again: 1 for the next one."""
        return (key[0] - self._layer - 1) % self.layers + 1

    def begin(self, layer: int, chosen: Collection[Key]) -> None:
        """Say that a layer runs now, and which experts its router chose.

        Args:
            layer: which of those that have experts.
            chosen: in memory, or not yet.
        """
        self._layer, self._expected = layer, {}
        self._step += 1
        for key in chosen:
            self._recent[key] = self._decayed(key) + 1 - 0.5 ** (1 / HALF_LIFE), self._token
            self._uses[key] += 1
            self._last[key] = self._step

    def expect(self, chances: Mapping[Key, float]) -> None:
        """Say how probable the experts of the next layer are; until the next `begin`.

        Args:
            chances: of experts of that layer.
        """
        self._expected = dict(chances)

    def frequency(self, key: Key) -> float:
        """How often an expert is chosen, per token: by the path if that is known, else in the statistics and lately."""
        if key in self._expected:
            return self._expected[key]
        share = self._uses[key] / (self._token + 1) if self._shares is None else self._shares.get(key, 0.0)
        return (1 - RECENT) * share + RECENT * self._decayed(key)

    def _decayed(self, key: Key) -> float:
        value, token = self._recent.get(key, (0.0, self._token))
        return value * 0.5 ** ((self._token - token) / HALF_LIFE)

    @property
    def _token(self) -> int:
        return self._step // self.layers

    def add(self, key: Key, size: int) -> None:
        """Count an expert as in memory, for which there is room.

        Args:
            key: of the expert.
            size: its bytes.

        Raises:
            ValueError: there is no room, or it is there already.
        """
        if key in self.held or self.used + size > self.budget:
            raise ValueError(f"cache: {key} of {size} bytes is there already, or does not fit into {self.budget}.")
        self.held[key] = size
        self.used += size
        self._last[key] = self._step

    def remove(self, key: Key) -> None:
        """Count an expert as gone."""
        self.used -= self.held.pop(key)

    def evict_for(self, size: int, kept: Collection[Key]) -> list[Key] | None:
        """Make room.

        Args:
            size: bytes that are wanted.
            kept: experts that must stay.

        Returns:
            What went, or None if there is not enough to throw out; then nothing goes.
        """
        candidates = [key for key in self.held if key not in kept]
        if self.used - sum(self.held[key] for key in candidates) + size > self.budget:
            return None
        gone: list[Key] = []
        while self.used + size > self.budget:
            worst = max(candidates, key=self._rank)
            candidates.remove(worst)
            self.remove(worst)
            gone.append(worst)
        self.evictions += len(gone)
        return gone

    def _rank(self, key: Key) -> tuple[float, int]:
        """Of equal scores the least recently used; for 'fifo' the first that came, as `held` lists them."""
        return self._score(key), 0 if self.policy == "fifo" else -self._last[key]

    def _next_use(self, key: Key) -> float:
        steps = self._next.get(key, [])
        while steps and steps[-1] <= self._step:
            steps.pop()
        return steps[-1] if steps else NEVER


def _uses_by_key(future: Iterable[Collection[Key]]) -> dict[Key, list[int]]:
    """The steps in which each expert is used, the next one last."""
    found: dict[Key, list[int]] = {}
    for step, keys in enumerate(future):
        for key in keys:
            found.setdefault(key, []).append(step)
    return {key: steps[::-1] for key, steps in found.items()}


def check_budget(budget: int, sizes: Collection[int], top_k: int) -> None:
    """Refuse a budget that the experts of one token in one layer may not fit into.

    Args:
        budget: bytes.
        sizes: of all experts.
        top_k: experts that a token takes in a layer.

    Raises:
        ValueError: it is too small.
    """
    needed = sum(sorted(sizes, reverse=True)[:top_k])
    if budget < needed:
        raise ValueError(
            f"budget: {budget} bytes were given, and the {top_k} largest experts, which one token may need at once, "
            f"take {needed}; give {needed} or more."
        )


def steps_of(traces: Sequence[object]) -> list[tuple[Key, ...]]:
    """The experts of every step of traces, one layer for one token after the other.

    Args:
        traces: int [tokens, layers, k] each.
    """
    return [
        tuple((layer, int(e)) for e in sorted(set(chosen)))
        for trace in traces
        for token in trace  # type: ignore[attr-defined]
        for layer, chosen in enumerate(token)
    ]
