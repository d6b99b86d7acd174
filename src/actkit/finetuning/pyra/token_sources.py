"""Where the tokens of an image went: which patches each token of the last block holds.

    S_0 = identity,   S_l = merge(S_{l-1})  with the pairs of block l        [tokens left, tokens], 0 or 1

When to use it: to show what was merged, or to give each patch an output again (`merging.unmerge`), as a dense task
needs.
Cost: a forward pass, and tokens * tokens left numbers an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground.errors import DataError
from actkit.finetuning.pyra.merging import merge
from actkit.finetuning.pyra.merging_layer import MergingLayer


def token_sources(model: nn.Module, batch: Any) -> Tensor:
    """Return which tokens of the input each token of the last block holds.

    Args:
        model: that merges tokens.
        batch: images.

    Returns:
        [batch, tokens left, tokens], 1 where a token went into one that is left; rows sum to sizes, columns to 1.

    Raises:
        DataError: the model merges no tokens.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, MergingLayer)]
    if not paths:
        raise DataError("model: it merges no tokens; apply the transform merge_tokens first.")
    maps: list[Tensor] = []

    def follow(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, _ = layer.split(args[0] if args else kwargs["hidden_states"])
        if not maps:
            maps.append(torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1))
        if layer.r:
            maps.append(merge(maps[-1], layer.matching(layer.layernorm_before(x))))

    with evaluating(model), hooked(model, before=dict.fromkeys(paths, follow)):
        forward(model, batch)
    return maps[-1]
