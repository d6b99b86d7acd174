"""DARUAN: a learned function for each channel, made by a simulated qubit (2025, arXiv:2509.14026).

    f(x) = gain (<Z>(x; theta, w, b) + offset)

A sum of cosines whose frequencies are sums and differences of the learned w (`circuit.py`), so that few parameters make
a function of many frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from actkit.core.layers.activation_function import Axis
from actkit.core.layers.keeps_dtype import KeepsDtype
from actkit.functions.qkan.circuit import Ansatz, Circuit, Measure, Spectrum

Trainable = Literal["frequency", "gain", "offset", "base"]
Start = Literal["xavier", "small"]
ALL: tuple[Trainable, ...] = ("frequency", "gain", "offset", "base")


class Daruan(KeepsDtype):
    """An activation function that is learned, another one for each channel; the shape stays.

    Args:
        channels: of the last dimension.
        reps: how often the qubit reads x.
        ansatz: as in `Circuit`.
        trainable: what learns beside the angles: `frequency` (with the phase, which always learns in `rpz`), `gain`,
            `offset`.
        measure: as in `Circuit`.

    Raises:
        ValueError: a setting out of bounds, or an unknown name.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ()
    keeps: ClassVar[tuple[str, ...]] = ("theta", "frequency", "phase", "gain", "offset")

    def __init__(
        self,
        channels: int,
        reps: int = 3,
        ansatz: Ansatz = "pz",
        trainable: Iterable[Trainable] = ("frequency", "gain", "offset"),
        measure: Measure = "z",
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels: {channels} was given; give 1 or more.")
        self.channels, self.circuit = channels, Circuit(reps, ansatz, measure)
        self.trainable = checked(trainable, ("frequency", "gain", "offset"))
        angles = torch.randn(self.circuit.rows, self.circuit.angles, channels) * spread("xavier", self.circuit, 2)
        self.theta = nn.Parameter(angles)
        learns = self.trainable.__contains__
        self.frequency = nn.Parameter(torch.ones(reps, channels), learns("frequency"))
        self.phase = nn.Parameter(torch.zeros(reps, channels), learns("frequency") or ansatz == "rpz")
        self.gain = nn.Parameter(torch.ones(channels), learns("gain"))
        self.offset = nn.Parameter(torch.zeros(channels), learns("offset"))

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x), of the shape and dtype of x.

        Args:
            x: [..., channels], floats.

        Raises:
            ValueError: other channels, no floats, or `px` and inputs outside of its domain.
        """
        check_input(x, self.channels)
        with torch.autocast(x.device.type, enabled=False):
            found = self.circuit(x, self.theta, self.frequency, self.phase)
            return (self.gain * (found + self.offset)).to(x.dtype)

    @torch.no_grad()
    def spectrum(self, channel: int) -> Spectrum:
        """The function of one channel as a sum of cosines.

        Args:
            channel: which.

        Returns:
            Its frequencies, with gain and offset.

        Raises:
            ValueError: `px` or the fast measure, which are no such sum, or too many repetitions.
        """
        own = self.theta[..., channel], self.frequency[:, channel], self.phase[:, channel]
        return scaled(self.circuit.spectrum(*own), float(self.gain[channel]), float(self.offset[channel]))

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        circuit = {"reps": self.circuit.reps, "ansatz": self.circuit.ansatz, "measure": self.circuit.measure}
        return {"channels": self.channels, **circuit, "trainable": list(self.trainable)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> Daruan:
        """The function that `spec` described; its values come from the checkpoint."""
        return cls(**spec)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, reps={self.circuit.reps}, ansatz={self.circuit.ansatz!r}"


def checked(trainable: Iterable[str], allowed: tuple[Trainable, ...] = ALL) -> tuple[Trainable, ...]:
    """What learns, in a fixed order.

    Args:
        trainable: names.
        allowed: which there are.

    Returns:
        The names.

    Raises:
        ValueError: an unknown name.
    """
    given = [trainable] if isinstance(trainable, str) else list(trainable)
    if not set(given) <= set(allowed):
        raise ValueError(f"trainable: {given} was given, allowed are {', '.join(allowed)}.")
    return tuple(name for name in allowed if name in given)


def check_input(x: Tensor, channels: int) -> None:
    """Raise ValueError if x [..., channels] has another last dimension or is not of floats.

    Args:
        x: what a layer is given.
        channels: that it reads.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: {x.dtype} was given; give floating-point numbers.")
    if not x.dim() or x.shape[-1] != channels:
        raise ValueError(f"x: {tuple(x.shape)} was given; give [..., {channels}].")


def spread(start: Start, circuit: Circuit, channels: int) -> float:
    """The standard deviation of learned angles at first.

    Args:
        start: "xavier" as in the release, or "small" for 1 / sqrt(reps).
        circuit: whose angles.
        channels: inputs and outputs together.

    Returns:
        It.

    Raises:
        ValueError: an unknown start.
    """
    if start not in ("xavier", "small"):
        raise ValueError(f"start: {start!r} was given, allowed are 'xavier' and 'small'.")
    if start == "small":
        return 1 / math.sqrt(circuit.reps)
    return math.sqrt(2 / (channels * circuit.angles * circuit.rows))


def scaled(spectrum: Spectrum, gain: float, offset: float) -> Spectrum:
    """The spectrum of gain (f + offset).

    Args:
        spectrum: of f.
        gain: a factor.
        offset: what is added before.

    Returns:
        It.
    """
    amplitudes, phases = gain * spectrum.amplitudes, spectrum.phases
    constant = spectrum.frequencies == 0
    if not bool(constant.any()):
        frequencies = torch.cat((torch.zeros(1, dtype=torch.float64), spectrum.frequencies))
        more = torch.tensor([gain * offset], dtype=torch.float64)
        return Spectrum(frequencies, torch.cat((more, amplitudes)), torch.cat((0 * more, phases)))
    return Spectrum(spectrum.frequencies, amplitudes + gain * offset * constant.double(), phases)
