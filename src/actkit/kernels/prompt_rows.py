"""What lies between the matrix products of a prompt, row by row, each in one compiled call for all tokens.

A row of a product's outputs is widened to float32 in a buffer that stays in the cache, and brought in order there if it
lies as a tile of bfloat16 has it (`kernels.packing`); then it goes through the functions of the decoding step: norms of
heads, the rotary embedding and the key-value cache; activation and gate; the sum of the residual stream and the norm
behind it. Rows are shared out over the threads; their results do not depend on how.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from actkit.kernels.decode_attention import scaled, take_in
from actkit.kernels.decode_math import activate, drop_below, from_bits, layer_norm, rms_norm
from actkit.kernels.decode_places import (
    ACTIVATION,
    FIRST_HEAD,
    FIRST_UNIT,
    GATE_AT,
    HEADS,
    KEY_AT,
    QUERY_AT,
    UNITS,
    UP_AT,
)
from actkit.kernels.numba_cpu import as_stored, widen
from actkit.kernels.packing import HALF
from actkit.kernels.process import compiled

PARTS = 64  # of the rows, over threads


class Heads(NamedTuple):
    """What `take_in` reads of a `decode_step.StepPlan`, and no more: a call unpacks every array that it is given."""

    head_norms: np.ndarray
    epsilon: Any
    rotary: np.ndarray
    size: int
    shared_by: int
    limit: Any

    @classmethod
    def of(cls, plan: Any) -> Heads:
        """Take it from a plan."""
        return cls(*(getattr(plan, name) for name in cls._fields))


class Cache(NamedTuple):
    """What `take_in` writes of a `decode_step.Work`."""

    keys: np.ndarray
    cached: np.ndarray
    key_scales: np.ndarray
    value_scales: np.ndarray
    functions: np.ndarray

    @classmethod
    def of(cls, work: Any) -> Cache:
        """Take it from a decoder's memory."""
        return cls(*(getattr(work, name) for name in cls._fields))


@compiled(inner=True)
def _widened(row, tiled, bias, out):  # type: ignore[no-untyped-def]
    """Write a row of outputs as float32, in order, with the bias added.

    Args:
        row: float32 or uint16 (bf16) [width].
        tiled: whether columns c and c + 16 of each 32 lie side by side.
        bias: float32 [width or more], or empty.
        out: float32 [width].
    """
    if tiled:
        blocks = row.size // (2 * HALF)
        words, found = row.view(np.int32).reshape(blocks, HALF), out.reshape(blocks, 2 * HALF)  # a word has two outputs
        for block in range(blocks):
            for c in range(HALF):
                found[block, c] = from_bits(np.int32(words[block, c] << np.int32(16)))
                found[block, HALF + c] = from_bits(np.int32(words[block, c] & np.int32(-65536)))
    else:
        for c in range(row.size):
            out[c] = widen(row[c])
    if bias.size:
        for c in range(min(row.size, bias.size)):
            out[c] += bias[c]


