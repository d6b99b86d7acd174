"""Spark Transformer's claims: mean and deviation can replace a sort, and models trained with that lose little.

What is measured here: the counts of statistical top-k on Gaussian rows (and, without judging, on others and on real
pre-activations), its time beside torch.topk; language models of 1.1 M parameters trained from scratch with an ordinary
gated MLP, with statistical top-k on that MLP, and with Spark's, and with ordinary and Spark attention. All arms of a
comparison have equally many weights, the same data, order and recipe (AdamW, peak 2e-3, cosine, bfloat16 autocast,
three seeds for weights and texts); nothing was tuned for an arm. Losses are those of the last weights on the test
split, in float32, per next token.

A step is 1,024 tokens, so that the whole fits one core: 400 steps of 8 x 128 tokens for MLPs, 300 of 4 x 256 for
attention. Models so small, trained so briefly, say little about 2B parameters and 2T tokens. The decoding speed at
the paper's shapes is measured in benchmarks/sparsity.py; benchmarks of Gemma-2 cannot be checked here.

About 10 minutes on one core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from actkit import zoo
from actkit.claims.outcome import SMALL, SYNTHETIC, Measurement, Outcome, Statement, conduct
from actkit.claims.small_models import language_model
from actkit.claims.subject import spread
from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.measure.quality import measure_quality
from actkit.core.model.anatomy import Site
from actkit.core.recipe.runner import apply
from actkit.core.train.training import train
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Density, Sample
from actkit.data import Batches, Split, load_data
from actkit.sparsity.spark.spark_attention import SparkAttention
from actkit.sparsity.spark.sparkify import Sparkify, spark_lm
from actkit.sparsity.spark.statistical_top_k import statistical_topk, threshold

DENSITIES = (0.01, 0.05, 0.08, 0.5)
DELTA = 1e-3  # the share of draws for which the bound may fail
FASTER = 3.0  # times torch.topk with scatter
KEPT = 0.08  # of the neurons
LOSS = 0.08  # nats
RATE = 2e-3


@dataclass(frozen=True)
class Sizes:
    """How much is drawn, timed and trained.

    Attributes:
        seeds: of weights and texts.
        draws: Gaussian rows of `width` per density.
        width: of a row.
        timed: shape of the timed tensor.
        rounds: of timings.
        layers: of the trained models.
        steps: of training, for MLPs.
        attention_steps: of training, for attention.
        rows: of 128 tokens per step; of 256, half as many.
        attended: keys per query.
        held_out: rows of 128 test tokens; of 256, half as many.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    draws: int = 1000
    width: int = 4096
    timed: tuple[int, int] = (1024, 8192)
    rounds: int = 15
    layers: int = 4
    steps: int = 400
    attention_steps: int = 300
    rows: int = 8
    attended: int = 32
    held_out: int = 320


