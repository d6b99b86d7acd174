"""transformers' Conv1D, a linear layer whose weight is [in, out].

A module is one only if something imported its class, so that asking imports nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

HOME = "transformers.pytorch_utils"


def conv1d() -> tuple[Any, ...]:
    """Return the class, for `isinstance`; nothing if nobody has imported it."""
    home = sys.modules.get(HOME)
    return () if home is None else (home.Conv1D,)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D."""
    return isinstance(module, conv1d())
