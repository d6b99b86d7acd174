"""The operators `actkit::poly_norm` and `actkit::poly_relu`: PolyCom's activations, with gradients.

    poly_norm(x) = b + sum_i w_i N(x^i),   N(u) = u / sqrt(mean(u^2) + eps), over the last dimension
    poly_relu(x) = b + sum_i w_i relu(x)^i

For the backward pass x alone is saved, and of `poly_norm` the scales 1 / sqrt(mean(x^2i) + eps), `order` numbers per
row, where plain autograd keeps every power. Powers and sums are float32 (float64 of a float64 x), whatever x is. On
the CPU they run in Numba: one pass over a row that stays in a cache. `poly_norm` runs in Triton on a GPU. Elsewhere,
and without these, the same formulas run in plain torch. A gradient of a gradient is not to be had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actkit.kernels.operators import has_numba, plain, register, runs_in_triton


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute a weighted sum of normalised powers.

    Args:
        x: float [..., channels]; the mean is over the channels.
        weight: [order], of the highest power first.
        bias: [1].
        eps: inside of the root, behind the mean.

    Returns:
        A tensor like x.

    Raises:
        ValueError: an argument is outside of this.
    """
    _check(x, weight, bias)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"x: shape {tuple(x.shape)} was given; the last dimension is normalised, give 1 channel or more."
        )
    if torch.compiler.is_exporting():  # a program of plain torch runs where actkit is not installed
        return reference_norm(x, weight, bias, eps)[0]
    y: Tensor = torch.ops.actkit.poly_norm.default(x, weight, bias, eps)[0]
    return y


def poly_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute a polynomial of relu(x).

    Args:
        x: float, any shape.
        weight: [order], of the highest power first.
        bias: [1].

    Returns:
        A tensor like x.

    Raises:
        ValueError: an argument is outside of this.
    """
    _check(x, weight, bias)
    if torch.compiler.is_exporting():
        return reference_relu(x, weight, bias)
    y: Tensor = torch.ops.actkit.poly_relu.default(x, weight, bias)
    return y


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x: {x.dtype} was given; give floats, such as x.float().")
    if weight.dim() != 1 or not len(weight) or bias.shape != (1,):
        raise ValueError(
            f"weight, bias: shapes {tuple(weight.shape)} and {tuple(bias.shape)} were given; give (order,), order 1 or "
            f"more, and (1,)."
        )


def wide(x: Tensor) -> Tensor:
    """Return x in the dtype that powers are taken in: float64 stays, all others become float32."""
    return x if x.dtype == torch.float64 else x.float()


# -- in plain torch: the reference, and what runs beside the CPU -------------------------------------------------------


def reference_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same in plain torch. Returns y, and the scales [rows, order] of x, x^2 ..."""
    rows, coefficients = _rows(x), _ascending(weight, x)
    powers = [rows ** (i + 1) for i in range(len(coefficients))]
    scales = torch.stack([torch.rsqrt((power * power).mean(-1) + eps) for power in powers], -1)
    y = bias.to(rows.dtype) + sum(c * s[:, None] * p for c, s, p in zip(coefficients, scales.unbind(-1), powers))
    return y.to(x.dtype).view(x.shape), scales


