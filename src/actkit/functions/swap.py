"""Swap the activation functions of a model: `swap(model, "silu", "relu")`.

A transform like any other, so that it stands in recipes, is undone, saved and loaded; `swap` is its short form. The
function of a model changes with it, so it is usually followed by training (`core/train/training.py`). What is
calibrated on the *original* model (most transforms) should come in a run of its own, after the swap and the training.
If all activations that a transformers config names (`hidden_act`, `activation_function`) change to one that has a
name, the config says so too: that of transformers, or ours, which transformers then knows
(`core/layers/hidden_act.py`). A new module whose class takes `channels` is told how many reach its place, and by `dim`,
if it takes that, which dimension they are: the MLP's width, or what one pass over the first batch finds.

When to use it: to change the activation function of a model before it is trained on, such as SiLU to ReLU for exact
zeros, or to one that is learned.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

from pydantic import PrivateAttr, ValidationError, field_validator
from torch import nn
from transformers.activations import ACT2FN

from actkit.core.edit.edits import Configure, Edit, Note, Replace, ReplaceTied, Skip
from actkit.core.forward.batch import forward
from actkit.core.forward.example import make_example
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground import registry
from actkit.core.ground.errors import EditError, RecipeError
from actkit.core.ground.modules import is_within, tied_copy
from actkit.core.ground.yaml_files import explain
from actkit.core.layers.activations import Activation, function_names, is_activation, name_of, without_inner
from actkit.core.layers.hidden_act import CONFIG_KEYS, config_name
from actkit.core.model.anatomy import Block, Linear
from actkit.core.model.experts import ExpertList
from actkit.core.model.tracing import trace
from actkit.core.recipe.runner import Applied, apply
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform

Where = str | type[nn.Module]
New = str | Callable[..., nn.Module]


class Swap(Transform):
    """Replace activation functions.

    A module that stands at several paths gets one successor, and opened experts get copies that share its parameters.
    What stands inside another activation (the function under a threshold) goes with it and matches nothing by itself.

    A norm, dropout, pooling or any other module of torch or transformers that is no activation function is refused; one
    of a class of your own, named by its path or class, is taken at your word, with a note. If learned parameters come
    to be shared, because the model calls one module more than once, a note says so.

    Attributes:
        where: which; each entry is the name of a function ('silu', or what transformers calls it), the registered name
            of a module, its path, or a pattern of paths ('model.layers.[0-3].*'; patterns match activation functions
            only).
        new: the name of an element-wise function (entry-point group `actkit.functions`), the registered name of a
            module that is made without arguments, or {"module": registered name, "spec": its JSON arguments}; of these
            `channels` and `dim` may be left out.
    """

    where: tuple[str, ...]
    new: str | dict[str, Any]

    tags: ClassVar[Tags] = Tags(parts=False)
    not_proposed: ClassVar[str] = "another activation function changes the model, and pays only after training"
    _factory: Callable[..., nn.Module] | None = PrivateAttr(default=None)
    _places: dict[str, tuple[int, nn.Module]] = PrivateAttr(default_factory=dict)  # path -> its block, what is there
    _all: dict[str, nn.Module] = PrivateAttr(default_factory=dict)  # the same, and kept
    _batch: Any = PrivateAttr(default=None)  # what the model can be called with, None if none was given
    _told: dict[str, dict[str, int]] = PrivateAttr(
        default_factory=dict
    )  # path -> channels and dim for what comes there
    _last: list[Configure | Note] = PrivateAttr(default_factory=list)  # after the last block
    _calls: dict[int, int] | None = PrivateAttr(default=None)  # id of a module -> how often a pass calls it
    _made: dict[int, tuple[nn.Module, nn.Module]] = PrivateAttr(default_factory=dict)  # id of old -> old, new

    @field_validator("where", mode="before")
    @classmethod
    def _several(cls, where: Any) -> Any:
        where = (where,) if isinstance(where, str) else where
        if isinstance(where, list | tuple) and not where:
            raise ValueError("it is empty; name a function, a path or a pattern")
        return where

    @field_validator("new")
    @classmethod
    def _known(cls, new: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(new, dict) and set(new) != {"module", "spec"}:
            raise ValueError("give a module as {'module': registered name, 'spec': its arguments}")
        if isinstance(new, str) and new in function_names():
            Activation(new)  # raises what is wrong with it
        else:
            name = new if isinstance(new, str) else new["module"]
            try:
                registry.module_class(name)
            except ValueError as error:
                near = difflib.get_close_matches(str(name), function_names(), n=3)
                hint = f" Did you mean {', '.join(near)}?" if near else ""
                raise ValueError(
                    f"it is none of the functions {', '.join(function_names())}, and {error}{hint}"
                ) from error
        return new

    @classmethod
    def of(cls, model: nn.Module, where: Where | Iterable[str], new: New) -> Self:
        """Make the transform from a class as `where`, or a factory as `new`.

        Args:
            model: whose modules are named.
            where: the name of a function, a class of modules, a path or pattern of paths, or several of these texts.
            new: a name, or a class or function that makes a module for each place, registered under `actkit.modules`;
                if it takes `channels` (and `dim`), it is given them.

        Returns:
            The transform.

        Raises:
            EditError: no module of the model has that class.
            RecipeError: an unknown name, or a module that is not registered.
            TypeError: `new` is of another kind.
        """
        if isinstance(where, type):
            paths = [path for path, module in _modules(model) if isinstance(module, where)]
            if not paths:
                raise EditError(f"where: the model has no {where.__name__}; {_listed(model)}.")
            where = paths
        chosen = (where,) if isinstance(where, str) else tuple(where)
        if isinstance(new, str):
            return _checked(cls, where=chosen, new=new)
        if isinstance(new, nn.Module) or not callable(new):
            raise TypeError(
                f"new: {type(new).__name__} was given; give a name, or a function that makes a module for each place."
            )
        sample = _sample(new)
        if not isinstance(sample, nn.Module):
            raise TypeError(f"new: it made a {type(sample).__name__}; it must make a torch.nn.Module.")
        name = registry.module_name(type(sample))
        told = _taken(new)  # which each place says for itself
        spec = {key: value for key, value in sample.spec().items() if key not in told}  # type: ignore[operator]
        swap = _checked(cls, where=chosen, new={"module": name, "spec": spec})
        swap._factory = new
        return swap

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        """Find the places.

        Args:
            trial: the model as it is.
            data: batches; the first one tells how often each module is called.

        Raises:
            EditError: an entry of `where` matches nothing, or the new module needs channels that nothing tells.
        """
        chosen = self._chosen(trial.model)
        blocks = trial.anatomy.blocks
        planned = self.model_copy()
        planned._made, planned._places = {}, {}
        for path, module in chosen.items():
            inside = (block.index for block in blocks if is_within(path, block.path))
            planned._places[path] = (next(inside, 0), module)
        planned._all, planned._batch = dict(chosen), next(iter(data), None)
        planned._told = planned._channels(trial, chosen)
        planned._last = [
            *self._configured(trial.model, set(chosen)),
            *(
                Note(path, f"taken for an activation function, as it was named: a {type(module).__name__}")
                for path, module in chosen.items()
                if not (is_activation(module) or name_of(module))
            ),
        ]
        return planned

    def targets(self, block: Block) -> Iterable[Linear]:
        return ()

    def conflicts(self, earlier: Transform) -> str | None:
        if {"select", "inputs"} & set(earlier.slots):
            return "its thresholds or scales were calibrated on activations that the swap would change; swap first"
        return None

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        """The block's own activations, so that the blocks before it are calibrated first; the rest with block 0."""
        together: dict[int, list[Replace]] = {}  # what has parameters in common is replaced at once
        for path in [path for path, (index, _) in self._places.items() if index == block.index]:
            old = self._places.pop(path)[1]
            experts = _experts_around(path, block.root)
            key = id(old if experts is None else experts)
            fresh = key not in self._made
            if fresh:
                self._made[key] = (old, self._fresh(path, old))
                if any(True for _ in self._made[key][1].parameters()):
                    yield from self._shared_parameters(old, block.root)
            new = self._made[key][1].train(old.training)
            for index, now in enumerate(_paths_of(old, path, block.root)):
                another = index or not fresh
                apart = another and _experts_around(now, block.root) is not None  # each expert has its own module
                one = Replace(now, tied_copy(new) if apart else new)
                together.setdefault(next((id(each) for each in old.parameters()), id(one)), []).append(one)
        for edits in together.values():
            yield edits[0] if len(edits) == 1 else ReplaceTied(tuple(edits))
        if not self._places:
            yield from self._last
            self._made, self._last, self._all = {}, [], {}

    def _shared_parameters(self, old: nn.Module, model: nn.Module) -> Iterator[Note]:
        """Note that the learned parameters of what follows `old` serve several places."""
        if self._calls is None:
            self._calls = _calls(model, self._all.values(), self._batch)
        paths = [path for path, module in self._all.items() if module is old]
        count = self._calls.get(id(old))
        if count is None:
            yield Note(
                paths[0], "not known whether the model calls it more than once, which would share its parameters"
            )
        elif count > 1 or len(paths) > 1:
            where = f"it stands at {', '.join(paths)} and " if len(paths) > 1 else ""
            yield Note(
                paths[0],
                f"{where}is called {count} times in a pass, so that these places share its learned parameters; give "
                f"the model a module for each place if they shall learn apart",
            )

    def _fresh(self, path: str, old: nn.Module) -> nn.Module:
        told = self._told.get(path, {})
        try:
            if self._factory is not None:
                return self._factory(**told)
            if isinstance(self.new, dict):
                return registry.module_class(self.new["module"]).from_spec({**told, **self.new["spec"]}, old)
            return Activation(self.new) if self.new in function_names() else registry.module_class(self.new)(**told)
        except ValueError as error:  # what the class says of its settings
            raise EditError(f"new: nothing can be made for {path}: {error}") from error

    @property
    def _maker(self) -> Any:
        """The class or function that makes what is put in."""
        if self._factory is not None:
            return self._factory
        name = self.new if isinstance(self.new, str) else self.new["module"]
        return Activation if name in function_names() else registry.module_class(name)

    def _channels(self, trial: Trial, chosen: Mapping[str, nn.Module]) -> dict[str, dict[str, int]]:
        """How many channels reach each place and which dimension they are, for a new module that takes them."""
        given = {} if isinstance(self.new, str) or self._factory is not None else self.new["spec"]
        taken = _taken(self._maker) - set(given)
        if "channels" not in taken:
            return {}
        view = trial.anatomy
        found = {
            mlp.activation: {"channels": mlp.width, "dim": -1}
            for block in (view.blocks if view.architecture != "traced" else ())
            for _, mlp in block.mlps()
        }
        if not set(chosen) <= set(found):
            found = _traced(trial.model, self._batch) | found
        kept: dict[str, dict[str, int]] = {}
        for path, module in chosen.items():
            known = [found[other] for other, each in chosen.items() if each is module and other in found]
            if known and all(each == known[0] for each in known):
                kept[path] = {key: known[0][key] for key in sorted(taken)}
            elif "channels" in _needed(self._maker):
                raise EditError(
                    f"new: it needs to be told its channels, and nothing says how many reach {path}, or its calls "
                    f"differ in it; give data that the model can be called with, or channels by the spec."
                )
        return kept

    def _chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for entry in self.where:
            matches = {path: module for path, module in without_inner(model) if _matches(entry, path, module)}
            if not matches:
                raise EditError(f"where: {entry!r} matches no activation function; {_listed(model)}.")
            found |= matches
        for path, module in found.items():
            weights = [name for name, parameter in module.named_parameters() if parameter.dim() > 1]
            if path == "" or (not is_activation(module) and (weights or _is_something_else(module))):
                raise EditError(f"where: {path or 'the model'} is a {type(module).__name__}, no activation function.")
        return found

    def _configured(self, model: nn.Module, chosen: set[str]) -> Iterator[Configure | Note]:
        """What becomes of the config's names of functions."""
        config: Any = getattr(model, "config", None)
        for key in CONFIG_KEYS:
            value = getattr(config, key, None)
            if not isinstance(value, str) or value not in ACT2FN:
                continue
            named = {path for path, module in without_inner(model) if _matches(value, path, module)}
            if not named & chosen:
                continue
            name = config_name(self.new)
            if named <= chosen and name is not None:
                yield Configure(key, name)
            elif named <= chosen:
                yield Note(f"config.{key}", f"stays {value!r}, as no name says the new function with its settings")
            else:
                yield Note(f"config.{key}", f"stays {value!r}, which {len(named - chosen)} activations still are")


