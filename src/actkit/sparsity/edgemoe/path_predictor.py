"""Which experts the next layer will choose, from those chosen before (EdgeMoE, 2023, arXiv:2308.14352).

    P(expert j at layer n | choices at n - 2, choices at n - 1)     counted over calibration tokens

When to use it: to fetch experts before their router has chosen them, for a model that runs one token at a time.
Cost: a pass over calibration text that notes choices; a table of the paths that were seen; a look-up for each layer.
Settled here: choices that were never seen together back off to those of one layer, and at last to how often an expert
is chosen at all.
Our own reading: the layers before the first one are the last ones of the token before, as the model runs through them
in this order (the paper, as we know it, has nothing before the first layer, and one layer before the second). With k
experts a token chooses a set, and sets of many experts hardly ever come again. Between one layer and none there is
therefore one more step: the mean over the experts of the previous set of what followed each. For k = 1 it is what one
layer says. Where more than SETS sets are possible (8 of 128 experts), none is kept, and predictions begin with that
step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground.errors import CheckpointError, DataError
from actkit.core.ground.whole_file import write_whole
from actkit.core.model.expert_places import ExpertShape, expert_places
from actkit.sparsity.edgemoe.expert_cache import Key

SETS = 1024  # of experts that a token may choose in a layer, up to which they are told apart
Choice = tuple[int, ...]  # the experts of one token in one layer, sorted
Trace = np.ndarray[Any, Any]  # int [tokens, layers, k]: what the tokens of one text chose


def record_traces(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[Trace]:
    """Note which experts the tokens of texts choose.

    Args:
        model: a mixture of experts.
        batches: with `input_ids` [batch, tokens]; tokens that `attention_mask` leaves out are left out.

    Returns:
        int [tokens, layers, k] of each row of each batch.

    Raises:
        UnsupportedModelError: the model has no experts.
        DataError: there are no batches.
    """
    places = expert_places(model)
    seen: dict[str, Tensor] = {}
    found: list[Trace] = []

    def note(path: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[path] = args[1] if len(args) > 1 else kwargs["top_k_index"]

        return keep

    with evaluating(model), hooked(model, before={place.path: note(place.path) for place in places}):
        for batch in batches:
            forward(model, batch)
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            chosen = torch.stack([seen[place.path] for place in places], 1).unflatten(0, tuple(ids.shape))
            for row, tokens in enumerate(chosen):
                found.append((tokens if mask is None else tokens[mask[row].bool()]).cpu().numpy())
    if not found:
        raise DataError("batches: there are none; give texts.")
    return found


class PathPredictor:
    """Predicts the experts of a layer from those of the two layers before.

    Args:
        layers: how many layers have experts.
        experts: of each.
        top_k: that a token takes.

    Attributes:
        shares: of the tokens that chose each expert.
    """

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.layers, self.experts, self.top_k = layers, experts, top_k
        self._orders = 2 if comb(experts, top_k) <= SETS else 0
        # of each layer: what came before -> (tokens, how many of them chose each expert)
        self._sets: list[dict[tuple[Choice, ...], np.ndarray[Any, Any]]] = [{} for _ in range(layers)]
        self._each = np.zeros((layers, experts, experts + 1))  # after one expert of the layer before; tokens are last

    @classmethod
    def fit(cls, traces: Iterable[Trace], experts: int) -> PathPredictor:
        """Count what followed what.

        Args:
            traces: int [tokens, layers, k], as `record_traces` gives them.
            experts: of a layer.

        Raises:
            DataError: there is no token.
        """
        self: PathPredictor | None = None
        for trace in traces:
            if self is None:
                self = cls(trace.shape[1], experts, trace.shape[2])
            self._count(_flat(trace))
        if self is None or not self.shares:
            raise DataError("traces: they hold no token; record more text.")
        return self

    def _count(self, choices: Sequence[Choice]) -> None:
        for i, choice in enumerate(choices):
            layer = i % self.layers
            for order in range(min(i, self._orders) + 1):
                counts = self._sets[layer].setdefault(
                    tuple(choices[i - order : i]), np.zeros(self.experts + 1, dtype=np.int64)
                )
                counts[list(choice)] += 1
                counts[-1] += 1
            for before in choices[i - 1] if i else ():
                self._each[layer, before, list(choice)] += 1
                self._each[layer, before, -1] += 1

    def predict(self, layer: int, past: Sequence[Sequence[int]], order: int = 2) -> dict[int, float]:
        """Say how probable each expert is at a layer.

        Args:
            layer: which of those that have experts.
            past: the experts that were chosen at the layers right before, the last one last; before the first layer
                come the last ones of the token before.
            order: how many layers are looked back at.

        Returns:
            Of each expert the share of the tokens with this past that chose it, the most probable first; they sum to k.

        Raises:
            ValueError: there is no such layer.
        """
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer: {layer} was given; give 0 to {self.layers - 1}, of the layers that have experts.")
        chances = self._chances(layer, [_choice(each) for each in past[max(0, len(past) - order) :]])
        ranked = np.argsort(-chances, kind="stable")
        return {int(e): float(chances[e]) for e in ranked}

    def _chances(self, layer: int, past: list[Choice]) -> np.ndarray[Any, Any]:
        for start in range(len(past)):
            counts = self._sets[layer].get(tuple(past[start:]))
            if counts is not None:
                return counts[:-1] / counts[-1]  # type: ignore[no-any-return]
        if past:
            known = [row for e in past[-1] if (row := self._each[layer, e])[-1]]
            if known:
                return np.mean([row[:-1] / row[-1] for row in known], 0)  # type: ignore[no-any-return]
        counts = self._sets[layer][()]
        return counts[:-1] / counts[-1]  # type: ignore[no-any-return]

    @property
    def shares(self) -> dict[Key, float]:
        """The share of tokens that chose each expert."""
        return {
            (layer, e): float(count / counts[-1])
            for layer, sets in enumerate(self._sets)
            for counts in (sets.get(()),)
            if counts is not None
            for e, count in enumerate(counts[:-1])
        }

    def accuracy(self, traces: Iterable[Trace], order: int = 2, first: int = 2) -> float:
        """Measure how often the most probable expert is among those chosen.

        Args:
            traces: of other text than it was fitted on.
            order: as in `predict`; 0 predicts the expert that is chosen most often.
            first: the first layer that counts.
        """
        right = total = 0
        for trace in traces:
            choices = _flat(trace)
            for i, choice in enumerate(choices):
                if i % self.layers >= first:
                    right += next(iter(self.predict(i % self.layers, choices[max(0, i - 2) : i], order))) in choice
                    total += 1
        return right / total

    def coverage(self, traces: Iterable[Trace], top: float = 0.2) -> float:
        """Measure what share of two-layer paths in other text are among the most frequent ones in the statistics.

        Args:
            traces: of other text.
            top: share of the paths that the statistics hold.

        Returns:
            Share of (token, layer) pairs; 0 if sets are not told apart.
        """
        known: Counter[tuple[int, Choice, Choice]] = Counter()
        for layer, sets in enumerate(self._sets[2:], 2):
            for past, counts in sets.items():
                if len(past) == 2:
                    known[(layer, *past)] += int(counts[-1])
        best = {path for path, _ in known.most_common(round(top * len(known)))}
        inside = total = 0
        for trace in traces:
            for token in trace:
                choices = [_choice(chosen) for chosen in token]
                inside += sum((n, choices[n - 2], choices[n - 1]) in best for n in range(2, self.layers))
                total += self.layers - 2
        return inside / total

    def check(self, shape: ExpertShape) -> None:
        """Refuse a model with other numbers of layers or experts.

        Args:
            shape: of the model.

        Raises:
            ValueError: naming both.
        """
        own, given = (self.layers, self.experts, self.top_k), (len(shape.layers), shape.experts, shape.top_k)
        if own != given:
            raise ValueError(
                f"predictor: it knows {own[0]} layers of {own[1]} experts, {own[2]} for a token; the model has "
                f"{given[0]} of {given[1]}, {given[2]} for a token. Fit one on traces of this model."
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Args:
            path: of the file.
        """
        sets = [[[past, counts.tolist()] for past, counts in layer.items()] for layer in self._sets]
        content = {"layers": self.layers, "experts": self.experts, "top_k": self.top_k, "sets": sets}
        write_whole(Path(path), json.dumps({**content, "each": self._each.tolist()}))

    @classmethod
    def load(cls, path: str | Path) -> PathPredictor:
        """Read what `save` wrote.

        Args:
            path: of the file.

        Raises:
            CheckpointError: it is not readable.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            self = cls(content["layers"], content["experts"], content["top_k"])
            self._each = np.array(content["each"])
            self._sets = [
                {tuple(map(tuple, past)): np.array(counts) for past, counts in layer} for layer in content["sets"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: it holds no predictor ({error}); fit it again.") from error
        return self


def _flat(trace: Trace) -> list[Choice]:
    """The choices of one layer after the other, token after token."""
    return [_choice(chosen) for token in trace for chosen in token]


def _choice(chosen: Any) -> Choice:
    return tuple(sorted(map(int, chosen)))
