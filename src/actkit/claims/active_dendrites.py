"""Active dendrites: the closed forms against simulation, how they scale, the threshold they predict, real activations.

What is measured: false positives and false negatives of really drawn codes against the formulas; the fall of the error
with the number of cells and of synapses; the smallest threshold with a median error of 1e-9 on the paper's ranges;
unions; and, on MiniLM's MLP hidden units, how much more often codes of real text match than the theory says.
The last needs a threshold at which the theoretical rate can be seen at all: the smallest one below 1e-3, which is 4 of
16 synapses (2.4e-4). Stored and tested tokens are of different documents. The same word often stands in both, which is
counted as a false match like any other. The 1e-11 of the paper's examples cannot be sampled, and biology is not tested.

Tried after the last one had failed, and not part of it: `by="value"` changes nothing; among pairs of different words
thresholds of 8 to 12 are needed, and with units standardised first 7 or 8, which the condition would have allowed.

About 5 minutes on one core.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from actkit.claims.outcome import SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import Subject, spread
from actkit.data import Batches
from actkit.sparsity.active_dendrites.pattern_simulation import (
    ExpectedVsObserved,
    Rate,
    expected_vs_observed,
    random_codes,
    random_subsets,
    simulate,
)
from actkit.sparsity.active_dendrites.pattern_theory import (
    false_negative,
    false_positive,
    threshold_curve,
    union_false_positive,
)
from actkit.sparsity.active_dendrites.segments import DendriticSegments

POSITIVES = ((300, 128, 24, 12), (200, 20, 10, 4), (500, 50, 20, 6), (1000, 30, 20, 4))  # n, a, s, theta
NEGATIVES = (1000, 128, 30)  # n, a, s
REPLACED = (38, 45, 51, 64)
UNION = (2000, 40, 20, 8)
SIGMAS = 3.5
MORE = 6  # by how much the threshold may rise


@dataclass(frozen=True)
class Sizes:
    """How much is drawn and measured.

    Attributes:
        trials: of each simulated rate.
        noisy: codes that a union must find.
        seeds: of the measurement on MiniLM.
        rows: sentences of that measurement.
        tokens: of that measurement.
    """

    trials: int = 1_000_000
    noisy: int = 100_000
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: int = 600
    tokens: int = 8000


SIMULATED_POSITIVES = Statement(
    "The false positive formula gives the rate at which random codes match",
    "agrees with simulations of 1e8 trials",
    "really drawn codes, 1e6 trials each, (n, a, s, theta) = (300, 128, 24, 12), (200, 20, 10, 4), (500, 50, 20, 6), "
    "(1000, 30, 20, 4): every observed rate within 3.5 binomial standard deviations",
    SYNTHETIC,
)
SIMULATED_NEGATIVES = Statement(
    "The false negative formula gives the rate at which noisy codes are missed",
    "agrees with simulations of 1e7 trials",
    "n = 1000, a = 128, s = 30, theta 8 to 16, v = 38, 45, 51, 64 ones replaced, 1e6 trials for each v: every observed "
    "rate whose expectation is above 1e-3 within 3.5 binomial standard deviations",
    SYNTHETIC,
)
SCALING = Statement(
    "The error falls with the number of cells and of synapses, but not for dense codes",
    "falls faster than exponentially in n; stays high at a = n/2",
    "log10 of the rate falls at every step in n (300 to 5000, a = 64, s = 24, theta = 12) and in s (8 to 48 in steps "
    "of 8, theta = s/2, n = 1000, a = 64); at a = n/2, s = 24, theta = 12 the rate is above 0.5 for every n",
    SYNTHETIC,
)
THRESHOLD = Statement(
    "Over the paper's ranges a threshold of about 10 synapses is enough",
    "predicted thresholds 9 to 20, measured in neurons 8 to 20",
    "n 10,000 to 200,000 (20 values), a 0.5 to 3 % (6), s 20 to 50 (7): the smallest threshold with a median error of "
    "at most 1e-9 is 9 or 10, and the median at 20 is below 1e-25",
    SYNTHETIC,
)
UNIONS = Statement(
    "A segment can hold several codes: the formula for unions gives its false positives, and no noisy code is missed",
    "error grows with each code and stays small; robust to s - theta lost ones",
    "(n, a, s, theta) = (2000, 40, 20, 8), M = 1 to 8 codes, 1e6 trials each: every observed rate within 3.5 "
    "binomial standard deviations of the average over union sizes; of 1e5 codes with s - theta of the stored ones "
    "lost, none is missed",
    SYNTHETIC,
)
ACTIVATIONS = Statement(
    "Units of a real network are correlated, so real codes match more often than the theory says; a higher threshold "
    "absorbs that",
    "argued; correlated inputs are not measured",
    "MiniLM, mlp.hidden (n = 1536) as top 32 by magnitude, s = 16, theta = 4 (the smallest with a theoretical rate "
    "below 1e-3), in each of the 6 blocks and of 3 seeds: at a threshold of at most theta + 6 the observed rate is at "
    "or below the theoretical rate of theta",
    "minilm",
)
STATEMENTS = (SIMULATED_POSITIVES, SIMULATED_NEGATIVES, SCALING, THRESHOLD, UNIONS, ACTIVATIONS)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run all experiments, or those about one subject."""
    sizes = sizes or Sizes()
    encoder = Subject("minilm", calibration=1, split="calibration", held_out=sizes.rows)
    experiments: list[Experiment] = [
        (SIMULATED_POSITIVES, partial(simulated_positives, sizes)),
        (SIMULATED_NEGATIVES, partial(simulated_negatives, sizes)),
        (SCALING, scaling),
        (THRESHOLD, threshold),
        (UNIONS, partial(unions, sizes)),
        (ACTIVATIONS, partial(activations, encoder.model, encoder.held_out, sizes)),
    ]
    return conduct("active-dendrites", experiments, sizes, subject, progress)


