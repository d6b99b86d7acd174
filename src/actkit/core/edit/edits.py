"""Edits: the unit that is applied, undone, saved and replayed at load.

A changed model is its base architecture plus an ordered list of edits. Values are in the weights file; the list holds
structure only: the modules that were put in (a registered name and JSON arguments, never an import path) and the
settings of the config that differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from actkit.core.edit.resizing import resized
from actkit.core.forward.example import Inputs
from actkit.core.forward.named_functions import foreign_attention
from actkit.core.ground import offload, registry
from actkit.core.ground.errors import EditError
from actkit.core.ground.modules import is_within, names_of_parameters
from actkit.core.layers import attention_function
from actkit.core.layers.activations import mixes_of
from actkit.core.layers.hidden_act import enter_those_of
from actkit.core.layers.known_layers import hooks_of
from actkit.core.layers.linear import ActLinear


@dataclass(frozen=True, eq=False)
class Replace:
    """Put a module at a path.

    Attributes:
        path: of the module that it takes the place of.
        module: offers `spec()` and `from_spec()`, and is registered by name.
    """

    path: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class ReplaceTied:
    """Put modules at several paths at once, because they share parameters: an embedding and its tied head.

    In a checkpoint it stands as that many replacements.

    Attributes:
        parts: a replacement each.
    """

    parts: tuple[Replace, ...]


@dataclass(frozen=True, eq=False)
class Restore:
    """Put a layer back that is like the one before an edit: the record forgets that edit, and those inside of it since.

    Attributes:
        path: of the module that an edit put in.
        layer: of the class, the settings and the shapes of the layer that the edit took the place of.
        otherwise: what `Replace` puts there instead, if no recorded edit put in what stands at the path.
    """

    path: str
    layer: nn.Module
    otherwise: nn.Module


@dataclass(frozen=True, eq=False)
class Insert:
    """Put a module where none is: a child of a module that looks for it by name.

    Attributes:
        path: of the new module; its parent exists.
        module: as in `Replace`.
    """

    path: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Resize:
    """Keep some outputs and inputs of the layer at a path, which keeps its class.

    Attributes:
        path: of the layer.
        outputs: indices of those that stay, in their new order; None for all.
        inputs: the same.
    """

    path: str
    outputs: Tensor | None = None
    inputs: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Set:
    """Give a parameter or buffer other values.

    Attributes:
        parameter: its name.
        tensor: of the same shape and dtype.
    """

    parameter: str
    tensor: Tensor


@dataclass(frozen=True)
class Configure:
    """Set an entry of the model's config (an attention implementation, `hidden_act`, a cache class).

    Attributes:
        key: of `model.config`, or "attn_implementation".
        value: a JSON value. Of "attn_implementation" a name of transformers' own, or a function registered under
            `actkit.attentions` with its settings: {"name": "lssar", "power": 15}.
    """

    key: str
    value: Any


@dataclass(frozen=True)
class Skip:
    """Say in the report that something is left as it is; not an edit.

    Attributes:
        path: of what is left.
        reason: why.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Note:
    """Say in the report something worth reading (a search's outcome); not an edit.

    Attributes:
        path: of what it is about.
        text: what to say.
        values: the same as numbers (losses of choices, a curve), as JSON takes them.
    """

    path: str
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)


Edit = Replace | ReplaceTied | Restore | Insert | Resize | Set | Configure
Undo = Callable[[], None]
Shared = dict[int, list[str]]

ATTENTION = "attn_implementation"  # a setting that is no entry of the config


