"""R-Sparse's claims: a low-rank copy of the weight serves the small inputs better than dropping them, at equal traffic.

What is measured, at zoo size, with every token sparse: the output error of single layers (all 42 of the SwiGLU language
model, all 36 of MiniLM) over mixes of inputs and rank that read equally many weights; and perplexity on 20,000 held-out
tokens with one mix everywhere and with the mixes that the evolutionary search finds. Thresholds of the layer errors
come from 512 tokens; search and thresholds of the perplexities from 16 rows of 256 tokens, as many sequences as the
paper searches on (the search is smaller: 58 evaluations of the loss at most, of 134). Each of three seeds draws other
texts, and other candidates. Quality at equal bytes beside TEAL, WINA and CATS is in benchmarks/sparsity_quality.py, and
the time of the kernels in benchmarks/sparsity.py: neither is judged here. Averages of tasks on 7B models cannot be
checked.

About 10 minutes on one core. The claims about a language model are tested on SmolLM2-135M as well, under the same
conditions, on the fewer rows and with the smaller search of `REAL_SIZES`: 11 minutes on a busy machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.claims.outcome import Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, spread
from actkit.core.model.anatomy import Linear, Site, anatomy
from actkit.core.recipe.seen import Trial
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Quantiles, Sample
from actkit.sparsity.r_sparse.r_sparse import Factors, RSparse, cached
from actkit.sparsity.r_sparse.rank_search import Evolution
from actkit.sparsity.wina.wina import column_norms

BUDGETS = (0.5, 0.4, 0.3)  # share of the weight that is read
ALPHAS = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        seeds: of texts and candidates.
        calibration: tokens that set the thresholds of single layers.
        tokens: held-out ones whose errors are taken.
        sequences: rows of 256 tokens that the search sees.
        held_out: rows that perplexity is measured on.
        generations: of the search.
        population: of the search.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 512
    tokens: int = 1024
    sequences: int = 16
    held_out: int = 80
    generations: int = 4
    population: int = 16


REAL_SIZES = Sizes(tokens=256, sequences=4, held_out=8, generations=1, population=4)

MIX = (
    "in each of 3 seeds, for at least a quarter of the linear layers the mean over held-out tokens of the relative "
    "output error at budget 0.3 is smallest at alpha < 1, of alpha in {1, .9, .8, .6, .4, .2, 0}"
)
RANK = (
    "in each of 3 seeds, for at least 90 % of the linear layers the mean over held-out tokens of the relative output "
    "error at budget 0.5 is larger at alpha = 0 than at alpha = 1"
)
MIXES = Statement(
    "A layer is best served by inputs and rank together: all linear layers",
    "at 50 %: both 67.50, inputs only 66.25 (task average)",
    MIX,
    "swiglu",
)
RANKS = Statement(
    "The low-rank copy alone is worse than the large inputs alone: all linear layers",
    "at 50 %: inputs only 66.25, rank only 33.05 (task average)",
    RANK,
    "swiglu",
)
SEARCH = Statement(
    "The mixes that the search finds are better than the best mix shared by all layers",
    "the search is compared with the best of a grid; no figure is in the sources that were read",
    "sparsity 0.5, every token sparse, in each of 3 seeds: perplexity(search) <= perplexity(best uniform alpha) on "
    "text that the search did not see",
    "swiglu",
)
ENDS = Statement(
    "The large inputs alone make a better model than the low-rank copy alone",
    "at 50 %: inputs only 66.25, rank only 33.05 (task average)",
    "sparsity 0.5, every token sparse, in each of 3 seeds: perplexity(alpha = 1) <= 0.95 perplexity(alpha = 0)",
    "swiglu",
)
LANGUAGE = (MIXES, RANKS, SEARCH, ENDS)
STATEMENTS = (
    *LANGUAGE,
    MIXES.on("minilm"),
    RANKS.on("minilm"),
    *(statement.on(name) for name in REAL for statement in LANGUAGE),
)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    name = subject if subject in REAL else "swiglu"
    sizes = sizes or (REAL_SIZES if subject in REAL else Sizes())
    rows: dict[str, Any] = {"split": "calibration", "held_out": sizes.held_out}
    language = Subject(name, calibration=sizes.sequences, **rows)
    layers = Subject(name, calibration=max(1, sizes.calibration // 256), model=language.model, **rows)
    experiments: list[Experiment] = [
        *_about_layers(name, _Errors(layers, sizes)),
        (SEARCH.on(name), partial(search, language, sizes)),
        (ENDS.on(name), partial(ends, language, sizes)),
    ]
    if subject not in REAL:
        rows["held_out"] = sizes.tokens // 8  # sentences are short
        experiments += _about_layers(
            "minilm", _Errors(Subject("minilm", calibration=sizes.calibration // 16, **rows), sizes)
        )
    return conduct("r-sparse", experiments, sizes, subject, progress)


# -- layers ------------------------------------------------------------------------------------------------------------


def _about_layers(name: str, errors: _Errors) -> list[Experiment]:
    """The two claims about single layers."""
    return [(MIXES.on(name), partial(mixed_is_best, errors)), (RANKS.on(name), partial(rank_is_worse, errors))]


class _Errors:
    """Relative output errors of all linear layers of a subject; measured once for both statements."""

    def __init__(self, subject: Subject, sizes: Sizes) -> None:
        self.subject, self.sizes = subject, sizes
        self._found: list[dict[float, Tensor]] = []

    def by_seed(self) -> list[dict[float, Tensor]]:
        """For each seed: budget -> errors [layers, alphas]."""
        if not self._found:
            linears = [linear for block in anatomy(self.subject.model).blocks for linear in block.linears()]
            factors = cached(1 - max(BUDGETS))  # the largest ranks; smaller ones are their first columns
            self._found = [self._of_seed(linears, factors, seed) for seed in self.sizes.seeds]
        return self._found

    def _of_seed(self, linears: list[Linear], factors: Factors, seed: int) -> dict[float, Tensor]:
        model, sites = self.subject.model, {linear.path: Site("layer.input", path=linear.path) for linear in linears}
        scores = {sites[linear.path]: Quantiles(weight=column_norms([linear])) for linear in linears}
        quantiles = record(model, scores, self.subject.calibration(seed), progress=False)
        wanted = {site: Sample(self.sizes.tokens, seed) for site in sites.values()}
        inputs = record(model, wanted, self.subject.held_out, progress=False)
        errors: dict[float, list[list[float]]] = {budget: [] for budget in BUDGETS}
        for linear in linears:
            x = inputs[sites[linear.path]].rows.to(linear.weight.dtype)
            for budget, rows in errors.items():
                method = RSparse(sparsity=1 - budget)
                seen = quantiles[sites[linear.path]]
                layers = [method.layer(linear, alpha, seen, factors) for alpha in ALPHAS]
                rows.append([relative_error(layer, linear, x) for layer in layers])
        return {budget: torch.tensor(rows) for budget, rows in errors.items()}


@torch.no_grad()
def relative_error(layer: Any, linear: Linear, x: Tensor) -> float:
    """The mean over rows of x [tokens, in] of ||y - y'|| / ||y||, y = W x without the bias, which is exact in both."""
    y = F.linear(x, linear.weight).float()
    bias = 0 if linear.bias is None else linear.bias
    return float(((layer(x).float() - bias - y).norm(dim=1) / y.norm(dim=1)).mean())


