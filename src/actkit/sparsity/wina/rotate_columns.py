"""The rotation of WINA: an exact rewrite after which chosen matrices have orthogonal columns (2025, arXiv:2505.19427).

    norm(x) -> (norm without gain)(x) Q,   W -> W diag(gain) Q,   Q = V of the SVD  W diag(gain) = U S V^T

W diag(gain) Q = U S then has orthogonal columns, for W the key and the gate matrix. The paper rotates the residual
stream and pays two d x d products at the residual additions; this form is local to a block, keeps ties, and costs the
same: one d x d product per norm. The inputs of the layers, so also the masks, are those of the paper's form.
With grouped-query attention only kv_dim columns of the key matrix stay non-zero: a gain of the rotation, not of WINA.
When to use it: before `wina` or `teal` at high sparsity (0.5 and more), if that is worth two more products per block.
Settled here: for LayerNorm the bias b moves into the layers' biases (+ W b); the matrices made orthogonal are instead
the fused query-key-value, and up if there is no gate; norms that feed anything else (post-norm, routers) are left
alone. The release subtracts the mean of each embedding row while folding, which changes RMSNorm models: not done.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Set, Skip
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import DenseWeight
from actkit.core.model.anatomy import Block, Linear, Norm, is_linear
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform


class RotatedNorm(nn.Module):
    """norm(x) Q: a norm followed by a rotation.

    Args:
        norm: the norm.
        rotation: Parameter [d, d].
    """

    def __init__(self, norm: nn.Module, rotation: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.rotation = nn.Parameter(rotation, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., d] to [..., d]."""
        return self.norm(x) @ self.rotation

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {"width": self.rotation.shape[0], "dtype": str(self.rotation.dtype).removeprefix("torch.")}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> RotatedNorm:
        """Make the module that `spec` described; its values come from the checkpoint."""
        return cls(original, torch.empty(spec["width"], spec["width"], dtype=getattr(torch, spec["dtype"])))


class RotateColumns(Transform):
    """Make the columns of the key (or fused query-key-value) and gate (or up) matrices orthogonal; outputs stay."""

    tags: ClassVar[Tags] = Tags(changes_function="exact")
    not_proposed: ClassVar[str] = (
        "it adds a product per norm to every token, which only pays beside a sparsity that the search does not reach; "
        "try it with recipes=['rotate_columns,wina']"
    )

    def targets(self, block: Block) -> Iterable[Linear | str]:
        for inputs, norm, refused in _sets(block):
            if refused is None and norm is not None:
                yield norm.path
                yield from inputs

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.slots:
            return (
                "it changes the inputs of the layers, so what was calibrated on them would no longer hold; rotate first"
            )
        return super().conflicts(earlier)

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        for inputs, norm, refused in _sets(block):
            if refused is not None:
                yield Skip(norm.path if norm is not None else inputs[0].path, refused)
                continue
            assert norm is not None
            anchor = next((x for x in inputs if x.role in ("key", "gate")), inputs[0])
            weight, bias = (getattr(norm.module, name, None) for name in ("weight", "bias"))
            gain = torch.ones(()).double() if weight is None else weight.detach().double() + norm.offset
            _, _, vh = torch.linalg.svd(anchor.weight.detach().double() * gain, full_matrices=True)
            rotation = vh.T  # V, [d, d]
            yield Replace(norm.path, RotatedNorm(norm.module, rotation.to(anchor.weight.dtype)))
            if weight is not None:
                yield Set(f"{norm.path}.norm.weight", torch.full_like(weight, 1 - norm.offset))
            shift = None if bias is None else bias.detach().double().clone()
            if bias is not None:
                yield Set(f"{norm.path}.norm.bias", torch.zeros_like(bias))
            for linear in inputs:
                yield Replace(linear.path, _rotated(linear, gain, shift, rotation))


def _rotated(linear: Linear, gain: Tensor, shift: Tensor | None, rotation: Tensor) -> ActLinear:
    """W diag(gain) Q, with W shift added to the bias; all float64, rounded once."""
    weight = linear.weight.detach().double()
    layer = ActLinear.of(linear, weight=DenseWeight((weight * gain @ rotation).to(linear.weight.dtype)))
    if shift is not None:
        moved = weight @ shift + (0 if linear.bias is None else linear.bias.detach().double())
        layer.bias = nn.Parameter(moved.to(linear.weight.dtype), requires_grad=False)
    return layer


def _sets(block: Block) -> list[tuple[tuple[Linear, ...], Norm | None, str | None]]:
    """The layers that read a norm's output, the norm if there is one, and why it cannot be rotated, or None."""
    found: list[tuple[tuple[Linear, ...], Norm | None, str | None]] = []
    for norm, inputs in block.norm_readers():
        refused = None
        if norm is None:
            refused = "no norm of the block produces what these layers read: post-norm, or a wrapper comes between"
        elif norm.feeds_residual:
            refused = "post-norm: the residual stream reads what these layers read, so it cannot be rotated for them"
        elif norm.role == "both" and (block.attention is None or block.mlp is None):
            refused = "another part of the block, which is not described, reads the norm's output too"
        elif not all(is_linear(linear.module) for linear in inputs):
            refused = "a layer stands here whose weight actkit does not read"
        found.append((inputs, norm, refused))
    if block.experts is not None and block.experts.members:
        inputs = tuple(linear for mlp in block.experts.members for linear in mlp.inputs)
        found.append((inputs, block.experts.norm, "the router reads the norm's output too"))
    return found
