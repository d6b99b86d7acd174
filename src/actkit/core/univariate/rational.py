"""Rational functions of one variable, one for each group of channels, evaluated without keeping powers.

    F(x) = (a_0 + a_1 x + ... + a_m x^m) / Q(x)
    kind A:  Q(x) = 1 + |b_1| |x| + |b_2| |x|^2 + ... + |b_n| |x|^n
    kind B:  Q(x) = 1 + |b_1 x + b_2 x^2 + ... + b_n x^n|

Q is at least 1, so that there is no pole. Channels are split into contiguous groups of equal size, and a group has a
row of the coefficients; one row serves all groups. What the backward pass needs is computed again from x, which alone
is kept. Where |.| has no derivative its slope is taken to be +1, so that a coefficient that begins at 0 is learned.
Both kinds are "safe" Padé units (Molina et al. 2019, arXiv:1907.06732), A with the absolute value on each term.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

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
    wide = torch.promote_types(x.dtype, torch.float32)
    split = x.to(wide).unflatten(-1, (groups, -1))  # [..., groups, channels / groups]
    with torch.autocast(x.device.type, enabled=False):
        found = _Rational.apply(split, numerator.to(wide), denominator.to(wide), kind == "A")
    return found.flatten(-2).to(x.dtype)


class _Rational(torch.autograd.Function):
    """x [..., groups, width], numerator [groups or 1, m + 1], denominator [groups or 1, n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator)
        ctx.absolute = absolute
        top, bottom, *_ = _parts(x, numerator, denominator, absolute)
        return top / bottom

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, numerator, denominator = ctx.saved_tensors
        (gradient,) = gradients
        top, bottom, slope, bent, sign = _parts(x, numerator, denominator, ctx.absolute, slopes=True)
        share = gradient / bottom
        value = top / bottom
        to_x = share * (slope - value * bent)
        power, to_numerator = share, []
        for index in range(numerator.shape[1]):
            power = power * x if index else power
            to_numerator.append(_summed(power, numerator))
        base = x.abs() if ctx.absolute else x
        power, to_denominator = -share * value if ctx.absolute else -share * value * sign, []
        for _ in range(denominator.shape[1]):
            power = power * base
            to_denominator.append(_summed(power, denominator))
        found = torch.stack(to_denominator, 1)
        if ctx.absolute:
            found = found * _sign(denominator)
        return to_x, torch.stack(to_numerator, 1), found, None


def _parts(
    x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool, slopes: bool = False
) -> tuple[Tensor, ...]:
    """P and Q, and if asked for P', Q' and the sign inside of Q (of kind B), by Horner's rule."""
    constant = torch.full_like(denominator[:, :1], float(absolute))
    below = torch.cat((constant, denominator.abs() if absolute else denominator), 1)
    base = x.abs() if absolute else x
    top, slope = _horner(x, numerator, slopes)
    inside, bent = _horner(base, below, slopes)
    if absolute:
        return top, inside, slope, bent * x.sign() if slopes else bent, base
    sign = _sign(inside)
    return top, 1 + inside.abs(), slope, bent * sign, sign


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


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """x [..., groups, width] over everything but the groups, or over these too if one row serves all."""
    found = x.sum(-1).flatten(0, -2).sum(0) if x.dim() > 2 else x.sum(-1)
    return found if len(like) == len(found) else found.sum(0, keepdim=True)
