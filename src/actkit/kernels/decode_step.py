"""One token through the layers of a decoder, in one compiled call.

Each thread is a rank of tensor parallelism: it owns some key-value heads with the query heads that read them, and some
units of every MLP, with the weights of both. So between two norms it needs nobody: query, key and value of its heads,
attention, its inputs' share of the output projection; gate and up of its units, the activation, their share of the
down projection. The shares are summed where threads meet, twice per layer. What is small (the residual stream, norms,
selections) every thread computes for itself, alike to the bit.

All is float32 but the stored weights. The order of sums is fixed for a number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, prange

from actkit.kernels.decode_math import (
    activate,
    active_ones,
    attend,
    attend_chosen,
    drop_below,
    nothing,
    rms_norm,
    rotate,
    shift_down,
    statistical_cut,
    sums,
)
from actkit.kernels.numba_cpu import multiply_tile, select, widen
from actkit.kernels.numba_integer import group_dots, record_dots
from actkit.kernels.numba_quantized import groups_tile, records_tile
from actkit.kernels.numba_rows import bundled_units, chosen_dots
from actkit.kernels.process import compiled
from actkit.kernels.quantized import BLOCK
from actkit.kernels.team import address_of, meet

# How a matrix is stored and multiplied: integers in records (scales per input) or in groups of inputs, with activations
# in floats, or in fixed point (dots).
FLOAT32, BFLOAT16 = range(2)
INT8_RECORDS, INT4_RECORDS, INT8_GROUPS, INT4_GROUPS = range(2, 6)
INT8_RECORD_DOTS, INT4_RECORD_DOTS, INT8_GROUP_DOTS, INT4_GROUP_DOTS = range(6, 10)
KINDS = 10
# The products of a layer; the output layer; behind a sparse gate up alone, or up and down of a unit side by side.
QKV, OUTPUT, GATE_UP, DOWN, HEAD, UP, UNITS_BUNDLED = range(7)
DENSE, THRESHOLD, TOP_K = range(3)  # how inputs are selected

# Fields of a product, int64. A row of zeros is a product that a thread has no share in.
KIND, ADDRESS, TILES, INPUTS, STRIDE, TILE, SCALES_AT, ZEROS_AT, GROUP = range(9)
SCALES, ZEROS, BIAS, OUT_AT, SELECT, K, SCORE, FIRST_INPUT, ALL_INPUTS, SHARES_SELECTION, MIDDLE = range(9, 20)
# Where its inputs begin among those of the stage; the two products of a low-rank correction, 0 for none, and of what;
# outputs of bundled units.
INPUTS_AT, LOW_RANK, OF_ALL, OUTPUTS = range(20, 24)
FIELDS = 24
# Fields of a layer and thread, int64: the first product and the number of products of each stage, then places.
PLACES = 14
QUERY_AT, KEY_AT, VALUE_AT, GATE_AT, UP_AT, WINDOW, FIRST_HEAD, HEADS, UNITS, FIRST_UNIT, ACTIVATION = range(PLACES, 25)
# All units of an MLP whose gate passes a statistical top-k, else 0; features that choose the keys, and how many keys.
ALL_UNITS, CHOOSING, KEYS = range(25, 28)
LAYER_FIELDS = 28


class Formats(NamedTuple):
    """Which formats occur: None for those that do not, which then are not compiled, else any tuple. pieces: of the
    records that meet floats, the tuple of `multiply_records`. records_stored, groups_stored: not empty where zeros are
    stored."""

    float32: Any
    bfloat16: Any
    int8_records: Any
    int4_records: Any
    int8_groups: Any
    int4_groups: Any
    int8_record_dots: Any
    int4_record_dots: Any
    int8_group_dots: Any
    int4_group_dots: Any
    pieces: Any
    records_stored: Any
    groups_stored: Any


class Plan(NamedTuple):
    """What is computed.

    layers: int64 [threads, layers + 1, LAYER_FIELDS]; products: int64 [products, FIELDS]; thresholds: float32
    [products]; gates: float32 [layers, 2], below which a gate is 0, and the normal quantile of a statistical top-k
    before it; embedding: float32, or uint16 (bf16), [vocabulary, hidden]; norms: float32 [layers, 2, hidden];
    last_norm: [hidden]; head_norms: float32 [layers, 2, head size] or empty; epsilon: of all norms; rotary: float32
    [2, capacity, rotated size]; hidden, size: of the residual stream, of a head; shared_by: query heads per key-value
    head; scaling: of the attention's scores.
    """

    layers: np.ndarray
    products: np.ndarray
    thresholds: np.ndarray
    gates: np.ndarray
    embedding: np.ndarray
    norms: np.ndarray
    last_norm: np.ndarray
    head_norms: np.ndarray
    epsilon: Any
    rotary: np.ndarray
    hidden: int
    size: int
    shared_by: int
    scaling: Any


class Work(NamedTuple):
    """Memory of a decoder. [threads, ...] each thread's own: residual, normed, indices (int32), values, selected
    values, stage, scores, sums. Shared: partial [2, threads, width], mixed, hidden (all inputs of the output and down
    projections, where a selection ranks all of them), keys and values [layers, key-value heads, capacity, head size],
    logits (float32, the threads' shares one after another), finite (float32 [threads], not finite where a thread's
    logits are not), counter, read (int64 [products]: rows that were read). factor: of low-rank corrections, each
    thread's own; moments: float64 [threads, 8], of gates. The last five: each thread's `numba_integer.Scratch`."""

    residual: np.ndarray
    normed: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    everything: np.ndarray
    stage: np.ndarray
    scores: np.ndarray
    sums: np.ndarray
    partial: np.ndarray
    mixed: np.ndarray
    hidden: np.ndarray
    keys: np.ndarray
    cached: np.ndarray
    logits: np.ndarray
    finite: np.ndarray
    counter: np.ndarray
    read: np.ndarray
    factor: np.ndarray
    moments: np.ndarray
    factors: np.ndarray
    maxima: np.ndarray
    units: np.ndarray
    taken: np.ndarray
    integer_sums: np.ndarray


# -- products ----------------------------------------------------------------------------------------------------------


@compiled(inner=True)
def product(row, indices, values, count, out, sums, formats, scratch):  # type: ignore[no-untyped-def]
    """All tiles of one matrix on the calling thread. row: int64 [FIELDS]; values: float32 [1, in]; out: float32
    [1, tiles * tile]; scratch: `numba_integer.Scratch`."""
    _product(row, indices, values, count, out, sums, scratch, *formats)


@compiled(inner=True)
def _product(  # type: ignore[no-untyped-def]
    row, indices, values, count, out, sums, scratch,
    float32, bfloat16, int8_records, int4_records, int8_groups, int4_groups,
    int8_record_dots, int4_record_dots, int8_group_dots, int4_group_dots, pieces, records_stored, groups_stored,
):  # fmt: skip
    """With the formats as arguments: Numba leaves a branch out where an argument is None."""
    kind, shape = row[KIND], (row[TILES], row[INPUTS], row[STRIDE])
    rows = (row[TILES], row[INPUTS], row[TILE])
    if float32 is not None:  # noqa: SIM102
        if kind == FLOAT32:
            _floats(carray(address_of(row[ADDRESS]), rows, np.float32), indices, values, count, out)
    if bfloat16 is not None:  # noqa: SIM102
        if kind == BFLOAT16:
            _floats(carray(address_of(row[ADDRESS]), rows, np.uint16), indices, values, count, out)
    wide = carray(address_of(row[ADDRESS]), shape, np.int8)
    narrow = carray(address_of(row[ADDRESS]), shape, np.uint8)
    if int8_records is not None:  # noqa: SIM102
        if kind == INT8_RECORDS:
            _records(wide, row, BLOCK, indices, values, count, out, pieces, records_stored)
    if int4_records is not None:  # noqa: SIM102
        if kind == INT4_RECORDS:
            _records(narrow, row, BLOCK // 2, indices, values, count, out, pieces, records_stored)
    if int8_record_dots is not None:  # noqa: SIM102
        if kind == INT8_RECORD_DOTS:
            _record_dots(wide, row, BLOCK, indices, values, count, out, records_stored, scratch)
    if int4_record_dots is not None:  # noqa: SIM102
        if kind == INT4_RECORD_DOTS:
            _record_dots(narrow, row, BLOCK // 2, indices, values, count, out, records_stored, scratch)
    groups = (row[TILES], -(-row[INPUTS] // max(1, row[GROUP])), row[TILE])
    scale = carray(address_of(row[SCALES]), groups, np.float32)
    if int8_groups is not None:  # noqa: SIM102
        if kind == INT8_GROUPS:
            zeros = carray(address_of(row[ZEROS]), (groups[0], groups[1], row[STRIDE]), np.int8)
            _groups(wide, scale, zeros, row, BLOCK, indices, values, count, out, sums, groups_stored)
    if int4_groups is not None:  # noqa: SIM102
        if kind == INT4_GROUPS:
            zeros = carray(address_of(row[ZEROS]), (groups[0], groups[1], row[STRIDE]), np.uint8)
            _groups(narrow, scale, zeros, row, BLOCK // 2, indices, values, count, out, sums, groups_stored)
    if int8_group_dots is not None:  # noqa: SIM102
        if kind == INT8_GROUP_DOTS:
            zeros = carray(address_of(row[ZEROS]), (groups[0], groups[1], row[STRIDE]), np.int8)
            _group_dots(wide, scale, zeros, row, BLOCK, indices, values, count, out, groups_stored, scratch)
    if int4_group_dots is not None:  # noqa: SIM102
        if kind == INT4_GROUP_DOTS:
            zeros = carray(address_of(row[ZEROS]), (groups[0], groups[1], row[STRIDE]), np.uint8)
            _group_dots(narrow, scale, zeros, row, BLOCK // 2, indices, values, count, out, groups_stored, scratch)
    if row[BIAS] != 0:
        width = out.shape[1]
        bias = carray(address_of(row[BIAS]), (width,), np.float32)
        for c in range(width):
            out[0, c] += bias[c]


@compiled(inner=True)
def _floats(weight, indices, values, count, out):  # type: ignore[no-untyped-def]
    for t in range(weight.shape[0]):
        multiply_tile(weight, t, indices, values, count, out, (0,), weight.shape[2])


@compiled(inner=True)
def _records(weight, row, block_bytes, indices, values, count, out, pieces, stored):  # type: ignore[no-untyped-def]
    shape = (row[TILE], row[TILE], np.int64(block_bytes), row[SCALES_AT], row[ZEROS_AT])
    for t in range(weight.shape[0]):
        records_tile(weight, t, indices, values, count, out, shape, np.float32(row[MIDDLE]), (0,), pieces, stored)


@compiled(inner=True)
def _record_dots(weight, row, block_bytes, indices, values, count, out, stored, scratch):  # type: ignore[no-untyped-def]
    shape = (row[TILE], np.int64(block_bytes), row[SCALES_AT], row[ZEROS_AT])
    for t in range(weight.shape[0]):
        record_dots(weight, t, indices, values, count, out, shape, np.int32(row[MIDDLE]), stored, scratch)


@compiled(inner=True)
def _groups(weight, scale, zeros, row, block_bytes, indices, values, count, out, sums, stored):  # type: ignore[no-untyped-def]
    shape = (row[TILE], row[TILE], np.int64(block_bytes), row[GROUP])
    zero, own = np.float32(row[MIDDLE]), sums[: row[TILE]]
    for t in range(weight.shape[0]):
        groups_tile(weight, scale, zeros, t, indices, values, count, out, own, shape, zero, (0,), stored)


@compiled(inner=True)
def _group_dots(weight, scale, zeros, row, block_bytes, indices, values, count, out, stored, scratch):  # type: ignore[no-untyped-def]
    shape = (row[TILE], np.int64(block_bytes), row[GROUP])
    for t in range(weight.shape[0]):
        group_dots(
            weight, scale, zeros, t, indices, values, count, out, shape, np.float32(row[MIDDLE]), stored, scratch
        )


@compiled(inner=True)
def _cut(scored, k):  # type: ignore[no-untyped-def]
    """The k-th largest, and how many of those equal to it are kept."""
    cut = np.partition(scored, scored.size - k)[scored.size - k]
    above = 0
    for i in range(scored.size):
        above += scored[i] > cut
    return cut, k - above


@compiled(inner=True)
def select_inputs(row, threshold, x, whole, indices, values, everything):  # type: ignore[no-untyped-def]
    """The active ones of a thread's inputs x (a slice of `whole` from row[FIRST_INPUT] on); returns how many."""
    if row[SELECT] == DENSE:
        indices[: x.size] = everything[: x.size]
        values[: x.size] = x
        return x.size
    score = np.empty(0, np.float32)
    if row[SCORE] != 0:
        score = carray(address_of(row[SCORE]), (row[ALL_INPUTS],), np.float32)
    first = row[FIRST_INPUT]
    if row[SELECT] == THRESHOLD:
        return select(x, score[first : first + x.size] if score.size else score, threshold, 0, indices, values)
    if row[K] == 0:
        return 0
    scored = np.abs(whole) * score if score.size else np.abs(whole)
    cut, ties = _cut(scored, row[K])
    for j in range(first):  # ties of earlier inputs, which other threads keep
        if scored[j] == cut and ties > 0:
            ties -= 1
    return select(x, score[first : first + x.size] if score.size else score, cut, ties, indices, values)


