"""What every training rule must satisfy: `check_rule`, one small function per property.

    from actkit.testing import check_rule

    def test_my_rule():
        check_rule(MyRule(weight=3.0), tiny_model("llama"), tiny_batches("llama"))

A few steps are trained in a loop that is written out here, in `core.train.training.train` and in transformers' Trainer.
The learning rate is so small that the weights hardly move, and the gradients of each step are compared, to rounding.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import PrivateAttr, ValidationError
from torch import Tensor, nn

from actkit.core.edit import changes
from actkit.core.forward.batch import main_input, mask_of
from actkit.core.forward.hooks import hooked
from actkit.core.ground.errors import RecipeError
from actkit.core.ground.modules import tied_names
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.measure.tasks.task import IGNORED
from actkit.core.recipe.rule import AttachedRule, TrainingRule, dump_rules, parse_rules
from actkit.core.store import checkpoint
from actkit.core.train.choice import trained_parameters
from actkit.core.train.objective import Objective
from actkit.core.train.optimizers import chosen_optimizer, make_optimizer
from actkit.core.train.rules import RuleCallback, attach, finish
from actkit.core.train.training import Trained, train
from actkit.core.train.training_setup import prepare_modes
from actkit.testing.checks import (
    Check,
    NotApplicable,
    State,
    assert_no_hook_left,
    equal,
    hooks_of,
    outputs,
    run_checks,
    same_bits,
    works,
)

CPU = torch.device("cpu")
STEPS = 3
RATE = 1e-6
GRADIENTS = 1e-4  # of the largest of a tensor: sums in another order, and weights that moved by RATE

Group = Sequence[Any]  # the batches of one optimizer step


@dataclass(frozen=True)
class Ran:
    """A training.

    Attributes:
        model: after it.
        gradients: of each step, by parameter.
        progress: that rules were given before each step.
    """

    model: nn.Module
    gradients: list[dict[str, Tensor]]
    progress: list[float]

    def compare(self, expected: Ran, what: str) -> None:
        """Assert that it went as another one, to rounding."""
        assert self.progress == expected.progress, f"{what}: the progress was {self.progress}, not {expected.progress}"
        assert len(self.gradients) == len(expected.gradients), f"{what}: {len(self.gradients)} steps"
        for step, (found, wanted) in enumerate(zip(self.gradients, expected.gradients, strict=True), start=1):
            assert found.keys() == wanted.keys(), f"{what}, step {step}: other parameters have gradients"
            largest = {name: float(gradient.abs().max()) for name, gradient in wanted.items()}
            for name, gradient in found.items():
                bound = GRADIENTS * (largest[name] + 1e-2 * max(largest.values()))  # some are nothing but rounding
                error = float((gradient - wanted[name]).abs().max())
                assert error <= bound, f"{what}, step {step}: the gradient of {name} differs by {error:.3g}"
        after = _weights(expected.model)
        for name, weight in _weights(self.model).items():
            bound = GRADIENTS * float(after[name].abs().max()) + 4 * STEPS * RATE
            error = float((weight - after[name]).abs().max())
            assert error <= bound, f"{what}: after it {name} differs by {error:.3g}"

    def same(self, expected: Ran) -> bool:
        """Whether gradients and weights are those of another training, bit for bit."""
        pairs = list(zip(self.gradients, expected.gradients, strict=True))
        pairs.append((_weights(self.model), _weights(expected.model)))
        return all(
            found.keys() == wanted.keys() and all(same_bits(found[name], wanted[name]) for name in found)
            for found, wanted in pairs
        )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class RuleCase:
    """What all checks share.

    Attributes:
        rule: what is checked.
        original: the model, as it was given.
        batches: with labels.
    """

    rule: TrainingRule
    original: nn.Module
    batches: Sequence[Any]

    def model(self) -> nn.Module:
        """A copy of the model."""
        return copy.deepcopy(self.original)

    @cached_property
    def objective(self) -> Objective:
        """The model's own loss."""
        return Objective(self.original, None)

    def groups(self, accumulation: int = 1) -> list[Group]:
        """The batches of each step."""
        flat = [self.batches[index % len(self.batches)] for index in range(STEPS * accumulation)]
        return [flat[start : start + accumulation] for start in range(0, len(flat), accumulation)]

    @cached_property
    def by_hand(self) -> Ran:
        """The training under the rule, in a hand-written loop."""
        return by_hand(self, self.groups())

    @cached_property
    def adds_what_trains(self) -> bool:
        """Whether no parameter of the model trains under it, but those that it adds.

        The Trainer's optimizer, which is made before, cannot take them.
        """
        chosen = self.rule.trainable(self.model())
        return chosen is not None and not list(chosen)

    @cached_property
    def trainer_is_plain(self) -> bool:
        """Whether the Trainer agrees with the loop by hand if there is no rule.

        It does not for GPT-2, whose labels it counts before they are shifted.
        """
        return self._plain(1)

    @cached_property
    def trainer_accumulates_plainly(self) -> bool:
        """The same with two batches in each step.

        It does not for a BERT, whose loss it takes for one that was divided already.
        """
        return self.trainer_is_plain and self._plain(2)

    def _plain(self, accumulation: int) -> bool:
        groups = self.groups(accumulation)
        plain, found = by_hand(self, groups, rules=()), in_trainer(self, groups, rules=())
        return works(partial(found.compare, plain, "Trainer"))


