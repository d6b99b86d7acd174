"""Rules of association: how a memory changes when a key (conditional stimulus) meets a value (unconditional stimulus).

    S_t = gamma S_(t-1) + e_t u_t^T,   o_t = q_t^T S_t           S [keys, values], e_t = kappa e_(t-1) + k_t

    hebb         u = rate v                                      linear attention
    trace        the same, gamma < 1                             forgetting, as in retention
    eligibility  the same, kappa > 0                             the key may come before the value
    gated        u = rate m v, m of each token in [0, 1]         a third factor
    delta        u = rate m (v - S^T k)                          Rescorla-Wagner; DeltaNet
    gated_delta  u = rate m (v - gamma S^T k), gamma < 1         gated DeltaNet
    oja          S + rate (k v^T - |S^T k|^2 S)                  Hebb's rule that bounds itself

From "Attention as Conditioning" (2025, arXiv:2508.08289), which reads a head of attention as such a memory.
Cost: recurrent T steps of keys x values; in chunks of C tokens T C (keys + values) as well, in T / C steps.
Our own reading: the paper names contiguity as linear attention, Rescorla-Wagner as DeltaNet and decay as retention; the
other rules, and all constants, complete the list. No code was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Name = Literal["hebb", "trace", "eligibility", "gated", "delta", "gated_delta", "oja"]
NAMES: tuple[Name, ...] = get_args(Name)
CORRECTING = ("delta", "gated_delta")
GATED = ("gated", "gated_delta")


@dataclass(frozen=True)
class Rule:
    """A rule with its constants.

    Attributes:
        name: as above.
        rate: of learning; below 2 for delta rules, which diverge from there on with unit keys.
        retention: gamma, of each step; below 1 for 'trace' and 'gated_delta', 1 for the others.
        trace: kappa, of 'eligibility'; 0 for the others.

    Raises:
        ValueError: an unknown name, or a constant that is out of bounds or not of this rule.
    """

    name: Name = "hebb"
    rate: float = 1.0
    retention: float = 1.0
    trace: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"rule: {self.name!r} was given; give one of {', '.join(NAMES)}.")
        most = 2.0 if self.name in CORRECTING else float("inf")
        if not 0 < self.rate < most:
            raise ValueError(f"rate: {self.rate} was given; give more than 0{' and less than 2' if most == 2 else ''}.")
        forgets = self.name in ("trace", "gated_delta")
        if not (0 < self.retention < 1 if forgets else self.retention == 1):
            allowed = "more than 0 and less than 1" if forgets else "1, or another rule"
            raise ValueError(f"retention: {self.retention} was given for {self.name}; give {allowed}.")
        if not (0 <= self.trace < 1 if self.name == "eligibility" else self.trace == 0):
            allowed = "0 to less than 1" if self.name == "eligibility" else "0, or 'eligibility'"
            raise ValueError(f"trace: {self.trace} was given for {self.name}; give {allowed}.")

    @property
    def in_chunks(self) -> bool:
        """Whether several tokens can be learned at once."""
        return self.name != "oja"


@dataclass(frozen=True)
class State:
    """What a memory holds between tokens.

    Attributes:
        memory: [..., keys, values].
        trace: of keys [..., keys].
        total: the sum that normalised retrieval divides by [..., keys].
    """

    memory: Tensor
    trace: Tensor
    total: Tensor

    @classmethod
    def empty(cls, key: Tensor, value: Tensor) -> State:
        """Nothing learned.

        Args:
            key: [..., tokens, keys].
            value: [..., tokens, values].
        """
        shape = (*key.shape[:-2], key.shape[-1])
        zeros = key.new_zeros(shape)
        return cls(key.new_zeros(*shape, value.shape[-1]), zeros, zeros)


def learn(rule: Rule, state: State, key: Tensor, value: Tensor, gate: Tensor | None = None) -> State:
    """Associate one key with one value.

    Args:
        rule: how.
        state: before.
        key: [..., keys].
        value: [..., values].
        gate: [...], of gated rules; None for 1.

    Returns:
        The state behind it.
    """
    trace = rule.trace * state.trace + key
    memory = state.memory
    factor = rule.rate * (torch.ones_like(key[..., 0]) if gate is None else gate)
    total = rule.retention * state.total + factor[..., None] * trace
    if rule.name == "oja":
        told = torch.einsum("...kv,...k->...v", memory, key).square().sum(-1)
        change = torch.einsum("...k,...v->...kv", key, value) - told[..., None, None] * memory
        return State(memory + factor[..., None, None] * change, trace, total)
    kept = rule.retention * memory
    wrong = value
    if rule.name in CORRECTING:
        wrong = value - torch.einsum("...kv,...k->...v", kept, key)
    memory = kept + torch.einsum("...k,...v->...kv", trace, factor[..., None] * wrong)
    return State(memory, trace, total)


def recurrent(
    rule: Rule, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, state: State
) -> tuple[Tensor, Tensor, State]:
    """Learn token by token, and test behind each.

    Args:
        rule: how.
        query: [..., tokens, keys].
        key: the same shape.
        value: [..., tokens, values].
        gate: [..., tokens], or None.
        state: before.

    Returns:
        What is retrieved [..., tokens, values], what normalised retrieval divides it by [..., tokens], and the state.
    """
    found, sums = [], []
    for at in range(key.shape[-2]):
        state = learn(rule, state, key[..., at, :], value[..., at, :], None if gate is None else gate[..., at])
        found.append(torch.einsum("...k,...kv->...v", query[..., at, :], state.memory))
        sums.append((query[..., at, :] * state.total).sum(-1))
    return torch.stack(found, -2), torch.stack(sums, -1), state


def in_chunks(
    rule: Rule, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, state: State, size: int
) -> tuple[Tensor, Tensor, State]:
    """The same, so many tokens at once.

    Args:
        rule: one with `in_chunks`.
        query: as in `recurrent`.
        key: as there.
        value: as there.
        gate: as there.
        state: before.
        size: tokens of a chunk; all of them is the parallel form.

    Returns:
        As `recurrent`.
    """
    found, sums = [], []
    for start in range(0, key.shape[-2], size):
        part = slice(start, start + size)
        gates = None if gate is None else gate[..., part]
        out, total, state = _chunk(rule, query[..., part, :], key[..., part, :], value[..., part, :], gates, state)
        found.append(out)
        sums.append(total)
    return torch.cat(found, -2), torch.cat(sums, -1), state


def _chunk(
    rule: Rule, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, state: State
) -> tuple[Tensor, Tensor, State]:
    length = key.shape[-2]
    step = torch.arange(length, device=key.device, dtype=key.dtype)
    away = step[:, None] - step  # tokens between a test and what was learned; below 0 it is not yet learned
    seen = away >= 0
    decay = torch.where(seen, torch.as_tensor(rule.retention, dtype=key.dtype) ** away.clamp(min=0), 0.0)
    past = (rule.retention ** (step + 1))[:, None]  # what is left at each token of the state before
    trace = key
    if rule.trace:
        left = torch.where(seen, torch.as_tensor(rule.trace, dtype=key.dtype) ** away.clamp(min=0), 0.0)
        trace = left @ key + (rule.trace ** (step + 1))[:, None] * state.trace[..., None, :]
    factor = rule.rate * (torch.ones_like(key[..., 0]) if gate is None else gate)[..., None]
    change = factor * value
    if rule.name in CORRECTING:
        # u_t = factor (v_t - gamma^t S_0^T k_t - sum over i < t of gamma^(t - i) (k_t . k_i) u_i)
        among = (key @ key.transpose(-1, -2)) * decay.tril(-1)
        wrong = factor * (value - past * (key @ state.memory))
        system = factor * among + torch.eye(length, dtype=key.dtype, device=key.device)
        change = torch.linalg.solve_triangular(system, wrong, upper=False, unitriangular=True)
    out = past * (query @ state.memory) + (query @ trace.transpose(-1, -2) * decay) @ change
    weighted = factor * trace
    totals = past * state.total[..., None, :] + decay @ weighted
    ahead = (rule.retention ** (length - 1 - step))[:, None]
    memory = rule.retention**length * state.memory + (ahead * trace).transpose(-1, -2) @ change
    return out, (query * totals).sum(-1), State(memory, trace[..., -1, :], totals[..., -1, :])
