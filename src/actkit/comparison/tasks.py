"""The tasks of a comparison: a model in which one thing is changed, data in three splits, a training and a score.

    digits-mlp   64 pixels, one hidden layer, 10 classes                                functions, MLPs
    digits-cnn   two convolutions with pooling on 8 x 8 digits                          functions, pooling
    digits-vit   a vision transformer of two blocks, 16 patches                         functions, MLPs
    text         a language model of two blocks, 64 tokens of the embedded text         functions, MLPs, attention
    tabular      six tables, one hidden layer, the mean of their accuracies             functions, MLPs
    formulas     seven functions of one or two variables, one hidden layer              functions, MLPs

Models and data are those of the claims (`actkit.claims`). What an arm does not change is the same in all: MLPs of one
hidden layer without a gate, SiLU (GELU in the ViT, ReLU in the CNN), max pooling, softmax. A table or a formula is a
*part*, with a width and a training of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.claims.posets import Network
from actkit.claims.s_kan import TARGETS, points
from actkit.claims.selu import split_table, tables
from actkit.claims.small_models import language_model, text, vision_transformer
from actkit.comparison.arms import Arm, Kind, attend_by, function, mlp, pooling
from actkit.core.edit.edits import set_module
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.measure.quality import measure_quality
from actkit.core.model.anatomy import anatomy
from actkit.core.train.fitting import fit
from actkit.core.train.training import train
from actkit.data import digits
from actkit.functions.s_kan.choose_basis import ChooseBasis
from actkit.functions.s_kan.s_kan_layer import choosing

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Training:
    """One training of one arm.

    Attributes:
        validation: by which rates are chosen, the lower the better.
        score: on the test split.
        parameters: of the trained model; fewer than before if its layers chose and were pruned.
    """

    validation: float
    score: float
    parameters: int


class Task:
    """What the tasks share; a subclass has the model, the data and the training.

    Attributes:
        name: on the command line.
        kinds: of arms that fit.
        score: what is reported.
        unit: of the score.
        better: whether a higher or a lower score is.
        width: of the baseline, unless another one is given.
        steps: of the baseline's trainings.
        rows: of a step.
        rates: that every arm is tried at.
        parts: each with a model of its own; the score is the mean over them.
        unchanged: the arms that are the task's own model.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[Kind, ...]]
    score: ClassVar[str] = "test accuracy"
    unit: ClassVar[str] = "%"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    width: ClassVar[int]
    steps: ClassVar[int]
    rows: ClassVar[int]
    rates: ClassVar[tuple[float, float, float]] = (1e-3, 3e-3, 1e-2)
    parts: ClassVar[tuple[str, ...]] = ("",)

    def network(self, arm: Arm, width: int, part: str) -> nn.Module:
        """Make a model with random weights, drawn from torch's generator.

        Args:
            arm: what is changed in it.
            width: of the arm.
            part: of the task.

        Raises:
            ValueError: the arm does not fit the width.
        """
        raise NotImplementedError

    def trained(self, model: nn.Module, part: str, rate: float, seed: int, steps: int) -> Training:
        """Train a model in place, and measure it.

        Args:
            model: from `network`.
            part: of the task.
            rate: peak learning rate.
            seed: of the data and their order.
            steps: of the optimizer.

        Raises:
            NonFiniteError: the loss is no longer finite.
        """
        raise NotImplementedError

    def step(self, part: str) -> tuple[Callable[[nn.Module], Tensor], int]:
        """Return the loss of a model on one batch, and how many rows or tokens that has.

        Args:
            part: of the task.
        """
        raise NotImplementedError

    def fresh(self, arm: Arm, width: int, part: str, seed: int) -> nn.Module:
        """Make a model with the weights of a seed.

        Args:
            arm: what is changed in it.
            width: of the arm.
            part: of the task.
            seed: of the weights.
        """
        with own_random_numbers(CPU, seed):
            return self.network(arm, width, part)

    def parameters(self, arm: Arm, width: int, part: str) -> int | None:
        """Count the parameters of an arm; None if it does not fit the width.

        Args:
            arm: what is changed.
            width: of the arm.
            part: of the task.
        """
        try:
            return count(self.fresh(arm, width, part, 0))
        except ValueError:
            return None


def count(model: nn.Module) -> int:
    """The parameters of a model."""
    return sum(each.numel() for each in model.parameters())


def _prune(model: nn.Module) -> None:
    """Leave layers that chose with what they chose; after enough steps the model computes what it did."""
    with own_random_numbers(CPU, 0):  # new layers draw weights before they take over others
        for path, layer in choosing(model).items():
            layer.hard.fill_(1.0)  # a training of few steps ends before only one counts
            set_module(model, path, layer.pruned())