# -- theory and simulation ---------------------------------------------------------------------------------------------


def simulated_positives(sizes: Sizes) -> Measurement:
    """Observed and expected rates of the four settings."""
    parts, deviations = [], []
    for n, a, s, theta in POSITIVES:
        observed = simulate(n, a, s, trials=sizes.trials, progress=False).matched(theta)
        expected = float(false_positive(n, a, s, theta))
        deviations.append(_deviation(observed, expected))
        parts.append(f"{(n, a, s, theta)}: {observed.value:.4g} for {expected:.4g} ({deviations[-1]:+.1f})")
    here = f"observed for expected (standard deviations): {'; '.join(parts)}; {sizes.trials:,} trials each"
    return Measurement(here, max(map(abs, deviations)) <= SIGMAS)


def simulated_negatives(sizes: Sizes) -> Measurement:
    """Observed and expected rates of all thresholds, for each number of replaced ones."""
    n, a, s = NEGATIVES
    deviations, smallest = [], 1.0
    for replaced in REPLACED:
        overlaps = simulate(n, a, s, replaced=replaced, trials=sizes.trials, progress=False)
        for theta in range(8, 17):
            expected = float(false_negative(a, s, theta, replaced))
            if expected > 1e-3:
                deviations.append(_deviation(overlaps.missed(theta), expected))
                smallest = min(smallest, expected)
    largest = max(map(abs, deviations))
    here = (
        f"{len(deviations)} rates from {smallest:.4f} on: at most {largest:.1f} standard deviations off, on average "
        f"{sum(map(abs, deviations)) / len(deviations):.1f}; {sizes.trials:,} trials for each v"
    )
    return Measurement(here, largest <= SIGMAS)


def _deviation(observed: Rate, expected: float) -> float:
    """The distance in binomial standard deviations."""
    return (observed.value - expected) / math.sqrt(expected * (1 - expected) / observed.trials)


# -- formulas ----------------------------------------------------------------------------------------------------------


