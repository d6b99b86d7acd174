"""APHQ-ViT's claims: importance saves blocks of few bits, MLPs with ReLU are easier to round, and how it is measured.

On the digits ViT of the zoo (no pretrained vision transformer is at hand): weights and static inputs of 3 and 4 bits,
512 training images, 500 steps per block in batches of 32, accuracy and divergence from the float model on the 338 test
images. All arms have the same search, steps and rates; they differ in what weighs the error. The arms that a claim is
about have 3 seeds at 3 bits (of the images chosen and of all draws), the others one; at 4 bits the latter are left out
and the former have one. The MLPs are fitted in 500 steps. What attention multiplies (`operands: false`), the patch
embedding and the head stay in float, in all arms. On MiniLM GELU becomes ReLU in all six MLPs, fitted on 500 docstrings
in 300 steps of 8, with the importance of 1,024 tokens for its hidden states. ImageNet and COCO, and the speed of a CPU,
cannot be checked here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit import zoo
from actkit.claims.outcome import Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import Subject, spread
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.measure.quality import measure_quality
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.watch.importance import perturbation_importance
from actkit.data.images import digits
from actkit.functions.reconstruct_mlp import ReconstructMlp
from actkit.functions.swap import Swap
from actkit.quantization.aphq_vit.aphq_vit import AphqVit

SEARCHED, MSE, BRECQ, PH, APH, BOTH = "searched", "QDrop (mse)", "BRECQ", "PH", "APH", "ReLU and APH"
JUDGED = (MSE, APH, BOTH)
DIAGONAL = "APH by the Hessian's diagonal"
WEIGHTED = {MSE: "mse", BRECQ: "brecq", PH: "ph", APH: "aph", DIAGONAL: "aph", BOTH: "aph"}


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the images and of all draws.
        images: for calibration.
        steps: per block, and per MLP of the ViT.
        rows: images of a step.
        search_rows: tokens that scales are searched on.
        sentences: for calibration of MiniLM.
        held_out: sentences that are judged.
        sentence_steps: per MLP of MiniLM.
        sentence_rows: of a step there.
        importance_tokens: of MiniLM.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    images: int = 512
    steps: int = 500
    rows: int = 32
    search_rows: int = 256
    sentences: int = 500
    held_out: int = 400
    sentence_steps: int = 300
    sentence_rows: int = 8
    importance_tokens: int = 1024


WEIGHING = Statement(
    "Averaged importance beats the plain error",
    "3-bit weights and inputs, top-1: QDrop (mse) 38.31 / 52.55, BRECQ 54.33 / 63.72, PH 55.14 / 66.12, APH 59.11 / "
    "67.40 (ViT-S / DeiT-S)",
    "3 bits: accuracy at least QDrop's less 0.5 points in all seeds, and the mean divergence from the float model "
    "lower by at least 5 %",
    "vit",
)
RELU = Statement(
    "MLPs with ReLU round as well, and lose less of their hidden units",
    "3-bit weights and inputs, top-1: APH 59.11 / 67.40, with reconstructed MLPs 63.17 / 68.76 (ViT-S / DeiT-S)",
    "3 bits: mean accuracy at least that of APH less 1 point, and the relative squared error of what the second layers "
    "of MLPs read falls by at least 30 %",
    "vit",
)
MEASURING = Statement(
    "A finite difference of gradients gives the sums of the Hessian's rows",
    "eps = 1e-6, in single precision (repository)",
    "float64, outputs of all blocks: it differs from exact products with the Hessian by less than 5 %",
    "vit",
)
FITTING = Statement(
    "MLPs that are fitted to ReLU give back what the swap takes",
    "float top-1 with reconstructed MLPs: ViT-S 80.90 of 81.39, DeiT-T 71.07 of 72.21",
    "1 - cosine to the model's own sentence embeddings is at least 3 times smaller than after the swap alone",
    "minilm",
)
STATEMENTS = (WEIGHING, RELU, MEASURING, FITTING)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    bench = Bench(sizes)
    experiments: list[Experiment] = [
        (WEIGHING, partial(weighing, bench)),
        (RELU, partial(relu, bench)),
        (MEASURING, partial(measuring, bench)),
        (FITTING, partial(fitting, sizes)),
    ]
    return conduct("aphq-vit", experiments, sizes, subject, progress)


# -- digits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What an arm was measured to be.

    Attributes:
        accuracy: on the test images.
        divergence: mean KL of the class probabilities from the float model's.
        hidden: mean relative squared error of what the second layers of MLPs read, by its rounding.
    """

    accuracy: float
    divergence: float
    hidden: float


