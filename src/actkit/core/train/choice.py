"""Which parameters train, and at which rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NoReturn

import torch
from torch import nn

from actkit.core.layers.activations import is_activation
from actkit.core.layers.keeps_dtype import kept_parameters
from actkit.core.recipe.rule import TrainingRule

Trainable = str | Sequence[str] | Callable[[nn.Module], Iterable[str]]  # patterns of names, or what gives them


def chooses(rules: Iterable[TrainingRule], trainable: Trainable | None) -> bool:
    """Whether the parameters that train are chosen, and not those that require a gradient anyway."""
    return trainable is not None or any(type(rule).trainable is not TrainingRule.trainable for rule in rules)


@contextmanager
def trained_parameters(
    model: nn.Module, rules: Iterable[TrainingRule] = (), trainable: Trainable | None = None
) -> Iterator[None]:
    """Let exactly the chosen parameters require a gradient; afterwards each is as it was.

    In a loop of one's own the optimizer is made inside. Without a choice nothing changes.

    Args:
        model: whose parameters are chosen.
        rules: what each names (`TrainingRule.trainable`) trains.
        trainable: names, patterns of names such as '*norm*', or a function from the model to these; they train too.

    Raises:
        ValueError: a pattern fits no parameter.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = _chosen(model, rules, trainable)
    try:
        if chosen is not None:
            for parameter, _ in before:
                parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        if chosen is not None:
            for parameter, required in before:
                parameter.requires_grad_(required)


def _chosen(model: nn.Module, rules: Iterable[TrainingRule], trainable: Trainable | None) -> set[int] | None:
    """The ids of the parameters that are named; None if nobody names any."""
    wanted = [("trainable", trainable(model) if callable(trainable) else trainable)]
    wanted += [(f"{type(rule).__name__}.trainable", rule.trainable(model)) for rule in rules]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen: set[int] | None = None
    for whose, given in wanted:
        if given is None:
            continue
        chosen = chosen or set()
        for pattern in [given] if isinstance(given, str) else given:
            found = {id(each) for name, each in parameters.items() if fnmatchcase(name, pattern)}
            if not found:
                _refuse_pattern(whose, pattern, parameters)
            chosen |= found
    return chosen


def _refuse_pattern(whose: str, pattern: str, names: Iterable[str]) -> NoReturn:
    raise ValueError(
        f"{whose}: {pattern!r} fits no parameter; give a name or a pattern such as '*norm*'. The names are "
        f"{', '.join(list(names)[:5])} ..."
    )


# -- groups ------------------------------------------------------------------------------------------------------------


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    learning_rate: float | None = None,
    learning_rates: Mapping[str, float] | None = None,
    without: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters for an optimizer, in groups of one weight decay and one learning rate.

    Weight matrices decay; biases, norms, scalars, coefficients that keep float32 (`KeepsDtype.keeps`) and whatever
    belongs to an activation function do not (decay would pull it towards another function). A module whose coefficients
    form a matrix says `weight_decay = False` (class attribute); that holds for the modules inside it too.

    For the Trainer: `Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, 0.01)), None))`.

    Args:
        model: whose parameters are grouped.
        weight_decay: of weight matrices.
        learning_rate: of the parameters that `learning_rates` does not name; None leaves it to the optimizer.
        learning_rates: of some parameters, by a pattern of their names; the first that fits counts.
        without: parameters to leave out.

    Raises:
        ValueError: a pattern fits no parameter.
    """
    spared = {id(model.get_parameter(name)) for name in kept_parameters(model)}
    for module in model.modules():
        if getattr(module, "weight_decay", None) is False:
            spared |= {id(parameter) for parameter in module.parameters()}
        elif "Norm" in type(module).__name__ or is_activation(module):
            spared |= {id(parameter) for parameter in module.parameters(recurse=False)}
    omitted = {id(parameter) for parameter in without}
    rates = dict(learning_rates or {})
    groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for pattern in rates:
        if not any(fnmatchcase(name, pattern) for name, _ in model.named_parameters()):
            _refuse_pattern("learning_rates", pattern, (name for name, _ in model.named_parameters()))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in omitted:
            continue
        spare = parameter.dim() < 2 or name.endswith("bias") or id(parameter) in spared
        rate = next((rates[pattern] for pattern in rates if fnmatchcase(name, pattern)), learning_rate)
        groups.setdefault((rate, spare), []).append(parameter)
    in_order = sorted(groups.items(), key=lambda item: item[0][1])  # those that decay first
    return [
        {"params": found, "weight_decay": 0.0 if spare else weight_decay} | ({} if rate is None else {"lr": rate})
        for (rate, spare), found in in_order
    ]


def add_new_parameters(optimizer: torch.optim.Optimizer, model: nn.Module, known: set[int], **rates: Any) -> bool:
    """Give an optimizer the parameters that have come to be trained: unfrozen, or added by a rule.

    Args:
        optimizer: whose own learning rate and weight decay are theirs, unless `rates` say otherwise.
        model: whose parameters these are.
        known: ids of the parameters that trained before, which the optimizer has or leaves out on purpose.
        rates: `weight_decay`, `learning_rate` and `learning_rates`, as in `parameter_groups`.

    Returns:
        Whether there were any.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    without = [parameter for parameter in model.parameters() if id(parameter) in known | held]
    decay = rates.pop("weight_decay", optimizer.defaults.get("weight_decay", 0.0))
    groups = parameter_groups(model, decay, without=without, **rates)
    for group in groups:
        optimizer.add_param_group(group)
    return bool(groups)