def scaling() -> Measurement:
    """The formulas along n, along s and at half density."""
    cells = np.arange(300, 5001, 100)
    by_cells = false_positive(cells, 64, 24, 12, form="log10")
    synapses = np.arange(8, 49, 8)
    by_synapses = false_positive(1000, 64, synapses, synapses // 2, form="log10")
    dense = false_positive(cells, cells // 2, 24, 12)
    here = (
        f"log10 of the rate {by_cells[0]:.1f} at n = 300 to {by_cells[-1]:.1f} at n = 5000; {by_synapses[0]:.1f} at "
        f"s = 8 to {by_synapses[-1]:.1f} at s = 48; a = n/2: {dense.min():.3f} to {dense.max():.3f}"
    )
    falls = bool((np.diff(by_cells) < 0).all() and (np.diff(by_synapses) < 0).all())
    return Measurement(here, falls and float(dense.min()) > 0.5)


def threshold() -> Measurement:
    """The medians on the whole grid; those of its slice n = 10,000 are reported."""
    curve, slice_ = threshold_curve(), threshold_curve(cells=[10_000])
    medians = dict(zip(curve.thresholds, curve.log10_errors, strict=True))
    shown = ", ".join(f"{10 ** medians[each]:.1e} at {each}" for each in (8, 9, 10, 12, 20))
    here = (
        f"smallest threshold {curve.smallest(1e-9)}; medians of {curve.combinations} combinations {shown}. With "
        f"n = 10,000 alone: {slice_.smallest(1e-9)}"
    )
    return Measurement(here, curve.smallest(1e-9) in (9, 10) and medians[20] < -25)


# -- unions ------------------------------------------------------------------------------------------------------------


def unions(sizes: Sizes) -> Measurement:
    """Observed and expected false positives for M = 1 to 8, and misses of a union of 8 by the layer itself."""
    n, a, s, theta = UNION
    deviations, plugin, exact = [], [], []
    for patterns in range(1, 9):
        overlaps = simulate(n, a, s, patterns=patterns, trials=sizes.trials, seed=patterns, progress=False)
        exact.append(float(union_false_positive(n, a, s, theta, patterns)))
        plugin.append(float(union_false_positive(n, a, s, theta, patterns, method="plugin")))
        deviations.append(_deviation(overlaps.matched(theta), exact[-1]))
    missed = _missed(sizes)
    largest = max(map(abs, deviations))
    here = (
        f"at most {largest:.1f} standard deviations off, {sizes.trials:,} trials each; expected {exact[0]:.1e} for one "
        f"code, {exact[-1]:.1e} for 8 (the paper's formula, with the mean size: {plugin[-1]:.1e}); {missed} of "
        f"{sizes.noisy:,} noisy codes missed"
    )
    return Measurement(here, largest <= SIGMAS and missed == 0)


def _missed(sizes: Sizes, patterns: int = 8, batch: int = 1000) -> int:
    """Count the noisy codes that a segment misses which holds their code and seven more; a new segment for each batch.

    The ones that are lost are those that the segment stores, as many as it may lose; as many others come on.
    """
    n, a, s, theta = UNION
    generator = torch.Generator().manual_seed(0)
    missed = 0
    for start in range(0, sizes.noisy, batch):
        rows = min(batch, sizes.noisy - start)
        segments = DendriticSegments(n, s, theta)
        code = random_codes(1, n, a, generator)
        segments.learn(code, generator=generator)
        stored = torch.zeros(1, n, dtype=torch.bool)
        stored[0, segments.members] = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # eight codes make 1 % false positives, and a warning
            segments.learn(random_codes(patterns - 1, n, a, generator), segment=0, generator=generator)
        lost = random_subsets(stored.expand(rows, n), s - theta, generator)
        added = random_subsets(~code.expand(rows, n), s - theta, generator)
        missed += int((~segments.match(code & ~lost | added)).sum())
    return missed


# -- activations -------------------------------------------------------------------------------------------------------


def activations(model: nn.Module, text: Batches, sizes: Sizes) -> Measurement:
    """Every block's real codes at theta = 4 and above."""
    return judge([measure(model, text, sizes.tokens, seed) for seed in sizes.seeds])


def measure(model: nn.Module, text: Batches, tokens: int, seed: int) -> ExpectedVsObserved:
    """Stored against tested tokens, half of the documents each."""
    return expected_vs_observed(
        model, text, "mlp.hidden", active=32, synapses=16, threshold=4, tokens=tokens, seed=seed, progress=False
    )


def judge(runs: list[ExpectedVsObserved]) -> Measurement:
    """The condition, over all blocks and seeds."""
    sites = [site for found in runs for site in found.sites]
    expected = sites[0].expected
    parts = []
    for group in zip(*(found.sites for found in runs), strict=True):
        needed = [site.threshold_needed for site in group]
        shown = "none" if None in needed else str(max(each for each in needed if each is not None))
        effective = max((site.effective_cells or 0) for site in group)
        factor = spread([site.factor for site in group], ".0f")
        parts.append(f"{group[0].site.split('.mlp')[0]}: {factor}, n = {effective}, {shown}")
    pairs = min(site.stored * site.tested for site in sites)
    here = (
        f"theory {expected:.1e}; observed over theory, effective n (largest) and threshold needed (largest): "
        f"{'; '.join(parts)}; {len(runs)} seeds of at least {pairs:,} pairs"
    )
    passed = all(site.threshold_needed is not None and site.threshold_needed <= 4 + MORE for site in sites)
    return Measurement(here, passed)
