"""Sparsing Law's claims: one measure of sparsity for any activation function, and how it moves with training and shape.

What is measured: CETT against the two baselines at equal shares of active neurons, on held-out text, for three
language models (the zoo's ReLU and SiLU ones of 5.2 M parameters, and a GELU one of 1.1 M, trained here for 500 steps,
as the zoo has none); the order of ReLU and SiLU; twelve checkpoints of a ReLU and a SiLU model of 1.1 M parameters
over 2.5 M tokens at a constant rate, measured with one shared CETT as in the paper's appendix E; the self-consistency
of the search; and five ReLU models of one size and different width / depth after 150 steps. Thresholds are fitted to
20,480 tokens of the calibration split. The paper's models see 10^5 times as many tokens: the limits of its curves, its
benchmarks and the decoding speed of its 2.4B model cannot be checked here.

About 18 minutes on one idle core (35 if two other processes share it). The two claims that need one trained model
are tested on SmolLM2-135M as well, under the same conditions, on the fewer rows of `REAL_SIZES`: 10 minutes on a busy
machine.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import mean
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import PrivateAttr
from scipy.stats import spearmanr
from torch import Tensor, nn

from actkit.claims import small_models
from actkit.claims.outcome import SMALL, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.core.train.training import train
from actkit.data import Batches
from actkit.sparsity.sparsing_law.activation_ratio import activation_ratio, gate_quantile
from actkit.sparsity.sparsing_law.laws import LawFit, fit_relu_law, fit_silu_law, fit_width_law
from actkit.sparsity.sparsing_law.shared_cett import Root, SharedCett, in_float32, largest_cett

RATE = 2e-3  # learning rate of every training here
PERCENTAGES = (0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Sizes:
    """How much is measured and trained.

    Attributes:
        seeds: one, as models are trained.
        calibration: rows of 256 tokens; twice as many of 128 for the models trained here.
        held_out: the same.
        sample: tokens per layer that thresholds are computed from.
        gelu: training steps of 2,048 tokens, of the GELU model.
        law: the same, of the models whose checkpoints are measured.
        checkpoints: of a run, equally far apart in log tokens, from 5 % of its steps (warm-up is over at 4 %) to the
            end.
        stable: how many of the last ones the shared CETT is found on.
        shape: training steps of 2,048 tokens, of the models of several shapes.
        shapes: (hidden size, layers).
        rows: of the training split; None for all.
    """

    seeds: tuple[int, ...] = (0,)
    calibration: int = 80
    held_out: int = 80
    sample: int = 1024
    gelu: int = 500
    law: int = 1200
    checkpoints: int = 12
    stable: int = 5
    shape: int = 150
    shapes: tuple[tuple[int, int], ...] = ((64, 16), (96, 7), (128, 4), (176, 2), (256, 1))
    rows: int | None = None


REAL_SIZES = Sizes(calibration=4, held_out=8)
METRIC = Statement(
    "At equal shares of active neurons, dropping by contribution (CETT) leaves a better model than dropping by the "
    "gate's output, with one threshold (FAT) or a top-k",
    "the best curve of perplexity over sparsity of four methods, at 0.1B and 0.8B, for ReLU and SiLU",
    "at the share that CETT leaves active on held-out text at PPL-1% (found on other text): perplexity(CETT) <= "
    "perplexity(top-k) and <= perplexity(FAT), for every model; FAT's threshold is a quantile of the held-out states",
    SMALL,
)
ORDER = Statement(
    "A ReLU model is sparser than a SiLU model at equal perplexity lost",
    "limit ratios of 6 to 8 % (ReLU) and 38 to 41 % (SiLU)",
    "zoo models of one size, trained on the same tokens: the PPL-1% activation ratio of the ReLU one is lower by at "
    "least 5 points",
    SMALL,
)
RELU_LAW = Statement(
    "With more training data a ReLU model gets sparser: A(D) = exp(b - c D^alpha) + A0",
    "R2 is not printed; curves of 0.1B to 2.4B models over up to some 10^11 tokens",
    "12 checkpoints, PPL-1% by one CETT for the run: Spearman(D, A) <= -0.6, R2 of the ReLU law >= 0.9, and the SiLU "
    "law has a larger squared error",
    SMALL,
)
SILU_LAW = Statement(
    "With more training data a SiLU model gets denser: A(D) = A0 - c / D^alpha",
    "R2 is not printed; curves of 0.1B to 1.2B models over up to some 10^11 tokens",
    "12 checkpoints, PPL-1% by one CETT for the run: Spearman(D, A) >= 0.6, R2 of the SiLU law >= 0.9, and the ReLU "
    "law has a larger squared error",
    SMALL,
)
CONSISTENT = Statement(
    "The search meets its target, and more perplexity buys more sparsity",
    "by construction",
    "the models of the first claim, on the calibration text: perplexity x 1.0100 within 0.0005 at PPL-1%, and "
    "the sparsity never falls over p = 0.5, 1, 2, 5, 10",
    SMALL,
)
SHAPE = Statement(
    "The activation ratio rises with width / depth up to a bottleneck, then is flat",
    "0.1B, ReLU, at the end of training: linear up to about 114, then about 8 %",
    "five ReLU models of one size, hidden size / layers from 4 to 256, PPL-1% after equally many tokens: Spearman("
    "width / depth, A) >= 0.6 and the slope of the line is positive. (Far from the limit that the paper speaks of.)",
    SMALL,
)
UNTRAINED = (METRIC, CONSISTENT)
STATEMENTS = (
    METRIC,
    ORDER,
    CONSISTENT,
    RELU_LAW,
    SILU_LAW,
    SHAPE,
    *(statement.on(name) for name in REAL for statement in UNTRAINED),
)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject in REAL:
        return _on_a_real_model(subject, progress, sizes or REAL_SIZES)
    sizes = sizes or Sizes()
    with ExitStack() as stack:
        relu = Case("relu", partial(_of_the_zoo, "relu", sizes), sizes, stack)
        silu = Case("silu", partial(_of_the_zoo, "swiglu", sizes), sizes, stack)
        gelu = Case("gelu", partial(_made_here, "gelu", sizes), sizes, stack)
        experiments = [
            (METRIC, partial(metric, (relu, silu, gelu))),
            (ORDER, partial(order, relu, silu)),
            (CONSISTENT, partial(consistent, (relu, silu, gelu))),
            (RELU_LAW, partial(law, "relu", sizes)),
            (SILU_LAW, partial(law, "silu", sizes)),
            (SHAPE, partial(shape, sizes)),
        ]
        return conduct("sparsing-law", experiments, sizes, subject, progress)


def _on_a_real_model(name: str, progress: bool, sizes: Sizes) -> Outcome:
    with ExitStack() as stack:
        case = Case(name, partial(_of_the_zoo, name, sizes), sizes, stack)
        experiments = [(METRIC.on(name), partial(metric, [case])), (CONSISTENT.on(name), partial(consistent, [case]))]
        return conduct("sparsing-law", experiments, sizes, name, progress)


# -- one model ---------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A model with its text.

    Attributes:
        model: the model.
        calibration: what its thresholds are fitted to.
        held_out: what it is measured on.
    """

    model: nn.Module
    calibration: Batches
    held_out: Batches


