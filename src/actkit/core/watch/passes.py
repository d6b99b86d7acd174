"""What the tokens of a forward pass are: their positions, which are padding, which belong to a prompt.

    position = how many real tokens of its row stand before a token, those in the cache included

A text is written in several passes: with a cache each holds the new token alone, without one the text so far. A pass
belongs to the text of the pass before if it has a cache that is not empty, or if it holds that pass's tokens and one
more; every other pass begins with a prompt. So a place in a text means the same with and without a cache, and with and
without padding on the left.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Phase = Literal["prompt", "generated"]


@dataclass(frozen=True)
class Pass:
    """One forward pass over tokens.

    Attributes:
        columns: int64 [length], the places of its tokens in the rows, those in the cache included.
        mask: bool [batch, columns so far], which tokens are real.
        prompt: how many of the columns are the prompt's.
    """

    columns: Tensor
    mask: Tensor
    prompt: int

    @property
    def positions(self) -> Tensor:
        """Int64 [batch, length]: of each token among the real ones of its row; -1 or more for padding."""
        return (self.mask.long().cumsum(1) - 1)[:, self.columns]

    @property
    def real(self) -> Tensor:
        """Bool [batch, length]: which tokens are no padding."""
        return self.mask[:, self.columns]

    @property
    def generated(self) -> Tensor:
        """Bool [length]: which columns come after the prompt."""
        return self.columns >= self.prompt

    @property
    def prompt_lengths(self) -> Tensor:
        """Int64 [batch]: real tokens of the prompt."""
        return self.mask[:, : self.prompt].sum(1)

    @property
    def phase(self) -> Phase:
        """Whether the pass is a prompt's, or the writing of a text behind it."""
        return "generated" if bool(self.generated[-1]) else "prompt"


class Passes:
    """Follows the passes of a model.

    Args:
        model: whose calls are told to `begin`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._before: Tensor | None = None  # what the pass before was given, if it was given all of its text
        self._prompt = 0
        self.now: Pass | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read what a pass is, in front of the call of the whole model.

        Args:
            module: the model.
            args: of the call.
            kwargs: of the call.
        """
        given = {**dict(zip(self._names, args)), **kwargs}
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            self._before = self.now = None
            return
        cache: Any = given.get("past_key_values")
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        batch, length = tokens.shape[:2]
        if past:
            self._prompt = self._prompt if length == 1 and self._prompt else past + length
        elif not self._goes_on(tokens):
            self._prompt = length
        self._before = None if past else tokens.detach()
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == (batch, past + length):
            mask = mask.bool()
        elif mask is None or (isinstance(mask, Tensor) and mask.dim() != 2):
            mask = torch.ones(batch, past + length, dtype=torch.bool, device=tokens.device)
        else:
            raise ValueError(
                f"attention_mask: it has the shape {list(getattr(mask, 'shape', []))}, and the tokens that it is for, "
                f"those in the cache included, {[batch, past + length]}, so their positions are not known."
            )
        self.now = Pass(torch.arange(past, past + length, device=tokens.device), mask, self._prompt)

    def _goes_on(self, tokens: Tensor) -> bool:
        """Whether these are the tokens of the pass before and one more."""
        before = self._before
        if before is None or before.dim() != tokens.dim() or tokens.shape[0] != before.shape[0]:
            return False
        return tokens.shape[1] == before.shape[1] + 1 and torch.equal(tokens[:, :-1], before)
