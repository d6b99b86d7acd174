"""Optimizers: those of torch by name, one that a function makes, and Muon with AdamW beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.recipe.optimizer import OPTIMIZERS, OptimizerSettings
from actkit.core.recipe.rule import TrainingRule
from actkit.core.train.choice import parameter_groups

Optimizer = str | Mapping[str, Any] | OptimizerSettings | Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def describe(optimizer: Optimizer) -> Any:
    """An optimizer as JSON keeps it: its name and options, or the name of the function that makes it.

    Args:
        optimizer: as in `make_optimizer`.

    Raises:
        RecipeError: what `OptimizerSettings.parse` raises.
    """
    if _is_function(optimizer):
        function = getattr(optimizer, "func", optimizer)  # of a functools.partial
        return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
    return OptimizerSettings.parse(optimizer).dump()


def chosen_optimizer(rules: Iterable[TrainingRule], optimizer: Optimizer = "adamw") -> Optimizer:
    """What makes the optimizer of a training: a rule if one brings its own.

    Args:
        rules: of the training.
        optimizer: that was asked for; 'adamw' if none was.

    Raises:
        ValueError: two rules bring one, or one does and another was asked for.
    """
    own = [rule for rule in rules if type(rule).optimizer is not TrainingRule.optimizer]
    names = ", ".join(type(rule).__name__ for rule in own)
    if len(own) > 1:
        raise ValueError(f"rules: {names} bring an optimizer each; leave all but one out.")
    if own and optimizer != "adamw":
        raise ValueError(f"optimizer: {describe(optimizer)} was given, and {names} brings its own; leave one out.")
    return own[0].optimizer if own else optimizer


def make_optimizer(
    optimizer: Optimizer,
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    learning_rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters of a model.

    Args:
        optimizer: a name with options (`OptimizerSettings.parse`), or a function of parameter groups, each with
            `params`, `lr` and `weight_decay`, such as `functools.partial(torch.optim.SGD, momentum=0.9)`.
        model: whose parameters are trained.
        learning_rate: of those that `learning_rates` does not name.
        weight_decay: of weight matrices, in the way of the optimizer.
        learning_rates: of some parameters, by a pattern of their names.

    Raises:
        ValueError: an option or the weight decay is nothing for this optimizer, or a function makes something else.
    """
    groups = parameter_groups(model, weight_decay, learning_rate=learning_rate, learning_rates=learning_rates)
    if not groups:  # a rule is going to add what trains
        groups = [{"params": [], "lr": learning_rate, "weight_decay": weight_decay}]
    if _is_function(optimizer):
        made = optimizer(groups)  # type: ignore[operator]
        held = {id(each) for group in getattr(made, "param_groups", ()) for each in group["params"]}
        if not isinstance(made, torch.optim.Optimizer) or any(
            parameter.requires_grad and id(parameter) not in held for parameter in model.parameters()
        ):
            raise ValueError(
                f"optimizer: {describe(optimizer)} returned a {type(made).__name__} without all of the parameters; "
                f"return a torch.optim.Optimizer of the groups that it is given."
            )
        return made
    settings = OptimizerSettings.parse(optimizer)
    cls = OPTIMIZERS[settings.name]
    if weight_decay and "weight_decay" not in inspect.signature(cls).parameters:
        raise ValueError(f"weight_decay: {weight_decay} was given, and {settings.name} has none; pass weight_decay=0.")
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.options.items()
    }
    try:
        if settings.name == "muon":
            return MuonWithAdamW(groups, learning_rate, _hidden_matrices(model), **options)
        return cls(groups, lr=learning_rate, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"optimizer: {settings.name} does not take {settings.dump()!r}: {error}; correct the option."
        ) from error


def _is_function(optimizer: Any) -> bool:
    return callable(optimizer) and not isinstance(optimizer, OptimizerSettings)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices inside a model, AdamW for embeddings, the head and everything that is no matrix.

    Muon orthogonalises the update of a matrix and takes nothing else. Its steps are scaled to the size of AdamW's
    (`adjust_lr_fn="match_rms_adamw"`), so that one learning rate fits both.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, matrices: set[int], **options: Any) -> None:
        self.matrices = matrices  # ids of the parameters that Muon takes
        self.options = {"adjust_lr_fn": "match_rms_adamw", **options}
        self.parts: dict[bool, torch.optim.Optimizer] = {}
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; each goes to the part that takes it."""
        settings = {**self.defaults, **param_group}
        for by_muon in (True, False):
            found = [each for each in param_group["params"] if (id(each) in self.matrices) == by_muon]
            if not found:
                continue
            group = {**settings, "params": found, "by_muon": by_muon}
            if by_muon in self.parts:
                self.parts[by_muon].add_param_group(group)
            elif by_muon:
                self.parts[True] = torch.optim.Muon([group], lr=self.defaults["lr"], **self.options)
            else:
                self.parts[False] = torch.optim.AdamW([group], lr=self.defaults["lr"])
            self.param_groups.append(self.parts[by_muon].param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """Make one step with both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for by_muon, part in self.parts.items():  # groups and state are this one's, also after load_state_dict
            part.param_groups = [group for group in self.param_groups if group["by_muon"] == by_muon]
            part.state = self.state
            part.step()
        return loss


def _hidden_matrices(model: nn.Module) -> set[int]:
    """The ids of weight matrices that are neither an embedding nor the head of a language model."""
    outside: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found = getattr(model, name, lambda: None)()
        except NotImplementedError:  # a transformers model without tokens
            continue
        outside += [found] if isinstance(found, nn.Module) else []
    left_out = {id(parameter) for module in outside for parameter in module.parameters()}
    return {id(each) for each in model.parameters() if each.dim() == 2 and id(each) not in left_out}


# -- state -------------------------------------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """The moments by the name of their parameter, and the numbers that an optimizer keeps in its groups.

    Args:
        optimizer: any.
        names: of the parameters, by their id.
    """
    moments = {names[id(parameter)]: dict(state) for parameter, state in optimizer.state.items() if state}
    groups = {str(index): _numbers(group) for index, group in enumerate(optimizer.param_groups)}
    return {"moments": moments, "groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], names: Mapping[int, str]) -> None:
    """Take back what `optimizer_state` gave.

    Args:
        optimizer: made as it was then.
        state: of it.
        names: of the parameters, by their id.
    """
    for index, group in enumerate(optimizer.param_groups):
        group.update(_numbers(state["groups"].get(str(index), {})))
        for parameter in group["params"]:
            moments = state["moments"].get(names.get(id(parameter), ""))
            if moments is not None:
                optimizer.state[parameter] = {
                    key: value.to(parameter.device if value.dim() else "cpu") if isinstance(value, Tensor) else value
                    for key, value in moments.items()
                }


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if isinstance(value, bool | int | float | Tensor)}
