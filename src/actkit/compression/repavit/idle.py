"""MLPs most of whose channels skip the activation: RePaViT's form for training (2025, ICML, arXiv:2505.21847).

    y = x + W2 norm2(h) + b2,   h = W1 norm1(x) + b1,   h[:A] = act(h[:A]),   A = ceil(width (1 - idle))

The idle channels h[A:] are linear from end to end, so that `reparameterize` can multiply their matrices once the model
is trained. Both norms are batch norms over images and tokens, which are a factor and a shift in evaluation mode; the
sum with x stays where the model has it.

When to use it: before training a vision transformer whose MLPs are to be fast later. In the paper, large models lose
little or gain at `idle` 0.75 (DeiT-Base 81.8 -> 81.3 %, ViT-Large 80.3 -> 82.0 %), small ones lose more (DeiT-Tiny at
0.5 72.1 -> 69.4 %), and all at 1. Train with all channels and fold after: training the folded form is worse there.
Cost: while it is trained, one batch norm of the width more; slower than before, in the paper too.
Settled here: weights stay as they were, so that a trained model can go on from what it knows; the first norm takes the
scale and shift of the one that it replaces. The idle channels are the last ones, and none is chosen. `heuristic:
linear` raises the share with depth and leaves the last block whole, as the release does. `norm: layer` keeps the
model's own norm and has no second one; that form cannot be folded.
Our own reading: text models are refused, as padding would enter the statistics; the paper has images alone. Statistics
of small batches drift (momentum 0.1): end a training with batches of the size that it had.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module
from actkit.core.forward.example import Inputs
from actkit.core.ground.errors import EditError
from actkit.core.layers.activations import Activation, name_of
from actkit.core.model.anatomy import Block, Mlp, Norm, anatomy
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform

Heuristic = Literal["static", "linear"]


class TokenBatchNorm(nn.BatchNorm1d):
    """A batch norm over all rows: [..., features] -> the same shape.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: of the running statistics.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel of x [..., features]."""
        rows: Tensor = super().forward(x.reshape(-1, x.shape[-1]))
        return rows.view(x.shape)

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments; statistics and parameters are in the weights file."""
        return {"num_features": self.num_features, "eps": self.eps, "momentum": self.momentum}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> TokenBatchNorm:
        """Make it in the dtype of the norm that stands in its place."""
        made = cls(**spec)
        return made if original is None else made.to(next(original.parameters()).dtype)


