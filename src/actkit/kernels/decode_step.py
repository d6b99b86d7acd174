"""One token through the layers of a decoder, in one compiled call.

Each thread is a rank of tensor parallelism: it owns some key-value heads with the query heads that read them, and some
units of every MLP, with the weights of both. So between two norms it needs nobody: query, key and value of its heads,
attention, its inputs' share of the output projection; gate and up of its units, the activation, their share of the
down projection. The shares are summed where threads meet, twice per layer. What is small (the residual stream, norms,
selections) every thread computes for itself, alike to the bit.

All is float32 but the stored weights. The order of sums is fixed for a number of threads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, prange, types
from numba.extending import intrinsic

from actkit.kernels.numba_cpu import multiply_tile, select, widen
from actkit.kernels.numba_integer import group_dots, record_dots
from actkit.kernels.numba_quantized import groups_tile, records_tile
from actkit.kernels.numba_rows import chosen_dots
from actkit.kernels.process import compiled
from actkit.kernels.quantized import BLOCK
from actkit.kernels.team import address_of, meet

# How a matrix is stored and multiplied: integers in records (scales per input) or in groups of inputs, with activations
# in floats, or in fixed point (dots).
FLOAT32, BFLOAT16 = range(2)
INT8_RECORDS, INT4_RECORDS, INT8_GROUPS, INT4_GROUPS = range(2, 6)
INT8_RECORD_DOTS, INT4_RECORD_DOTS, INT8_GROUP_DOTS, INT4_GROUP_DOTS = range(6, 10)
KINDS = 10
QKV, OUTPUT, GATE_UP, DOWN, HEAD, UP = range(6)  # the products of a layer; the output layer; up behind a sparse gate
DENSE, THRESHOLD, TOP_K = range(3)  # how inputs are selected
SILU, RELU, GELU, GELU_TANH, RELU2 = range(5)

# Fields of a product, int64. A row of zeros is a product that a thread has no share in.
KIND, ADDRESS, TILES, INPUTS, STRIDE, TILE, SCALES_AT, ZEROS_AT, GROUP = range(9)
SCALES, ZEROS, BIAS, OUT_AT, SELECT, K, SCORE, FIRST_INPUT, ALL_INPUTS, SHARES_SELECTION, MIDDLE = range(9, 20)
FIELDS = 20
# Fields of a layer and thread, int64: the first product and the number of products of each stage, then places.
PLACES = 12
QUERY_AT, KEY_AT, VALUE_AT, GATE_AT, UP_AT, WINDOW, FIRST_HEAD, HEADS, UNITS, FIRST_UNIT, ACTIVATION = range(PLACES, 23)
LAYER_FIELDS = 23


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
    [products]; embedding: float32, or uint16 (bf16), [vocabulary, hidden]; norms: float32 [layers, 2, hidden];
    last_norm: [hidden]; head_norms: float32 [layers, 2, head size] or empty; epsilon: of all norms; rotary: float32
    [2, capacity, rotated size]; hidden, size: of the residual stream, of a head; shared_by: query heads per key-value
    head; scaling: of the attention's scores.
    """

    layers: np.ndarray
    products: np.ndarray
    thresholds: np.ndarray
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
    logits are not), counter, read (float64 [threads, 3]: bytes of rows that were read, of how many, over selecting
    products; and over all). The last five: each thread's `numba_integer.Scratch`."""

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
    factors: np.ndarray
    maxima: np.ndarray
    units: np.ndarray
    taken: np.ndarray
    integer_sums: np.ndarray


_ORDERLESS = {"reassoc"}
_LOOSE = {"reassoc", "contract", "nsz"}  # sums in vector lanes; still the same bits in every run


# -- element by element ------------------------------------------------------------------------------------------------


