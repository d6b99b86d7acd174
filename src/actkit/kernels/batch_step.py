"""What a step of several sequences shares: matrix products that read a weight once for all, and attention one by one.

As in `decode_step`, each thread computes its own share: its rows of the table of products, its heads. The products are
those of the kernels for several rows of inputs, called by address (`decode_products`); activations stay float32.
Attention is the decoding step's own, one sequence after the other, each on its part of the cache. What lies between
the two is small, and left to torch (`runtime.batch`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, prange

from actkit.kernels.decode_attention import attention
from actkit.kernels.decode_places import FIRST_HEAD, HEADS
from actkit.kernels.decode_products import (
    ADDRESS,
    BIAS,
    FIELDS,
    FUNCTION,
    GROUP,
    INPUTS,
    MIDDLE,
    OUT_AT,
    SCALES,
    SCALES_AT,
    SELECT,
    STRIDE,
    TILE,
    TILES,
    ZEROS,
    ZEROS_AT,
    block_bytes_of,
    call,
)
from actkit.kernels.decode_step import DENSE, StepPlan, Work
from actkit.kernels.numba_cpu import multiply_tile
from actkit.kernels.numba_quantized import groups_tile, records_tile
from actkit.kernels.packing import COLUMNS, WIDEST_TILE, aligned
from actkit.kernels.process import compiled
from actkit.kernels.quantized import BLOCK
from actkit.kernels.team import address_of, line_padded, meet

SIZES = (2, 4, 8)  # sequences that products are compiled for; of others some rows are computed in vain


# -- products ----------------------------------------------------------------------------------------------------------


@compiled(inner=True)
def _arguments(row, indices, values, out, size):  # type: ignore[no-untyped-def]
    """Make arrays of row [FIELDS], indices [in], values [size, in] and out [size, tiles * tile]."""
    row = carray(row, (FIELDS,))
    inputs, width = row[INPUTS], row[TILES] * row[TILE]
    return row, carray(indices, (inputs,)), carray(values, (size, inputs)), carray(out, (size, width))


@compiled(inner=True)
def _run(tile, size, columns):  # type: ignore[no-untyped-def]
    """How many columns of a tile to take at once, as `numba_cpu.run_of`."""
    runs = -(-tile * size // WIDEST_TILE)
    return -(-tile // (runs * columns)) * columns


def floats(stored: type, size: int) -> Any:
    """Make the product of `size` rows with a matrix of float32, or of bfloat16 in uint16."""
    rows = (0,) * size

    def product(row, x, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
        row, chosen, given, sums = _arguments(row, indices, values, out, size)
        weight = carray(address_of(row[ADDRESS]), (row[TILES], row[INPUTS], row[TILE]), stored)
        run = _run(row[TILE], size, COLUMNS)
        for t in range(weight.shape[0]):
            multiply_tile(weight, t, chosen, given, count, sums, rows, run)

    return product


def records(stored: type, scales: int, zeros: bool, size: int) -> Any:
    """Make the product of `size` rows with integers with scales per input, as `decode_products.records`."""
    block_bytes, pieces, kept, rows = block_bytes_of(stored), (0,) * scales, (0,) * zeros, (0,) * size

    def product(row, x, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
        row, chosen, given, sums = _arguments(row, indices, values, out, size)
        weight = carray(address_of(row[ADDRESS]), (row[TILES], row[INPUTS], row[STRIDE]), stored)
        shape = (row[TILE], _run(row[TILE], size, BLOCK), np.int64(block_bytes), row[SCALES_AT], row[ZEROS_AT])
        middle = np.float32(row[MIDDLE])
        for t in range(weight.shape[0]):
            records_tile(weight, t, chosen, given, count, sums, shape, middle, rows, pieces, kept)

    return product


def groups(stored: type, zeros: bool, size: int) -> Any:
    """Make the product of `size` rows with integers with scales per output and group of inputs."""
    block_bytes, kept, rows = block_bytes_of(stored), (0,) * zeros, (0,) * size

    def product(row, x, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
        row, chosen, given, sums = _arguments(row, indices, values, out, size)
        weight = carray(address_of(row[ADDRESS]), (row[TILES], row[INPUTS], row[STRIDE]), stored)
        number = -(-row[INPUTS] // row[GROUP])
        scale = carray(address_of(row[SCALES]), (row[TILES], number, row[TILE]), np.float32)
        zero = carray(address_of(row[ZEROS]), (row[TILES], number, row[STRIDE]), stored)
        run, middle = _run(row[TILE], size, BLOCK), np.float32(row[MIDDLE])
        shape = (row[TILE], run, np.int64(block_bytes), row[GROUP])
        own = carray(address_of(carray(memory, (6,))[0]), (size * run,), np.float32)
        for t in range(weight.shape[0]):
            groups_tile(weight, scale, zero, t, chosen, given, count, sums, own, shape, middle, rows, kept)

    return product


# -- a stage -----------------------------------------------------------------------------------------------------------


class Scratch(NamedTuple):
    """What each thread works in: [threads, ...].

    Attributes:
        chosen: int32 [.., inputs], those that are not 0 in every sequence.
        given: float32 [.., sequences * inputs], their values, a sequence after the other.
        found: float32 [.., sequences * outputs], of one product.
        out: float32 [.., sequences, width], of all products of a stage.
    """

    chosen: np.ndarray
    given: np.ndarray
    found: np.ndarray
    out: np.ndarray


def scratch(products: np.ndarray, threads: int, width: int) -> Scratch:
    """Allocate it for the largest of SIZES.

    Args:
        products: the table.
        threads: of the team.
        width: of a stage's outputs.
    """
    most = SIZES[-1]
    inputs, outputs = int(products[:, INPUTS].max()), int((products[:, TILES] * products[:, TILE]).max())
    return Scratch(
        chosen=aligned((threads, line_padded(inputs)), np.int32),
        given=aligned((threads, line_padded(most * inputs)), np.float32),
        found=aligned((threads, line_padded(most * outputs)), np.float32),
        out=aligned((threads, most, width), np.float32),
    )


@compiled(inner=True)
def _gather(x, at, inputs, dense, chosen, given):  # type: ignore[no-untyped-def]
    """List the inputs that are not 0 in every row of x, and their values, `inputs` a row; return how many."""
    count = 0
    if dense:
        for j in range(inputs):
            chosen[j] = j
        for b in range(len(x)):
            given[b * inputs : (b + 1) * inputs] = x[b, at : at + inputs]
        return inputs
    for j in range(inputs):
        wanted = False
        for b in range(len(x)):
            wanted |= x[b, at + j] != 0
        if wanted:
            for b in range(len(x)):
                given[b * inputs + count] = x[b, at + j]
            chosen[count] = j
            count += 1
    return count


@compiled(inner=True)
def _multiply(thread, places, products, x, kinds, begins, memory, scratch):  # type: ignore[no-untyped-def]
    """Compute one thread's products of a stage."""
    chosen, given, found = scratch.chosen[thread], scratch.given[thread], scratch.found[thread]
    count, before = 0, -1
    for p in range(places[thread, 0], places[thread, 0] + places[thread, 1]):
        row = products[p]
        same = before >= 0 and kinds[p] == kinds[before] and begins[p] == begins[before]
        if not (same and row[INPUTS] == products[before, INPUTS]):
            count = _gather(x[kinds[p]], begins[p], row[INPUTS], row[SELECT] == DENSE, chosen, given)
        before = p
        call(row[FUNCTION], row, given, chosen, given, np.int64(count), found, memory[thread])
        width = row[TILES] * row[TILE]
        for b in range(x.shape[1]):
            own = scratch.out[thread, b, row[OUT_AT] : row[OUT_AT] + width]
            own[:] = found[b * width : (b + 1) * width]
            if row[BIAS] != 0:
                bias = carray(address_of(row[BIAS]), (width,), np.float32)
                for c in range(width):
                    own[c] += bias[c]