# -- classification ----------------------------------------------------------------------------------------------------

Rows = tuple[Tensor, Tensor]  # inputs and classes


class Classification(Task):
    """Tasks that learn classes from inputs that are all there."""

    def splits(self, part: str, seed: int) -> tuple[Rows, Rows, Rows]:
        """Return training, validation and test rows.

        Args:
            part: of the task.
            seed: of the split, if it is drawn.
        """
        raise NotImplementedError

    def trained(self, model: nn.Module, part: str, rate: float, seed: int, steps: int) -> Training:
        rows, held, test = self.splits(part, seed)
        order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(seed))
        pairs = zip(rows[0][order].split(self.rows), rows[1][order].split(self.rows), strict=True)
        found = train(
            model,
            [{"pixel_values": x, "labels": labels} for x, labels in pairs],
            validation=[{"pixel_values": held[0], "labels": held[1]}],
            loss=_loss,
            steps=steps,
            learning_rate=rate,
            rules=[ChooseBasis(prune=False)] if choosing(model) else (),
            seed=seed,
            evaluate_every=steps,
            keep="last",
            progress=False,
        )
        _prune(model)
        with evaluating(model):
            hits = (_logits(model, test[0]).argmax(-1) == test[1]).double().mean()
        return Training(found.validation, 100 * float(hits), count(model))

    def step(self, part: str) -> tuple[Callable[[nn.Module], Tensor], int]:
        (x, labels), *_ = self.splits(part, 0)
        batch = {"pixel_values": x[: self.rows], "labels": labels[: self.rows]}
        return lambda model: _loss(model, batch), len(batch["labels"])


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return first_tensor(forward(model, {"pixel_values": x}) if hasattr(model, "config") else model(x))


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(_logits(model, batch["pixel_values"]), batch["labels"])


class _Digits(Classification):
    """The 1,797 digits of 8 x 8 pixels."""

    def splits(self, part: str, seed: int) -> tuple[Rows, Rows, Rows]:
        return digits("train"), digits("search"), digits("test")


class DigitsMlp(_Digits):
    """An MLP on 64 pixels."""

    name, kinds = "digits-mlp", ("function", "mlp")
    width, steps, rows = 390, 300, 64
    rates = (3e-3, 1e-2, 3e-2)

    def network(self, arm: Arm, width: int, part: str) -> nn.Module:
        return nn.Sequential(nn.Flatten(), mlp(arm, 64, width, 10))


class DigitsCnn(_Digits):
    """Two convolutions; the width is the channels of the second one."""

    name, kinds = "digits-cnn", ("function", "pooling")
    width, steps, rows = 64, 300, 32

    def network(self, arm: Arm, width: int, part: str) -> nn.Module:
        if arm.kind == "pooling":
            return Network(lambda _: pooling(arm), 16, width)
        return Network(lambda channels: nn.Sequential(nn.MaxPool2d(2), function(arm.what, channels, 1)), 16, width)


class _Transformer(Task):
    """Models of transformers, in whose blocks MLPs are put; these alone are made to count parameters."""

    hidden: ClassVar[int]

    def plain(self) -> Any:
        """The model before an arm is put in."""
        raise NotImplementedError

    def network(self, arm: Arm, width: int, part: str) -> nn.Module:
        model = self.plain()
        own = Arm(self.own, "function", self.own)
        for block in anatomy(model).blocks:
            assert block.mlp is not None
            mlp_of = own if arm.kind == "attention" else arm
            set_module(model, block.mlp.path, mlp(mlp_of, self.hidden, width, self.hidden))
        if arm.kind == "attention":
            attend_by(model, arm)
        return model

    own: ClassVar[str]  # function, where another part is compared

    @cached_property
    def _others(self) -> tuple[int, int]:
        """Blocks, and the parameters of all that is no MLP."""
        with own_random_numbers(CPU, 0):
            model = self.plain()
        mlps = [block.mlp for block in anatomy(model).blocks if block.mlp is not None]
        return len(mlps), count(model) - sum(count(model.get_submodule(each.path)) for each in mlps)

    def parameters(self, arm: Arm, width: int, part: str) -> int | None:
        blocks, others = self._others
        if arm.kind == "attention":
            arm = Arm(self.own, "function", self.own)
        try:
            with own_random_numbers(CPU, 0):
                return others + blocks * count(mlp(arm, self.hidden, width, self.hidden))
        except ValueError:
            return None


class DigitsVit(_Transformer, _Digits):
    """A vision transformer of two blocks, 32 wide."""

    name, kinds = "digits-vit", ("function", "mlp")
    width, steps, rows, hidden, own = 152, 250, 32, 32, "gelu"

    def plain(self) -> Any:
        return vision_transformer(hidden=self.hidden, intermediate=self.width, seed=torch.initial_seed() % 2**31)


