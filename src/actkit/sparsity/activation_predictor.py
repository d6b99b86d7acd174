"""Which neurons of an MLP will fire, guessed from its input before they are computed (DejaVu; ProSparse, 2402.13516).

    logits = second(relu(first(x)))      first: [rank, inputs], second: [neurons, rank]; neuron i is on where logit > 0

The loss is binary cross entropy over (x, on) pairs, where an inactive neuron counts mean(on) + 0.005 of an active one,
so that missing one costs more than computing one in vain. Cost per token: rank * (inputs + neurons) products.
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
    """x: float32 [tokens, inputs], what the MLP reads. active: bool [tokens, neurons], whose hidden value is not 0."""

    x: Tensor
    active: Tensor


def activation_pairs(
    model: nn.Module, batches: Iterable[Any], block: int, *, tokens: int = 400_000, seed: int = 0, progress: bool = True
) -> ActivationPairs:
    """Pairs of the MLP in a block, of a random sample of the tokens (all where there are fewer).

    Memory: 4 * (inputs + neurons) bytes per token. Raises what `record` raises; DataError where no hidden value is 0.
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

    between: 'relu', or 'nothing'. Raises ValueError for sizes below 1.
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
        """x [..., inputs] -> logits [..., neurons]."""
        return self.second(self.between(self.first(x)))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> bool [..., neurons], which are on."""
        return self(x) > 0

    def recall(self, x: Tensor, active: Tensor) -> float:
        """Of the neurons that are on (bool [..., neurons]), the share that is predicted; nan where none is."""
        return float(self.predict(x)[active].double().mean())

    def predicted_sparsity(self, x: Tensor) -> float:
        """The share of neurons that are predicted to be off."""
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
        """Train on pairs, of which a random 5 % are held out. Raises ValueError for shapes that do not fit, DataError
        for fewer than 20 pairs, and what `train` raises."""
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
