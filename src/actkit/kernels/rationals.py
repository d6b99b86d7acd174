"""The operator `actkit::rational`: rational functions of one variable, one for each group of channels, with gradients.

    F(x) = (a_0 + a_1 x + ... + a_m x^m) / Q(x)
    kind A:  Q(x) = 1 + |b_1| |x| + |b_2| |x|^2 + ... + |b_n| |x|^n
    kind B:  Q(x) = 1 + |b_1 x + b_2 x^2 + ... + b_n x^n|

Q is at least 1, so that there is no pole. Channels are split into contiguous groups of equal size, and a group has a
row of the coefficients; one row serves all groups. What the backward pass needs is computed again from x, which alone
is kept. Where |.| has no derivative its slope is taken to be +1, so that a coefficient that begins at 0 is learned.
Both kinds are "safe" Padé units (Molina et al. 2019, arXiv:1907.06732), A with the absolute value on each term.
On the CPU they run in Numba, on a GPU in Triton; elsewhere, and without these, the same formulas run in plain torch, as
they do if a gradient of the gradient may be wanted (`create_graph=True`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from actkit.kernels.operators import has_numba, plain, register, runs_in_triton

Kind = Literal["A", "B"]


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, kind: Kind = "A") -> Tensor:
    """Evaluate F on the last dimension.

    Args:
        x: [..., channels], floats; those of 16 bits are widened to float32, and the result is rounded back.
        numerator: a [groups or 1, m + 1].
        denominator: b [groups or 1, n].
        kind: of the denominator.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: the groups do not divide the channels, or x holds no floats.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: {x.dtype} was given; a rational function needs floats, give x.float().")
    groups = max(len(numerator), len(denominator))
    if x.shape[-1] % groups:
        raise ValueError(
            f"groups: {groups} were given for {x.shape[-1]} channels; give a number that divides the channels."
        )
    if torch.compiler.is_exporting():  # a program of plain torch runs where actkit is not installed
        return reference(x, numerator, denominator, kind == "A")
    y: Tensor = torch.ops.actkit.rational.default(x, numerator, denominator, kind == "A")
    return y


# -- in plain torch: the reference, and what runs beside the CPU -------------------------------------------------------


def reference(x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool) -> Tensor:
    """The same in plain torch."""
    split, a, b = _given(x, numerator, denominator)
    top, inside, *_ = _parts(split, a, _below(b, absolute), absolute)
    return (top / (inside if absolute else 1 + inside.abs())).reshape(x.shape).to(x.dtype)


