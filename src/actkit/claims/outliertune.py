"""OutlierTune's claims: at 6 bits, a static scale for each channel loses less than a scale for each token.

Measured on a small pre-norm language model with LayerNorms, biases and GELU (GPT-NeoX, 1.1 M parameters; none is in
the zoo), trained here, and on its outlier twin: behind each norm of a block 4 channels 20 times larger and 4 others
shifted by 5 times their largest value, taken back by the layers that read them. Weights and inputs of 6 or 8 bits;
weights symmetric, a scale per row, in every arm. 64 x 256 training tokens for calibration, 3 seeds, perplexity on
33,000 held-out tokens. Arms: inputs by one scale, by a scale per token, per token after SmoothQuant with strength 0.5,
and OutlierTune without and with centring. Speed on a GPU cannot be checked here.

SmolLM2-135M and Gemma 3 270M (in bf16, as they are stored) have RMSNorms, which take no shift: there OutlierTune is
compared with the two arms per token, on the off-grid twins. These are smaller runs: of SmolLM2 (`REAL_SIZES`) 8 x 256
tokens for calibration and 8,192 held-out ones.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import nn

from actkit.claims import small_models
from actkit.claims.outcome import SMALL, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, moved_by, spread
from actkit.core.edit.edits import apply_edit
from actkit.core.edit.folding import fold
from actkit.core.model.anatomy import Site, anatomy, equalization_sets
from actkit.core.recipe.scalable import kind_of
from actkit.core.train.training import train
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Midpoints, Range
from actkit.quantization.outliertune import Channels, OutlierTune, weight_error
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.smooth import Smooth
from actkit.zoo.off_grid import off_grid_twin

PLANTED = 4  # channels of each kind, behind each norm
FACTOR, SHIFT = 20.0, 5.0
TOKENS, SMOOTHED, UNCENTRED, OURS = "per token", "SmoothQuant, per token", "without centring", "OutlierTune"


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the calibration text.
        calibration: rows of 256 tokens.
        held_out: rows of 256 tokens.
        steps: of the training of the small model, 16 rows of 128 tokens each.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 64
    held_out: int = 130
    steps: int = 1500


REAL_SIZES = Sizes(calibration=8, held_out=32, steps=0)
LARGEST_MODEL = Sizes(seeds=(0,), calibration=8, held_out=32, steps=0)  # of gemma3: a token has 1 MB of logits
CENTRAL = Statement(
    "Static scales for each channel lose less than dynamic ones for each token at 6 bits, and centring helps",
    "OPT-IML at 6 bits is brought to the level of FP16 (abstract; its tables are not known to us)",
    "outlier twin, whose float32 logits agree with the natural model's to 1e-4, 6-bit weights and inputs: the mean "
    "perplexity gap of OutlierTune is at most 0.5 x that of per-token inputs and at most 0.9 x that of SmoothQuant; "
    "with centring it is smaller than without in 3 of 3 calibration seeds",
    SMALL,
)
NATURAL = Statement(
    "8 bits cost next to nothing",
    "W8A8 without loss over several tasks (abstract)",
    "natural model, 8-bit weights and inputs: the mean perplexity with OutlierTune is at most 1.01 x that of float32",
    SMALL,
)
ERROR = Statement(
    "Centring makes the scaled weights easier to round",
    "named as its purpose, no figure known to us",
    "outlier twin, 6 bits: the mean over the layers behind norms of the relative error of the rounded rows of W "
    "diag(s) is smaller with centring than without",
    SMALL,
)
REAL_MODEL = Statement(
    "Static scales for each channel lose less than dynamic ones for each token at 6 bits",
    "LLaMA at 6 bits is close to FP16 (its tables are not known to us)",
    "off-grid twin, 6-bit weights and inputs: the mean perplexity gap of OutlierTune is at most 0.5 x that of "
    "per-token inputs and at most 0.9 x that of SmoothQuant",
    REAL[0],
)
STATEMENTS = (CENTRAL, NATURAL, ERROR, *(REAL_MODEL.on(name) for name in REAL))


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject in REAL:
        return _on_a_real_model(subject, progress, sizes or real_sizes(subject))
    sizes = sizes or Sizes()
    rows: dict[str, Any] = {"calibration": sizes.calibration, "held_out": sizes.held_out, "split": "train"}
    natural = Subject("swiglu", model=trained(sizes.steps), **rows)
    twin = Subject("swiglu", model=planted(natural), **rows)
    experiments: list[Experiment] = [
        (CENTRAL, partial(on_the_twin, twin, natural, sizes)),
        (NATURAL, partial(on_the_natural_model, natural, sizes)),
        (ERROR, partial(errors_of_weights, twin, sizes)),
    ]
    return conduct("outliertune", experiments, sizes, subject, progress)


def real_sizes(subject: str) -> Sizes:
    """The sizes of a run on a real model."""
    return LARGEST_MODEL if subject == "gemma3" else REAL_SIZES


def _on_a_real_model(name: str, progress: bool, sizes: Sizes) -> Outcome:
    rows: dict[str, Any] = {"calibration": sizes.calibration, "held_out": sizes.held_out, "split": "train"}
    twin = Subject(name, model=off_grid_twin(Subject(name, **rows).model), **rows)
    only: Experiment = (REAL_MODEL.on(name), partial(on_a_real_model, twin, sizes))
    return conduct("outliertune", [only], sizes, name, progress)


# -- the models --------------------------------------------------------------------------------------------------------


def trained(steps: int) -> nn.Module:
    """A GPT-NeoX with 4 blocks of width 128, attention before the MLP, trained on the embedded text."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        use_parallel_residual=False,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = GPTNeoXForCausalLM(config)
    text = small_models.text(model, "train", None)
    validation = small_models.text(model, "search", 32)
    train(model, text, validation=validation, steps=steps, learning_rate=2e-3, evaluate_every=steps, progress=False)
    return model.eval()


