"""TrAct: a first layer that learns as if its pre-activations were trained (2024, NeurIPS, arXiv:2410.23970).

    gradient of W:  g_z^T x (x^T x / b + ridge I)^-1,   x [b, n] the inputs, g_z [b, m] the gradient of z = x W^T

The gradient of a first layer is that of its pre-activations times raw inputs, so that bright and contrasty images
change it most. TrAct takes the step on the pre-activations, and gives the weight the change that realises it best, by
ridge regression. That is the ordinary gradient times an inverse, and what optimizer follows does not matter.

When to use it: to train a network on images, spectra or sensor values from scratch in fewer steps; a rule, also in your
own loop (`attached`) and in transformers' Trainer. Inputs should be standardised, the loss a mean over the batch.
Not for fine-tuning, and not for layers whose inputs are activations: those should weigh by their size.
Cost: the products x^T x [n, n] and one solve of that size for each backward pass; nothing after training. If fewer rows
than inputs came in, both have the size of the rows. n is 27 for 3 x 3 x 3 pixels, 768 for a ViT's patch.
Settled here: rows are positions of a convolution too, and the product is divided by their number (dividing by the batch
would change `ridge` with the size of the image). The gradient is replaced as autograd passes it on, before it is added
to `weight.grad`: clipping sees the new one, weight decay stays outside, and it works under a gradient scaler, in any
loop, and with several processes, of which each solves with its own rows. When gradients are accumulated each batch is
solved with its own rows; `accumulate: exact` takes those of the whole step, in loops that call `after_backward`. The
layer and its bias stay as they are, so that nothing is left behind. An embedding's inputs are 0 and 1: it is refused,
as there is nothing to gain. The release's `cholesky_inverse` is not followed: it inverts another matrix.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import StopForward, evaluating, hooked
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.layer_rows import rows_of
from actkit.core.recipe.rule import AttachedRule, TrainingRule

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
SOLVED = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)
MANY = 4096  # inputs of a layer, from which on the solve is slow


def tract_gradient(gradient: Tensor, x: Tensor, ridge: float = 0.1) -> Tensor:
    """Compute TrAct's gradient of a linear layer's weight.

    Args:
        gradient: of the pre-activations, [rows, outputs], of a loss that is a mean over the rows' examples.
        x: the inputs, [rows, inputs].
        ridge: lambda, above 0.

    Returns:
        [outputs, inputs], in the dtype of x.

    Raises:
        ValueError: ridge is not above 0, or the rows differ.
    """
    if not ridge > 0:
        raise ValueError(f"ridge: {ridge} was given; give a number above 0 (0.1 in the paper).")
    if gradient.dim() != 2 or x.dim() != 2 or len(gradient) != len(x):
        raise ValueError(
            f"gradient, x: shapes {tuple(gradient.shape)} and {tuple(x.shape)} were given; give [rows, outputs] and "
            f"[rows, inputs] with equal rows."
        )
    return _solved((gradient.t() @ x)[None], x[None], ridge)[0][0].to(x.dtype)


def _solved(gradient: Tensor, x: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """g = gradient (x^T x / rows + ridge I)^-1, for gradients [groups, m, n] and x [groups, rows, n]; |x g^T|^2 too."""
    rows, inputs = x.shape[-2:]
    one = torch.eye(min(rows, inputs), dtype=x.dtype, device=x.device)
    if rows < inputs:
        inner = x @ x.mT / rows + ridge * one
        inside = torch.cholesky_solve(x @ gradient.mT, torch.linalg.cholesky(inner))  # [groups, rows, m]
        found = (gradient - inside.mT @ x / rows) / ridge
        return found, (x @ found.mT).square().sum()
    square = x.mT @ x / rows
    found = torch.cholesky_solve(gradient.mT, torch.linalg.cholesky(square + ridge * one)).mT
    return found, ((found @ square) * found).sum() * rows


class Tract(TrainingRule):
    """Train the first layer by TrAct.

    Attributes:
        ridge: lambda; the paper's is 0.1, 0.05 for a short training and 0.2 for a long one.
        layer: path of the layer; None for the first that is called.
        accumulate: 'batch' solves in each backward pass, 'exact' once for a step.
        solve_in: 'float32' or 'float64'.

    Raises:
        UnsupportedModelError: the model has no first layer that can be trained so.
    """

    ridge: float = Field(0.1, gt=0)
    layer: str | None = None
    accumulate: Literal["batch", "exact"] = "batch"
    solve_in: Literal["float32", "float64"] = "float32"

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedTract | AttachedExactTract:
        path = self.layer if self.layer is not None else first_layer(model, example)
        layer = dict(model.named_modules()).get(path)
        if not isinstance(layer, SOLVED):
            what = "is not there" if layer is None else f"is a {type(layer).__name__}"
            raise UnsupportedModelError(
                f"layer: {path!r} {what}; tract trains a Linear, Conv1d, Conv2d or transformers' Conv1D whose inputs "
                f"are data. An embedding has nothing to gain: leave the rule out."
            )
        if not layer.weight.requires_grad:
            raise UnsupportedModelError(
                f"layer: {path!r} is frozen; let it train (weight.requires_grad_()), or leave tract out."
            )
        inputs = layer.weight[0].numel() if not isinstance(layer, Conv1D) else len(layer.weight)
        if inputs > MANY:
            warnings.warn(f"tract: {path!r} reads {inputs} inputs; each solve takes as many equations.", stacklevel=2)
        kind = AttachedTract if self.accumulate == "batch" else AttachedExactTract
        return kind(self, path, layer)


def first_layer(model: nn.Module, example: Any = None) -> str:
    """Find the path of the layer that reads a model's inputs.

    Args:
        model: any module.
        example: a batch; the first layer that is called on it is taken. None: the first that is registered.

    Raises:
        UnsupportedModelError: there is none.
    """
    kinds = (*LAYERS, nn.Embedding)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
    found = next(iter(layers), None)
    if example is not None and layers:
        seen: list[str] = []

        def stop(path: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                seen.append(path)
                raise StopForward

            return hook

        with evaluating(model), torch.no_grad(), hooked(model, before={path: stop(path) for path in layers}):
            try:
                forward(model, example)
            except StopForward:
                found = seen[0]
    if found is None:
        raise UnsupportedModelError(f"model: this {type(model).__name__} has no layer that tract could train.")
    return found


class AttachedTract(AttachedRule):
    """The rule at work: each backward pass is solved with its own rows.

    Args:
        rule: its settings.
        path: of the layer.
        layer: whose gradient is replaced.
    """

    def __init__(self, rule: Tract, path: str, layer: nn.Module) -> None:
        self.rule, self.path, self.layer = rule, path, layer
        self.weight: nn.Parameter = layer.get_parameter("weight")
        self.inputs: list[Tensor] = []  # of the calls that this backward pass has come through
        self.wanted = torch.zeros(())  # squares of the pre-activations' gradients, summed
        self.share: Tensor | None = None
        self.warned = False
        self._handles = [layer.register_forward_hook(self._called)]
        self._watch_weight()

    def _watch_weight(self) -> None:
        self._handles.append(self.weight.register_hook(self._replaced))

    def _called(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not (torch.is_grad_enabled() and output.requires_grad):
            return
        x = args[0].detach()
        if args[0].requires_grad and not self.warned:
            self.warned = True
            warnings.warn(
                f"tract: what {self.path!r} reads has a gradient, so it is not the first layer; its inputs are "
                f"activations, which should weigh by their size.",
                stacklevel=2,
            )

        def passed(gradient: Tensor) -> None:
            self.inputs.append(x)
            self.wanted = self.wanted.to(gradient.device) + torch.linalg.vector_norm(gradient.detach()).square()

        output.register_hook(passed)

    @torch.no_grad()
    def _replaced(self, gradient: Tensor) -> Tensor:
        if not self.inputs:  # the layer was called where nobody sees it, as F.linear(x, layer.weight)
            return gradient
        found = self._solve(gradient)
        self.inputs, self.wanted = [], torch.zeros(())
        return found

    def _solve(self, gradient: Tensor) -> Tensor:
        """The gradient of the weight in place of the ordinary one."""
        dtype = getattr(torch, self.rule.solve_in)
        with torch.autocast(gradient.device.type, enabled=False):
            parts = [rows_of(self.layer, x.to(dtype)) for x in self.inputs]  # [groups, rows, n] each
            rows = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            matrix = _matrix(self.layer, gradient.to(dtype), len(rows))
            found, realised = _solved(matrix, rows, self.rule.ridge)
            self.share = realised.sqrt() / (self.wanted.sqrt() * rows.shape[1]).clamp(min=1e-30)
        return _weight(self.layer, found, gradient)

    def report(self) -> dict[str, Any]:
        """Return how much of the wanted step on the pre-activations was realised in the last backward pass."""
        return {} if self.share is None else {"realised": float(self.share)}

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.inputs = []


class AttachedExactTract(AttachedTract):
    """The rule at work, solving once for a step, before its gradients are clipped."""

    def _watch_weight(self) -> None:
        """The gradient is replaced when it is complete."""

    def after_backward(self, progress: float) -> None:
        if self.weight.grad is not None:
            self.weight.grad.copy_(self._replaced(self.weight.grad))


# -- layers as matrices ------------------------------------------------------------------------------------------------


def _matrix(layer: nn.Module, gradient: Tensor, groups: int) -> Tensor:
    """The gradient of the weight as [groups, outputs, inputs]."""
    return gradient.t()[None] if isinstance(layer, Conv1D) else gradient.flatten(1).unflatten(0, (groups, -1))


def _weight(layer: nn.Module, matrix: Tensor, like: Tensor) -> Tensor:
    """The matrices in the shape and dtype of the weight."""
    found = matrix[0].t() if isinstance(layer, Conv1D) else matrix.flatten(0, 1).view_as(like)
    return found.to(like.dtype)
