"""The attention of a decoding step: what is kept of a token, and what its queries read of all that were kept.

A thread keeps keys and values of its own key-value heads, in float32, bfloat16 or codes of 8 bits, and attends with the
query heads that read them; all of them while a key is at hand. If the heads cannot be shared out evenly, threads take
equal ranges of all heads' keys instead, once there are enough of them: what they found of a head that was cut is merged
by the largest score of each part and the sum of its exponentials, as exact as float32 is.

What touches the cache is called by address, as matrix products are (`decode_products`): three functions for each way
that it is kept (`functions_of`). So the step is compiled once for all of them; the cache is bytes to it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from actkit.kernels.decode_math import (
    LOOSE,
    capped,
    clamp,
    exponential,
    normal_quantile,
    rms_norm,
    rotate,
    rotate_neighbours,
    square_sum,
    statistical_cut,
)
from actkit.kernels.decode_places import (
    CHOOSING,
    FIRST_HEAD,
    HEADS,
    KEY_AT,
    KEY_STEP,
    KEYS,
    NEIGHBOURS,
    QUERY_AT,
    QUERY_STEP,
    ROTARY,
    TURN,
    UNTURNED,
    VALUE_AT,
    WINDOW,
)
from actkit.kernels.process import called_by_address, compiled
from actkit.kernels.team import call_by_address, meet

# -- what is kept ------------------------------------------------------------------------------------------------------


@intrinsic
def value_of(typingctx, kept):  # type: ignore[no-untyped-def]
    """Return a float32 as it is, the one whose upper half is a bfloat16, or a code as a number."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if signature.args[0] == types.float32:
            return args[0]
        if signature.args[0] == types.int8:
            return builder.sitofp(args[0], ir.FloatType())
        word = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.IntType(32)(16)), ir.FloatType())

    return types.float32(kept), generate


