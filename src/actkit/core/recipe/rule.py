"""The TrainingRule contract: its settings, what it does once it is at work, and rules by their names.

What puts rules to work on a model, in our loop and in others, is `core/train/rules.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from actkit.core.edit.edits import Edit
from actkit.core.ground import registry
from actkit.core.ground.errors import CheckpointError, RecipeError
from actkit.core.ground.yaml_files import explain, parse_call, read_yaml, shorten

RULES_VERSION = 1


class TrainingRule(BaseModel):
    """The settings of a rule.

    Attributes:
        keep: which weights a training under it ends with, if the user does not say: 'last' for a rule that trades loss
            for something else, so that the loss is least when it has worked least.
        only_reads: it changes no gradient and no weight (`testing.check_rule` holds it to that).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    keep: ClassVar[Literal["best", "last"]] = "best"
    only_reads: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The registered name.

        Raises:
            RecipeError: the class is not registered.
        """
        return registry.method_name(type(self))

    @property
    def label(self) -> str:
        """A short text for tables: the name and the settings that differ from the defaults."""
        given = ", ".join(f"{key}={value}" for key, value in self.model_dump(exclude_defaults=True).items())
        return f"{type(self).__name__}({given})"

    def trainable(self, model: nn.Module) -> Iterable[str] | None:
        """Name the parameters that train under this rule; all others are frozen meanwhile.

        Args:
            model: before the rule is attached. What `attach` itself adds or unfreezes is trained too.

        Returns:
            Names, or patterns of names such as '*norm*'; None for the parameters that require a gradient anyway.
        """
        return None

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make the optimizer of a training under this rule; a rule that leaves it to the training has no such method.

        In a loop of one's own, and in the Trainer, it is made by this before the rule is attached.

        Args:
            groups: of the parameters that train, each with `params`, `lr` and `weight_decay`.
        """
        raise NotImplementedError

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedRule:
        """Put the rule to work on a model.

        Args:
            model: in place.
            optimizer: for rules that act on moments (its step hooks) or on parameter groups.
            example: one batch, needed by rules that read sites of a model of unknown architecture.

        Raises:
            Exception: what the rule cannot do with this model; nothing is left behind then.
        """
        raise NotImplementedError


class AttachedRule:
    """A rule at work on one model, with its running state. A method that a rule does not need stays as it is here.

    In an optimizer step the calls are: `before_step`, `penalty` after each forward pass, `after_backward`, then the
    gradients are clipped and the optimizer steps, `after_step`, `over`.
    """

    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        """Return what to add to the loss of the forward pass that was just made; None for nothing.

        Args:
            mask: bool or integer [batch, length], which tokens are real; None if all are.
            batch: what the model was called on, labels included; None in a loop that does not say.
            output: what the model returned; None in a loop that does not say.

        Returns:
            A scalar with its graph: a mean over the batch, as the loss is, since it is scaled with the loss.
        """
        return None

    def before_step(self, progress: float) -> None:
        """Called before the forward passes of an optimizer step. progress: share of the steps that are done."""

    def after_backward(self, progress: float) -> None:
        """Change the gradients of a step, which are complete and not yet clipped.

        Args:
            progress: share of the steps that are done, as `before_step` was given.
        """

    def after_step(self, progress: float) -> None:
        """Called after the optimizer's step, while its gradients still stand."""

    def over(self) -> str | None:
        """Say why the training ends after the step that was just made; None if it goes on.

        What is true once stays true, in the state of the rule too. The rate's course stays that of all steps.
        """
        return None

    def report(self) -> dict[str, Any]:
        """Return what the rule has to say of the step that was just made, as JSON takes it.

        It is asked after the steps that are validated, before the validation; kept in the history, `training.json`.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs: tensors and JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Args:
            state: of a rule with the same settings.

        Raises:
            CheckpointError: it does not fit.
        """
        if state:
            raise CheckpointError(f"state: {', '.join(state)} was given; {type(self).__name__} keeps no state.")

    def detach(self) -> None:
        """Leave the model as it would be without the rule (hooks removed); what was trained stays."""

    def finish(self) -> Iterable[Edit]:
        """Return edits that end the training, such as a quantized layer for one that was trained to be rounded.

        It is asked once, after `detach`, on the weights that are kept; not after an exception. Each edit is applied as
        it is
        yielded and recorded on the model, so that it is saved, loaded and proved like those of a transform.
        """
        return ()


# -- rules by name -----------------------------------------------------------------------------------------------------


def parse_rules(source: Any) -> tuple[TrainingRule, ...]:
    """Read training rules.

        actkit: 1
        rules:
          - activation_penalty: {weight: 0.001}

    Args:
        source: a rule, 'name', 'name:setting=value,setting=value', {name: settings}, a list of these, or a YAML file.

    Raises:
        RecipeError: it names an unknown rule or setting, or a value out of bounds.
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
        entry = parse_call(entry, "rules")
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
