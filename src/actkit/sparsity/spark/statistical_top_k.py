"""Statistical top-k: a threshold from mean and standard deviation instead of a sort (2025, arXiv:2506.06644).

    theta(x, k) = mean(x) + std(x) * Q(1 - k / d)        x in R^d, Q: quantile function of the standard normal
    z = max(x - theta, 0)                                kept values are shifted by theta

From the Spark Transformer. About k entries are kept if x is close to normal; z is the argmin over z >= 0 of
theta |z|_1 + |x - z|^2 / 2, continuous in x. Cost: three passes over x and no sort; gradients flow through mean and
deviation. The same formula is in transformers' Gemma 3n, which divides the variance by d, as is the default here
(`unbiased` divides by d - 1; which one the paper means we could not check).

Settled here: statistics are taken in float32 (float64 for float64) and of the valid entries alone. A row with at most k
valid entries keeps all of them. A row that is constant to rounding has no order: "soft" and "mask" keep nothing,
"neg_inf" everything. If a few very low entries lift theta above the largest one, nothing would be kept: "neg_inf",
which a softmax reads, then keeps the largest.
Our own reading: the paper's variant with a continuous derivative is taken as Huber's function of the excess u = x -
theta: 0 for u <= 0, u^2 / (2 h) up to u = h, then u - h / 2.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from actkit.core.layers.activation_function import Axis
from actkit.core.layers.keeps_dtype import KeepsDtype

Mode = Literal["soft", "mask", "neg_inf"]
MODES = ("soft", "mask", "neg_inf")
ROUNDING = 4 * torch.finfo(torch.float32).eps  # a deviation below this share of the mean is rounding
MOMENTUM = 0.02  # of the running density of `StatisticalTopK`


def statistical_topk(
    x: Tensor,
    k: int | float,
    dim: int = -1,
    mode: Mode = "soft",
    valid_mask: Tensor | None = None,
    unbiased: bool = False,
    huber: float | None = None,
) -> Tensor:
    """Keep about the k largest entries of x along `dim`.

    If all entries of a row are kept, 'soft' shifts by the smallest one. NaN in a row is seen in the row's output.

    Args:
        x: floats, of any shape.
        k: in (0, d], may be a fraction of an entry (0.05 * d).
        dim: along which.
        mode: 'soft' gives max(x - theta, 0); 'mask' gives x if x > theta, else 0 (not shifted, so not continuous);
            'neg_inf', for a softmax, gives x if x > theta, and the largest one in any case, else -inf.
        valid_mask: bool, broadcastable to x; entries that are not valid enter no statistic and are never kept.
        unbiased: divide the variance by d - 1.
        huber: width of the quadratic part of 'soft'; None for none.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: an argument is outside of this, or there are fewer than two entries.
    """
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r} was given, allowed are {', '.join(MODES)}.")
    if huber is not None and (mode != "soft" or not 0 < huber < math.inf):
        raise ValueError(f"huber: {huber} was given with mode {mode!r}; it is a positive width, of mode 'soft' alone.")
    found = _statistics(x, k, dim, valid_mask, unbiased)
    if mode == "soft":
        shift = found.shift
        if k == x.shape[dim] or valid_mask is not None:
            shift = torch.where(shift == -math.inf, _extreme(found.centered, dim, valid_mask), shift)
        shift = shift.masked_fill(found.constant, math.inf)
        # without a graph the buffer serves again: a new one costs more than all of the arithmetic
        excess = found.centered - shift if torch.is_grad_enabled() else found.centered.sub_(shift)
        excess = excess.relu_()
        if huber is not None:
            excess = torch.where(excess < huber, excess.square() / (2 * huber), excess - huber / 2)
        kept = excess.to(x.dtype)
        return kept if valid_mask is None else kept.masked_fill(~valid_mask, 0)
    theta = (found.mean + found.shift).detach()
    theta = theta.masked_fill(found.constant, math.inf if mode == "mask" else -math.inf)
    dropped = x.detach() <= theta  # so that a NaN is kept
    if mode == "neg_inf":
        dropped &= x.detach() < _extreme(x.detach(), dim, valid_mask, largest=True)
    if valid_mask is not None:
        dropped = dropped | ~valid_mask
    return x.masked_fill(dropped, 0 if mode == "mask" else -math.inf)


def threshold(
    x: Tensor, k: int | float, dim: int = -1, valid_mask: Tensor | None = None, unbiased: bool = False
) -> Tensor:
    """Compute theta(x, k). A row that is constant to rounding has that constant.

    Args:
        x: as in `statistical_topk`.
        k: as in `statistical_topk`.
        dim: as in `statistical_topk`.
        valid_mask: as in `statistical_topk`.
        unbiased: as in `statistical_topk`.

    Returns:
        float32 (float64 for float64), the shape of x with 1 at `dim`; -inf if at most k entries are valid.

    Raises:
        ValueError: as `statistical_topk`.
    """
    found = _statistics(x, k, dim, valid_mask, unbiased)
    return found.mean + found.shift


class _Statistics(NamedTuple):
    """What a threshold is made of.

    Attributes:
        mean: over the valid entries.
        centered: x - mean.
        shift: theta - mean; -inf if all entries are kept.
        constant: bool, rows whose entries are equal to rounding, so that a threshold separates nothing.
    """

    mean: Tensor
    centered: Tensor
    shift: Tensor
    constant: Tensor


def _statistics(x: Tensor, k: int | float, dim: int, valid_mask: Tensor | None, unbiased: bool) -> _Statistics:
    width = _check(x, k, dim, valid_mask)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if valid_mask is None:
        mean = wide.mean(dim, keepdim=True)
        centered = wide - mean
        norm = torch.linalg.vector_norm(centered, dim=dim, keepdim=True)
        everything = torch.full_like(mean, k == width, dtype=torch.bool)
        share = torch.tensor(1 - k / width, dtype=torch.float64)
        deviation = norm / (width - unbiased) ** 0.5
    else:
        invalid = ~valid_mask.expand_as(x)
        count = width - invalid.sum(dim, keepdim=True)
        mean = wide.masked_fill(invalid, 0).sum(dim, keepdim=True) / count.clamp(min=1)
        centered = wide - mean
        norm = torch.linalg.vector_norm(centered.masked_fill(invalid, 0), dim=dim, keepdim=True)
        everything = count <= k
        share = 1 - k / count.clamp(min=1).double()
        deviation = norm / (count - int(unbiased)).clamp(min=1) ** 0.5
    quantile = torch.special.ndtri(share).to(wide)
    shift = deviation * torch.where(everything, 0, quantile)  # 0 * inf would be NaN
    constant = (deviation.detach() <= ROUNDING * mean.detach().abs()) & ~everything
    return _Statistics(mean, centered, shift.masked_fill(everything, -math.inf), constant)


def _check(x: Tensor, k: int | float, dim: int, valid_mask: Tensor | None) -> int:
    """Return the width of x along `dim`; raise ValueError for arguments that make no sense."""
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(f"x: {x.dtype} {tuple(x.shape)} was given; give floats with at least one dimension.")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: {dim} was given; x has {x.dim()} dimensions.")
    width = x.shape[dim]
    if width < 2:
        raise ValueError(f"x: it has {width} entries along dim {dim}; a standard deviation needs at least 2.")
    if not 0 < k <= width:
        raise ValueError(f"k: {k} was given; x has {width} entries along dim {dim}, give more than 0 and at most that.")
    if valid_mask is not None and valid_mask.dtype != torch.bool:
        raise ValueError(f"valid_mask: {valid_mask.dtype} was given; give bool, True where an entry counts.")
    if valid_mask is not None and not _broadcasts(valid_mask.shape, x.shape):
        raise ValueError(f"valid_mask: {tuple(valid_mask.shape)} does not broadcast to x, which is {tuple(x.shape)}.")
    return width


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in pairs)


def _extreme(x: Tensor, dim: int, valid_mask: Tensor | None, largest: bool = False) -> Tensor:
    """Return the smallest or largest valid entry, 0 if there is none."""
    beyond = -math.inf if largest else math.inf
    if valid_mask is not None:
        x = x.masked_fill(~valid_mask, beyond)
    found = x.amax(dim, keepdim=True) if largest else x.amin(dim, keepdim=True)
    return found if valid_mask is None else found.masked_fill(found == beyond, 0)


class StatisticalTopK(KeepsDtype):
    """An activation function behind statistical top-k: f(max(x - theta(x, k), 0)) over the last dimension.

    Args:
        base: the activation f, with f(0) = 0, so that what is not kept is exactly 0.
        k: entries to keep, of the width of x.

    Attributes:
        density: float32 [2], a running mean over training batches of the share that was kept, and of its 95th
            percentile over tokens; zeros before the first batch. It is measured in training mode only.

    Raises:
        ValueError: k is 0 or less, or f maps 0 elsewhere.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ("channels",)
    gives_zeros: ClassVar[bool] = True
    decodes_as: ClassVar[str] = "statistical_top_k"
    density: Tensor

    def __init__(self, base: nn.Module, k: int | float) -> None:
        super().__init__()
        if not 0 < k < math.inf:
            raise ValueError(f"k: {k} was given; it is a number of entries, give more than 0.")
        if not keeps_zero(base):
            raise ValueError(
                f"base: {type(base).__name__} does not map 0 to 0, so nothing would be sparse; give relu, gelu or silu."
            )
        self.base, self.k = base, k
        self.register_buffer("density", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x [..., width]; the shape stays."""
        kept = statistical_topk(x, self.k)
        if self.training:
            self._measure(kept.detach())
        return self.base(kept)

    @torch.no_grad()
    def _measure(self, kept: Tensor) -> None:
        shares = (kept > 0).flatten(0, -2).float().mean(-1) if kept.dim() > 1 else (kept > 0).float().mean()[None]
        if not shares.numel():  # an expert without tokens
            return
        now = torch.stack((shares.mean(), shares.sort().values[int(0.95 * (len(shares) - 1))]))
        self.density.copy_(torch.where(self.density == 0, now, self.density.lerp(now, MOMENTUM)))

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {"k": self.k}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> StatisticalTopK:
        """Make it around the activation that stands in its place."""
        return cls(original, spec["k"])

    def extra_repr(self) -> str:
        return f"k={self.k:g}"


def keeps_zero(activation: nn.Module) -> bool:
    """Return whether an element-wise activation maps 0 to 0."""
    like = next(chain(activation.parameters(), activation.buffers()), torch.empty(0, device="cpu"))
    with torch.no_grad():
        return not bool(activation(like.new_zeros(1)).any())
