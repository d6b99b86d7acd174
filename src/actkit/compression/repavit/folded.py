"""A trained MLP with idle channels, folded into three small matrices: RePaViT (2025, ICML, arXiv:2505.21847).

    W1' = W1 diag(s1),  b1' = b1 + W1 t1,    W2' = W2 diag(s2),  b2' = b2 + W2 t2        (s x + t: the batch norms)

    mlp(x) = Wr x + br + W2'[:, :A] act( W1'[:A] x + b1'[:A] )
    Wr = W2'[:, A:] W1'[A:],   br = W2'[:, A:] b1'[A:] + b2'

The norm in front of the MLP is folded too, and a module that passes its input on stands in its place. The paper adds
the identity to Wr, for the sum with x; here that sum is the model's own, and stays.

When to use it: `reparameterize`, once after a training of what `repavit` made.
Cost: none; (2 A / d + 1) d^2 weights of an MLP in place of 2 width d, which is 0.375 of them at width 4 d and 0.75
idle; no norm. The multiplications fall alike.
Settled here: computed in float64 and rounded once to the model's dtype. Each block is compared before and after on a
probe batch by whoever applies it, as of all transforms that claim to be exact. Without idle channels (the last block of
`heuristic: linear`) the two matrices stay two; with none active there is one. A model in training mode is refused, so
are layers that hold codes: fold, then round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from actkit.compression.repavit.idle import IdleMlp, TokenBatchNorm
from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.ground.errors import EditError
from actkit.core.layers.activations import Activation
from actkit.core.layers.batch_norm import norm_in_front
from actkit.core.layers.known_layers import why_unread
from actkit.core.layers.nothing import PassThrough
from actkit.core.model.anatomy import Block, Norm
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform


class FoldedMlp(nn.Module):
    """skip(x) + down(act(up x)): [..., features] -> the same shape.

    Args:
        features: channels of x.
        active: hidden channels; without any there is only skip.
        act: the name of the activation.
        skip: whether there is a matrix beside the activation; without it down has the bias.

    Raises:
        ValueError: there is neither a skip nor an active channel.
    """

    def __init__(self, features: int, active: int, act: str = "gelu", skip: bool = True) -> None:
        super().__init__()
        if active < 0 or not (skip or active):
            raise ValueError(f"active: {active} was given {'' if skip else 'without a skip'}; give 1 or more.")
        self.features, self.active = features, active
        self.skip = nn.Linear(features, features) if skip else None
        self.up = nn.Linear(features, active) if active else None
        self.act_fn = Activation(act)
        self.down = nn.Linear(active, features, bias=not skip) if active else None

    @property
    def linear_inputs(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Which of its layers read one tensor, by the name of its site."""
        first = (*["skip"] * (self.skip is not None), *["up"] * (self.up is not None))
        return (("mlp.input", first), *[("mlp.hidden", ("down",))] * (self.down is not None))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x [..., features]."""
        parts: list[Tensor] = [] if self.skip is None else [self.skip(x)]
        if self.up is not None and self.down is not None:
            parts.append(self.down(self.act_fn(self.up(x))))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {
            "features": self.features,
            "active": self.active,
            "act": self.act_fn.name,
            "skip": self.skip is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> FoldedMlp:
        """Make it in the dtype of what stands in its place; the values come from the weights file."""
        made = cls(**spec)
        return made if original is None else made.to(next(original.parameters()).dtype)


@torch.no_grad()
def fold(norm: nn.Module, mlp: IdleMlp) -> FoldedMlp:
    """Return what computes mlp(norm(x)) in evaluation mode, without norms.

    Args:
        norm: the batch norm in front of the MLP.
        mlp: with a batch norm inside.

    Raises:
        ValueError: a batch norm is in training mode or keeps no statistics, or a layer is not a plain linear one.
    """
    for name, layer in (("up", mlp.up), ("down", mlp.down)):
        reason = "it is no nn.Linear" if not isinstance(layer, nn.Linear) else why_unread(layer)
        if reason is not None:
            raise ValueError(
                f"{name}: a {type(layer).__name__} stands there whose weight is not to be multiplied ({reason}); fold "
                f"first, then round or adapt."
            )
    active = mlp.active
    up, up_bias = norm_in_front(norm, mlp.up.weight, mlp.up.bias)
    down, bias = norm_in_front(mlp.norm, mlp.down.weight, mlp.down.bias)
    skip = active < len(up)
    made = FoldedMlp(mlp.up.in_features, active, mlp.act_fn.name, skip).double()
    if made.skip is not None:
        made.skip.weight.copy_(down[:, active:] @ up[active:])
        bias = bias + down[:, active:] @ up_bias[active:]
    if made.up is not None and made.down is not None:
        made.up.weight.copy_(up[:active])
        made.down.weight.copy_(down[:, :active])
        made.up.bias.copy_(up_bias[:active])
    last = made.down if made.skip is None else made.skip
    assert last is not None and last.bias is not None
    last.bias.copy_(bias)
    return made.to(mlp.up.weight.device, mlp.up.weight.dtype).train(mlp.training)


class Reparameterize(Transform):
    """Fold every MLP with idle channels, and the batch norm in front of it, into three small matrices.

    Raises:
        EditError: when applied: there is none, one cannot be folded, or the model is in training mode.
    """

    tags: ClassVar[Tags] = Tags(changes_function="exact", evaluated=True, plans_in_turn=True, least_coverage=0.0)
    not_proposed: ClassVar[str] = "it needs a model that `repavit` changed and that was trained"

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        """Find what is to be folded; all can be before the first one is.

        Args:
            trial: the model as it is.
            data: none is read.
        """
        found = [(block, *each) for block in trial.anatomy.blocks for each in _idle(trial.anatomy.block(block.index))]
        if not found:
            raise EditError(
                f"reparameterize: this {type(trial.model).__name__} has no MLP with idle channels"
                f"{' (its MLPs are folded already)' if _is_folded(trial.model) else ''}; apply `repavit` and train it."
            )
        for _, path, mlp, norm in found:
            _folded(path, mlp, norm)
        return self

    def targets(self, block: Block) -> Iterable[Target]:
        return [path for path, _, _ in _idle(block)]

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.slots:
            return f"{type(earlier).__name__} filled the layers that are to be multiplied; fold first, then round"
        return super().conflicts(earlier)

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        for path, mlp, norm in _idle(block):
            folded = _folded(path, mlp, norm)
            before = sum(parameter.numel() for module in (mlp, norm.module) for parameter in module.parameters())
            after = sum(parameter.numel() for parameter in folded.parameters())
            yield Replace(path, folded)
            yield Replace(norm.path, PassThrough().train(norm.module.training))
            yield Note(
                path, f"{before:,} numbers became {after:,} ({after / before:.3f})", {"before": before, "after": after}
            )


def _idle(block: Block) -> list[tuple[str, IdleMlp, Norm]]:
    """The MLP of a block with its path and the norm in front of it, if it has idle channels."""
    norm = next((norm for norm in block.norms if norm.role == "mlp"), None)
    found = [(path, module) for path, module in block.module.named_modules() if isinstance(module, IdleMlp)]
    return [(f"{block.path}.{path}", module, norm) for path, module in found if norm is not None]


def _folded(path: str, mlp: IdleMlp, norm: Norm) -> FoldedMlp:
    """Fold an MLP of a model. Raises EditError, with its path, if it cannot be folded."""
    for place, module in ((norm.path, norm.module), (f"{path}.norm", mlp.norm)):
        if not isinstance(module, TokenBatchNorm):
            raise EditError(
                f"{place}: a {type(module).__name__} stands there, which is no factor for each channel and cannot be "
                f"folded; train a model that `repavit` made with norm='batch'."
            )
    try:
        return fold(norm.module, mlp)
    except ValueError as error:
        raise EditError(f"reparameterize: {path}: {error}") from error


def _is_folded(model: nn.Module) -> bool:
    return any(isinstance(module, FoldedMlp) for module in model.modules())
