"""S2A's claims: a quarter of the memory of full training, gradients that codes hardly change, and LoRA's accuracy.

Two models. MiniLM (22 M parameters, a new classifier) learns which of ten packages of Python's library a docstring
belongs to: rows of 24 tokens, batches of 16, 60 steps. The zoo's digits ViT learns digits that are inverted and turned
by 90 degrees: 320 images, 30 epochs of batches of 64. Arms: full training; LoRA of rank 8 by peft on all linear layers
of the blocks, and the classifier; biases and the classifier; S2A: these, a side path of an eighth of the width in each
block, and 4-bit codes. AdamW and a cosine, 3 seeds, no dropout. Each arm's rate is the best of three by the validation
loss of its first seed; accuracies are of the test split, which neither training nor validation saw.

Saved bytes are what autograd keeps in one forward pass (`core/measure/saved_tensors.py`: parameters, gradients and the
optimizer's state are not in it), of 16 rows of 128 tokens for MiniLM, of 64 images for the ViT; without dropout and,
for MiniLM, as configured (10 %). Gradients are compared on 10 batches, before the training and after it, over all
parameters that S2A trains.

The trainings are short, and both tasks small: the data sets of the paper are not checkable here, nor is its figure for
the accuracy of full training, beside which ours is reported. About 7 minutes of one core.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from actkit import zoo
from actkit.claims.digit_arms import DigitArms, Images, accuracy, in_batches
from actkit.claims.outcome import Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.measure.saved_tensors import saved_tensors
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.train.choice import trained_parameters
from actkit.core.train.rules import attached
from actkit.core.train.training import train
from actkit.data import Split, digits
from actkit.data.text import documents
from actkit.finetuning.s2a.s2a import S2A
from actkit.finetuning.s2a.side_path import AddSidePath

FULL, LORA, BIAS, OURS = ARMS = ("full training", "LoRA", "biases", "S2A")
RULES: dict[str, tuple[S2A, ...]] = {
    FULL: (),
    LORA: (S2A(bias=False, head=("*lora_*", "classifier.*"), coded=()),),
    BIAS: (S2A(coded=()),),
    OURS: (S2A(),),
}
RATES = {arm: (1e-4, 3e-4, 1e-3) if arm == FULL else (1e-3, 3e-3, 1e-2) for arm in ARMS}
DIGIT_RATES = {arm: (1e-3, 3e-3, 1e-2) if arm == FULL else (3e-3, 1e-2, 3e-2) for arm in ARMS}
TOPICS, REDUCTION, RANK = 10, 8, 8
OF_FULL, OF_LORA = 0.25, 0.4  # of the bytes
ALIKE, COARSE = 0.99, 0.95  # cosines at 4 and 2 bits
LOST, TRAINED = 0.015, 0.015  # of the accuracy; of the parameters
NAMES = {"minilm": "MiniLM", "vit": "the digits ViT"}


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured.

    Attributes:
        seeds: of the order, of LoRA's A and of side paths.
        steps: of a training of MiniLM.
        rows: of a batch of MiniLM.
        length: tokens of a row in the training.
        measured: tokens of a row of which bytes are counted.
        held_out: docstrings that accuracies are of.
        epochs: of the ViT.
        images: that it is trained on.
        batches: on which gradients are compared.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 60
    rows: int = 16
    length: int = 24
    measured: int = 128
    held_out: int = 312
    epochs: int = 30
    images: int = 320
    batches: int = 10


SMALLER = Statement(
    "S2A keeps a fraction of the activations",
    "75 % less memory, 4.2 x on average (abstract)",
    "saved bytes of a forward pass: at most 0.25 x full training and at most 0.4 x LoRA",
    "minilm",
)
FAITHFUL = Statement(
    "Its codes hardly change the gradient",
    "not reported in what was read",
    "cosine with the exact gradient over all trained parameters, mean over 10 batches: at least 0.99 with 4 bits and "
    "0.95 with 2, before the training and after it",
    "minilm",
)
ACCURATE = Statement(
    "It reaches the accuracy of LoRA",
    "98.7 % of the accuracy of full training (abstract)",
    "mean test accuracy over 3 seeds >= LoRA's - 1.5 points",
    "minilm",
)
FEW = Statement(
    "It trains few parameters",
    "0.9 % of the parameters (abstract)",
    "trainable parameters, the classifier's included: at most 1.5 % of the model",
    "minilm",
)
OF_EACH = (SMALLER, FAITHFUL, ACCURATE, FEW)
STATEMENTS = (*OF_EACH, *(each.on("vit") for each in OF_EACH))


def run(sizes: Sizes | None = None, subject: str | None = None, progress: bool = True) -> Outcome:
    """Run the claims.

    Args:
        sizes: how much.
        subject: only the claims on it; None for all.
        progress: show bars.
    """
    sizes = sizes or Sizes()
    experiments: list[Experiment] = []
    for name, kind in (("minilm", Docstrings), ("vit", Digits)):
        if subject in (None, name):
            case = kind(sizes, progress)
            for statement, measure in zip(OF_EACH, (smaller, faithful, accurate, few), strict=True):
                experiments.append((statement.on(name), partial(measure, case)))
    return conduct("s2a", experiments, sizes, subject, progress)


# -- the two cases -----------------------------------------------------------------------------------------------------


class Docstrings:
    """MiniLM on docstrings.

    Args:
        sizes: how much.
        progress: show bars.
    """

    name = "minilm"

    def __init__(self, sizes: Sizes, progress: bool = False) -> None:
        self.sizes, self.progress = sizes, progress
        self._trained: dict[tuple[str, int, float], tuple[nn.Module, float]] = {}

    def plain(self, dropout: bool = False) -> nn.Module:
        """MiniLM with a new classifier."""
        from transformers import BertForSequenceClassification

        shares: dict[str, Any] = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        with own_random_numbers(torch.device("cpu"), 0):
            return BertForSequenceClassification.from_pretrained(
                zoo.path("minilm"), num_labels=TOPICS, local_files_only=True, **shares
            )

    def large(self) -> Any:
        """A batch of which bytes are counted."""
        return self._batches("train", 1, self.sizes.measured, full=True)[0]

    def batches(self) -> Sequence[Any]:
        """Batches on which gradients are compared."""
        return self._batches("calibration", self.sizes.batches, self.sizes.length)

    def accuracies(self, arm: str) -> list[float]:
        """Of the test split, in each seed."""
        count = -(-self.sizes.held_out // self.sizes.rows)
        test = self._batches("test", count, self.sizes.length)
        return [accuracy(self.trained(arm, seed), test) for seed in self.sizes.seeds]

    def trained(self, arm: str, seed: int) -> nn.Module:
        """The trained model of an arm, at its rate."""
        return self._model(arm, seed, self.rate(arm))[0]

    def rate(self, arm: str) -> float:
        """The rate of an arm, by the validation loss of the first seed."""
        first = self.sizes.seeds[0]
        best = min(RATES[arm], key=lambda rate: self._model(arm, first, rate)[1])
        for rate in RATES[arm]:
            if rate != best:  # only its loss is needed again
                self._trained[arm, first, rate] = nn.Identity(), self._trained[arm, first, rate][1]
        return best

    def _model(self, arm: str, seed: int, rate: float) -> tuple[nn.Module, float]:
        if (arm, seed, rate) not in self._trained:
            model = arranged(self.plain(), arm, seed)
            trained = train(
                model,
                self._batches("train", self.sizes.steps, self.sizes.length),
                validation=self._batches("search", 8, self.sizes.length),
                steps=self.sizes.steps,
                learning_rate=rate,
                rules=RULES[arm],
                seed=seed,
                evaluate_every=self.sizes.steps,
                keep="last",
                progress=self.progress,
            )
            model.zero_grad()
            self._trained[arm, seed, rate] = model.eval(), trained.validation
        return self._trained[arm, seed, rate]

    def _batches(self, split: Split, count: int, length: int, full: bool = False) -> list[dict[str, Tensor]]:
        """Docstrings with the number of their package; full: rows without padding."""
        tokenizer, rows = zoo.tokenizer("minilm"), self.sizes.rows
        texts = docstrings(split)[: count * rows]
        if full:
            texts = [(" ".join([text] * length), label) for text, label in texts]
        found = []
        for start in range(0, len(texts), rows):
            words, labels = zip(*texts[start : start + rows], strict=True)
            read = tokenizer(list(words), truncation=True, max_length=length, padding="max_length", return_tensors="pt")
            found.append(
                {
                    "input_ids": read["input_ids"],
                    "attention_mask": read["attention_mask"],
                    "labels": torch.tensor(labels),
                }
            )
        return found


class Digits:
    """The digits ViT on inverted and turned digits.

    Args:
        sizes: how much.
        progress: show bars.
    """

    name = "vit"

    def __init__(self, sizes: Sizes, progress: bool = False) -> None:
        self.sizes = sizes
        self._arms = {
            arm: DigitArms(
                lambda arm, seed: arranged(self.plain(), arm, seed),
                seeds=sizes.seeds,
                rates=DIGIT_RATES[arm],
                epochs=sizes.epochs,
                images=turned,
                training=sizes.images,
                rules=lambda arm: RULES[arm],
                progress=progress,
            )
            for arm in ARMS
        }

    def plain(self, dropout: bool = False) -> nn.Module:
        """The zoo's ViT, which has no dropout."""
        return zoo.load("vit")

    def large(self) -> Any:
        """A batch of which bytes are counted."""
        return in_batches(turned("train"))[0]

    def batches(self) -> Sequence[Any]:
        """Batches on which gradients are compared."""
        return in_batches(turned("train"))[: self.sizes.batches]

    def accuracies(self, arm: str) -> list[float]:
        """Of the test split, in each seed."""
        return self._arms[arm].accuracies(arm)

    def trained(self, arm: str, seed: int) -> nn.Module:
        """The trained model of an arm, at its rate."""
        return self._arms[arm].fitted(arm, seed).model

    def rate(self, arm: str) -> float:
        """The rate of an arm, by the validation loss of the first seed."""
        return self._arms[arm].rate(arm)


