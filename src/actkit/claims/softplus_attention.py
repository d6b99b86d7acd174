"""Softplus attention's claims: as good as softmax at the length of training, and still good at sixteen times that.

What is measured here: language models of 1.1 M parameters (4 layers, width 128, 4 heads, rotary positions of base
10,000) trained from scratch on rows of 64 tokens of the embedded text, with softmax, LSSA, LSSAR (power 15) and softmax
under the same re-weighting. Data, order, weights at the start and settings (AdamW, peak 2e-3) are the same, and nothing
was tuned for an arm; the last weights are measured, as none is chosen by a loss. The train split has 13,179 rows, so
that 600 steps of 32 are 1.5 epochs. Test rows of 1,025 tokens are read from 64 to 1,024 tokens before their last one,
so that the loss of the last 64 predictions is that of the same tokens at every length. Half precision on scores of
magnitude 1e4. And LSSA and LSSAR put into models that were trained with softmax, with no training behind it.

Models so small, trained so briefly, say little about 124 M parameters and 10 B tokens. The paper's passkeys and
benchmarks are not repeated. About 26 minutes on one core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from actkit import zoo
from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.small_models import language_model
from actkit.claims.subject import Subject, spread
from actkit.core.edit.edits import ATTENTION, Configure, temporarily
from actkit.core.measure.quality import measure_quality
from actkit.core.recipe.runner import apply_edits
from actkit.core.train.training import train
from actkit.data import Split, load_data
from actkit.functions.softplus_attention.length_curve import LengthCurve, extrapolation_curve
from actkit.functions.softplus_attention.weights import softplus_attention

RATE, TRAINED = 2e-3, 64
ALL = 13_000  # rows of 64 tokens, about those of the train split
NEAR, LOST, TIMES = 0.10, 0.25, 2.0  # nats, nats, times
DAMAGE = 1.0  # nats
ARMS: dict[str, dict[str, Any] | None] = {
    "softmax": None,
    "LSSA": {"name": "lssa"},
    "LSSAR": {"name": "lssar", "power": 15.0},
    "softmax, re-weighted": {"name": "mapped_attention", "kind": "softmax", "power": 15.0},
}


@dataclass(frozen=True)
class Sizes:
    """How much is trained and read.

    Attributes:
        seeds: of weights and texts.
        layers: of the trained models.
        steps: of training.
        rows: of 64 tokens per step.
        lengths: that are read; the first one is that of training, the last one sixteen times that.
        texts: test rows of each length.
        held_out: rows of 256 test tokens of the models that are not trained.
    """

    seeds: tuple[int, ...] = (0, 1)
    layers: int = 4
    steps: int = 600
    rows: int = 32
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    texts: int = 40
    held_out: int = 8


REAL_SIZES = Sizes()  # of smollm2 and gemma3
SHORT = Statement(
    "LSSA and LSSAR learn as well as softmax at the length of training",
    "validation loss at 1,024: softmax 3.19, LSSA 3.19, LSSAR (power 15) 3.19",
    "trained and read at 64 tokens, mean over seeds: |loss(LSSAR) - loss(softmax)| <= 0.10 nats, and loss(LSSA) - "
    "loss(softmax) <= 0.10",
    SMALL,
)
LONG = Statement(
    "LSSAR holds at sixteen times the length of training, where softmax does not",
    "loss nearly constant to sixteen times; at eight times softmax 6.28, LSSA 5.94, LSSAR 3.32",
    "loss of the last 64 tokens of 1,024, mean over seeds: LSSAR loses at most 0.25 nats against its own loss at 64, "
    "softmax at least twice as much as LSSAR, and LSSAR is below LSSA",
    SMALL,
)
SHARPENED = Statement(
    "Re-weighting alone does not do it: softmax under it is worse than LSSAR at sixteen times",
    "at eight times: softmax with re-weighting (power 15) 7.02, LSSAR 3.32",
    "loss of the last 64 tokens of 1,024, mean over seeds: loss(softmax, re-weighted) > loss(LSSAR)",
    SMALL,
)
FINITE = Statement(
    "Softplus attention is numerically stable in half precision",
    "no exponential of large scores",
    "float16 and bfloat16, queries and keys of magnitude 1e4, 512 tokens, powers none, 3 and 15: every output and "
    "every gradient is finite",
    SYNTHETIC,
)
UNTRAINED = Statement(
    "A model that was trained with softmax is another model behind the change",
    "models are trained with it (the abstract calls the re-weighting alone free of training)",
    "test loss rises by more than 1 nat under lssa and under lssar, untrained; how much is printed as the damage it is",
    "swiglu",
)
STATEMENTS = (SHORT, LONG, SHARPENED, FINITE, UNTRAINED, UNTRAINED.on("smollm2"), UNTRAINED.on("gemma3"))


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    arms = Arms(sizes, progress)
    experiments: list[Experiment] = [
        (SHORT, partial(short, arms)),
        (LONG, partial(long, arms)),
        (SHARPENED, partial(sharpened, arms)),
        (FINITE, finite),
        *((statement, partial(untrained, statement.subject, sizes)) for statement in STATEMENTS[4:]),
    ]
    if subject is None:  # real models from packages of their own are asked for by name
        experiments = [each for each in experiments if each[0].subject not in ("smollm2", "gemma3")]
    return conduct("softplus-attention", experiments, sizes, subject, progress)


# -- trained from scratch ----------------------------------------------------------------------------------------------


@dataclass
class Arms:
    """The trained models' losses by length; each model is trained when it is first needed.

    Attributes:
        sizes: how much is trained and read.
        progress: show bars.
    """

    sizes: Sizes
    progress: bool = False
    _curves: dict[tuple[str, int], LengthCurve] = field(default_factory=dict)

    def model(self, arm: str, seed: int) -> nn.Module:
        """A trained model of an arm."""
        model, sizes = language_model(layers=self.sizes.layers, seed=seed), self.sizes
        function, rows = ARMS[arm], sizes.rows * sizes.steps
        if function is not None:
            apply_edits(model, [Configure(ATTENTION, function)], lambda: "llama")
        train(
            model,
            _text(model, "train", rows if rows < ALL else None, TRAINED, sizes.rows, seed),
            validation=_text(model, "search", sizes.rows, TRAINED, sizes.rows, seed),
            steps=sizes.steps,
            learning_rate=RATE,
            seed=seed,
            evaluate_every=sizes.steps,
            keep="last",
            progress=self.progress,
        )
        return model.eval()

    def curve(self, arm: str, seed: int) -> LengthCurve:
        """The losses of an arm by length, on test text."""
        if (arm, seed) not in self._curves:
            model, lengths = self.model(arm, seed), self.sizes.lengths
            tokens = _tokens(model, self.sizes.texts, lengths[-1] + 1)
            self._curves[arm, seed] = extrapolation_curve(
                model, tokens, lengths, beyond_context=True, resamples=200, progress=False
            )
        return self._curves[arm, seed]

    def losses(self, arm: str, length: int) -> list[float]:
        """Of the last tokens, seed by seed."""
        return [self.curve(arm, seed).at(length).last.value for seed in self.sizes.seeds]

    def means(self, arm: str) -> list[float]:
        """Of each length, the mean over seeds."""
        return [mean(self.losses(arm, length)) for length in self.sizes.lengths]


def _text(model: nn.Module, split: Split, rows: int | None, length: int, batch: int, seed: int = 0) -> Any:
    given: dict[str, Any] = {"sequences": rows, "length": length, "batch_size": batch, "seed": seed, "split": split}
    return load_data(None, model, zoo.tokenizer("swiglu"), beyond_context=True, **given)


def _tokens(model: nn.Module, rows: int, length: int) -> Tensor:
    return torch.cat([batch["input_ids"] for batch in _text(model, "test", rows, length, rows)])


def short(arms: Arms) -> Measurement:
    """Losses at the length of training."""
    length = arms.sizes.lengths[0]
    softmax, lssa, lssar = (arms.losses(arm, length) for arm in ("softmax", "LSSA", "LSSAR"))
    found = {"softmax": softmax, "LSSA": lssa, "LSSAR": lssar}
    said = ", ".join(f"{name} {spread(each, '.3f')}" for name, each in found.items())
    here = f"read at {length}: {said} nats"
    passed = abs(mean(lssar) - mean(softmax)) <= NEAR and mean(lssa) - mean(softmax) <= NEAR
    return Measurement(here, passed)


def long(arms: Arms) -> Measurement:
    """Losses at sixteen times that."""
    softmax, lssa, lssar = (arms.means(arm) for arm in ("softmax", "LSSA", "LSSAR"))
    here = f"read at {', '.join(map(str, arms.sizes.lengths))}: {_courses(arms, ('softmax', 'LSSA', 'LSSAR'))}"
    ours, theirs = lssar[-1] - lssar[0], softmax[-1] - softmax[0]
    here += f"; LSSAR loses {ours:.3f}, softmax {theirs:.3f}"
    return Measurement(here, ours <= LOST and theirs >= TIMES * ours and lssar[-1] < lssa[-1])


def sharpened(arms: Arms) -> Measurement:
    """The same re-weighting behind softmax."""
    names = ("softmax, re-weighted", "LSSAR")
    here = f"read at {', '.join(map(str, arms.sizes.lengths))}: {_courses(arms, names)}"
    weighted, lssar = (arms.means(arm)[-1] for arm in names)
    return Measurement(here, weighted > lssar)


def _courses(arms: Arms, names: Sequence[str]) -> str:
    return "; ".join(f"{name} {', '.join(f'{loss:.2f}' for loss in arms.means(name))}" for name in names)


# -- without training --------------------------------------------------------------------------------------------------


def finite() -> Measurement:
    """Outputs and gradients on large numbers in 16 bits."""
    draw, fine, largest = torch.Generator().manual_seed(0), True, 0.0
    for dtype in (torch.float16, torch.bfloat16):
        for power in (None, 3, 15):
            query, key = (
                (1e4 * torch.randn(1, 4, 512, 64, generator=draw).clamp(-5, 5)).to(dtype).requires_grad_()
                for _ in range(2)
            )
            value = torch.randn(1, 4, 512, 64, generator=draw).to(dtype).requires_grad_()
            out = softplus_attention(query, key, value, is_causal=True, power=power)
            assert isinstance(out, Tensor)
            out.float().square().sum().backward()
            found = [out, query.grad, key.grad, value.grad]
            fine &= all(each is not None and bool(torch.isfinite(each).all()) for each in found)
            largest = max(largest, float(out.detach().float().abs().max()))
    return Measurement(f"{'all' if fine else 'not all'} finite; the largest output is {largest:.2f}", fine)


def untrained(name: str, sizes: Sizes) -> Measurement:
    """Losses of a model that was trained with softmax, before and behind the change."""
    subject = Subject(name, calibration=1, split="calibration", held_out=sizes.held_out)
    before, parts, passed = _loss(subject), [], True
    for function in ("lssa", "lssar"):
        with temporarily(subject.model, [Configure(ATTENTION, {"name": function})]):
            loss = _loss(subject)
        parts.append(f"{function} {loss:.2f}")
        passed &= loss - before > DAMAGE
    return Measurement(f"test loss: softmax {before:.2f}, {', '.join(parts)} nats, untrained", passed)


def _loss(subject: Subject) -> float:
    quality = measure_quality(subject.model, subject.held_out, task="language", resamples=1, progress=False)
    return math.log(quality.metrics["perplexity"].value)
