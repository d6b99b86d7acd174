"""Radial basis neurons in place of MLPs or single linear layers of a model, to be trained (2025, arXiv:2503.06762).

    out = W phi + bias,   phi_n = exp(-1/2 sum_d exp(beta_nd) (f_d - c_nd)^2)

A neuron answers near its centre alone, in the directions in which it is narrow: another kind of unit than a function of
one weighted sum. With a grid of features in front of it one such layer is a neural field (`fit_field.py`).
When to use it: `fit_image` and `fit_sdf` for an image or a shape as a function of a coordinate, with half of the
operations of a three-layer MLP behind the same grid; `rbf` to try such units as the head of a model that you train.
Cost: 2 units x features numbers and two products of that size, against one in a linear layer.
Settled here: the squared distance is clamped at 0 and formed in float32 at least, beta kept within [-10, 10]. In the
release centres begin within 1e-4 of each other and all widths are 1: so do ours in a field. In a model, where features
are many and of any size, they begin in [-1, 1] with the mean over features in place of the sum (beta = -log d), as the
neurons would give 0 otherwise. `RadialUnits.place` puts them where the data are. Grids are read at the paper's
frequencies; the released encoder has their resolutions in that place. Wendland's function is its usual C2 one.
Our own reading: an MLP of a model is replaced by one such layer. Radiance fields, several levels with neurons of their
own and hash grids are not built. The paper was known from its abstract and the release.
"""

from __future__ import annotations

import math

from pydantic import Field
from torch import nn

from actkit.core.model.anatomy import Mlp
from actkit.functions.rbfnet.radial import RadialDecoder, Shape
from actkit.functions.replace_layers import ReplaceLayers


class ReplaceByRadial(ReplaceLayers):
    """Replace MLPs, or the linear layers that are named, by radial basis neurons with weights drawn anew.

    Attributes:
        where: None for the MLPs of all blocks; else paths or patterns of linear layers.
        units: neurons of each.
        shape: of a neuron over its distance.
        reach: centres begin uniformly in -reach to reach.
        seed: of the weights.

    Raises:
        ValueError: a value is out of bounds.
        EditError: when applied, an entry of `where` names no linear layer.
    """

    units: int = Field(64, ge=1)
    shape: Shape = "gaussian"
    reach: float = Field(1.0, ge=0, allow_inf_nan=False)

    def layer(self, in_features: int, out_features: int) -> nn.Module:
        beta = -math.log(in_features)
        return RadialDecoder(in_features, out_features, self.units, shape=self.shape, beta=beta, reach=self.reach)

    def mlp(self, old: Mlp, most: int) -> tuple[nn.Module, str, dict[str, int]]:
        made = self.layer(old.inputs[0].in_features, old.down.out_features)
        return made, f"{self.units} radial neurons in place of width {old.width}", {}