def _of_the_zoo(name: str, sizes: Sizes) -> Text:
    subject = Subject(name, calibration=sizes.calibration, split="calibration", held_out=sizes.held_out)
    return Text(subject.model, subject.calibration(0), subject.held_out)


def _made_here(activation: str, sizes: Sizes) -> Text:
    model = _trained(activation, sizes.gelu, sizes)
    fitted, held_out = 2 * sizes.calibration, 2 * sizes.held_out
    return Text(model, small_models.text(model, "calibration", fitted), small_models.text(model, "test", held_out))


class Case:
    """A model, made when it is first needed, with its search; what was found is kept."""

    def __init__(self, name: str, make: Callable[[], Text], sizes: Sizes, stack: ExitStack) -> None:
        self.name, self._make, self._sizes, self._stack = name, make, sizes, stack
        self._roots: dict[float, Root] = {}

    @cached_property
    def text(self) -> Text:
        """The model with its calibration and held-out text, made when first needed."""
        return self._make()

    @cached_property
    def search(self) -> SharedCett:
        """The search for a CETT shared by all layers, on a float32 view of the model."""
        view = self._stack.enter_context(in_float32(self.text.model))
        return SharedCett(view, self.text.calibration, sample=self._sizes.sample, progress=False)

    def root(self, p: float) -> Root:
        """The largest CETT that lets perplexity rise by p percent."""
        if p not in self._roots:
            self._roots[p] = largest_cett(self.search.rise, p)
        return self._roots[p]