COUNT = Statement(
    "On Gaussian rows about k entries lie above mean + deviation * quantile",
    "| |kept| - k | / d <= 4 sqrt(log(6 / delta) / d) (1 + sqrt(-2 log min(k / d, 1 - k / d))) with probability at "
    "least 1 - delta (quoted from memory)",
    "1000 rows of d = 4096, delta = 1e-3: the bound holds for all of them at k / d = 1, 5, 8 and 50 %, and the mean "
    "count is within 2 % of k at 5 and 8 %. Other distributions are reported, not judged",
    SYNTHETIC,
)
SPEED = Statement(
    "It needs no sort, so it is much cheaper than top-k",
    "sorting slows training more than 10 times on TPUs, statistical top-k hardly",
    "on this CPU, [1024, 8192] in float32, k = 8 %: the median time of torch.topk and scatter is at least 3 times that "
    "of statistical top-k, in interleaved rounds without gradients",
    SYNTHETIC,
)
DENSITY = Statement(
    "A Spark MLP trained for 8 % active neurons has about as many",
    "8 % of the neurons are not 0",
    "in each of 3 seeds, in every layer, 5 to 12 % of the neurons are active on the test split after training",
    SMALL,
)
MLP_TOP_K = Statement(
    "The predictor's split of the inputs improves on top-k in front of an ordinary gated MLP",
    "Spark's MLP is better than top-k with GELU in training loss (figure not verified)",
    "in each of 3 seeds, equal weights and tokens: test loss(Spark MLP, 8 %) <= test loss(statistical top-k 8 % before "
    "the GELU of a gated MLP)",
    SMALL,
)
MLP_DENSE = Statement(
    "A Spark MLP loses little against a dense gated MLP of as many weights",
    "near Gemma-2 2B in training loss",
    "in each of 3 seeds: test loss(Spark MLP, 8 %) <= test loss(SwiGLU) + 0.08 nats",
    SMALL,
)
ATTENTION = Statement(
    "Spark attention loses little against ordinary attention",
    "at most 256 attended tokens, about the same quality",
    "256 tokens, k = 32, in each of 3 seeds: test loss(Spark attention) <= test loss(ordinary attention) + 0.08 nats",
    SMALL,
)
ATTENDED = Statement(
    "Statistical top-k keeps the number of attended tokens near k",
    "at most 256 attended tokens",
    "256 tokens, k = 32, in each of 3 seeds, every query of every head on the test split: never more than 2 k attended",
    SMALL,
)
STATEMENTS = (COUNT, SPEED, DENSITY, MLP_TOP_K, MLP_DENSE, ATTENTION, ATTENDED)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    arms = Arms(sizes, progress)
    experiments = [
        (COUNT, partial(counts, sizes)),
        (SPEED, partial(speed, sizes)),
        (DENSITY, partial(density, arms)),
        (MLP_TOP_K, partial(against_top_k, arms)),
        (MLP_DENSE, partial(against_dense, arms)),
        (ATTENTION, partial(attention, arms)),
        (ATTENDED, partial(attended, arms)),
    ]
    return conduct("spark", experiments, sizes, subject, progress)


# -- the operator ------------------------------------------------------------------------------------------------------


def bound(share: float, width: int) -> float:
    """The largest | |kept| - k | / d of the theorem, with probability 1 - DELTA."""
    return 4 * math.sqrt(math.log(6 / DELTA) / width) * (1 + math.sqrt(-2 * math.log(min(share, 1 - share))))


def kept(x: Tensor, share: float) -> Tensor:
    """How many entries of each row of x [rows, width] are kept, over k: float64 [rows]."""
    k = share * x.shape[-1]
    return (x > threshold(x, k)).sum(-1).double() / k


