"""How activations are watched: one way to hook the modules of a model.

Hooks read; what actkit changes for good, it changes by replacing modules. Only `core.watch.intervene` replaces what
passes by, as long as its context lasts. Hooks are removed when their context ends, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.known_layers import INTERVENES

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


class StopForward(Exception):
    """Raised by a hook to end a forward pass once what is wanted was seen."""


@contextmanager
def hooked(
    model: nn.Module,
    *,
    before: Mapping[str, Before] | None = None,
    after: Mapping[str, After] | None = None,
    replacing: bool = False,
    marked: bool = True,
) -> Iterator[None]:
    """Call `before[path](module, args, kwargs)` and `after[path](module, args, kwargs, output)` around those modules.

    Args:
        model: any module that is neither compiled nor sharded.
        before: by path.
        after: by path.
        replacing: what a hook returns, if not None, takes the place of (args, kwargs) or of the output; otherwise it
            is dropped.
        marked: hooks that replace are known as such to whoever looks for them (`known_layers.hooks_of`).

    Raises:
        UnsupportedModelError: the model is compiled or sharded, so that hooks would not fire or would see shards.
    """
    refuse_compiled_or_sharded(model)
    with ExitStack() as handles:
        for path, hook in (before or {}).items():
            call: Any = _kept(hook, marked) if replacing else _silent_before(hook)
            handles.callback(model.get_submodule(path).register_forward_pre_hook(call, with_kwargs=True).remove)
        for path, reader in (after or {}).items():
            call = _kept(reader, marked) if replacing else _silent_after(reader)
            handles.callback(model.get_submodule(path).register_forward_hook(call, with_kwargs=True).remove)
        yield


def _kept(hook: Callable[..., Any], marked: bool) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return hook(*arguments)

    if marked:
        setattr(call, INTERVENES, True)
    return call


def _silent_before(hook: Before) -> Before:
    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hook(module, args, kwargs)  # what it returns is dropped: a returned value would replace the arguments

    return call


def _silent_after(hook: After) -> After:
    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hook(module, args, kwargs, output)

    return call


def refuse_compiled_or_sharded(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model that is compiled, sharded (FSDP, tensor parallel) or wrapped (DDP)."""
    for name, module in model.named_modules():
        kind, place = type(module).__name__, name or "it"
        compiled = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None) is not None
        if kind == "OptimizedModule" or module._compiled_call_impl is not None or compiled:
            raise UnsupportedModelError(
                f"model: {place} is compiled (torch.compile or model.compile()), so hooks do not fire and replaced "
                f"modules are not seen. Give the model as it was before: transform first, compile after."
            )
        if kind.startswith("FSDP") or kind == "FullyShardedDataParallel":
            raise UnsupportedModelError(
                f"model: {place} is sharded ({kind}), so its weights are in pieces. Give the whole model: transform "
                f"first, shard after. Several processes can share the batches instead (core.ground.processes.together)."
            )
        if kind in ("DistributedDataParallel", "DataParallel"):
            raise UnsupportedModelError(f"model: {place} is wrapped in {kind}; give what is inside: its .module.")
        for parameter, tensor in module._parameters.items():
            if type(tensor).__name__ == "DTensor":
                raise UnsupportedModelError(
                    f"model: {parameter} of {place} is in pieces over several processes (a DTensor, as tensor "
                    f"parallelism makes them). Load the whole model."
                )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without gradients; each module's training flag is restored after.

    Args:
        model: in place.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