@intrinsic
def _from_bits(typingctx, bits):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@compiled(inline=True)
def exponential(x):  # type: ignore[no-untyped-def]
    """e^x in float32 to two units in the last place, in operations that vectorise."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.float32(math.floor(x * np.float32(1.4426950408889634) + np.float32(0.5)))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1.0)) * _from_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@compiled()
def activate(code, gate, up, out):  # type: ignore[no-untyped-def]
    """out = f(gate) * up."""
    one, half = np.float32(1.0), np.float32(0.5)
    if code == SILU:
        for i in range(gate.size):
            out[i] = gate[i] / (one + exponential(-gate[i])) * up[i]
    elif code == RELU:
        for i in range(gate.size):
            out[i] = max(gate[i], np.float32(0.0)) * up[i]
    elif code == RELU2:
        for i in range(gate.size):
            positive = max(gate[i], np.float32(0.0))
            out[i] = positive * positive * up[i]
    elif code == GELU:
        for i in range(gate.size):
            out[i] = half * gate[i] * (one + np.float32(math.erf(gate[i] * np.float32(0.7071067811865476)))) * up[i]
    else:
        for i in range(gate.size):
            g = gate[i]
            inner = np.float32(0.7978845608028654) * (g + np.float32(0.044715) * g * g * g)
            out[i] = half * g * (one + np.float32(math.tanh(inner))) * up[i]


@compiled(fastmath=_LOOSE)
def _squares(x):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * x[i]
    return total


@compiled(fastmath=_ORDERLESS)
def _nothing(x):  # type: ignore[no-untyped-def]
    """0, or NaN where an entry is not finite."""
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * np.float32(0.0)
    return total


@compiled()
def rms_norm(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """x over its root mean square, times weight."""
    scale = np.float32(1.0) / np.sqrt(_squares(x) / np.float32(x.size) + epsilon)
    for i in range(x.size):
        out[i] = x[i] * scale * weight[i]


@compiled()
def rotate(x, cos, sin):  # type: ignore[no-untyped-def]
    """Rotary embedding of one head, in place: entry i is paired with i + half."""
    half = cos.size // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = a * cos[i] - b * sin[i]
        x[i + half] = b * cos[i + half] + a * sin[i + half]


# -- attention ---------------------------------------------------------------------------------------------------------


@compiled(fastmath=_LOOSE)
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@compiled(fastmath=_LOOSE)
def _softmax(scores):  # type: ignore[no-untyped-def]
    """In place, not divided by the sum, which is returned."""
    largest = scores[0]
    for i in range(scores.size):
        largest = max(largest, scores[i])
    total = np.float32(0.0)
    for i in range(scores.size):
        scores[i] = exponential(scores[i] - largest)
        total += scores[i]
    return total


@compiled()
def attend(query, keys, values, scaling, scores, out):  # type: ignore[no-untyped-def]
    """One head: query [size]; keys, values [tokens, size]; scores [tokens]; out [size]."""
    for t in range(len(keys)):
        scores[t] = _dot(query, keys[t]) * scaling
    total = _softmax(scores)
    out[:] = 0
    for t in range(len(values)):
        chance, row = scores[t] / total, values[t]
        for i in range(out.size):
            out[i] += chance * row[i]


# -- products ----------------------------------------------------------------------------------------------------------


@compiled()
def product(row, indices, values, count, out, sums, formats, scratch):  # type: ignore[no-untyped-def]
    """All tiles of one matrix on the calling thread. row: int64 [FIELDS]; values: float32 [1, in]; out: float32
    [1, tiles * tile]; scratch: `numba_integer.Scratch`."""
    _product(row, indices, values, count, out, sums, scratch, *formats)


@compiled()
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


@compiled()
def _floats(weight, indices, values, count, out):  # type: ignore[no-untyped-def]
    for t in range(weight.shape[0]):
        multiply_tile(weight, t, indices, values, count, out, (0,), weight.shape[2])


@compiled()
def _records(weight, row, block_bytes, indices, values, count, out, pieces, stored):  # type: ignore[no-untyped-def]
    shape = (row[TILE], row[TILE], np.int64(block_bytes), row[SCALES_AT], row[ZEROS_AT])
    for t in range(weight.shape[0]):
        records_tile(weight, t, indices, values, count, out, shape, np.float32(row[MIDDLE]), (0,), pieces, stored)


@compiled()
def _record_dots(weight, row, block_bytes, indices, values, count, out, stored, scratch):  # type: ignore[no-untyped-def]
    shape = (row[TILE], np.int64(block_bytes), row[SCALES_AT], row[ZEROS_AT])
    for t in range(weight.shape[0]):
        record_dots(weight, t, indices, values, count, out, shape, np.int32(row[MIDDLE]), stored, scratch)


@compiled()
def _groups(weight, scale, zeros, row, block_bytes, indices, values, count, out, sums, stored):  # type: ignore[no-untyped-def]
    shape = (row[TILE], row[TILE], np.int64(block_bytes), row[GROUP])
    zero, own = np.float32(row[MIDDLE]), sums[: row[TILE]]
    for t in range(weight.shape[0]):
        groups_tile(weight, scale, zeros, t, indices, values, count, out, own, shape, zero, (0,), stored)


@compiled()
def _group_dots(weight, scale, zeros, row, block_bytes, indices, values, count, out, stored, scratch):  # type: ignore[no-untyped-def]
    shape = (row[TILE], np.int64(block_bytes), row[GROUP])
    for t in range(weight.shape[0]):
        group_dots(
            weight, scale, zeros, t, indices, values, count, out, shape, np.float32(row[MIDDLE]), stored, scratch
        )


@compiled()
def _cut(scored, k):  # type: ignore[no-untyped-def]
    """The k-th largest, and how many of those equal to it are kept."""
    cut = np.partition(scored, scored.size - k)[scored.size - k]
    above = 0
    for i in range(scored.size):
        above += scored[i] > cut
    return cut, k - above


@compiled()
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


@compiled()
def _stage(place, stage, thread, x, whole, out, plan, work, formats):  # type: ignore[no-untyped-def]
    """The products of one stage from inputs x into out."""
    first, number = place[2 * stage], place[2 * stage + 1]
    indices, values = work.indices[thread], work.values[thread]
    scratch = (
        work.factors[thread], work.maxima[thread], work.units[thread], work.taken[thread], work.integer_sums[thread]
    )  # fmt: skip
    count = 0
    for p in range(first, first + number):
        row = plan.products[p]
        if row[SHARES_SELECTION] == 0:
            count = select_inputs(row, plan.thresholds[p], x, whole, indices, values, work.everything)
        work.read[thread, 2] += count * row[TILES] * row[STRIDE]
        if row[SELECT] != DENSE:
            work.read[thread, 0] += count * row[TILES] * row[STRIDE]
            work.read[thread, 1] += x.size * row[TILES] * row[STRIDE]
        width = row[TILES] * row[TILE]
        at = row[OUT_AT]
        product(
            row,
            indices,
            values[: x.size].reshape(1, -1),
            count,
            out[at : at + width].reshape(1, -1),
            work.sums[thread],
            formats,
            scratch,
        )


@compiled()
def _sparse_up(row, thread, gate, up, x, work, formats):  # type: ignore[no-untyped-def]
    """up of the units whose gate is above 0, by dot products of their rows; of the others 0."""
    indices, values = work.indices[thread], work.values[thread]
    given = work.stage[thread][row[OUT_AT] :][: row[TILE]]
    count = 0
    for unit in range(gate.size):
        indices[count] = unit  # overwritten by the next where it is not kept
        count += not gate[unit] <= 0
    given[: x.size] = x
    given[x.size :] = 0
    _chosen_dots(row, given, indices, count, values, formats[0], formats[1])
    up[:] = 0
    bias = carray(address_of(row[BIAS]), (up.size,), np.float32)
    for i in range(count):
        up[indices[i]] = values[i] + bias[indices[i]] if row[BIAS] != 0 else values[i]
    work.read[thread, 0] += count * row[STRIDE]
    work.read[thread, 1] += up.size * row[STRIDE]
    work.read[thread, 2] += count * row[STRIDE]


@compiled()
def _chosen_dots(row, x, indices, count, values, float32, bfloat16):  # type: ignore[no-untyped-def]
    shape = (row[INPUTS], row[TILE])
    if float32 is not None:  # noqa: SIM102
        if row[KIND] == FLOAT32:
            chosen_dots(carray(address_of(row[ADDRESS]), shape, np.float32), x, indices, 0, count, values)
    if bfloat16 is not None:  # noqa: SIM102
        if row[KIND] == BFLOAT16:
            chosen_dots(carray(address_of(row[ADDRESS]), shape, np.uint16), x, indices, 0, count, values)


# -- the step ----------------------------------------------------------------------------------------------------------


@compiled()
def _add_shares(stage, owned, thread, threads, layer, own, whole, x, meetings, plan, work, formats):  # type: ignore[no-untyped-def]
    """Add all threads' shares of a stage that ends in the residual stream to x, in their order.

    owned: the field that says whether a thread has one; own: this thread's inputs of `whole`. Returns the meetings so
    far, or -1 where a thread did not come.
    """
    place, half = plan.layers[thread, layer], np.int64(stage == DOWN)  # of memory that is not read any more
    if plan.products[place[2 * stage], SELECT] == TOP_K:  # which ranks the inputs of all threads
        meetings += threads
        if not meet(work.counter, meetings):
            return -1
    if place[owned] > 0:
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


@compiled()
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
            rotate(key, cos, sin)
            work.keys[layer, first + head, position] = key
            value = stage[place[VALUE_AT] + head * size : place[VALUE_AT] + (head + 1) * size]
            work.cached[layer, first + head, position] = value
            keys = work.keys[layer, first + head, begin : position + 1]
            values = work.cached[layer, first + head, begin : position + 1]
            for reader in range(head * shared_by, (head + 1) * shared_by):
                query = stage[place[QUERY_AT] + reader * size : place[QUERY_AT] + (reader + 1) * size]
                if plan.head_norms.shape[0]:
                    rms_norm(query, plan.head_norms[layer, 0], plan.epsilon, query)
                rotate(query, cos, sin)
                at = (first * shared_by + reader) * size
                attend(query, keys, values, plan.scaling, scores[: position + 1 - begin], work.mixed[at : at + size])
        own = work.mixed[first * shared_by * size : (first + heads) * shared_by * size]
        meetings = _add_shares(OUTPUT, HEADS, thread, threads, layer, own, work.mixed, x, meetings, plan, work, formats)
        if meetings < 0:
            return False
        # The MLP of this thread's units.
        rms_norm(x, plan.norms[layer, 1], plan.epsilon, normed)
        units, unit = place[UNITS], place[FIRST_UNIT]
        own = work.hidden[unit : unit + units]
        if units > 0:
            _stage(place, GATE_UP, thread, normed, normed, stage, plan, work, formats)
            gate = stage[place[GATE_AT] : place[GATE_AT] + units]
            up = stage[place[UP_AT] : place[UP_AT] + units]
            if place[2 * UP + 1] > 0:
                _sparse_up(plan.products[place[2 * UP]], thread, gate, up, normed, work, formats)
            activate(place[ACTIVATION], gate, up, own)
        meetings = _add_shares(DOWN, UNITS, thread, threads, layer, own, work.hidden, x, meetings, plan, work, formats)
        if meetings < 0:
            return False
    rms_norm(x, plan.last_norm, plan.epsilon, normed)
    place = plan.layers[thread, plan.norms.shape[0]]
    if place[2 * HEAD + 1] > 0:
        _stage(place, HEAD, thread, normed, normed, stage, plan, work, formats)
    own = stage[: place[UNITS]]
    work.logits[place[FIRST_UNIT] : place[FIRST_UNIT] + place[UNITS]] = own
    work.finite[thread] = _nothing(own)
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
