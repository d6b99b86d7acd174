"""The plain transformers model that a config builds, without values; and whether a saved model would load again.

Loading builds a model from its config and fills in the tensors. A model whose tensors are unlike those (a layer that
was narrowed by hand, a head that was taken away) would be written and never be read again: `save` refuses it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actkit.core.edit.edits import place_of
from actkit.core.ground.errors import CheckpointError
from actkit.core.layers.hidden_act import enter_those_of
from actkit.core.store.pretrained import base_type


def plain_model(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """The unchanged model that a model's config builds, on the meta device.

    Args:
        model: changed by actkit or not.
        settings: of the config, which win over the model's.
    """
    base: Any = getattr(type(model), "actkit_base", type(model))
    given: dict[str, Any] = model.config.to_dict()
    given["model_type"] = base_type(str(given.get("model_type", "")))
    enter_those_of(given | settings)
    with torch.device("meta"):
        return base(base.config_class.from_dict(given | settings))


def check_rebuilds(model: PreTrainedModel, edits: Sequence[dict[str, Any]]) -> None:
    """Refuse a model whose tensors are not those that its config builds, naming them.

    Args:
        model: of transformers.
        edits: of actkit; the modules that they replace say their own shapes.

    Raises:
        CheckpointError: tensors differ.
    """
    before = {str(edit["configure"]): edit["before"] for edit in reversed(edits) if "before" in edit}
    name = getattr(type(model), "actkit_base", type(model)).__name__
    try:
        plain = plain_model(model, **before)
    except Exception as error:  # each config class checks its values in its own way
        raise CheckpointError(
            f"save: no {name} can be built from this model's config ({error}), so that the folder would not load; "
            f"mend model.config."
        ) from error
    replaced = tuple(f"{path}." for edit in edits if (path := place_of(edit)))
    expected, found = (
        {key: tuple(value.shape) for key, value in each.state_dict().items() if isinstance(value, Tensor)}
        for each in (plain, model)
    )
    problems = [
        f"{key} is {found.get(key, 'not there')}, by the config {expected.get(key, 'not there')}"
        for key in dict.fromkeys((*expected, *found))
        if expected.get(key) != found.get(key) and not key.startswith(replaced)
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"save: the model is not what its config builds, so that the folder would not load: "
            f"{'; '.join(problems[:5])}{more}. Change model.config with the tensors, or undo what was changed by hand."
        )
