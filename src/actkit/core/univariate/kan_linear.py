"""`KanLinear`: a basis and a linear layer on it, which is a KAN layer whose edges share their basis.

    y_o = sum_i sum_m C[o, i, m] basis_m(x_i)  (+ W act(x))  (+ bias)

The sum over i and m is one plain `nn.Linear` of channels x size inputs, `coefficients`, so that whatever handles linear
layers (rounding, sparsity, coverage, export) meets one. The basis values are that many times larger than x; while
gradients are recorded they are not kept: rows go through in chunks, and a chunk's values are computed again in the
backward pass. That is done only if `coefficients` is a plain layer without hooks; else it is called once, as it stands.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actkit.core.layers.activations import Activation
from actkit.core.univariate.bases import basis_of, name_of_basis
from actkit.core.univariate.basis import Basis

CHUNK = 1 << 22  # basis values at once, while gradients are recorded


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
            ValueError: the last dimension is another one.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: its last dimension is {x.shape[-1]}; this layer reads {self.in_features} channels there."
            )
        y = self._summed(x if self.norm is None else self.norm(x))
        return y if self.base is None or self.act is None else y + self.base(self.act(x))

    def _summed(self, x: Tensor) -> Tensor:
        rows = max(1, CHUNK // max(1, self.in_features * self.basis.size))
        if not (torch.is_grad_enabled() and self._is_plain()):
            return self._product(x)
        flat = x.reshape(-1, self.in_features)
        parts = [checkpoint(self._product, each, use_reentrant=False) for each in flat.split(rows)]
        return torch.cat(parts).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        return self.coefficients(self.basis(x).flatten(-2))

    def _is_plain(self) -> bool:
        """Whether calling the coefficients twice shows nowhere."""
        layer = self.coefficients
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        return type(layer) is nn.Linear and not any(hooks) and not torch.compiler.is_compiling()

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