def metric(cases: Sequence[Case]) -> Measurement:
    """Held-out perplexities at the share that CETT leaves active there."""
    parts, passed = [], True
    for case in cases:
        model, _, held_out = case.text
        cett = case.search.at(case.root(1.0).low, held_out)
        eps = gate_quantile(case.search.view, held_out, cett.ratio)
        others = {
            "FAT": activation_ratio(model, held_out, "fat", eps, progress=False),
            "top-k": activation_ratio(model, held_out, "topk", cett.ratio, progress=False),
        }
        perplexity = math.exp(cett.dense_loss + cett.rise)
        passed &= all(perplexity <= other.perplexity for other in others.values())
        found = ", ".join(f"{name} {other.perplexity:.2f} ({other.ratio:.1%})" for name, other in others.items())
        parts.append(
            f"{case.name}: dense {math.exp(cett.dense_loss):.2f}, CETT {perplexity:.2f} ({cett.ratio:.1%} active, "
            f"x {math.exp(cett.rise):.4f}), {found}"
        )
    return Measurement("; ".join(parts), passed)


def order(relu: Case, silu: Case) -> Measurement:
    """PPL-1% activation ratios on the calibration text."""
    first, second = (case.search.at(case.root(1.0).low).ratio for case in (relu, silu))
    return Measurement(f"ReLU {first:.1%}, SiLU {second:.1%} active", second - first >= 0.05)


def consistent(cases: Sequence[Case]) -> Measurement:
    """What the search achieves, and sparsity over p."""
    parts, passed = [], True
    for case in cases:
        shares = [1 - case.search.at(case.root(p).low).ratio for p in PERCENTAGES]
        root = case.root(1.0)
        ratio = math.exp(case.search.rise(root.low))
        passed &= root.reached and abs(ratio - 1.01) <= 0.0005 and shares == sorted(shares)
        listed = ", ".join(f"{share:.1%}" for share in shares)
        parts.append(f"{case.name}: x {ratio:.5f} in {len(root.trace)} tries; sparsity {listed}")
    return Measurement("; ".join(parts), passed)


# -- training ----------------------------------------------------------------------------------------------------------


class Snapshots(TrainingRule):
    """Keep a copy of the weights after the given steps.

    Attributes:
        steps: after which a copy is kept.
    """

    steps: tuple[int, ...]

    keep: ClassVar[Literal["best", "last"]] = "last"
    _kept: dict[int, dict[str, Tensor]] = PrivateAttr(default_factory=dict)

    @property
    def kept(self) -> dict[int, dict[str, Tensor]]:
        """The states that were kept, by step."""
        return self._kept

    def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedSnapshots:
        return AttachedSnapshots(self, model)


class AttachedSnapshots(AttachedRule):
    """Snapshots at work on a model."""

    def __init__(self, settings: Snapshots, model: nn.Module) -> None:
        self.settings, self.model, self.step = settings, model, 0

    def after_step(self, progress: float) -> None:
        self.step += 1
        if self.step in self.settings.steps:
            state = self.model.state_dict()
            self.settings.kept[self.step] = {name: tensor.detach().clone() for name, tensor in state.items()}


def _trained(activation: str, steps: int, sizes: Sizes, rules: Sequence[TrainingRule] = (), **shape: int) -> nn.Module:
    """A small model after so many steps at a constant rate, in bf16 autocast, with its last weights."""
    model = small_models.language_model(activation, **shape)
    train(
        model,
        small_models.text(model, "train", sizes.rows),
        validation=small_models.text(model, "search", 16),
        steps=steps,
        learning_rate=RATE,
        warmup=0.04,
        schedule="constant",
        weight_decay=0.1,
        mixed_precision="bf16",
        evaluate_every=steps,
        keep="last",
        rules=rules,
        progress=False,
    )
    return model.eval()


# -- the laws ----------------------------------------------------------------------------------------------------------


