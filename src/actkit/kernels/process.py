"""What the compiled kernels share in a process: the compile cache, the lock and the threads.

Imports Numba, so that only the modules with kernels import it, on first use.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import torch
from numba import cfunc, njit

from actkit.kernels.compile_cache import cache_folder

_CONFIG: Any = numba.config  # untyped in Numba
SMALL = 1 << 18  # bytes; below, waking a second thread takes longer than its half of the reading
PER_BYTE = 8  # what a pass over numbers takes, in readings of them: a function and a rounding of each
LOCK = threading.Lock()  # one kernel at a time: they share the cores anyway, and not every Numba layer is thread-safe
_started_in: int | None = None


# -- compiling ---------------------------------------------------------------------------------------------------------


def _choose_cache() -> str | None:
    """Return the folder of the compile cache: the one the user chose, or ours; None if none can be written."""
    if _CONFIG.CACHE_DIR:
        return str(_CONFIG.CACHE_DIR)
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or a read-only one: compile in memory, every time
        return None
    return str(folder) if os.access(folder, os.W_OK) else None


_CACHE = _choose_cache()
_ALWAYS: Any = {"nogil": True, "error_model": "numpy", "boundscheck": False}


def compiled(
    parallel: bool = False, fastmath: Any = False, inline: bool = False, inner: bool = False
) -> Callable[[Any], Any]:
    """Decorate a kernel: it is compiled by Numba when it first runs, and kept in the compile cache.

    Args:
        parallel: as Numba takes it.
        fastmath: as Numba takes it.
        inline: into its callers.
        inner: only other kernels call it, so it has no entry from Python and no place of its own in the cache, which
            saves a sixth of the decoding step's compiling.
    """

    def decorate(function: Any) -> Any:
        with _own_cache():
            return njit(  # type: ignore[call-overload]
                cache=_CACHE is not None and not inner,
                no_cpython_wrapper=inner,
                no_cfunc_wrapper=inner,
                parallel=parallel,
                fastmath=fastmath,
                inline="always" if inline else "never",
                **_ALWAYS,
            )(function)

    return decorate


def called_by_address(signature: Any) -> Callable[[Any], Any]:
    """Decorate a kernel that other kernels call by its `.address`: compiled at once, or read from the compile cache."""

    def decorate(function: Any) -> Any:
        with _own_cache():
            return cfunc(signature, cache=_CACHE is not None, **_ALWAYS)(function)  # type: ignore[call-overload]

    return decorate


@contextmanager
def _own_cache() -> Iterator[None]:
    """Choose our folder, for our kernels only."""
    before = _CONFIG.CACHE_DIR
    _CONFIG.CACHE_DIR = _CACHE or before
    try:
        yield
    finally:
        _CONFIG.CACHE_DIR = before


# -- threads -----------------------------------------------------------------------------------------------------------


def _start() -> None:
    """Start Numba's threads: the layer `omp`, which shares torch's OpenMP pool if torch was imported first."""
    global _started_in
    threads = torch.get_num_threads()
    if _CONFIG.THREADING_LAYER == "default":
        try:
            importlib.import_module("numba.np.ufunc.omppool")
            _CONFIG.THREADING_LAYER = "omp"
        except ImportError:
            warnings.warn("Numba's OpenMP threads are missing here; its tbb or workqueue layer is used.", stacklevel=2)
    numba.set_num_threads(1)
    torch.set_num_threads(threads)  # starting Numba's OpenMP layer overwrites torch's number of threads
    _started_in = os.getpid()


def most_threads() -> int:
    """Return how many threads Numba can run side by side in this process."""
    return int(_CONFIG.NUMBA_NUM_THREADS)


def follow_torch_threads(nbytes: int, times: int = 1) -> int:
    """Use as many threads as torch has, or one for little work; call it with the lock held.

    Args:
        nbytes: of the weight, or of what else is read.
        times: how much longer it takes than to read them, such as the rows that each byte of a weight meets.

    Returns:
        How many threads.
    """
    if _started_in is None:
        _start()
    elif _started_in != os.getpid():
        raise RuntimeError(
            "actkit.kernels: this process was forked after the kernels ran, and OpenMP does not survive a fork; "
            "start processes with multiprocessing's 'spawn' method."
        )
    threads = 1 if nbytes * times < SMALL else min(torch.get_num_threads(), _CONFIG.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != threads:  # Numba keeps the number per thread; anyone may have set it
        numba.set_num_threads(threads)
    return threads
