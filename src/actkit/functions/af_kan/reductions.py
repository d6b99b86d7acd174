"""How AF-KAN makes one number of the M values of each input feature (2025, arXiv:2503.06112).

    A [..., d, M] -> h [..., d],   T = max(temperature, 1), learned from sqrt(d) on
    global_attn     h_i = softmax over the features (w A_i / T) * sum over m of A_im
    spatial_attn    softmax over m of (a convolution along the features, one filter for each m) / T, times A, summed
    multistep       h = w A
    local_attn      attention among windows of 2 values of a feature, then a linear layer on all of them
    self_attn       attention among features, values summed over m
    multihead_attn  the same with a head for each m

As in the release: the softmax of `global_attn` runs over the input features, not over the M values; attention here is
not divided by the root of a width. `self_attn` uses undefined names in the release and is built from its text.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WINDOW = 2  # of local attention


class Reduction(nn.Module):
    """A [..., features, size] -> [..., features].

    Args:
        features: of the input.
        size: values of each.
    """

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.features, self.size = features, size


class _Tempered(Reduction):
    def __init__(self, features: int, size: int) -> None:
        super().__init__(features, size)
        self.temperature = nn.Parameter(torch.tensor(math.sqrt(features)))

    def softmax(self, scores: Tensor, dim: int) -> Tensor:
        return (scores / self.temperature.clamp(min=1.0)).softmax(dim)


class Multistep(Reduction):
    """A weighted sum."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__(features, size)
        self.linear = nn.Linear(size, 1)

    def forward(self, values: Tensor) -> Tensor:
        return self.linear(values).squeeze(-1)


class GlobalAttention(_Tempered):
    """The sum of a feature's values, weighted by a softmax over all features."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__(features, size)
        self.linear = nn.Linear(size, 1)

    def forward(self, values: Tensor) -> Tensor:
        return (values * self.softmax(self.linear(values), -2)).sum(-1)


class SpatialAttention(_Tempered):
    """A feature's values weighted by a softmax over them, whose scores see the neighbouring features."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__(features, size)
        self.convolution = nn.Conv1d(size, size, 3, padding=1, groups=size)

    def forward(self, values: Tensor) -> Tensor:
        flat = values.reshape(-1, self.features, self.size)
        weights = self.softmax(self.convolution(flat.transpose(1, 2)), 1).transpose(1, 2)
        return (flat * weights).sum(-1).view(values.shape[:-1])


class LocalAttention(_Tempered):
    """Attention among windows of two neighbouring values of a feature; a last value without a neighbour is left out.

    Raises:
        ValueError: fewer than 2 values.
    """

    def __init__(self, features: int, size: int) -> None:
        super().__init__(features, size)
        if size < WINDOW:
            raise ValueError(
                f"reduce: local_attn needs at least {WINDOW} values per feature, and grid + order is {size}."
            )
        self.query, self.key, self.value = (nn.Linear(WINDOW, WINDOW) for _ in range(3))
        self.linear = nn.Linear(size // WINDOW * WINDOW, 1)

    def forward(self, values: Tensor) -> Tensor:
        windows = values.unfold(-1, WINDOW, WINDOW)  # [..., features, windows, 2]
        weights = self.softmax(self.query(windows) @ self.key(windows).transpose(-1, -2), -1)
        return self.linear((weights @ self.value(windows)).flatten(-2)).squeeze(-1)


class SelfAttention(_Tempered):
    """Attention among the features."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__(features, size)
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))

    def forward(self, values: Tensor) -> Tensor:
        weights = self.softmax(self.query(values) @ self.key(values).transpose(-1, -2), -1)
        return (weights @ self.value(values)).sum(-1)


class MultiheadAttention(Reduction):
    """Attention among the features with a head for each value."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__(features, size)
        self.attention = nn.MultiheadAttention(size, size, batch_first=True)

    def forward(self, values: Tensor) -> Tensor:
        flat = values.reshape(-1, self.features, self.size)
        if not len(flat):  # which torch's layer refuses
            return values.sum(-1)
        return self.attention(flat, flat, flat, need_weights=False)[0].sum(-1).view(values.shape[:-1])


REDUCTIONS: dict[str, type[Reduction]] = {
    "global_attn": GlobalAttention,
    "spatial_attn": SpatialAttention,
    "multistep": Multistep,
    "local_attn": LocalAttention,
    "self_attn": SelfAttention,
    "multihead_attn": MultiheadAttention,
}
