"""How many bytes a forward pass keeps for the backward pass: a meter on torch's hooks for saved tensors.

    with saved_tensors(model) as saved:
        loss = model(x).sum()
    saved.bytes

Each storage counts once and whole, however many views of it are kept. What the model holds anyway (parameters, buffers)
is left out; its input counts if it is kept. What a checkpoint computes again is not kept, so it does not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SavedTensors:
    """The storages that were kept while the meter ran.

    Args:
        held: addresses of what the model holds anyway.
    """

    def __init__(self, held: set[int]) -> None:
        self._held = held
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def bytes(self) -> int:
        """Of all kept storages together."""
        return sum(storage.nbytes() for storage in self._storages.values())

    @property
    def count(self) -> int:
        """How many storages are kept."""
        return len(self._storages)

    def see(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd keeps, and return it as it is.

        Args:
            tensor: of any shape; a sparse one has no storage, and is not counted.
        """
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._held and storage.nbytes():
                # held until the meter is gone, so that no other tensor comes to lie at its address
                self._storages.setdefault(storage.data_ptr(), storage)
        return tensor


@contextmanager
def saved_tensors(model: nn.Module) -> Iterator[SavedTensors]:
    """Count what autograd keeps in the block.

    Args:
        model: whose parameters and buffers are left out.

    Yields:
        The meter; it may be read in the block and behind it.
    """
    held = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    meter = SavedTensors(held)
    with torch.autograd.graph.saved_tensors_hooks(meter.see, lambda tensor: tensor):
        yield meter
