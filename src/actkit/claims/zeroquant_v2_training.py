"""ZeroQuant-V2's claims on ZQ-Local and ZQ-Global, asked of one model: what training the rounded weights gains.

Part of `zeroquant_v2.py`, and a smaller run than its others. Of the paper's abstract is that no method restores a model
at 4 bits, and that LoRC helps beyond its other methods; that gptq is the best for weights alone and block training
beside rounded inputs, and that both beat rounding to nearest, is from memory of its tables. All methods read the
calibration text of the first seed. Each block is trained for `STEPS` steps of 4 rows at each of `RATES`, of which it
keeps the best, or none; the paper's are some hundred to 2,000 steps, from memory. A rank is added to a model that is
trained already, as in the paper.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from actkit.claims.outcome import Experiment, Measurement, Statement
from actkit.claims.subject import Subject
from actkit.core.edit.edits import Replace, get_module
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.low_rank import decompose
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.transform import Transform
from actkit.quantization.gptq import Gptq
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.zeroquant_v2.ptq_study import sensitivity_class
from actkit.quantization.zeroquant_v2.zeroquant import ZeroQuant

STEPS, RATES = 60, (1e-3, 1e-4)
GROUP, RANK = 64, 8
NEAREST, GPTQ, LOCAL, GLOBAL = "nearest", "gptq", "ZQ-Local", "ZQ-Global"
CASES = {"4 bits": (4, None), "4 bits, inputs of 8": (4, 8), "3 bits": (3, None), "2 bits": (2, None)}
ROWS = ("4 bits", "4 bits, inputs of 8")
UNRESTORED = Statement(
    "No method restores the model at 4-bit weights, with 8-bit inputs or without",
    "none does, W4A16 and W4A8 (abstract)",
    "4-bit rows with zero points, inputs as they are and of 8 bits per token: d of rounding to nearest, of gptq, of "
    "ZQ-Local and of ZQ-Global is above 0.1 (class 2 or 3)",
    "swiglu",
)
TRAINED = Statement(
    "Weights trained through their rounding lose less than weights rounded to nearest",
    "so in its tables (from memory)",
    "4-bit rows with zero points, inputs as they are and of 8 bits per token: d of ZQ-Local and d of ZQ-Global are "
    "below d of rounding to nearest",
    "swiglu",
)
BEST = Statement(
    "With inputs as they are gptq loses least, with 8-bit inputs block training does",
    "a conclusion from its tables (from memory)",
    "4-bit rows with zero points: d of gptq is at most the smaller of d of ZQ-Local and d of ZQ-Global with inputs as "
    "they are, and above it with inputs of 8 bits per token",
    "swiglu",
)
COMPENSATED = Statement(
    "A low rank of what is left of the error helps trained weights too",
    "LoRC on ZQ-Global in groups at W4A16, W4A8 and fewer bits: it helps (abstract)",
    "groups of 64 with zero points, ZQ-Global: rank 8 lowers the perplexity at 4, 3 and 2 bits with inputs as they "
    "are, and at 4 bits with inputs of 8 bits per token",
    "swiglu",
)
STATEMENTS = (UNRESTORED, TRAINED, BEST, COMPENSATED)


def experiments(subject: Subject) -> list[Experiment]:
    """The experiments on one model."""
    tried = (unrestored, trained, best, compensated)
    return [(each, partial(measure, subject)) for each, measure in zip(STATEMENTS, tried, strict=True)]


def recipe(method: str, bits: int, inputs: int | None, group: int = -1) -> list[Transform]:
    """A recipe of a method: weights with zero points, and inputs per token."""
    grid: dict[str, Any] = {"bits": bits, "group_size": group, "symmetric": False}
    if method in (LOCAL, GLOBAL):
        reads: Any = "local" if method == LOCAL else "global"
        return [ZeroQuant(inputs=reads, input_bits=inputs, steps=STEPS, rates=RATES, **grid)]
    rounded = [] if inputs is None else [RoundInputs(bits=inputs, symmetric=False)]
    return [RoundToNearest(**grid) if method == NEAREST else Gptq(**grid), *rounded]


def lost(subject: Subject) -> dict[str, dict[str, float]]:
    """d of each method by rows, with inputs as they are and rounded."""
    exact = subject.perplexity()
    methods = (NEAREST, GPTQ, LOCAL, GLOBAL)
    return {
        case: {method: subject.perplexity(recipe(method, *CASES[case])) - exact for method in methods} for case in ROWS
    }


def shown(found: dict[str, dict[str, float]]) -> str:
    """All of them in a line."""
    parts = []
    for case, losses in found.items():
        each = ", ".join(f"{method} {d:.4f} (class {sensitivity_class(d)})" for method, d in losses.items())
        parts.append(f"{case}: {each}")
    return f"d, {'; '.join(parts)}"


def unrestored(subject: Subject) -> Measurement:
    """Whether each method loses something."""
    found = lost(subject)
    return Measurement(shown(found), all(sensitivity_class(d) > 1 for each in found.values() for d in each.values()))


def trained(subject: Subject) -> Measurement:
    """Block training beside rounding to nearest."""
    found = lost(subject)
    return Measurement(shown(found), all(max(each[LOCAL], each[GLOBAL]) < each[NEAREST] for each in found.values()))


def best(subject: Subject) -> Measurement:
    """Block training beside gptq."""
    found = lost(subject)
    alone, beside = ((each[GPTQ], min(each[LOCAL], each[GLOBAL])) for each in found.values())
    return Measurement(shown(found), alone[0] <= alone[1] and beside[0] > beside[1])


def compensated(subject: Subject) -> Measurement:
    """The perplexity in groups without a rank and with it: of ZQ-Global, and of what is not trained beside it."""
    parts, holds = [], True
    for case, (bits, inputs) in CASES.items():
        found = {method: with_rank(subject, recipe(method, bits, inputs, GROUP)) for method in (NEAREST, GPTQ, GLOBAL)}
        holds = holds and found[GLOBAL][1] < found[GLOBAL][0]
        each = ", ".join(f"{method} {without:.3f} and {ranked:.3f}" for method, (without, ranked) in found.items())
        parts.append(f"{case}: {each}")
    here = f"perplexity {subject.perplexity():.3f}, without and with rank {RANK}, {'; '.join(parts)}"
    return Measurement(here, holds)


def with_rank(subject: Subject, chosen: list[Transform]) -> tuple[float, float]:
    """The perplexity under a recipe, and that with a rank of the error added to each of its layers."""
    before = {
        linear.path: linear.weight.detach().clone()
        for block in anatomy(subject.model).blocks
        for linear in block.linears()
    }
    with subject.changed(chosen):
        edits = []
        for path, weight in before.items():
            layer: Any = get_module(subject.model, path)
            left, right = decompose(weight - layer.dequantized(), RANK, "gram").factors()
            factors = LowRank(left.to(weight.dtype).contiguous(), right.to(weight.dtype).contiguous())
            edits.append(Replace(path, ActLinear.of(layer, correction=factors)))
        return subject.edited_perplexity([]), subject.edited_perplexity(edits)