@compiled(parallel=True)
def multiply_stage(places, products, x, kinds, begins, memory, scratch):  # type: ignore[no-untyped-def]
    """Compute products for several sequences into scratch.out.

    Args:
        places: int64 [threads, 2], of each thread the first product and how many.
        products: int64 [products, FIELDS], the table, with functions for so many rows.
        x: float32 [kinds, sequences, inputs], the inputs, zero where a sequence does not select one.
        kinds: int64 [products], which of these a product reads.
        begins: int64 [products], and from where on.
        memory: int64 [threads, 6], each thread's `decode_products.Memory.addresses`.
        scratch: `Scratch`.
    """
    for thread in prange(len(places)):
        _multiply(thread, places, products, x, kinds, begins, memory, scratch)


@compiled(inner=True)
def _attend(thread, places, layer, positions, out, mixed, plan, work):  # type: ignore[no-untyped-def]
    """Attend with one thread's heads; return whether all threads came to every meeting."""
    # Not in the body of the prange: Numba may move writes to work.stage behind the calls that read it.
    threads, place, wide, meetings = len(places), places[thread], plan.shared_by * plan.size, 0
    first, last = place[FIRST_HEAD] * wide, (place[FIRST_HEAD] + place[HEADS]) * wide
    for b in range(len(positions)):
        work.stage[thread, : out.shape[2]] = out[thread, b]
        at = b * plan.norms.shape[0] + layer
        meetings = attention(place, at, thread, threads, positions[b], meetings, plan, work)
        if meetings < 0:
            return False
        mixed[b, first:last] = work.mixed[first:last]
        if meetings > 0:  # threads have met: what they said there must not be written anew before all have read it
            meetings += threads
            if not meet(work.counter, meetings):
                return False
    return True


@compiled(parallel=True)
def _attend_all(places, layer, positions, out, mixed, plan, work):  # type: ignore[no-untyped-def]
    came = np.zeros(len(places), np.uint8)
    for thread in prange(len(places)):
        came[thread] = _attend(thread, places, layer, positions, out, mixed, plan, work)
    return came.all()


def attend_stage(
    places: np.ndarray,
    layer: int,
    positions: np.ndarray,
    out: np.ndarray,
    mixed: np.ndarray,
    plan: StepPlan,
    work: Work,
) -> bool:
    """Keep a token of each sequence and attend, from the products `out` into `mixed`.

    Args:
        places: int64 [threads, LAYER_FIELDS], of this layer.
        layer: its number.
        positions: int64 [sequences], of the tokens.
        out: float32 [threads, sequences, width].
        mixed: float32 [sequences, heads * head size], written.
        plan: whose norms of heads are those of all layers, once for each sequence.
        work: whose cache is that of the first sequence's layers, then the second's, and so on.

    Returns:
        Whether the threads ran side by side.
    """
    work.counter[0] = 0
    return bool(_attend_all(places, layer, positions, out, mixed, plan, work))
