"""RelP by name: `actkit analyze MODEL relp --data pairs.jsonl`, with the first nodes patched exactly.

    effect of a node = mean over the pairs of what its clean value does to (logit of right - logit of wrong)

The corrupted text runs and values come from the clean one (denoising), as `data.pairs` reads them. Cost and methods are
those of `effects.patch_effects`; the check is half a forward pass for each of the first nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from actkit.core.forward.batch import sequence_of
from actkit.core.forward.limits import TOKENS
from actkit.core.ground.errors import DataError
from actkit.core.recipe.analysis import reads
from actkit.data.pairs import read_pairs
from actkit.interpretation.relp.effects import SITES, exact_effects, patch_effects
from actkit.interpretation.relp.metrics import LogitDifference
from actkit.interpretation.relp.results import Method, PatchEffects, mean_effects


@reads(read_pairs)
def relp(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: Method = "relp",
    sites: tuple[str, ...] = SITES,
    steps: int = 10,
    checked: int = 10,
    progress: bool = True,
) -> PatchEffects:
    """Rank the parts of a model by their effect on which of two tokens comes next.

    Args:
        model: a language model.
        batches: from `data.pairs.read_pairs`.
        method: 'relp', 'attribution', 'integrated' or 'exact'.
        sites: names of sites; 'attention.mixed' is by head.
        steps: of 'integrated'.
        checked: so many of the first nodes are patched exactly too; 0 for none.
        progress: show a bar.

    Returns:
        The effects, means over all pairs.

    Raises:
        DataError: the batches are no pairs.
        ValueError: what `patch_effects` raises.
        ActkitError: what the model's anatomy raises.
    """
    if checked < 0:
        raise ValueError(f"checked: {checked} was given; give 0 or more nodes that are patched exactly too.")
    pairs = [_Pairs.of(batch) for batch in sequence_of(batches)]
    weights = [len(each.metric.right) for each in pairs]
    settings: dict[str, Any] = {
        "sites": sites,
        "method": method,
        "steps": steps,
        "tokens": pairs[0].tokens,
        "progress": progress,
    }
    found = [patch_effects(model, each.corrupted, each.clean, each.metric, **settings) for each in pairs]
    effects = mean_effects(found, weights)
    nodes = () if method == "exact" else effects.top(checked)
    if not nodes:
        return effects
    total = [0.0] * len(nodes)
    for each, weight in zip(pairs, weights, strict=True):
        exact = exact_effects(model, each.corrupted, each.clean, each.metric, nodes, progress=progress)
        total = [sum_ + value * weight / sum(weights) for sum_, value in zip(total, exact, strict=True)]
    return replace(effects, checked=tuple(total))


@dataclass(frozen=True)
class _Pairs:
    """One batch of pairs."""

    corrupted: dict[str, Tensor]
    clean: dict[str, Tensor]
    metric: LogitDifference
    tokens: tuple[str, ...]

    @classmethod
    def of(cls, batch: Any) -> _Pairs:
        clean = f"clean_{TOKENS}"
        if not isinstance(batch, dict) or not {TOKENS, clean, "right", "wrong"} <= set(batch):
            raise DataError(
                f"data: relp reads pairs, and a batch without {TOKENS}, {clean}, right or wrong was given; "
                f"data.pairs.read_pairs makes them from a file."
            )
        metric = LogitDifference(batch["right"], batch["wrong"])
        return cls({TOKENS: batch[TOKENS]}, {TOKENS: batch[clean]}, metric, tuple(batch.get("tokens", ())))
