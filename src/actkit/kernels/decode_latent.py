"""Latent attention of a decoding step: what is cached of a token is read once for all heads of a thread; float32.

What is attended to is one row per token, whose first `rank` numbers are its value too. A chunk of rows that fits the
core's cache goes through all heads: their scores, what they do to the softmax so far, and their share of the sums. So
the memory read per token is that of the latent cache, however many heads there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from actkit.kernels.decode_math import exponential
from actkit.kernels.process import compiled

CHUNK = 96  # rows at a time: 221 kB of the published model's
_LOOSE = {"reassoc", "contract", "nsz"}


# Of `StepPlan.latent`, int64, as `LatentPlan` has them: a compiled team takes no tuple within a tuple.
RANK, ROPE, NOPE, VALUE, NARROW_WIDTH, EXPANDED, PADDED, SPREAD = range(8)


class LatentPlan(NamedTuple):
    """What is computed of latent attention; a rank of 0 stands for other attention.

    Attributes:
        rank: numbers of a token that keys and values are made of.
        rope: features that turn.
        nope: features of a query that do not.
        value: features of a head's output.
        narrow: numbers that queries go through, 0 for none.
        expanded: whether keys and values of all heads are cached in place of the latents.
        padded: columns from one head's latent features to the next one's.
        spread: from one head's output to the next one's.
        norms: float32 [layers, rank], of the latents.
        query_norms: float32 [layers, narrow].
    """

    rank: int
    rope: int
    nope: int
    value: int
    narrow: int
    expanded: bool
    padded: int
    spread: int
    norms: np.ndarray
    query_norms: np.ndarray

    def fields(self) -> dict[str, np.ndarray]:
        """What a `StepPlan` holds of it."""
        sizes = np.array([int(size) for size in self[:8]], np.int64)
        return {"latent": sizes, "latent_norms": self.norms, "narrow_norms": self.query_norms}

    @classmethod
    def of(cls, plan: Any) -> LatentPlan:
        """It again, from a `StepPlan`."""
        rank, rope, nope, value, narrow, expanded, padded, spread = (int(size) for size in plan.latent)
        norms = (plan.latent_norms, plan.narrow_norms)
        return cls(rank, rope, nope, value, narrow, bool(expanded), padded, spread, *norms)


class LatentWork(NamedTuple):
    """Memory of latent attention. What begins with [threads] is each thread's own.

    Attributes:
        cache: float32 [layers, capacity, rank + rope], the latents behind their norm and the turned key.
        shared: float32 [narrow + rank + rope], of the token, each part by one thread.
        own: float32 [threads, narrow + rank + rope], the same behind the norms.
        queries: float32 [threads, heads, rank + rope]; absorbed.
        absorbed: float32 [threads, width], what the products write.
        mixed: float32 [threads, heads * rank], the sums of latents.
        scores: float32 [threads, heads, CHUNK].
        state: float32 [threads, 2, heads], the largest score and the sum so far.
        keys: float32 [layers, heads, capacity, nope + rope], if they are cached expanded.
        values: float32 [layers, heads, capacity, value], the same.
    """

    cache: np.ndarray
    shared: np.ndarray
    own: np.ndarray
    queries: np.ndarray
    absorbed: np.ndarray
    mixed: np.ndarray
    scores: np.ndarray
    state: np.ndarray
    keys: np.ndarray
    values: np.ndarray

    def fields(self) -> dict[str, np.ndarray]:
        """What a `Work` holds of it."""
        return {f"latent_{name}": value for name, value in self._asdict().items()}


@compiled(fastmath=_LOOSE, inner=True)
def _dots(query, a, b, c, d, e, f, g, h, out):  # type: ignore[no-untyped-def]
    """Write the dot products with eight rows into out [8]."""
    s0, s1, s2, s3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    s4, s5, s6, s7 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for i in range(query.size):
        q = query[i]
        s0 += q * a[i]
        s1 += q * b[i]
        s2 += q * c[i]
        s3 += q * d[i]
        s4 += q * e[i]
        s5 += q * f[i]
        s6 += q * g[i]
        s7 += q * h[i]
    out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7] = s0, s1, s2, s3, s4, s5, s6, s7


@compiled(fastmath=_LOOSE, inner=True)
def _dot(query, row):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(query.size):
        total += query[i] * row[i]
    return total


@compiled(fastmath=_LOOSE, inner=True)
def _add(weights, a, b, c, d, e, f, g, h, out):  # type: ignore[no-untyped-def]
    """Add eight rows, each times its weight."""
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    w4, w5, w6, w7 = weights[4], weights[5], weights[6], weights[7]
    for i in range(out.size):
        out[i] += (w0 * a[i] + w1 * b[i] + w2 * c[i] + w3 * d[i]) + (w4 * e[i] + w5 * f[i] + w6 * g[i] + w7 * h[i])


@compiled(inner=True)
def attend_to_rows(queries, rows, values, rank, scaling, scores, largest, total, out):  # type: ignore[no-untyped-def]
    """Attend with several heads to the same rows.

    Args:
        queries: float32 [heads, width].
        rows: float32 [tokens, width].
        values: float32 [tokens, rank or more]; `rows` again, if their first numbers are their values.
        rank: numbers of a value.
        scaling: of the scores.
        scores: float32 [heads, CHUNK], written.
        largest: float32 [heads], written.
        total: float32 [heads], written.
        out: float32 [heads * rank], written.
    """
    heads, tokens = len(queries), len(rows)
    out[:] = 0
    largest[:heads] = -np.inf
    total[:heads] = 0
    for begin in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - begin)
        whole = count // 8 * 8
        for t in range(0, whole, 8):
            r = begin + t
            for h in range(heads):
                _dots(
                    queries[h], rows[r], rows[r + 1], rows[r + 2], rows[r + 3],
                    rows[r + 4], rows[r + 5], rows[r + 6], rows[r + 7], scores[h, t : t + 8],
                )  # fmt: skip
        for t in range(whole, count):
            for h in range(heads):
                scores[h, t] = _dot(queries[h], rows[begin + t])
        for h in range(heads):
            _soften(scores[h, :count], scaling, h, largest, total, out[h * rank : (h + 1) * rank])
        for t in range(0, whole, 8):
            r = begin + t
            for h in range(heads):
                _add(
                    scores[h, t : t + 8], values[r], values[r + 1], values[r + 2], values[r + 3],
                    values[r + 4], values[r + 5], values[r + 6], values[r + 7], out[h * rank : (h + 1) * rank],
                )  # fmt: skip
        for t in range(whole, count):
            for h in range(heads):
                weight, row = scores[h, t], values[begin + t]
                for i in range(rank):
                    out[h * rank + i] += weight * row[i]
    for h in range(heads):
        for i in range(h * rank, (h + 1) * rank):
            out[i] /= total[h]


@compiled(inner=True)
def _soften(scores, scaling, head, largest, total, sums):  # type: ignore[no-untyped-def]
    """Turn a chunk's dot products into weights, relative to the largest score so far; scale down what came before."""
    top = largest[head]
    for t in range(scores.size):
        scores[t] *= scaling
        top = max(top, scores[t])
    if top > largest[head]:
        before = exponential(largest[head] - top)
        if total[head] > 0:
            total[head] *= before
            for i in range(sums.size):
                sums[i] *= before
        largest[head] = top
    for t in range(scores.size):
        scores[t] = exponential(scores[t] - top)
        total[head] += scores[t]


