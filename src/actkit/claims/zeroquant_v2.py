"""ZeroQuant-V2's claims: inputs bear less rounding than weights, and a low rank of the error is worth adding back.

Measured on the SwiGLU, GeGLU and ReLU language models of the zoo (5.2 M parameters each; the study also on a SwiGLU one
of 1.1 M, trained here for 500 steps), in float32, rounded to nearest. d is the perplexity lost, on 16,384 held-out
tokens. Static inputs are calibrated on 64 x 256 training tokens, with 3 seeds; LoRC takes no calibration text. At a
width of 256 a rank of 8 adds 4 to 6 % of parameters, not the 0.3 % of a width of 5,120. No model of 10 M is trained
here; how things change up to 176 B cannot be checked. 13 minutes on one thread of a busy machine. What the paper says
of its trained quantizers (`zeroquant_v2_training.py`) is asked of the SwiGLU model alone: 15 minutes of processor time
more.

On SmolLM2-135M (in float32) its off-grid twin is judged, as its weights were rounded to 4 bits before they were
published; a smaller run (`REAL_SIZES`): 4,096 held-out tokens, one seed, of 8 x 256 for calibration and of random
factors, symmetric grids in the study. Gemma 3 270M likewise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import nn

from actkit import zoo
from actkit.claims import small_models, zeroquant_v2_training
from actkit.claims.outcome import SMALL, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, moved_by, spread
from actkit.core.edit.edits import Replace
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.model.anatomy import anatomy
from actkit.core.train.training import train
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.zeroquant_v2.lorc import Lorc
from actkit.quantization.zeroquant_v2.ptq_study import sensitivity_class
from actkit.zoo.off_grid import off_grid_twin

FAMILIES = ("swiglu", "geglu", "relu")
GROUP, FINER = 64, 32
RANK = 8  # the paper's
COLLAPSED = 10.0  # times the model's own perplexity


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the calibration text of static inputs, and of the random factors.
        calibration: rows of 256 tokens.
        held_out: rows of 256 tokens.
        steps: of the training of the small model, 16 rows of 128 tokens each.
        ranks: of the compensation.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 64
    held_out: int = 64
    steps: int = 500
    ranks: tuple[int, ...] = (0, 1, 2, 4, 8, 16)


REAL_SIZES = Sizes(seeds=(0,), calibration=8, held_out=16, steps=0, ranks=(0, 1, 2, 4, 8))
EXACT = Statement(
    "8-bit weights cost nothing",
    "class 1 on every OPT and BLOOM model, below 0.05 (summary)",
    "all four models, 8-bit rows, with zero points and without: d at most 0.1",
    SMALL,
)
FINE = Statement(
    "4-bit weights lose less in small groups than by rows",
    "blocks of 256 bring models above 13B to class 1 (summary)",
    "all four models, with zero points and without: d with rows is above d with groups of 64",
    SMALL,
)
BOTH = Statement(
    "Rounding inputs to 8 bits beside 4-bit weights does not help",
    "W4A8 is never restored (abstract)",
    "all four models, rows and groups of 64, with zero points and without: d with inputs of 8 bits per token is at "
    "least d with exact inputs - 0.02",
    SMALL,
)
SENSITIVE = Statement(
    "Inputs bear less rounding than weights of as many bits",
    "activation quantization is generally the more sensitive (abstract)",
    "in at least 2 of the 3 families of 5.2 M, with zero points and without: d of 8-bit inputs by one static scale "
    "(mean over the calibration seeds) is above d of 8-bit rows of weights, and d of 6-bit inputs per token above d of "
    "6-bit rows",
    SMALL,
)
LORC = Statement(
    "A low rank of the rounding error, added back, lowers the perplexity, and more of it lowers it more",
    "perplexity falls with the rank, flat above 4 (a figure)",
    "all three families, 3 and 2 bits in groups of 64: perplexity falls strictly over the ranks 0, 1, 2, 4, 8",
    SMALL,
)
GROWS = Statement(
    "The fewer bits, the more a low rank gains",
    "largest at 2 bits (summary)",
    "all three families, groups of 64, rank 8: the perplexity gained at 2 bits is above that at 3, and that above that "
    "at 4",
    SMALL,
)
RECOVERS = Statement(
    "At 3 bits a rank of 8 recovers a good part of the loss",
    "no figure known to us",
    "all three families, groups of 64: rank 8 recovers at least 10 % of the perplexity gap to float32",
    SMALL,
)
INTEGERS = Statement(
    "Factors of 8 bits are as good",
    "no loss (summary)",
    "all three families, 4, 3 and 2 bits in groups of 64, rank 8: 8-bit factors change the perplexity by less than "
    "0.5 %",
    SMALL,
)
CONTROL = Statement(
    "It is the error's own directions that help",
    "not in the paper",
    "all three families, 3 and 2 bits in groups of 64: random factors of rank 8, their product of the same norm as "
    "LoRC's, leave the perplexity no lower than none (mean of 3 draws)",
    SMALL,
)
ON_REAL = (
    replace(
        SENSITIVE,
        condition="off-grid twin, whose float32 logits agree with the model's to 1e-4, symmetric grids: d of 8-bit "
        "inputs by one static scale (mean over the calibration seeds) is above d of 8-bit rows of weights, and d of "
        "6-bit inputs per token above d of 6-bit rows",
    ),
    replace(
        LORC,
        condition="off-grid twin, 3 bits in groups of 64: perplexity falls strictly over the ranks 0, 1, 2, 4, 8, and "
        "rank 8 recovers at least 10 % of the gap to float32",
    ),
    replace(
        GROWS,
        condition="off-grid twin, groups of 64, rank 8: the perplexity gained at 2 bits is above that at 3, and that "
        "above that at 4; and at 2 bits the perplexity with it is at most 10 x that of float32, as of two models that "
        "have collapsed none is better",
    ),
    replace(
        INTEGERS,
        condition="off-grid twin, 3 bits in groups of 64, rank 8: 8-bit factors change the perplexity by less than "
        "0.5 %",
    ),
    replace(
        CONTROL,
        condition="off-grid twin, 3 bits in groups of 64: random factors of rank 8, their product of the same norm as "
        "LoRC's, leave the perplexity no lower than none (mean of the draws)",
    ),
)
TRAINING = zeroquant_v2_training.STATEMENTS
STATEMENTS = (
    *(EXACT, FINE, BOTH, SENSITIVE, LORC, GROWS, RECOVERS, INTEGERS, CONTROL),
    *TRAINING,
    *(each.on(name) for name in REAL for each in ON_REAL),
)

Models = dict[str, Subject]


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject in REAL:
        return _on_a_real_model(subject, progress, sizes or REAL_SIZES)
    sizes = sizes or Sizes()
    rows: dict[str, Any] = {"calibration": sizes.calibration, "held_out": sizes.held_out, "split": "train"}
    families = {name: Subject(name, **rows) for name in FAMILIES if subject in (None, SMALL, name)}
    every = dict(families)
    if subject in (None, SMALL):
        every["swiglu of 1.1 M"] = Subject("swiglu", model=trained(sizes.steps), **rows)
    experiments: list[Experiment] = [
        (EXACT, partial(eight_bit_weights, every)),
        (FINE, partial(groups_beside_rows, every)),
        (BOTH, partial(inputs_beside_weights, every)),
        (SENSITIVE, partial(inputs_or_weights, every, families, sizes)),
        (LORC, partial(falling, families, sizes, (3, 2))),
        (GROWS, partial(growing, families)),
        (RECOVERS, partial(recovered, families)),
        (INTEGERS, partial(integer_factors, families, (4, 3, 2))),
        (CONTROL, partial(random_directions, families, sizes, (3, 2))),
        *zeroquant_v2_training.experiments(families["swiglu"]),
    ]
    return conduct("zeroquant-v2", experiments, sizes, subject, progress)


def _on_a_real_model(name: str, progress: bool, sizes: Sizes) -> Outcome:
    rows: dict[str, Any] = {"calibration": sizes.calibration, "held_out": sizes.held_out, "split": "train"}
    published = Subject(name, model=zoo.load(name), **rows)  # float32: the differences are small
    twin = {"off-grid twin": Subject(name, model=off_grid_twin(published.model), **rows)}
    experiments: list[Experiment] = [
        (ON_REAL[0].on(name), partial(inputs_or_weights_of_a_twin, twin, published, sizes)),
        (ON_REAL[1].on(name), partial(falling_and_recovered, twin, sizes)),
        (ON_REAL[2].on(name), partial(growing, twin)),
        (ON_REAL[3].on(name), partial(integer_factors, twin, (3,))),
        (ON_REAL[4].on(name), partial(random_directions, twin, sizes, (3,))),
    ]
    return conduct("zeroquant-v2", experiments, sizes, name, progress)


def trained(steps: int) -> nn.Module:
    """A Llama with 4 blocks of width 128, trained on the embedded text."""
    model = small_models.language_model()
    text = small_models.text(model, "train", None)
    validation = small_models.text(model, "search", 32)
    train(model, text, validation=validation, steps=steps, learning_rate=2e-3, evaluate_every=steps, progress=False)
    return model.eval()


# -- the study ---------------------------------------------------------------------------------------------------------


def lost(subject: Subject, recipe: Any, seeds: tuple[int, ...] = (0,)) -> float:
    """d: the perplexity that a recipe costs, the mean over calibration seeds."""
    return mean(subject.perplexity(recipe, seed) for seed in seeds) - subject.perplexity()


def rows_of(bits: int, symmetric: bool) -> RoundToNearest:
    """Weights with a scale per row."""
    return RoundToNearest(bits=bits, group_size=-1, symmetric=symmetric)


def groups_of(bits: int, symmetric: bool = False, size: int = GROUP) -> RoundToNearest:
    """Weights with a scale per group."""
    return RoundToNearest(bits=bits, group_size=size, symmetric=symmetric)


def zeros(symmetric: bool) -> str:
    """How a kind of grid is named."""
    return "symmetric" if symmetric else "with zero points"


def eight_bit_weights(models: Models) -> Measurement:
    """d of 8-bit rows."""
    found = {
        (name, symmetric): lost(subject, rows_of(8, symmetric))
        for name, subject in models.items()
        for symmetric in (True, False)
    }
    parts = [f"{name}, {zeros(even)} {d:+.4f} (class {sensitivity_class(d)})" for (name, even), d in found.items()]
    return Measurement("; ".join(parts), all(sensitivity_class(d) == 1 for d in found.values()))


def groups_beside_rows(models: Models) -> Measurement:
    """d of 4-bit rows and groups."""
    parts, holds = [], True
    for name, subject in models.items():
        for symmetric in (True, False):
            rows, groups = lost(subject, rows_of(4, symmetric)), lost(subject, groups_of(4, symmetric))
            classes = f"class {sensitivity_class(rows)} and {sensitivity_class(groups)}"
            parts.append(f"{name}, {zeros(symmetric)} {rows:.3f} and {groups:.3f} ({classes})")
            holds = holds and rows > groups
    return Measurement(f"d by rows and by groups: {'; '.join(parts)}", holds)


def inputs_beside_weights(models: Models) -> Measurement:
    """d of 4-bit weights with inputs as they are and with inputs of 8 bits."""
    differences = {}
    for name, subject in models.items():
        for symmetric in (True, False):
            inputs = RoundInputs(bits=8, symmetric=symmetric)
            for weights in (rows_of(4, symmetric), groups_of(4, symmetric)):
                more = lost(subject, [weights, inputs]) - lost(subject, weights)
                differences[f"{name}, {'rows' if weights.group_size == -1 else 'groups'}, {zeros(symmetric)}"] = more
    here = "; ".join(f"{name} {more:+.4f}" for name, more in differences.items())
    return Measurement(f"more lost with inputs of 8 bits: {here}", min(differences.values()) >= -0.02)


def compared(subject: Subject, sizes: Sizes, symmetric: bool) -> tuple[str, bool]:
    """d of inputs and of weights, at 8 and at 6 bits: in words, and whether inputs lose more at both."""
    static = lost(subject, RoundInputs(bits=8, per="tensor", symmetric=symmetric), sizes.seeds)
    tokens = lost(subject, RoundInputs(bits=6, symmetric=symmetric))
    eight, six = (lost(subject, rows_of(bits, symmetric)) for bits in (8, 6))
    here = (
        f"8 bits {static:.4f} (static inputs) and {eight:.4f} (rows), 6 bits {tokens:.4f} (inputs per token) and "
        f"{six:.4f} (rows)"
    )
    return here, static > eight and tokens > six


def inputs_or_weights(models: Models, judged: Models, sizes: Sizes) -> Measurement:
    """Which of inputs and weights loses more, in each model, and in how many of the families it is the inputs."""
    parts: list[str] = []
    families = 0
    for name, subject in models.items():
        both = {symmetric: compared(subject, sizes, symmetric) for symmetric in (True, False)}
        parts.extend(f"{name}, {zeros(symmetric)}: {here}" for symmetric, (here, _) in both.items())
        families += name in judged and all(holds for _, holds in both.values())
    here = f"inputs lose more in {families} of {len(judged)} families; d: {'; '.join(parts)}"
    return Measurement(here, families >= 2)


def inputs_or_weights_of_a_twin(twin: Models, published: Subject, sizes: Sizes) -> Measurement:
    """The same of one model, on symmetric grids."""
    (subject,) = twin.values()
    moved = moved_by(published, subject)
    here, holds = compared(subject, sizes, True)
    here = f"perplexity {subject.perplexity():.2f}; d: {here}; the twin's logits differ by {moved:.0e}"
    return Measurement(here, holds and moved <= 1e-4)


# -- the compensation --------------------------------------------------------------------------------------------------


def compensated(bits: int, rank: int = RANK, factors: Any = None) -> list[Any]:
    """Groups of weights, and a rank of what they lost. factors: their bits."""
    return [groups_of(bits), *([Lorc(rank=rank, bits=factors)] if rank else [])]


def by_rank(subject: Subject, ranks: tuple[int, ...], bits: int) -> dict[int, float]:
    """The perplexity at each rank."""
    return {rank: subject.perplexity(compensated(bits, rank)) for rank in ranks}


def falling(models: Models, sizes: Sizes, bits: tuple[int, ...]) -> Measurement:
    """Whether more ranks are always better, up to 8."""
    parts, holds = [], True
    for name, subject in models.items():
        for width in bits:
            found = by_rank(subject, sizes.ranks, width)
            up_to = [perplexity for rank, perplexity in found.items() if rank <= RANK]
            holds = holds and all(more < less for less, more in pairwise(up_to))
            steps = ", ".join(f"{rank}: {perplexity:.3f}" for rank, perplexity in found.items())
            parts.append(f"{name}, {width} bits, {steps}")
    return Measurement(f"perplexity by rank: {'; '.join(parts)}", holds)


def gained(subject: Subject, bits: int) -> float:
    """The perplexity that a rank of 8 saves."""
    return subject.perplexity(compensated(bits, 0)) - subject.perplexity(compensated(bits))


def growing(models: Models) -> Measurement:
    """The gain at 2, 3 and 4 bits; of a model that has collapsed none counts."""
    parts, holds = [], True
    for name, subject in models.items():
        two, three, four = (gained(subject, bits) for bits in (2, 3, 4))
        left = subject.perplexity(compensated(2)) / subject.perplexity()
        holds = holds and two > three > four and (subject.name not in REAL or left <= COLLAPSED)
        parts.append(f"{name} {two:.3f}, {three:.3f} and {four:.4f} (at 2 bits {left:.3g} x float32 is left)")
    return Measurement(f"gained at 2, 3 and 4 bits: {'; '.join(parts)}", holds)


def share(subject: Subject) -> float:
    """How much of the gap at 3 bits a rank of 8 recovers."""
    return gained(subject, 3) / lost(subject, compensated(3, 0))


def recovered(models: Models) -> Measurement:
    """How much of the gap a rank of 8 recovers, and what else the same bytes buy."""
    shares = {name: share(subject) for name, subject in models.items()}
    parts = [f"{name} {found:.1%} ({beside_groups(models[name])})" for name, found in shares.items()]
    return Measurement("; ".join(parts), min(shares.values()) >= 0.1)


def beside_groups(subject: Subject) -> str:
    """The perplexity gained at 3 bits for each further percent of bytes, by 8-bit factors and by groups of 32."""
    plain = subject.perplexity(groups_of(3))
    base = stored(subject, groups_of(3))
    gains = {}
    for name, recipe in (("factors of 8 bits", compensated(3, factors=8)), ("groups of 32", groups_of(3, size=FINER))):
        more = 100 * (stored(subject, recipe) / base - 1)
        gain = plain - subject.perplexity(recipe)
        gains[name] = f"{name} gain {gain:.3f} for {more:.1f} % more bytes, {gain / more:.4f} per percent"
    return ", ".join(gains.values())


def stored(subject: Subject, recipe: Any) -> int:
    """Bytes of the linear layers under a recipe."""
    with subject.changed(recipe):
        return sum(layer.weight_bytes for layer in subject.model.modules() if isinstance(layer, ActLinear))


def falling_and_recovered(twin: Models, sizes: Sizes) -> Measurement:
    """Both at 3 bits."""
    (subject,) = twin.values()
    fallen, back = falling(twin, sizes, (3,)), share(subject)
    here = f"{fallen.here}. Rank {RANK} recovers {back:.1%} of the gap to {subject.perplexity():.3f} in float32"
    return Measurement(here, fallen.passed and back >= 0.1)


def integer_factors(models: Models, bits: tuple[int, ...]) -> Measurement:
    """How far 8-bit factors move the perplexity."""
    changes = {}
    for name, subject in models.items():
        for width in bits:
            exact, rounded = (subject.perplexity(compensated(width, factors=each)) for each in (None, 8))
            changes[f"{name}, {width} bits"] = rounded / exact - 1
    here = "; ".join(f"{name} {change:+.3%}" for name, change in changes.items())
    return Measurement(here, max(map(abs, changes.values())) < 0.005)


def random_directions(models: Models, sizes: Sizes, bits: tuple[int, ...]) -> Measurement:
    """The perplexity with random factors beside that with LoRC's and with none."""
    parts, holds = [], True
    for name, subject in models.items():
        for width in bits:
            none, ours = (subject.perplexity(compensated(width, rank)) for rank in (0, RANK))
            drawn = [with_random_factors(subject, width, seed) for seed in sizes.seeds]
            holds = holds and mean(drawn) >= none
            parts.append(f"{name}, {width} bits: none {none:.3f}, random {spread(drawn, '.3f')}, LoRC {ours:.3f}")
    return Measurement("; ".join(parts), holds)


def with_random_factors(subject: Subject, bits: int, seed: int) -> float:
    """The perplexity with factors of random numbers in place of LoRC's, their product scaled to the same norm."""
    generator = torch.Generator().manual_seed(seed)
    with subject.changed(compensated(bits)):
        linears = [linear for block in anatomy(subject.model).blocks for linear in block.linears()]
        edits = [Replace(each.path, at_random(each.module, generator)) for each in linears]
        return subject.edited_perplexity(edits)


def at_random(layer: Any, generator: torch.Generator) -> ActLinear:
    """A copy of a layer with a random correction in place of its own."""
    factors = layer.correction.factors()
    left, right = (torch.randn(each.shape, generator=generator).to(each) for each in factors)
    ratio = (factors[0] @ factors[1]).norm() / (left @ right).norm()
    return ActLinear.of(layer, correction=LowRank(left * ratio, right))
