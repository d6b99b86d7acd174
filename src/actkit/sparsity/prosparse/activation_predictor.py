"""Guess which neurons of an MLP will fire before they are computed (DejaVu; ProSparse, 2024, arXiv:2402.13516).

    logits = second(relu(first(x)))      first: [rank, inputs], second: [neurons, rank]; neuron i is on if logit > 0

The loss is binary cross entropy over (x, on) pairs, in which an inactive neuron counts mean(on) + 0.005 of an active
one, so that missing one costs more than computing one in vain. Cost per token: rank * (inputs + neurons) products.
The recipe is DejaVu's: AdamW, learning rate 1e-4, weight decay 0.01, 1024 pairs a batch, up to 20 epochs, 5 % held out.
DejaVu has no function between the layers, ProSparse says a ReLU: `between` chooses. Settled here: the weights with the
least held-out loss are kept, not those with the best recall, as predicting every neuron has the best recall of all.
What a predictor misses changes the output of the model; exact kernels, which look at the zeros themselves, need none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.ground.errors import DataError
from actkit.core.model.sites import Site
from actkit.core.train.training import Trained, train
from actkit.core.watch.capture import record
from actkit.core.watch.sample import Sample, paired

HELD_OUT, BATCH, SLACK = 0.05, 1024, 0.005


class ActivationPairs(NamedTuple):
    """What an MLP read, and which of its neurons were on.

    Attributes:
        x: float32 [tokens, inputs], what the MLP reads.
        active: bool [tokens, neurons], True if the hidden value is not 0.
    """

    x: Tensor
    active: Tensor


def activation_pairs(
    model: nn.Module, batches: Iterable[Any], block: int, *, tokens: int = 400_000, seed: int = 0, progress: bool = True
) -> ActivationPairs:
    """Collect pairs from the MLP of a block, at a random sample of the tokens.

    It takes 4 * (inputs + neurons) bytes of memory per token.

    Args:
        model: the model to read; its MLP needs a ReLU.
        batches: dicts of the model's keywords, or tensors.
        block: the index of the block.
        tokens: how many to sample; all of them if there are fewer.
        seed: of the sample.
        progress: show a bar.

    Returns:
        One pair per token of the sample.

    Raises:
        DataError: no hidden value is 0.
        ActkitError: what `record` raises.
    """
    sites = Site("mlp.input", block), Site("mlp.hidden", block)
    seen = record(model, {site: Sample(tokens, seed) for site in sites}, batches, progress=progress)
    x, hidden = paired(*(seen[site] for site in sites))
    if bool(hidden.all()):
        raise DataError(
            f"block: no hidden value of block {block} is 0, so there is nothing to predict; the model needs a ReLU."
        )
    return ActivationPairs(x, hidden != 0)


class ActivationPredictor(nn.Module):
    """Two linear layers of low rank that predict which neurons are on.

    Args:
        inputs: the width of what the MLP reads.
        neurons: of the MLP.
        rank: the width between the two layers.
        between: the function between them, 'relu' or 'nothing'.

    Raises:
        ValueError: a size is below 1, or `between` is unknown.
    """

    def __init__(
        self, inputs: int, neurons: int, rank: int = 1000, between: Literal["relu", "nothing"] = "relu"
    ) -> None:
        super().__init__()
        for name, size in (("inputs", inputs), ("neurons", neurons), ("rank", rank)):
            if size < 1:
                raise ValueError(f"{name}: {size} was given; give at least 1.")
        if between not in ("relu", "nothing"):
            raise ValueError(f"between: {between!r} was given, allowed are 'relu' and 'nothing'.")
        self.first = nn.Linear(inputs, rank, bias=False)
        self.between = nn.ReLU() if between == "relu" else nn.Identity()
        self.second = nn.Linear(rank, neurons, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., inputs] to logits [..., neurons]."""
        return self.second(self.between(self.first(x)))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Predict from x [..., inputs] which neurons are on: bool [..., neurons]."""
        return self(x) > 0

    def recall(self, x: Tensor, active: Tensor) -> float:
        """Return the share of the neurons that are on (bool [..., neurons]) that is predicted; nan if none is on."""
        return float(self.predict(x)[active].double().mean())

    def predicted_sparsity(self, x: Tensor) -> float:
        """Return the share of neurons that are predicted to be off."""
        return 1 - float(self.predict(x).double().mean())

    def fit(
        self,
        pairs: ActivationPairs,
        *,
        epochs: int = 20,
        learning_rate: float = 1e-4,
        batch_size: int = BATCH,
        seed: int = 0,
        progress: bool = True,
    ) -> Trained:
        """Train on pairs, of which a random 5 % are held out.

        Args:
            pairs: from `activation_pairs`.
            epochs: passes over the pairs at most.
            learning_rate: the peak.
            batch_size: pairs per step.
            seed: of the split and the order.
            progress: show a bar.

        Returns:
            The training's record; the weights kept are those with the least held-out loss.

        Raises:
            ValueError: the shapes do not fit.
            DataError: there are fewer than 20 pairs.
            ActkitError: what `train` raises.
        """
        x, active = pairs
        expected = (self.first.in_features, self.second.out_features)
        if x.dim() != 2 or active.shape != (len(x), expected[1]) or x.shape[1] != expected[0]:
            raise ValueError(
                f"pairs: x {list(x.shape)} and active {list(active.shape)} were given; this predictor takes "
                f"[tokens, {expected[0]}] and [tokens, {expected[1]}]."
            )
        held_out = int(len(x) * HELD_OUT)
        if not held_out:
            raise DataError(f"pairs: {len(x)} were given; give at least 20, best some 100,000.")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        validation = [(x[order[:held_out]], active[order[:held_out]].float())]
        batches = [(x[index], active[index].float()) for index in order[held_out:].split(batch_size)]
        off = float(active.double().mean()) + SLACK

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            rows, on = batch
            return F.binary_cross_entropy_with_logits(model(rows), on, weight=off + (1 - off) * on)

        return train(
            self,
            batches,
            validation=validation,
            epochs=epochs,
            learning_rate=learning_rate,
            weight_decay=0.01,
            schedule="constant",
            warmup=0.0,
            evaluate_every=len(batches),
            seed=seed,
            loss=loss,
            progress=progress,
        )
