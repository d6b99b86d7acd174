"""The matrix products of a decoding step: one compiled function for each way that a matrix is stored.

The step calls them by address, from a field of the product's row. So the step is compiled once for all models, and a
format when a model first has it; as branches of the step, every combination of formats would be compiled anew, for a
minute. All have one signature:

    function(row, x, indices, values, count, out, memory)

row: int64 [FIELDS]; indices: int32 and values: float32, the `count` active inputs; out: float32; x: float32, the inputs
of functions whose `indices` are outputs; memory: int64 addresses, `Memory` of the calling thread.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from actkit.kernels import numba_integer
from actkit.kernels.numba_cpu import multiply_tile
from actkit.kernels.numba_integer import COLUMNS, FOURS, WIDEST, group_dots, record_dots
from actkit.kernels.numba_quantized import groups_tile, records_tile
from actkit.kernels.numba_rows import bundled_units, chosen_codes, chosen_dots
from actkit.kernels.packing import aligned
from actkit.kernels.process import called_by_address, compiled
from actkit.kernels.quantized import BLOCK
from actkit.kernels.team import address_of, call_by_address, line_padded

# Fields of a product, int64. A row of zeros is a product that a thread has no share in.
FUNCTION, ADDRESS, TILES, INPUTS, STRIDE, TILE, SCALES_AT, ZEROS_AT, GROUP = range(9)
SCALES, ZEROS, BIAS, OUT_AT, SELECT, K, SCORE, FIRST_INPUT, ALL_INPUTS, SHARES_SELECTION, MIDDLE = range(9, 20)
# Where its inputs begin among those of the stage; the two products of a low-rank correction, 0 for none, and of what;
# outputs of bundled units.
INPUTS_AT, LOW_RANK, OF_ALL, OUTPUTS = range(20, 24)
FIELDS = 24

SUMS = 8 * 6144  # of the float kernels with groups of inputs: rows of x times columns


class Memory(NamedTuple):
    """What a thread's products work in.

    Attributes:
        addresses: int64 [6], of the others.
        sums: float32.
        fixed: for products in fixed point.
    """

    addresses: np.ndarray
    sums: np.ndarray
    fixed: numba_integer.Scratch


def memory(columns: int) -> Memory:
    """Allocate memory for one thread's products. columns: of the widest tile."""
    sums, fixed = aligned(line_padded(max(columns, SUMS)), np.float32), numba_integer.scratch()
    addresses = np.array([array.ctypes.data for array in (sums, *fixed)], np.int64)
    return Memory(addresses, sums, fixed)


# -- calling -----------------------------------------------------------------------------------------------------------