class Text(_Transformer):
    """A language model of two blocks, 64 wide, on rows of 64 tokens."""

    name, kinds = "text", ("function", "mlp", "attention")
    score, unit, better = "test loss", "nats per token", "lower"
    width, steps, rows, hidden, own = 208, 100, 8, 64, "silu"
    length, held_out = 64, 160  # tokens of a row, test rows

    def plain(self) -> Any:
        seed = torch.initial_seed() % 2**31
        return language_model(hidden=self.hidden, intermediate=self.width, layers=2, seed=seed)

    def trained(self, model: nn.Module, part: str, rate: float, seed: int, steps: int) -> Training:
        found = train(
            model,
            self._text(model, "train", self.rows * steps, seed, self.rows),
            validation=self._text(model, "search", 64, 0, 16),
            steps=steps,
            learning_rate=rate,
            rules=[ChooseBasis(prune=False)] if choosing(model) else (),
            seed=seed,
            evaluate_every=steps,
            keep="last",
            progress=False,
        )
        _prune(model)
        test = self._text(model, "test", self.held_out, 0, 16)
        quality = measure_quality(model.eval(), test, task="language", resamples=1, progress=False)
        return Training(found.validation, math.log(quality.metrics["perplexity"].value), count(model))

    def step(self, part: str) -> tuple[Callable[[nn.Module], Tensor], int]:
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(2, 2048, (self.rows, self.length), generator=draw)
        return lambda model: model(input_ids=tokens, labels=tokens).loss, tokens.numel()

    def _text(self, model: nn.Module, split: Any, rows: int, seed: int, batch: int) -> Any:
        key = (split, rows, seed, batch)
        if key not in self._read:
            self._read[key] = text(model, split, rows, seed=seed, length=self.length, batch=batch)
        return self._read[key]

    _read: ClassVar[dict[Any, Any]] = {}


# -- tables and formulas -----------------------------------------------------------------------------------------------


@cache
def _tables() -> dict[str, Rows]:
    return tables()


class Tabular(Classification):
    """Six tables, as in SELU's claim, with one hidden layer."""

    name, kinds = "tabular", ("function", "mlp")
    score = "mean test accuracy"
    width, steps, rows = 460, 60, 64
    parts = ("breast cancer", "wine", "digits", "made 1", "made 2", "made 3")

    def network(self, arm: Arm, width: int, part: str) -> nn.Module:
        x, classes = _tables()[part]
        return mlp(arm, x.shape[1], width, int(classes.max()) + 1)

    def splits(self, part: str, seed: int) -> tuple[Rows, Rows, Rows]:
        x, classes = _tables()[part]
        x, *indices = split_table(x, torch.Generator().manual_seed(seed))
        first, second, third = ((x[index], classes[index]) for index in indices)
        return first, second, third


class Formulas(Task):
    """The seven functions of S-KAN's claim; the score is the logarithm of the error, so that its mean is geometric."""

    name, kinds = "formulas", ("function", "mlp")
    score, unit, better = "ln of the test RMSE", "", "lower"
    width, steps, rows = 420, 150, 500
    parts = tuple(TARGETS)

    def network(self, arm: Arm, width: int, part: str) -> nn.Module:
        return mlp(arm, TARGETS[part][0], width, 1)

    def trained(self, model: nn.Module, part: str, rate: float, seed: int, steps: int) -> Training:
        rows, held, test = points(part, seed, self.rows)
        rule = ChooseBasis().attach(model) if choosing(model) else None

        def penalty(step: int) -> Tensor | None:
            if rule is None:
                return None
            rule.before_step((step - 1) / steps)
            return rule.penalty()

        with own_random_numbers(CPU, seed):
            fit(
                model, rows, validation=held, steps=steps, rate=rate, penalty=penalty, evaluate_every=steps, keep="last"
            )
        _prune(model)
        with evaluating(model):
            errors = [float(F.mse_loss(model(x), y)) for x, y in (held, test)]
        return Training(_log_root(errors[0]), _log_root(errors[1]), count(model))

    def step(self, part: str) -> tuple[Callable[[nn.Module], Tensor], int]:
        (x, y), *_ = points(part, 0, self.rows)
        return lambda model: F.mse_loss(model(x), y), len(x)


def _log_root(square: float) -> float:
    """ln of the root; a NaN or infinite error is one that no other rate loses to."""
    return math.log(square) / 2 if math.isfinite(square) and square > 0 else math.inf


TASKS: dict[str, type[Task]] = {each.name: each for each in (DigitsMlp, DigitsCnn, DigitsVit, Text, Formulas, Tabular)}
