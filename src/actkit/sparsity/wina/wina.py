"""WINA: keep input j of a linear layer when |x_j| * ||W[:, j]|| is large (2025, arXiv:2505.19427).

    y = W (m * x),  m_j = 1 if |x_j| * c_j > t (or is among the k largest),  c_j = ||W[:, j]||_2

If the columns of W are orthogonal this choice has the smallest output error of all masks of its size; in general it
has in expectation, for uncorrelated inputs of mean zero. Rescaling an input against its column leaves it unchanged.
When to use it: to read fewer weights per decoded token in any model with linear layers, without training. It can gain
over TEAL only if the norms of a weight's columns differ: in the embedded models they vary by 10 to 15 %, and it
gains nothing there.
Cost: one multiply and one comparison per input; the columns of dropped inputs are not read.
Left open by the paper: one mask for layers that share an input. Here `norms="joint"` takes the column norm of the
stacked matrices, so that they share one mask; "each" gives every matrix its own; "release" reproduces the published
code, in which only the key and gate matrices get norms and the others fall back to magnitude. The paper's rotation,
which makes columns orthogonal, is the transform `rotate_columns` before this one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from actkit.core.model.anatomy import Block, Linear, Site
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes, small_inputs
from actkit.sparsity.teal import GREEDY, MaskGroup, Teal

RELEASE_ROLES = ("key", "gate", "query_key_value", "gate_up")


class Wina(Teal):
    """Sparsify the inputs of linear layers by magnitude times weight norm.

    Attributes:
        norms: 'joint', 'each' or 'release' (see above); everything else is as in `Teal`.
    """

    norms: Literal["joint", "each", "release"] = "joint"

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        guess = small_inputs(profile)
        yield Idea("wina 25%", cls(sparsity=0.25), guess, 40, stacks=(60, 70))
        half = f"{guess}; half of the weight bytes"
        yield Idea("wina 50%", cls(sparsity=0.5), half, 90, stacks=(100,), why_stacked="the fewest bytes per token")
        yield LeftOut("wina with greedy allocation", GREEDY)

    def groups(self, block: Block) -> list[MaskGroup]:
        """Return the masks of a block: one per input with joint norms, else one per matrix."""
        groups = []
        for group in super().groups(block):
            if self.norms == "joint":
                groups.append(MaskGroup(group.site, group.linears, column_norms(group.linears)))
                continue
            for linear in group.linears:
                weighted = self.norms == "each" or linear.role in RELEASE_ROLES
                site = Site("layer.input", path=linear.path)
                groups.append(MaskGroup(site, (linear,), column_norms([linear]) if weighted else None))
        return groups


def column_norms(linears: Iterable[Linear]) -> Tensor:
    """Compute the column norms of the stacked weights [out, in] of linear layers that share an input: float32 [in]."""
    squares = torch.stack([linear.weight.detach().float().square().sum(0) for linear in linears])
    return squares.sum(0).sqrt()