def reference_norm_backward(grad: Tensor, x: Tensor, scales: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients: of x, of the weight (highest power first) and of the bias [1]."""
    rows, g, coefficients = _rows(x), _rows(grad), _ascending(weight, x)
    dx, sums = torch.zeros_like(rows), []
    for i, (c, s) in enumerate(zip(coefficients, scales.t()[..., None], strict=True), 1):
        normalised = rows**i * s
        along = g * normalised
        sums.append(along.sum())
        dx += c * i * rows ** (i - 1) * s * (g - normalised * along.mean(-1, keepdim=True))
    return dx.to(x.dtype).view(x.shape), torch.stack(sums[::-1]).to(weight.dtype), g.sum().to(weight.dtype)[None]


def reference_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same in plain torch."""
    positive, y = wide(x).relu(), weight[0].to(wide(x).dtype)
    for c in (*weight[1:], bias[0]):
        y = y * positive + c.to(positive.dtype)
    return y.to(x.dtype)


def reference_relu_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients: of x, of the weight (highest power first) and of the bias [1]."""
    positive, g, coefficients = wide(x).relu(), wide(grad), _ascending(weight, x)
    slope = sum((i * c * positive ** (i - 1) for i, c in enumerate(coefficients, 1)), torch.zeros_like(positive))
    sums = [(g * positive**i).sum() for i in range(len(coefficients), 0, -1)]
    dx = torch.where(x <= 0, torch.zeros_like(g), g * slope)
    return dx.to(x.dtype), torch.stack(sums).to(weight.dtype), g.sum().to(weight.dtype)[None]


def _rows(x: Tensor) -> Tensor:
    return wide(x).reshape(-1, x.shape[-1])


def _ascending(weight: Tensor, x: Tensor) -> Tensor:
    """The coefficients of x, x^2 ..., in the dtype that powers of x are taken in."""
    return weight.flip(0).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


# -- on the CPU --------------------------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not has_numba():
        return reference_norm(x, weight, bias, eps)
    from actkit.kernels import numba_polynomials

    rows = plain(_rows(x))
    y, scales = numba_polynomials.norm(rows, plain(_ascending(weight, x)), float(bias), eps)
    return y.to(x.dtype).view(x.shape), scales


def _norm_backward(grad: Tensor, x: Tensor, scales: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not has_numba():
        return reference_norm_backward(grad, x, scales, weight)
    from actkit.kernels import numba_polynomials

    given = (plain(_rows(grad)), plain(_rows(x)), plain(scales), plain(_ascending(weight, x)))
    dx, sums = numba_polynomials.norm_backward(*given)
    return dx.to(x.dtype).view(x.shape), *_gradients(sums, weight)


def _relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not has_numba():
        return reference_relu(x, weight, bias)
    from actkit.kernels import numba_polynomials

    y = numba_polynomials.relu(plain(wide(x)).view(-1), plain(_ascending(weight, x)), float(bias))
    return y.to(x.dtype).view(x.shape)


def _relu_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not has_numba():
        return reference_relu_backward(grad, x, weight)
    from actkit.kernels import numba_polynomials

    flat = (plain(wide(grad)).view(-1), plain(wide(x)).view(-1))
    dx, sums = numba_polynomials.relu_backward(*flat, plain(_ascending(weight, x)))
    return dx.to(x.dtype).view(x.shape), *_gradients(sums, weight)


def _gradients(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the weight and the bias, from float64 [1 + order], lowest power first."""
    return sums[1:].flip(0).to(weight.dtype), sums[:1].to(weight.dtype)


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def _norm_elsewhere(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not _in_triton(x):
        return reference_norm(x, weight, bias, eps)
    from actkit.kernels import triton_polynomials

    ascending = plain(_ascending(weight, x))
    y, scales = triton_polynomials.norm(_as_rows(x), ascending, bias.to(ascending.dtype), eps)
    return y.view(x.shape), scales


def _norm_backward_elsewhere(grad: Tensor, x: Tensor, scales: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not _in_triton(x):
        return reference_norm_backward(grad, x, scales, weight)
    from actkit.kernels import triton_polynomials

    given = (_as_rows(grad), _as_rows(x), plain(scales), plain(_ascending(weight, x)))
    dx, sums = triton_polynomials.norm_backward(*given)
    return dx.view(x.shape), *_gradients(sums, weight)


def _in_triton(x: Tensor) -> bool:
    if not runs_in_triton(x):
        return False
    from actkit.kernels.triton_polynomials import LONGEST

    return x.shape[-1] <= LONGEST


def _as_rows(x: Tensor) -> Tensor:
    """[rows, channels] in the dtype that it has."""
    return plain(x.reshape(-1, x.shape[-1]))


# -- registration ------------------------------------------------------------------------------------------------------


def _fake_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.new_empty((x.shape[:-1].numel(), len(weight)), dtype=_wide_dtype(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), rows


def _fake_norm_backward(grad: Tensor, x: Tensor, scales: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_relu_backward(grad, x, weight)


def _fake_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_relu_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), weight.new_empty(1)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1], inputs[1])
    ctx.mark_non_differentiable(output[1])


def _norm_gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *torch.ops.actkit.poly_norm_backward.default(grad, *ctx.saved_tensors), None


def _keep_relu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _relu_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.actkit.poly_relu_backward.default(grad, *ctx.saved_tensors)


register(
    "poly_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    _norm,
    _fake_norm,
    _norm_elsewhere,
)
register(
    "poly_norm_backward(Tensor grad, Tensor x, Tensor scales, Tensor weight) -> (Tensor, Tensor, Tensor)",
    _norm_backward,
    _fake_norm_backward,
    _norm_backward_elsewhere,
)
register("poly_relu(Tensor x, Tensor weight, Tensor bias) -> Tensor", _relu, _fake_relu, reference_relu)
register(
    "poly_relu_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)",
    _relu_backward,
    _fake_relu_backward,
    reference_relu_backward,
)
torch.library.register_autograd("actkit::poly_norm", _norm_gradients, setup_context=_keep_norm)
torch.library.register_autograd("actkit::poly_relu", _relu_gradients, setup_context=_keep_relu)
