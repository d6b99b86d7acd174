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

Where gradients are accumulated, divide what `add` returns by the number of batches, as you would the loss.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from transformers import TrainerCallback

from actkit.core.ground import registry
from actkit.core.ground.errors import CheckpointError, RecipeError, UnsupportedModelError
from actkit.core.ground.yaml_files import parse_yaml, read_yaml, shorten
from actkit.core.recipe.transform import explain
from actkit.core.store.tensor_files import read_values, write_values

RULES_VERSION = 1


class TrainingRule(BaseModel):
    """The settings of a rule. keep: which weights a training under it should end with, where the user does not say:
    'last' for a rule that trades loss for something else, so that the least loss is where it has worked least."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    keep: ClassVar[Literal["best", "last"]] = "best"

    @property
    def name(self) -> str:
        """The registered name. Raises RecipeError where the class is not registered."""
        return registry.method_name(type(self))

    @property
    def label(self) -> str:
        """A short text for tables: the name and the settings that differ from the defaults."""
        given = ", ".join(f"{key}={value}" for key, value in self.model_dump(exclude_defaults=True).items())
        return f"{type(self).__name__}({given})"

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedRule:
        """Put the rule to work on a model.

        optimizer: for rules that act on gradients or moments (its step hooks) or on parameter groups. example: one
        batch, needed by rules that read sites of a model of unknown architecture. Raises what the rule cannot do with
        this model; nothing is left behind then.
        """
        raise NotImplementedError


class AttachedRule:
    """A rule at work on one model, with its running state. What a rule does not need stays as it is here."""

    def penalty(self, mask: Tensor | None = None) -> Tensor | None:
        """What to add to the loss of the forward pass that was just made; None where there is nothing.

        mask: bool or integer [batch, length], which tokens are real; None where all are. Returns a scalar with its
        graph; a mean over the batch, as the loss is, since it is scaled with the loss.
        """
        return None

    def before_step(self, progress: float) -> None:
        """Called before the forward passes of an optimizer step. progress: share of the steps that are done."""

    def after_step(self, progress: float) -> None:
        """Called after the optimizer's step, while its gradients still stand."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs: tensors and JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave. Raises CheckpointError where it does not fit."""
        if state:
            raise CheckpointError(f"state: {', '.join(state)} was given; {type(self).__name__} keeps no state.")

    def detach(self) -> None:
        """Leave the model as it would be without the rule (hooks removed); what was trained stays."""


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
    """with attached(rules, model, optimizer) as rules: train. They are detached at the end, also after an exception."""
    running = attach(rules, model, optimizer, example)
    try:
        yield running
    finally:
        running.detach()


# -- rules by name -----------------------------------------------------------------------------------------------------


def parse_rules(source: Any) -> tuple[TrainingRule, ...]:
    """Rules from a rule, 'name', 'name:setting=value,setting=value', {name: settings}, a list of these, or a YAML file.

    actkit: 1
    rules:
      - activation_penalty: {weight: 0.001}

    Raises RecipeError naming the unknown rule or setting, or the value out of bounds.
    """
    if source is None:
        return ()
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".yaml", ".yml"))):
        return parse_rules(_read(Path(source)))
    if isinstance(source, Mapping) and "rules" in source:
        extra = set(source) - {"actkit", "rules"}
        if extra or source.get("actkit") != RULES_VERSION or not isinstance(source["rules"], list):
            raise RecipeError(f"rules: expected `actkit: {RULES_VERSION}` and `rules:` with a list, and nothing else.")
        return parse_rules(source["rules"])
    entries = [source] if isinstance(source, TrainingRule | str | Mapping) else list(source)
    return tuple(_rule(entry) for entry in entries)


def dump_rules(rules: Iterable[TrainingRule]) -> list[dict[str, Any]]:
    """The entries that `parse_rules` reads; every setting is written, defaults too."""
    return [{rule.name: rule.model_dump(mode="json")} for rule in rules]


def _read(path: Path) -> Any:
    content = read_yaml(path, "rules")
    if not isinstance(content, Mapping) or "rules" not in content:
        raise RecipeError(f"rules: {path} has no key `rules:`; write `actkit: {RULES_VERSION}` and a list of rules.")
    return content


def _rule(entry: Any) -> TrainingRule:
    if isinstance(entry, TrainingRule):
        return entry
    if isinstance(entry, str):
        entry = _from_text(entry)
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise RecipeError(f"rules: {shorten(repr(entry))} was given; give a rule, its name, or {{name: settings}}.")
    name, settings = next(iter(entry.items()))
    cls = registry.method_class(str(name))
    if not (isinstance(cls, type) and issubclass(cls, TrainingRule)):
        raise RecipeError(f"rules: {name!r} is not a training rule.")
    if not isinstance(settings or {}, Mapping):
        raise RecipeError(
            f"rules: {name}: the settings are {shorten(repr(settings))}; give a mapping of names to values."
        )
    try:
        return cls(**(settings or {}))
    except ValidationError as error:
        raise RecipeError(f"rules: {name}: {explain(error, cls)}") from error


def _from_text(text: str) -> dict[str, Any]:
    """'name:setting=value,setting=value', as the command line takes it."""
    name, colon, settings = text.partition(":")
    try:
        values = parse_yaml("{" + settings.replace("=", ": ") + "}", "rules", repr(text)) if colon else {}
    except RecipeError as error:
        raise RecipeError(f"rules: {text!r} was given; write it like 'name:setting=value,setting=value'.") from error
    return {name.strip(): values}


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
        """Take hook and rules off the model. Done when training ends; after an exception by leaving the `with`."""
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
        self.detach()

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
