"""Models that accelerate has dispatched: weights on the CPU or the disk, brought to a device for each module's call.

There a module's parameters are on the meta device, and its hook (`AlignDevicesHook`) reads their values from a map. So
that methods can read and change weights as ever, `onloaded` puts those of one block in place and puts them away again
after it: what was changed is kept in a map over the hook's own (the user's maps and files are never written to), and
modules that took the place of others get a hook like theirs. What was in a file goes to a file, the rest to memory.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4
from weakref import finalize

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.ground.modules import is_within, memory_of

M = TypeVar("M", bound=nn.Module)
Source = Tensor | tuple[Mapping[str, Tensor], str] | Path  # a tensor, another map's entry, a file that holds it


class Weights(Mapping[str, Tensor]):
    """What the hook of a changed module reads: some tensors of its own, the others from the map below it."""

    def __init__(self, own: Mapping[str, Source], below: Mapping[str, Tensor] | None = None) -> None:
        self.own, self.below = dict(own), {} if below is None else below
        if isinstance(below, Weights):
            self.own, self.below = {**below.own, **self.own}, below.below

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.own:
            return self.below[name]
        source = self.own[name]
        if isinstance(source, Tensor):
            return source
        if isinstance(source, tuple):
            return source[0][source[1]]
        with safe_open(source, framework="pt") as file:
            return file.get_tensor(name).clone()  # a tensor at an odd place of the file rounds differently

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.own, *self.below)))

    def __len__(self) -> int:
        return len(list(iter(self)))


# -- what a model is ---------------------------------------------------------------------------------------------------


def offloading_hook(module: nn.Module) -> Any | None:
    """The hook that brings the module's weights and takes them away again, or None."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "weights_map", None) is not None:
            return each
    return None


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are elsewhere while the model does not run."""
    return any(offloading_hook(module) is not None for module in model.modules())


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Raise UnsupportedModelError for what needs all weights in place."""
    for path, module in model.named_modules():
        if offloading_hook(module) is not None:
            raise UnsupportedModelError(
                f"model: {path or 'it'} is offloaded by accelerate, and {what}; load the model without offload "
                f"(without device_map, or with max_memory that holds it)."
            )


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first parameter, or where that one is brought to."""
    for module in model.modules():
        parameter = next(iter(module.parameters(recurse=False)), None)
        if parameter is None:
            continue
        hook = offloading_hook(module)
        if parameter.is_meta and hook is not None and hook.execution_device is not None:
            return torch.device(hook.execution_device)
        return parameter.device
    return torch.device("cpu")


class Place(NamedTuple):
    """Where an offloaded tensor is: the module that the hook is on, the hook, and its name for the tensor."""

    module: nn.Module
    hook: Any
    name: str


def place_of(model: nn.Module, name: str) -> Place | None:
    """The place of a parameter or buffer that a hook offloads; None for one that stays where it is."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        hook = offloading_hook(module)
        if hook is not None and (depth == len(parts) - 1 or hook.place_submodules):
            inner = ".".join(parts[depth:])
            return Place(module, hook, inner) if inner in _held(module, hook) else None
    return None


def value_of(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return the values of the parameter or buffer `name`; on the CPU if it is offloaded.

    Args:
        model: that holds it.
        name: of the tensor.
        tensor: what stands there in the model.

    Raises:
        UnsupportedModelError: it is on the meta device, and nothing fills it.
    """
    if not tensor.is_meta:
        return tensor
    place = place_of(model, name)
    if place is None:
        raise UnsupportedModelError(f"model: {name} is on the meta device and has no values; load the weights first.")
    return place.hook.weights_map[place.name].detach().cpu()


def in_place(model: nn.Module, path: str, module: M) -> M:
    """Return the module at `path` itself, or a copy with its values in place if it is offloaded.

    For what is read outside of its call, of small modules.

    Args:
        model: that holds it.
        path: of the module.
        module: what stands there.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    if not any(tensor.is_meta for _, tensor in named):
        return module
    duplicate, device = copy.deepcopy(module), device_of(model)
    for name, tensor in named:
        _put(duplicate, name, value_of(model, f"{path}.{name}", tensor).to(device), tensor)
    return duplicate


def shared_tensors(model: nn.Module) -> list[list[str]]:
    """Names of offloaded tensors that are one and the same: by their memory, or by what transformers says."""
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta}
    groups: dict[Any, list[str]] = {}
    for name in state:
        place = place_of(model, name)
        source = None if place is None else _source(place.hook.weights_map, place.name)
        if source is not None and source.numel():
            groups.setdefault(memory_of(name, source), []).append(name)
    found = [names for names in groups.values() if len(names) > 1]
    for alias, name in (getattr(model, "all_tied_weights_keys", None) or {}).items():  # read from files they look apart
        if {alias, name} <= state.keys() and not any({alias, name} <= {*names} for names in found):
            found.append([name, alias])
    return found