def reference_backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients: of x, of the numerator and of the denominator."""
    split, a, b = _given(x, numerator, denominator)
    top, inside, slope, bent = _parts(split, a, _below(b, absolute), absolute, slopes=True)
    sign = torch.ones_like(inside) if absolute else _sign(inside)
    bent = bent * (split.sign() if absolute else sign)
    bottom = inside if absolute else 1 + inside.abs()
    share, value = grad.to(split.dtype).reshape(split.shape) / bottom, top / bottom
    base, to_a, to_b = split.abs() if absolute else split, [], []
    power = share
    for index in range(a.shape[1]):
        power = power * split if index else power
        to_a.append(power.sum((0, 2)))
    power = -share * value * sign
    for _ in range(b.shape[1]):
        power = power * base
        to_b.append(power.sum((0, 2)))
    dx = (share * (slope - value * bent)).reshape(x.shape).to(x.dtype)
    return dx, *_gradients(torch.stack(to_a, 1), torch.stack(to_b, 1), numerator, denominator, absolute)


def _given(x: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, groups, width] and the coefficients, in the dtype that all is computed in."""
    wide = torch.promote_types(x.dtype, torch.float32)
    groups = max(len(numerator), len(denominator))
    rows = -1 if x.shape[-1] else x.shape[:-1].numel()  # a number would be a constant in an exported program
    split = x.to(wide).reshape(rows, groups, x.shape[-1] // groups)
    return split, numerator.to(wide), denominator.to(wide)


def _below(denominator: Tensor, absolute: bool) -> Tensor:
    """Its coefficients from that of x^0 on: 1 and |b|, or of kind B what stands inside of |.|."""
    constant = torch.full_like(denominator[:, :1], float(absolute))
    return torch.cat((constant, denominator.abs() if absolute else denominator), 1)


def _parts(
    x: Tensor, numerator: Tensor, below: Tensor, absolute: bool, slopes: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, Q (of kind B what is inside), and if asked for their derivatives by x and by x or |x|, by Horner's rule."""
    top, slope = _horner(x, numerator, slopes)
    inside, bent = _horner(x.abs() if absolute else x, below, slopes)
    return top, inside, slope, bent


def _horner(x: Tensor, coefficients: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
    """The polynomial, and its derivative if that is asked for."""
    columns = coefficients.unsqueeze(-1)  # [groups, degree + 1, 1]
    value = columns[:, -1].expand_as(x)
    slope = torch.zeros_like(columns[:, 0])
    for index in range(coefficients.shape[1] - 2, -1, -1):
        if slopes:
            slope = torch.addcmul(value, slope, x)
        value = torch.addcmul(columns[:, index], value, x)
    return value, slope


def _sign(x: Tensor) -> Tensor:
    """1 at 0."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _gradients(
    to_a: Tensor, to_b: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool
) -> tuple[Tensor, Tensor]:
    """Of the coefficients, from sums by group: added up if one row serves all."""
    to_a, to_b = (
        each.sum(0, keepdim=True) if len(like) < len(each) else each
        for each, like in ((to_a, numerator), (to_b, denominator))
    )
    to_b = to_b.to(denominator.dtype)
    return to_a.to(numerator.dtype), to_b * _sign(denominator) if absolute else to_b


# -- on the CPU --------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool) -> Tensor:
    if not has_numba():
        return reference(x, numerator, denominator, absolute)
    from actkit.kernels import numba_rationals

    split, a, b = _given(x, numerator, denominator)
    y = numba_rationals.rational(plain(split), plain(a), plain(_below(b, absolute)), absolute)
    return y.view(x.shape).to(x.dtype)


def _backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not has_numba():
        return reference_backward(grad, x, numerator, denominator, absolute)
    from actkit.kernels import numba_rationals

    split, a, b = _given(x, numerator, denominator)
    g = grad.to(split.dtype).reshape(split.shape)
    given = (plain(g), plain(split), plain(a), plain(_below(b, absolute)))
    dx, to_a, to_b = numba_rationals.rational_backward(*given, absolute)
    return dx.view(x.shape).to(x.dtype), *_gradients(to_a, to_b, numerator, denominator, absolute)


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def _elsewhere(x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool) -> Tensor:
    if not runs_in_triton(x):
        return reference(x, numerator, denominator, absolute)
    from actkit.kernels import triton_rationals

    return triton_rationals.rational(plain(x), *_held(x, numerator, denominator, absolute), absolute)


def _elsewhere_backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_in_triton(x):
        return reference_backward(grad, x, numerator, denominator, absolute)
    from actkit.kernels import triton_rationals

    held = _held(x, numerator, denominator, absolute)
    dx, to_a, to_b = triton_rationals.rational_backward(plain(grad), plain(x), *held, absolute)
    return dx, *_gradients(to_a, to_b, numerator, denominator, absolute)


def _held(x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool) -> tuple[Tensor, Tensor]:
    """The coefficients, in the dtype that all is computed in."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return plain(numerator.to(wide)), plain(_below(denominator.to(wide), absolute))


# -- registration ------------------------------------------------------------------------------------------------------


def _fake(x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(numerator), torch.empty_like(denominator)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.absolute = inputs[3]


def _derived(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # a gradient of this gradient may be wanted
        x, numerator, denominator = ctx.saved_tensors
        wanted = [each for each, wants in zip(ctx.saved_tensors, ctx.needs_input_grad) if wants]
        y = reference(x, numerator, denominator, ctx.absolute)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        return *(next(found) if wants else None for wants in ctx.needs_input_grad[:3]), None
    return *torch.ops.actkit.rational_backward.default(grad, *ctx.saved_tensors, ctx.absolute), None


register(
    "rational(Tensor x, Tensor numerator, Tensor denominator, bool absolute) -> Tensor", _forward, _fake, _elsewhere
)
register(
    "rational_backward(Tensor grad, Tensor x, Tensor numerator, Tensor denominator, bool absolute)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _elsewhere_backward,
)
torch.library.register_autograd("actkit::rational", _derived, setup_context=_keep)
