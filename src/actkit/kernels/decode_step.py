"""One token through the layers of a decoder, in one compiled call.

Each thread is a rank of tensor parallelism: it owns some key-value heads with the query heads that read them, and some
units of every MLP, with the weights of both. So between two norms it works alone: query, key and value of its heads,
attention, its inputs' share of the output projection; gate and up of its units, the activation, their share of the
down projection. The shares are summed when threads meet, twice per layer. What is small (the residual stream, norms,
selections) every thread computes for itself, alike to the bit.

All is float32 but the stored weights. The order of sums is fixed for a number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, prange

from actkit.kernels.decode_attention import attention, turn
from actkit.kernels.decode_latent import (
    EXPANDED,
    NARROW_WIDTH,
    NOPE,
    PADDED,
    RANK,
    ROPE,
    SPREAD,
    VALUE,
    attend_to_rows,
)
from actkit.kernels.decode_math import (
    POLY_NORM,
    activate,
    active_ones,
    cap,
    drop_below,
    layer_norm,
    normed_powers,
    nothing,
    power_sums,
    rms_norm,
    shift_down,
    statistical_cut,
    sums,
)
from actkit.kernels.decode_places import (  # noqa: F401 (all fields of a layer are found here)
    ABSORB,
    ACTIVATION,
    ALL_UNITS,
    CHOOSING,
    DOWN,
    EXPAND,
    FIRST_HEAD,
    FIRST_LATENT,
    FIRST_NARROW,
    FIRST_UNIT,
    GATE_AT,
    GATE_UP,
    HALVES,
    HEAD,
    HEADS,
    KEY_AT,
    KEY_STEP,
    KEYS,
    LATENT,
    LAYER_FIELDS,
    NARROW,
    NEIGHBOURS,
    OUTPUT,
    PLACES,
    QKV,
    QUERIES,
    QUERY_AT,
    QUERY_STEP,
    ROTARY,
    STAGES,
    TURN,
    UNITS,
    UNITS_BUNDLED,
    UNTURNED,
    UP,
    UP_AT,
    VALUE_AT,
    WINDOW,
)
from actkit.kernels.decode_products import (
    ALL_INPUTS,
    BIAS,
    FIRST_INPUT,
    FUNCTION,
    INPUTS,
    INPUTS_AT,
    LOW_RANK,
    OF_ALL,
    OUT_AT,
    SCORE,
    SELECT,
    SHARES_SELECTION,
    TILE,
    TILES,
    K,
    call,
)
from actkit.kernels.numba_cpu import select, widen
from actkit.kernels.process import compiled
from actkit.kernels.team import address_of, meet, stand_apart

DENSE, THRESHOLD, TOP_K = range(3)  # how inputs are selected
ONE_BY_ONE, ONE_NORM, TWO_NORMS = range(3)  # MLP behind attention, or beside it: both behind one norm, or one each


class StepPlan(NamedTuple):
    """What is computed.

    Attributes:
        layers: int64 [threads, layers + 1, LAYER_FIELDS].
        products: int64 [products, FIELDS].
        thresholds: float32 [products].
        gates: float32 [layers, 2], below which a gate is 0, and the normal quantile of a statistical top-k before it.
        curves: float32 [layers, groups, 10], coefficients of learned activation functions.
        widths: int64 [layers], units of a group of them.
        norms: float32 [layers, 2, hidden], of the norms before attention and MLP.
        biases: float32 [layers, 2, hidden], of the same.
        last_norm: float32 [hidden].
        last_bias: float32 [hidden].
        behind: float32 [layers, 2, hidden], of norms behind attention and MLP, or empty.
        before: whether there are norms before.
        centered: whether norms subtract the mean.
        beside: whether the MLP stands beside attention, ONE_BY_ONE, ONE_NORM or TWO_NORMS.
        head_norms: float32 [layers, 2, head size], [layers, 2, all heads' size] for norms over all heads, or empty.
        epsilon: of all norms.
        rotary: float32 [tables, 2, capacity, rotated size].
        positions: float32 [capacity, hidden], added to embeddings, or empty.
        hidden: size of the residual stream.
        size: of a head.
        shared_by: query heads per key-value head.
        scaling: of the attention's scores.
        limit: to which query, key and value are clamped; 0 for not at all.
        cap: at which tanh caps scores; 0 for not at all.
        cut_from: the tokens from which threads share all heads out by keys; 0 for never.
        embedding: what multiplies embeddings.
        added: what multiplies what is added to the residual stream.
        scaled: what multiplies logits.
        capped: at which tanh caps logits; 0 for not at all.
        latent: int64 [8], the sizes of latent attention (`decode_latent.LatentPlan`); zeros for another.
        latent_norms: float32 [layers, rank], of what is cached.
        narrow_norms: float32 [layers, narrow], of what queries go through.
    """

    layers: np.ndarray
    products: np.ndarray
    thresholds: np.ndarray
    gates: np.ndarray
    curves: np.ndarray
    widths: np.ndarray
    norms: np.ndarray
    biases: np.ndarray
    last_norm: np.ndarray
    last_bias: np.ndarray
    behind: np.ndarray
    before: bool
    centered: bool
    beside: int
    head_norms: np.ndarray
    epsilon: Any
    rotary: np.ndarray
    positions: np.ndarray
    hidden: int
    size: int
    shared_by: int
    scaling: Any
    limit: Any
    cap: Any
    cut_from: int
    embedding: Any
    added: Any
    scaled: Any
    capped: Any
    latent: np.ndarray
    latent_norms: np.ndarray
    narrow_norms: np.ndarray


class Work(NamedTuple):
    """Memory of a decoder. What begins with [threads] is each thread's own; the rest is shared.

    Attributes:
        embedded: float32 [hidden], of the token.
        residual: float32 [threads, hidden].
        normed: float32 [threads, hidden].
        indices: int32 [threads, inputs], those that are selected.
        values: float32 [threads, inputs], of these.
        everything: int32 [inputs], the indices of all inputs.
        stage: float32 [threads, width].
        scores: float32 [threads, readers of a key-value head * capacity].
        queries: float32, of all heads, turned.
        parts: float32 [threads, 2, width], what a thread found of key-value heads that are cut, its first and its last.
        found: float32 [threads, 3, readers, 2], of these and another the largest scores and the sums of exponentials.
        partial: float32 [2, threads, width], the shares that are summed.
        mixed: float32, all inputs of the output projection, for a selection that ranks all of them.
        hidden: float32, all inputs of the down projection, for the same.
        keys: uint8 [layers, key-value heads, capacity, bytes of a head], of float32, bfloat16 or codes of 8 bits.
        cached: the values, alike.
        key_scales: float32 [layers, key-value heads, capacity] of codes; [.., 0] without.
        value_scales: the same.
        functions: int64 [3], addresses of what keeps and reads such a cache (`decode_attention.functions_of`).
        logits: float32 [vocabulary], the threads' shares one after another.
        finite: float32 [threads], not finite if a thread's logits are not.
        counter: int64, of the meetings.
        read: int64 [products], rows that were read.
        factor: float32 [threads, 2 * width], of low-rank corrections.
        moments: float64 [threads, 8], of gates.
        polynomials: float32 [threads, 1, 10], of functions that normalise powers of all gates, for the token at hand.
        cores: int64 [threads, 8], where the threads run (`team.stand_apart`).
        allowed: int64, the cores that they may use, or empty.
        memory: int64 [threads, 6], each thread's `decode_products.Memory.addresses`.
        latent_cache: of latent attention (`decode_latent.LatentWork`), as the nine below.
        latent_shared: the same.
        latent_own: the same.
        latent_queries: the same.
        latent_absorbed: the same.
        latent_mixed: the same.
        latent_scores: the same.
        latent_state: the same.
        latent_keys: the same.
        latent_values: the same.
    """

    embedded: np.ndarray
    residual: np.ndarray
    normed: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    everything: np.ndarray
    stage: np.ndarray
    scores: np.ndarray
    queries: np.ndarray
    parts: np.ndarray
    found: np.ndarray
    partial: np.ndarray
    mixed: np.ndarray
    hidden: np.ndarray
    keys: np.ndarray
    cached: np.ndarray
    key_scales: np.ndarray
    value_scales: np.ndarray
    functions: np.ndarray
    logits: np.ndarray
    finite: np.ndarray
    counter: np.ndarray
    read: np.ndarray
    factor: np.ndarray
    moments: np.ndarray
    polynomials: np.ndarray
    cores: np.ndarray
    allowed: np.ndarray
    memory: np.ndarray
    latent_cache: np.ndarray
    latent_shared: np.ndarray
    latent_own: np.ndarray
    latent_queries: np.ndarray
    latent_absorbed: np.ndarray
    latent_mixed: np.ndarray
    latent_scores: np.ndarray
    latent_state: np.ndarray
    latent_keys: np.ndarray
    latent_values: np.ndarray


# -- products ----------------------------------------------------------------------------------------------------------


@compiled(inner=True)
def product(row, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
    """Multiply with all tiles of one matrix on the calling thread.

    Args:
        row: int64 [FIELDS].
        indices: int32, the active inputs.
        values: float32 [in].
        count: how many are active.
        out: float32 [tiles * tile], written.
        memory: `decode_products.Memory.addresses`.
    """
    call(row[FUNCTION], row, values, indices, values, np.int64(count), out, memory)
    if row[BIAS] != 0:
        bias = carray(address_of(row[BIAS]), (out.size,), np.float32)
        for c in range(out.size):
            out[c] += bias[c]


@compiled(inner=True)
def _cut(scored, k):  # type: ignore[no-untyped-def]
    """Return the k-th largest, and how many of those equal to it are kept."""
    cut = np.partition(scored, scored.size - k)[scored.size - k]
    above = 0
    for i in range(scored.size):
        above += scored[i] > cut
    return cut, k - above


@compiled(inner=True)
def select_inputs(row, threshold, x, whole, indices, values, everything):  # type: ignore[no-untyped-def]
    """Select the active ones of a thread's inputs x (a slice of `whole` from row[FIRST_INPUT] on); return how many."""
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
def _stage(place, stage, thread, inputs, whole, out, plan, work):  # type: ignore[no-untyped-def]
    """Compute the products of one stage from inputs into out."""
    first, number = place[2 * stage], place[2 * stage + 1]
    indices, values, memory = work.indices[thread], work.values[thread], work.memory[thread]
    count = 0
    for p in range(first, first + number):
        row = plan.products[p]
        x = inputs[row[INPUTS_AT] : row[INPUTS_AT] + row[INPUTS]]
        if row[SHARES_SELECTION] == 0:
            count = select_inputs(row, plan.thresholds[p], x, whole, indices, values, work.everything)
        work.read[p] += count
        own = out[row[OUT_AT] : row[OUT_AT] + row[TILES] * row[TILE]]
        product(row, indices, values, count, own, memory)
        if row[LOW_RANK] > 0:
            correct(row, thread, x, count, own, plan, work)


@compiled(inner=True)
def correct(row, thread, x, count, out, plan, work):  # type: ignore[no-untyped-def]
    """Add a low-rank product of all inputs, or of those that were not selected, to a product of the others."""
    # The selection is taken again by those who share it: indices and values are those of the rest here.
    indices, values, memory = work.indices[thread], work.values[thread], work.memory[thread]
    if row[OF_ALL] != 0:
        indices[: x.size], values[: x.size] = work.everything[: x.size], x
        count = x.size
    else:
        count = _rest(x, indices, values, count)
    right, left = plan.products[row[LOW_RANK]], plan.products[row[LOW_RANK] + 1]
    work.read[row[LOW_RANK]] += count
    work.read[row[LOW_RANK] + 1] += left[INPUTS]
    width = right[TILES] * right[TILE]
    inner = work.factor[thread][:width]
    product(right, indices, values, count, inner, memory)
    added = work.factor[thread][width : width + out.size]
    product(left, work.everything, inner, left[INPUTS], added, memory)
    for c in range(out.size):
        out[c] += added[c]


@compiled(inner=True)
def _rest(x, indices, values, count):  # type: ignore[no-untyped-def]
    """Put all others of x, in order, in place of the first `count` indices; return how many."""
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
    """Return the inputs of a product of rows, filled up with zeros to the rows' width."""
    given, count = work.stage[thread][row[OUT_AT] :][: row[TILE]], row[ALL_INPUTS]
    given[:count] = inputs[row[INPUTS_AT] : row[INPUTS_AT] + count]
    given[count:] = 0
    return given


@compiled(inner=True)
def sparse_up(p, thread, gate, up, inputs, plan, work):  # type: ignore[no-untyped-def]
    """Compute up of the units whose gate is not 0, by dot products of their rows; of the others it is 0."""
    row, indices, found = plan.products[p], work.indices[thread], work.values[thread]
    count = active_ones(gate, indices)
    call(row[FUNCTION], row, _given(row, thread, inputs, work), indices, found, count, found, work.memory[thread])
    up[:] = 0
    bias = carray(address_of(row[BIAS]), (up.size,), np.float32)
    for i in range(count):
        up[indices[i]] = found[i] + bias[indices[i]] if row[BIAS] != 0 else found[i]
    work.read[p] += count


@compiled(inner=True)
def bundled(p, thread, gate, inputs, out, plan, work):  # type: ignore[no-untyped-def]
    """Compute this thread's share of the down projection, of the units whose gate is not 0."""
    # Each unit's row of the up projection and its column of the down projection lie side by side.
    row, indices, values = plan.products[p], work.indices[thread], work.values[thread]
    count = active_ones(gate, indices)
    for i in range(count):
        values[i] = gate[indices[i]]
    call(row[FUNCTION], row, _given(row, thread, inputs, work), indices, values, count, out, work.memory[thread])
    work.read[p] += count


# -- the step ----------------------------------------------------------------------------------------------------------


@compiled(inner=True)
def norm(x, weight, bias, plan, out):  # type: ignore[no-untyped-def]
    """Apply the plan's norm; out may be x."""
    if plan.centered:
        layer_norm(x, weight, bias, plan.epsilon, out)
    else:
        rms_norm(x, weight, plan.epsilon, out)


@compiled(inner=True)
def _add_shares(stage, owned, thread, threads, layer, own, whole, x, meetings, plan, work):  # type: ignore[no-untyped-def]
    """Add all threads' shares of a stage that ends in the residual stream to x, in their order.

    owned: the field that says whether a thread has one; own: this thread's inputs of `whole`, for bundled units their
    gates. Returns the meetings so far, or -1 if a thread did not come.
    """
    place, half = plan.layers[thread, layer], np.int64(stage == DOWN)  # of memory that is not read any more
    if plan.products[place[2 * stage], SELECT] == TOP_K:  # which ranks the inputs of all threads
        meetings += threads
        if not meet(work.counter, meetings):
            return -1
    if place[owned] > 0 and stage == DOWN and place[2 * UNITS_BUNDLED + 1] > 0:
        share, normed = work.partial[half, thread], work.normed[thread]
        bundled(place[2 * UNITS_BUNDLED], thread, own, normed, share, plan, work)
    elif place[owned] > 0:
        _stage(place, stage, thread, own, whole, work.partial[half, thread], plan, work)
    meetings += threads
    if not meet(work.counter, meetings):
        return -1
    if plan.behind.shape[0] == 0:
        for other in range(threads):
            if plan.layers[other, layer, owned] > 0:
                added = work.partial[half, other]
                for i in range(x.size):
                    x[i] += added[i] * plan.added
        return meetings
    total = work.stage[thread][: x.size]  # what was in it has been read
    total[:] = 0
    for other in range(threads):
        if plan.layers[other, layer, owned] > 0:
            added = work.partial[half, other]
            for i in range(x.size):
                total[i] += added[i]
    norm(total, plan.behind[layer, half], plan.last_bias[:0], plan, total)
    for i in range(x.size):
        x[i] += total[i] * plan.added
    return meetings


@compiled(inner=True)
def _shift_gates(gate, count, quantile, thread, threads, meetings, work):  # type: ignore[no-untyped-def]
    """Take the statistical top-k of all threads' gates on this thread's, in place; return the meetings, or -1."""
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
def _norm_powers(gate, count, row, thread, threads, meetings, work):  # type: ignore[no-untyped-def]
    """Find the polynomial that normalised powers of all threads' gates are; return the meetings, or -1."""
    power_sums(gate, row, work.moments[thread])
    meetings += threads
    if not meet(work.counter, meetings):
        return -1
    normed_powers(row, work.moments[:threads], count, work.polynomials[thread, 0])
    return meetings


@compiled(inner=True)
def _latent(thread, threads, layer, position, normed, meetings, plan, work):  # type: ignore[no-untyped-def]
    """Do latent attention with this thread's heads, up to the output projection; return the meetings, or -1."""
    place, own, shared = plan.layers[thread, layer], work.latent_own[thread], work.latent_shared
    stage, sizes, heads = work.stage[thread], plan.latent, place[HEADS]
    narrow, rank, rope, nope, value = sizes[NARROW_WIDTH], sizes[RANK], sizes[ROPE], sizes[NOPE], sizes[VALUE]
    _stage(place, QKV, thread, normed, normed, stage, plan, work)
    for i in range(place[NARROW]):
        shared[place[FIRST_NARROW] + i] = stage[place[KEY_AT] + i]
    for i in range(place[LATENT]):
        shared[narrow + place[FIRST_LATENT] + i] = stage[place[VALUE_AT] + i]
    meetings += threads
    if not meet(work.counter, meetings):
        return -1
    latent, key = own[narrow : narrow + rank], own[narrow + rank :]
    rms_norm(shared[narrow : narrow + rank], plan.latent_norms[layer], plan.epsilon, latent)
    key[:] = shared[narrow + rank :]
    cos, sin = plan.rotary[0, 0, position], plan.rotary[0, 1, position]
    turn(key, cos, sin, place[TURN], 0)
    if narrow > 0:
        rms_norm(shared[:narrow], plan.narrow_norms[layer], plan.epsilon, own[:narrow])
        _stage(place, QUERIES, thread, own[:narrow], own[:narrow], stage, plan, work)
    every = stage[place[QUERY_AT] : place[QUERY_AT] + heads * (nope + rope)]
    for head in range(heads):
        turn(every[head * (nope + rope) + nope : (head + 1) * (nope + rope)], cos, sin, place[TURN], 0)
    first, out = place[FIRST_HEAD], work.latent_absorbed[thread]
    largest, total, scores = work.latent_state[thread, 0], work.latent_state[thread, 1], work.latent_scores[thread]
    if sizes[EXPANDED] > 0:
        _stage(place, ABSORB, thread, latent, latent, out, plan, work)
        for head in range(heads):
            keys, values = work.latent_keys[layer, first + head], work.latent_values[layer, first + head]
            begin = head * (nope + value)
            keys[position, :nope], keys[position, nope:] = out[begin : begin + nope], key
            values[position] = out[begin + nope : begin + nope + value]
            query = every[head * (nope + rope) : (head + 1) * (nope + rope)].reshape(1, nope + rope)
            mixed = work.mixed[(first + head) * value : (first + head + 1) * value]
            keys, values = keys[: position + 1], values[: position + 1]
            attend_to_rows(query, keys, values, value, plan.scaling, scores, largest, total, mixed)
        return meetings
    row = work.latent_cache[layer, position]
    row[:] = own[narrow:]  # every thread writes the same numbers
    queries, sums = work.latent_queries[thread], work.latent_mixed[thread]
    _stage(place, ABSORB, thread, every, every, out, plan, work)
    for head in range(heads):
        queries[head, :rank] = out[head * sizes[PADDED] : head * sizes[PADDED] + rank]
        queries[head, rank:] = every[head * (nope + rope) + nope : (head + 1) * (nope + rope)]
    rows = work.latent_cache[layer, : position + 1]
    attend_to_rows(queries[:heads], rows, rows, rank, plan.scaling, scores, largest, total, sums[: heads * rank])
    _stage(place, EXPAND, thread, sums, sums, out, plan, work)
    for head in range(heads):
        at = (first + head) * value
        work.mixed[at : at + value] = out[head * sizes[SPREAD] : head * sizes[SPREAD] + value]
    return meetings


@compiled(inner=True)
def _run(thread, threads, position, plan, work):  # type: ignore[no-untyped-def]
    """Do one thread's part of a token; return whether all threads came to every meeting."""
    hidden, wide = plan.hidden, plan.shared_by * plan.size
    x, normed, stage = work.residual[thread][:hidden], work.normed[thread][:hidden], work.stage[thread]
    for i in range(hidden):
        x[i] = work.embedded[i] * plan.embedding
    if plan.positions.shape[0] > 0:
        x += plan.positions[position]
    meetings = stand_apart(thread, threads, work.counter, 0, work.cores, work.allowed)
    if meetings < 0:
        return False
    for layer in range(plan.norms.shape[0]):
        place = plan.layers[thread, layer]
        # Attention of this thread's heads.
        if plan.before:
            norm(x, plan.norms[layer, 0], plan.biases[layer, 0], plan, normed)
        else:
            normed[:] = x
        if plan.latent[RANK] > 0:
            meetings = _latent(thread, threads, layer, position, normed, meetings, plan, work)
        else:
            _stage(place, QKV, thread, normed, normed, stage, plan, work)
            meetings = attention(place, layer, thread, threads, position, meetings, plan, work)
        if meetings < 0:
            return False
        if plan.beside == TWO_NORMS:  # what the MLP reads, before anything is added
            norm(x, plan.norms[layer, 1], plan.biases[layer, 1], plan, normed)
        first, heads = place[FIRST_HEAD], place[HEADS]
        own = work.mixed[first * wide : (first + heads) * wide]
        meetings = _add_shares(OUTPUT, HEADS, thread, threads, layer, own, work.mixed, x, meetings, plan, work)
        if meetings < 0:
            return False
        # The MLP of this thread's units.
        if plan.beside == ONE_BY_ONE:  # else what attention read is still in it
            if plan.before:
                norm(x, plan.norms[layer, 1], plan.biases[layer, 1], plan, normed)
            else:
                normed[:] = x
        units, unit = place[UNITS], place[FIRST_UNIT]
        own = work.hidden[unit : unit + units]
        gate = stage[place[GATE_AT] : place[GATE_AT] + units]
        if units > 0:
            _stage(place, GATE_UP, thread, normed, normed, stage, plan, work)
        curves, every = plan.curves[layer], place[ALL_UNITS]
        if every > 0:  # the threads meet over their gates
            if place[ACTIVATION] == POLY_NORM:
                meetings = _norm_powers(gate, every, curves[0], thread, threads, meetings, work)
                curves = work.polynomials[thread]
            else:
                meetings = _shift_gates(gate, every, plan.gates[layer, 1], thread, threads, meetings, work)
            if meetings < 0:
                return False
        if units > 0:
            activate(place[ACTIVATION], gate, curves, plan.widths[layer], unit)
            if plan.gates[layer, 0] > 0:
                drop_below(plan.gates[layer, 0], gate)
            own[:] = gate
            if place[UP_AT] >= 0 and place[2 * UNITS_BUNDLED + 1] == 0:
                up = stage[place[UP_AT] : place[UP_AT] + units]
                if place[2 * UP + 1] > 0:
                    sparse_up(place[2 * UP], thread, gate, up, normed, plan, work)
                for i in range(units):
                    own[i] *= up[i]
        meetings = _add_shares(DOWN, UNITS, thread, threads, layer, own, work.hidden, x, meetings, plan, work)
        if meetings < 0:
            return False
    norm(x, plan.last_norm, plan.last_bias, plan, normed)
    place = plan.layers[thread, plan.norms.shape[0]]
    if place[2 * HEAD + 1] > 0:
        _stage(place, HEAD, thread, normed, normed, stage, plan, work)
    own = stage[: place[UNITS]]
    for i in range(own.size):
        own[i] *= plan.scaled
    if plan.capped > 0:
        cap(plan.capped, own)
    work.logits[place[FIRST_UNIT] : place[FIRST_UNIT] + place[UNITS]] = own
    work.finite[thread] = nothing(own)
    return True


@compiled()
def _embed(embedding, token, out):  # type: ignore[no-untyped-def]
    """Look up the embedding: apart from the step, which is thus compiled once for embeddings of both kinds."""
    for i in range(out.size):
        out[i] = widen(embedding[token, i])


@compiled(parallel=True)
def _step(threads, position, plan, work):  # type: ignore[no-untyped-def]
    came = np.zeros(threads, np.uint8)
    for thread in prange(threads):
        came[thread] = _run(thread, threads, position, plan, work)
    return came.all()


def step(threads: int, position: int, token: int, embedding: np.ndarray, plan: StepPlan, work: Work) -> bool:
    """Run one token at a position; its logits are left in work.logits.

    Args:
        threads: of the team.
        position: of the token, from 0.
        token: its index in the vocabulary.
        embedding: float32, or uint16 (bf16), [vocabulary, hidden].
        plan: what is computed.
        work: memory.

    Returns:
        Whether the threads ran side by side.
    """
    _embed(embedding, token, work.embedded)
    work.counter[0] = 0
    return bool(_step(threads, position, plan, work))