@compiled(inner=True)
def _stage(place, stage, thread, inputs, whole, out, plan, work, formats):  # type: ignore[no-untyped-def]
    """The products of one stage from inputs into out."""
    first, number = place[2 * stage], place[2 * stage + 1]
    indices, values = work.indices[thread], work.values[thread]
    scratch = (
        work.factors[thread], work.maxima[thread], work.units[thread], work.taken[thread], work.integer_sums[thread]
    )  # fmt: skip
    count = 0
    for p in range(first, first + number):
        row = plan.products[p]
        x = inputs[row[INPUTS_AT] : row[INPUTS_AT] + row[INPUTS]]
        if row[SHARES_SELECTION] == 0:
            count = select_inputs(row, plan.thresholds[p], x, whole, indices, values, work.everything)
        work.read[p] += count
        width, at = row[TILES] * row[TILE], row[OUT_AT]
        own = out[at : at + width].reshape(1, -1)
        product(row, indices, values[: x.size].reshape(1, -1), count, own, work.sums[thread], formats, scratch)
        if row[LOW_RANK] > 0:
            _correct(row, thread, x, count, own, plan, work, formats, scratch)


@compiled(inner=True)
def _correct(row, thread, x, count, out, plan, work, formats, scratch):  # type: ignore[no-untyped-def]
    """Add a low-rank product of all inputs, or of those that were not selected, to a product of the others.

    The selection is taken again by those who share it: indices and values are those of the rest here.
    """
    indices, values = work.indices[thread], work.values[thread]
    if row[OF_ALL] != 0:
        indices[: x.size], values[: x.size] = work.everything[: x.size], x
        count = x.size
    else:
        count = _rest(x, indices, values, count)
    right, left = plan.products[row[LOW_RANK]], plan.products[row[LOW_RANK] + 1]
    work.read[row[LOW_RANK]] += count
    work.read[row[LOW_RANK] + 1] += left[INPUTS]
    width = right[TILES] * right[TILE]
    inner = work.factor[thread][:width].reshape(1, -1)
    product(right, indices, values[: x.size].reshape(1, -1), count, inner, work.sums[thread], formats, scratch)
    rank = left[INPUTS]
    reduced = work.factor[thread][:rank].reshape(1, -1)  # of the layout of all other inputs: another compiles another
    added = work.factor[thread][width : width + out.shape[1]].reshape(1, -1)
    product(left, work.everything, reduced, rank, added, work.sums[thread], formats, scratch)
    for c in range(out.shape[1]):
        out[0, c] += added[0, c]


