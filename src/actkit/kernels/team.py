"""A team of threads inside one compiled call: barriers that spin, and memory by address.

A decoder crosses some fifty layers in ten milliseconds and its threads must meet twice in each. Leaving the parallel
region to meet costs 20 to 40 microseconds if idle threads sleep; a counter that all increment and watch costs less
than one. A thread that waits long yields its core, and one that waits for seconds gives up, so that a team whose
threads do not run side by side ends with an error instead of hanging.
"""

from __future__ import annotations

import sys

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from actkit.kernels.process import compiled
from actkit.kernels.vectors import Memory

SPINS = 4096  # looks at the counter before the core is yielded: some tens of microseconds
PATIENCE = 20_000_000  # looks after which a thread gives up: some ten seconds and more
_YIELDS = sys.platform != "win32"
_PAUSES = {"x86_64", "amd64", "i386", "i686"}


@intrinsic
def address_of(typingctx, address):  # type: ignore[no-untyped-def]
    """Return an integer as a pointer, for `carray`."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def _arrive(typingctx, counter):  # type: ignore[no-untyped-def]
    """Add one to counter[0], all earlier writes seen by whoever sees the sum."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        memory = Memory(context, builder, signature.args[0], args[0])
        place = memory.address(ir.IntType(64)(0), ir.IntType(64))
        builder.atomic_rmw("add", place, ir.IntType(64)(1), "seq_cst")
        return context.get_dummy_value()

    return types.void(counter), generate


@intrinsic
def _arrived(typingctx, counter):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        memory = Memory(context, builder, signature.args[0], args[0])
        return builder.load_atomic(memory.address(ir.IntType(64)(0), ir.IntType(64)), "seq_cst", 8)

    return types.int64(counter), generate


@intrinsic
def _breathe(typingctx):  # type: ignore[no-untyped-def]
    """Tell the core that this is a loop that waits."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if context.codegen().magic_tuple()[0].split("-")[0] in _PAUSES:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _yield_core(typingctx):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if _YIELDS:
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@compiled()
def meet(counter, goal):  # type: ignore[no-untyped-def]
    """Wait until all threads of the team are here.

    Args:
        counter: int64 [1], at zero when the team starts.
        goal: threads times the number of this meeting.

    Returns:
        Whether they came.
    """
    _arrive(counter)
    looks = 0
    while _arrived(counter) < goal:
        looks += 1
        if looks < SPINS:
            _breathe()
        elif looks < PATIENCE:
            _yield_core()
        else:
            return False
    return True


def line_padded(size: int) -> int:
    """Return a number of 4-byte values that fills whole cache lines, and one more, so that threads share none."""
    return -(-size // 16) * 16 + 16


def address(array: np.ndarray) -> int:
    """Return where an array lies; keep it alive while the address is used."""
    return int(array.ctypes.data)
