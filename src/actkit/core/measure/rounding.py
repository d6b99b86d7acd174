"""What rounding does to a model's outputs, and so how far two right computations of it may lie apart.

    limit = max(2 max |f(x) - wide(x)|, eps max |f(x)|)

- `wide` is the same model in the next wider dtype (float32 for 16 bits, float64 for float32), with the same weights.
  Each of two computations in the model's own dtype, whatever their orders of summation, lies about as far from it.
- `eps` is the dtype's distance from 1 to the next number, so that one unit in the last place of the largest output is
  always allowed.

If the model does not run in the wider dtype, the limit is a share of the largest output, and the reason is given.

Cost: one copy of the model in the wider dtype and one forward pass, so it is computed only if outputs differ.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.example import main_dtype
from actkit.core.forward.hooks import evaluating

WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
SIDES = 2  # both computations are rounded
SHARE = {torch.bfloat16: 1e-2, torch.float16: 1e-2}  # of the largest output, if nothing could be measured
EXACT = 1e-5  # the same for float32 and float64


@dataclass(frozen=True)
class Limit:
    """How far outputs may lie apart.

    Attributes:
        value: in the outputs' unit.
        reason: why it was not measured on the model; '' if it was.
    """

    value: float
    reason: str = ""

    def describe(self) -> str:
        """Say it: '0.3', or '0.2 (not measured: it does not run in float32)'."""
        return f"{self.value:.3g}" + (f" (not measured: {self.reason})" if self.reason else "")


def limit(model: nn.Module, batch: Any, outputs: Tensor) -> Limit:
    """Find how far the outputs of another right computation may lie from these.

    Args:
        model: as it computed the outputs; it is left as it was.
        batch: what it was called with.
        outputs: what it gave, float32 on the CPU.

    Returns:
        The limit, in the outputs' unit.
    """
    dtype = main_dtype(model)
    scale = float(outputs.abs().max()) if outputs.numel() else 0.0
    found = _rounding(model, batch, outputs, dtype)
    if isinstance(found, str):
        return Limit(SHARE.get(dtype, EXACT) * scale, found)
    return Limit(max(SIDES * found, torch.finfo(dtype).eps * scale))


def _rounding(model: nn.Module, batch: Any, outputs: Tensor, dtype: torch.dtype) -> float | str:
    """max |f(x) - wide(x)|, or why there is no wide(x)."""
    wider = WIDER.get(dtype)
    if wider is None:
        return f"there is nothing wider than {dtype}"
    name = str(wider).removeprefix("torch.")
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return "its weights are offloaded"
    needed = sum(tensor.numel() * wider.itemsize for tensor in tensors if tensor.is_floating_point())
    if needed > psutil.virtual_memory().available:
        return f"a copy in {name} does not fit into memory"
    try:
        with evaluating(model), torch.no_grad():
            exact = first_tensor(forward(_widened(model, wider), batch)).double().cpu()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return f"it does not run in {name} ({type(error).__name__})"
    difference = float((outputs.double() - exact).abs().max()) if exact.numel() else 0.0
    return difference if difference == difference else f"its outputs in {name} hold NaN"


def _widened(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in a wider dtype; parameters are widened as they are copied, so that there is one copy of them only."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        for parameter in model.parameters()
        if parameter.is_floating_point()
    }
    return copy.deepcopy(model, memo).to(dtype)