Case = Docstrings | Digits


def turned(split: Split) -> Images:
    """Digits that are inverted and turned by 90 degrees."""
    pixels, labels = digits(split)
    return torch.rot90(1 - pixels, 1, (2, 3)), labels


@cache
def docstrings(split: Split) -> list[tuple[str, int]]:
    """Docstrings of the ten packages with the most of them, with the number of the package, in a fixed random order."""
    counts = Counter(each.name.partition(".")[0] for each in documents("train") if not each.name.startswith("topics."))
    packages = [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TOPICS]]
    found = [
        (each.text, packages.index(package))
        for each in documents(split)
        if (package := each.name.partition(".")[0]) in packages
    ]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[place] for place in order]


def arranged(model: nn.Module, arm: str, seed: int) -> nn.Module:
    """The model of an arm before its training: with LoRA beside its layers, or side paths beside its blocks."""
    if arm == OURS:
        apply(model, [AddSidePath(reduction=REDUCTION, seed=seed)], progress=False)
    if arm == LORA:
        from peft import LoraConfig, inject_adapter_in_model

        paths = [linear.path for block in anatomy(model).blocks for linear in block.linears()]
        with own_random_numbers(torch.device("cpu"), seed):
            inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=paths), model)
    return model


# -- what is measured --------------------------------------------------------------------------------------------------


