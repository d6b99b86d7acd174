"""CETT: what dropping an MLP's weak neurons does to its output (2024, arXiv:2411.02335).

The name is short for cumulative error of tail truncation.

    y = sum_i n_i,  n_i = W_out[:, i] h_i;   neuron i is weak if ||n_i|| = |h_i| * ||W_out[:, i]|| <= eps
    CETT(eps) = mean over tokens of ||sum over weak i of n_i|| / ||y||

`CettCurve` holds it for every eps at once: with its neurons in rising order a token's error is a running sum, so a
layer costs one sort and tokens x neurons x outputs additions; the release bisects with two products per try.
CETT is not strictly monotone in eps (contributions cancel); thresholds go by its running maximum, the first crossing.
The bias of the output layer belongs to no neuron and is left out of y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.core.layers.selections import Threshold

Method = Literal["sort", "grid"]
CANDIDATES = 65_536  # of the release's grid, and values that its upper end is a quantile of
CHUNK = 1 << 21  # partial sums held at a time: 8 MiB
BLOCK = 32  # neurons summed by one small product


@torch.no_grad()
def cett(h: Tensor, w_out: Tensor, eps: float) -> float:
    """Measure the relative output error of an MLP that drops its weak neurons.

    Args:
        h: [tokens, neurons], into the output layer.
        w_out: [outputs, neurons], its weight.
        eps: threshold on the norm of a neuron's contribution.

    Returns:
        The mean over tokens; a token whose output is 0 counts as 0.

    Raises:
        ValueError: the shapes do not fit, or eps is negative.
    """
    h, w_out = _checked(h, w_out)
    weak = h.masked_fill(Threshold(eps, w_out.norm(dim=0)).mask(h), 0)
    error, output = (weak @ w_out.t()).norm(dim=1), (h @ w_out.t()).norm(dim=1)
    return float(torch.where(output > 0, error / output, torch.zeros(())).double().mean())


def cett_thresholds(h: Tensor, w_out: Tensor, target: float, method: Method = "sort") -> float:
    """Return the largest eps with CETT <= target.

    Args:
        h: [tokens, neurons], into the output layer.
        w_out: [outputs, neurons], its weight.
        target: the CETT that is allowed.
        method: 'sort' is exact, 'grid' takes the release's candidates.

    Returns:
        The threshold; 0 if there is none.

    Raises:
        ValueError: the shapes do not fit, the target is negative, or the method is unknown.
    """
    return CettCurve.of(h, w_out, method).threshold(target)


@dataclass(frozen=True)
class CettCurve:
    """The CETT of a layer at every threshold: dropping all contributions of norm <= eps[k] gives at most cett[k].

    Attributes:
        eps: float32 [k], rising, the norms that occur.
        cett: float64 [k], its running maximum.
        dropped: float64 [k], the share of the contributions with a norm up to eps[k].
        grid: the candidates that thresholds are taken from; None for all of eps.
    """

    eps: Tensor
    cett: Tensor
    dropped: Tensor
    grid: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, h: Tensor, w_out: Tensor, method: Method = "sort") -> Self:
        """Compute the curve from h [tokens, neurons] and w_out [outputs, neurons]."""
        if method not in ("sort", "grid"):
            raise ValueError(f"method: {method!r} was given, allowed are 'sort' and 'grid'.")
        h, w_out = _checked(h, w_out)
        columns, norms = w_out.t().contiguous(), h.abs() * w_out.norm(dim=0)
        steps = torch.empty(h.shape, dtype=torch.float64, device=h.device)
        norms, order = norms.sort(dim=1)
        size = max(1, CHUNK // w_out.numel())
        for start in range(0, len(h), size):
            chosen = slice(start, start + size)
            terms = columns[order[chosen]] * h[chosen].gather(1, order[chosen])[..., None]
            errors = _running_sum(terms).norm(dim=2).double()
            relative = (errors / errors[:, -1:]).nan_to_num(0)
            steps[chosen] = relative.diff(dim=1, prepend=torch.zeros_like(relative[:, :1]))
        eps, order = norms.flatten().sort()
        curve = steps.flatten()[order].cumsum(0) / len(h)
        last = torch.ones_like(eps, dtype=torch.bool)  # of equal norms: they are dropped together
        last[:-1] = eps[1:] > eps[:-1]
        dropped = (last.nonzero().flatten() + 1).double() / len(eps)
        return cls(eps[last], curve[last].cummax(0).values, dropped, _grid(norms) if method == "grid" else None)

    def threshold(self, target: float) -> float:
        """Return the largest threshold whose CETT is at most `target`; without one, 0, which drops exact zeros only."""
        if not target >= 0:
            raise ValueError(f"target: {target} was given; CETT is a relative error, give 0 or more.")
        count = int((self.cett <= target).sum())  # it never falls
        allowed = self.eps[:count]
        if self.grid is not None:
            allowed = self.grid if count == len(self.eps) else self.grid[self.grid < self.eps[count]]
        return float(allowed[-1]) if len(allowed) else 0.0

    def dropped_at(self, eps: float) -> float:
        """Return the share of the contributions that a threshold drops."""
        count = int((self.eps <= eps).sum())
        return float(self.dropped[count - 1]) if count else 0.0


def _checked(h: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    if h.dim() != 2 or w_out.dim() != 2 or h.shape[1] != w_out.shape[1] or not h.numel():
        raise ValueError(
            f"h, w_out: {list(h.shape)} and {list(w_out.shape)} were given; give [tokens, neurons], at least one "
            f"token, and [outputs, neurons]."
        )
    return h.detach().float(), w_out.detach().float()


def _running_sum(terms: Tensor) -> Tensor:
    """Compute terms.cumsum(1) of [tokens, neurons, outputs], several times faster on a CPU.

    Within blocks it is a product with a triangle of ones.
    """
    tokens, neurons, outputs = terms.shape
    padded = F.pad(terms, (0, 0, 0, -neurons % BLOCK)).view(tokens, -1, BLOCK, outputs)
    sums = torch.ones(BLOCK, BLOCK, device=terms.device).tril() @ padded
    before = sums[:, :, -1].cumsum(1) - sums[:, :, -1]
    return sums.add_(before[:, :, None]).view(tokens, -1, outputs)[:, :neurons]


def _grid(norms: Tensor) -> Tensor:
    """The release's candidates: linear from the smallest norm to about the 0.99 quantile."""
    sample = norms.reshape(-1)[:: max(norms.numel() // CANDIDATES, 1)]
    return torch.linspace(float(norms.min()), float(sample.quantile(0.99)), CANDIDATES, device=norms.device)