@intrinsic
def as_kept(typingctx, value, kept):  # type: ignore[no-untyped-def]
    """Return the float32 as it is, the nearest bfloat16's upper half, or the nearest code, as `kept` holds it."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, i16, i32 = args[0], ir.IntType(16), ir.IntType(32)
        if signature.return_type == types.float32:
            return value
        if signature.return_type == types.int8:
            nearest = builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()])
            return builder.fptosi(builder.call(nearest, [value]), ir.IntType(8))
        bits = builder.bitcast(value, i32)
        odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, i32(0x7FFF))), i32(16))
        return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), i32(0x7FC0), rounded), i16)

    return kept.dtype(types.float32, kept), generate


@compiled(inner=True)
def keep(vector, kept, scales, position):  # type: ignore[no-untyped-def]
    """Keep a key or a value: as it is, in bfloat16, or as 8-bit codes whose scale is that of its largest entry.

    Args:
        vector: float32 [size].
        kept: [capacity, size], float32, uint16 for bfloat16, or int8 for codes.
        scales: float32 [capacity] of codes, else [0].
        position: of the token.
    """
    scale = np.float32(1.0)
    if scales.size > 0:
        largest = np.float32(0.0)
        for i in range(vector.size):
            largest = max(largest, abs(vector[i]))
        if largest > 0:
            scale = largest / np.float32(127.0)
        scales[position] = scale
    for i in range(vector.size):
        kept[position, i] = as_kept(vector[i] / scale, kept)


# -- one key-value head ------------------------------------------------------------------------------------------------


@compiled(fastmath=LOOSE, inner=True)
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(a.size):
        total += a[i] * value_of(b[i])
    return total


@compiled(fastmath=LOOSE, inner=True)
def _add_four(out, chances, t, values):  # type: ignore[no-untyped-def]
    """Add four values, each times its chance: one load and store of an output for four products."""
    a, b, c, d = chances[t], chances[t + 1], chances[t + 2], chances[t + 3]
    first, second, third, fourth = values[t], values[t + 1], values[t + 2], values[t + 3]
    for i in range(out.size):
        early = a * value_of(first[i]) + b * value_of(second[i])
        out[i] += early + (c * value_of(third[i]) + d * value_of(fourth[i]))


@compiled(fastmath=LOOSE, inner=True)
def _exponentials(scores):  # type: ignore[no-untyped-def]
    """Put e^(score - the largest) in place of each; return the largest and the sum."""
    largest = scores[0]
    for i in range(scores.size):
        largest = max(largest, scores[i])
    total = np.float32(0.0)
    for i in range(scores.size):
        scores[i] = exponential(scores[i] - largest)
        total += scores[i]
    return largest, total


@compiled(inner=True)
def attend(queries, keys, values, key_scales, value_scales, scaling, limit, scores, out, found):  # type: ignore[no-untyped-def]
    """Attend with the queries of one key-value head, to some tokens.

    Args:
        queries: [readers * size].
        keys: [tokens, size], as `keep` keeps them.
        values: [tokens, size], alike.
        key_scales: float32 [tokens] of codes, else [0].
        value_scales: the same.
        scaling: of the scores.
        limit: at which tanh caps them; 0 for not at all.
        scores: [readers * tokens], written.
        out: [readers * size], written: the values times e^(score - the largest), summed.
        found: [readers, 2], written: the largest score and the sum of the exponentials.
    """
    tokens, size = keys.shape
    readers = queries.size // size
    coded = key_scales.size > 0
    for t in range(tokens):
        key = keys[t]
        factor = scaling * key_scales[t] if coded else scaling
        for reader in range(readers):
            scores[reader * tokens + t] = _dot(queries[reader * size : (reader + 1) * size], key) * factor
    if limit > 0:
        for i in range(readers * tokens):
            scores[i] = capped(limit, scores[i])
    for reader in range(readers):
        chances = scores[reader * tokens : (reader + 1) * tokens]
        found[reader, 0], found[reader, 1] = _exponentials(chances)
        if coded:
            for t in range(tokens):
                chances[t] *= value_scales[t]
    out[: readers * size] = 0
    whole = tokens // 4 * 4
    for t in range(0, whole, 4):
        for reader in range(readers):
            own = out[reader * size : (reader + 1) * size]
            _add_four(own, scores[reader * tokens : (reader + 1) * tokens], t, values)
    for t in range(whole, tokens):
        for reader in range(readers):
            chance = scores[reader * tokens + t]
            for i in range(size):
                out[reader * size + i] += chance * value_of(values[t, i])


@compiled(inner=True)
def attend_chosen(query, keys, values, r, k, scores, out):  # type: ignore[no-untyped-def]
    """Attend with one head whose first r features choose about k keys by statistical top-k; the others weigh them.

    Of the other keys no more than r features are read, and no value.

    Args:
        query: [size].
        keys: [tokens, size], no codes.
        values: [tokens, size], alike.
        r: features that choose.
        k: keys to attend to, about.
        scores: [tokens], written.
        out: [size], written.
    """
    tokens, rest = len(keys), query.size - r
    first, second = np.float32(1 / math.sqrt(r)), np.float32(1 / math.sqrt(rest))
    total, squares, largest = 0.0, 0.0, np.float32(-np.inf)
    for t in range(tokens):
        score = _dot(query[:r], keys[t, :r]) * first
        scores[t] = score
        largest = max(largest, score)
        total += score
        squares += np.float64(score) * np.float64(score)
    if tokens > k:
        cut, alike = statistical_cut(total, squares, tokens, normal_quantile(1 - k / tokens))
        if not alike:
            for t in range(tokens):
                if scores[t] <= np.float32(cut) and scores[t] < largest:  # the largest one always stays
                    scores[t] = -np.inf
    sum_of = np.float32(0.0)
    out[:] = 0
    for t in range(tokens):
        if scores[t] == -np.inf:
            continue
        chance = exponential(scores[t] - largest)
        sum_of += chance
        weight = _dot(query[r:], keys[t, r:]) * second
        gain = max(weight, np.float32(0.0)) + np.float32(math.log1p(math.exp(-abs(weight))))  # softplus
        row = values[t]
        for i in range(out.size):
            out[i] += chance * gain * value_of(row[i])
    for i in range(out.size):
        out[i] /= sum_of


# -- by address --------------------------------------------------------------------------------------------------------

KEEP, ATTEND, CHOOSE = range(3)  # places of the addresses in work.functions
_POINTER, _INTEGER, _FLOAT = types.voidptr, types.int64, types.float32
_KEEPS = types.void(_POINTER, _POINTER, _POINTER, _INTEGER, _INTEGER)
_ATTENDS = types.void(*[_POINTER] * 8, _INTEGER, _INTEGER, _INTEGER, _FLOAT, _FLOAT)
_CHOOSES = types.void(*[_POINTER] * 5, _INTEGER, _INTEGER, _INTEGER, _INTEGER)
_compiled: dict[type, tuple[Any, ...]] = {}


def functions_of(stored: type) -> np.ndarray:
    """Return the addresses of what keeps and reads a cache: int64 [3].

    Args:
        stored: the type of its numbers, float32, uint16 for bfloat16, or int8 for codes.
    """
    if stored not in _compiled:
        made = (_keeps(stored), _attends(stored), _chooses(stored))
        kinds = (_KEEPS, _ATTENDS, _CHOOSES)
        _compiled[stored] = tuple(called_by_address(kind)(function) for kind, function in zip(kinds, made))
    return np.array([function.address for function in _compiled[stored]], np.int64)


def _keeps(stored: type) -> Any:
    coded = stored is np.int8

    def function(vector, kept, scales, size, position):  # type: ignore[no-untyped-def]
        tokens = position + 1
        scale = carray(scales, (tokens if coded else 0,), np.float32)
        keep(carray(vector, (size,), np.float32), carray(kept, (tokens, size), stored), scale, position)

    return function


def _attends(stored: type) -> Any:
    coded = stored is np.int8

    def function(  # type: ignore[no-untyped-def]
        queries, keys, values, key_scales, value_scales, scores, out, found, tokens, readers, size, scaling, limit
    ):
        scaled = tokens if coded else 0
        attend(
            carray(queries, (readers * size,), np.float32),
            carray(keys, (tokens, size), stored),
            carray(values, (tokens, size), stored),
            carray(key_scales, (scaled,), np.float32),
            carray(value_scales, (scaled,), np.float32),
            scaling,
            limit,
            carray(scores, (readers * tokens,), np.float32),
            carray(out, (readers * size,), np.float32),
            carray(found, (readers, 2), np.float32),
        )

    return function


def _chooses(stored: type) -> Any:
    def function(query, keys, values, scores, out, tokens, size, r, k):  # type: ignore[no-untyped-def]
        attend_chosen(
            carray(query, (size,), np.float32),
            carray(keys, (tokens, size), stored),
            carray(values, (tokens, size), stored),
            r,
            k,
            carray(scores, (tokens,), np.float32),
            carray(out, (size,), np.float32),
        )

    return function


@intrinsic
def _call_keep(typingctx, function, vector, kept, scales, size, position):  # type: ignore[no-untyped-def]
    return types.void(types.int64, vector, kept, scales, types.int64, types.int64), call_by_address


@intrinsic
def _call_attend(  # type: ignore[no-untyped-def]
    typingctx, function, queries, keys, values, key_scales, value_scales, scores, out, found, tokens, readers, size,
    scaling, limit,
):  # fmt: skip
    arrays = (queries, keys, values, key_scales, value_scales, scores, out, found)
    return types.void(types.int64, *arrays, *[types.int64] * 3, types.float32, types.float32), call_by_address


@intrinsic
def _call_choose(typingctx, function, query, keys, values, scores, out, tokens, size, r, k):  # type: ignore[no-untyped-def]
    return types.void(types.int64, query, keys, values, scores, out, *[types.int64] * 4), call_by_address


# -- all heads ---------------------------------------------------------------------------------------------------------


@compiled(inner=True)
def turn(x, cos, sin, how, choosing):  # type: ignore[no-untyped-def]
    """Apply the rotary embedding of one head; if some features choose the keys, to its two parts apart."""
    if how == UNTURNED:
        return
    if how == NEIGHBOURS:
        rotate_neighbours(x, cos, sin)
    elif choosing > 0:
        rotate(x[:choosing], cos[:choosing], sin[:choosing])
        rotate(x[choosing:], cos[choosing:], sin[choosing:])
    else:
        rotate(x, cos, sin)


@compiled(inner=True)
def scaled(x, mean, weight, epsilon):  # type: ignore[no-untyped-def]
    """Divide by the root of the mean square, times weight, in place."""
    scale = np.float32(1.0) / np.sqrt(np.float32(mean) + epsilon)
    for i in range(x.size):
        x[i] = x[i] * scale * weight[i]


@compiled(inner=True)
def _norm_all(place, layer, thread, threads, stage, meetings, plan, work):  # type: ignore[no-untyped-def]
    """Norm query and key over all heads of all threads, in place; return the meetings, or -1."""
    moments, first = work.moments[thread], place[FIRST_HEAD]
    query = stage[place[QUERY_AT] :][: place[HEADS] * plan.shared_by * plan.size]
    key = stage[place[KEY_AT] :][: place[HEADS] * plan.size]
    moments[2], moments[3] = square_sum(query), square_sum(key)
    meetings += threads
    if not meet(work.counter, meetings):
        return -1
    total_query, total_key = 0.0, 0.0
    for other in range(threads):
        total_query += work.moments[other, 2]
        total_key += work.moments[other, 3]
    weights, at = plan.head_norms[layer], first * plan.size
    scaled(query, total_query / work.mixed.size, weights[0][at * plan.shared_by :], plan.epsilon)
    scaled(key, total_key / (work.keys.shape[1] * plan.size), weights[1][at:], plan.epsilon)
    return meetings


@compiled(inner=True)
def take_in(place, layer, position, stage, queries, plan, work):  # type: ignore[no-untyped-def]
    """Turn the queries of a thread's heads, into their places among those of all, and keep their keys and values."""
    size, shared_by, first = plan.size, plan.shared_by, place[FIRST_HEAD]
    own_norms = plan.head_norms.shape[0] > 0 and plan.head_norms.shape[2] == size  # else it is done
    rotary = plan.rotary[place[ROTARY]]
    cos, sin = rotary[0, position], rotary[1, position]
    for head in range(place[HEADS]):
        at = place[KEY_AT] + head * place[KEY_STEP]
        key = stage[at : at + size]
        at = place[VALUE_AT] + head * place[KEY_STEP]
        value = stage[at : at + size]
        if plan.limit > 0:
            clamp(plan.limit, key)
            clamp(plan.limit, value)
        if own_norms:
            rms_norm(key, plan.head_norms[layer, 1], plan.epsilon, key)
        turn(key, cos, sin, place[TURN], place[CHOOSING])
        keeps, at = work.functions[KEEP], first + head
        _call_keep(keeps, key, work.keys[layer, at], work.key_scales[layer, at], size, position)
        _call_keep(keeps, value, work.cached[layer, at], work.value_scales[layer, at], size, position)
        for reader in range(shared_by):
            at = place[QUERY_AT] + head * place[QUERY_STEP] + reader * size
            to = ((first + head) * shared_by + reader) * size
            query = queries[to : to + size]
            query[:] = stage[at : at + size]
            if plan.limit > 0:
                clamp(plan.limit, query)
            if own_norms:
                rms_norm(query, plan.head_norms[layer, 0], plan.epsilon, query)
            turn(query, cos, sin, place[TURN], place[CHOOSING])


