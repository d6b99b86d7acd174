"""How much the elements of a module's output matter to what the whole model gives.

    perturb       h = |dL/dO (O + eps) - dL/dO (O - eps)| / (2 eps)      eps added to every element at once
    hvp           h = |H 1|,  what that tends to: the sums of the rows of the Hessian of L in O
    hutchinson    h = |E[v * H v]|,  v of random signs: its diagonal

L says how far the outputs are from those that the model gave (`Divergence`), so that its gradient is 0 at O and H is
all there is; no labels are needed. The first is the finite difference of APHQ-ViT (2025, arXiv:2504.02508), which needs
float64: in float32, 1e-6 is below the last digit of values above 16. Models that compute in float32 inside (the
RMSNorms of transformers do) spoil the difference whatever their dtype; take "hvp" for those.

If all that reads O, and the residual stream that it is added to, is a LayerNorm (the blocks and MLPs of vision
transformers, of GPT-2), a shift of all channels changes nothing, and H 1 is exactly 0. What "perturb" gives there is
rounding alone: of the shape of the diagonal, as the same derivatives carry it back (correlations of 0.9 on the digits
ViT, in float32 and in float64), but of any size, and another one on another machine. "hutchinson" is the sound choice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from actkit.core.forward.batch import BatchContext, first_tensor, first_tokens, forward, is_tokens, sequence_of
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground.errors import DataError, NonFiniteError, UnsupportedModelError
from actkit.core.ground.progress import track

Mode = Literal["perturb", "hvp", "hutchinson"]
Average = Literal["auto", "samples", "tokens"]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """How far outputs are from those that a model gave, summed over the rows of a batch.

    Attributes:
        kind: 'kl' of the class probabilities, or 'mse' of the outputs as they are (logits, or hidden states).
        temperature: that logits are divided by, for 'kl'.
    """

    kind: Literal["kl", "mse"] = "kl"
    temperature: float = 20.0

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Run a model on a batch.

        Args:
            model: in evaluation mode.
            batch: as it is called with it.

        Raises:
            UnsupportedModelError: it gives no logits, and 'kl' needs some.
        """
        result = forward(model, batch)
        if self.kind == "kl" and not isinstance(result, Tensor) and getattr(result, "logits", None) is None:
            raise UnsupportedModelError(
                f"loss: 'kl' compares class probabilities, and {type(model).__name__} gives no logits; give 'mse', "
                f"which compares its outputs as they are."
            )
        return first_tensor(result)

    def __call__(self, outputs: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the divergence.

        Args:
            outputs: [rows, ..., classes].
            reference: of the same shape.
            mask: bool [rows, tokens], which tokens are real; None if all are.
        """
        if self.kind == "kl":
            now, then = (F.log_softmax(x / self.temperature, -1) for x in (outputs, reference))
            rows = F.kl_div(now, then, reduction="none", log_target=True).sum(-1)
        else:
            rows = (outputs - reference).square().mean(-1)
        return rows.sum() if mask is None or mask.shape != rows.shape else rows[mask.to(rows.device)].sum()


def perturbation_importance(
    model: nn.Module,
    paths: Sequence[str],
    data: Any,
    *,
    divergence: Divergence | None = None,
    mode: Mode = "perturb",
    eps: float = 1e-6,
    average: Average | None = "auto",
    tokens: int | None = None,
    draws: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
) -> dict[str, list[Tensor]]:
    """Return the importance of each element of the outputs of some modules.

    The model is copied, to `dtype`; for each module and batch its end runs forward and back twice ('hvp': once, with a
    second derivative; 'hutchinson': that many times).

    Args:
        model: neither compiled nor sharded.
        paths: of modules that run once in a pass, and give a tensor, or it first: blocks, layers.
        data: batches.
        divergence: L; None for 'kl' at temperature 20.
        mode: see above.
        eps: of 'perturb'.
        average: over 'samples' (all rows of all batches, place by place), over 'tokens' too (one value for each
            channel), 'auto' the latter for text and the former for all else, or None for each row its own.
        tokens: of how many tokens (rows, if it is no text) the average is, the first ones; None for all.
        draws: of 'hutchinson'.
        seed: of these.
        dtype: to compute in.
        progress: show a bar.

    Returns:
        For each path the importances, float32: one tensor [1, ..., channels] if they are averaged, else one of the
        shape of the module's output for each batch.

    Raises:
        DataError: rows of different lengths, or padding, and an average over samples was asked for.
        NonFiniteError: an importance is NaN or infinite.
        UnsupportedModelError: a module does not run once in a pass, gives no tensor, or a model gives no logits.
    """
    divergence = divergence or Divergence()
    batches = sequence_of(data, "data")
    if average == "auto":
        average = "tokens" if any(is_tokens(batch, model) for batch in batches) else "samples"
    if average is not None:
        batches = first_tokens(batches, tokens, model)
    model = copy.deepcopy(model).to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    sums = {path: _Sum(average) for path in paths}
    with evaluating(model):
        for batch in track(batches, "Measuring importance", enabled=progress):
            mask = BatchContext.of(batch, model).mask
            reference = divergence.outputs(model, batch)
            for path in paths:

                def gradient(change: Change, path: str = path) -> tuple[Tensor, Tensor]:
                    return _gradient(model, path, batch, divergence, reference, change, mode != "perturb")  # noqa: B023

                found = _importance(gradient, mode, eps, draws, generator)
                if not torch.isfinite(found).all():
                    raise NonFiniteError(f"{path}: the importance of its output is NaN or Inf; check data and dtype.")
                sums[path].add(found, mask)
    return {path: each.importances() for path, each in sums.items()}


def squared_gradient(
    model: nn.Module, path: str, batches: Sequence[Any], references: Sequence[Tensor], divergence: Divergence
) -> list[Tensor]:
    """Return (dL/dO)^2 of a model that was changed, a tensor of the shape of O for each batch (BRECQ's importance).

    Args:
        model: as it is now.
        path: of the module that gives O.
        batches: what it runs on.
        references: the outputs of the model as it was.
        divergence: L.
    """
    found = []
    with evaluating(model):
        for batch, reference in zip(batches, references, strict=True):
            _, slope = _gradient(model, path, batch, divergence, reference, lambda x: x, False)
            found.append(slope.float().square())
    return found


def _importance(
    gradient: Callable[[Change], tuple[Tensor, Tensor]], mode: Mode, eps: float, draws: int, generator: torch.Generator
) -> Tensor:
    if mode == "perturb":
        (_, above), (_, below) = gradient(lambda x: x + eps), gradient(lambda x: x - eps)
        return ((above - below) / (2 * eps)).abs()
    at, slope = gradient(lambda x: x)
    if mode == "hvp":
        return _product(slope, at, torch.ones_like(at)).abs()
    total = torch.zeros_like(at)
    for _ in range(draws):
        signs = torch.randint(0, 2, at.shape, generator=generator).to(at) * 2 - 1
        total = total + signs * _product(slope, at, signs)
    return (total / draws).abs()


def _product(slope: Tensor, at: Tensor, vector: Tensor) -> Tensor:
    """The Hessian times a vector."""
    return torch.autograd.grad(slope, at, vector, retain_graph=True)[0].detach()


def _gradient(
    model: nn.Module,
    path: str,
    batch: Any,
    divergence: Divergence,
    reference: Tensor,
    change: Change,
    twice: bool,
) -> tuple[Tensor, Tensor]:
    """O as it was changed, and dL/dO there. twice: so that it can be derived again."""
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise UnsupportedModelError(
                f"{path}: its output begins with a {type(value).__name__}; name a module that gives a tensor."
            )
        leaves.append(change(value.detach()).requires_grad_())
        return leaves[-1]

    def replaced(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        several = isinstance(output, tuple | list)
        return type(output)((leaf(output[0]), *output[1:])) if several else leaf(output)

    with torch.enable_grad(), _derivable(twice):
        if path:
            with hooked(model, after={path: replaced}, replacing=True):
                outputs = divergence.outputs(model, batch)
        else:
            outputs = leaf(divergence.outputs(model, batch))
        if len(leaves) != 1:
            raise UnsupportedModelError(
                f"{path}: it ran {len(leaves)} times in one pass; name a module that runs once, such as a block."
            )
        mask = BatchContext.of(batch, model).mask
        loss = divergence(outputs, reference, mask)
        (slope,) = torch.autograd.grad(loss, leaves, create_graph=twice)
    return leaves[0], slope


@contextmanager
def _derivable(twice: bool) -> Iterator[None]:
    """Attention as plain products: its fused kernels have no second derivative."""
    if not twice:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


class _Sum:
    """Importances, kept or averaged."""

    def __init__(self, average: Average | None) -> None:
        self.average = average
        self.kept: list[Tensor] = []
        self.total: Tensor | None = None
        self.count = 0

    def add(self, found: Tensor, mask: Tensor | None) -> None:
        if self.average is None:
            self.kept.append(found.float())
            return
        padded = mask is not None and not bool(mask.all())
        if self.average == "tokens":
            rows = found.reshape(-1, found.shape[-1])
            if padded and mask is not None and len(rows) == mask.numel():
                rows = rows[mask.flatten().to(rows.device)]
            summed, count = rows.sum(0).reshape((1,) * (found.dim() - 1) + (-1,)), len(rows)
        else:
            summed, count = found.sum(0, keepdim=True), len(found)
            if padded or (self.total is not None and self.total.shape != summed.shape):
                raise DataError(
                    "average: 'samples' was given, and rows have different lengths or padding, so that places cannot "
                    "be averaged; give 'tokens', or rows of one length."
                )
        self.total = summed if self.total is None else self.total + summed
        self.count += count

    def importances(self) -> list[Tensor]:
        return self.kept if self.total is None else [(self.total / self.count).float()]
