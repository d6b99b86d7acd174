"""Training rules: what changes how a model is trained, in our loop, in anyone's, and in transformers' Trainer.

A rule is its settings, a frozen pydantic model as a transform is; `rule.attach(model, optimizer)` puts it to work and
returns what holds its running state. In our loop: `core.train.training.train(..., rules=[rule])`. In the Trainer:
`RuleCallback([rule])`, among its callbacks. In anyone's loop:

    with attached([rule], model, optimizer) as rules:
        for step, batch in enumerate(batches):
            rules.before_step(step / len(batches))
            output = model(**batch)
            loss = rules.add(output.loss, batch.get("attention_mask"), batch, output)
            loss.backward()
            rules.after_backward(step / len(batches))  # before gradients are clipped, if they are
            optimizer.step()
            rules.after_step((step + 1) / len(batches))
            optimizer.zero_grad()

If a rule says what trains (`TrainingRule.trainable`), make the optimizer inside `with trained_parameters(model, rules)`
(`core/train/choice.py`). What a rule unfreezes or adds when it is attached is given to the optimizer.

At its end the rules are detached, and the edits that they finish with are made and recorded on the model. If
gradients are accumulated, divide what `add` returns by the number of batches, as you would the loss.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from actkit.core.edit.edits import Edit
from actkit.core.ground.errors import CheckpointError, UnsupportedModelError
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.rule import AttachedRule, parse_rules
from actkit.core.recipe.runner import apply_edits
from actkit.core.store.tensor_files import read_values, write_values
from actkit.core.train.choice import add_new_parameters, chooses, trained_parameters


class AttachedRules(AttachedRule):
    """Several rules at work on one model, as one."""

    def __init__(self, rules: Iterable[tuple[str, AttachedRule]]) -> None:
        self._rules = {f"{index}.{name}": rule for index, (name, rule) in enumerate(rules)}

    @property
    def acts_on_gradients(self) -> bool:
        """Whether one of them changes gradients before they are clipped."""
        return any(type(rule).after_backward is not AttachedRule.after_backward for rule in self._rules.values())

    def add(self, loss: Tensor, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor:
        """The loss with the penalties of the forward pass that gave it; the others as in `AttachedRule.penalty`."""
        penalty = self.penalty(mask, batch, output)
        return loss if penalty is None else loss + penalty.to(loss.device)

    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        """The sum of the rules' penalties; None if there is none."""
        given = (rule.penalty(mask, batch, output) for rule in self._rules.values())
        found = [penalty for penalty in given if penalty is not None]
        if not found:
            return None
        total = found[0]
        for penalty in found[1:]:
            total = total + penalty.to(total.device)
        return total

    def before_step(self, progress: float) -> None:
        """Tell each rule that a step begins."""
        for rule in self._rules.values():
            rule.before_step(progress)

    def after_backward(self, progress: float) -> None:
        """Let each rule act on the gradients."""
        for rule in self._rules.values():
            rule.after_backward(progress)

    def after_step(self, progress: float) -> None:
        """Tell each rule that a step is done."""
        for rule in self._rules.values():
            rule.after_step(progress)

    def over(self) -> str | None:
        """The reason of the first rule that ends the training."""
        return next((reason for rule in self._rules.values() if (reason := rule.over()) is not None), None)

    def report(self) -> dict[str, Any]:
        """One dict per rule, by '0.name', without those that report nothing."""
        reports = {key: rule.report() for key, rule in self._rules.items()}
        return {key: report for key, report in reports.items() if report}

    def state_dict(self) -> dict[str, Any]:
        """One dict per rule, by '0.name', without those that keep no state."""
        states = {key: rule.state_dict() for key, rule in self._rules.items()}
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give each rule its state. Raises CheckpointError for the state of a rule that is not here."""
        unknown = [key for key in state if key not in self._rules]
        if unknown:
            raise CheckpointError(
                f"rules: the state holds {', '.join(unknown)}, attached are {', '.join(self._rules) or 'none'}; "
                f"go on with the rules that the training began with."
            )
        for key, rule in self._rules.items():
            rule.load_state_dict(state.get(key, {}))

    def detach(self) -> None:
        """Detach all, also if one fails."""
        with ExitStack() as stack:  # all are detached, also if one fails
            for rule in self._rules.values():
                stack.callback(rule.detach)

    def finish(self) -> Iterable[Edit]:
        """The edits of all, in order."""
        return chain.from_iterable(rule.finish() for rule in self._rules.values())


def attach(
    rules: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    example: Any = None,
    **rates: Any,
) -> AttachedRules:
    """Put rules to work on a model; whoever calls this calls `detach()`.

    Args:
        rules: what `parse_rules` takes.
        model: in place.
        optimizer: as in `TrainingRule.attach`; it is given the parameters that the rules unfreeze or add.
        example: as in `TrainingRule.attach`.
        rates: of those parameters: `weight_decay`, `learning_rate` and `learning_rates` (`parameter_groups`).

    Raises:
        Exception: what the rules raise; those that were attached are detached again.
    """
    done: list[tuple[str, AttachedRule]] = []
    known = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    try:
        for rule in parse_rules(rules):
            done.append((type(rule).__name__, rule.attach(model, optimizer, example)))
        if optimizer is not None:
            add_new_parameters(optimizer, model, known, **rates)
    except BaseException:
        AttachedRules(done).detach()
        raise
    return AttachedRules(done)


@contextmanager
def attached(
    rules: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    example: Any = None,
    **rates: Any,
) -> Iterator[AttachedRules]:
    """Let rules work while a model is trained.

    They are detached at the end, also after an exception; if there was none, the edits that they finish with are made.

    Args:
        rules: as in `attach`, and so are all others.
        model: in place.
        optimizer: of its parameters.
        example: one batch.
        rates: of parameters that the rules unfreeze or add.

    Yields:
        The rules at work.
    """
    running = attach(rules, model, optimizer, example, **rates)
    try:
        yield running
    except BaseException:
        running.detach()
        raise
    finish(running, model, example)


def finish(running: AttachedRule, model: nn.Module, example: Any = None) -> None:
    """End a training: detach its rules, then make the edits that they finish with, and record them on the model.

    Args:
        running: what `attach` gave.
        model: with the weights that are kept.
        example: a batch, for a model of unknown architecture.

    Raises:
        EditError: an edit does not fit the model, which then is as it was before the edits.
    """
    running.detach()
    apply_edits(model, running.finish(), lambda: anatomy(model, example).architecture)


# -- what rules share --------------------------------------------------------------------------------------------------


def refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """Refuse a model that recomputes its blocks with re-entrant gradient checkpointing.

    Their first pass builds no graph, so that a penalty on what is inside them would have no gradient.

    Args:
        model: that is trained.

    Raises:
        UnsupportedModelError: it does.
    """
    for path, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
        if getattr(module, "gradient_checkpointing", False) and reentrant:
            raise UnsupportedModelError(
                f"model: {path or 'it'} uses re-entrant gradient checkpointing, under which activations have no "
                f"graph; call model.gradient_checkpointing_enable({{'use_reentrant': False}})."
            )


# -- transformers' Trainer ---------------------------------------------------------------------------------------------


class RuleCallback(TrainerCallback):
    """Training rules in transformers' Trainer.

        with RuleCallback([ActivationPenalty(weight=1e-3)]) as callback:
            Trainer(model, args, train_dataset=..., callbacks=[callback]).train()

    While the Trainer trains, a hook on the model adds the penalty to the loss that the model returns, so that the
    logged loss contains it; evaluation is left alone. A Trainer that normalises by the number of labels of the whole
    step (it passes `num_items_in_batch`) divides no loss by the accumulation steps, so the penalty is divided here;
    otherwise the Trainer divides both. State of the rules is saved beside the Trainer's checkpoints.

    If a rule says what trains, that holds from the making of the Trainer on, until `detach()`.

    Args:
        rules: what `parse_rules` takes.
        example: as in `TrainingRule.attach`.
        resume_from: the folder that holds the state of the rules; by default that of the Trainer's checkpoints.

    Attributes:
        reports: what the rules had to say of the last step, once training has ended.

    Raises:
        ValueError: something would make a rule do the wrong thing: label smoothing, a loss computed outside the model
            (`compute_loss_func`), torch.compile, DataParallel, FSDP, DeepSpeed, accumulation over a dataset without a
            length, whose last step has an unknown number of batches; for a rule that changes gradients also clipping
            and fp16, since the Trainer clips before it asks; an optimizer that lacks parameters that a rule trains.
        UnsupportedModelError: re-entrant gradient checkpointing.

    A Trainer subclass that sets `loss_is_scaled_for_ga` is not supported.
    """

    def __init__(self, rules: Any, *, example: Any = None, resume_from: str | Path | None = None) -> None:
        self.rules = parse_rules(rules)
        self.example = example
        self.resume_from = resume_from
        self.running: AttachedRules | None = None
        self.reports: dict[str, Any] = {}
        self._choice = ExitStack()  # which parameters train
        self._chosen = False
        self._remove: Callable[[], None] | None = None
        self._batches = 1  # of the running optimizer step
        self._updates: tuple[int, int] | None = None  # (optimizer steps of an epoch, batches of its last one)
        self._update = 0  # running number of the optimizer step in its epoch
        self._processes = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def detach(self) -> None:
        """Take hook and rules off the model.

        Done if training ends (then the rules also finish); after an exception by leaving the `with`.
        """
        if self._remove is not None:
            self._remove()
            self._remove = None
        if self.running is not None:
            self.running.detach()
            self.running = None
        self._choice.close()
        self._chosen = False

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the parameters that train, before the Trainer makes its optimizer."""
        self.detach()
        self._choose(kwargs["model"])

    def _choose(self, model: nn.Module) -> None:
        if not self._chosen and chooses(self.rules, None):
            self._choice.enter_context(trained_parameters(model, self.rules))
            self._chosen = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the rules, and take back their state if a training is resumed."""
        if self.running is not None:
            self.detach()  # of a training that was cut off
        model, optimizer, loader = kwargs["model"], kwargs.get("optimizer"), kwargs.get("train_dataloader")
        accumulation = args.gradient_accumulation_steps
        self._updates = _updates(loader, accumulation)
        _refuse(args, self._updates is not None)
        refuse_reentrant_checkpointing(model)
        averaged = getattr(args, "average_tokens_across_devices", False)
        self._processes = args.world_size if averaged else 1
        self._batches = accumulation
        resumed = state.global_step > 0 and self._updates is not None and not args.ignore_data_skip
        self._update = state.global_step % self._updates[0] if resumed else 0  # type: ignore[index]
        self._choose(model)
        inner = getattr(optimizer, "optimizer", optimizer)
        try:
            groups = 0 if inner is None else len(inner.param_groups)
            self.running = attach(self.rules, model, inner, self.example)
            _refuse_late_parameters(model, inner, groups, self._chosen)
            _refuse_clipping(args, self.running)
            if state.global_step > 0:
                self._load(args, state)
        except BaseException:
            self.detach()
            raise
        self._remove = model.register_forward_hook(self._add, with_kwargs=True).remove

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the rules that a step begins."""
        if self.running is None:
            return
        if self._updates is not None:
            count, last = self._updates
            self._batches = last if self._update == count - 1 else args.gradient_accumulation_steps
        self.running.before_step(state.global_step / state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the rules act on the gradients."""
        if self.running is not None:
            self.running.after_backward(state.global_step / state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the rules that a step is done."""
        if self.running is not None:
            self._update += 1
            self.running.after_step((state.global_step + 1) / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the training if a rule says that it is over."""
        if self.running is not None and self.running.over() is not None:
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the steps of an epoch anew."""
        self._update = 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state of the rules beside the Trainer's."""
        if self.running is not None and state.is_world_process_zero and (values := self.running.state_dict()):
            write_values(_checkpoint(args, state) / "actkit_rules", values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the reports, detach the rules, and make the edits that they finish with."""
        running = self.running
        if running is not None:
            self.reports = running.report()
        self.detach()
        if running is not None:
            finish(running, kwargs["model"], self.example)

    def _load(self, args: Any, state: Any) -> None:
        folder = Path(self.resume_from) if self.resume_from is not None else _checkpoint(args, state)
        assert self.running is not None
        if (folder / "actkit_rules").is_dir():
            self.running.load_state_dict(read_values(folder / "actkit_rules"))
        elif self.running.state_dict():
            raise CheckpointError(
                f"resume: {folder} holds no state of the training rules; pass the folder that the Trainer resumes "
                f"from as RuleCallback(..., resume_from=...)."
            )

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The hook on the whole model: its output with the penalty in the loss."""
        if not (module.training and torch.is_grad_enabled()) or self.running is None:
            return None
        loss = _loss(output)
        if loss is None:
            raise ValueError(
                "RuleCallback: the model returned no loss in training, so the Trainer computes it outside the model "
                "(compute_loss_func, an own compute_loss) or gave no labels; let the model compute it from its labels."
            )
        penalty = self.running.penalty(kwargs.get("attention_mask"), kwargs, output)
        if penalty is None:
            return None
        if kwargs.get("num_items_in_batch") is not None:
            penalty = penalty / (self._batches * self._processes)
        return _with_loss(output, loss + penalty.to(loss.device))


def _updates(loader: Any, accumulation: int) -> tuple[int, int] | None:
    """(optimizer steps of an epoch, batches of its last one); None if the length is unknown and it matters."""
    try:
        length = len(loader)
    except TypeError:
        return (1, 1) if accumulation == 1 else None
    return max(1, -(-length // accumulation)), length % accumulation or accumulation


def _refuse(args: Any, countable: bool) -> None:
    reasons = {
        "label_smoothing_factor": bool(args.label_smoothing_factor) and "it computes the loss outside the model",
        "torch_compile": bool(args.torch_compile) and "hooks do not fire in a compiled model",
        "fsdp": bool(args.fsdp) and "the model is sharded",
        "deepspeed": bool(args.deepspeed) and "the model is sharded",
        "n_gpu": args.n_gpu > 1 and "DataParallel copies the model, start one process per GPU instead",
        "gradient_accumulation_steps": not countable
        and "the dataset has no length, so that the number of batches of an epoch's last step is unknown",
    }
    for name, reason in reasons.items():
        if reason:
            raise ValueError(f"{name}: {getattr(args, name)!r} was given, which RuleCallback refuses: {reason}.")


def _refuse_late_parameters(model: nn.Module, optimizer: Any, groups: int, chosen: bool) -> None:
    """Parameters that a rule trains and the Trainer's optimizer or schedule, made before, does not know."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups[:groups] for parameter in group["params"]}
    late = chosen or len(optimizer.param_groups) > groups
    names = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in held]
    if late and names:
        raise ValueError(
            f"optimizer: it was made before a rule let {', '.join(names[:3])} train. Name these in the rule's "
            f"trainable(model), give the Trainer this callback when it is made, and an optimizer of your own inside "
            f"`with trained_parameters(model, rules)`."
        )


def _refuse_clipping(args: Any, running: AttachedRules) -> None:
    if not running.acts_on_gradients:
        return
    for name, given, other in (("max_grad_norm", args.max_grad_norm > 0, "0"), ("fp16", args.fp16, "False")):
        if given:
            raise ValueError(
                f"{name}: {getattr(args, name)!r} was given, and a rule changes gradients before they are clipped, "
                f"which the Trainer does first; pass {name}={other}, or train with actkit.train."
            )


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"))


def _loss(output: Any) -> Tensor | None:
    """The loss that the Trainer would take; None if the output holds none."""
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and output[0].dim() == 0:
        return output[0]
    return None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if is_dataclass(output) and not isinstance(output, type):
        return replace(output, loss=loss)  # type: ignore[call-arg]
    return {**output, "loss": loss} if isinstance(output, Mapping) else (loss, *output[1:])
