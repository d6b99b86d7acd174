"""CATS: zero the small gate values of gated MLPs, to skip rows of the other two matrices (2024, arXiv:2404.08763).

    y = W_down (g * (W_up x)),  g = f_t(W_gate x);   f_t(z) = f(z) if |f(z)| >= t, else 0   (f is SiLU in Llama)
    t = the k-quantile of |f(W_gate x)| over the calibration tokens and channels: one scalar per MLP

When to use it: if decoding a model with gated MLPs (Llama, Mistral, Qwen, Gemma) is bound by reading weights, and you
do not want to train. One number, 0.3 to 0.5 to begin with. If the activation gives exact zeros already (ReLU), it adds
nothing.
Cost: one comparison per channel; the gate is computed in full, so the mask is exact and no predictor is needed. If
g_j = 0, row j of W_up and column j of W_down need not be read: a decode step reads (1 + 2 (1 - k)) / 3 of the MLP's
weights, 67 % at k = 0.5. `gate_sparsity` measures what is reached. In the paper half of
the gate values can go without training; at 70 % and more `finetune` recovers part of the loss.
Settled here: ties are kept, as in the paper (the release drops |f| <= t); quantiles are exact to 1/512 of their value,
while the release's bins are 0.002 wide and end at 1, so that a layer of larger values saturates and one of small values
is coarse (`method="histogram"` reproduces them); padding is left out by the attention mask; the text of the calibration
runs through the original model. Our own reading: in an MLP without a gate (GPT-2, BERT, ViT) the threshold applies to
the activation's output, so that only columns of the down matrix are skipped; after AWQ, such an output is compared
divided by AWQ's scale. The release's optional penalty on small gate values is not built.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import field_validator
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.ground.errors import CoverageError, RecipeError
from actkit.core.layers.activations import Thresholded
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import Block, Mlp, Site, anatomy
from actkit.core.model.parts import LinearRole
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.train.training import Trained
from actkit.core.watch.statistics import Quantiles, Rows, Statistic
from actkit.finetuning.low_rank_training import train_low_rank

# the paper's, and the fused layers that hold them
TUNED: tuple[LinearRole, ...] = ("query", "key", "query_key_value", "gate", "gate_up", "down")


class Cats(Transform):
    """Zero the gate values of each MLP whose magnitude is below a calibrated threshold.

    An MLP without a gate is treated at its activation's output. Every token is sparse, in prefill too.

    Attributes:
        sparsity: share of the gate values that become zero, in [0, 1), everywhere or as {index of a block: share};
            blocks that are not named stay as they are.
        method: 'exact' quantiles, or the release's 'histogram', for comparison only.

    Raises:
        ValueError: a value is out of bounds.
        RecipeError: when applied, `sparsity` names a block that the model does not have.
        CoverageError: when applied, actkit does not know the model's MLPs.
    """

    sparsity: float | dict[int, float] = 0.5
    method: Literal["exact", "histogram"] = "exact"

    tags: ClassVar[Tags] = Tags(needs_data=True, stream="original", least_coverage=0.0)  # blocks may be left out
    not_proposed: ClassVar[str] = (
        "at equal bytes it lost more than wina and teal wherever the activation gives no zeros of its own; try it with "
        "recipes=['cats']"
    )

    @field_validator("sparsity")
    @classmethod
    def _are_shares(cls, sparsity: float | dict[int, float]) -> float | dict[int, float]:
        shares = sparsity.values() if isinstance(sparsity, dict) else (sparsity,)
        if not shares or not all(0 <= share < 1 for share in shares):
            raise ValueError("give a share from 0 to below 1, or {index of a block: share} with at least one block")
        return sparsity

    @classmethod
    def identity(cls) -> Self:
        return cls(sparsity=0.0)

    def share(self, block: Block) -> float:
        """Return the share of a block's gate values that is to become zero."""
        return self.sparsity.get(block.index, 0.0) if isinstance(self.sparsity, dict) else self.sparsity

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        blocks = trial.anatomy.blocks
        if not any(block.mlp or block.experts for block in blocks):
            raise CoverageError(
                f"model: actkit knows no MLP with an activation in this {type(trial.model).__name__}; describe its "
                f"family with register_architecture."
            )
        unknown = [i for i in self.sparsity if not 0 <= i < len(blocks)] if isinstance(self.sparsity, dict) else []
        if unknown:
            raise RecipeError(f"sparsity: block {unknown[0]} was named; the model has blocks 0 to {len(blocks) - 1}.")
        return self

    def targets(self, block: Block) -> Iterable[str]:
        return () if self.share(block) == 0 else block.nonlinearities()

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        if self.share(block) == 0:
            return {}
        statistic = Quantiles if self.method == "exact" else ReleaseHistogram
        return {mlp.zeros_at(block.index, expert): statistic() for expert, mlp in block.mlps()}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        share = self.share(block)
        if share == 0:
            return
        for expert, mlp in block.mlps():
            gates: Quantiles | ReleaseHistogram = seen[mlp.zeros_at(block.index, expert)]
            if not gates.count:
                yield Skip(mlp.activation, "no calibration token reached it")
                continue
            threshold = gates.quantile(share)
            yield Replace(mlp.activation, Thresholded(block.root.get_submodule(mlp.activation), threshold))
            yield Note(mlp.activation, _described(mlp, share, threshold, gates.cdf(threshold)))


