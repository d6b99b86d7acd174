"""Whether a model's attentions call an attention function of ours, tried on a batch: for transforms that set one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actkit.core.edit.edits import ATTENTION, Configure, get_module
from actkit.core.forward.batch import forward
from actkit.core.forward.example import make_example
from actkit.core.forward.hooks import evaluating
from actkit.core.layers.attention_function import watched_calls
from actkit.core.recipe.seen import Trial


def why_unasked(trial: Trial, function: Mapping[str, Any], data: Sequence[Any] = ()) -> str | None:
    """Say why the attention of a model would not be computed by a function of ours, or None.

    Args:
        trial: of the model.
        function: its name and settings.
        data: calibration batches; without any an example is made.

    Raises:
        UnsupportedModelError: the model's attention needs what the function does not compute.
    """
    paths = [block.attention.path for block in trial.anatomy.blocks if block.attention is not None]
    if not paths:
        return "no attention is described"
    batch = data[0] if len(data) else make_example(trial.model, 1)
    with trial([Configure(ATTENTION, function)]) as model, evaluating(model), watched_calls() as calls:
        forward(model, batch)
        asked = {id(module) for module in calls}
        missed = [p for p in paths if not any(id(each) in asked for each in get_module(model, p).modules())]
    return f"{missed[0]} does not call transformers' attention function" if missed else None
