"""How large regions are, and how far apart the codes of classes lie.

    diameter  = step x number of points on a line through x that have the code of x
    diffusion = mean over pairs of 1 / (Hamming distance)^2: all pairs, those of one class, those of two

As the paper's reference code measures both: 200 points at steps of 0.05 on either side together; its `diffusion` is
without the pairs of equal codes, which are counted apart here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actkit.core.ground.errors import DataError
from actkit.interpretation.neural_code.codes import Codes, hamming, neural_codes


def region_diameter(
    model: nn.Module, x: Tensor, direction: Tensor, *, reach: float = 5.0, step: float = 0.05, **settings: Any
) -> float:
    """Estimate how far the region of a sample reaches along a line.

    Args:
        model: whose main input is a float tensor, taken alone.
        x: one sample, without a batch axis.
        direction: of the line, as given: a unit vector for a length, the way to a centre for a share of it.
        reach: the line goes from -reach to reach times the direction.
        step: between its points.
        settings: of `neural_codes`, such as `layers`.

    Returns:
        The estimate; 2 * reach if the region has no end on the line.

    Raises:
        ValueError: shapes differ, or a number is out of bounds.
    """
    if x.shape != direction.shape or not 0 < step <= reach:
        raise ValueError(
            f"x, direction, reach, step: {list(x.shape)}, {list(direction.shape)}, {reach}, {step} were given; give "
            f"two tensors of one shape, and 0 < step <= reach."
        )
    alphas = torch.arange(-reach, reach, step, dtype=x.dtype)
    points = x + alphas.view(-1, *(1,) * x.dim()) * direction
    codes = neural_codes(model, [torch.cat((x[None], points))], samples="example", progress=False, **settings)
    same = (codes.packed[1:] == codes.packed[0]).all(1)
    return step * float(same.sum())


@dataclass(frozen=True)
class Diffusion:
    """How near codes are, by pairs.

    Attributes:
        every: mean of 1 / d^2 over all pairs of different codes.
        within: over those of one class.
        between: over those of two classes.
        equal: how many pairs have equal codes, which none of the means counts.
    """

    every: float
    within: float
    between: float
    equal: int


def code_diffusion(codes: Codes) -> Diffusion:
    """Measure how near codes are within classes and between them.

    Args:
        codes: with labels.

    Raises:
        DataError: labels are missing, or a kind of pair has no two different codes.
    """
    if codes.labels is None:
        raise DataError("codes: they have no labels; give batches with labels, one for each sample.")
    upper = np.triu_indices(len(codes), 1)
    distances = hamming(codes, codes)[upper].astype(np.float64)
    alike = (codes.labels[:, None] == codes.labels[None])[upper]
    apart = distances > 0
    means = []
    for name, chosen in (("every", apart), ("within", apart & alike), ("between", apart & ~alike)):
        if not chosen.any():
            raise DataError(f"codes: no two different codes are there for {name!r}; give more samples of two classes.")
        means.append(float(np.mean(distances[chosen] ** -2)))
    every, within, between = means
    return Diffusion(every, within, between, int((~apart).sum()))