@compiled(parallel=True)
def take_in_rows(place, layer, begin, rows, tiled, bias, means, queries, heads, cache):  # type: ignore[no-untyped-def]
    """Turn the queries of a thread's heads, and keep their keys and values, of all tokens.

    Args:
        place: int64 [LAYER_FIELDS], of a thread's layer.
        layer: which.
        begin: the position of the first token.
        rows: outputs of the products of query, key and value, as `_widened` takes them.
        tiled: see `rows`.
        bias: see `rows`.
        means: float32 [tokens, 2], mean squares of query and key over the heads of all threads, or empty.
        queries: float32 or uint16 (bf16) [heads, tokens, size], written.
        heads: `Heads`.
        cache: `Cache`.
    """
    size = heads.size
    for part in prange(PARTS):
        first, wide = place[FIRST_HEAD] * heads.shared_by * size, place[HEADS] * heads.shared_by * size
        stage, own = np.empty(rows.shape[1], np.float32), np.empty(first + wide, np.float32)
        for i in range(len(rows) * part // PARTS, len(rows) * (part + 1) // PARTS):
            _widened(rows[i], tiled, bias, stage)
            if means.size:
                norms, at = heads.head_norms[layer], place[FIRST_HEAD] * size
                scaled(stage[place[QUERY_AT] :][:wide], means[i, 0], norms[0][at * heads.shared_by :], heads.epsilon)
                scaled(stage[place[KEY_AT] :][: place[HEADS] * size], means[i, 1], norms[1][at:], heads.epsilon)
            take_in(place, layer, begin + i, stage, own, heads, cache)
            for head in range(len(queries)):
                query, at = queries[head, i], first + head * size
                found = own[at : at + size]
                for j in range(found.size):
                    query[j] = as_stored(found[j], query)


@compiled(parallel=True)
def activate_rows(place, threshold, curves, width, rows, tiled, bias, hidden):  # type: ignore[no-untyped-def]
    """Write the activation of the gate, times up if there is a gate, of all tokens.

    Args:
        place: int64 [LAYER_FIELDS], of a thread's layer.
        threshold: below which a gate is 0.
        curves: float32 [groups, 10], as `activate` reads them.
        width: see curves.
        rows: outputs of the products of gate and up, as `_widened` takes them.
        tiled: see `rows`.
        bias: see `rows`.
        hidden: float32 or uint16 (bf16) [tokens, units], written.
    """
    for part in prange(PARTS):
        stage = np.empty(rows.shape[1], np.float32)
        for i in range(len(rows) * part // PARTS, len(rows) * (part + 1) // PARTS):
            _widened(rows[i], tiled, bias, stage)
            gate = stage[place[GATE_AT] : place[GATE_AT] + place[UNITS]]
            activate(place[ACTIVATION], gate, curves, width, place[FIRST_UNIT])
            if threshold > 0:
                drop_below(threshold, gate)
            if place[UP_AT] >= 0:
                up = stage[place[UP_AT] : place[UP_AT] + place[UNITS]]
                for j in range(gate.size):
                    gate[j] *= up[j]
            for j in range(gate.size):
                hidden[i, j] = as_stored(gate[j], hidden)


@compiled(parallel=True)
def curve_rows(code, curves, width, first, gate):  # type: ignore[no-untyped-def]
    """Compute a learned activation function of all tokens, in place.

    Args:
        code: of the function.
        curves: float32 [groups, 10], as `activate` reads them.
        width: see curves.
        first: unit at which `gate` begins.
        gate: float32 [tokens, units].
    """
    for part in prange(PARTS):
        for i in range(len(gate) * part // PARTS, len(gate) * (part + 1) // PARTS):
            activate(code, gate[i], curves, width, first)


@compiled(parallel=True)
def add_rows(x, rows, tiled, bias, factor, normed, weight, shift, centered, epsilon):  # type: ignore[no-untyped-def]
    """Add outputs to the residual stream, then norm it; of all tokens.

    Args:
        x: float32 [tokens, hidden], in place.
        rows: as `_widened` takes them, at least as wide; or without any tokens, to norm only.
        tiled: see `rows`.
        bias: see `rows`.
        factor: of what is added.
        normed: float32 or uint16 (bf16) [tokens, hidden], written; or without any tokens, to add only.
        weight: float32 [hidden] of the norm, or empty for none.
        shift: float32 [hidden], or empty: its bias.
        centered: whether the norm subtracts the mean.
        epsilon: of the norm.
    """
    for part in prange(PARTS):
        stage = np.empty(max(rows.shape[1], x.shape[1]), np.float32)
        own = stage[: x.shape[1]]
        for i in range(len(x) * part // PARTS, len(x) * (part + 1) // PARTS):
            if len(rows):
                _widened(rows[i], tiled, bias, stage[: rows.shape[1]])
                for j in range(own.size):
                    x[i, j] += own[j] * factor
            if not len(normed):
                continue
            if not weight.size:
                own[:] = x[i]
            elif centered:
                layer_norm(x[i], weight, shift, epsilon, own)
            else:
                rms_norm(x[i], weight, epsilon, own)
            for j in range(own.size):
                normed[i, j] = as_stored(own[j], normed)