def mixed_is_best(errors: _Errors) -> Measurement:
    """Find which of the seven mixes has the smallest error."""
    found = errors.by_seed()
    parts, least = [], 0.0
    for budget in BUDGETS:
        shares = [float((each[budget].argmin(1) > 0).double().mean()) for each in found]
        gains = [float(1 - (each[budget].min(1).values / each[budget][:, 0]).mean()) for each in found]
        best = [ALPHAS[int(each[budget].mean(0).argmin())] for each in found]
        parts.append(
            f"{budget}: {spread(shares, '.0%')} of the layers; the best mix of each lowers its error by "
            f"{spread(gains, '.1%')} on average, and one mix for all is best at alpha {spread(best)}"
        )
        least = min(shares) if budget == 0.3 else least
    count = len(found[0][BUDGETS[0]])
    here = f"alpha < 1 is best, of {count} layers, at budget {'; '.join(parts)}. {_about(errors)}"
    return Measurement(here, least >= 0.25)


def rank_is_worse(errors: _Errors) -> Measurement:
    """The two ends of the mix at budget 0.5."""
    tables = [each[0.5] for each in errors.by_seed()]
    shares = [float((table[:, -1] > table[:, 0]).double().mean()) for table in tables]
    inputs, rank = ([float(table[:, column].mean()) for table in tables] for column in (0, -1))
    here = (
        f"rank alone is worse in {spread(shares, '.0%')} of {len(tables[0])} layers; mean error {spread(rank, '.3f')}, "
        f"inputs alone {spread(inputs, '.3f')}. {_about(errors)}"
    )
    return Measurement(here, min(shares) >= 0.9)


def _about(errors: _Errors) -> str:
    return f"{len(errors.sizes.seeds)} seeds, {errors.sizes.tokens} held-out tokens each"


# -- the model ---------------------------------------------------------------------------------------------------------


def search(subject: Subject, sizes: Sizes, sparsity: float = 0.5) -> Measurement:
    """Perplexities with the mixes found and with the best uniform one, both chosen on the same calibration text."""
    method = RSparse(sparsity=sparsity, alpha="search", generations=sizes.generations, population=sizes.population)
    found: list[Evolution] = []
    pairs: list[tuple[float, float]] = []
    for seed in sizes.seeds:
        batches = subject.calibration(seed)
        seeded = method.model_copy(update={"seed": seed})
        trial = Trial(anatomy(subject.model), batches)
        found.append(seeded.search(trial, batches, factors=subject.factors, progress=False))
        settings = (found[-1].alphas, found[-1].uniform)
        mixed, uniform = (subject.perplexity(RSparse(sparsity=sparsity, alpha=a), seed) for a in settings)
        pairs.append((mixed, uniform))
    below = [mean(alpha < 1 for alpha in each.alphas.values()) for each in found]
    here = (
        f"perplexity, dense {subject.perplexity():.2f}: best uniform alpha ({spread([e.uniform for e in found])}) "
        f"{spread([pair[1] for pair in pairs])}, search {spread([pair[0] for pair in pairs])}; on the text of the "
        f"search {spread([e.uniform_loss for e in found])} and {spread([e.loss for e in found])}. Mean alpha found "
        f"{spread([mean(e.alphas.values()) for e in found])}, below 1 in {spread(below, '.0%')} of the layers; "
        f"{max(e.evaluations for e in found)} evaluations"
    )
    return Measurement(here, all(mixed <= uniform for mixed, uniform in pairs))


def ends(subject: Subject, sizes: Sizes, sparsity: float = 0.5) -> Measurement:
    """Perplexities with inputs only and with rank only."""
    inputs, rank = (
        [subject.perplexity(RSparse(sparsity=sparsity, alpha=alpha), seed) for seed in sizes.seeds]
        for alpha in (1.0, 0.0)
    )
    here = f"perplexity, dense {subject.perplexity():.2f}: inputs only {spread(inputs)}, rank only {spread(rank)}"
    return Measurement(here, all(a <= 0.95 * b for a, b in zip(inputs, rank)))