def swap(
    model: nn.Module,
    where: Where | Iterable[str],
    new: New,
    *,
    undo: str | None = None,
    inplace: bool = True,
) -> Applied:
    """Replace activation functions: `swap(model, "silu", "relu")`, `swap(model, nn.GELU, CRReLU)`.

    Args:
        model: changed in place, unless `inplace=False`.
        where: the name of a function, a class of modules, a path or pattern of paths, or several of these texts.
        new: a name, or a function that makes a registered module for each place.
        undo: as in `apply`.
        inplace: as in `apply`.

    Returns:
        What `apply` returns.

    Raises:
        EditError: nothing matches.
        RecipeError: an unknown name, or a module that is not registered.
    """
    return apply(model, Swap.of(model, where, new), undo=undo, inplace=inplace, progress=False)


def _checked(cls: type[Swap], **settings: Any) -> Any:
    try:
        return cls(**settings)
    except ValidationError as error:
        raise RecipeError(f"swap: {explain(error, cls)}") from error


SAMPLE = {"channels": 64, "dim": -1}  # what a sample is told that only shows which module it is


def _taken(make: Any) -> set[str]:
    """Which of `channels` and `dim` a class or a function takes."""
    return set(SAMPLE) & set(inspect.signature(make).parameters)


def _needed(make: Any) -> set[str]:
    """Those that have no default."""
    parameters = inspect.signature(make).parameters
    return {name for name in _taken(make) if parameters[name].default is inspect.Parameter.empty}