# -- bringing weights in place -----------------------------------------------------------------------------------------


class _Onloaded:
    """A module whose weights are in place for now, and how they were then: to tell what was changed."""

    def __init__(self, module: nn.Module, hook: Any) -> None:
        self.module, self.hook = module, hook
        device = torch.device(hook.execution_device if hook.execution_device is not None else "cpu")
        for name, old in _held(module, hook).items():
            _put(module, name, hook.weights_map[name].to(device, copy=True), old)  # an edit may change it in place
        self.before = {name: (tensor, tensor._version) for name, tensor in _held(module, hook).items()}
        self.names = {name for name, _ in module.named_buffers()}
        hook.offload = False  # it goes on moving inputs, and leaves the weights alone

    def put_away(self, known: dict[Any, Source]) -> None:
        """known: what was read from maps and not changed, by memory."""
        module, hook = self.module, self.hook
        if hook.place_submodules and any(name not in self.names for name, _ in module.named_buffers()):
            hook.offload_buffers = True  # codes of a quantized weight came, which are buffers
        changed = {name: x for name, x in _held(module, hook).items() if not self._is_as_it_was(name, x)}
        if changed:
            hook.weights_map = Weights(_stored(changed, hook.weights_map, known), hook.weights_map)
        _empty(module, hook)
        hook.offload = True

    def unchanged(self) -> Iterator[tuple[Any, Source]]:
        for name, tensor in _held(self.module, self.hook).items():
            if self._is_as_it_was(name, tensor):
                yield memory_of(name, tensor), (self.hook.weights_map, name)

    def _is_as_it_was(self, name: str, tensor: Tensor) -> bool:
        before, version = self.before.get(name, (None, 0))
        return tensor is before and tensor._version == version


@contextmanager
def onloaded(model: nn.Module, path: str, *, weights: bool = True) -> Iterator[None]:
    """Hold the weights of the module at `path` in place, on the device that they are brought to for its call.

    At the end they are put away, changed ones and new modules included, also after an exception; a model that is not
    offloaded is left alone, but for new modules, which get the hooks of those whose place they took. A new module that
    keeps modules of the old one inside must call them, as their hooks fire in their calls.

    Args:
        model: offloaded, or not.
        path: of the module.
        weights: False for who changes modules without any, so that nothing is brought in place.
    """
    root = model.get_submodule(path)
    before = dict(root.named_modules(remove_duplicate=False))
    if not any(hasattr(module, "_hf_hook") for module in before.values()):
        yield
        return
    hooks = {id(module): (module, hook) for module in before.values() if (hook := offloading_hook(module)) is not None}
    places = [_Onloaded(module, hook) for module, hook in hooks.values() if weights and hook.offload]
    try:
        yield
    finally:
        known = {key: source for place in places for key, source in place.unchanged()}
        _carry(before, model.get_submodule(path), known)
        for place in places:
            place.put_away(known)


def _carry(before: Mapping[str, nn.Module], root: nn.Module, known: dict[Any, Source]) -> None:
    """Give each outermost new module a hook like that of the module whose place it took."""
    old_ones = {id(module) for module in before.values()}
    carried: list[str] = []
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if id(module) in old_ones or any(path.startswith(f"{other}.") for other in carried):
            continue
        carried.append(path)
        if _covered(root, path):
            continue  # by the hook of a module around it
        inside = [m for name, m in before.items() if is_within(name, path)]
        template = next((hook for m in inside if (hook := offloading_hook(m)) is not None), None)
        if template is not None:
            _offload(module, template, known)
        elif hasattr(outer := getattr(before.get(path), "_hf_hook", None), "execution_device"):
            _attach(module, outer, place_submodules=True)


def _offload(module: nn.Module, template: Any, known: dict[Any, Source]) -> None:
    """Offload a new module as a whole; one that wraps modules with hooks of their own, around these."""
    wraps = any(hasattr(child, "_hf_hook") for child in module.modules())
    own = [*module.parameters(recurse=not wraps), *module.buffers(recurse=not wraps)]
    if own:
        options = {"offload": True, "offload_buffers": True, "place_submodules": not wraps}
        _attach(
            module, template, **options, weights=lambda hook: _stored(_held(module, hook), template.weights_map, known)
        )
    for child in module.children() if wraps else ():
        if not hasattr(child, "_hf_hook"):
            _offload(child, template, known)