@compiled(inner=True)
def _rest(x, indices, values, count):  # type: ignore[no-untyped-def]
    """In place of the first `count` indices, in order, all others of x; returns how many."""
    taken = np.zeros(x.size, np.uint8)
    for i in range(count):
        taken[indices[i]] = 1
    n = 0
    for j in range(x.size):
        if taken[j] == 0:
            indices[n] = j
            values[n] = x[j]
            n += 1
    return n


@compiled(inner=True)
def _given(row, thread, inputs, work):  # type: ignore[no-untyped-def]
    """The inputs of a product of rows, filled up with zeros to the rows' width."""
    given, count = work.stage[thread][row[OUT_AT] :][: row[TILE]], row[ALL_INPUTS]
    given[:count] = inputs[row[INPUTS_AT] : row[INPUTS_AT] + count]
    given[count:] = 0
    return given


@compiled(inner=True)
def _sparse_up(p, thread, gate, up, inputs, plan, work, formats):  # type: ignore[no-untyped-def]
    """up of the units whose gate is not 0, by dot products of their rows; of the others 0."""
    row, indices, values = plan.products[p], work.indices[thread], work.values[thread]
    count = active_ones(gate, indices)
    _chosen_dots(row, _given(row, thread, inputs, work), indices, count, values, formats[0], formats[1])
    up[:] = 0
    bias = carray(address_of(row[BIAS]), (up.size,), np.float32)
    for i in range(count):
        up[indices[i]] = values[i] + bias[indices[i]] if row[BIAS] != 0 else values[i]
    work.read[p] += count