def _sample(new: Callable[..., nn.Module]) -> Any:
    """One of what a class or function makes, which only shows which module it is."""
    if "channels" in _needed(new):
        with suppress(ValueError):  # of groups that do not divide that many
            return new(**{name: SAMPLE[name] for name in _needed(new)})
        return new(**{name: {**SAMPLE, "channels": 5040}[name] for name in _needed(new)})
    return new(**{name: SAMPLE[name] for name in _needed(new)})


def _traced(model: nn.Module, batch: Any) -> dict[str, dict[str, int]]:
    """The channels at the input of each module that one pass calls with a known number; empty if none can be run."""
    try:
        axes = trace(model, make_example(model) if batch is None else batch).axes
    except Exception:  # whatever a model raises that cannot be called so; who needs the numbers refuses
        return {}
    return {
        path: {"channels": axis.width, "dim": axis.channels - axis.dimensions}
        for (where, path), axis in axes.items()
        if where == "input" and axis.channels is not None and axis.width is not None
    }


def _is_something_else(module: nn.Module) -> bool:
    """Whether a module is known to be no activation function; that of an unknown class may be one."""
    kind = type(module)
    if is_activation(module) or name_of(module) is not None:
        return False
    known = kind.__module__.startswith(("torch.", "transformers.", "actkit."))
    return known or any(word in kind.__name__ for word in ("Norm", "Drop", "Pool"))