def counts(sizes: Sizes) -> Measurement:
    """Counts over k of Gaussian rows; of rows from other distributions, and of real gates, for the report."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sizes.draws, sizes.width, generator=generator)
    parts, passed = [], True
    for share in DENSITIES:
        ratio = kept(x, share)
        limit = bound(share, sizes.width)
        inside = int(((ratio - 1).abs() * share <= limit).sum())
        parts.append(
            f"{share:.0%}: {inside} of {sizes.draws} rows (bound {limit:.2f}), mean {float(ratio.mean()):.3f} k"
        )
        passed &= inside == sizes.draws and (share not in (0.05, 0.08) or abs(float(ratio.mean()) - 1) <= 0.02)
    uniform = torch.rand(sizes.draws, sizes.width, generator=generator).clamp(1e-7, 1 - 1e-7)
    others = {
        "Laplace": (uniform - 0.5).sign() * torch.log1p(-2 * (uniform - 0.5).abs()).neg(),
        "log-normal": x.exp(),
        "gates of the SwiGLU zoo model": _real_gates(),
    }
    found = "; ".join(f"{name} {float(kept(rows, KEPT).mean()):.2f} k" for name, rows in others.items())
    return Measurement(f"{'; '.join(parts)}. At {KEPT:.0%}, not judged: {found}", passed)


def _real_gates() -> Tensor:
    """Pre-activations of all blocks of a trained model on test text: [rows, 768]."""
    model = zoo.load("swiglu")
    batches = _text(model, "test", 16, 128, batch=16)
    seen = record(model, {"mlp.preactivation": Sample(256)}, batches, progress=False)
    return torch.cat([sample.rows.float() for sample in seen.values()])


def speed(sizes: Sizes) -> Measurement:
    """Seconds of both, in random order, without gradients."""
    x = torch.randn(*sizes.timed, generator=torch.Generator().manual_seed(0))
    k = round(KEPT * x.shape[-1])

    def sorted_top_k() -> Tensor:
        values, indices = x.topk(k, -1)
        return torch.zeros_like(x).scatter_(-1, indices, values)

    functions: dict[str, Callable[[], Tensor]] = {"sort": sorted_top_k, "ours": lambda: statistical_topk(x, k)}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), Random(0).shuffle
    with torch.no_grad():
        for timed in range(sizes.rounds + 1):  # the first one warms up
            shuffle(order)
            for name in order:
                start = time.perf_counter()
                functions[name]()
                if timed:
                    seconds[name].append(time.perf_counter() - start)
    slow, fast = (median(seconds[name]) for name in ("sort", "ours"))
    ratios = sorted(a / b for a, b in zip(seconds["sort"], seconds["ours"], strict=True))
    here = (
        f"{slow / fast:.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}): {slow * 1e3:.1f} and {fast * 1e3:.1f} ms, "
        f"medians of {sizes.rounds} interleaved rounds, {torch.get_num_threads()} threads"
    )
    return Measurement(here, slow / fast >= FASTER)


# -- trained models ----------------------------------------------------------------------------------------------------


@dataclass
class Arms:
    """The trained models and their test losses; each is trained when it is first needed.

    Attributes:
        sizes: how much is trained.
        progress: show bars.
    """

    sizes: Sizes
    progress: bool = False
    _models: dict[tuple[str, int], nn.Module] = field(default_factory=dict)
    _losses: dict[tuple[str, int], float] = field(default_factory=dict)

    def losses(self, arm: str) -> list[float]:
        """The test loss of an arm in each seed, in nats per token."""
        return [self.loss(arm, seed) for seed in self.sizes.seeds]

    def loss(self, arm: str, seed: int) -> float:
        """Nats per token of an arm on held-out text."""
        if (arm, seed) not in self._losses:
            model = self.model(arm, seed)
            quality = measure_quality(model, self.held_out(arm, model), task="language", resamples=1, progress=False)
            self._losses[arm, seed] = math.log(quality.metrics["perplexity"].value)
        return self._losses[arm, seed]

    def model(self, arm: str, seed: int) -> nn.Module:
        """The trained model of an arm."""
        if (arm, seed) not in self._models:
            model = fresh(arm, seed, self.sizes)
            length, rows, steps = self._shape(arm)
            train(
                model,
                _text(model, "train", rows * steps, length, batch=rows, seed=seed),
                validation=_text(model, "search", rows, length, batch=rows),
                steps=steps,
                learning_rate=RATE,
                mixed_precision="bf16",
                seed=seed,
                evaluate_every=steps,
                keep="last",
                progress=self.progress,
            )
            self._models[arm, seed] = model.eval()
        return self._models[arm, seed]

    def held_out(self, arm: str, model: nn.Module) -> Batches:
        """Test text of the length that the arm was trained on."""
        length = self._shape(arm)[0]
        return _text(model, "test", self.sizes.held_out * 128 // length, length, batch=16)

    def _shape(self, arm: str) -> tuple[int, int, int]:
        """Tokens of a row, rows of a step, steps."""
        sizes = self.sizes
        if "attention" in arm:
            return 256, max(sizes.rows // 2, 1), sizes.attention_steps
        return 128, sizes.rows, sizes.steps


def fresh(arm: str, seed: int, sizes: Sizes) -> nn.Module:
    """A model with random weights: 'SwiGLU', 'top-k', 'Spark', 'ordinary attention' or 'Spark attention'."""
    if arm == "top-k":
        model = language_model("gelu_pytorch_tanh", layers=sizes.layers, seed=seed)
        return apply(model, Sparkify(density=KEPT), undo="off", progress=False).model
    model = language_model(layers=sizes.layers, seed=seed)
    if arm in ("SwiGLU", "ordinary attention"):
        return model
    config: Any = model.config
    torch.manual_seed(seed)
    if arm == "Spark":
        return spark_lm(config, density=KEPT, attended=None)
    return spark_lm(config, density=None, attended=sizes.attended)


def _text(model: nn.Module, split: Split, rows: int, length: int, *, batch: int, seed: int = 0) -> Batches:
    tokenizer = zoo.tokenizer("swiglu")
    return load_data(None, model, tokenizer, sequences=rows, length=length, batch_size=batch, seed=seed, split=split)


def density(arms: Arms) -> Measurement:
    """The share of neurons that are not 0 on the test split, by layer; of the other sparse arm too, not judged."""
    found = {arm: [_densities(arms, arm, seed) for seed in arms.sizes.seeds] for arm in ("Spark", "top-k")}
    parts = []
    for arm, seeds in found.items():
        layers = [mean(values) for values in zip(*seeds, strict=True)]
        every = [value for values in seeds for value in values]
        listed = ", ".join(f"{value:.1%}" for value in layers)
        parts.append(f"{arm}: {listed} (mean over seeds; {min(every):.1%} to {max(every):.1%})")
    passed = all(0.05 <= value <= 0.12 for values in found["Spark"] for value in values)
    return Measurement(f"by layer, {'; '.join(parts)}", passed)


def _densities(arms: Arms, arm: str, seed: int) -> list[float]:
    model = arms.model(arm, seed)
    seen = record(model, {"mlp.hidden": Density()}, arms.held_out(arm, model), progress=False)
    return [seen[Site("mlp.hidden", index)].density for index in range(arms.sizes.layers)]


def against_top_k(arms: Arms) -> Measurement:
    """Test losses of Spark's MLP and of statistical top-k in front of a gated MLP."""
    return _compared(arms, "Spark", "top-k", 0.0)


