"""The operators `actkit::quantized_linear` and `actkit::quantized_active_linear`, and their Python face.

As `operators`, for integer weights. A packed weight enters as its tensors and the integers of its `Layout`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actkit.kernels import reference
from actkit.kernels.active_set import ActiveSet, check_input, selection
from actkit.kernels.operators import check_active, check_gradient, engine, has_numba, plain, register, rows_of
from actkit.kernels.output_rows import MOST_ROWS
from actkit.kernels.quantized import Layout, QuantizedWeight, outputs_of
from actkit.kernels.quantized_rows import QuantizedRows, RowLayout


def quantized_linear(
    x: Tensor | ActiveSet,
    packed: QuantizedWeight,
    score: Tensor | None = None,
    threshold: float | None = None,
    k: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute y = W select(x) + bias for an integer weight.

    Codes less their zero are exact; sums are taken in float32, in a fixed order; no weight is rounded to another
    format.

    Args:
        x: float32, bfloat16 or float16 [..., in], with at most 2 rows if inputs are selected, each with its own
            selection, and at most 8 if not; or the ActiveSet that `compact` made of it, then without score, threshold
            and k.
        packed: from `pack_quantized`.
        score: as in `compact`.
        threshold: as in `compact`.
        k: as in `compact`.
        bias: [out].

    Returns:
        [..., out] in x's dtype.

    Raises:
        ValueError: an argument is outside of this.
        RuntimeError: a gradient would be needed.
    """
    parts = (packed.buffer, packed.scale, packed.zero, list(packed.layout))
    if not isinstance(x, ActiveSet):
        threshold, k = selection(threshold, k, score)
        return torch.ops.actkit.quantized_linear.default(x, *parts, score, threshold, k, bias)
    if score is not None or threshold is not None or k is not None:
        raise ValueError("score, threshold, k: x is an ActiveSet, whose inputs are already selected; leave them out.")
    y = torch.ops.actkit.quantized_active_linear.default(x.indices, x.values, x.counts, *parts, bias)
    return y.to(x.dtype).view(*x.shape[:-1], packed.out_features)


def _checked_layout(
    in_features: int,
    buffer: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    layout: list[int],
    bias: Tensor | None,
) -> Layout:
    """Return the layout, if it is that of the tensors: the compiled kernels do not check bounds."""
    if len(layout) != len(Layout._fields):
        raise ValueError(f"layout: {len(layout)} integers were given; give those of pack_quantized(...).layout.")
    known = Layout(*layout)
    records = (known.n_tiles, known.in_features, known.record_bytes)
    scales = (known.n_tiles, known.n_groups, known.tile) if known.by_input else None
    zeros = (known.n_tiles, known.n_groups, known.record_bytes) if known.by_input and known.zeros else None
    for tensor, shape, dtype in (
        (buffer, records, torch.uint8),
        (scale, scales, torch.float32),
        (zero, zeros, torch.uint8),
    ):
        sound = shape is None if tensor is None else tensor.shape == shape and tensor.dtype == dtype
        if not sound or (tensor is not None and not tensor.is_contiguous()):
            raise ValueError("packed: its tensors are not those of its layout; give what pack_quantized returned.")
    if known.in_features != in_features:
        raise ValueError(f"x: it has {in_features} inputs, the packed weight {known.in_features}.")
    if bias is not None and bias.shape != (known.out_features,):
        raise ValueError(f"bias: shape {tuple(bias.shape)} was given; the layer has {known.out_features} outputs.")
    return known


def _quantized_linear(
    x: Tensor,
    buffer: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    layout: list[int],
    score: Tensor | None,
    threshold: float,
    k: int,
    bias: Tensor | None,
) -> Tensor:
    rows, score = rows_of(x, score, dense=threshold < 0 and k < 0)
    known = _checked_layout(rows.shape[-1], buffer, scale, zero, layout, bias)
    check_gradient(bias)
    bias = None if bias is None else plain(bias)
    parts = (buffer, scale, zero, known)
    if threshold < 0 and k < 0 and len(rows) > 1:
        y = outputs_of(engine("numba_quantized").quantized_dense_linear(rows, *parts), known)
        y = y.contiguous() if bias is None else y + bias
    else:
        y = engine("numba_quantized").quantized_linear(rows, score, threshold, k, *parts, bias)
    return y.to(x.dtype).view(*x.shape[:-1], known.out_features)