def _calls(model: nn.Module, modules: Iterable[nn.Module], batch: Any) -> dict[int, int]:
    """How often one pass over `batch`, or over inputs made up, calls each module, by id; empty if none can be run."""
    counts = {id(module): 0 for module in modules}

    def count(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        counts[id(module)] += 1

    paths = {id(module): path for path, module in _modules(model) if id(module) in counts}
    try:
        with evaluating(model), hooked(model, after=dict.fromkeys(paths.values(), count)):
            forward(model, make_example(model) if batch is None else batch)
    except Exception:  # whatever a model raises that cannot be called so: the note says that nothing is known
        return {}
    return counts


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every path with its module; one that stands at several paths comes with each."""
    return model.named_modules(remove_duplicate=False)


def _paths_of(module: nn.Module, path: str, model: nn.Module) -> list[str]:
    """Where a module that was at `path` stands now. Raises EditError if it stands nowhere."""
    now = dict(_modules(model))
    if now.get(path) is module:
        return [path]
    parent = path.rpartition(".")[0]
    experts = now.get(parent)
    if isinstance(experts, ExpertList):  # opened for another transform: each expert has a copy
        return [f"{parent}.{index}.activation" for index in range(len(experts))]
    found = [other for other, each in now.items() if each is module]  # wrapped by another transform
    if not found:
        raise EditError(f"where: {path} was replaced by another transform of the recipe; swap before it.")
    return found


def _experts_around(path: str, model: nn.Module) -> ExpertList | None:
    """The opened experts of one of which a module is the activation; None elsewhere."""
    experts = path.split(".")[:-2]
    found = dict(_modules(model)).get(".".join(experts)) if path.count(".") > 1 else None
    return found if isinstance(found, ExpertList) else None


def _matches(entry: str, path: str, module: nn.Module) -> bool:
    if entry == path and path:
        return True
    if not is_activation(module):
        return False
    if entry in function_names():
        return name_of(module) == entry
    if entry in registry.module_names():
        return isinstance(module, registry.module_class(entry))
    if entry in ACT2FN:
        theirs = ACT2FN[entry]
        same = name_of(theirs)
        return name_of(module) == same if same is not None else type(module) is type(theirs)
    return fnmatchcase(path, entry)


def _listed(model: nn.Module) -> str:
    """What could have been named."""
    names: dict[str, str] = {}
    for path, module in without_inner(model):
        if is_activation(module):
            names.setdefault(name_of(module) or type(module).__name__, path)
    found = ", ".join(f"{name} (first at {path})" for name, path in names.items())
    return f"activation modules of this model are {found}" if found else "this model has no activation modules"
