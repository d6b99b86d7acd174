"""Where what rounds an attention is put, and whether the attention asks it: for transforms that round its operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actkit.core.edit.edits import ATTENTION, Configure, Insert, get_module
from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.grids.powers import PowerGrid
from actkit.core.layers.attention_rounding import CHILD, AttentionRounding
from actkit.core.layers.cache_rounding import IMPLEMENTATION
from actkit.core.model.anatomy import Block
from actkit.core.model.own_attention import why_no_function
from actkit.core.recipe.seen import Trial


def child_path(block: Block) -> str | None:
    """Return where what rounds a block's attention is put: in the module that makes the queries, or None.

    Args:
        block: of the anatomy.
    """
    if block.attention is None:
        return None
    maker = block.attention.inputs[0].path.rpartition(".")[0]
    get_module(block.root, maker)
    return f"{maker}.{CHILD}"


def why_unrounded(trial: Trial, data: Sequence[Any]) -> str | None:
    """Say why the attention of a model would not ask what is put there, or None: it is tried on the first batch.

    Args:
        trial: of the model.
        data: calibration batches.
    """
    paths = [path for block in trial.anatomy.blocks if (path := child_path(block)) is not None]
    reason = why_no_function(trial.model)
    if reason is not None or not paths:
        return reason or "no attention is described"
    asked: set[str] = set()
    edits = [Insert(path, AttentionRounding(weights=PowerGrid(4))) for path in paths]
    with trial([*edits, Configure(ATTENTION, IMPLEMENTATION)]) as model:
        before = {path: lambda *_, path=path: asked.add(path) for path in paths}
        with evaluating(model), hooked(model, before=before):  # type: ignore[arg-type]
            forward(model, data[0])
    missed = [path for path in paths if path not in asked]
    return f"{missed[0].removesuffix(f'.{CHILD}')} does not call transformers' attention function" if missed else None