@torch.no_grad()
def planted(natural: Subject, seed: int = 0) -> nn.Module:
    """Copy a model with large and with shifted channels behind each norm of a block; the function stays."""
    twin = copy.deepcopy(natural.model)
    view = anatomy(twin)
    blocks = [view.block(block.index) for block in view.blocks]
    sites = {
        linear.path: inputs.site for block in blocks for inputs in block.linear_inputs() for linear in inputs.linears
    }
    groups = [(block, group) for block in blocks for group in equalization_sets(block) if kind_of(group) == "norm"]
    wanted = {sites[group.consumers[0].path]: Range() for _, group in groups}
    seen = record(natural.model, wanted, natural.calibration(0), progress=False)
    generator = torch.Generator().manual_seed(seed)
    for block, group in groups:
        values = seen[sites[group.consumers[0].path]]
        chosen = torch.randperm(len(values.low), generator=generator)
        scale, shift = torch.ones_like(values.low), torch.zeros_like(values.low)
        scale[chosen[:PLANTED]] = 1 / FACTOR
        moved = chosen[PLANTED : 2 * PLANTED]
        shift[moved] = -SHIFT * torch.maximum(-values.low, values.high)[moved]
        for edit in fold(block, group, scale, shift):
            apply_edit(twin, edit)
    return twin


# -- the method --------------------------------------------------------------------------------------------------------


def recipes(bits: int) -> dict[str, Any]:
    """The arms, with weights rounded alike."""
    weights = RoundToNearest(bits=bits, group_size=-1, symmetric=True)
    return {
        "by one scale": [weights, RoundInputs(bits=bits, per="tensor")],
        TOKENS: [weights, RoundInputs(bits=bits)],
        SMOOTHED: [Smooth(), weights, RoundInputs(bits=bits)],
        UNCENTRED: OutlierTune(bits=bits, symmetrize=False),
        OURS: OutlierTune(bits=bits),
    }


