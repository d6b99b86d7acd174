"""Activation functions that a traced model calls as functions: no module stands there, the next layer reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from actkit.core.layers.activations import activation_function, function_names
from actkit.core.model.anatomy import Anatomy
from actkit.core.model.parts import Chain
from actkit.core.model.sites import Site


@dataclass(frozen=True)
class CalledFunction:
    """One of them.

    Attributes:
        name: of the function.
        chain: the layers around it.
    """

    name: str
    chain: Chain

    @property
    def before(self) -> str:
        """The path of the layer that reads it."""
        second = self.chain.second
        return second if isinstance(second, str) else second.path

    @property
    def site(self) -> Site:
        """What that layer reads."""
        return Site("layer.input", path=self.before)

    @property
    def label(self) -> str:
        """The name for tables and patterns."""
        return f"{self.name} before {self.before}"

    @property
    def gives_zeros(self) -> bool:
        """Whether it is known, and gives exact zeros, such as ReLU."""
        return self.name in function_names() and activation_function(self.name).share_of_zeros() > 0


def called_functions(view: Anatomy) -> Iterator[CalledFunction]:
    """Find them; models that are not traced have none.

    Args:
        view: of the model.
    """
    if view.architecture == "traced":
        modules = dict(view.model.named_modules())
        for chain in view.blocks[0].chains:
            if chain.nonlinearity not in modules:
                yield CalledFunction(chain.nonlinearity, chain)
