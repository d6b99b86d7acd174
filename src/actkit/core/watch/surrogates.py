"""Gradients of something else: a model computes what it does, and its backward pass is that of a surrogate.

    y' = stopgrad(y) + (s - stopgrad(s))

The second part is exactly 0, so that values stay as they are, to the bit, and y' has the gradient of s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.hooks import hooked

Surrogate = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (module, its input, its output) -> what has the gradient


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return a tensor with the values of one and the gradient of another.

    Args:
        value: any.
        surrogate: of the same shape; its values are finite and do not matter.
    """
    return value.detach() + (surrogate - surrogate.detach()).to(value.dtype)


@contextmanager
def surrogate_gradients(model: nn.Module, surrogates: Mapping[str, Surrogate]) -> Iterator[None]:
    """Let outputs of modules have other gradients, as long as a context lasts.

    Args:
        model: neither compiled nor sharded.
        surrogates: by path, of modules with one tensor as input and output.

    Yields:
        Nothing.
    """

    def replacing(surrogate: Surrogate) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            given = args[0] if args else next(iter(kwargs.values()))
            if not torch.is_grad_enabled() or not given.requires_grad:
                return None
            return with_gradient_of(output, surrogate(module, given, output))

        return hook

    after = {path: replacing(surrogate) for path, surrogate in surrogates.items()}
    with hooked(model, after=after, replacing=True):
        yield
