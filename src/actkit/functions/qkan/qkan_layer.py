"""A layer of a QKAN: a simulated qubit on each edge, or a few that the edges share (2025, arXiv:2509.14026).

    y_o = sum_i mask_oi (gain_oi (<Z>(x_i; theta_oi, w_oi, b_oi) + offset_oi) + base_oi SiLU(x_i))

As in the release: angles begin by Xavier's rule, w = 1, b = 0, gain 1, offset 0, base 0.5; `group` shares functions
among the inputs i mod group, the same for all outputs. Settled here: everything learns unless `trainable` says less (in
the release angles alone), as frequencies that stay at 1 make no more than a Fourier series; a group whose gain does not
learn is refused, as all its outputs would be alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.layers.keeps_dtype import KeepsDtype, at_least_float32
from actkit.core.univariate.edge_functions import EdgeFunctions
from actkit.functions.qkan.circuit import EXTENDABLE, Ansatz, Circuit, Measure, Spectrum
from actkit.functions.qkan.daruan import ALL, Start, Trainable, check_input, checked, scaled, spread

EDGES = ("theta", "frequency", "phase", "gain", "offset")


class QkanLayer(KeepsDtype, EdgeFunctions):
    """A layer [..., in_features] -> [..., out_features].

    Args:
        in_features: channels of x.
        out_features: channels of y.
        reps: how often a qubit reads its input.
        ansatz: as in `Circuit`.
        trainable: what learns beside the angles: `frequency` (with the phase, which always learns in `rpz`), `gain`,
            `offset`, `base`; without the last one there is no share of SiLU.
        measure: as in `Circuit`.
        group: how many functions the inputs share; None for one on each edge.
        start: of the angles, "xavier" or "small" (for 8 or more repetitions).

    Raises:
        ValueError: a setting out of bounds, or an unknown name.
    """

    keeps: ClassVar[tuple[str, ...]] = (*EDGES, "base")
    mask: Tensor
    rest: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        reps: int = 3,
        ansatz: Ansatz = "pz",
        trainable: Iterable[Trainable] = ALL,
        measure: Measure = "z",
        group: int | None = None,
        start: Start = "xavier",
    ) -> None:
        super().__init__(in_features, out_features)
        self.circuit, self.trainable, self.group = Circuit(reps, ansatz, measure), checked(trainable), group
        if group is not None and (not 1 <= group <= in_features or "gain" not in self.trainable):
            raise ValueError(
                f"group: {group} was given for {in_features} inputs and trainable {list(self.trainable)}; give 1 to "
                f"{in_features}, and let the gain learn, as all outputs are alike without."
            )
        edges, learns = (out_features, in_features), self.trainable.__contains__
        shared = edges if group is None else (1, group)
        angles = torch.randn(self.circuit.rows, self.circuit.angles, *shared)
        self.theta = nn.Parameter(angles * spread(start, self.circuit, in_features + out_features))
        self.frequency = nn.Parameter(torch.ones(reps, *shared), learns("frequency"))
        self.phase = nn.Parameter(torch.zeros(reps, *shared), learns("frequency") or ansatz == "rpz")
        self.gain = nn.Parameter(torch.ones(edges), learns("gain"))
        self.offset = nn.Parameter(torch.zeros(edges), learns("offset"))
        self.base = nn.Parameter(torch.full(edges, 0.5 if learns("base") else 0.0), learns("base"))
        self.register_buffer("mask", torch.ones(edges))  # 0 where an edge was pruned
        self.register_buffer("rest", torch.zeros(out_features))  # what pruned edges gave on average

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features].

        Args:
            x: [..., in_features], floats.

        Raises:
            ValueError: another last dimension, no floats, or `px` and inputs outside of its domain.
        """
        check_input(x, self.in_features)
        wide = at_least_float32(x)
        with torch.autocast(x.device.type, enabled=False):
            y = super().forward(wide) if self.group is None else self._shared(wide)
            y = y + F.linear(F.silu(wide), self.base * self.mask) + self.rest
        return y.to(x.dtype)

    def _shared(self, x: Tensor) -> Tensor:
        """The sums of shared functions, which are formed once for each input and not for each edge."""
        theta, frequency, phase = (each.squeeze(-2) for each in self._circuit_parameters(1))
        gain = self.gain * self.mask
        return F.linear(self.circuit(x, theta, frequency, phase), gain, (gain * self.offset).sum(-1))

    def _circuit_parameters(self, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
        """theta, frequency and phase [..., outputs, in]."""
        if self.group is None:
            return self.theta, self.frequency, self.phase
        own = torch.arange(self.in_features, device=self.theta.device) % self.group
        theta, frequency, phase = (each[..., own] for each in (self.theta, self.frequency, self.phase))
        return (
            theta.expand(*theta.shape[:-2], outputs, -1),
            frequency.expand(-1, outputs, -1),
            phase.expand(-1, outputs, -1),
        )

    def edge_parameters(self) -> tuple[Tensor, ...]:
        return (*self._circuit_parameters(self.out_features), self.gain * self.mask, self.offset)

    def values(self, x: Tensor, *parameters: Tensor) -> Tensor:
        theta, frequency, phase, gain, offset = parameters
        return gain * (self.circuit(x, theta, frequency, phase) + offset)

    def edge(self, out: int, into: int, x: Tensor) -> Tensor:
        """The function of one edge, with its share of SiLU.

        Args:
            out: index of the output channel.
            into: index of the input channel.
            x: [k].

        Returns:
            [k].
        """
        return super().edge(out, into, x) + self.base[out, into] * self.mask[out, into] * F.silu(x)

    def edges(self, x: Tensor) -> Tensor:
        """What each edge gives: [rows, out, in], all at once.

        Args:
            x: [rows, in_features].
        """
        rows = x.unsqueeze(1)
        return self.values(rows, *self.edge_parameters()) + self.base * self.mask * F.silu(rows)

    @torch.no_grad()
    def spectrum(self, out: int, into: int) -> Spectrum:
        """The function of one edge as a sum of cosines, without its share of SiLU.

        Args:
            out: index of the output channel.
            into: index of the input channel.

        Returns:
            Its frequencies, with gain and offset.

        Raises:
            ValueError: `px` or the fast measure, which are no such sum, or too many repetitions.
        """
        own = [each[..., out, into] for each in self._circuit_parameters(self.out_features)]
        gain = float(self.gain[out, into] * self.mask[out, into])
        return scaled(self.circuit.spectrum(*own), gain, float(self.offset[out, into]))

    @torch.no_grad()
    def extended(self, reps: int) -> QkanLayer:
        """Return a layer with more repetitions that computes the same.

        The new gates turn about z, which <Z> does not see, until their angles are learned.

        Args:
            reps: at least those that it has.

        Returns:
            The layer.

        Raises:
            ValueError: fewer repetitions, or an ansatz whose new gates would change the function.
        """
        if reps < self.circuit.reps or self.circuit.ansatz not in EXTENDABLE:
            raise ValueError(
                f"reps: {reps} was given to extend {self.circuit.reps} of ansatz {self.circuit.ansatz!r}; give "
                f"{self.circuit.reps} or more, of ansatz {' or '.join(EXTENDABLE)}: the others would change the "
                f"function."
            )
        made = QkanLayer.from_spec({**self.spec(), "reps": reps}, self)
        made.theta.zero_()
        for name, values in self.state_dict().items():
            kept = getattr(made, name)
            (kept[: len(values)] if name in ("theta", "frequency", "phase") else kept).copy_(values)
        return made.train(self.training)

    @torch.no_grad()
    def of_edges(self, outputs: Tensor, inputs: Tensor) -> QkanLayer:
        """Return a layer of some outputs and inputs alone.

        Args:
            outputs: int64, of the outputs that stay.
            inputs: int64, of the inputs that stay.

        Returns:
            The layer; a shared function becomes each edge's own.
        """
        spec = {**self.spec(), "in_features": len(inputs), "out_features": len(outputs), "group": None}
        made = QkanLayer.from_spec(spec, self)
        own = dict(zip(EDGES[:3], self._circuit_parameters(self.out_features), strict=True))
        for name in (*EDGES, "base", "mask"):
            values = own.get(name, getattr(self, name))
            getattr(made, name).copy_(values[..., outputs, :][..., inputs])
        made.rest.copy_(self.rest[outputs])
        return made.train(self.training)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        circuit = {"reps": self.circuit.reps, "ansatz": self.circuit.ansatz, "measure": self.circuit.measure}
        widths = {"in_features": self.in_features, "out_features": self.out_features}
        return {**widths, **circuit, "trainable": list(self.trainable), "group": self.group}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> QkanLayer:
        """The layer that `spec` described, in the dtype of what stood there; its values come from the checkpoint."""
        layer = cls(**spec)
        like = None if original is None else next(original.parameters(), None)
        return layer if like is None else layer.to(like.device, like.dtype)

    def extra_repr(self) -> str:
        circuit = f"reps={self.circuit.reps}, ansatz={self.circuit.ansatz!r}, group={self.group}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {circuit}"
