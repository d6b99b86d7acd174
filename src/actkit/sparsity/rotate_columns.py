"""The rotation of WINA: an exact rewrite after which chosen matrices have orthogonal columns (2025, arXiv:2505.19427).

    norm(x) -> (norm without gain)(x) Q,   W -> W diag(gain) Q,   Q = V of the SVD  W diag(gain) = U S V^T

so that W diag(gain) Q = U S has orthogonal columns, for W the key and the gate matrix. The paper rotates the residual
stream and pays two d x d products at the residual additions; this form is local to a block, keeps ties, holds for
LayerNorm too, and costs the same: one d x d product per norm (our own rewriting, checked numerically).
With grouped-query attention only kv_dim columns of the key matrix stay non-zero: a gain of the rotation, not of WINA.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actkit.core.anatomy import Block, Linear, LinearInput
from actkit.core.edits import Edit, Note, Replace, Skip
from actkit.core.linear import ActLinear, DenseWeight
from actkit.core.runner import Seen
from actkit.core.transform import Tags, Transform


class RotatedNorm(nn.Module):
    """norm(x) Q: a norm followed by a rotation. rotation: Parameter [d, d]."""

    def __init__(self, norm: nn.Module, rotation: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.rotation = nn.Parameter(rotation, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        return self.norm(x) @ self.rotation

    def spec(self) -> dict[str, Any]:
        return {"width": self.rotation.shape[0], "dtype": str(self.rotation.dtype).removeprefix("torch.")}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> RotatedNorm:
        return cls(original, torch.empty(spec["width"], spec["width"], dtype=getattr(torch, spec["dtype"])))


class RotateColumns(Transform):
    """Make the columns of the key (or fused query-key-value) and gate (or up) matrices orthogonal; outputs stay."""

    tags: ClassVar[Tags] = Tags(changes_function="exact")

    def targets(self, block: Block) -> Iterable[Linear]:
        return [linear for inputs, _, _ in self._sets(block) for linear in inputs.linears]

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.tags.slot is not None:
            return (
                "it changes the inputs of the layers, so what was calibrated on them would no longer hold; rotate first"
            )
        return super().conflicts(earlier)

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        for inputs, path, refused in self._sets(block):
            if refused:
                yield Skip(path, refused)
                continue
            anchor = next((x for x in inputs.linears if x.role in ("key", "gate")), inputs.linears[0])
            _, _, vh = torch.linalg.svd(anchor.weight.detach().double(), full_matrices=True)
            rotation = vh.T  # V, [d, d]
            norm = block.module.get_submodule(path.removeprefix(block.path + "."))
            yield Replace(path, RotatedNorm(norm, rotation.to(anchor.weight.dtype)))
            for linear in inputs.linears:
                rotated = (linear.weight.detach().double() @ rotation).to(linear.weight.dtype)
                yield Replace(linear.path, ActLinear.of(linear, weight=DenseWeight(rotated)))

    def _sets(self, block: Block) -> list[tuple[LinearInput, str, str | None]]:
        """The block's inputs that come straight from a norm: (input, path of the norm, why not or None)."""
        found = []
        for part in (block.attention, block.mlp):
            if part is None or part.norm is None:
                continue
            first = part.query_key_value or part.key if part is block.attention else part.gate or part.up  # type: ignore[union-attr]
            inputs = next(
                i for i in block.linear_inputs() if first is not None and first.path in {x.path for x in i.linears}
            )
            refused = "the norm also feeds the residual stream" if part.norm.feeds_residual else None
            found.append((inputs, part.norm.path, refused))
        return found
