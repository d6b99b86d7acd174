"""The operator `actkit::stored_linear`: few rows times an integer weight as it is stored, without a copy of it.

    y[r, o] = sum over groups g of scale[o, g] * sum over c in g of x[r, c] * (code[o, c] - zero[o, g])

Codes of 4 or 8 bits are read row by row, once for all rows of x. `quantized_linear` reads a packed copy, and can skip
inputs; widening the weight in plain torch takes some twenty times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actkit.kernels.operators import check_gradient, has_numba, plain, register

ROWS = 8  # above it a dense product with the widened weight wins
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def stored_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    bits: int,
    middle: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute y = W x + bias for an integer weight with groups along its inputs. Sums are taken in float32.

    Args:
        x: float32, bfloat16 or float16 [..., in], at most 8 rows, on the CPU.
        codes: uint8 [out, in] for 8 bits, [out, in / 2] for 4, the first of two codes in the low half.
        scale: float32 [out, groups]; groups have equal size, an even one for 4 bits.
        zero: uint8 of that shape; None for one zero of all.
        bits: that a code takes, 4 or 8.
        middle: the zero of all; None for 2^(bits - 1).
        bias: [out].

    Returns:
        [..., out] in x's dtype.

    Raises:
        ValueError: an argument is outside of this.
        RuntimeError: a gradient would be needed.
    """
    middle = 2 ** (bits - 1) if middle is None else middle
    return torch.ops.actkit.stored_linear.default(x, codes, scale, zero, middle, bits, bias)


def serves(in_features: int, groups: int, bits: int) -> bool:
    """Whether codes are stored as the operator reads them.

    Args:
        in_features: of the weight.
        groups: of each row.
        bits: that a code takes.
    """
    return bits in (4, 8) and in_features % (groups * (8 // bits)) == 0


def _check(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, bias: Tensor | None) -> None:
    if codes.dim() != 2 or codes.dtype != torch.uint8 or bits not in (4, 8):
        raise ValueError(
            f"codes: {codes.dtype} {tuple(codes.shape)} of {bits} bits was given; give uint8 [out, bytes of a row], of "
            f"4 or 8 bits."
        )
    n_out, n_in = codes.shape[0], codes.shape[1] * 8 // bits
    if x.dtype not in FLOATS or x.dim() == 0 or x.shape[-1] != n_in or x.numel() > ROWS * n_in:
        raise ValueError(
            f"x: {x.dtype} {tuple(x.shape)} was given; give float32, bfloat16 or float16 with {n_in} inputs, as the "
            f"codes have, and at most {ROWS} rows."
        )
    if scale.dim() != 2 or len(scale) != n_out or not scale.shape[1] or not serves(n_in, scale.shape[1], bits):
        raise ValueError(
            f"scale: {tuple(scale.shape)} was given; give [{n_out}, groups], of which {n_in} inputs make equal ones."
        )
    for name, tensor, shape in (("zero", zero, tuple(scale.shape)), ("bias", bias, (n_out,))):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: {tuple(tensor.shape)} was given; give {shape}.")


def _stored_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, middle: int, bits: int, bias: Tensor | None
) -> Tensor:
    _check(x, codes, scale, zero, bits, bias)
    check_gradient(x, scale, bias)
    rows = plain(x).view(-1, x.shape[-1]).float()
    zero = None if zero is None else plain(zero)
    if has_numba():
        from actkit.kernels.numba_stored import stored_linear as compute
    else:
        compute = stored_reference
    y = compute(rows, plain(codes), plain(scale).float(), zero, middle, bits)
    y = y if bias is None else y + plain(bias).float()
    return y.to(x.dtype).view(*x.shape[:-1], len(codes))


def stored_reference(rows: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, middle: int, bits: int) -> Tensor:
    """Compute the product in plain torch.

    Args:
        rows: float32 [rows, in].
        codes: as in `stored_linear`.
        scale: as in `stored_linear`.
        zero: as in `stored_linear`.
        middle: the zero of all, if none are stored.
        bits: as in `stored_linear`.

    Returns:
        float32 [rows, out].
    """
    wide = codes if bits == 8 else torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    grouped = wide.float().unflatten(1, (scale.shape[1], -1))
    offset = float(middle) if zero is None else zero.float()[..., None]
    return rows @ ((grouped - offset) * scale[..., None]).flatten(1).t()


def _fake_stored_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, middle: int, bits: int, bias: Tensor | None
) -> Tensor:
    _check(x, codes, scale, zero, bits, bias)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


register(
    "stored_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, int middle, int bits, Tensor? bias) -> Tensor",
    _stored_linear,
    _fake_stored_linear,
)