@compiled(inner=True)
def _chosen_dots(row, x, indices, count, values, float32, bfloat16):  # type: ignore[no-untyped-def]
    shape = (row[INPUTS], row[TILE])
    if float32 is not None:  # noqa: SIM102
        if row[KIND] == FLOAT32:
            chosen_dots(carray(address_of(row[ADDRESS]), shape, np.float32), x, indices, 0, count, values)
    if bfloat16 is not None:  # noqa: SIM102
        if row[KIND] == BFLOAT16:
            chosen_dots(carray(address_of(row[ADDRESS]), shape, np.uint16), x, indices, 0, count, values)


@compiled(inner=True)
def _bundled(p, thread, gate, inputs, out, plan, work, formats):  # type: ignore[no-untyped-def]
    """This thread's share of the down projection, of the units whose gate is not 0: each unit's row of the up
    projection and its column of the down projection lie side by side."""
    row, indices, values = plan.products[p], work.indices[thread], work.values[thread]
    count = active_ones(gate, indices)
    for i in range(count):
        values[i] = gate[indices[i]]
    given, share = _given(row, thread, inputs, work), out[: row[OUTPUTS]]
    _units(row, given, indices, values, count, share, formats[0], formats[1])
    work.read[p] += count


@compiled(inner=True)
def _units(row, x, indices, values, count, out, float32, bfloat16):  # type: ignore[no-untyped-def]
    shape = (row[INPUTS], row[STRIDE] // 4)
    if float32 is not None:  # noqa: SIM102
        if row[KIND] == FLOAT32:
            bundled_units(carray(address_of(row[ADDRESS]), shape, np.float32), x, indices, values, count, out)
    shape = (row[INPUTS], row[STRIDE] // 2)
    if bfloat16 is not None:  # noqa: SIM102
        if row[KIND] == BFLOAT16:
            bundled_units(carray(address_of(row[ADDRESS]), shape, np.uint16), x, indices, values, count, out)


# -- the step ----------------------------------------------------------------------------------------------------------


@compiled(inner=True)
def _add_shares(stage, owned, thread, threads, layer, own, whole, x, meetings, plan, work, formats):  # type: ignore[no-untyped-def]
    """Add all threads' shares of a stage that ends in the residual stream to x, in their order.

    owned: the field that says whether a thread has one; own: this thread's inputs of `whole`, for bundled units their
    gates. Returns the meetings so far, or -1 where a thread did not come.
    """
    place, half = plan.layers[thread, layer], np.int64(stage == DOWN)  # of memory that is not read any more
    if plan.products[place[2 * stage], SELECT] == TOP_K:  # which ranks the inputs of all threads
        meetings += threads
        if not meet(work.counter, meetings):
            return -1
    if place[owned] > 0 and stage == DOWN and place[2 * UNITS_BUNDLED + 1] > 0:
        share, normed = work.partial[half, thread], work.normed[thread]
        _bundled(place[2 * UNITS_BUNDLED], thread, own, normed, share, plan, work, formats)
    elif place[owned] > 0:
        _stage(place, stage, thread, own, whole, work.partial[half, thread], plan, work, formats)
    meetings += threads
    if not meet(work.counter, meetings):
        return -1
    for other in range(threads):
        if plan.layers[other, layer, owned] > 0:
            added = work.partial[half, other]
            for i in range(x.size):
                x[i] += added[i]
    return meetings


@compiled(inner=True)
def _turn(x, cos, sin, choosing):  # type: ignore[no-untyped-def]
    """Rotary embedding of one head; of its parts apart where some features choose the keys."""
    if choosing > 0:
        rotate(x[:choosing], cos[:choosing], sin[:choosing])
        rotate(x[choosing:], cos[choosing:], sin[choosing:])
    else:
        rotate(x, cos, sin)


@compiled(inner=True)
def _shift_gates(gate, count, quantile, thread, threads, meetings, work):  # type: ignore[no-untyped-def]
    """Statistical top-k of the gates of all threads, on this thread's, in place; returns the meetings so far, or -1."""
    sums(gate, work.moments[thread])
    meetings += threads
    if not meet(work.counter, meetings):
        return -1
    total, squares = 0.0, 0.0
    for other in range(threads):
        total += work.moments[other, 0]
        squares += work.moments[other, 1]
    cut, alike = statistical_cut(total, squares, count, quantile)
    shift_down(np.float32(np.inf) if alike else np.float32(cut), gate)
    return meetings


@compiled(inner=True)
def _run(thread, threads, position, token, plan, work, formats):  # type: ignore[no-untyped-def]
    """One thread's part of a token; returns whether all threads came to every meeting."""
    hidden, size, shared_by = plan.hidden, plan.size, plan.shared_by
    x, normed = work.residual[thread][:hidden], work.normed[thread][:hidden]
    stage, scores = work.stage[thread], work.scores[thread]
    for i in range(hidden):
        x[i] = widen(plan.embedding[token, i])
    meetings = 0
    for layer in range(plan.norms.shape[0]):
        place = plan.layers[thread, layer]
        # Attention of this thread's heads.
        rms_norm(x, plan.norms[layer, 0], plan.epsilon, normed)
        _stage(place, QKV, thread, normed, normed, stage, plan, work, formats)
        first, heads = place[FIRST_HEAD], place[HEADS]
        cos, sin = plan.rotary[0, position], plan.rotary[1, position]
        begin = max(0, position + 1 - place[WINDOW]) if place[WINDOW] > 0 else 0
        for head in range(heads):
            key = stage[place[KEY_AT] + head * size : place[KEY_AT] + (head + 1) * size]
            if plan.head_norms.shape[0]:
                rms_norm(key, plan.head_norms[layer, 1], plan.epsilon, key)
            _turn(key, cos, sin, place[CHOOSING])
            work.keys[layer, first + head, position] = key
            value = stage[place[VALUE_AT] + head * size : place[VALUE_AT] + (head + 1) * size]
            work.cached[layer, first + head, position] = value
            keys = work.keys[layer, first + head, begin : position + 1]
            values = work.cached[layer, first + head, begin : position + 1]
            for reader in range(head * shared_by, (head + 1) * shared_by):
                query = stage[place[QUERY_AT] + reader * size : place[QUERY_AT] + (reader + 1) * size]
                if plan.head_norms.shape[0]:
                    rms_norm(query, plan.head_norms[layer, 0], plan.epsilon, query)
                _turn(query, cos, sin, place[CHOOSING])
                at = (first * shared_by + reader) * size
                mixed, own_scores = work.mixed[at : at + size], scores[: position + 1 - begin]
                if place[CHOOSING] > 0:
                    attend_chosen(query, keys, values, place[CHOOSING], place[KEYS], own_scores, mixed)
                else:
                    attend(query, keys, values, plan.scaling, own_scores, mixed)
        own = work.mixed[first * shared_by * size : (first + heads) * shared_by * size]
        meetings = _add_shares(OUTPUT, HEADS, thread, threads, layer, own, work.mixed, x, meetings, plan, work, formats)
        if meetings < 0:
            return False
        # The MLP of this thread's units.
        rms_norm(x, plan.norms[layer, 1], plan.epsilon, normed)
        units, unit = place[UNITS], place[FIRST_UNIT]
        own = work.hidden[unit : unit + units]
        gate = stage[place[GATE_AT] : place[GATE_AT] + units]
        if units > 0:
            _stage(place, GATE_UP, thread, normed, normed, stage, plan, work, formats)
        if place[ALL_UNITS] > 0:
            meetings = _shift_gates(gate, place[ALL_UNITS], plan.gates[layer, 1], thread, threads, meetings, work)
            if meetings < 0:
                return False
        if units > 0:
            up = stage[place[UP_AT] : place[UP_AT] + units]
            activate(place[ACTIVATION], gate)
            if plan.gates[layer, 0] > 0:
                drop_below(plan.gates[layer, 0], gate)
            if place[2 * UP + 1] > 0:
                _sparse_up(place[2 * UP], thread, gate, up, normed, plan, work, formats)
            own[:] = gate
            if place[2 * UNITS_BUNDLED + 1] == 0:
                for i in range(units):
                    own[i] *= up[i]
        meetings = _add_shares(DOWN, UNITS, thread, threads, layer, own, work.hidden, x, meetings, plan, work, formats)
        if meetings < 0:
            return False
    rms_norm(x, plan.last_norm, plan.epsilon, normed)
    place = plan.layers[thread, plan.norms.shape[0]]
    if place[2 * HEAD + 1] > 0:
        _stage(place, HEAD, thread, normed, normed, stage, plan, work, formats)
    own = stage[: place[UNITS]]
    work.logits[place[FIRST_UNIT] : place[FIRST_UNIT] + place[UNITS]] = own
    work.finite[thread] = nothing(own)
    return True


@compiled(parallel=True)
def _step(  # type: ignore[no-untyped-def]
    threads, position, token, plan, work,
    float32, bfloat16, int8_records, int4_records, int8_groups, int4_groups,
    int8_record_dots, int4_record_dots, int8_group_dots, int4_group_dots, pieces, records_stored, groups_stored,
):  # fmt: skip
    came = np.zeros(threads, np.uint8)
    for thread in prange(threads):
        formats = (  # a tuple inside a tuple may not enter a parallel region
            float32, bfloat16, int8_records, int4_records, int8_groups, int4_groups,
            int8_record_dots, int4_record_dots, int8_group_dots, int4_group_dots, pieces, records_stored, groups_stored,
        )  # fmt: skip
        came[thread] = _run(thread, threads, position, token, plan, work, formats)
    return came.all()


def step(threads: int, position: int, token: int, plan: Plan, work: Work, formats: Formats) -> bool:
    """One token at a position; leaves work.logits. Returns whether the threads ran side by side."""
    work.counter[0] = 0
    return bool(_step(threads, position, token, plan, work, *formats))
