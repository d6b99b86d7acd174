"""A qubit that reads its input again and again: what QKAN's functions compute, exactly (2025, arXiv:2509.14026).

    |+>, for each repetition l Rz(theta_l0) Ry(theta_l1) Rz(w_l x + b_l), then Rz Ry; the output is <Z>      (pz)

A qubit is three real numbers, its point on the unit sphere, and a gate turns them about an axis; no complex number is
needed. Turns about the same axis in a row are one. <Z> is a sum of cosines whose frequencies are sums of c_l w_l, c_l
in -1, 0, 1: up to (3^reps - 1) / 2 of them above 0. `spectrum` finds them and their amplitudes in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from actkit.core.layers.keeps_dtype import at_least_float32

Ansatz = Literal["pz", "rpz", "px", "real"]
Measure = Literal["z", "fast"]
State = tuple[Tensor, Tensor, Tensor]  # x, y, z
SMALLEST = 1e-12  # of 1 - <Z>^2 in the fast measure, whose slope is infinite at 0
SAME = 1e-9  # frequencies nearer than this are one
MOST = 12  # repetitions that a spectrum is found of: 3^12 terms


class Gate(NamedTuple):
    """A turn.

    Attributes:
        axis: that it turns about.
        by: the number of a learned angle of the repetition, "data", "arccos" of the data, or "half" a turn.
    """

    axis: Literal["x", "y", "z"]
    by: int | Literal["data", "arccos", "half"]


class Gates(NamedTuple):
    """What an ansatz does.

    Attributes:
        angles: that are learned for each repetition.
        each: the gates of a repetition.
        last: the gates behind the last one.
    """

    angles: int
    each: tuple[Gate, ...]
    last: tuple[Gate, ...]


ANSATZE: dict[Ansatz, Gates] = {
    "pz": Gates(2, (Gate("z", 0), Gate("y", 1), Gate("z", "data")), (Gate("z", 0), Gate("y", 1))),
    "rpz": Gates(1, (Gate("y", 0), Gate("z", "data")), (Gate("y", 0),)),
    "px": Gates(1, (Gate("z", 0), Gate("x", "arccos")), (Gate("z", 0),)),
    "real": Gates(1, (Gate("x", "half"), Gate("y", 0), Gate("z", "half"), Gate("y", "data")), ()),
}
EXTENDABLE: tuple[Ansatz, ...] = ("pz", "rpz")  # what is added at first turns about z, which <Z> does not see


@dataclass(frozen=True)
class Circuit:
    """A circuit without its parameters.

    Attributes:
        reps: how often the input is read.
        ansatz: `pz`; `rpz` has one angle per repetition; `px` reads arccos(w x + b), for inputs in [-1, 1]; `real`
            keeps amplitudes real, and so is a single cosine.
        measure: "z" for <Z> = |a|^2 - |b|^2, "fast" for |a| - |b|.

    Raises:
        ValueError: reps < 1, or an unknown name.
    """

    reps: int = 3
    ansatz: Ansatz = "pz"
    measure: Measure = "z"

    def __post_init__(self) -> None:
        if self.reps < 1:
            raise ValueError(f"reps: {self.reps} was given; give 1 or more.")
        for name, value, allowed in (("ansatz", self.ansatz, ANSATZE), ("measure", self.measure, get_args(Measure))):
            if value not in allowed:
                raise ValueError(f"{name}: {value!r} was given, allowed are {', '.join(allowed)}.")

    @property
    def angles(self) -> int:
        """Learned angles of a repetition."""
        return ANSATZE[self.ansatz].angles

    @property
    def rows(self) -> int:
        """Of the learned angles: the repetitions, and what follows the last one."""
        return self.reps + bool(ANSATZE[self.ansatz].last)

    def gates(self) -> Iterator[tuple[int, Gate]]:
        """Each gate, with the number of its repetition."""
        each, last = ANSATZE[self.ansatz].each, ANSATZE[self.ansatz].last
        for number in range(self.reps):
            yield from ((number, gate) for gate in each)
        yield from ((self.reps, gate) for gate in last)

    def __call__(self, x: Tensor, theta: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
        """The output for inputs x [...], in at least float32.

        Args:
            x: [...], of any shape that goes with the parameters'.
            theta: [rows, angles, ...].
            frequency: w, [reps, ...].
            phase: b, [reps, ...].

        Returns:
            [...], in [-1, 1].

        Raises:
            ValueError: `px`, and an input is not in [-1, 1] behind frequency and phase.
        """
        x = at_least_float32(x)
        turns: list[tuple[str, Tensor | float]] = []
        for number, gate in self.gates():
            angle = self._angle(gate, x, number, theta, frequency, phase)
            if turns and turns[-1][0] == gate.axis:
                turns[-1] = (gate.axis, turns[-1][1] + angle)
            else:
                turns.append((gate.axis, angle))
        state = _start(theta[0, 0])
        for axis, angle in turns:
            state = _turned(state, axis, angle)
        z = state[2]
        if self.measure == "z":
            return z
        return z / (1 + (1 - z * z).clamp(min=SMALLEST).sqrt()).sqrt()  # |a| - |b| = z / (|a| + |b|)

    def _angle(
        self, gate: Gate, x: Tensor, number: int, theta: Tensor, frequency: Tensor, phase: Tensor
    ) -> Tensor | float:
        if gate.by == "half":
            return math.pi
        if isinstance(gate.by, int):
            return theta[number, gate.by]
        read = frequency[number] * x + phase[number]
        if gate.by == "data":
            return read
        if not torch.compiler.is_compiling() and bool((read.abs() > 1).any()):
            raise ValueError(
                f"x: abs(w x + b) is up to {float(read.detach().abs().max()):.3g}, and px reads its arccos; give "
                f"inputs in [-1, 1], or take another ansatz."
            )
        return read.acos()

    @torch.no_grad()
    def spectrum(self, theta: Tensor, frequency: Tensor, phase: Tensor) -> Spectrum:
        """The output of one function as a sum of cosines.

        Args:
            theta: [rows, angles].
            frequency: [reps].
            phase: [reps].

        Returns:
            Frequencies with amplitudes and phases.

        Raises:
            ValueError: `px` or the fast measure, which are no such sum, or too many repetitions.
        """
        if self.ansatz == "px" or self.measure != "z" or self.reps > MOST:
            raise ValueError(
                f"spectrum: ansatz {self.ansatz!r}, measure {self.measure!r} and {self.reps} repetitions were given; "
                f"a sum of cosines needs another ansatz than px, the measure z and {MOST} repetitions at most."
            )
        state = _start(torch.ones((), dtype=torch.complex128))
        for number, gate in self.gates():
            if gate.by == "data":
                state = _read(state, gate.axis)
            else:
                angle = math.pi if isinstance(gate.by, str) else float(theta[number, gate.by])
                state = _turned(state, gate.axis, angle)
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * self.reps)
        signs = signs.view(-1, self.reps).flip(1)  # c_l of each term: what was read last changes slowest
        coefficients = state[2].flatten() * torch.exp(1j * (signs @ phase.double().cpu()))
        return Spectrum.of(signs @ frequency.double().cpu(), coefficients)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A sum of cosines: sum over k of amplitude_k cos(frequency_k x + phase_k).

    Attributes:
        frequencies: float64 [k], from 0 on.
        amplitudes: float64 [k]; of frequency 0 with its sign.
        phases: float64 [k], in radians.
    """

    frequencies: Tensor
    amplitudes: Tensor
    phases: Tensor

    @classmethod
    def of(cls, frequencies: Tensor, coefficients: Tensor) -> Spectrum:
        """Join the terms coefficient exp(i frequency x) of a real function, [terms] each, that have one frequency."""
        order = frequencies.argsort()
        rising, sorted_ = frequencies[order], coefficients[order]
        kept = rising >= -SAME
        rising, sorted_ = rising[kept], sorted_[kept]
        new = torch.cat((torch.ones(1, dtype=torch.bool), rising.diff() > SAME))
        group = new.long().cumsum(0) - 1
        total = torch.zeros(int(group[-1]) + 1, dtype=torch.complex128).index_add_(0, group, sorted_)
        first = rising[new].clamp(min=0)
        zero = first <= SAME  # alone has no partner of the opposite sign
        amplitudes = torch.where(zero, total.real, 2 * total.abs())
        return cls(first, amplitudes, torch.where(zero, 0.0, total.angle()))

    def __call__(self, x: Tensor) -> Tensor:
        """The sum at x [...], float64 [...]."""
        angles = x.double().unsqueeze(-1) * self.frequencies + self.phases
        return (self.amplitudes * torch.cos(angles)).sum(-1)


