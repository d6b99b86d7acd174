"""Experts kept as 3-D parameters, opened as a list of linear layers that can be seen and replaced one by one.

The layers are views: nothing is copied, and a layer that is not replaced still lives in the memory of the parameter it
came from. If the list is there to stay and the parameters do not hold rows one after another (transposed, interleaved),
the layers own copies (`own_rows`): a checkpoint loads them so, and other strides round differently.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from actkit.core.ground.modules import tied_copy
from actkit.core.model.architectures import ExpertsRow


class ScaledSigmoid(nn.Module):
    """x * sigmoid(alpha * x): the nonlinearity of experts that spell it out."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """Map x to x * sigmoid(alpha * x), element by element."""
        return x * torch.sigmoid(self.alpha * x)


class Expert(nn.Module):
    """One expert: down(activation(gate(x)) * up(x)), with the clamp and the offset of its family.

    Args:
        gate: linear layer, [n, hidden] -> [n, intermediate].
        up: as gate.
        down: linear layer, [n, intermediate] -> [n, hidden].
        activation: element-wise.
        limit: gate is clamped to it from above, up from both sides; None for not at all.
        up_offset: added to up.
    """

    def __init__(
        self,
        gate: nn.Module,
        up: nn.Module,
        down: nn.Module,
        activation: nn.Module,
        limit: float | None = None,
        up_offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.activation = gate, up, down, activation
        self.limit, self.up_offset = limit, up_offset

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """Compute one expert for its tokens, before the router's weight.

        Args:
            x: [n, hidden].
            rows: [n], which of the batch's tokens (flat indices) x holds; not used here, but whoever watches this call
                needs
                it to tell real tokens from padding.

        Returns:
            [n, hidden].
        """
        gate, up = self.gate(x), self.up(x)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.up_offset:
            up = up + self.up_offset
        return self.down(self.activation(gate) * up)


class ExpertList(nn.ModuleList):
    """Drop-in for a module of 3-D expert parameters; its children "0", "1", ... are `Expert`s.

    Args:
        experts: in their order.
        hidden: channels of input and output.
        intermediate: hidden units of each.
        row: how the parameters were stored.
    """

    def __init__(self, experts: list[Expert], hidden: int, intermediate: int, row: ExpertsRow) -> None:
        super().__init__(experts)
        self.hidden, self.intermediate, self.row = hidden, intermediate, row

    @classmethod
    def of(cls, module: nn.Module, row: ExpertsRow, *, own_rows: bool = False) -> ExpertList:
        """Open 3-D parameters; the layers are views of them.

        Args:
            module: holds the parameters.
            row: how it stores them.
            own_rows: copies instead of views whose rows are not contiguous.

        Raises:
            ValueError: the parameters do not have the shapes that the row promises.
        """
        gate_up, down = _matrices(module, row.gate_up, row), _matrices(module, row.down, row)
        count, double, hidden = gate_up.shape
        if down.shape != (count, hidden, double // 2) or double % 2:
            raise ValueError(
                f"experts: as [experts, out, in], {row.gate_up} is {tuple(gate_up.shape)} and {row.down} "
                f"{tuple(down.shape)}; expected [e, 2 * intermediate, hidden] and [e, hidden, intermediate]. "
                f"Correct the architecture's row."
            )
        gate_up_bias = getattr(module, f"{row.gate_up}_bias").detach() if row.bias else None
        down_bias = getattr(module, f"{row.down}_bias").detach() if row.bias else None
        trains = cast(nn.Parameter, getattr(module, row.down)).requires_grad
        half = double // 2
        gates, ups = (slice(0, None, 2), slice(1, None, 2)) if row.interleaved else (slice(0, half), slice(half, None))

        def layer(weight: Tensor, bias: Tensor | None, e: int, rows: slice) -> nn.Linear:
            one, shift = weight[e, rows], None if bias is None else bias[e, rows]
            if own_rows:
                one, shift = one.contiguous(), None if shift is None else shift.contiguous()
            return _view(one, shift, trains)

        experts = [
            Expert(
                layer(gate_up, gate_up_bias, e, gates),
                layer(gate_up, gate_up_bias, e, ups),
                layer(down, down_bias, e, slice(None)),
                _activation(module, row),
                None if row.limit is None else getattr(module, row.limit),
                row.up_offset,
            )
            for e in range(count)
        ]
        return cls(experts, hidden, half, row).train(module.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the chosen experts of each token.

        Under torch.compile and torch.export each expert computes every token, as the shapes may not depend on what the
        router
        chose.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k]; an index equal to the number of experts stands for none.
            top_k_weights: [tokens, k].

        Returns:
            [tokens, hidden].
        """
        if torch.compiler.is_compiling():
            return self._on_every_token(hidden_states, top_k_index, top_k_weights)
        return mix(enumerate(self), hidden_states, top_k_index, top_k_weights)

    def _on_every_token(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        for e, expert in enumerate(self):
            chosen = top_k_index == e
            weighted = expert(hidden_states, rows) * (top_k_weights * chosen).sum(-1, keepdim=True)
            # a choice, not a product with 0: what an expert makes of a token that is not its own may be Inf
            result = result + torch.where(chosen.any(-1, keepdim=True), weighted, 0).to(result.dtype)
        return result

    def spec(self) -> dict[str, Any]:
        """Return the JSON arguments from which `from_spec` rebuilds the structure."""
        return {"count": len(self), "hidden": self.hidden, "intermediate": self.intermediate, "row": asdict(self.row)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> ExpertList:
        """Open the experts of a base model again.

        Args:
            spec: what `spec` gave.
            original: the base model's 3-D module, which may be uninitialised or on the meta device.

        Raises:
            ValueError: it has other sizes than the spec.
        """
        opened = cls.of(original, ExpertsRow(**spec["row"]))
        if opened.spec() != spec:
            raise ValueError(f"experts: the checkpoint describes {spec}, the base model has {opened.spec()}.")
        return opened


def mix(
    experts: Iterable[tuple[int, Any]], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Add up what experts give their tokens, one expert after the other.

    Args:
        experts: (index, `Expert`) pairs in rising order; those that no token chose may be left out.
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, k].
        top_k_weights: [tokens, k].

    Returns:
        [tokens, hidden].
    """
    result = torch.zeros_like(hidden_states)
    for e, expert in experts:
        rows, slots = torch.where(top_k_index == e)
        if len(rows):
            weighted = expert(hidden_states[rows], rows) * top_k_weights[rows, slots, None]
            result.index_add_(0, rows, weighted.to(result.dtype))
    return result


def _matrices(module: nn.Module, name: str, row: ExpertsRow) -> Tensor:
    """A 3-D parameter as [experts, out, in], a view."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor) or tensor.dim() != 3:
        kind = type(module).__name__
        raise ValueError(f"experts: {kind} has no 3-D parameter {name!r}; correct the architecture's row.")
    return tensor.detach().transpose(1, 2) if row.transposed else tensor.detach()


def _view(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=requires_grad)
    return linear


def _activation(module: nn.Module, row: ExpertsRow) -> nn.Module:
    """A copy for each expert: one shared module could not be watched or replaced for a single expert.

    Parameters that it has stay one for all experts.
    """
    if row.activation is None:
        return ScaledSigmoid(getattr(module, row.alpha)) if row.alpha else nn.SiLU()
    return tied_copy(getattr(module, row.activation))
