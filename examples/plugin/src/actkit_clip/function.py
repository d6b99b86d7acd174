"""An activation function with its record: squareplus, a softplus without exponentials.

f(x) = (x + sqrt(x^2 + 4)) / 2
"""

from __future__ import annotations

import math

import torch

from actkit.core.layers.activation_function import ActivationFunction, Piece

SQUAREPLUS = ActivationFunction(
    name="squareplus",
    function=lambda x: (x + (x.square() + 4).sqrt()) / 2,
    derivative=lambda x: (1 + x / (x.square() + 4).sqrt()) / 2,
    second_derivative=lambda x: 2 / (x.square() + 4) ** 1.5,
    antiderivative=lambda x: x.square() / 4 + x * (x.square() + 4).sqrt() / 4 + torch.asinh(x / 2),
    pieces=(Piece(-math.inf, math.inf, 1, lambda y: y - 1 / y),),
    limits=(0.0, math.inf),
)
