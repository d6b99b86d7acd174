"""Conditioning experiments: what a rule learns from a course of trials.

    A+  the stimulus A, then the outcome       AB-  A and B together, then none

    Rescorla-Wagner predicts blocking, overshadowing, inhibition and overexpectation; Hebb's rule none of them.

A response is what a stimulus brings to mind, projected on the outcome. Compounds are sums of their elements, which are
orthonormal here. Second-order conditioning, which needs order inside of a trial, is left open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from actkit.interpretation.pavlovian.attention import ConditioningMemory
from actkit.interpretation.pavlovian.rules import Name, Rule

Trial = tuple[str, bool]  # the stimuli, and whether the outcome follows
PROTOCOLS: dict[str, Callable[[int], list[Trial]]] = {
    "acquisition": lambda n: [("A", True)] * n,
    "extinction": lambda n: [("A", True)] * n + [("A", False)] * n,
    "reacquisition": lambda n: [("A", True)] * n + [("A", False)] * n + [("A", True)] * n,
    "blocking": lambda n: [("A", True)] * n + [("AB", True)] * n,
    "overshadowing": lambda n: [("AB", True)] * n,
    "inhibition": lambda n: [("A", True), ("AB", False)] * n,
    "overexpectation": lambda n: [("A", True), ("B", True)] * n + [("AB", True)] * n,
}


@dataclass(frozen=True)
class Conditioning:
    """What a protocol gave.

    Attributes:
        protocol: its name.
        rule: that learned.
        trials: in their order, such as 'AB+'.
        responses: to each element behind each trial.
    """

    protocol: str
    rule: Rule
    trials: tuple[str, ...]
    responses: dict[str, tuple[float, ...]]

    def last(self, element: str) -> float:
        """The response to an element at the end.

        Args:
            element: 'A' or 'B'.
        """
        return self.responses[element][-1]


def run_protocol(
    protocol: str, rule: Rule | Name = "delta", *, trials: int = 30, salience: dict[str, float] | None = None
) -> Conditioning:
    """Run an experiment.

    Args:
        protocol: one of `PROTOCOLS`.
        rule: that learns; a name for a rate of 0.2.
        trials: of each phase.
        salience: how strong an element is, by name; 1 for others.

    Returns:
        The responses.

    Raises:
        ValueError: an unknown protocol, no trial, or a salience of no element.
    """
    if protocol not in PROTOCOLS or trials < 1:
        raise ValueError(
            f"protocol, trials: {protocol!r}, {trials} were given; give one of {', '.join(PROTOCOLS)}, and 1 or more."
        )
    course = PROTOCOLS[protocol](trials)
    elements = sorted({element for stimuli, _ in course for element in stimuli})
    strengths = salience or {}
    if not set(strengths) <= set(elements) or any(value <= 0 for value in strengths.values()):
        raise ValueError(f"salience: {strengths} was given; give more than 0 for some of {', '.join(elements)}.")
    if not isinstance(rule, Rule):
        retention = 0.9 if rule in ("trace", "gated_delta") else 1.0
        rule = Rule(rule, 0.2, retention, 0.5 if rule == "eligibility" else 0.0)
    memory = ConditioningMemory(len(elements), 1, rule)
    shape = torch.eye(len(elements), dtype=torch.float64)
    vectors = {element: strengths.get(element, 1.0) * shape[at] for at, element in enumerate(elements)}
    responses: dict[str, list[float]] = {element: [] for element in elements}
    for stimuli, outcome in course:
        memory.associate(
            sum((vectors[each] for each in stimuli), torch.zeros(len(elements))), torch.tensor([float(outcome)])
        )
        for element in elements:
            responses[element].append(float(memory.probe(vectors[element])))
    named = tuple(f"{stimuli}{'+' if outcome else '-'}" for stimuli, outcome in course)
    return Conditioning(protocol, rule, named, {name: tuple(values) for name, values in responses.items()})


def generalisation(cosines: list[float], rule: Rule | Name = "delta", *, trials: int = 30) -> list[float]:
    """Return the response to stimuli that are like the learned one, by their cosine with it.

    Args:
        cosines: -1 to 1.
        rule: that learns; a name for a rate of 0.2.
        trials: of the learned one.

    Raises:
        ValueError: a cosine is out of bounds.
    """
    if not all(-1 <= cosine <= 1 for cosine in cosines):
        raise ValueError(f"cosines: {cosines} were given; give -1 to 1.")
    memory = ConditioningMemory(2, 1, rule if isinstance(rule, Rule) else Rule(rule, 0.2))
    for _ in range(trials):
        memory.associate(torch.tensor([1.0, 0.0]), torch.ones(1))
    return [float(memory.probe(torch.tensor([cosine, (1 - cosine**2) ** 0.5]))) for cosine in cosines]
