"""Spark Transformer: sparse neurons and attention, chosen by a slice of the existing weights (2025, arXiv:2506.06644).

    y = down(f(top_k(gate(x[:r]))) * up(x[r:]))              x in R^d_model, d_ff neurons, f = GELU

top_k is statistical top-k (`statistical_top_k`): about k of the neurons are not 0. The gate reads the first r inputs,
the up projection the others, so that 2 d_model d_ff weights do what 3 d_model d_gated do in a gated MLP of width
d_gated = 2/3 d_ff. Per token, decoding multiplies r d_ff + (d_model - r) k + d_model k weights: 3.5 times fewer than
the gated MLP at Gemma-2 2B's size (2304, 13824 for 9216, k = 1106, r = 1024). Attention is in `spark_attention`.
Models of these layers are trained from scratch, in one stage and without another loss.

`Sparkify` is what Gemma 3n does instead: statistical top-k before the activation of an ordinary gated MLP. Only
the step from 0 neurons dropped to most of them is the method; the weights must be trained for it.

When to use it: `spark_lm` and the layers for a model that you train from scratch and that is to decode fast on CPUs;
`Sparkify` for a trained model with gated MLPs that you can fine-tune. Without training take `cats`, `teal`, `wina` or
`ppl_sparsity`.
Left open: whether other layers change their initialisation (here: none does, all as in the host model).
Our own reading: r for a given width (the nearest multiple of 128 to a half; the paper's 1024 of 2304 is another one).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit import kernels
from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module
from actkit.core.layers.activations import Activation, activation_function, function_names
from actkit.core.model.anatomy import Block, Linear, anatomy
from actkit.core.model.parts import Mlp
from actkit.core.recipe.runner import apply_edits
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.sparsity.spark.spark_attention import SparkAttention
from actkit.sparsity.spark.statistical_top_k import StatisticalTopK, keeps_zero

if TYPE_CHECKING:
    from transformers import LlamaConfig


class SparkFFN(nn.Module):
    """An MLP of which about k of d_ff neurons are active: [..., d_model] -> [..., d_model].

    `act_fn.density` is the share of neurons that training saw active.

    Args:
        d_model: width of the hidden states.
        d_ff: neurons.
        k: how many of them are active.
        r: how many inputs the gate reads; the up projection reads the others.
        act: the activation, by name: an element-wise function that maps 0 to 0.

    Raises:
        ValueError: r is outside of (0, d_model), k outside of (0, d_ff), or `act` is another function.
    """

    decodes_as: ClassVar[str] = "spark_ffn"
    linear_inputs: ClassVar[Any] = ((None, ("gate_proj",)), (None, ("up_proj",)), ("mlp.hidden", ("down_proj",)))

    def __init__(self, d_model: int, d_ff: int, k: int, r: int, act: str = "gelu_tanh") -> None:
        super().__init__()
        if not 0 < r < d_model:
            raise ValueError(f"r: {r} was given; it must lie between 0 and d_model = {d_model}, half of it is usual.")
        if not 0 < k < d_ff:
            raise ValueError(f"k: {k} was given; it must lie between 0 and d_ff = {d_ff}, 8 % of it is usual.")
        self.d_model, self.d_ff, self.k, self.r, self.act = d_model, d_ff, k, r, act
        self.gate_proj = nn.Linear(r, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model - r, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.act_fn = StatisticalTopK(Activation(act), k)

    @classmethod
    def match_gated(
        cls, d_model: int, d_gated: int, density: float = 0.08, r: int | None = None, act: str = "gelu_tanh"
    ) -> Self:
        """Make one with as many weights as a gated MLP of width d_gated.

        Args:
            d_model: width of the hidden states.
            d_gated: neurons of the gated MLP.
            density: of the d_ff neurons, round(density * d_ff) are active.
            r: None for about d_model / 2, a multiple of 128 if d_model allows it.
            act: as in the class.

        Returns:
            The layer, with random weights.

        Raises:
            ValueError: as the class.
        """
        if not 0 < density < 1:
            raise ValueError(f"density: {density} was given; it is a share of the neurons, give more than 0, below 1.")
        d_ff = round(1.5 * d_gated)
        if r is None:
            r = 128 * round(d_model / 256) if d_model >= 256 else d_model // 2
        return cls(d_model, d_ff, max(round(density * d_ff), 1), r, act)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x [..., d_model]; the shape stays."""
        return self.down_proj(self.act_fn(self.gate_proj(x[..., : self.r])) * self.up_proj(x[..., self.r :]))

    def pack(self) -> PackedSparkFFN:
        """Pack the weights as the kernels read them: a second copy, which later changes do not reach.

        Returns:
            The copy.

        Raises:
            ValueError: a layer is no plain nn.Linear, or what `kernels.pack` raises.
        """
        for name in ("gate_proj", "up_proj", "down_proj"):
            if type(layer := getattr(self, name)) is not nn.Linear:
                raise ValueError(f"{name}: a {type(layer).__name__} stands here; only plain linear layers are packed.")
        gate, down = (kernels.pack(layer.weight) for layer in (self.gate_proj, self.down_proj))
        return PackedSparkFFN(gate, kernels.pack_rows(self.up_proj.weight), down, self.act_fn, self.r)

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {"d_model": self.d_model, "d_ff": self.d_ff, "k": self.k, "r": self.r, "act": self.act}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> SparkFFN:
        """Make it in the dtype of what stands in its place; the values come from the weights file."""
        return cls(**spec).to(next(original.parameters()).dtype)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_ff={self.d_ff}, k={self.k}, r={self.r}, act={self.act}"