def _start(like: Tensor) -> State:
    """|+>, with the shape and dtype of a tensor."""
    return torch.ones_like(like), torch.zeros_like(like), torch.zeros_like(like)


def _turned(state: State, axis: str, angle: Tensor | float) -> State:
    """A state, turned about an axis by an angle in radians."""
    x, y, z = state
    if isinstance(angle, Tensor):
        cos: Tensor | float = angle.cos()
        sin: Tensor | float = angle.sin()
    else:
        cos, sin = math.cos(angle), math.sin(angle)
    if axis == "z":
        return x * cos - y * sin, x * sin + y * cos, z
    if axis == "y":
        return x * cos + z * sin, y, z * cos - x * sin
    return x, y * cos - z * sin, y * sin + z * cos


def _read(state: State, axis: str) -> State:
    """Coefficients of exp(-i u), 1 and exp(i u) of a state [terms] that is turned about an axis by u: [3 * terms].

    A turn is along + across cos(u) + beside sin(u), which three angles tell.
    """
    at = [_turned(state, axis, angle) for angle in (0.0, math.pi / 2, math.pi)]
    found = []
    for start, quarter, half in zip(*at, strict=True):
        along, across = (start + half) / 2, (start - half) / 2
        beside = quarter - along
        parts = ((across + 1j * beside) / 2, along, (across - 1j * beside) / 2)
        found.append(torch.cat([each.reshape(-1) for each in parts]))
    return found[0], found[1], found[2]