def arms(subject: Subject, sizes: Sizes, bits: int, names: Sequence[str] | None = None) -> dict[str, list[float]]:
    """The perplexities of the arms, one per calibration seed (per-token inputs take none)."""
    chosen = {name: recipe for name, recipe in recipes(bits).items() if names is None or name in names}
    return {
        name: [subject.perplexity(recipe, seed) for seed in (sizes.seeds[:1] if name == TOKENS else sizes.seeds)]
        for name, recipe in chosen.items()
    }


def described(subject: Subject, found: dict[str, list[float]], bits: int) -> str:
    """All arms in a line."""
    parts = ", ".join(f"{name} {spread(values)}" for name, values in found.items())
    return f"perplexity {subject.perplexity():.2f}; {bits} bits: {parts}"


def on_the_twin(twin: Subject, natural: Subject, sizes: Sizes) -> Measurement:
    """The gaps on the twin, the natural model beside it."""
    moved = moved_by(natural, twin)
    found, beside = arms(twin, sizes, 6), arms(natural, sizes, 6)
    token, smoothed = gap(twin, found, OURS, TOKENS), gap(twin, found, OURS, SMOOTHED)
    better = sum(ours < without for ours, without in zip(found[OURS], found[UNCENTRED], strict=True))
    here = (
        f"twin: {described(twin, found, 6)}; natural: {described(natural, beside, 6)}; the twin's gap is {token:.2f} x "
        f"that per token and {smoothed:.2f} x SmoothQuant's; smaller with centring in {better} of {len(sizes.seeds)} "
        f"seeds; logits differ by {moved:.0e}"
    )
    return Measurement(here, moved <= 1e-4 and token <= 0.5 and smoothed <= 0.9 and better == len(sizes.seeds))


def gap(subject: Subject, found: dict[str, list[float]], ours: str, other: str) -> float:
    """The mean perplexity gap of an arm over that of another."""
    exact = subject.perplexity()
    return (mean(found[ours]) - exact) / (mean(found[other]) - exact)


def on_the_natural_model(natural: Subject, sizes: Sizes) -> Measurement:
    """8 bits on the model as it was trained."""
    found = arms(natural, sizes, 8)
    ratio = mean(found[OURS]) / natural.perplexity()
    return Measurement(f"{described(natural, found, 8)}; {ratio:.4f} x float32", ratio <= 1.01)


def errors_of_weights(twin: Subject, sizes: Sizes) -> Measurement:
    """The error of the scaled weights, with and without centring, per calibration seed."""
    view = anatomy(twin.model)
    inputs = [each for block in view.blocks for each in view.block(block.index).linear_inputs()]
    inputs = [each for each in inputs if each.linears[0].role not in ("output", "down")]
    ratios, shown = [], []
    for seed in sizes.seeds:
        wanted: dict[Site, Any] = {each.site: [Range(), Midpoints()] for each in inputs}
        seen = record(twin.model, wanted, twin.calibration(seed), progress=False)
        errors = [
            mean(
                weight_error(linear.weight.detach(), Channels.of([seen[each.site]], centred, 6).scale, 6)
                for each in inputs
                for linear in each.linears
            )
            for centred in (True, False)
        ]
        ratios.append(errors[0] / errors[1])
        shown.append(f"{errors[0]:.4f} instead of {errors[1]:.4f}")
    here = f"relative error {'; '.join(shown)} (by seed); ratio {spread(ratios)}"
    return Measurement(here, max(ratios) < 1)


def on_a_real_model(twin: Subject, sizes: Sizes) -> Measurement:
    """The arms per token and OutlierTune, on a model with outliers of its own."""
    found = arms(twin, sizes, 6, (TOKENS, SMOOTHED, OURS))
    token, smoothed = gap(twin, found, OURS, TOKENS), gap(twin, found, OURS, SMOOTHED)
    here = f"{described(twin, found, 6)}; the gap is {token:.2f} x that per token and {smoothed:.2f} x SmoothQuant's"
    return Measurement(here, token <= 0.5 and smoothed <= 0.9)