def get_module(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule at `path` ('' is the model).

    Args:
        model: any module.
        path: as `named_modules` lists it.

    Raises:
        EditError: there is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise EditError(f"path: the model has no module {path!r}; list them with model.named_modules().") from error


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`.

    Args:
        model: changed in place.
        path: of one of its submodules.
        module: takes that place.

    Raises:
        EditError: the path is '' (the model itself), or nothing holds it.
    """
    if not path:
        raise EditError("path: the model itself ('') cannot be replaced; name one of its submodules.")
    parent, _, name = path.rpartition(".")
    owner = get_module(model, parent)
    setattr(owner, name, module)
    if isinstance(owner, nn.TransformerEncoderLayer) and name == "activation":
        # torch's fused layer computes the function that this number names, and calls no module
        owner.activation_relu_or_gelu = {nn.ReLU: 1, nn.GELU: 2}.get(type(module), 0)


@contextmanager
def standing_in(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let modules stand in for others as long as a context lasts; it is no edit, and nothing is recorded of it.

    Args:
        model: changed in place, and as before at the end, also after an exception.
        modules: by path; none lies inside of another.

    Raises:
        EditError: the model has no module at a path.
    """
    before = {path: get_module(model, path) for path in modules}
    try:
        for path, module in modules.items():
            set_module(model, path, module)
        yield
    finally:
        for path, module in before.items():
            set_module(model, path, module)


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer that a checkpoint keeps.

    Args:
        model: any module.
        name: as `state_dict` lists it.

    Raises:
        EditError: there is none.
    """
    parent, _, leaf = name.rpartition(".")
    module = get_module(model, parent)
    tensor = module._parameters.get(leaf, module._buffers.get(leaf))
    if tensor is None or leaf in module._non_persistent_buffers_set:
        raise EditError(f"parameter: the model has no parameter or buffer {name!r}; list them with state_dict().")
    return tensor


def shared_parameters(model: nn.Module) -> Shared:
    """Return the names of each parameter that has several, by the parameter's `id`."""
    known = dict(model.named_parameters(remove_duplicate=False))
    shared = {id(known[names[0]]): names for names in names_of_parameters(model) if len(names) > 1}
    for same in offload.shared_tensors(model) if offload.is_offloaded(model) else ():
        shared |= {id(known[name]): same for name in same if name in known}  # an object each, while they are elsewhere
    return shared


def apply_edit(model: nn.Module, edit: Edit, *, remember: bool = True, shared: Shared | None = None) -> Undo | None:
    """Apply one edit in place.

    Args:
        model: changed in place.
        edit: what to change.
        remember: keep what is needed to undo it.
        shared: what `shared_parameters(model)` gave, for whoever applies many edits; None reads it off the model.

    Returns:
        The function that undoes it, or None if nothing was to be remembered.

    Raises:
        EditError: a path is unknown, a shape or dtype differs, or only one side of tied parameters would change.
    """
    if isinstance(edit, Configure):
        return _configure(model, edit)
    if isinstance(edit, Set):
        return _set(model, edit, remember, shared)
    if isinstance(edit, Replace | ReplaceTied):
        return _replace(model, parts_of(edit), remember, shared)
    if isinstance(edit, Insert):
        return _insert(model, edit)
    if isinstance(edit, Resize):
        old = get_module(model, edit.path)
        offload.refuse_offloaded(old, f"{edit.path} is to become narrower")
        return _put_plain(model, edit.path, resized(edit.path, old, edit.outputs, edit.inputs), remember, shared)
    if isinstance(edit, Restore):
        return _put_plain(model, edit.path, edit.layer, remember, shared)
    raise EditError(
        f"edit: {type(edit).__name__} was given, allowed are Replace, ReplaceTied, Restore, Insert, Resize, Set and "
        f"Configure."
    )


def parts_of(edit: Replace | ReplaceTied) -> tuple[Replace, ...]:
    """Return the replacements that an edit consists of."""
    return edit.parts if isinstance(edit, ReplaceTied) else (edit,)


@contextmanager
def temporarily(model: nn.Module, edits: Iterable[Edit]) -> Iterator[nn.Module]:
    """Apply edits for as long as a context lasts.

        with temporarily(model, edits):
            measure(model)

    Args:
        model: changed in place, and as before at the end, also after an exception.
        edits: applied in their order.

    Yields:
        The model.
    """
    undos: list[Undo] = []
    shared = shared_parameters(model)
    try:
        for edit in edits:
            undo = apply_edit(model, edit, shared=shared)
            if undo is not None:
                undos.append(undo)
        yield model
    finally:
        for undo in reversed(undos):
            undo()


def place_of(described: Mapping[str, Any]) -> str | None:
    """Return the path of the module that a described edit put in, put back or resized; None if it did neither.

    Args:
        described: what `describe` gave.
    """
    return next((described[kind] for kind in ("replace", "insert", "resize", "restore") if kind in described), None)


def settled(described: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the edits that still count: what was restored is as before the edit that put something in its place.

    Args:
        described: what `describe` gave of each edit, in their order.
    """
    found: list[dict[str, Any]] = []
    for entry in described:
        path = entry.get("restore")
        if path is None:
            found.append(entry)
            continue
        last = max(index for index, each in enumerate(found) if each.get("replace") == path)
        inside = [is_within(str(place_of(each) or each.get("set", "")), path) for each in found]
        found = [each for index, each in enumerate(found) if index < last or not inside[index]]
    return found


def describe(edit: Edit, model: nn.Module | None = None) -> dict[str, Any]:
    """Return the JSON form of an edit, as a checkpoint keeps it.

    Args:
        edit: what was or will be applied.
        model: before the edit; its setting is kept with the new one, so that loading builds the same base model and
            only
            then changes the setting.
    """
    if isinstance(edit, Replace):
        return {"replace": edit.path, **describe_module(edit.module)}
    if isinstance(edit, Restore):
        return {"restore": edit.path}
    if isinstance(edit, Insert):
        return {"insert": edit.path, **describe_module(edit.module)}
    if isinstance(edit, Resize):
        sizes = {"outputs": edit.outputs, "inputs": edit.inputs}
        return {"resize": edit.path, **{name: len(kept) for name, kept in sizes.items() if kept is not None}}
    if isinstance(edit, Set):
        return {"set": edit.parameter}
    if isinstance(edit, Configure) and edit.key == ATTENTION:
        return {"configure": edit.key, "value": _describe_attention(edit.value)}
    if isinstance(edit, Configure):
        before = getattr(getattr(model, "config", None), edit.key, None)
        kept = {"before": before} if model is not None and _is_json(before) else {}
        return {"configure": edit.key, "value": edit.value, **kept}
    raise EditError(
        f"edit: {type(edit).__name__} was given, allowed are Replace, Restore, Insert, Resize, Set and Configure."
    )


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Return the registered name and the spec of a module.

    Args:
        module: what an edit puts in.

    Raises:
        EditError: it has no `spec()` or `from_spec()`.
        RecipeError: its class is not registered.
    """
    name = registry.module_name(type(module))
    if not (hasattr(module, "spec") and hasattr(module, "from_spec")):
        raise EditError(f"module: {type(module).__name__} lacks spec() or from_spec(), so it could never be loaded.")
    return {"module": name, "spec": module.spec()}  # type: ignore[operator]


def replay(model: nn.Module, described: list[dict[str, Any]]) -> None:
    """Give a freshly built base model the structure that described edits lead to; values come later.

    Args:
        model: changed in place.
        described: what `describe` gave of each edit.

    Raises:
        EditError: an entry is none of replace, insert, resize, set, configure.
    """
    for entry in described:
        if "replace" in entry:
            path = entry["replace"]
            factory = registry.module_class(entry["module"])
            set_module(model, path, factory.from_spec(entry["spec"], get_module(model, path)))  # type: ignore[attr-defined]
        elif "insert" in entry:
            factory = registry.module_class(entry["module"])
            _insert(model, Insert(entry["insert"], factory.from_spec(entry["spec"], None)))  # type: ignore[attr-defined]
        elif "resize" in entry:
            path = entry["resize"]
            narrower = resized(path, get_module(model, path), entry.get("outputs"), entry.get("inputs"))
            set_module(model, path, narrower)
        elif "configure" in entry:
            _configure(model, Configure(entry["configure"], entry["value"]))
        elif "set" not in entry:
            raise EditError(
                f"edit: {entry!r} is none of replace, insert, resize, set, configure; the checkpoint may be newer than "
                f"actkit."
            )


def _configure(model: nn.Module, edit: Configure) -> Undo:
    config = getattr(model, "config", None)
    if config is None:
        raise EditError(f"configure: {edit.key!r} was to be set, but {type(model).__name__} has no config.")
    if edit.key == ATTENTION:  # the model dispatches on it, so it has its own setter
        return _set_attention(model, edit.value)
    if not hasattr(config, edit.key):
        raise EditError(f"configure: the config has no key {edit.key!r}; see model.config.to_dict().")
    if not _is_json(edit.value):
        kind = type(edit.value).__name__
        raise EditError(f"configure {edit.key}: a {kind} was given; give a JSON value, which a checkpoint can keep.")
    before = getattr(config, edit.key)
    enter_those_of({edit.key: edit.value})
    setattr(config, edit.key, edit.value)
    return lambda: setattr(config, edit.key, before)


def _set_attention(model: nn.Module, value: Any) -> Undo:
    function = attention_function.make_function(value)
    before = attention_function.function_of(model)
    if function is not None and before is not None and not function.may_replace(before):
        raise EditError(
            f"configure attn_implementation: the attention is computed by {before.spec()['name']!r}, which "
            f"{function.spec()['name']!r} would silence; leave one of the two out."
        )
    name = value if function is None else attention_function.register(function)
    earlier = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(name)  # type: ignore[operator]
    if function is not None and model.config._attn_implementation != name:  # type: ignore[union-attr]
        raise EditError(
            f"configure attn_implementation: {type(model).__name__} computes attention by itself, not "
            f"through transformers' attention functions, so it cannot be {name!r}."
        )
    return lambda: model.set_attn_implementation(earlier)  # type: ignore[operator]


def _describe_attention(value: Any) -> Any:
    function = attention_function.make_function(value)
    if function is not None:
        return attention_function.describe_function(function)
    foreign = foreign_attention(value)
    if foreign is not None:
        raise EditError(
            f"configure attn_implementation: {value!r} is computed by {foreign}, which a fresh process would not know; "
            f"register a class of it under {registry.ATTENTIONS} (docs/plug-ins.md), and give its name."
        )
    return value


def _set(model: nn.Module, edit: Set, remember: bool, shared: Shared | None) -> Undo | None:
    tensor = get_tensor(model, edit.parameter)
    if tensor.shape != edit.tensor.shape or tensor.dtype != edit.tensor.dtype:
        raise EditError(
            f"set {edit.parameter}: the model holds {tensor.dtype} {tuple(tensor.shape)}, "
            f"the edit {edit.tensor.dtype} {tuple(edit.tensor.shape)}; both must agree."
        )
    _refuse_tied(model, [tensor], [edit.parameter], shared)
    _drop_packed(model, edit.parameter)
    before = offload.value_of(model, edit.parameter, tensor).detach().clone() if remember else None
    offload.write(model, edit.parameter, edit.tensor)

    def undo() -> None:
        offload.write(model, edit.parameter, before)  # type: ignore[arg-type]
        _drop_packed(model, edit.parameter)

    return undo if remember else None


def _replace(model: nn.Module, edits: Sequence[Replace], remember: bool, shared: Shared | None) -> Undo | None:
    olds = [get_module(model, edit.path) for edit in edits]
    paths = [edit.path for edit in edits]
    for edit, old in zip(edits, olds, strict=True):
        describe(edit)  # a module without a name or a spec could be applied but never loaded again
        _refuse_mixing(model, edit.path, edit.module)
        _refuse_tied(model, old.parameters(), paths, shared)
        refuse_hooks(edit.path, old, edit.module)
    for edit in edits:
        set_module(model, edit.path, edit.module)

    def undo() -> None:
        for path, old in zip(paths, olds, strict=True):
            set_module(model, path, old)
            offload.settle(model, path)

    return undo if remember else None


def _put_plain(model: nn.Module, path: str, layer: nn.Module, remember: bool, shared: Shared | None) -> Undo | None:
    """Put in a layer that needs no name in a checkpoint."""
    old = get_module(model, path)
    _refuse_tied(model, old.parameters(), [path], shared)
    refuse_hooks(path, old)
    set_module(model, path, layer)
    return (lambda: set_module(model, path, old)) if remember else None


def _insert(model: nn.Module, edit: Insert) -> Undo:
    describe_module(edit.module)
    _refuse_mixing(model, edit.path, edit.module)
    parent, _, name = edit.path.rpartition(".")
    owner = get_module(model, parent)
    if hasattr(owner, name):
        raise EditError(f"insert {edit.path}: something is there already; undo what put it there, or replace it.")
    owner.add_module(name, edit.module)
    return lambda: delattr(owner, name)


def _refuse_tied(model: nn.Module, changed: Iterable[Tensor], where: Sequence[str], shared: Shared | None) -> None:
    """Raise EditError if a parameter that is to change has another name outside of the paths `where`."""
    shared = shared_parameters(model) if shared is None else shared
    for names in (shared.get(id(parameter), []) for parameter in changed) if shared else ():
        inside = [name for name in names if any(is_within(name, path) for path in where)]
        outside = [name for name in names if name not in inside]
        if outside:
            raise EditError(
                f"{inside[0]} is tied to {outside[0]}: changing one side would change the other too or break the tie. "
                f"Leave it out of the transform, or untie the two in the model first (tie_word_embeddings=False)."
            )


def _refuse_mixing(model: nn.Module, path: str, new: nn.Module) -> None:
    """Refuse what would read other rows of a batch, and in a causal model what would read later positions.

    A class that says no more than `elementwise = False` is taken at its word that it does neither.
    """
    for module in new.modules():
        mixes = mixes_of(module) if hasattr(type(module), "mixes") else None
        if mixes and "batch" in mixes:
            what = "the rows of a batch, so that what it gives a text would depend on the other texts"
        elif mixes and "positions" in mixes and Inputs.of(model).causal:
            what = "positions, and this model predicts the next token, so that it would read ahead"
        else:
            continue
        raise EditError(f"{path}: a {type(module).__name__} mixes {what}; put in one that does not.")


def refuse_hooks(path: str, old: nn.Module, new: nn.Module | None = None) -> None:
    """Refuse to lose hooks that somebody else registered.

    Args:
        path: of the module that is to go.
        old: that module.
        new: what comes in its place, if that is known; what it keeps of the old one keeps its hooks.

    Raises:
        EditError: a module that goes has hooks.
    """
    stays = set() if new is None else {id(module) for module in new.modules()}
    for name, module in old.named_modules(prefix=path):
        hooks = [] if id(module) in stays else hooks_of(module)
        if hooks:
            raise EditError(
                f"{name}: it has hooks ({', '.join(hooks)}), which would be lost when it is replaced. Remove them "
                f"first (handle.remove()) and register them again after, or leave the layer out."
            )


def _drop_packed(model: nn.Module, name: str) -> None:
    """A kernel's copy of a weight does not outlive a change of the weight."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        module = get_module(model, path)
        if isinstance(module, ActLinear):
            module.unpack()


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False