@compiled(inner=True)
def _attend_some(layer, head, begin, end, scores, out, found, plan, work):  # type: ignore[no-untyped-def]
    """Attend with one key-value head's queries to the tokens from begin to end."""
    scaled = work.key_scales.shape[2] > 0
    last = end if scaled else 0
    _call_attend(
        work.functions[ATTEND],
        work.queries[head * plan.shared_by * plan.size :],
        work.keys[layer, head, begin:end],
        work.cached[layer, head, begin:end],
        work.key_scales[layer, head, min(begin, last) : last],
        work.value_scales[layer, head, min(begin, last) : last],
        scores,
        out,
        found,
        end - begin,
        plan.shared_by,
        plan.size,
        plan.scaling,
        plan.cap,
    )


@compiled(inner=True)
def _divide(out, found, size):  # type: ignore[no-untyped-def]
    for reader in range(len(found)):
        for i in range(reader * size, (reader + 1) * size):
            out[i] /= found[reader, 1]


@compiled(inner=True)
def _is_cut(head, tokens, every, threads):  # type: ignore[no-untyped-def]
    """Whether no thread attends to all of a head's tokens."""
    for other in range(threads):
        low, high = every * other // threads, every * (other + 1) // threads
        if low <= head * tokens and high >= (head + 1) * tokens:
            return False
    return True