def smaller(case: Case) -> Measurement:
    """Saved bytes of all arms."""
    parts, fine = [], []
    for dropout in (False, True) if case.name == "minilm" else (False,):
        found = {arm: saved(arranged(case.plain(dropout), arm, 0), RULES[arm], case.large()) for arm in ARMS}
        of_full, of_lora = found[OURS] / found[FULL], found[OURS] / found[LORA]
        fine.append(of_full <= OF_FULL and of_lora <= OF_LORA)
        sizes = ", ".join(f"{arm} {size / 1e6:.2f}" for arm, size in found.items())
        which = f"{'with' if dropout else 'without'} dropout: " if case.name == "minilm" else ""
        parts.append(f"{which}{of_full:.3f} x full training, {of_lora:.3f} x LoRA (MB: {sizes})")
    return Measurement("; ".join(parts), all(fine))


def saved(model: nn.Module, rules: Iterable[Any], batch: Any) -> int:
    """Bytes that autograd keeps in a forward pass under rules."""
    model.train()
    with trained_parameters(model, rules), attached(rules, model), own_random_numbers(torch.device("cpu"), 0):
        with saved_tensors(model) as meter:
            loss(model, batch)
        return meter.bytes


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy."""
    return nn.functional.cross_entropy(first_tensor(forward(model, batch)), batch["labels"])


def faithful(case: Case) -> Measurement:
    """Cosines between gradients with codes and without."""
    parts, fine = [], []
    models = {"before": arranged(case.plain(), OURS, 0), "after": case.trained(OURS, case.sizes.seeds[0])}
    for when, model in models.items():
        cosines = {bits: mean(compared(copy.deepcopy(model), bits, case.batches())) for bits in (4, 2)}
        fine.append(cosines[4] >= ALIKE and cosines[2] >= COARSE)
        parts.append(f"{when} training: {cosines[4]:.4f} with 4 bits, {cosines[2]:.4f} with 2")
    return Measurement("; ".join(parts), all(fine))


def compared(model: nn.Module, bits: int, batches: Iterable[Any]) -> list[float]:
    """The cosine on each batch."""
    found = []
    for batch in batches:
        exact, coded = (gradient(model, rule, batch) for rule in (S2A(coded=()), S2A(bits=bits)))
        found.append(float(torch.cosine_similarity(exact, coded, 0)))
    return found


def gradient(model: nn.Module, rule: S2A, batch: Any) -> Tensor:
    """Of all trained parameters, in one."""
    with trained_parameters(model, [rule]), attached([rule], model):
        trained = [each for each in model.parameters() if each.requires_grad]
        return torch.cat([each.flatten().double() for each in torch.autograd.grad(loss(model, batch), trained)])


def accurate(case: Case) -> Measurement:
    """Test accuracies of all arms."""
    found = {arm: case.accuracies(arm) for arm in ARMS}
    gap = mean(found[OURS]) - mean(found[LORA])
    arms = ", ".join(
        f"{arm} {spread([100 * each for each in values], '.1f')} % (rate {case.rate(arm):g})"
        for arm, values in found.items()
    )
    share = mean(found[OURS]) / mean(found[FULL])
    return Measurement(f"{100 * gap:+.1f} points against LoRA; {arms}; {share:.1%} of full training", gap >= -LOST)


def few(case: Case) -> Measurement:
    """Trained parameters of all arms."""
    shares: dict[str, float] = {}
    for arm in ARMS:
        model = arranged(case.plain(), arm, 0)
        with trained_parameters(model, RULES[arm]):
            trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        shares[arm] = trained / sum(each.numel() for each in case.plain().parameters())
    text = ", ".join(f"{arm} {share:.2%}" for arm, share in shares.items())
    return Measurement(text, shares[OURS] <= TRAINED)
