"""The rules of relevance: by what a backward pass goes through norms, activation functions, products and attention.

    norm          y = (x - mean x) / stopgrad(std x) * w + b     (without the mean in an RMSNorm)
    activation    y = z * stopgrad(phi(z) / z),  with phi'(0) at |z| < 1e-6
    product       y = g / 2 of a gated MLP's g = phi(a) * b, as both factors get all of it otherwise
    attention     query and key stopped: through the values alone

ReLU has this gradient already, linear layers and sums keep theirs. A place that a rule is asked for and cannot be
applied to is an error with its name; nothing falls back to the plain gradient by itself.

LayerNorm, activation, product and attention are the rules of RelP (arXiv:2508.21258), read in its code; there attention
is off by default, as here. `RelevanceRules.attnlrp()` is our reading of lxt's AttnLRP: queries and keys a quarter,
values half of their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.model.anatomy import Anatomy
from actkit.core.model.parts import Norm
from actkit.core.watch.intervene import At, intervene
from actkit.core.watch.surrogates import Surrogate, surrogate_gradients, with_gradient_of

LINEAR_PIECES = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Identity)  # their gradient is phi(z) / z already, or constant
NEAR = 1e-6  # around 0, where phi(z) / z is taken to be phi'(0)


@dataclass(frozen=True)
class RelevanceRules:
    """Which rules are used.

    Attributes:
        norms: stop the gradient through the standard deviation.
        activations: go through an activation function by phi(z) / z.
        products: halve what goes into a gated product.
        attention: 'plain' gradients; 'stopped' at query and key; 'shared', a quarter for each of these and half for
            the values.
    """

    norms: bool = True
    activations: bool = True
    products: bool = True
    attention: Literal["plain", "stopped", "shared"] = "plain"

    @classmethod
    def none(cls) -> Self:
        """The plain gradient, which makes attribution patching."""
        return cls(norms=False, activations=False, products=False)

    @classmethod
    def attnlrp(cls) -> Self:
        """As lxt's AttnLRP (our reading of it)."""
        return cls(attention="shared")

    @contextmanager
    def applied(self, view: Anatomy) -> Iterator[None]:
        """Let the backward pass of a model go by the rules, as long as a context lasts; values stay as they are.

        Args:
            view: of the model.

        Yields:
            Nothing.

        Raises:
            UnsupportedModelError: a rule is asked for that has no place to act on, or one that it does not know.
        """
        self._check(view)
        surrogates: dict[str, Surrogate] = {}
        if self.norms:
            # a BatchNorm that does not train is linear
            norms = [norm for norm in view.norms if not isinstance(norm.module, nn.modules.batchnorm._BatchNorm)]
            surrogates |= {norm.path: partial(_norm, norm) for norm in norms}
        if self.activations:
            surrogates |= {
                path: _activation
                for path in view.activations()
                if not isinstance(view.model.get_submodule(path), LINEAR_PIECES)
            }
        changes: dict[Any, Any] = {}
        if self.products:
            gated = [block.index for block in view.blocks if any(mlp.gated for _, mlp in block.mlps())]
            changes |= {f"blocks.{index}.mlp.hidden": _halved for index in gated}
        if self.attention == "stopped":
            changes |= dict.fromkeys(("attention.query", "attention.key"), _stopped)
        elif self.attention == "shared":
            changes |= {"attention.query": _quartered, "attention.key": _quartered, "attention.value": _halved}
        with ExitStack() as stack:
            stack.enter_context(surrogate_gradients(view.model, surrogates))
            if changes:
                stack.enter_context(intervene(view.model, changes, anatomy=view))
            yield

    def _check(self, view: Anatomy) -> None:
        experts = next((block.experts for block in view.blocks if block.experts is not None), None)
        if experts is not None and self != RelevanceRules.none():
            raise UnsupportedModelError(
                f"rules: {experts.path} multiplies its experts by the router's weights, for which there is no rule "
                f"yet; use RelevanceRules.none(), or leave the model out."
            )
        functions = [name for block in view.blocks for name in block.nonlinearities() if not _is_module(view, name)]
        functions = [name for name in functions if name not in ("relu", "leaky_relu", "relu6")]
        if self.activations and functions:
            raise UnsupportedModelError(
                f"rules: {functions[0]!r} is called as a function, and the rule for activations acts on modules; make "
                f"it a module, or use RelevanceRules(activations=False)."
            )


def _is_module(view: Anatomy, path: str) -> bool:
    try:
        view.model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _halved(value: Tensor, at: At) -> Tensor:
    return with_gradient_of(value, value / 2)


def _quartered(value: Tensor, at: At) -> Tensor:
    return with_gradient_of(value, value / 4)


def _stopped(value: Tensor, at: At) -> Tensor:
    return value.detach()


def _activation(module: nn.Module, z: Tensor, output: Tensor) -> Tensor:
    near = z.detach().abs() < NEAR
    ratio = output.detach() / torch.where(near, torch.ones_like(z), z.detach())
    if bool(near.any()):
        with torch.enable_grad():
            zero = torch.zeros(1, dtype=z.dtype, device=z.device, requires_grad=True)
            (slope,) = torch.autograd.grad(module.forward(zero).sum(), zero)
        ratio = torch.where(near, slope, ratio)
    return z * ratio


def _norm(norm: Norm, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    kind = type(module).__name__
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide if "RMS" in kind else wide - wide.mean(-1, keepdim=True)
    eps = next((float(getattr(module, name)) for name in ("eps", "variance_epsilon") if hasattr(module, name)), 1e-5)
    y = centred / (centred.detach().square().mean(-1, keepdim=True) + eps).sqrt()
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    y = y if weight is None else y * (weight + norm.offset)
    y = y if bias is None else y + bias
    bound = 1e-3 if output.dtype in (torch.float32, torch.float64) else 5e-2
    most = partial(torch.linalg.vector_norm, ord=torch.inf)
    if not bool(most(y.detach() - output.detach()) <= bound * most(output.detach())):
        raise UnsupportedModelError(
            f"rules: {norm.path} is a {kind}, which is neither a LayerNorm nor an RMSNorm; use "
            f"RelevanceRules(norms=False)."
        )
    return y
