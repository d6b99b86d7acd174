"""New models of GR-KAN layers, with a start that keeps the variance: KAT (2024, ICLR 2025, arXiv:2409.10594).

    GR-KAN(x) = W F(x) + b,   w ~ N(0, alpha / d_in),   alpha = Var[x] / E[F(x)^2] for normal x: 1 for the identity

F is fitted first, W drawn for it. Attention begins "mimetic" (Trockman and Kolter 2023), U uniform of variance 1 / d:

    W_q' W_k of each head from the SVD of 0.7 U + 0.7 I,  W_o W_v from that of 0.4 U - 0.4 I

When to use it: to train a vision transformer from the start. A trained one is converted by `gr_kan`, which in the paper
gave better models than training from the start.
Cost: as of the ViT; 76 numbers more per block.
Settled here: alpha by quadrature of the function that was fitted (2.811 for SiLU's fit on [-3, 3], of SiLU itself
2.8077; 2.8178 in the paper, which sampled it). The release draws every weight with a deviation of 0.02, as timm does,
since its own rule is overwritten before it is used.
Our own reading: of a rank that is a head's width, the SVD's largest values; the model is transformers' ViT with GR-KAN
in its MLPs and nothing else new, so there is no class for it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Replace
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.model.anatomy import Attention, anatomy
from actkit.core.recipe.runner import apply_edits
from actkit.core.univariate.fit_rational import RationalFit, rational_like
from actkit.functions.kat.group_rational import GroupRational, RationalFirst

if TYPE_CHECKING:
    from transformers import ViTConfig

FAR, PANELS, NODES = 12.0, 96, 16  # of the quadrature: standard deviations, panels, nodes in each


class GrKanLinear(nn.Module):
    """A rational function for each group of channels, then a linear layer: one layer of a GR-KAN.

    Args:
        in_features: channels that the function and the layer read.
        out_features: channels of the output.
        groups: of the channels.
        start: the name of the function that it begins as, or a fit.
        bias: of the linear layer, 0 at first.

    Raises:
        ValueError: the groups do not divide the channels, or an unknown function.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int = 8,
        start: str | RationalFit = "silu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.rational = GroupRational(in_features, groups, start=start)
        self.linear = nn.Linear(in_features, out_features, bias)
        keep_variance(self.linear, start)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return self.linear(self.rational(x))


def variance_gain(function: str | RationalFit) -> float:
    """Return alpha = 1 / E[F(x)^2] for standard normal x, by quadrature.

    Args:
        function: the name of an element-wise function, or a fit.

    Raises:
        RecipeError: an unknown name.
        ValueError: a function that mixes.
    """
    nodes, weights = _normal_rule()
    values = (rational_like(function) if isinstance(function, str) else function)(nodes)
    return 1 / float((weights * values**2).sum())


def keep_variance(linear: nn.Module, function: str | RationalFit) -> None:
    """Draw the weights of a linear layer so that it keeps the variance of what goes through a function before it.

    Args:
        linear: nn.Linear, changed in place; its bias becomes 0.
        function: in front of it, as in `variance_gain`.
    """
    assert isinstance(linear, nn.Linear)
    nn.init.normal_(linear.weight, std=math.sqrt(variance_gain(function) / linear.in_features))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def kat(
    config: ViTConfig,
    *,
    functions: tuple[str, str] = ("identity", "silu"),
    groups: int = 8,
    mimetic: bool = True,
    seed: int = 0,
) -> nn.Module:
    """Make a ViTForImageClassification whose MLPs are GR-KANs, to be trained from the start.

    It is saved by `actkit.save` and loaded by `actkit.load`.

    Args:
        config: of the ViT; its `hidden_act` is not used.
        functions: what the two rational functions of an MLP begin as.
        groups: of the channels.
        mimetic: begin attention so; else as transformers does.
        seed: of the weights.

    Returns:
        The model.

    Raises:
        ValueError: the groups do not divide hidden_size and intermediate_size, or an unknown function.
    """
    from transformers import ViTForImageClassification

    with own_random_numbers(torch.device("cpu"), seed):
        model = ViTForImageClassification(config)
        first, second = functions
        edits: list[Edit] = []
        for block in anatomy(model).blocks:
            assert block.mlp is not None and block.attention is not None
            edits.append(Replace(block.mlp.activation, GroupRational(block.mlp.width, groups, start=second)))
            before = GroupRational(block.mlp.up.in_features, groups, start=first)
            edits.append(Replace(block.mlp.path, RationalFirst(block.mlp.module, before)))
            keep_variance(block.mlp.up.module, first)
            keep_variance(block.mlp.down.module, second)
            if mimetic:
                begin_mimetic(block.attention)
        apply_edits(model, edits, lambda: anatomy(model).architecture)
    return model


@torch.no_grad()
def begin_mimetic(attention: Attention) -> None:
    """Draw the weights of an attention so that tokens attend to what is like them, and give back less of themselves.

    Args:
        attention: with layers of their own for query, key and value, and a key for each query; changed in place.

    Raises:
        ValueError: another attention.
    """
    query, key, value, output = attention.query, attention.key, attention.value, attention.output
    if query is None or key is None or value is None or attention.heads != attention.key_value_heads:
        raise ValueError("attention: it needs a query, key and value layer each, and as many keys as queries.")
    width, dim = query.in_features, attention.head_dim
    for head in range(attention.heads):
        left, right = _factors(0.7 * _uniform(width) + 0.7 * torch.eye(width), dim)
        rows = slice(head * dim, (head + 1) * dim)
        query.weight[rows], key.weight[rows] = left.T, right
    left, right = _factors(0.4 * _uniform(width) - 0.4 * torch.eye(width), width)
    value.weight.copy_(left.T)
    output.weight.copy_(right.T)


def _uniform(width: int) -> Tensor:
    """[width, width], of variance 1 / width."""
    return (2 * torch.rand(width, width) - 1) * math.sqrt(3 / width)


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L [width, rank] and R [rank, width], whose product is the nearest matrix of that rank."""
    u, s, v = torch.linalg.svd(matrix)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _normal_rule() -> tuple[Tensor, Tensor]:
    """Nodes and weights of an integral under the standard normal density: Gauss and Legendre's in panels."""
    import numpy as np

    at, weights = np.polynomial.legendre.leggauss(NODES)
    edges = torch.linspace(-FAR, FAR, PANELS + 1, dtype=torch.float64)
    half = FAR / PANELS
    nodes = ((edges[:-1] + half)[:, None] + half * torch.from_numpy(at)).flatten()
    density = torch.exp(-(nodes**2) / 2) / math.sqrt(2 * math.pi)
    return nodes, half * torch.from_numpy(weights).repeat(PANELS) * density