def _fake_quantized_linear(
    x: Tensor,
    buffer: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    layout: list[int],
    score: Tensor | None,
    threshold: float,
    k: int,
    bias: Tensor | None,
) -> Tensor:
    check_input(x, score, dense=threshold < 0 and k < 0)
    known = _checked_layout(x.shape[-1], buffer, scale, zero, layout, bias)
    return x.new_empty(*x.shape[:-1], known.out_features)


def _quantized_active_linear(
    indices: Tensor,
    values: Tensor,
    counts: Tensor,
    buffer: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    layout: list[int],
    bias: Tensor | None,
) -> Tensor:
    """Compute it as float32 [rows, out_features]."""
    check_active(indices, values, counts)
    known = _checked_layout(indices.shape[-1], buffer, scale, zero, layout, bias)
    check_gradient(values, bias)
    kernel = engine("numba_quantized").quantized_active_linear
    y = outputs_of(kernel(indices, values, counts, buffer, scale, zero, known), known)
    return y.contiguous() if bias is None else y + plain(bias)


def _fake_quantized_active_linear(
    indices: Tensor,
    values: Tensor,
    counts: Tensor,
    buffer: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    layout: list[int],
    bias: Tensor | None,
) -> Tensor:
    known = _checked_layout(indices.shape[-1], buffer, scale, zero, layout, bias)
    return values.new_empty(indices.shape[0], known.out_features)


_PACKED = "Tensor buffer, Tensor? scale, Tensor? zero, int[] layout"
register(
    f"quantized_linear(Tensor x, {_PACKED}, Tensor? score, float threshold, int k, Tensor? bias) -> Tensor",
    _quantized_linear,
    _fake_quantized_linear,
)
register(
    f"quantized_active_linear(Tensor indices, Tensor values, Tensor counts, {_PACKED}, Tensor? bias) -> Tensor",
    _quantized_active_linear,
    _fake_quantized_active_linear,
)


# -- chosen outputs --------------------------------------------------------------------------------------------------


def quantized_output_rows(x: Tensor, packed: QuantizedRows, rows: Tensor) -> Tensor:
    """Compute x W[rows].T for an integer weight. Sums are taken in float32, in a fixed order.

    Args:
        x: [..., in] with at most 8 rows.
        packed: from `pack_quantized_rows`.
        rows: int32 [n], any of the outputs.

    Returns:
        float32 [..., n].

    Raises:
        ValueError: an argument is outside of this.
        RuntimeError: a gradient would be needed.
    """
    return torch.ops.actkit.quantized_output_rows(x, packed.buffer, rows, list(packed.layout))


def _check_rows(x: Tensor, buffer: Tensor, rows: Tensor, layout: RowLayout) -> None:
    if buffer.dim() != 2 or buffer.dtype != torch.uint8 or buffer.shape[1] != layout.row_bytes:
        raise ValueError(
            f"packed: {buffer.dtype} {tuple(buffer.shape)} was given; give what pack_quantized_rows(...) made."
        )
    if x.dim() == 0 or x.shape[-1] != layout.in_features:
        raise ValueError(f"x: shape {tuple(x.shape)} was given; the packed weight has {layout.in_features} inputs.")
    if x.shape[:-1].numel() > MOST_ROWS:
        raise ValueError(f"x: it has {x.shape[:-1].numel()} rows, at most {MOST_ROWS} are taken; use a dense product.")
    if rows.dim() != 1 or rows.dtype != torch.int32:
        raise ValueError(f"rows: {rows.dtype} {tuple(rows.shape)} was given; give int32 [n].")


def _output_rows(x: Tensor, buffer: Tensor, rows: Tensor, layout: list[int]) -> Tensor:
    stored = RowLayout(*layout)
    _check_rows(x, buffer, rows, stored)
    check_gradient(x, buffer)
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(buffer):  # the kernel checks no bounds
        raise ValueError(
            f"rows: {int(rows.min())} to {int(rows.max())} was given; the layer has {len(buffer)} outputs."
        )
    given = plain(x).view(-1, stored.in_features).float()
    if has_numba():
        from actkit.kernels.numba_rows import quantized_output_rows as compute
    else:
        compute = reference.quantized_output_rows
    return compute(given, plain(buffer), plain(rows), stored).view(*x.shape[:-1], len(rows))


def _fake_output_rows(x: Tensor, buffer: Tensor, rows: Tensor, layout: list[int]) -> Tensor:
    _check_rows(x, buffer, rows, RowLayout(*layout))
    return x.new_empty(*x.shape[:-1], rows.shape[0], dtype=torch.float32)


register(
    "quantized_output_rows(Tensor x, Tensor packed, Tensor rows, int[] layout) -> Tensor",
    _output_rows,
    _fake_output_rows,
)
