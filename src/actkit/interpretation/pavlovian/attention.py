"""Attention whose memory learns by a chosen rule of association.

    o_t = phi(q_t)^T S_t,   normalised: divided by phi(q_t)^T z_t, z_t the sum of phi(k_i) as it is kept

`rules` says how S_t comes about. Queries are scaled by keys^-1/2 at retrieval, never keys at storage: that would change
how much fits in. The memory is kept in float32 or wider.
When to use it: to see what a rule can learn that another cannot, in a small model of your own.
Cost: as of the rules; the state of a head is keys x values, whatever the length.
Left open: in place of the attention of a trained model; chunks on a GPU are plain torch (flash-linear-attention has
kernels for such rules).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from actkit.interpretation.pavlovian.rules import CORRECTING, GATED, Name, Rule, State, in_chunks, learn, recurrent

Features = Literal["identity", "elu1", "relu", "l2"]
Mode = Literal["parallel", "chunk", "recurrent"]


def features(x: Tensor, kind: Features) -> Tensor:
    """Map keys and queries.

    Args:
        x: [..., features].
        kind: 'identity', 'elu1' (elu + 1, above 0), 'relu', or 'l2' (unit length).
    """
    if kind == "elu1":
        return nn.functional.elu(x) + 1
    if kind == "relu":
        return x.relu()
    return nn.functional.normalize(x, dim=-1) if kind == "l2" else x


def _wide(x: Tensor) -> Tensor:
    """In float32, if it is narrower: a memory is a sum over all tokens."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class PavlovianAttention(nn.Module):
    """Attention by association.

    Args:
        width: of the inputs.
        heads: that divide it.
        rule: its name.
        phi: of keys and queries; 'l2' for the delta rules, whose keys must not be longer than 1.
        rate: of the rule.
        retention: of the rule.
        trace: of the rule.
        normalise: divide by the sum of the weights; for features that are never below 0 and rules that only add.
        causal: a token is tested on what came up to it; else on all.
        mode: 'parallel', 'chunk' or 'recurrent', which give the same.
        chunk: tokens of a chunk.

    Raises:
        ValueError: heads do not divide the width, a constant is out of bounds, or settings do not go together.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        rule: Name = "hebb",
        *,
        phi: Features = "l2",
        rate: float = 1.0,
        retention: float = 1.0,
        trace: float = 0.0,
        normalise: bool = False,
        causal: bool = True,
        mode: Mode = "parallel",
        chunk: int = 64,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads or chunk < 1:
            raise ValueError(
                f"width, heads, chunk: {width}, {heads}, {chunk} were given; give heads that divide the width."
            )
        if phi not in get_args(Features) or mode not in get_args(Mode):
            raise ValueError(
                f"phi, mode: {phi!r}, {mode!r} were given; give one of {', '.join(get_args(Features))}, and one of "
                f"{', '.join(get_args(Mode))}."
            )
        self.rule = Rule(rule, rate, retention, trace)
        if normalise and (phi not in ("elu1", "relu") or rule in (*CORRECTING, "oja")):
            raise ValueError(
                f"normalise: with phi {phi!r} and rule {rule!r} the sum may be 0 or below; use 'elu1' or 'relu', and "
                f"a rule that only adds."
            )
        if rule in CORRECTING and phi != "l2":
            raise ValueError(f"phi: {phi!r} was given for {rule}, which is stable for unit keys alone; give 'l2'.")
        if mode == "chunk" and not self.rule.in_chunks:
            raise ValueError(f"mode: {rule} learns token by token; give 'recurrent'.")
        self.width, self.heads, self.phi, self.normalise = width, heads, phi, normalise
        self.causal, self.mode, self.chunk = causal, mode if self.rule.in_chunks else "recurrent", chunk
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate = nn.Linear(width, heads) if rule in GATED else None

    def attend(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the output and the state, from which a next part of the sequence goes on.

        Args:
            x: [batch, length, width].
            state: behind the part before; None at the start.
        """
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        gate = None if self.gate is None else self.gate(x).sigmoid().transpose(1, 2)
        given = value.dtype
        with torch.autocast(x.device.type, enabled=False):
            wide = None if gate is None else _wide(gate)
            out, after = self._learned(_wide(query), _wide(key), _wide(value), wide, state)
        found: Tensor = self.output(out.to(given).transpose(1, 2).flatten(2))
        return found, after

    def _learned(
        self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        """What is retrieved [batch, heads, length, features], and the state."""
        key = features(key, self.phi)
        query = features(query, self.phi) * key.shape[-1] ** -0.5
        before = State.empty(key, value) if state is None else state
        if self.mode == "recurrent":
            out, total, after = recurrent(self.rule, query, key, value, gate, before)
        else:
            size = self.chunk if self.mode == "chunk" else max(1, key.shape[-2])
            out, total, after = in_chunks(self.rule, query, key, value, gate, before, size)
        if not self.causal:
            out, total = query @ after.memory, (query * after.total[..., None, :]).sum(-1)
        if self.normalise:
            out = out / total.clamp(min=1e-6)[..., None]
        return out, after

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, length, width] to the same shape."""
        return self.attend(x)[0]


class ConditioningMemory:
    """One memory outside of a network, in float64.

    Args:
        stimuli: size of a conditional stimulus.
        outcomes: size of an unconditional one.
        rule: how it learns.
    """

    def __init__(self, stimuli: int, outcomes: int, rule: Rule | Name = "delta") -> None:
        if min(stimuli, outcomes) < 1:
            raise ValueError(f"stimuli, outcomes: {stimuli} and {outcomes} were given; give 1 or more of each.")
        self.rule = rule if isinstance(rule, Rule) else Rule(rule)
        self.sizes = stimuli, outcomes
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        stimuli, outcomes = self.sizes
        zeros = torch.zeros(stimuli, dtype=torch.float64)
        self.state = State(torch.zeros(stimuli, outcomes, dtype=torch.float64), zeros, zeros)

    def associate(self, stimulus: Tensor, outcome: Tensor, gate: float = 1.0) -> None:
        """Present two stimuli together.

        Args:
            stimulus: [stimuli]; a compound is the sum of its elements.
            outcome: [outcomes]; 0 if none follows.
            gate: how much is learned, 0 to 1.

        Raises:
            ValueError: sizes do not fit, or the gate is out of bounds.
        """
        given = tuple(stimulus.shape), tuple(outcome.shape)
        if given != ((self.sizes[0],), (self.sizes[1],)) or not 0 <= gate <= 1:
            raise ValueError(
                f"stimulus, outcome, gate: {given[0]}, {given[1]}, {gate} were given; give vectors of {self.sizes[0]} "
                f"and {self.sizes[1]}, and 0 to 1."
            )
        factor = torch.tensor(gate, dtype=torch.float64)
        self.state = learn(self.rule, self.state, stimulus.double(), outcome.double(), factor)

    def probe(self, stimulus: Tensor) -> Tensor:
        """Return what a stimulus brings to mind: [outcomes].

        Args:
            stimulus: [stimuli].
        """
        return stimulus.double() @ self.state.memory
