"""The operators `actkit::sparse_linear`, `compact`, `active_linear` and `dense_linear`, and their Python face.

`sparse_linear` is one call for one layer; `compact` and `active_linear` are its two halves, for layers that share an
input; `dense_linear` reads everything, once for up to eight rows. They run in Numba, or in plain torch if Numba
cannot be imported, without gradients: for training compute F.linear on the masked input. They are opaque to
torch.compile and torch.export, which see the shapes only.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from actkit.kernels import reference
from actkit.kernels.active_set import UNUSED, ActiveSet, check_input, selection
from actkit.kernels.packing import WEIGHT_DTYPES, PackedWeight


def sparse_linear(
    x: Tensor | ActiveSet,
    packed: PackedWeight,
    score: Tensor | None = None,
    threshold: float | None = None,
    k: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute y = W select(x) + bias, reading the weights of the selected inputs only.

    Sums are taken in float32, in a fixed order. Inputs that are not selected count as absent, so a NaN or Inf among
    their weights is not seen.

    Args:
        x: float32, bfloat16 or float16 [..., in] with at most 2 rows, each with its own selection; or the ActiveSet
            that `compact` made of it, then without score, threshold and k.
        packed: from `pack`.
        score: as in `compact`.
        threshold: as in `compact`; every input is selected if neither this nor k is given.
        k: as in `compact`.
        bias: [out].

    Returns:
        [..., out] in x's dtype.

    Raises:
        ValueError: an argument is outside of this.
        RuntimeError: a gradient would be needed.
    """
    if not isinstance(x, ActiveSet):
        threshold, k = selection(threshold, k, score)
        return torch.ops.actkit.sparse_linear.default(x, packed.buffer, score, threshold, k, bias, packed.out_features)
    if score is not None or threshold is not None or k is not None:
        raise ValueError("score, threshold, k: x is an ActiveSet, whose inputs are already selected; leave them out.")
    y = torch.ops.actkit.active_linear(x.indices, x.values, x.counts, packed.buffer, bias, packed.out_features)
    return y.to(x.dtype).view(*x.shape[:-1], packed.out_features)


def dense_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute y = W x + bias, reading the weight once.

    Sums are taken as in `sparse_linear`.

    Args:
        x: [..., in] with at most 8 rows.
        packed: from `pack`.
        bias: [out].

    Returns:
        [..., out] in x's dtype.

    Raises:
        ValueError: an argument is outside of this.
        RuntimeError: a gradient would be needed.
    """
    return torch.ops.actkit.dense_linear.default(x, packed.buffer, bias, packed.out_features)


@cache
def engine(name: str = "numba_cpu") -> Any:
    """Return the module that computes: one with Numba's kernels, or the reference."""
    return import_module(f"actkit.kernels.{name}") if has_numba() else reference


@cache
def has_numba() -> bool:
    """Return whether Numba can be imported; if not, a warning says what that costs."""
    try:
        import_module("actkit.kernels.numba_cpu")
    except ImportError as error:
        warnings.warn(
            f"Numba cannot be imported ({error}); the sparse kernels run in plain torch, which is slower than a dense "
            "product. Install numba.",
            stacklevel=3,
        )
        return False
    return True


@cache
def has_triton() -> bool:
    """Return whether Triton can be imported; if not, a warning says what that costs."""
    if find_spec("triton") is None:
        warnings.warn(
            "the package triton is missing; on this GPU rational functions and PolyNorm run in plain torch, which "
            "reads and writes every power. Install triton.",
            stacklevel=3,
        )
        return False
    return True


def runs_in_triton(x: Tensor) -> bool:
    """Return whether a kernel in Triton takes x: values on a GPU.

    Args:
        x: any tensor.
    """
    return x.is_cuda and x.numel() > 0 and has_triton()


def check_gradient(*tensors: Tensor | None) -> None:
    """Raise RuntimeError if a gradient is wanted, as the kernels have none."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "actkit.kernels: an argument requires a gradient, and the kernels have none; call them under "
            "torch.no_grad(), or compute torch.nn.functional.linear on the masked input."
        )


def _check_packed(in_features: int, packed: Tensor, bias: Tensor | None, out_features: int) -> None:
    if packed.dim() != 3 or packed.dtype not in WEIGHT_DTYPES or not packed.is_contiguous():
        raise ValueError(
            f"packed: {packed.dtype} {tuple(packed.shape)} was given; give the buffer of actkit.kernels.pack(weight)."
        )
    if packed.shape[1] != in_features:
        raise ValueError(f"x: it has {in_features} inputs, the packed weight {packed.shape[1]}.")
    if not 0 < out_features <= packed.shape[0] * packed.shape[2]:
        raise ValueError(f"out_features: {out_features} was given, packed holds {packed.shape[0] * packed.shape[2]}.")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias: shape {tuple(bias.shape)} was given; the layer has {out_features} outputs.")


def check_active(indices: Tensor, values: Tensor, counts: Tensor) -> None:
    """Raise ValueError for an index outside of the weight, as the compiled kernel does not check bounds."""
    rows, width = indices.shape
    sound = (
        (indices.dtype, values.dtype, counts.dtype) == (torch.int32, torch.float32, torch.int32)
        and values.shape == indices.shape
        and counts.shape == (rows,)
        and all(0 <= count <= width for count in counts.tolist())
        and (indices.numel() == 0 or (indices.min() >= 0 and indices.max() < width))
    )
    if not sound:
        raise ValueError("indices, values, counts: they are no active set of this width; make them with compact(x).")


def rows_of(x: Tensor, score: Tensor | None, dense: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return x [rows, in] and score, checked, contiguous and without a graph."""
    check_input(x, score, dense)
    check_gradient(x, score)
    if score is not None:
        score = plain(score.float())
    return plain(x).view(-1, x.shape[-1]), score


