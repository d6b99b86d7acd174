"""What a model or a batch is, as 64 hex digits: equal for equal values, and others for any edit.

Every byte is read. SHA-256 reads about 2 GB a second and core if the processor has instructions for it, so a model
of a billion weights in 16 bits takes a second of one core, and tensors are shared among torch's threads. Nothing is
remembered between calls: what could tell that nothing was written since (version counters, times of files) is not told
of writes through `.data` or NumPy, and a second is less than any of the work that a fingerprint stands before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.ground.modules import memory_of
from actkit.core.ground.offload import value_of


def fingerprint(value: Any) -> str:
    """SHA-256 of nested tensors and what prints: equal for equal batches."""
    digest = hashlib.sha256()
    _read(value, digest.update)
    return digest.hexdigest()


def model_fingerprint(model: nn.Module, *, widened: bool = False) -> str:
    """Hash the class, and names, shapes, types and values of all saved tensors, offloaded ones too, with SHA-256.

    Args:
        model: in memory, or offloaded.
        widened: values of 16 bits count as float32, which holds them exactly, so that a model has the same fingerprint
            if it was loaded in float32.

    Raises:
        UnsupportedModelError: a tensor is on the meta device, and nothing fills it.
    """
    state = model.state_dict(keep_vars=True)
    alike: dict[Any, str] = {}  # tied tensors are read once
    for name, tensor in state.items():
        alike.setdefault(memory_of(name, tensor), name)

    def read(name: str) -> str:
        value = value_of(model, name, state[name])
        return fingerprint(value.float() if widened and value.dtype in (torch.float16, torch.bfloat16) else value)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing holds no lock of Python's
        digests = dict(zip(alike.values(), pool.map(read, alike.values()), strict=True))
    rows = [f"{name} {digests[alike[memory_of(name, tensor)]]}" for name, tensor in state.items()]
    return hashlib.sha256("\n".join([type(model).__name__, *rows]).encode()).hexdigest()


def _read(value: Any, update: Callable[[Any], None]) -> None:
    if isinstance(value, Tensor):
        update(f"{value.dtype} {tuple(value.shape)}".encode())
        update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            update(str(key).encode())
            _read(value[key], update)
    elif isinstance(value, list | tuple):
        for item in value:
            _read(item, update)
    else:
        update(repr(value).encode())
