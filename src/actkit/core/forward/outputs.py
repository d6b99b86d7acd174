"""What a model gives on a batch, as a measurement reads it: its output, or what a language model's head works on.

The logits of a whole batch are the largest tensor of a language model by far (vocabulary over hidden size: 85 times its
last hidden states for a model of 135M parameters). If the head is a linear layer and nothing follows it, the pass
ends before the head, and logits are computed for a slice of rows when these are asked for. Whether that is so is tried
on the first row of the first batch: only if head(states) equals the model's own logits in every bit.

`Outputs` keeps an original's outputs over batches, so that it runs once however many changed models it is compared
with.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import StopForward, hooked
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.linear import ActLinear

KEEP = 1 << 28  # bytes: the last hidden states of a search's 37,000 tokens in bf16, up to 3,600 channels


@dataclass(frozen=True)
class Whole:
    """An output tensor.

    Attributes:
        tensor: [..., classes].
    """

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that it holds."""
        return self.tensor.nbytes

    def rows(self, chosen: Tensor) -> Tensor:
        """Some rows of the output.

        Args:
            chosen: int64 [n], counted over the whole batch.

        Returns:
            [n, classes].
        """
        return self.tensor.flatten(0, -2)[chosen.to(self.tensor.device)]


@dataclass(frozen=True)
class BeforeHead:
    """Logits [batch, length, classes], as the states that the head reads.

    Attributes:
        states: [batch, length, channels].
        head: gives the logits.
        classes: how many.
    """

    states: Tensor
    head: nn.Module
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logits."""
        return (*self.states.shape[:-1], self.classes)

    @property
    def nbytes(self) -> int:
        """The bytes that it holds."""
        return self.states.nbytes

    def rows(self, chosen: Tensor) -> Tensor:
        """The logits of some rows.

        Args:
            chosen: int64 [n], counted over the whole batch.

        Returns:
            [n, classes].
        """
        return self.head(self.states.flatten(0, -2)[chosen.to(self.states.device)])


Output = Whole | BeforeHead


class Outputs:
    """A model's outputs, batch by batch, for a task of `measure_quality`.

    Args:
        model: must stay as it is meanwhile.
        keep: bytes of outputs that are kept, so that the model runs once over batches that come again (the same
            objects); what goes beyond is computed each time.
    """

    def __init__(self, model: nn.Module, keep: int = 0) -> None:
        self.model, self.keep = model, keep
        self.nbytes = 0
        self._kept: dict[tuple[int, bool], tuple[Any, Output]] = {}  # with its batch, so that no other gets its id
        self._head: list[nn.Module | None] = []  # one entry, once it was looked for

    def of(self, batch: Any, *, before_head: bool = False, hidden_states: bool = False) -> Output:
        """The output on a batch: kept, or computed now.

        Args:
            batch: as the model is called with it.
            before_head: end the pass before the head, if the model allows it; for language models.
            hidden_states: as in `output_of`.
        """
        key = (id(batch), hidden_states)
        if key in self._kept:
            return self._kept[key][1]
        if before_head and not self._head:
            self._head.append(find_head(self.model, batch))
        head = self._head[0] if before_head else None
        output = output_of(self.model, batch, head, hidden_states=hidden_states)
        if self.nbytes + output.nbytes <= self.keep:
            self._kept[key] = batch, output
            self.nbytes += output.nbytes
        return output


def output_of(model: nn.Module, batch: Any, head: nn.Module | None = None, *, hidden_states: bool = False) -> Output:
    """The output on a batch: logits if a model gives them, else its first output tensor.

    Args:
        model: in evaluation mode.
        batch: as the model is called with it.
        head: what stands at the end (`find_head`), or None.
        hidden_states: take the last hidden states before logits, as for an encoder.

    Raises:
        UnsupportedModelError: the output holds no tensor.
    """
    if head is not None:
        states = _states(model, batch, head)
        assert states is not None, "it ran when it was looked for"
        return BeforeHead(states, head, head.out_features)  # type: ignore[arg-type]
    result = forward(model, batch)
    if isinstance(result, Tensor):
        return Whole(result)
    names = ("last_hidden_state", "logits") if hidden_states else ("logits", "last_hidden_state")
    for name in names:
        if isinstance(getattr(result, name, None), Tensor):
            return Whole(getattr(result, name))
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, tuple | list) else ()
    for value in values:
        if isinstance(value, Tensor):
            return Whole(value)
    raise UnsupportedModelError(
        f"model: {type(model).__name__} returns a {type(result).__name__} without a tensor; return logits or hidden "
        f"states."
    )


def find_head(model: nn.Module, batch: Any) -> nn.Module | None:
    """The linear layer whose outputs are a language model's logits, tried on a batch's first row.

    Args:
        model: in evaluation mode.
        batch: as the model is called with it.

    Returns:
        The layer; None if there is none, or if something follows it (a cap, a scale).
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    try:
        head = None if find is None else find()
    except NotImplementedError:
        head = None
    if not isinstance(head, nn.Linear | ActLinear):
        return None
    items = batch if isinstance(batch, Mapping) else {"": batch}
    tensors = [value for value in items.values() if isinstance(value, Tensor)]
    if not tensors or any(not value.dim() or len(value) != len(tensors[0]) for value in tensors):
        return None  # not one entry per row: what a single row would be is not known
    items = {key: value[:1] if isinstance(value, Tensor) else value for key, value in items.items()}
    row = items if isinstance(batch, Mapping) else items[""]
    expected, states = output_of(model, row), _states(model, row, head)
    same = isinstance(expected, Whole) and states is not None and torch.equal(head(states), expected.tensor)
    return head if same else None


def _states(model: nn.Module, batch: Any, head: nn.Module) -> Tensor | None:
    """What the head is called with, without running it; None if it does not run."""
    path = next(name for name, module in model.named_modules() if module is head)
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0])
        raise StopForward

    with hooked(model, before={path: stop}), suppress(StopForward):
        forward(model, batch)
    return found[0] if found else None