def finetune(
    model: nn.Module, batches: Iterable[Any], *, validation: Iterable[Any], rank: int = 8, **training: Any
) -> Trained:
    """Train low-rank changes of the query, key, gate and down layers under the thresholds, and merge them.

    In a model without gates the up layers take the place of the gates.

    Args:
        model: a model that `Cats` changed.
        batches: what to train on.
        validation: held-out batches.
        rank: of the changes.
        training: as in `train_low_rank` (steps, learning_rate, seed ...).

    Returns:
        The training's record.

    Raises:
        ActkitError: what `train_low_rank` raises; quantized layers are refused by name.
    """
    gated = any(mlp.gated for block in anatomy(model).blocks for _, mlp in block.mlps())
    roles = TUNED if gated else (*TUNED, "up")
    return train_low_rank(model, batches, validation=validation, roles=roles, rank=rank, **training)


def _described(mlp: Mlp, share: float, threshold: float, achieved: float) -> str:
    text = (
        f"threshold {threshold:.4g}: {achieved:.1%} of the values are zero on the calibration data, {share:.0%} asked"
    )
    if threshold == 0:
        text += "; it drops nothing, only what is zero by itself stays so"
    if not mlp.gated:
        text += "; there is no gate, so only weights of the down layer can be skipped"
    if isinstance(mlp.down.module, ActLinear) and mlp.down.module.select is not None:
        text += f"; {mlp.down.path} selects its inputs already, by a rule that did not know these zeros"
    return text


class ReleaseHistogram(Statistic):
    """Quantiles of |x| as the paper's code takes them: 998 edges from -1 to 1, one last bin for all that is larger."""

    _bins: Tensor

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        return {"bins": torch.zeros(999, dtype=torch.int64, device=device)}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        index = torch.bucketize(x.float().abs(), self._edges().to(x.device), right=True)
        self._bins += torch.bincount(index.flatten(), minlength=len(self._bins))

    def _merge(self, other: Self) -> None:
        self._bins += other._bins.to(self._device)

    def quantile(self, p: float) -> float:
        """Return the smallest float32 above the lower edge of the bin that holds the p-quantile.

        That edge is dropped too.

        Args:
            p: the share of values below it.

        Returns:
            The threshold, 0 for the bin around zero, and at most just above 1, however large the values are.
        """
        self._needs_rows()
        cumulative = self._bins.cumsum(0) / self._bins.sum()
        index = int(torch.searchsorted(cumulative, torch.tensor(p, device=cumulative.device), right=True))
        lower = self._edges()[index - 1]
        return float(torch.nextafter(lower, torch.tensor(math.inf))) if lower > 0 else 0.0

    def cdf(self, t: float) -> float:
        """Return the share of the values in the bins that end below `t`."""
        self._needs_rows()
        return int(self._bins[: int((self._edges() < t).sum())].sum()) / int(self._bins.sum()) if t > 0 else 0.0

    @staticmethod
    def _edges() -> Tensor:
        """Return the edges between the bins: float32 [998]."""
        return torch.linspace(-1, 1, 998)
