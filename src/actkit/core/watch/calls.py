"""One recorded call of a module: what calibration replays, and what an inspection looks at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import BatchContext, first_tensor
from actkit.core.ground.errors import DataError


@dataclass(frozen=True)
class Call:
    """One recorded call of a module.

    Attributes:
        args: positional.
        kwargs: by keyword.
        context: token mask and keys of the batch (`core/forward/batch.py`).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: BatchContext

    def replay(self, module: nn.Module) -> Tensor:
        """Return the (first) output of a module on these arguments, without gradients.

        Args:
            module: that was called, or another one.
        """
        with torch.no_grad():
            return first_tensor(module(*self.args, **self.kwargs))

    @property
    def hidden(self) -> Tensor:
        """The hidden states that the block was called with."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def real(self, x: Tensor) -> Tensor:
        """Return the rows of a tensor of this call that belong to real tokens.

        Args:
            x: [..., channels].

        Returns:
            [n, channels].

        Raises:
            DataError: there is padding and the rows cannot be told apart; they are never counted in silence.
        """
        mask, rows = self.context.mask, x.reshape(-1, x.shape[-1])  # a layer may be called on flat rows too
        if mask is None or len(rows) == self.context.batch_size != mask.numel():
            return rows  # of a sequence as a whole
        if len(rows) == mask.numel():
            return rows[mask.flatten()]
        if bool(mask.all()):
            return rows
        raise DataError(
            f"calls: a tensor of shape {list(x.shape)} has {len(rows)} rows for {list(mask.shape)} tokens, so padding "
            f"cannot be left out. Give batches of sequences of equal length."
        )

    def rows(self, start: int, stop: int) -> Call:
        """Return the call on some rows of its batch: tensors with a row of it each are cut, all others stay.

        Args:
            start: the first row.
            stop: the row behind the last one.
        """

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[start:stop] if value.dim() > 1 and len(value) == self.context.batch_size else value
            if isinstance(value, dict):
                return {key: cut(item) for key, item in value.items()}
            return type(value)(map(cut, value)) if type(value) in (tuple, list) else value

        return Call(cut(self.args), cut(self.kwargs), self.context.rows(start, stop))

    def with_hidden(self, hidden: Tensor) -> Call:
        """Return the same call on other hidden states."""
        if self.args:
            return replace(self, args=(hidden, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, "hidden_states": hidden})
