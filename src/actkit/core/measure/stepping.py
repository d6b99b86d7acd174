"""What runs a transformers model in a way of its own, call by call: tokens and logits are checked, and text follows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from actkit.core.ground.errors import DataError, NonFiniteError
from actkit.core.measure.generation import generate_ids
from actkit.core.measure.sampling import LIKELIEST, Sampling


class StepByStep:
    """Base of such a runtime; calling it with some more tokens gives the logits of the next one.

    Attributes:
        model: whose embedding and configuration count.
        position: tokens that it has read.
        capacity: at most so many.
    """

    model: Any
    position: int
    capacity: int

    def _check_open(self) -> None:
        """Raise ValueError if it was closed."""

    def _checked_tokens(self, new: Sequence[int]) -> list[int]:
        """Return the tokens; raises DataError if there are none, too many, or one is not in the vocabulary."""
        self._check_open()
        tokens = [int(token) for token in new]
        entries = self.model.get_input_embeddings().num_embeddings
        if not tokens or self.position + len(tokens) > self.capacity:
            raise DataError(
                f"new: {len(tokens)} tokens were given, and {self.position} are there; give one or more, at most "
                f"{self.capacity} in all (capacity), or reset() it."
            )
        if not 0 <= min(tokens) <= max(tokens) < entries:
            raise DataError(
                f"new: token {max(tokens)} of {min(tokens)} to {max(tokens)}; the model embeds 0 to {entries - 1}."
            )
        return tokens

    def _last_logits(self, logits: Tensor) -> Tensor:
        """Return the last of [1, n, vocabulary] as float32; raises NonFiniteError if they are NaN or Inf."""
        found = logits[0, -1].float()
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError(f"logits: NaN or Inf after token {self.position}; check the weights of the model.")
        return found

    def generate(
        self,
        input_ids: Tensor | Sequence[int],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = LIKELIEST,
        end: Collection[int] | None = None,
    ) -> Iterator[int]:
        """Yield the tokens that follow a prompt, one by one; arguments as in `core.measure.generation.generate_ids`."""
        self._check_open()
        return generate_ids(
            self.model,
            input_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            end=end,
            decoder=self,  # type: ignore[arg-type]
        )
