"""Activation-sparse and low-bit kernels: read only the weights of the inputs that count, in as few bits as they have.

    packed = pack(weight)                                  once per layer
    y = sparse_linear(x, packed, threshold=0.1)            one layer, one or two tokens
    active = compact(x, threshold=0.1)                     or once for q, k and v ...
    q, k, v = (sparse_linear(active, packed) for packed in (q_proj, k_proj, v_proj))

    packed = pack_quantized(codes, scale, bits=4, ...)     the same for integer weights
    y = quantized_linear(x, packed, threshold=0.1)

    packed = pack_rows(weight)                             to skip outputs instead, behind a sparse gate
    y = output_rows(x, packed, active)                     (pack_quantized_rows and quantized_output_rows for integers)

    y = stored_linear(x, codes, scale, bits=4)             few rows times codes as they are stored, nothing packed

    y = int8_linear(x, codes, scale)                       inputs and weight of 8 bits, multiplied as integers

    x = masked_inputs(x, score, k=100)                     many rows: what is not selected becomes 0

    y = poly_norm(x, weight, bias)                         PolyCom's activations, with gradients
    y = rational(x, numerator, denominator)                rational functions of groups of channels, with gradients
    y = chosen_sum(indices, values, weight)                sparse codes, with gradients that are as sparse

Importing this registers the operators under `torch.ops.actkit`; Numba is imported when a kernel first runs.
"""

from actkit.kernels.active_set import ActiveSet, compact
from actkit.kernels.int8_products import int8_linear
from actkit.kernels.masks import MASKED, masked_inputs
from actkit.kernels.operators import dense_linear, sparse_linear
from actkit.kernels.output_rows import PackedRows, output_rows, pack_rows
from actkit.kernels.packing import PackedWeight, pack
from actkit.kernels.polynomials import poly_norm, poly_relu
from actkit.kernels.quantized import QuantizedWeight, pack_quantized
from actkit.kernels.quantized_operators import quantized_linear, quantized_output_rows
from actkit.kernels.quantized_rows import QuantizedRows, pack_quantized_rows
from actkit.kernels.rationals import rational
from actkit.kernels.sparse_codes import chosen_products, chosen_sum, largest_of_rows
from actkit.kernels.stored_codes import stored_linear

__all__ = [
    "MASKED",
    "ActiveSet",
    "PackedRows",
    "PackedWeight",
    "QuantizedRows",
    "QuantizedWeight",
    "chosen_products",
    "chosen_sum",
    "compact",
    "dense_linear",
    "int8_linear",
    "largest_of_rows",
    "masked_inputs",
    "output_rows",
    "pack",
    "pack_quantized",
    "pack_quantized_rows",
    "pack_rows",
    "poly_norm",
    "poly_relu",
    "quantized_linear",
    "quantized_output_rows",
    "rational",
    "sparse_linear",
    "stored_linear",
]
