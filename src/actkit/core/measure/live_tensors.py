"""How many bytes of tensors are alive at once while some code runs: a meter on torch's dispatcher.

    with live_tensors(model) as live:
        model(x)
    live.peak

Each storage counts once and whole, from the operator that makes it to the end of the last tensor that lies in it. What
the model holds anyway (parameters, buffers), and what was there before, is left out, and so is what an operator takes
and gives back inside of itself. So the figure is of the algorithm, and not of an allocator. It is meant for code
without gradients: what autograd alone keeps does not count (`saved_tensors` counts that).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """The storages that operators made while the meter ran.

    Args:
        held: addresses of storages that are not counted.

    Attributes:
        bytes: of those that are alive now.
        peak: the most that were alive at once.
    """

    def __init__(self, held: set[int]) -> None:
        super().__init__()
        self._held, self._users = held, dict[int, int]()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(each) for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and id(each) not in given:
                self._see(each)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if storage.data_ptr() in self._held or not size:
            return
        if key not in self._users:
            self._users[key] = 0
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self._users[key] += 1
        weakref.finalize(tensor, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.bytes -= size


@contextmanager
def live_tensors(model: nn.Module, *others: Tensor) -> Iterator[LiveTensors]:
    """Count the tensors that are alive in the block.

    Args:
        model: whose parameters and buffers are left out.
        others: further tensors that are left out, such as inputs.

    Yields:
        The meter; it may be read in the block and behind it.
    """
    held = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), *others)}
    with LiveTensors(held) as meter:
        yield meter
