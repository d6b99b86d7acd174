"""Modules whose buffers keep their dtype."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class KeepsDtype(nn.Module):
    """A module whose buffers keep their dtype under `.to(dtype)`, `.half()` and the like; devices still move."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsDtype:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
