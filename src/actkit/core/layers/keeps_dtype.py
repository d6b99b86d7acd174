"""Modules whose buffers keep their dtype, and whose learned coefficients are never rounded below float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

SHORT = (torch.float16, torch.bfloat16)


class KeepsDtype(nn.Module):
    """A module whose buffers keep their dtype under `.to(dtype)`, `.half()` and the like; devices still move.

    The parameters that its class names in `keeps` are never rounded below float32: a float16 or bfloat16 model has them
    in float32, and one in float64 in float64. They are coefficients of a function, of which a small error is seen
    everywhere; there are few of them. What is computed with them runs in `at_least_float32`.
    """

    keeps: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsDtype:
        for child in self.children() if recurse else ():
            child._apply(fn)
        buffers = {id(buffer) for buffer in self._buffers.values() if buffer is not None}
        parameters = [each for name in self.keeps if (each := self._parameters.get(name)) is not None]
        coefficients = {id(each) for each in parameters} | {id(each.grad) for each in parameters}

        def kept(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if id(tensor) in buffers:
                return new if new.dtype == tensor.dtype else tensor.to(new.device)
            if id(tensor) in coefficients and new.dtype in SHORT:
                return at_least_float32(tensor).to(new.device, torch.float32)
            return new

        super()._apply(kept, recurse=False)
        return self


def kept_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters that are never rounded below float32.

    Args:
        model: any module.
    """
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, KeepsDtype)
        for name in module.keeps
        if module._parameters.get(name) is not None
    ]


def check_floats(x: Tensor, name: str = "x") -> None:
    """Refuse integers, which torch would take for many functions and round their outputs.

    Args:
        x: what a function is to read.
        name: of the argument.

    Raises:
        ValueError: it holds no floating-point numbers.
    """
    if not x.is_floating_point():
        raise ValueError(f"{name}: {x.dtype} was given; give floating-point numbers, such as {name}.float().")


def at_least_float32(x: Tensor) -> Tensor:
    """A tensor in float32 if it is float16 or bfloat16, else as it is.

    Args:
        x: [...], floating.
    """
    return x.float() if x.dtype in SHORT else x
