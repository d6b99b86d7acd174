"""What one declarative row says about an architecture family: where its norms, linear layers and nonlinearities are.

Paths in a row are relative: those of `blocks`, `stem` and `head` to the base model, all others to one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from actkit.core.model.fused_layers import FusedLayout
from actkit.core.model.sites import Angles, Pairs

Role = Literal["attention", "mlp", "both", "other"]


@dataclass(frozen=True)
class NormRow:
    """A norm. role: what reads it ('both': attention and MLP side by side). offset: added to its weight before use.
    feeds_residual: the residual stream reads it too (post-norm), so that no scale can be moved out of it."""

    path: str
    role: Role
    offset: float = 0.0
    feeds_residual: bool = False


@dataclass(frozen=True)
class AttentionRow:
    """Attention. Either query, key and value, or one fused query_key_value.

    layout: of the rows of query_key_value (`core/model/fused_layers.py`); None where it is not known, and then query,
    key and value cannot be read and no scale moves out of value. query_norm, key_norm: norms before the rotary
    embedding, of each head or of all side by side. heads_first: these norms are called on [batch, heads, length,
    head_dim]. rotary: the first features of query and key are turned, as many as the tables have. angles, pairs: how
    the tables list their angles, and which two features turn together (`core/model/sites.py`). limit: to which query,
    key and value are clamped before that. readable: False where query, key and value cannot be read off a module, as
    their rotary embedding is told to no call. added: the module whose output is added to the residual stream, where
    that is not the attention module.
    """

    path: str
    output: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    query_key_value: str | None = None
    layout: FusedLayout | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    heads_first: bool = False
    rotary: bool = False
    angles: Angles = "halves"
    pairs: Pairs = "halves"
    limit: float | None = None
    readable: bool = True
    added: str | None = None


@dataclass(frozen=True)
class LayersRow:
    """A part that computes in a way of its own, of which only the linear layers are described.

    path: its module. linear_inputs: (site, layers) pairs, of the layers that read one tensor: the site's, or with None
    one that has no name. Layers are named inside the module; those that a model does not have are left out.
    """

    path: str
    linear_inputs: tuple[tuple[str | None, tuple[str, ...]], ...]


@dataclass(frozen=True)
class MlpRow:
    """An MLP: down(activation(up)), or down(activation(gate) * up).

    path: the module that is the MLP; where there is none, the one whose output shows what changed inputs do. Either
    up, or gate_up: one layer whose rows are first the gate's, then up's. flat: the layers are called on
    [batch * length, channels]. added: as in AttentionRow. overwritten: the model adds to its output in place.
    """

    path: str
    down: str
    activation: str
    up: str | None = None
    gate: str | None = None
    gate_up: str | None = None
    flat: bool = False
    added: str | None = None
    overwritten: bool = False


@dataclass(frozen=True)
class ExpertsRow:
    """Gated experts kept as 3-D parameters, one matrix per expert.

    module: what the block calls (its input and output are those of the MLP). path, router: inside the block. The
    other names are attributes of the experts' module. transposed: matrices are [in, out], not [out, in]. interleaved:
    gate and up alternate, instead of first all gates, then all ups. bias: parameters with the suffix `_bias` exist.
    limit: attribute with the bound to which gate (from above) and up (both sides) are clamped. alpha: attribute with
    the slope of x * sigmoid(alpha * x), for experts that have no activation module. up_offset: added to up.
    """

    module: str
    path: str
    router: str
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    activation: str | None = "act_fn"
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    limit: str | None = None
    alpha: str | None = None
    up_offset: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """A family. model_types: values of `config.model_type`. heads, key_value_heads: names in the config; the latter may
    be a number.

    Where both mlp and experts are given, a block has experts if it has a module at `experts.path`, else the MLP.
    beside: linear layers beside these parts, such as of experts that every token goes to.
    adapt: (row, config, index) -> the row of that block, for what the configuration decides.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    stem: tuple[str, ...]
    head: tuple[str, ...]
    norms: tuple[NormRow, ...]
    attention: AttentionRow | LayersRow | None = None
    mlp: MlpRow | LayersRow | None = None
    experts: ExpertsRow | None = None
    beside: LayersRow | None = None
    heads: str = "num_attention_heads"
    key_value_heads: str | int = "num_key_value_heads"
    adapt: Callable[[Architecture, Any, int], Architecture] | None = None

    def of_block(self, config: Any, index: int) -> Architecture:
        """The row of one block."""
        return self if self.adapt is None else self.adapt(self, config, index)