@compiled(inner=True)
def _merge(head, tokens, threads, out, plan, work):  # type: ignore[no-untyped-def]
    """Put together what threads found of a head that was cut."""
    size, every = plan.size, work.keys.shape[1] * tokens
    for reader in range(plan.shared_by):
        own = out[reader * size : (reader + 1) * size]
        own[:] = 0
        largest, total = np.float32(-np.inf), np.float32(0.0)
        for other in range(threads):
            low, high = every * other // threads, every * (other + 1) // threads
            if max(low, head * tokens) >= min(high, (head + 1) * tokens):
                continue
            half = 0 if low > head * tokens else 1
            theirs, found = work.parts[other, half], work.found[other, half, reader]
            top = max(largest, found[0])
            before, now = exponential(largest - top), exponential(found[0] - top)
            for i in range(size):
                own[i] = own[i] * before + theirs[reader * size + i] * now
            largest, total = top, total * before + found[1] * now
        for i in range(size):
            own[i] /= total


@compiled(inner=True)
def attention(place, layer, thread, threads, position, meetings, plan, work):  # type: ignore[no-untyped-def]
    """Keep a token and attend, from work.stage into this thread's part of work.mixed; return the meetings, or -1."""
    size, shared_by, first, heads = plan.size, plan.shared_by, place[FIRST_HEAD], place[HEADS]
    stage, scores = work.stage[thread], work.scores[thread]
    wide = shared_by * size  # of a key-value head's queries
    if plan.head_norms.shape[0] > 0 and plan.head_norms.shape[2] > size:
        meetings = _norm_all(place, layer, thread, threads, stage, meetings, plan, work)
        if meetings < 0:
            return -1
    take_in(place, layer, position, stage, work.queries, plan, work)
    begin = max(0, position + 1 - place[WINDOW]) if place[WINDOW] > 0 else 0
    tokens = position + 1 - begin
    if place[CHOOSING] > 0:
        for reader in range(first * shared_by, (first + heads) * shared_by):
            head, at = reader // shared_by, reader * size
            keys, values = work.keys[layer, head], work.cached[layer, head]
            query, mixed = work.queries[at : at + size], work.mixed[at : at + size]
            chooses, tokens = work.functions[CHOOSE], position + 1
            _call_choose(chooses, query, keys, values, scores, mixed, tokens, size, place[CHOOSING], place[KEYS])
        return meetings
    found = work.found[thread, 0]
    if plan.cut_from == 0 or tokens < plan.cut_from:
        for head in range(first, first + heads):
            out = work.mixed[head * wide : (head + 1) * wide]
            _attend_some(layer, head, begin, position + 1, scores, out, found, plan, work)
            _divide(out, found, size)
        return meetings
    meetings += threads
    if not meet(work.counter, meetings):  # all queries and keys are there
        return -1
    every = work.keys.shape[1] * tokens
    low, high = every * thread // threads, every * (thread + 1) // threads
    for head in range(low // tokens, (high + tokens - 1) // tokens):
        after, until = max(low - head * tokens, 0), min(high - head * tokens, tokens)
        if after == 0 and until == tokens:
            out = work.mixed[head * wide : (head + 1) * wide]
            whole = work.found[thread, 2]
            _attend_some(layer, head, begin, position + 1, scores, out, whole, plan, work)
            _divide(out, whole, size)
        else:
            half = 0 if after > 0 else 1
            part, own = work.parts[thread, half], work.found[thread, half]
            _attend_some(layer, head, begin + after, begin + until, scores, part, own, plan, work)
    meetings += threads
    if not meet(work.counter, meetings):
        return -1
    for head in range(first, first + heads):
        if _is_cut(head, tokens, every, threads):
            _merge(head, tokens, threads, work.mixed[head * wide : (head + 1) * wide], plan, work)
    return meetings
