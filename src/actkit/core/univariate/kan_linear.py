"""`KanLinear`: a basis and a linear layer on it, which is a KAN layer whose edges share their basis.

    y_o = sum_i sum_m C[o, i, m] basis_m(x_i)  (+ W act(x))  (+ bias)

The sum over i and m is one plain `nn.Linear` of channels x size inputs, `coefficients`, so that whatever handles linear
layers (rounding, sparsity, coverage, export) meets one. The basis values are size times larger than x. They are never
all there: rows go through in chunks, and a chunk's values are computed again in the backward pass,
for which x alone is kept. That is done only if `coefficients` is a plain layer without hooks; else it is called once,
as it stands.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from actkit.core.layers.activations import Activation
from actkit.core.layers.keeps_dtype import check_floats
from actkit.core.univariate.bases import basis_of, name_of_basis
from actkit.core.univariate.basis import Basis

CHUNK = 1 << 22  # basis values at once
ROWS = 256  # at least, so that products pay


class KanLinear(nn.Module):
    """A linear layer on the values of a basis.

    Args:
        in_features: channels of x.
        out_features: channels of y.
        basis: of all edges.
        base: the name of an element-wise function act: adds W act(x), a linear layer called `base`; None for none.
        bias: of the coefficients.
        norm: a LayerNorm of x before the basis, as in FastKAN; what `base` reads is not normalised.

    Raises:
        ValueError: a width below 1, or an unknown function.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        basis: Basis,
        *,
        base: str | None = None,
        bias: bool = True,
        norm: bool = False,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features, out_features: {in_features} and {out_features} were given; give 1 or more.")
        self.in_features, self.out_features = in_features, out_features
        self.basis = basis
        self.norm = nn.LayerNorm(in_features) if norm else None
        self.coefficients = nn.Linear(in_features * basis.size, out_features, bias)
        self.act = None if base is None else Activation(base)
        self.base = None if base is None else nn.Linear(in_features, out_features, False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features].

        Args:
            x: [..., in_features].

        Raises:
            ValueError: the last dimension is another one, or x holds no floats.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: its last dimension is {x.shape[-1]}; this layer reads {self.in_features} channels there."
            )
        check_floats(x)
        given = x if self.norm is None else self.norm(x)
        self.basis.notice(given)
        y = self._summed(given)
        return y if self.base is None or self.act is None else y + self.base(self.act(x))

    def _summed(self, x: Tensor) -> Tensor:
        if not self._is_plain(x):
            return self._product(x)
        rows, layer = max(ROWS, CHUNK // (self.in_features * self.basis.size)), self.coefficients
        flat = x.reshape(-1, self.in_features)
        if any(each.requires_grad for each in self.basis.parameters()):
            parts = [checkpoint(self._product, each, use_reentrant=False) for each in flat.split(rows)]
            y = torch.cat(parts)
        else:
            y = _InChunks.apply(flat, layer.weight, layer.bias, self.basis, rows)
        return y.view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        return self.coefficients(self.basis(x).flatten(-2))

    def _is_plain(self, x: Tensor) -> bool:
        """Whether calling the coefficients never, or twice, shows nowhere."""
        layer = self.coefficients
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        watched = any(hooks) or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
        return type(layer) is nn.Linear and not watched

    @torch.no_grad()
    def of_outputs(self, index: Tensor, factor: Tensor) -> KanLinear:
        """Return a layer of some of the outputs alone, each times a factor.

        Args:
            index: int64 [some], of the outputs.
            factor: [some].
        """
        act = None if self.act is None else self.act.name
        more: dict[str, Any] = {"base": act, "bias": self.coefficients.bias is not None, "norm": self.norm is not None}
        made = KanLinear(self.in_features, len(index), copy.deepcopy(self.basis), **more).to(factor)
        if self.norm is not None and made.norm is not None:
            made.norm.load_state_dict(self.norm.state_dict())
        pairs = [(self.coefficients, made.coefficients)]
        if self.base is not None and made.base is not None:
            pairs.append((self.base, made.base))
        for old, new in pairs:
            new.weight.copy_(old.weight[index] * factor[:, None])
            if old.bias is not None:
                new.bias.copy_(old.bias[index] * factor)
        return made

    def edge(self, out: int, into: int, x: Tensor) -> Tensor:
        """The learned function of one edge, without the base's share.

        Args:
            out: index of the output channel.
            into: index of the input channel.
            x: [k], as the basis reads it (behind the norm, if there is one).

        Returns:
            [k].
        """
        weight = self.coefficients.weight.view(self.out_features, self.in_features, self.basis.size)[out, into]
        return self.basis(x.unsqueeze(-1)).squeeze(-2) @ weight

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "basis": {"name": name_of_basis(self.basis), **self.basis.settings()},
            "base": None if self.act is None else self.act.name,
            "bias": self.coefficients.bias is not None,
            "norm": self.norm is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> KanLinear:
        """The layer that `spec` described, in the dtype of what stood there; its values come from the checkpoint."""
        widths = spec["in_features"], spec["out_features"]
        more = {key: spec[key] for key in ("base", "bias", "norm")}
        layer = cls(*widths, basis_of(**spec["basis"]), **more)
        like = None if original is None else next(original.parameters(), None)
        return layer if like is None else layer.to(like.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _InChunks(torch.autograd.Function):
    """W basis(x) + bias for x [rows, channels], some rows at a time; x and W are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, basis: Basis, rows: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.basis, ctx.rows = basis, rows
        parts = [F.linear(basis.values(part).flatten(-2), weight, bias) for part in x.split(rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        to_bias = gradient.sum(0) if wants_bias else None
        if torch.is_grad_enabled():  # a gradient of this gradient may be wanted
            wanted = [each for each, wants in ((x, wants_x), (weight, wants_weight)) if wants]
            y = F.linear(ctx.basis(x).flatten(-2), weight)
            found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True) if wanted else ())
            return next(found) if wants_x else None, next(found) if wants_weight else None, to_bias, None, None
        to_x = torch.empty_like(x) if wants_x else None
        to_weight = torch.zeros_like(weight) if wants_weight else None
        for index in range(0, len(x), ctx.rows):
            part, own = x[index : index + ctx.rows], gradient[index : index + ctx.rows]
            if to_weight is not None:
                to_weight.addmm_(own.t(), ctx.basis.values(part).flatten(-2))
            if to_x is not None:
                of_values = (own @ weight).unflatten(-1, (-1, ctx.basis.size))
                to_x[index : index + ctx.rows] = ctx.basis.pulled(of_values, part)
        return to_x, to_weight, to_bias, None, None
