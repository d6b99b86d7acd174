"""HQKAN in place of MLPs or single linear layers of a model, to be trained (2025, arXiv:2509.14026).

    hqkan(x) = last(qkan(first(x))),  first: d_in -> scale ceil(log2 d_in),  last: scale ceil(log2 d_out) -> d_out
    qkan     y_o = sum_i gain_oi (<Z>(x_i; theta_oi, w_oi, b_oi) + offset_oi) + base_oi SiLU(x_i)

<Z> is what a qubit gives that reads x_i `reps` times between learned turns: a sum of cosines, whose frequencies are
sums and differences of the learned w, up to (3^reps - 1) / 2 of them from 4 reps + 2 numbers (`circuit.py`). It is
simulated exactly, and nothing about it is faster for being called quantum.
When to use it: in place of the widest layers of a small model that you train, such as its head, if parameters are
scarce; a QKAN (`network.py`) for functions of a few variables that oscillate.
Cost: far fewer parameters than the layer had, and latent_in x latent_out functions of some 12 reps operations each.
Settled here: <Z> is the default measure, not |a| - |b|, which is the release's and no sum of cosines; all parameters
learn, not the angles alone; `px` and `real` are there for comparison: no repetitions can be added to them without
changing the function, and all gates of `real` turn about one axis, so that it is a single cosine.
Our own reading: a QKAN of one layer inside, as in the release's notebooks; a gated MLP is replaced by one without gate.
The paper was known from its abstract and the release.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import nn

from actkit.core.model.anatomy import Mlp
from actkit.functions.qkan.circuit import Measure
from actkit.functions.qkan.network import Hqkan
from actkit.functions.replace_layers import ReplaceLayers


class ReplaceByHqkan(ReplaceLayers):
    """Replace MLPs, or the linear layers that are named, by HQKANs with weights drawn anew.

    Attributes:
        where: None for the MLPs of all blocks; else paths or patterns of linear layers.
        latent: what the QKAN inside reads and gives; None for scale ceil(log2) of the channels.
        scale: of these widths.
        reps: how often a qubit reads its input.
        ansatz: 'pz', 'rpz' or 'real'.
        measure: 'z', or 'fast' as in the release.
        group: how many functions the inputs of the QKAN share; None for one on each edge.
        seed: of the weights.

    Raises:
        ValueError: a value is out of bounds.
        EditError: when applied, an entry of `where` names no linear layer.
    """

    latent: tuple[int, int] | None = None
    scale: int = Field(1, ge=1)
    reps: int = Field(1, ge=1)
    ansatz: Literal["pz", "rpz", "real"] = "pz"
    measure: Measure = "z"
    group: int | None = Field(None, ge=1)

    def layer(self, in_features: int, out_features: int) -> nn.Module:
        more: dict[str, Any] = {"ansatz": self.ansatz, "measure": self.measure, "group": self.group}
        return Hqkan(in_features, out_features, self.latent, self.scale, self.reps, **more)

    def mlp(self, old: Mlp, most: int) -> tuple[nn.Module, str, dict[str, int]]:
        made = self.layer(old.inputs[0].in_features, old.down.out_features)
        inner: Any = made.qkan
        return made, f"a QKAN of {inner.in_features} x {inner.out_features} in place of width {old.width}", {}