class Bench:
    """The digits ViT, with the images that it is calibrated and judged on.

    Args:
        sizes: how many.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.exact: nn.Module = zoo.load("vit")
        self.images, self.labels = digits("test")
        self.batch: Any = {"pixel_values": self.images}
        with evaluating(self.exact):
            self.logits = first_tensor(forward(self.exact, self.batch))
        self._judged: dict[tuple[int, str, int], Judged] = {}

    def calibration(self, seed: int) -> list[Any]:
        """The training images of a seed."""
        train, _ = digits("train")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: self.sizes.images]
        return [{"pixel_values": train[chosen]} for chosen in order.split(self.sizes.rows)]

    def judge(self, bits: int, arm: str, seed: int) -> Judged:
        """Round, and measure on the test images; remembered."""
        if (bits, arm, seed) not in self._judged:
            chosen: Any = {"importance": WEIGHTED.get(arm, "mse"), "steps": self.sizes.steps if arm in WEIGHTED else 0}
            mode: Any = "hutchinson" if arm == DIAGONAL else "perturb"
            chosen |= {"rows": self.sizes.rows, "search_rows": self.sizes.search_rows, "seed": seed}
            method = AphqVit(bits=bits, input_bits=bits, operands=False, mode=mode, **chosen)
            fitted = ReconstructMlp(steps=self.sizes.steps, rows=self.sizes.rows, seed=seed)
            recipe = [fitted, method] if arm == BOTH else [method]
            model = copy.deepcopy(self.exact)
            apply(model, recipe, self.calibration(seed), undo="off", progress=False)
            self._judged[bits, arm, seed] = self.measured(model)
        return self._judged[bits, arm, seed]

    def arms(self, *names: str) -> dict[int, dict[str, list[Judged]]]:
        """Judge arms: those that a claim is about with each seed at 3 bits, and at 4 bits with one."""
        seeds, few = self.sizes.seeds, self.sizes.seeds[:1]
        return {
            3: {arm: [self.judge(3, arm, seed) for seed in (seeds if arm in JUDGED else few)] for arm in names},
            4: {arm: [self.judge(4, arm, seed) for seed in few] for arm in names if arm in (SEARCHED, *JUDGED)},
        }

    def measured(self, model: nn.Module) -> Judged:
        """Measure a model that was rounded."""
        errors: dict[str, float] = {}

        def see(path: str) -> Any:
            def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x: Tensor = args[0].double()
                errors[path] = float((module.inputs(x) - x).square().sum() / x.square().sum())

            return hook

        downs = [x.path for block in anatomy(model).blocks for x in block.linears() if x.role == "down"]
        with evaluating(model), hooked(model, before={path: see(path) for path in downs}):
            logits = first_tensor(forward(model, self.batch))
        accuracy = float((logits.argmax(-1) == self.labels).double().mean())
        now, then = F.log_softmax(logits.double(), -1), F.log_softmax(self.logits.double(), -1)
        divergence = float(F.kl_div(now, then, reduction="batchmean", log_target=True))
        return Judged(accuracy, divergence, mean(errors.values()))

    @property
    def accuracy(self) -> float:
        """That of the float model."""
        return float((self.logits.argmax(-1) == self.labels).double().mean())


def weighing(bench: Bench) -> Measurement:
    """All that may weigh the error, at 3 bits and at 4."""
    found = bench.arms(SEARCHED, MSE, BRECQ, PH, APH, DIAGONAL)
    plain, ours = found[3][MSE], found[3][APH]
    held = sum(a.accuracy >= b.accuracy - 0.005 for a, b in zip(ours, plain, strict=True))
    ratio = mean(each.divergence for each in ours) / mean(each.divergence for each in plain)
    lines = "; ".join(f"{bits} bits: {described(each)}" for bits, each in found.items())
    here = (
        f"accuracy (float {bench.accuracy:.1%}) and divergence, {lines}. At 3 bits APH's divergence is {ratio:.2f} x "
        f"QDrop's, its accuracy as claimed in {held} of {len(ours)} seeds"
    )
    return Measurement(here, held == len(ours) and ratio <= 0.95)


def relu(bench: Bench) -> Measurement:
    """APH with and without reconstructed MLPs, at 3 bits and at 4."""
    found = bench.arms(APH, BOTH)
    plain, ours = found[3][APH], found[3][BOTH]
    lost = mean(each.accuracy for each in plain) - mean(each.accuracy for each in ours)
    ratio = mean(each.hidden for each in ours) / mean(each.hidden for each in plain)
    lines = "; ".join(f"{bits} bits: {described(each)}" for bits, each in found.items())
    here = (
        f"accuracy (float {bench.accuracy:.1%}) and divergence, {lines}. At 3 bits the error of what second layers "
        f"read is {mean(each.hidden for each in ours):.4f}, {ratio:.2f} x that with GELU"
    )
    return Measurement(here, lost <= 0.01 and ratio <= 0.7)


def described(found: Mapping[str, list[Judged]]) -> str:
    """All arms in a line."""
    parts = []
    for arm, judged in found.items():
        accuracy = spread([each.accuracy for each in judged], ".1%")
        parts.append(f"{arm} {accuracy} {spread([each.divergence for each in judged], '.3f')}")
    return ", ".join(parts)


def measuring(bench: Bench) -> Measurement:
    """Finite differences in float64 and float32 beside products with the Hessian."""
    images, blocks = bench.calibration(0)[:4], anatomy(bench.exact).blocks

    def found(paths: list[str], **settings: Any) -> list[Tensor]:
        importances = perturbation_importance(bench.exact, paths, images, progress=False, **settings)
        return [importances[path][0].double() for path in paths]

    lines, worst = [], 0.0
    for what, paths in (
        ("blocks", [block.path for block in blocks]),
        ("first layers of MLPs", [x.path for block in blocks for x in block.linears() if x.role == "up"]),
    ):
        exact, wide, narrow = found(paths, mode="hvp"), found(paths), found(paths, dtype=torch.float32)
        diagonal = found(paths, mode="hutchinson")
        off = [float((a - b).norm() / b.norm()) for a, b in zip(wide, exact, strict=True)]
        off_narrow = [float((a - b).norm() / b.norm()) for a, b in zip(narrow, exact, strict=True)]
        alike = [
            float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])
            for a, b in zip(wide, diagonal, strict=True)
        ]
        worst = max(off) if what == "blocks" else worst
        lines.append(
            f"{what}: relative difference {_figures(off)} in float64, {_figures(off_narrow)} in float32; the exact "
            f"sums are {mean(float(each.mean()) for each in exact):.1e}, the diagonal "
            f"{mean(float(each.mean()) for each in diagonal):.1e}, correlation of the float64 difference with that "
            f"{min(alike):.2f} and more"
        )
    return Measurement("; ".join(lines), worst < 0.05)


def _figures(values: list[float]) -> str:
    return ", ".join(f"{value:.1e}" for value in values)


# -- sentences ---------------------------------------------------------------------------------------------------------


def fitting(sizes: Sizes) -> Measurement:
    """The embeddings of MiniLM after the swap alone, and with fitted MLPs."""
    subject = Subject("minilm", calibration=sizes.sentences, split="train", held_out=sizes.held_out)
    places = [path for path in anatomy(subject.model).activations() if "pooler" not in path]
    fitted = ReconstructMlp(
        steps=sizes.sentence_steps,
        rows=sizes.sentence_rows,
        loss="mse",
        importance_tokens=sizes.importance_tokens,
    )
    swapped, ours = (distance(subject, recipe) for recipe in (Swap(where=tuple(places), new="relu"), fitted))
    here = f"1 - cosine {swapped:.4f} after the swap, {ours:.4f} with fitted MLPs: {swapped / ours:.1f} times smaller"
    return Measurement(here, ours * 3 <= swapped)


def distance(subject: Subject, recipe: Any) -> float:
    """1 - mean cosine of the held-out sentences' embeddings to those of the model as it was."""
    model = copy.deepcopy(subject.model)
    apply(model, recipe, subject.calibration(0), undo="off", progress=False)
    quality = measure_quality(
        model, subject.held_out, reference=copy.deepcopy(subject.model), task="embedding", resamples=1, progress=False
    )
    return 1 - quality.metrics["fidelity"].value
