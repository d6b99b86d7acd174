"""The squared gradient of the loss in parameters, the mean over batches: with a document per batch, Fisher information.

S = mean over batches of (dL / dW)^2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import check_batch
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import NonFiniteError
from actkit.core.ground.progress import track
from actkit.core.train.objective import Loss, Objective


def squared_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Sequence[Any],
    *,
    loss: Loss | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Square the gradients of the loss in some parameters, and average them over batches.

    Args:
        model: nothing of it is changed.
        parameters: of it, by names for the result.
        batches: with labels if the model is no language model; best one document each.
        loss: of (model, batch), a scalar; None for that of the model's task.
        progress: show a bar.

    Returns:
        By name, float32, in the shape of the parameter.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.
    """
    sums = {name: torch.zeros(each.shape, device=each.device) for name, each in parameters.items()}
    objective = Objective(model, loss)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for batch in track(batches, "Squaring gradients", enabled=progress):
                check_batch(model, batch)
                gradients = torch.autograd.grad(objective(model, batch), list(parameters.values()))
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    total += gradient.float().square()
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise NonFiniteError(f"{name}: the gradient of its weight is NaN or Inf; check the data and the dtype.")
    return {name: total / len(batches) for name, total in sums.items()}
