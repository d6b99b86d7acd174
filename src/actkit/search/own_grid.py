"""Whether rounding lands on the grid that a source's weights were rounded to before, so that it costs nothing.

    rounding error of a layer in steps of its new grid, over what a weight between the points has (step / sqrt(12))

Weights that were never rounded come out near 1. If half of a source's quantized layers come out below a half, the loss
that was measured does not say what these bits cost, and the report says so.
"""

from __future__ import annotations

from torch import nn

from actkit.core.edit import changes
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight

WARNING = "the grid is the source's own"
ON_GRID = 0.5  # of the error of weights that lie anywhere


def own_grid_warning(original: nn.Module, changed: nn.Module) -> str | None:
    """Say whether the weights of a changed model went back to their source's own grid.

    Args:
        original: with the record of its source.
        changed: a copy of it on which weights were quantized.

    Returns:
        The warning, or None.
    """
    grid = changes.source_grid(original)
    if grid is None:
        return None
    shares = [share for path in grid.layers if (share := _share(original, changed, path)) is not None]
    close = sum(share < ON_GRID for share in shares)
    if not shares or 2 * close < len(shares):
        return None
    return (
        f"{WARNING} in {close} of {len(shares)} layers ({grid.describe()}): these weights were rounded before, so this "
        f"loss does not say what rounding costs; judge it on actkit.zoo.off_grid.off_grid_twin(model)"
    )


def _share(original: nn.Module, changed: nn.Module, path: str) -> float | None:
    """The rounding error of a layer as a share of that of weights between the points; None if it is not rounded."""
    try:
        before, after = original.get_submodule(path), changed.get_submodule(path)
    except AttributeError:
        return None
    if not (isinstance(after, ActLinear) and isinstance(after.storage, IntegerWeight)):
        return None
    stored = after.storage
    weight = before.weight.detach().float()  # type: ignore[union-attr, operator]
    found = stored.dequantize().float()
    expected = stored.scales().square().mean().sqrt() / 12**0.5
    return float((found - weight).square().mean().sqrt() / expected)