def check_rule(rule: TrainingRule, model: nn.Module, batches: Iterable[Any]) -> list[Check]:
    """Check everything that a rule promises, on one model.

    Args:
        rule: at a setting that changes something in the first steps.
        model: a small one of transformers in float32, without dropout, that computes its loss from labels; never
            changed, each check works on a copy.
        batches: two dicts of its keywords or another even number; the best have padding. A language model needs no
            labels.

    Returns:
        What was checked, and what did not apply and why.

    Raises:
        AssertionError: it begins with the name of the first property that fails.
        ValueError: no batches, or an odd number.
    """
    labelled = [_labelled(batch) for batch in batches]
    if not labelled or len(labelled) % 2:
        raise ValueError(f"batches: {len(labelled)} were given; give two, four or more, for steps of two batches.")
    case = RuleCase(rule, model, labelled)
    start = State.of(model)
    return run_checks(CHECKS, case, partial(_still, start, model))


def _still(start: State, model: nn.Module, name: str) -> None:
    start.compare(model, f"{name}: a copy was changed, and the original with it")


def _labelled(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with labels; a language model learns the next token."""
    if "labels" in batch:
        return dict(batch)
    ids, mask = batch["input_ids"], mask_of(batch, CPU)
    return {**batch, "labels": ids if mask is None else ids.masked_fill(mask == 0, IGNORED)}


# -- the properties ----------------------------------------------------------------------------------------------------


def changes_the_training(case: RuleCase) -> None:
    """Gradients or weights differ from those without the rule; those of a rule that only reads are the same bits."""
    plain = by_hand(case, case.groups(), rules=())
    if case.rule.only_reads:
        assert case.by_hand.same(plain), "it is said to read only, and the training differs from one without it"
        return
    assert not case.by_hand.same(plain), "the training is the same without it; choose a setting that does something"


def same_result_twice(case: RuleCase) -> None:
    """Two trainings of equal models are equal bit for bit."""
    assert by_hand(case, case.groups()).same(case.by_hand), "gradients or weights differ"


def our_loop_agrees(case: RuleCase) -> None:
    """`core.train.training.train` gives the gradients, weights and progress of the loop by hand."""
    found, groups = in_our_loop(case)
    found.compare(by_hand(case, groups), "core.train.training.train")


def trainer_agrees(case: RuleCase) -> None:
    """The Trainer of transformers with a `RuleCallback` gives them too."""
    if case.adds_what_trains:
        raise NotApplicable("it adds what trains, and the Trainer's optimizer is made before")
    if not case.trainer_is_plain:
        kind = type(case.original).__name__
        raise NotApplicable(f"without any rule the Trainer weighs the loss of a {kind} differently than its labels do")
    in_trainer(case, case.groups()).compare(case.by_hand, "Trainer")


def gradients_are_accumulated(case: RuleCase) -> None:
    """So it is with two batches in each step."""
    found, ours = in_our_loop(case, accumulation=2)
    found.compare(by_hand(case, ours), "core.train.training.train with two batches per step")
    if case.trainer_accumulates_plainly and not case.adds_what_trains:
        groups = case.groups(2)
        in_trainer(case, groups).compare(by_hand(case, groups), "Trainer with two batches per step")


def resumes_to_the_bit(case: RuleCase) -> None:
    """A training that is cut off and goes on from its files ends as one that was not."""
    with tempfile.TemporaryDirectory() as parent:
        whole = _kept(case, Path(parent) / "whole")
        folder = Path(parent) / "cut"
        try:
            _kept(case, folder, cut_at=STEPS)
        except _Planned:
            pass
        else:
            raise AssertionError("an error in the loss was swallowed")
        resumed = _kept(case, folder, resume=True)
    for found, expected in zip(resumed.history, whole.history, strict=True):
        assert asdict(found) == asdict(expected), f"step {found.step} was {asdict(found)}, not {asdict(expected)}"
    State.of(whole.model).compare(resumed.model, "the model of the resumed training", modules=False)


def what_it_ends_with_is_saved(case: RuleCase) -> None:
    """The folder of a training under a rule that finishes with edits loads with equal tensors and outputs."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "whole"
        model = _kept(case, folder).model
        if changes.of(model) == changes.of(case.original):
            raise NotApplicable("it finishes with no edits")
        loaded = checkpoint.load(folder)
    State.of(model).compare(loaded, "the loaded model", modules=False)
    equal(outputs(loaded, case.batches), outputs(model, case.batches), "the outputs of the loaded model")


def what_it_reports_is_kept(case: RuleCase) -> None:
    """What it reports of a step is JSON, and stands in the `training.json` of the folder."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "whole"
        found = [step.reports for step in _kept(case, folder).history]
        kept = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    if not any(found):
        raise NotApplicable("it reports nothing")
    again = [step["reports"] for step in kept["history"]]
    assert again == found, f"training.json holds {again}, not {found}"


def detach_leaves_the_plain_model(case: RuleCase) -> None:
    """After `detach()`, and after an error, modules, hooks and settings are those of the model without the rule."""
    for what, cut in (("after detach()", False), ("after detach() in the midst of a step", True)):
        model = case.model()
        before = State.of(model)
        batch = case.batches[0]
        with trained_parameters(model, [case.rule]):
            running = attach(case.rule, model, _optimizer(model, [case.rule]), batch)
            try:
                model.train()
                running.before_step(0.0)
                output = model(**batch)
                loss = running.add(output.loss, mask_of(batch, CPU), batch, output)
                if not cut:
                    loss.backward()
                    running.after_backward(0.0)
                    kept = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.requires_grad]
                    assert not kept, f"{what}: gradients of {kept} hold a graph of their own, which is never freed"
                    running.after_step(1.0)
            finally:
                running.detach()
        assert_no_hook_left(model, hooks_of(case.original), what)
        now = State.of(model)
        assert now.modules == before.modules, f"{what}: other modules than before it was attached"
        assert now.tensors.keys() == before.tensors.keys(), f"{what}: other tensors than before it was attached"
        assert (now.kind, now.config) == (before.kind, before.config), f"{what}: the class or the config differs"
        assert now.trains == before.trains, f"{what}: requires_grad differs"
        plain = case.model()
        plain.load_state_dict(model.state_dict())
        equal(outputs(model, case.batches), outputs(plain, case.batches), f"{what} the outputs and a plain model's")


def ties_are_kept(case: RuleCase) -> None:
    """Parameters that were one tensor under two names still are."""
    tied = tied_names(case.original)
    if not tied:
        raise NotApplicable("the model ties no parameters")
    for model in (case.by_hand.model, in_our_loop(case)[0].model):
        after = tied_names(model)
        for name, partner in tied.items():
            assert after.get(name) == partner, f"{name} is no longer tied to {partner}"


def nothing_is_shared(case: RuleCase) -> None:
    """Two models that train in turns under the same rule train as each alone."""
    ran = [Ran(case.model(), [], []) for _ in range(2)]
    with own_random_numbers(CPU, 0):
        for _ in zip_longest(*(_steps(case, each, case.groups(), (case.rule,)) for each in ran)):
            pass  # one step of the first, one of the second, and so on
    for index, found in enumerate(ran, start=1):
        assert found.same(case.by_hand), f"model {index} of two trained differently than alone"


def padding_counts_for_nothing(case: RuleCase) -> None:
    """Other tokens in place of padding leave the gradients as they are, to rounding."""
    masks = [mask_of(batch, CPU) for batch in case.batches]
    if all(mask is None or bool(mask.all()) for mask in masks):
        raise NotApplicable("no batch is padded")
    others = RuleCase(case.rule, case.original, [_other_padding(batch) for batch in case.batches])
    by_hand(others, others.groups()).compare(case.by_hand, "with other tokens in the padding")


def settings_are_strict(case: RuleCase) -> None:
    """A rule comes back from YAML as it was; settings are frozen, unknown ones refused by name."""
    with tempfile.TemporaryDirectory() as parent:
        path = Path(parent) / "rules.yaml"
        path.write_text(yaml.safe_dump({"actkit": 1, "rules": dump_rules([case.rule])}), encoding="utf-8")
        again = parse_rules(path)
    assert again == (case.rule,), f"{again} came back from YAML"
    try:
        parse_rules({case.rule.name: {"no_such_setting": 1}})
    except RecipeError as error:
        assert "no_such_setting" in str(error), f"the error does not name the unknown setting: {error}"
    else:
        raise AssertionError("an unknown setting was accepted")
    for name in type(case.rule).model_fields:
        try:
            setattr(case.rule, name, getattr(case.rule, name))
        except (ValidationError, TypeError):
            continue
        raise AssertionError(f"{name} can be changed; declare the model frozen")


CHECKS: dict[str, Callable[[RuleCase], None]] = {
    "it changes the training": changes_the_training,
    "the same result twice": same_result_twice,
    "our loop trains as one by hand": our_loop_agrees,
    "the Trainer trains as one by hand": trainer_agrees,
    "gradients are accumulated": gradients_are_accumulated,
    "ties are kept": ties_are_kept,
    "a resumed training is the same to the bit": resumes_to_the_bit,
    "what it ends with is saved": what_it_ends_with_is_saved,
    "what it reports is kept": what_it_reports_is_kept,
    "detach leaves the plain model": detach_leaves_the_plain_model,
    "nothing is shared between models": nothing_is_shared,
    "padding counts for nothing": padding_counts_for_nothing,
    "settings are strict": settings_are_strict,
}


# -- the same steps in three loops -------------------------------------------------------------------------------------


class _Watch(TrainingRule):
    """Copies what a training does: the gradients after each step, and the progress that rules are given."""

    _ran: Ran = PrivateAttr()

    @property
    def name(self) -> str:
        return "watch"

    def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
        return _Watching(self._ran)

    @classmethod
    def on(cls, ran: Ran) -> _Watch:
        """One that writes into `ran`."""
        watch = cls()
        watch._ran = ran
        return watch


class _Watching(AttachedRule):
    def __init__(self, ran: Ran) -> None:
        self.ran = ran

    def before_step(self, progress: float) -> None:
        self.ran.progress.append(progress)

    def after_step(self, progress: float) -> None:
        self.ran.progress.append(progress)
        gradients = {name: each.grad for name, each in self.ran.model.named_parameters()}
        self.ran.gradients.append({name: each.clone() for name, each in gradients.items() if each is not None})


def _optimizer(model: nn.Module, rules: Iterable[TrainingRule]) -> torch.optim.Optimizer:
    """That of a rule if one brings its own, else AdamW."""
    return make_optimizer(chosen_optimizer(rules), model, RATE)


def by_hand(case: RuleCase, groups: Sequence[Group], rules: Sequence[TrainingRule] | None = None) -> Ran:
    """Train in a hand-written loop.

    Args:
        case: the model and the batches.
        groups: the batches of each step.
        rules: None for the rule of the case.

    Returns:
        The training.
    """
    ran = Ran(case.model(), [], [])
    with own_random_numbers(CPU, 0):
        for _ in _steps(case, ran, groups, (case.rule,) if rules is None else rules):
            pass
    return ran


def _steps(case: RuleCase, ran: Ran, groups: Sequence[Group], rules: Sequence[TrainingRule]) -> Iterator[None]:
    """One optimizer step at a time: the mean loss over all labels of a group, and the mean penalty of its batches."""
    model = ran.model
    with trained_parameters(model, rules):
        optimizer = _optimizer(model, rules)
        running = attach([*rules, _Watch.on(ran)], model, optimizer, groups[0][0])
        try:
            for step, group in enumerate(groups):
                prepare_modes(model)
                running.before_step(step / len(groups))
                labels = [case.objective.labels(batch) for batch in group]
                for batch, count in zip(group, labels, strict=True):
                    output = model(**batch)
                    loss = output.loss * (count / sum(labels))
                    penalty = running.penalty(mask_of(batch, CPU), batch, output)
                    (loss if penalty is None else loss + penalty / len(group)).backward()
                running.after_backward(step / len(groups))
                optimizer.step()
                running.after_step((step + 1) / len(groups))
                optimizer.zero_grad()
                yield
        except BaseException:
            running.detach()
            raise
        finish(running, model, groups[0][0])


def in_our_loop(case: RuleCase, accumulation: int = 1) -> tuple[Ran, list[Group]]:
    """Train in `core.train.training.train`, and return in which order it took the batches."""
    ran, order = Ran(case.model(), [], []), []
    places = {main_input(batch).data_ptr(): index for index, batch in enumerate(case.batches)}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = places.get(main_input(kwargs).data_ptr()) if torch.is_grad_enabled() else None  # not in validation
        if place is not None:
            order.append(case.batches[place])

    with hooked(ran.model, before={"": note}):
        _train(case, ran.model, rules=[case.rule, _Watch.on(ran)], learning_rate=RATE, accumulation=accumulation)
    return ran, [order[start : start + accumulation] for start in range(0, len(order), accumulation)]


def in_trainer(case: RuleCase, groups: Sequence[Group], rules: Sequence[TrainingRule] | None = None) -> Ran:
    """Train in transformers' Trainer, in the order of `groups`. rules: None for the rule of the case."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    ran = Ran(case.model(), [], [])
    rules = (case.rule,) if rules is None else rules
    chosen = trained_parameters(ran.model, rules)  # before the optimizer is made
    with tempfile.TemporaryDirectory() as folder, own_random_numbers(CPU, 0), chosen:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,  # an example of the data set is a batch of ours
            gradient_accumulation_steps=len(groups[0]),
            max_steps=len(groups),
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        optimizer = _optimizer(ran.model, rules)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        with RuleCallback([*rules, _Watch.on(ran)], example=groups[0][0]) as callback:
            trainer = Trainer(
                ran.model,
                settings,
                train_dataset=[batch for group in groups for batch in group],  # type: ignore[arg-type]
                data_collator=lambda examples: examples[0],
                callbacks=[callback],
                optimizers=(optimizer, constant),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    return ran


def _train(case: RuleCase, model: nn.Module, *, accumulation: int = 1, **settings: Any) -> Trained:
    return train(
        model,
        case.batches,
        validation=copy.deepcopy(case.batches[:1]),
        steps=STEPS,
        gradient_accumulation=accumulation,
        warmup=0.0,
        schedule="constant",
        weight_decay=0.0,
        max_grad_norm=None,
        keep="last",
        progress=False,
        **settings,
    )


class _Planned(Exception):
    pass


def _kept(case: RuleCase, folder: Path, *, cut_at: int | None = None, resume: bool = False) -> Trained:
    """Train into a folder, with steps large enough to show; cut_at: fail in that step."""
    calls = 0

    def loss(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += model.training
        if model.training and calls == cut_at:
            raise _Planned
        return model(**batch).loss

    return _train(
        case,
        case.model(),
        rules=[case.rule],
        learning_rate=1e-3,
        out=folder,
        evaluate_every=1,
        loss=loss,
        resume=resume,
    )


def _other_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with other tokens in place of padding."""
    mask = mask_of(batch, CPU)
    if mask is None or "input_ids" not in batch:
        return batch
    ids = batch["input_ids"]
    return {**batch, "input_ids": torch.where(mask.bool(), ids, ids.roll(1, 1))}