@intrinsic
def call(typingctx, function, row, x, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
    """Call the product at the address `function`; all others but `count` are arrays."""
    return types.void(types.int64, row, x, indices, values, types.int64, out, memory), call_by_address


_SIGNATURE = types.void(
    types.CPointer(types.int64),
    types.CPointer(types.float32),
    types.CPointer(types.int32),
    types.CPointer(types.float32),
    types.int64,
    types.CPointer(types.float32),
    types.CPointer(types.int64),
)
_compiled: dict[tuple[Any, ...], Any] = {}


def address(make: Any, *settings: Any) -> int:
    """Return where the function that `make(*settings)` defines lies; it is compiled now, if it is not yet."""
    key = (make, *settings)
    if key not in _compiled:
        _compiled[key] = called_by_address(_SIGNATURE)(make(*settings))
    return int(_compiled[key].address)


# -- the functions -----------------------------------------------------------------------------------------------------


@compiled(inner=True)
def _arguments(row, indices, values, out):  # type: ignore[no-untyped-def]
    """Make arrays of row [FIELDS], indices [in], values [1, in] and out [1, tiles * tile]."""
    row = carray(row, (FIELDS,))
    inputs = row[INPUTS]
    return row, carray(indices, (inputs,)), carray(values, (1, inputs)), carray(out, (1, row[TILES] * row[TILE]))


@compiled(inner=True)
def _scratch(memory):  # type: ignore[no-untyped-def]
    at = carray(memory, (6,))
    return (
        carray(address_of(at[1]), (2 * FOURS * WIDEST,), np.int32),
        carray(address_of(at[2]), (WIDEST,), np.float32),
        carray(address_of(at[3]), (WIDEST,), np.float32),
        carray(address_of(at[4]), (WIDEST,), np.int32),
        carray(address_of(at[5]), (COLUMNS,), np.int32),
    )


def floats(stored: type) -> Any:
    """Make the product with a matrix of float32, or of bfloat16 in uint16."""

    def product(row, x, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
        row, chosen, given, sums = _arguments(row, indices, values, out)
        weight = carray(address_of(row[ADDRESS]), (row[TILES], row[INPUTS], row[TILE]), stored)
        for t in range(weight.shape[0]):
            multiply_tile(weight, t, chosen, given, count, sums, (0,), weight.shape[2])

    return product


def records(stored: type, scales: int, zeros: bool) -> Any:
    """Make the product with integers of 8 bits (int8) or 4 (uint8) with scales per input.

    Args:
        stored: the type of the codes.
        scales: how many a block of outputs has.
        zeros: whether zero points are stored.
    """
    block_bytes, pieces, kept = block_bytes_of(stored), (0,) * scales, (0,) * zeros

    def product(row, x, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
        row, chosen, given, sums = _arguments(row, indices, values, out)
        weight = carray(address_of(row[ADDRESS]), (row[TILES], row[INPUTS], row[STRIDE]), stored)
        shape = (row[TILE], row[TILE], np.int64(block_bytes), row[SCALES_AT], row[ZEROS_AT])
        middle = np.float32(row[MIDDLE])
        for t in range(weight.shape[0]):
            records_tile(weight, t, chosen, given, count, sums, shape, middle, (0,), pieces, kept)

    return product


def records_fixed(stored: type, zeros: bool) -> Any:
    """Make the product as `records` with one scale per block, and activations in fixed point."""
    block_bytes, kept = block_bytes_of(stored), (0,) * zeros

    def product(row, x, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
        row, chosen, given, sums = _arguments(row, indices, values, out)
        weight = carray(address_of(row[ADDRESS]), (row[TILES], row[INPUTS], row[STRIDE]), stored)
        shape = (row[TILE], np.int64(block_bytes), row[SCALES_AT], row[ZEROS_AT])
        middle, scratch = np.int32(row[MIDDLE]), _scratch(memory)
        for t in range(weight.shape[0]):
            record_dots(weight, t, chosen, given, count, sums, shape, middle, kept, scratch)

    return product


def groups(stored: type, zeros: bool, fixed: bool) -> Any:
    """Make the product with integers with scales per output and group of inputs. fixed: activations in fixed point."""
    block_bytes, kept = block_bytes_of(stored), (0,) * zeros

    def product(row, x, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
        row, chosen, given, sums = _arguments(row, indices, values, out)
        weight = carray(address_of(row[ADDRESS]), (row[TILES], row[INPUTS], row[STRIDE]), stored)
        number = -(-row[INPUTS] // row[GROUP])
        scale = carray(address_of(row[SCALES]), (row[TILES], number, row[TILE]), np.float32)
        zero = carray(address_of(row[ZEROS]), (row[TILES], number, row[STRIDE]), stored)
        middle = np.float32(row[MIDDLE])
        if fixed:
            shape, scratch = (row[TILE], np.int64(block_bytes), row[GROUP]), _scratch(memory)
            for t in range(weight.shape[0]):
                group_dots(weight, scale, zero, t, chosen, given, count, sums, shape, middle, kept, scratch)
        else:
            own = carray(address_of(carray(memory, (6,))[0]), (row[TILE],), np.float32)
            wide = (row[TILE], row[TILE], np.int64(block_bytes), row[GROUP])
            for t in range(weight.shape[0]):
                groups_tile(weight, scale, zero, t, chosen, given, count, sums, own, wide, middle, (0,), kept)

    return product


def chosen_rows(stored: type) -> Any:
    """Make the dot products of x with the rows of `count` outputs by index; out[i] is that of the i-th."""

    def product(row, x, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
        row = carray(row, (FIELDS,))
        weight = carray(address_of(row[ADDRESS]), (row[INPUTS], row[TILE]), stored)
        given, chosen, found = carray(x, (row[TILE],)), carray(indices, (row[INPUTS],)), carray(out, (row[INPUTS],))
        chosen_dots(weight, given, chosen, 0, count, found)

    return product


def chosen_code_rows(stored: type, scales: int, zeros: bool) -> Any:
    """Make them as `chosen_rows`, of integers. scales: of a block of inputs."""
    block_bytes, pieces, kept = block_bytes_of(stored), (0,) * scales, (0,) * zeros

    def product(row, x, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
        row = carray(row, (FIELDS,))
        weight = carray(address_of(row[ADDRESS]), (row[INPUTS], row[STRIDE]), stored)
        given, chosen, found = carray(x, (row[TILE],)), carray(indices, (row[INPUTS],)), carray(out, (row[INPUTS],))
        shape, middle = (np.int64(block_bytes), row[SCALES_AT], row[ZEROS_AT]), np.float32(row[MIDDLE])
        chosen_codes(weight, given, chosen, 0, count, found, shape, middle, pieces, kept)

    return product


def units(stored: type) -> Any:
    """Make what `count` units of an MLP add to its outputs; values: their gates, changed."""
    size = np.dtype(stored).itemsize

    def product(row, x, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
        row = carray(row, (FIELDS,))
        weight = carray(address_of(row[ADDRESS]), (row[INPUTS], row[STRIDE] // size), stored)
        given, chosen, gates = carray(x, (row[TILE],)), carray(indices, (row[INPUTS],)), carray(values, (row[INPUTS],))
        bundled_units(weight, given, chosen, gates, count, carray(out, (row[OUTPUTS],)))

    return product


def block_bytes_of(stored: type) -> int:
    """Return the bytes of the codes of 128 outputs.

    Args:
        stored: the type of the codes.
    """
    return BLOCK if stored is np.int8 else BLOCK // 2