def _attach(module: nn.Module, template: Any, weights: Callable[[Any], Any] | None = None, **options: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    shared = {"io_same_device": template.io_same_device, "skip_keys": template.skip_keys}
    hook = AlignDevicesHook(template.execution_device, **shared, **options)
    if weights is not None:
        hook.weights_map = Weights(weights(hook))
    add_hook_to_module(module, hook)


def _covered(root: nn.Module, path: str) -> bool:
    parts = path.split(".")
    around = [root.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    return any(hook.place_submodules for module in around if (hook := offloading_hook(module)) is not None)


def settle(model: nn.Module, path: str) -> None:
    """Put the weights of the module at `path` away, which was put (back) there while a hook around it offloads."""
    module = model.get_submodule(path)
    for name, tensor in [*module.named_parameters(prefix=path), *module.named_buffers(prefix=path)]:
        place = None if tensor.is_meta else place_of(model, name)
        if place is not None and place.hook.offload:
            write(model, name, tensor)
            _put(place.module, place.name, torch.empty_like(tensor, device="meta"), tensor)


def write(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer other values, wherever it is."""
    place = place_of(model, name)
    if place is not None and place.hook.offload:
        own = _stored({place.name: value.clone()}, place.hook.weights_map, {})
        place.hook.weights_map = Weights(own, place.hook.weights_map)
        return
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    with torch.no_grad():
        module._parameters.get(leaf, module._buffers.get(leaf)).copy_(value)  # type: ignore[union-attr]


# -- tensors of a hook -------------------------------------------------------------------------------------------------


def _held(module: nn.Module, hook: Any) -> dict[str, Tensor]:
    """The tensors that a hook brings and takes away, by its names."""
    from accelerate.utils import named_module_tensors

    options = {"include_buffers": hook.offload_buffers, "recurse": hook.place_submodules}
    return dict(named_module_tensors(module, remove_non_persistent=True, **options))


def _put(module: nn.Module, name: str, value: Tensor, old: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
    else:
        owner._buffers[leaf] = value.to(old.dtype)


def _empty(module: nn.Module, hook: Any) -> None:
    for name, tensor in _held(module, hook).items():
        _put(module, name, torch.empty_like(tensor, device="meta"), tensor)


def _stored(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], known: dict[Any, Source]) -> dict[str, Source]:
    """Where tensors are kept from now on: in a file if the map that they belong to reads files, else in memory.

    known: what is kept already, by memory.
    """
    found: dict[str, Source] = {
        name: known[memory_of(name, x)] for name, x in tensors.items() if memory_of(name, x) in known
    }
    fresh = {name: x.detach().cpu().contiguous() for name, x in tensors.items() if name not in found}
    folder = _folder(like) if fresh else None
    if folder is None:
        return {**found, **fresh}
    file = folder / f"actkit-{uuid4().hex}.safetensors"
    save_file({name: tensor.clone() for name, tensor in fresh.items()}, file)
    return {**found, **dict.fromkeys(fresh, file)}


def _folder(like: Any) -> Path | None:
    """A folder for what belongs to weights that a map reads from files; None for a map that holds them in memory."""
    prefix = ""
    while like is not None:
        if isinstance(like, Weights):
            file = next((source for source in like.own.values() if isinstance(source, Path)), None)
            other = next((source[0] for source in like.own.values() if isinstance(source, tuple)), None)
            if file is not None:
                return file.parent
            like = like.below if len(like.below) else other
        elif hasattr(like, "dataset"):  # accelerate's map with a prefix
            prefix, like = like.prefix + prefix, like.dataset
        elif getattr(like, "index", None):  # accelerate's map that reads files, but for what it holds
            return None if any(name.startswith(prefix) for name in like.state_dict) else _temporary(like)
        else:
            break
    return None


_folders: dict[int, Path] = {}  # of maps that read files, until they are gone


def _temporary(reader: Any) -> Path:
    """A folder beside the reader's own files that goes when it does."""
    if id(reader) not in _folders:
        where = Path(tempfile.mkdtemp(prefix="actkit-", dir=reader.save_folder))
        _folders[id(reader)] = where
        finalize(reader, _remove, id(reader))
    return _folders[id(reader)]


def _remove(reader: int) -> None:
    shutil.rmtree(_folders.pop(reader), ignore_errors=True)


def _source(weights: Any, name: str) -> Tensor | None:
    """The tensor that a map holds in memory under a name; None for one that it reads from a file."""
    if isinstance(weights, Weights):
        source = weights.own.get(name, (weights.below, name))
        return _source(*source) if isinstance(source, tuple) else source if isinstance(source, Tensor) else None
    if hasattr(weights, "dataset"):
        return _source(weights.dataset, weights.prefix + name)
    held = getattr(weights, "state_dict", weights)
    return held.get(name) if isinstance(held, Mapping) else None
