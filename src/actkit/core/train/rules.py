"""Training rules: what changes how a model is trained, in our loop, in anyone's, and in transformers' Trainer.

A rule is its settings, a frozen pydantic model as a transform is; `rule.attach(model, optimizer)` puts it to work and
returns what holds its running state. In our loop: `core.train.training.train(..., rules=[rule])`. In the Trainer:
`RuleCallback([rule])`, among its callbacks. In anyone's loop:

    with attached([rule], model, optimizer) as rules:
        for step, batch in enumerate(batches):
            rules.before_step(step / len(batches))
            loss = rules.add(model(**batch).loss, batch.get("attention_mask"))
            loss.backward()
            optimizer.step()
            rules.after_step((step + 1) / len(batches))
            optimizer.zero_grad()

At its end the rules are detached, and the edits that they finish with are made and recorded on the model. Where
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


class AttachedRules(AttachedRule):
    """Several rules at work on one model, as one."""

    def __init__(self, rules: Iterable[tuple[str, AttachedRule]]) -> None:
        self._rules = {f"{index}.{name}": rule for index, (name, rule) in enumerate(rules)}

    def add(self, loss: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss with the penalties of the forward pass that gave it."""
        penalty = self.penalty(mask)
        return loss if penalty is None else loss + penalty.to(loss.device)

    def penalty(self, mask: Tensor | None = None) -> Tensor | None:
        found = [penalty for rule in self._rules.values() if (penalty := rule.penalty(mask)) is not None]
        if not found:
            return None
        total = found[0]
        for penalty in found[1:]:
            total = total + penalty.to(total.device)
        return total

    def before_step(self, progress: float) -> None:
        for rule in self._rules.values():
            rule.before_step(progress)

    def after_step(self, progress: float) -> None:
        for rule in self._rules.values():
            rule.after_step(progress)

    def state_dict(self) -> dict[str, Any]:
        """One dict per rule, by '0.name', without those that keep no state."""
        states = {key: rule.state_dict() for key, rule in self._rules.items()}
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        unknown = [key for key in state if key not in self._rules]
        if unknown:
            raise CheckpointError(
                f"rules: the state holds {', '.join(unknown)}, attached are {', '.join(self._rules) or 'none'}; "
                f"go on with the rules that the training began with."
            )
        for key, rule in self._rules.items():
            rule.load_state_dict(state.get(key, {}))

    def detach(self) -> None:
        with ExitStack() as stack:  # all are detached, also where one fails
            for rule in self._rules.values():
                stack.callback(rule.detach)

    def finish(self) -> Iterable[Edit]:
        return chain.from_iterable(rule.finish() for rule in self._rules.values())


def attach(
    rules: Any, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
) -> AttachedRules:
    """Put rules to work on a model (see `TrainingRule.attach`); whoever calls this calls `detach()`.

    rules: what `parse_rules` takes. Where one cannot be attached, those before it are detached again.
    """
    done: list[tuple[str, AttachedRule]] = []
    try:
        for rule in parse_rules(rules):
            done.append((type(rule).__name__, rule.attach(model, optimizer, example)))
    except BaseException:
        AttachedRules(done).detach()
        raise
    return AttachedRules(done)


@contextmanager
def attached(
    rules: Any, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
) -> Iterator[AttachedRules]:
    """with attached(rules, model, optimizer) as rules: train. They are detached at the end, also after an exception;
    if there was none, the edits that they finish with are made."""
    running = attach(rules, model, optimizer, example)
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
    """Raise UnsupportedModelError where a model recomputes its blocks with re-entrant gradient checkpointing: their
    first pass builds no graph, so that a penalty on what is inside them would have no gradient."""
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
    logged loss contains it; evaluation is left alone. Where the Trainer normalises by the number of labels of the
    whole step (it passes `num_items_in_batch`) it divides no loss by the accumulation steps, so the penalty is divided
    here; elsewhere the Trainer divides both. State of the rules is saved beside the Trainer's checkpoints, and read
    back from `resume_from`, or from where the Trainer writes its checkpoints. example: as in `TrainingRule.attach`.

    Raises ValueError for what would make the penalty wrong: label smoothing, a loss computed outside the model
    (`compute_loss_func`), torch.compile, DataParallel, FSDP, DeepSpeed, and accumulation over a dataset without a
    length, whose last step has an unknown number of batches; UnsupportedModelError for re-entrant gradient
    checkpointing. A Trainer subclass that sets `loss_is_scaled_for_ga` is not supported.
    """

    def __init__(self, rules: Any, *, example: Any = None, resume_from: str | Path | None = None) -> None:
        self.rules = parse_rules(rules)
        self.example = example
        self.resume_from = resume_from
        self.running: AttachedRules | None = None
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
        """Take hook and rules off the model. Done if training ends (then the rules also finish); after an exception
        by leaving the `with`."""
        if self._remove is not None:
            self._remove()
            self._remove = None
        if self.running is not None:
            self.running.detach()
            self.running = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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
        self.running = attach(self.rules, model, getattr(optimizer, "optimizer", optimizer), self.example)
        try:
            if state.global_step > 0:
                self._load(args, state)
        except BaseException:
            self.detach()
            raise
        self._remove = model.register_forward_hook(self._add, with_kwargs=True).remove

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.running is None:
            return
        if self._updates is not None:
            count, last = self._updates
            self._batches = last if self._update == count - 1 else args.gradient_accumulation_steps
        self.running.before_step(state.global_step / state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.running is not None:
            self._update += 1
            self.running.after_step((state.global_step + 1) / state.max_steps)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update = 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.running is not None and state.is_world_process_zero and (values := self.running.state_dict()):
            write_values(_checkpoint(args, state) / "actkit_rules", values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        running = self.running
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
        penalty = self.running.penalty(kwargs.get("attention_mask"))
        if penalty is None:
            return None
        if kwargs.get("num_items_in_batch") is not None:
            penalty = penalty / (self._batches * self._processes)
        return _with_loss(output, loss + penalty.to(loss.device))


def _updates(loader: Any, accumulation: int) -> tuple[int, int] | None:
    """(optimizer steps of an epoch, batches of its last one); None where the length is unknown and it matters."""
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


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"))


def _loss(output: Any) -> Tensor | None:
    """The loss that the Trainer would take; None where the output holds none."""
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and output[0].dim() == 0:
        return output[0]
    return None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if is_dataclass(output) and not isinstance(output, type):
        return replace(output, loss=loss)  # type: ignore[call-arg]
    return {**output, "loss": loss} if isinstance(output, Mapping) else (loss, *output[1:])