class IdleMlp(nn.Module):
    """down(norm(h)), h = up x with the activation on its first `active` channels: [..., features] -> the same shape.

    Args:
        features: channels of x.
        width: hidden channels.
        active: how many of them go through the activation.
        act: the name of the activation.
        batch_norm: whether there is a norm in front of down.
        drop_path: share of the rows of a batch whose output is dropped in training (stochastic depth).
        biases: whether up and down have one.

    Raises:
        ValueError: more active channels than there are, or a share outside [0, 1).
    """

    linear_inputs: ClassVar[Any] = (("mlp.input", ("up",)), ("mlp.hidden", ("down",)))

    def __init__(
        self,
        features: int,
        width: int,
        active: int,
        act: str = "gelu",
        batch_norm: bool = True,
        drop_path: float = 0.0,
        biases: tuple[bool, bool] = (True, True),
    ) -> None:
        super().__init__()
        if not 0 <= active <= width:
            raise ValueError(f"active: {active} was given for {width} hidden channels; give 0 to {width}.")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: {drop_path} was given; give a share of at least 0 and below 1.")
        self.active, self.drop_path = active, drop_path
        self.up = nn.Linear(features, width, bias=biases[0])
        self.act_fn = Activation(act)
        self.norm = TokenBatchNorm(width) if batch_norm else nn.Identity()
        self.down = nn.Linear(width, features, bias=biases[1])

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x [..., features]."""
        h = self.up(x)
        if self.active:
            h = torch.cat((self.act_fn(h[..., : self.active]), h[..., self.active :]), -1)
        y: Tensor = self.down(self.norm(h))
        if self.training and self.drop_path:
            kept = y.new_empty(len(y), *[1] * (y.dim() - 1)).bernoulli_(1 - self.drop_path)
            y = y * kept / (1 - self.drop_path)
        return y

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {
            "features": self.up.in_features,
            "width": self.up.out_features,
            "active": self.active,
            "act": self.act_fn.name,
            "batch_norm": isinstance(self.norm, TokenBatchNorm),
            "drop_path": self.drop_path,
            "biases": [self.up.bias is not None, self.down.bias is not None],
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> IdleMlp:
        """Make it in the dtype of what stands in its place; the values come from the weights file."""
        made = cls(**{**spec, "biases": tuple(spec["biases"])})
        return made if original is None else made.to(next(original.parameters()).dtype)

    def extra_repr(self) -> str:
        idle = 1 - self.active / self.up.out_features
        return f"active={self.active}, idle={idle:.3g}, drop_path={self.drop_path:g}"


def active_channels(width: int, idle: float) -> int:
    """Return how many hidden channels go through the activation: ceil(width (1 - idle)).

    Args:
        width: hidden channels.
        idle: share of them that does not, from 0 to 1.

    Raises:
        EditError: less than one channel would be active, and not exactly none.
    """
    active = round(width * (1 - idle), 9)  # 0.3 of 100 channels are 30, not 30.000000000000004
    if 0 < active < 1:
        raise EditError(
            f"idle: {idle:g} was given for an MLP of {width} channels, of which less than one would be active; give at "
            f"most {1 - 1 / width:.6g}, or 1 for none."
        )
    return ceil(active)


def idle_share(idle: float, heuristic: Heuristic, index: int, depth: int) -> float:
    """Return the share of idle channels of a block.

    Args:
        idle: that was set.
        heuristic: how it differs by block.
        index: of the block.
        depth: how many blocks there are.

    Raises:
        EditError: the share of a block would be negative.
    """
    if heuristic == "static":
        return idle
    if index == depth - 1:
        return 0.0
    share = (2 * idle - 1) + (2 - 2 * idle) / (depth - 1) * (index + 1)
    if share < 0:
        raise EditError(
            f"idle: {idle:g} was given with heuristic 'linear', which gives block {index} of {depth} a share of "
            f"{share:.3g}; give at least 0.5, or heuristic 'static'."
        )
    return min(share, 1.0)


class Repavit(Transform):
    """Let the last channels of each MLP skip the activation, and make its norm a batch norm; then train.

    Attributes:
        idle: share of the hidden channels that skip it (theta in the paper).
        heuristic: one share for all blocks, or one that rises with depth.
        norm: 'batch' can be folded after training; 'layer' keeps the model's norm, and cannot.
        drop_path: share of the images whose MLP is dropped in a step of training.

    Raises:
        EditError: when applied: no channel would be active, or the model reads texts.
    """

    idle: float = Field(0.75, ge=0, le=1)
    heuristic: Heuristic = "static"
    norm: Literal["batch", "layer"] = "batch"
    drop_path: float = Field(0.0, ge=0, lt=1)

    tags: ClassVar[Tags] = Tags(least_coverage=0.25)
    not_proposed: ClassVar[str] = "it changes what a model computes, and pays only after training"

    def targets(self, block: Block) -> Iterable[Target]:
        return [] if block.mlp is None or _why_not(block.mlp) else (*block.mlp.inputs, block.mlp.down)

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.slots:
            return f"what {type(earlier).__name__} made of the MLPs' layers would be lost; train and fold first"
        return super().conflicts(earlier)

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        if Inputs.of(block.root).vocabulary is not None:
            raise EditError(
                f"repavit: a {type(block.root).__name__} reads texts, whose padding would enter the statistics of the "
                f"batch norms; give a model that reads images, each of as many tokens."
            )
        mlp = block.mlp
        reason = "no MLP that actkit reads" if mlp is None else _why_not(mlp)
        if mlp is None or mlp.norm is None or reason is not None:
            yield Skip(block.path or "model", str(reason))
            return
        share = idle_share(self.idle, self.heuristic, block.index, _depth(block, self.heuristic))
        active = active_channels(mlp.width, share)
        act = name_of(get_module(block.root, mlp.activation))
        assert act is not None
        new = IdleMlp(
            mlp.up.in_features,
            mlp.width,
            active,
            act,
            self.norm == "batch",
            self.drop_path,
            (mlp.up.bias is not None, mlp.down.bias is not None),
        )
        with torch.no_grad():
            for mine, theirs in ((new.up, mlp.up), (new.down, mlp.down)):
                mine.weight.copy_(theirs.weight)
                if mine.bias is not None and theirs.bias is not None:
                    mine.bias.copy_(theirs.bias)
        weight = mlp.down.weight
        if self.norm == "batch":
            norm = _batch_norm(mlp.norm, mlp.up.in_features)
            yield Replace(mlp.norm.path, norm.to(weight.device, weight.dtype).train(mlp.norm.module.training))
        yield Replace(mlp.path, new.to(weight.device, weight.dtype).train(mlp.module.training))
        yield Note(mlp.path, f"{mlp.width - active} of {mlp.width} channels skip {act}; train the model")


def _depth(block: Block, heuristic: Heuristic) -> int:
    return len(anatomy(block.root).blocks) if heuristic == "linear" else 0


def _why_not(mlp: Mlp) -> str | None:
    """Why an MLP cannot have idle channels, or None."""
    if mlp.gated:
        return "its MLP has a gate, which is no activation between two layers"
    if mlp.norm is None or mlp.norm.role != "mlp" or mlp.norm.feeds_residual:
        return "no norm stands in front of the MLP alone"
    if any(type(linear.module) is not nn.Linear for linear in (mlp.up, mlp.down)):
        return "the layers of its MLP are no plain linear layers"
    if name_of(dict(mlp.module.named_modules()).get(mlp.activation.removeprefix(f"{mlp.path}."), nn.Module())) is None:
        return "its activation has no registered name; swap it first"
    return None


@torch.no_grad()
def _batch_norm(norm: Norm, features: int) -> TokenBatchNorm:
    """A batch norm with the scale and shift of the norm in whose place it comes."""
    made = TokenBatchNorm(features)
    weight, bias = (getattr(norm.module, name, None) for name in ("weight", "bias"))
    if weight is not None:
        made.weight.copy_(weight + norm.offset)
    if bias is not None:
        made.bias.copy_(bias)
    return made