def no_latents(layers: int) -> LatentPlan:
    """The plan of a model with other attention. layers: of the model."""
    return LatentPlan(0, 0, 0, 0, 0, False, 0, 0, np.ones((layers, 0), np.float32), np.ones((layers, 0), np.float32))


def latent_memory(
    plan: LatentPlan, layers: int, threads: int, heads: int, capacity: int, columns: int, allocate: Any
) -> LatentWork:
    """Allocate the memory, next to nothing for other attention.

    Args:
        plan: what is computed.
        layers: of the model.
        threads: of the team.
        heads: of a layer.
        capacity: tokens.
        columns: that the products of a stage write at most.
        allocate: of a shape, aligned.
    """
    width, heads = plan.rank + plan.rope, heads if plan.rank else 0
    cached, expanded = (0, capacity) if plan.expanded else (capacity, 0)
    return LatentWork(
        cache=allocate((layers, cached, width), np.float32),
        shared=allocate(plan.narrow + width, np.float32),
        own=allocate((threads, plan.narrow + width), np.float32),
        queries=allocate((threads, heads, width), np.float32),
        absorbed=allocate((threads, columns if plan.rank else 0), np.float32),
        mixed=allocate((threads, heads * plan.rank), np.float32),
        scores=allocate((threads, heads, CHUNK), np.float32),
        state=allocate((threads, 2, heads), np.float32),
        keys=allocate((layers, heads, expanded, plan.nope + plan.rope), np.float32),
        values=allocate((layers, heads, expanded, plan.value), np.float32),
    )
