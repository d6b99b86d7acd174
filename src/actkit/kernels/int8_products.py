"""The operator `actkit::int8_linear`: rounded inputs times a weight of 8 bits, as integers, and its Python face.

    c[r, j] = clamp(round(x[r, j] / s[r]), -128, 127)                   s[r] given, or max_j |x[r, j]| / half_range
    y[r, i] = (sum over j of (codes[i, j] - 128) * c[r, j]) * s[r] * scale[i] + bias[i]

The sum is exact: `torch._int_mm` with sums in int32. It is taken for some hundred rows at a time, whose sums are scaled
while they still lie in a cache. Rounding and scaling are one pass each, in Numba; in plain torch they take longer than
the product.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from actkit.kernels.operators import check_gradient, has_numba, plain, register

MIDDLE = 128  # the code that stands for 0
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SUMS = 1 << 19  # int32 sums at a time, for each thread: 2 MB
TINY = torch.finfo(torch.float32).tiny


def int8_linear(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    scale: Tensor | None = None,
    half_range: float = 127.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute y = W q(x) + bias with inputs and weight of 8 bits; any number of rows.

    Args:
        x: float32, bfloat16 or float16 [..., in], on the CPU.
        codes: uint8 [out, in], each 128 above what it stands for.
        weight_scale: float32 [out], of the rows of the weight.
        scale: float32 [1], of all inputs; None for one per row, from its largest value.
        half_range: the code that the largest value of a row gets before it is rounded, if there is no scale.
        bias: [out].

    Returns:
        [..., out] in x's dtype.

    Raises:
        ValueError: an argument is outside of this.
        RuntimeError: a gradient would be needed.
    """
    return torch.ops.actkit.int8_linear.default(x, codes, weight_scale, scale, half_range, bias)


def _check(x: Tensor, codes: Tensor, weight_scale: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"codes: {codes.dtype} {tuple(codes.shape)} was given; give uint8 [out, in].")
    if x.dtype not in FLOATS or x.dim() == 0 or x.shape[-1] != codes.shape[1]:
        given = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
        raise ValueError(
            f"x: {given} was given; give float32, bfloat16 or float16 with {codes.shape[1]} inputs, as the codes have."
        )
    for name, tensor, shape in (
        ("weight_scale", weight_scale, (len(codes),)),
        ("scale", scale, (1,)),
        ("bias", bias, (len(codes),)),
    ):
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was given; give floats {shape}.")


def _int8_linear(
    x: Tensor, codes: Tensor, weight_scale: Tensor, scale: Tensor | None, half_range: float, bias: Tensor | None
) -> Tensor:
    _check(x, codes, weight_scale, scale, bias)
    check_gradient(x, weight_scale, bias)
    rows = plain(x).view(-1, codes.shape[1])
    weight = (codes ^ MIDDLE).view(torch.int8)  # 128 less, as signed bytes
    factors = plain(weight_scale).float()
    added = torch.zeros(len(codes)) if bias is None else plain(bias).float()
    if has_numba():
        from actkit.kernels.numba_int8 import rounded, scaled
    else:
        rounded, scaled = rounded_reference, scaled_reference
    fixed = None if scale is None else float(scale)
    given, steps = rounded(rows.float() if rows.dtype == torch.float16 else rows, fixed, half_range)
    y = torch.empty(len(rows), len(codes), dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
    together = max(16, SUMS * torch.get_num_threads() // max(1, len(codes)))
    for first in range(0, len(rows), together):
        part = slice(first, first + together)
        scaled(product(given[part], weight), steps[part], factors, added, y[part])
    return y.to(x.dtype).view(*x.shape[:-1], len(codes))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply int8 [rows, in] and int8 [out, in]: int32 [rows, out], exact."""
    if x.shape[1] > 1 and is_exact():  # with one input torch 2.13 gives other numbers
        return torch._int_mm(x, weight.t())
    return (x.double() @ weight.double().t()).int()


@cache
def is_exact() -> bool:
    """Return whether torch's integer product is right on this processor; some cut sums of pairs to 16 bits."""
    most = torch.full((16, 64), -MIDDLE, dtype=torch.int8)
    signs = (most, torch.full((16, 64), MIDDLE - 1, dtype=torch.int8))
    return all(torch.equal(torch._int_mm(a, b.t()), (a.long() @ b.long().t()).int()) for a in signs for b in signs)


def rounded_reference(x: Tensor, fixed: float | None, half_range: float) -> tuple[Tensor, Tensor]:
    """Round rows of inputs.

    Args:
        x: float32 or bfloat16 [rows, in].
        fixed: the step of all rows; None for each row's own.
        half_range: as in `int8_linear`.

    Returns:
        Codes int8 [rows, in] and steps float32 [rows]; the step of a row that holds NaN, or Inf if its step is its own,
        is NaN.
    """
    x = x.float()
    if fixed is None:
        largest = x.abs().amax(-1) if x.shape[1] else x.new_zeros(len(x))
        steps = torch.where(largest > 0, (largest / half_range).clamp(min=TINY), 1.0)
        steps = torch.where(largest.isfinite(), steps, torch.nan)
    else:
        steps = torch.where(x.isnan().any(-1), torch.nan, torch.full((len(x),), fixed))
    codes = torch.round(x / steps[:, None] if fixed is None else x / torch.tensor(fixed)).clamp(-MIDDLE, MIDDLE - 1)
    return codes.nan_to_num().to(torch.int8), steps


def scaled_reference(sums: Tensor, steps: Tensor, factors: Tensor, bias: Tensor, y: Tensor) -> None:
    """Write y [rows, out] = sums * steps [rows] * factors [out] + bias [out]."""
    y.copy_(sums.float() * (steps[:, None] * factors) + bias)


def _fake_int8_linear(
    x: Tensor, codes: Tensor, weight_scale: Tensor, scale: Tensor | None, half_range: float, bias: Tensor | None
) -> Tensor:
    _check(x, codes, weight_scale, scale, bias)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


register(
    "int8_linear(Tensor x, Tensor codes, Tensor weight_scale, Tensor? scale, float half_range, Tensor? bias) -> Tensor",
    _int8_linear,
    _fake_int8_linear,
)
