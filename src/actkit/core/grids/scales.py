"""The numbers that a scale is rounded to and stored in: floats of 32 and 16 bits, "e8m0", "e4m3".

"e8m0" is a power of two in a byte (OCP's MX formats), "e4m3" a float8 times one float32 for the whole tensor (NVFP4).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

ScaleDtype = Literal["float32", "float16", "bfloat16", "e8m0", "e4m3"]
E4M3_LARGEST = 448.0


def smallest_scale(scale: Tensor) -> float:
    """Below it divisions lose their accuracy."""
    return torch.finfo(torch.float32 if scale.dtype != torch.float64 else torch.float64).tiny


def round_scale(scale: Tensor, dtype: ScaleDtype, whole: Tensor | None = None) -> Tensor:
    """Return positive scales as `dtype` holds them, in their own dtype, with their gradient.

    Args:
        scale: above 0.
        dtype: what it is stored in; a power of two is found by the grid.
        whole: the scale of the tensor, for "e4m3".
    """
    if dtype in ("float32", "e8m0"):
        return scale
    if dtype == "e4m3":
        assert whole is not None
        parts = (scale / whole).clamp(2**-9, E4M3_LARGEST).to(torch.float8_e4m3fn)
        held = parts.to(scale.dtype) * whole
    else:
        kind = getattr(torch, dtype)
        limits = torch.finfo(kind)
        held = scale.clamp(limits.smallest_normal * limits.eps, limits.max).to(kind).to(scale.dtype)
    return held if not scale.requires_grad else scale + (held - scale).detach()


def holds(scale: Tensor, dtype: ScaleDtype) -> bool:
    """Whether scales that were rounded to a 16-bit dtype kept their accuracy: none is below its normal numbers."""
    if dtype not in ("float16", "bfloat16"):
        return True
    limits = torch.finfo(getattr(torch, dtype))
    return bool((scale > limits.smallest_normal).all() and (scale < limits.max).all())


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, for integers of -126 to 127: float32."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def check_scale_dtype(given: str, allowed: tuple[str, ...] = get_args(ScaleDtype)) -> None:
    """Refuse a scale dtype that a grid does not take.

    Args:
        given: the setting.
        allowed: what it may be.

    Raises:
        ValueError: it is none of these.
    """
    if given not in allowed:
        raise ValueError(f"scale_dtype: {given!r} was given, allowed are {', '.join(map(repr, allowed))}.")


def stored_scale(scale: Tensor, dtype: ScaleDtype, whole: Tensor | None = None) -> Tensor:
    """Return what a file keeps of rounded scales.

    Args:
        scale: that `dtype` holds.
        dtype: float32, float16 and bfloat16 are kept as such; "e8m0" is the exponent + 127, uint8; "e4m3" the bits of
            the float8, uint8.
        whole: the scale of the tensor, for "e4m3".
    """
    if dtype == "e8m0":
        return (torch.frexp(scale).exponent - 1 + 127).to(torch.uint8)
    if dtype == "e4m3":
        assert whole is not None
        return (scale / whole).to(torch.float8_e4m3fn).view(torch.uint8)
    return scale.to(getattr(torch, dtype))


def read_scale(stored: Tensor, dtype: ScaleDtype, whole: Tensor | None = None) -> Tensor:
    """Return the scales float32 that `stored_scale` was given; arguments as there."""
    if dtype == "e8m0":
        return power_of_two(stored.to(torch.int32) - 127)
    if dtype == "e4m3":
        assert whole is not None
        return stored.view(torch.float8_e4m3fn).float() * whole
    return stored.float()
