"""The global random generators of torch, NumPy and Python: their state, and work with numbers of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def own_random_numbers(device: torch.device, seed: int) -> Iterator[None]:
    """Let the generators begin with `seed`; afterwards they go on from where they stood, as if nothing had been drawn.

    Args:
        device: whose generator is meant, beside the CPU's; generators that are made by hand are left alone.
        seed: of all of them.
    """
    before = random_state(device)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        set_random_state(before, device)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the generators, in tensors and what JSON takes."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, next_gauss = random.getstate()
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": {"version": version, "words": torch.tensor(words), "gauss": next_gauss},
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators where `random_state` found them; those that an older state does not know are left alone."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if "numpy" in state:
        found = state["numpy"]
        keys = found["keys"].numpy().astype(np.uint32)
        np.random.set_state((found["kind"], keys, found["position"], found["has_gauss"], found["gauss"]))
    if "python" in state:
        found = state["python"]
        random.setstate((found["version"], tuple(found["words"].tolist()), found["gauss"]))