def plain(x: Tensor) -> Tensor:
    """Return x, contiguous and without a graph; the ifs save calls into torch, 10 microseconds behind cold caches."""
    x = x.detach() if x.requires_grad else x
    return x if x.is_contiguous() else x.contiguous()


def _compact(x: Tensor, score: Tensor | None, threshold: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return engine().compact(*rows_of(x, score), threshold, k)


def _active_linear(
    indices: Tensor, values: Tensor, counts: Tensor, packed: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Compute it as float32 [rows, out_features]."""
    check_active(indices, values, counts)
    _check_packed(indices.shape[-1], packed, bias, out_features)
    check_gradient(values, packed, bias)
    y = engine().active_linear(indices, values, counts, plain(packed))[:, :out_features]
    return y.contiguous() if bias is None else y + plain(bias)


def _sparse_linear(
    x: Tensor, packed: Tensor, score: Tensor | None, threshold: float, k: int, bias: Tensor | None, out_features: int
) -> Tensor:
    rows, score = rows_of(x, score)
    _check_packed(rows.shape[-1], packed, bias, out_features)
    check_gradient(packed, bias)
    bias = None if bias is None else plain(bias)
    y = engine().sparse_linear(rows, score, threshold, k, plain(packed), bias, out_features)
    return y.to(x.dtype).view(*x.shape[:-1], out_features)


def _dense_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    rows, _ = rows_of(x, None, dense=True)
    _check_packed(rows.shape[-1], packed, bias, out_features)
    check_gradient(packed, bias)
    if len(rows) == 1:  # in one call
        added = None if bias is None else plain(bias)
        y = engine().sparse_linear(rows, None, UNUSED, UNUSED, plain(packed), added, out_features)
    else:
        y = engine().dense_linear(rows, plain(packed))[:, :out_features]
        y = y.contiguous() if bias is None else y + plain(bias)
    return y.to(x.dtype).view(*x.shape[:-1], out_features)


# -- registration: plain functions, a third of the call overhead of torch.library.custom_op ----------------------------


def _fake_compact(x: Tensor, score: Tensor | None, threshold: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    check_input(x, score)
    shape = (x.shape[:-1].numel(), x.shape[-1])
    indices = x.new_empty(shape, dtype=torch.int32)
    return indices, x.new_empty(shape, dtype=torch.float32), indices.new_empty(shape[:1])


def _fake_active_linear(
    indices: Tensor, values: Tensor, counts: Tensor, packed: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    _check_packed(indices.shape[-1], packed, bias, out_features)
    return values.new_empty(indices.shape[0], out_features)


def _fake_sparse_linear(
    x: Tensor, packed: Tensor, score: Tensor | None, threshold: float, k: int, bias: Tensor | None, out_features: int
) -> Tensor:
    check_input(x, score)
    _check_packed(x.shape[-1], packed, bias, out_features)
    return x.new_empty(*x.shape[:-1], out_features)


def _fake_dense_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    check_input(x, None, dense=True)
    _check_packed(x.shape[-1], packed, bias, out_features)
    return x.new_empty(*x.shape[:-1], out_features)


def register(schema: str, kernel: Any, fake: Any, elsewhere: Any = None) -> None:
    """Define an operator of the library `actkit` for the CPU, and if `elsewhere` is given for all other devices."""
    name = "actkit::" + schema.partition("(")[0]
    torch.library.define(name, schema.removeprefix(schema.partition("(")[0]), tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CPU", kernel)
    if elsewhere is not None:
        torch.library.impl(name, "default", elsewhere)
    torch.library.register_fake(name, fake)


register(
    "compact(Tensor x, Tensor? score, float threshold, int k) -> (Tensor, Tensor, Tensor)", _compact, _fake_compact
)
register(
    "active_linear(Tensor indices, Tensor values, Tensor counts, Tensor packed, Tensor? bias, SymInt out_features)"
    " -> Tensor",
    _active_linear,
    _fake_active_linear,
)
register(
    "sparse_linear(Tensor x, Tensor packed, Tensor? score, float threshold, int k, Tensor? bias, SymInt out_features)"
    " -> Tensor",
    _sparse_linear,
    _fake_sparse_linear,
)
register(
    "dense_linear(Tensor x, Tensor packed, Tensor? bias, SymInt out_features) -> Tensor",
    _dense_linear,
    _fake_dense_linear,
)
