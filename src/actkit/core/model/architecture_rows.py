"""What one declarative row says about an architecture family: the paths of its norms, linear layers and nonlinearities.

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
    """A norm.

    Attributes:
        path: its module.
        role: what reads it ('both': attention and MLP side by side).
        offset: added to its weight before use.
        feeds_residual: the residual stream reads it too (post-norm), so that no scale can be moved out of it.
    """

    path: str
    role: Role
    offset: float = 0.0
    feeds_residual: bool = False


@dataclass(frozen=True)
class AttentionRow:
    """Attention: either query, key and value, or one fused query_key_value.

    Attributes:
        path: its module.
        output: the layer that mixes the heads.
        query: a layer.
        key: a layer.
        value: a layer.
        query_key_value: one layer for all three.
        layout: of the rows of query_key_value (`core/model/fused_layers.py`); None if it is not known, and then query,
            key
            and value cannot be read and no scale moves out of value.
        query_norm: a norm before the rotary embedding, of each head or of all side by side.
        key_norm: the same for the key.
        heads_first: these norms are called on [batch, heads, length, head_dim].
        rotary: the first features of query and key are turned, as many as the tables have.
        angles: how the tables list their angles (`core/model/sites.py`).
        pairs: which two features turn together.
        limit: query, key and value are clamped to it before that.
        readable: False if query, key and value cannot be read off a module, as no call receives their rotary embedding.
        added: the module whose output is added to the residual stream, if that is not the attention module.
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
    """A part of which only the linear layers are described, because it computes in another way.

    Attributes:
        path: its module.
        linear_inputs: (site, layers) pairs, of the layers that read one tensor: the site's, or with None one that has
            no
            name. Layers are named inside the module; those that a model does not have are left out.
    """

    path: str
    linear_inputs: tuple[tuple[str | None, tuple[str, ...]], ...]


@dataclass(frozen=True)
class MlpRow:
    """An MLP: down(activation(up)), or down(activation(gate) * up).

    Attributes:
        path: the module that is the MLP; if there is none, the one whose output shows what changed inputs do.
        down: a layer.
        activation: the module of the nonlinearity.
        up: a layer.
        gate: a layer.
        gate_up: one layer whose rows are first the gate's, then up's.
        flat: the layers are called on [batch * length, channels].
        added: as in AttentionRow.
        overwritten: the model adds to its output in place.
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

    Attributes:
        module: what the block calls; its input and output are those of the MLP.
        path: the module with the parameters.
        router: the module that chooses.
        gate_up: the parameter of gate and up.
        down: the parameter of down.
        activation: the attribute of the nonlinearity; None if there is no such module.
        transposed: matrices are [in, out], not [out, in].
        interleaved: gate and up alternate, instead of first all gates, then all ups.
        bias: parameters with the suffix `_bias` exist.
        limit: the attribute with the bound to which gate (from above) and up (both sides) are clamped.
        alpha: the attribute with the slope of x * sigmoid(alpha * x), for experts that have no activation module.
        up_offset: added to up.
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
    """A family.

    Attributes:
        name: as reports call it.
        model_types: values of `config.model_type`.
        blocks: the list of blocks.
        stem: modules before the blocks.
        head: modules behind them.
        norms: of a block.
        attention: of a block.
        mlp: of a block. If experts are given too, a block has them if it has a module at `experts.path`, else the MLP.
        experts: of a block.
        beside: linear layers beside these parts, such as of experts that every token goes to.
        heads: the name of their number in the config.
        key_value_heads: the same for key and value, or the number itself.
        adapt: (row, config, index) -> the row of that block, for what the configuration decides.
        parallel: whether attention and MLP are side by side, each behind a norm of its own; or the name of the config's
            entry that says so.
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
    parallel: bool | str = False

    def of_block(self, config: Any, index: int) -> Architecture:
        """Return the row of one block."""
        return self if self.adapt is None else self.adapt(self, config, index)