@dataclass(frozen=True, eq=False)
class PackedSparkFFN:
    """The weights of a SparkFFN for one token at a time; of the up and down projection only active neurons are read.

    Attributes:
        gate: reads the first r inputs.
        up: reads the others.
        down: back to the width of the hidden states.
        activation: behind statistical top-k.
        r: how many inputs the gate reads.
    """

    gate: kernels.PackedWeight
    up: kernels.PackedRows
    down: kernels.PackedWeight
    activation: nn.Module
    r: int

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Apply it to x [d_model], one token; the shape stays."""
        if x.dim() != 1:
            raise ValueError(f"x: shape {tuple(x.shape)} was given; give one token, [{self.down.out_features}].")
        hidden = self.activation(kernels.dense_linear(x[: self.r], self.gate).float())
        active = hidden.nonzero()[:, 0]
        hidden[active] *= kernels.output_rows(x[self.r :], self.up, active.int())
        return kernels.sparse_linear(hidden, self.down, threshold=0.0).to(x.dtype)


def spark_lm(
    config: LlamaConfig,
    *,
    density: float | None = 0.08,
    attended: int | None = 256,
    r: int | None = None,
    act: str = "gelu_tanh",
) -> nn.Module:
    """Make a LlamaForCausalLM with random weights whose MLPs and attention are Spark's, to be trained from scratch.

    It is saved by `actkit.save`, loaded by `actkit.load` and generates through transformers.

    Args:
        config: of the Llama with gated MLPs that it has as many weights as.
        density: share of the neurons that are active; None for ordinary gated MLPs.
        attended: keys per query; None for ordinary attention.
        r: inputs that the gate reads, by default about half. Of a head, half of the features choose the keys.
        act: as in SparkFFN; the config takes it over.

    Returns:
        The model.

    Raises:
        ValueError: sizes do not fit, or the MLPs have biases.
    """
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(config)
    if density is not None:
        if config.mlp_bias:
            raise ValueError("config.mlp_bias: True was given; a SparkFFN has no biases, set it to False.")
        name = activation_function(act).config_name if act in function_names() else None
        if name is None:
            raise ValueError(f"act: {act!r} was given, allowed are functions that transformers names, such as relu.")
        config.hidden_act = name
    model = LlamaForCausalLM(config)
    edits: list[Replace] = []
    for index in range(config.num_hidden_layers):
        path = f"model.layers.{index}"
        if attended is not None:
            edits.append(Replace(f"{path}.self_attn", _attention(config, attended, index)))
        if density is not None:
            mlp = SparkFFN.match_gated(config.hidden_size, config.intermediate_size, density, r, act)
            edits.append(Replace(f"{path}.mlp", mlp))
    for edit in edits:
        edit.module.apply(model._init_weights).to(model.dtype)
    apply_edits(model, edits, lambda: anatomy(model).architecture)
    return model


def _attention(config: LlamaConfig, attended: int, index: int) -> SparkAttention:
    head_dim: int = config.head_dim or config.hidden_size // config.num_attention_heads
    return SparkAttention(
        config.hidden_size,
        config.num_attention_heads,
        head_dim,
        head_dim // 4 * 2,
        attended,
        key_value_heads=config.num_key_value_heads,
        bias=config.attention_bias,
        layer_index=index,
    )


class Sparkify(Transform):
    """Put statistical top-k before the activation of gated MLPs, as Gemma 3n does in its first layers.

    The model must be trained after it.

    Attributes:
        density: share of the neurons that stay active, in (0, 1]; 1 leaves the model as it is.
        first: only in so many blocks, counted from the first; None for all.
    """

    density: float = Field(0.05, gt=0, le=1)
    first: int | None = Field(None, ge=1)

    tags: ClassVar[Tags] = Tags(least_coverage=0.0)  # `first` says how many blocks
    not_proposed: ClassVar[str] = "another activation function changes the model, and pays only after training"

    @classmethod
    def identity(cls) -> Self:
        return cls(density=1.0)

    def targets(self, block: Block) -> Iterable[Linear]:
        return [linear for _, mlp in self._mlps(block) if mlp.gated for linear in (*mlp.inputs, mlp.down)]

    def conflicts(self, earlier: Transform) -> str | None:
        if {"select", "inputs"} & set(earlier.slots):
            return "its thresholds or scales were calibrated on neurons that this changes; sparkify and train first"
        return super().conflicts(earlier)

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        if self.density == 1:
            return
        for _, mlp in self._mlps(block):
            activation = get_module(block.root, mlp.activation)
            if not mlp.gated:
                yield Skip(mlp.path, "its MLP has no gate")
            elif isinstance(activation, StatisticalTopK):
                yield Skip(mlp.activation, "it has a statistical top-k already")
            elif not keeps_zero(activation):
                yield Skip(
                    mlp.activation, f"a {type(activation).__name__} does not map 0 to 0; swap it for relu or gelu"
                )
            else:
                yield Replace(mlp.activation, StatisticalTopK(activation, self.density * mlp.width))
        if block.index == 0:
            yield Note("model", f"{1 - self.density:.0%} of the neurons are switched off; train it before you use it")

    def _mlps(self, block: Block) -> Iterable[tuple[int | None, Mlp]]:
        return block.mlps() if self.first is None or block.index < self.first else ()
