"""A team of threads inside one compiled call: barriers that spin, and memory by address.

A decoder crosses some fifty layers in ten milliseconds and its threads must meet twice in each. Leaving the parallel
region to meet costs 20 to 40 microseconds if idle threads sleep; a counter that all increment and watch costs less
than one. A thread that waits long yields its core, and one that waits for seconds gives up, so that a team whose
threads do not run side by side ends with an error instead of hanging.

Some schedulers wake the second thread on the core of the first and leave both there: each meeting then takes a tenth of
a millisecond, for thousands of tokens. So a team looks at its cores when it starts (`stand_apart`): a thread that finds
another one on its own core goes to a free one that the process may use and is bound to it, until `release`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
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


def call_by_address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Generate the body of an intrinsic that calls the function at the address args[0] with all others.

    Args:
        context: as every body of an intrinsic gets it, and so are the others.
        builder: see context.
        signature: of the call, the address first.
        args: its values; arrays are given as pointers.
    """
    pointer = ir.IntType(8).as_pointer()
    given = []
    for kind, value in zip(signature.args[1:], args[1:], strict=True):
        if isinstance(kind, types.Array):
            value = builder.bitcast(context.make_array(kind)(context, builder, value).data, pointer)
        given.append(value)
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in given])
    builder.call(builder.inttoptr(args[0], kind.as_pointer()), given)
    return context.get_dummy_value()


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


def _libc(name: str, arguments: int) -> Any:
    """An intrinsic that calls a function of Linux' C library: int32 of pointers and numbers; -1 elsewhere."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if sys.platform != "linux":
            return ir.IntType(64)(-1)
        given = []
        for kind, value in zip(signature.args, args):
            if isinstance(kind, types.Array):
                value = context.make_array(kind)(context, builder, value).data
                value = builder.bitcast(value, cgutils.voidptr_t)
            given.append(value)
        kind = ir.FunctionType(ir.IntType(32), [value.type for value in given])
        found = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), given)
        return builder.sext(found, ir.IntType(64))

    if arguments == 0:

        @intrinsic
        def call_nothing(typingctx):  # type: ignore[no-untyped-def]
            return types.int64(), generate

        return call_nothing

    @intrinsic
    def call_with_mask(typingctx, thread, size, mask):  # type: ignore[no-untyped-def]
        return types.int64(types.int32, types.int64, mask), generate

    return call_with_mask


_core_at_hand = _libc("sched_getcpu", 0)
_set_cores = _libc("sched_setaffinity", 3)
MASK = 16  # words of a mask of cores: 1024 of them


@compiled()
def _bind(allowed):  # type: ignore[no-untyped-def]
    """Let the calling thread run on these cores only."""
    mask = np.zeros(MASK, np.uint64)
    for core in allowed[allowed < 64 * MASK]:
        mask[core // 64] |= np.uint64(1) << np.uint64(core % 64)
    return _set_cores(np.int32(0), np.int64(8 * MASK), mask)


@compiled()
def stand_apart(thread, threads, counter, meetings, cores, allowed):  # type: ignore[no-untyped-def]
    """Move the calling thread to a core of its own, if another thread before it stands on the same.

    Args:
        thread: its number.
        threads: of the team.
        counter: as in `meet`.
        meetings: so far.
        cores: int64 [threads, 8], of each thread the core, and whether it is bound to it.
        allowed: int64, the cores that the process may use; fewer than threads for leaving them where they are.

    Returns:
        The meetings so far, or -1 if a thread did not come.
    """
    if allowed.size < threads or threads == 1:
        return meetings
    cores[thread, 0] = _core_at_hand()
    meetings += threads
    if not meet(counter, meetings):
        return -1
    place = -1  # among those that have to move
    for other in range(thread + 1):
        for before in range(other):
            if cores[before, 0] == cores[other, 0]:
                place += 1
                break
        else:
            if other == thread:
                return meetings
    for core in allowed:
        taken = False
        for other in range(threads):
            taken |= cores[other, 0] == core
        if not taken:
            if place == 0:
                cores[thread, 1] = _bind(np.array([core])) == 0
                return meetings
            place -= 1
    return meetings


@compiled(parallel=True)
def release(threads, cores, allowed):  # type: ignore[no-untyped-def]
    """Let the team's threads that were bound run everywhere again. The arguments are those of `stand_apart`."""
    for thread in prange(threads):
        if cores[thread, 1] == 1:
            _bind(allowed)
            cores[thread, 1] = 0


def line_padded(size: int) -> int:
    """Return a number of 4-byte values that fills whole cache lines, and one more, so that threads share none."""
    return -(-size // 16) * 16 + 16


def address(array: np.ndarray) -> int:
    """Return where an array lies; keep it alive while the address is used."""
    return int(array.ctypes.data)