def against_dense(arms: Arms) -> Measurement:
    """Test losses of Spark's MLP and of SwiGLU."""
    return _compared(arms, "Spark", "SwiGLU", LOSS)


def attention(arms: Arms) -> Measurement:
    """Test losses of Spark attention and of ordinary attention."""
    return _compared(arms, "Spark attention", "ordinary attention", LOSS)


def _compared(arms: Arms, ours: str, theirs: str, margin: float) -> Measurement:
    a, b = arms.losses(ours), arms.losses(theirs)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    listed = ", ".join(f"{value:+.3f}" for value in differences)
    size = sum(parameter.numel() for parameter in arms.model(ours, arms.sizes.seeds[0]).parameters())
    here = f"nats: {ours} {spread(a, '.3f')}, {theirs} {spread(b, '.3f')}; differences {listed}; {size:,} parameters"
    return Measurement(here, all(value <= margin for value in differences))


def attended(arms: Arms) -> Measurement:
    """How many keys the queries of the trained models attend to on the test split."""
    found: list[Tensor] = []
    for seed in arms.sizes.seeds:
        model = arms.model("Spark attention", seed)
        found += _attended(model, arms.held_out("Spark attention", model))
    counts, k = torch.cat(found), arms.sizes.attended
    above = float((counts > 2 * k).double().mean())
    here = (
        f"k = {k}: mean {float(counts.double().mean()):.1f}, 99 % of the queries at most "
        f"{int(counts.sort().values[int(0.99 * (len(counts) - 1))])}, at most {int(counts.max())}; {above:.3%} of "
        f"{len(counts):,} are above {2 * k}"
    )
    return Measurement(here, above == 0)


def _attended(model: nn.Module, batches: Sequence[Any]) -> list[Tensor]:
    """Attended keys of every query of every head, a tensor per layer and batch."""
    found: list[Tensor] = []

    def count(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.append((output[1] != 0).sum(-1).flatten())

    paths = [path for path, module in model.named_modules() if isinstance(module, SparkAttention)]
    with evaluating(model), hooked(model, after=dict.fromkeys(paths, count)):
        for batch in batches:
            forward(model, batch)
    return found