def law(activation: Literal["relu", "silu"], sizes: Sizes) -> Measurement:
    """The trend over a training, and both laws."""
    tokens, ratios, cett = run_of_checkpoints(activation, sizes)
    return judged(activation, tokens, ratios, f"shared CETT {cett:.3f}")


def run_of_checkpoints(activation: str, sizes: Sizes) -> tuple[list[float], list[float], float]:
    """Measure PPL-1% activation ratios over a training.

    The CETT that all checkpoints share is the one under which the mean perplexity ratio of the last ones is 1.01.

    Args:
        activation: of the model.
        sizes: how much is trained.

    Returns:
        Tokens, ratios, and the shared CETT.
    """
    steps = np.unique(np.geomspace(max(1, 0.05 * sizes.law), sizes.law, sizes.checkpoints).round().astype(int)).tolist()
    snapshots = Snapshots(steps=tuple(steps))
    model = _trained(activation, sizes.law, sizes, [snapshots])
    batches = small_models.text(model, "calibration", 2 * sizes.calibration)
    with ExitStack() as stack:
        searches = []
        for step in steps:
            checkpoint = copy.deepcopy(model)
            checkpoint.load_state_dict(snapshots.kept[step])
            view = stack.enter_context(in_float32(checkpoint))
            searches.append(SharedCett(view, batches, sample=sizes.sample, progress=False))
        last = searches[-sizes.stable :]
        root = largest_cett(lambda cett: math.log(mean(math.exp(search.rise(cett)) for search in last)), 1.0)
        ratios = [search.at(root.low).ratio for search in searches]
    per_step = small_models.LENGTH * small_models.BATCH
    return [float(step * per_step) for step in steps], ratios, root.low


def judged(activation: str, tokens: Sequence[float], ratios: Sequence[float], note: str) -> Measurement:
    """Whether the ratios of a run follow the law of its activation function."""
    fits: dict[str, LawFit] = {"relu": fit_relu_law(tokens, ratios), "silu": fit_silu_law(tokens, ratios)}
    mine, other = fits[activation], fits["silu" if activation == "relu" else "relu"]
    trend = float(spearmanr(tokens, ratios).statistic)
    right = trend <= -0.6 if activation == "relu" else trend >= 0.6
    listed = ", ".join(f"{ratio:.1%}" for ratio in ratios)
    fitted = ", ".join(f"{name} {value:.3g}" for name, value in mine.parameters.items())
    here = (
        f"Spearman {trend:.2f}; {activation} law R2 {mine.r2:.3f} ({fitted}), squared error {mine.sse:.2e}, of the "
        f"other law {other.sse:.2e}; {tokens[0] / 1e6:.2f} to {tokens[-1] / 1e6:.2f} M tokens: {listed}; {note}"
    )
    if not right:
        here += ". The trend is not reproduced at this scale"
    return Measurement(here, right and mine.r2 >= 0.9 and other.sse > mine.sse)


def shape(sizes: Sizes) -> Measurement:
    """PPL-1% activation ratios over width / depth, and the line up to a bottleneck."""
    shapes, ratios = [], []
    for hidden, layers in sizes.shapes:
        model = _trained("relu", sizes.shape, sizes, hidden=hidden, intermediate=3 * hidden, layers=layers)
        batches = small_models.text(model, "calibration", 2 * sizes.calibration)
        with in_float32(model) as view:
            search = SharedCett(view, batches, sample=sizes.sample, progress=False)
            ratios.append(search.at(largest_cett(search.rise, 1.0).low).ratio)
        shapes.append(hidden / layers)
    return judged_shape(shapes, ratios)


def judged_shape(shapes: Sequence[float], ratios: Sequence[float]) -> Measurement:
    """Whether the active share rises with width / depth, as the fit of its law and Spearman's correlation say."""
    fit, trend = fit_width_law(shapes, ratios), float(spearmanr(shapes, ratios).statistic)
    listed = ", ".join(f"{shape:.0f}: {ratio:.1%}" for shape, ratio in zip(shapes, ratios, strict=True))
    flat = "none" if fit.bottleneck is None else f"{fit.bottleneck:.0f} (then {fit.plateau:.1%})"
    here = f"{listed}; Spearman {trend:.2f}; slope {fit.slope:.1e} per unit, bottleneck {flat}, R2 {fit.r2:.2f}"
    return Measurement(here, trend >= 0.6 and fit.slope > 0)
