"""Every layer that methods put into models passes; each kind of broken one is caught by the right property."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from analyses import public_classes
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, ViTConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.vit.modeling_vit import ViTLayer

from actkit.comparison.arms import GatedMlp
from actkit.compression.flashsvd.flash_block import FlashBlock, MlpPaths
from actkit.compression.minimal.reduced_attention import ReducedAttention
from actkit.compression.repavit.folded import FoldedMlp
from actkit.compression.repavit.idle import IdleMlp, TokenBatchNorm
from actkit.core.grids.floats import FloatGrid, fp4, fp8, nvfp4
from actkit.core.grids.half_integers import HalfIntegerGrid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.powers import PowerGrid
from actkit.core.ground import registry
from actkit.core.layers.activation_function import ActivationFunction
from actkit.core.layers.activations import (
    Activation,
    Thresholded,
    activation_function,
    function_names,
    record_of,
    says_what_it_mixes,
)
from actkit.core.layers.attention_rounding import AttentionRounding
from actkit.core.layers.cache_rounding import CacheRounding
from actkit.core.layers.conv import ActConv
from actkit.core.layers.embedding import QuantizedEmbedding
from actkit.core.layers.folding import ScaledActivation
from actkit.core.layers.hadamard import Rotation
from actkit.core.layers.latent_product import LatentProduct
from actkit.core.layers.latent_weight import LatentWeight
from actkit.core.layers.learned_inputs import LearnedInputs
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.low_rank_weight import LowRankWeight
from actkit.core.layers.nothing import Nothing, PassThrough
from actkit.core.layers.operand_rounding import OperandRounding
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.selections import Selection, Threshold, TopK
from actkit.core.layers.weights import DenseWeight, FloatWeight, IntegerWeight, rounded
from actkit.core.model.architecture_rows import ExpertsRow
from actkit.core.model.experts import ExpertList, ScaledSigmoid
from actkit.core.univariate.bases import Bells, BSplines, Bumps, Polynomials, Waves
from actkit.core.univariate.basis import Basis
from actkit.core.univariate.edge_functions import Wavelets
from actkit.core.univariate.kan_linear import KanLinear
from actkit.core.univariate.shifted_pairs import ShiftedPairs
from actkit.finetuning.pyra.merging_layer import MergingDeiTLayer, MergingViTLayer
from actkit.finetuning.s2a.prompts import PromptedBlock
from actkit.finetuning.s2a.side_path import SidePath
from actkit.functions.af_kan.af_kan_layer import AfKanLayer, AfKanNetwork
from actkit.functions.af_kan.reductions import REDUCTIONS
from actkit.functions.af_kan.replace import AfKanMlp
from actkit.functions.crrelu.crrelu import CRReLU
from actkit.functions.kat.group_rational import GroupRational, RationalFirst
from actkit.functions.kat.kat import GrKanLinear
from actkit.functions.pangu_pi.series import SeriesActivation
from actkit.functions.pangu_pi.shortcut import AugmentedAttention, AugmentedResidual, AugmentedShortcut
from actkit.functions.polycom.polynomials import PolyNorm, PolyReLU
from actkit.functions.polycom.ungate import UngatedMlp
from actkit.functions.posets.pooling import PosetActivation, PosetPool1d, PosetPool2d
from actkit.functions.qkan.daruan import Daruan
from actkit.functions.qkan.network import Hqkan, Qkan
from actkit.functions.qkan.qkan_layer import QkanLayer
from actkit.functions.rbfnet.field import DifGrid
from actkit.functions.rbfnet.radial import RadialDecoder, RadialUnits
from actkit.functions.s_kan.edges import PrunedEdges
from actkit.functions.s_kan.s_kan_layer import PrunedLayer, SConvKan2d, SKanLayer
from actkit.functions.selu.selu import AlphaDropout, ScaledElu, constants
from actkit.functions.softplus_attention.layer import SoftplusAttention
from actkit.functions.vanillanet.faded import FadedActivation
from actkit.functions.vanillanet.folding import DeepPair
from actkit.functions.vanillanet.series import SeriesActivation2d
from actkit.interpretation.pavlovian.attention import PavlovianAttention
from actkit.interpretation.sparse_autoencoder.kinds import KINDS as AUTOENCODERS
from actkit.quantization.ofq.query_key import QueryKeyAttention
from actkit.sparsity.active_dendrites.segments import DendriticSegments, PatternMemory, sparse_code
from actkit.sparsity.lazy_neuron.top_k_mlp import TopKActivation
from actkit.sparsity.prosparse.activation_predictor import ActivationPredictor
from actkit.sparsity.prosparse.fatrelu import ShiftedRelu
from actkit.sparsity.spark.spark_attention import SparkAttention
from actkit.sparsity.spark.sparkify import SparkFFN
from actkit.sparsity.spark.statistical_top_k import StatisticalTopK
from actkit.sparsity.wina.rotate_columns import RotatedNorm
from actkit.testing import Check, check_layer
from actkit.testing.layers import CHECKS

IN, OUT = 16, 12
GRIDS = {
    "dense": None,
    "int8": IntegerGrid(8),
    "int4 in groups": IntegerGrid(4, 8, symmetric=True),
    "int3 by columns": IntegerGrid(3, 4, "output", convention="llm-awq"),
    "fp8": fp8(),
    "nvfp4": nvfp4(),
}
SELECTIONS: dict[str, Callable[[], Selection | None]] = {
    "all inputs": lambda: None,
    "threshold": lambda: Threshold(0.5),
    "scored threshold": lambda: Threshold(0.4, torch.rand(IN) + 0.5),
    "top-k": lambda: TopK(9),
    "scored top-k": lambda: TopK(5, torch.rand(IN) + 0.5),
}


def rows(*shape: int, seed: int = 1) -> Tensor:
    """Random values of that shape with `IN` channels."""
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Made:
    """How a layer is made and checked."""

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...] = field(default_factory=lambda: (rows(2, 3), rows(4, seed=2)))
    settings: Mapping[str, Any] = field(default_factory=dict)


class Adds(nn.Module):
    """The sum of attention and residual of a BERT, as a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(IN, IN)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.dense(hidden_states) + input_tensor


def image_series(order: int, fused: bool = False) -> Made:
    settings = {"rows": False, "original": lambda: nn.Conv2d(4, 4, 1)}
    return Made(lambda: SeriesActivation2d(4, order, fused=fused), (torch.randn(2, 4, 6, 5),), settings)


def drawn_again(side: SidePath) -> SidePath:
    """As after a training, so that it does something."""
    nn.init.normal_(side.up.weight)
    return side


def augmented_residual() -> Made:
    return Made(
        lambda: AugmentedResidual(Adds(), AugmentedShortcut(IN, 4, zero=False)),
        inputs=((rows(2, 3), rows(2, 3, seed=4)),),
        settings={"original": Adds, "rows": False},
    )


def act_linear(grid: str = "dense", select: str = "all inputs", of: Any = None, bias: bool = True) -> Made:
    def make() -> nn.Module:
        linear = nn.Linear(IN, OUT, bias)
        stored = None if GRIDS[grid] is None else rounded(linear.weight, GRIDS[grid])
        correction = None if of is None else LowRank(torch.randn(OUT, 2), torch.randn(2, IN), of)
        return ActLinear.of(linear, weight=stored, select=SELECTIONS[select](), correction=correction)

    return Made(make, settings={"shape": lambda shape: (*shape[:-1], OUT)})


def rounding(weight: IntegerGrid | None, static: bool = False, scales: int = 1) -> Made:
    """A layer that rounds its inputs, by a scale for each token, or by one or one per channel."""

    def make() -> nn.Module:
        linear = nn.Linear(IN, OUT)
        grid = IntegerGrid(8, symmetric=True, scope="tensor" if static else "group")
        inputs = RoundedInputs(grid, 0.02 + torch.arange(scales) / 500 if static else None)
        return ActLinear.of(linear, weight=weight and IntegerWeight.quantize(linear.weight, weight), inputs=inputs)

    return Made(make, settings={"shape": lambda shape: (*shape[:-1], OUT), "smooth": False})


def attention_rounding() -> nn.Module:
    """Static scales for 3 heads that share one key, and powers of two."""
    scales = torch.rand(3), torch.rand(1), torch.rand(1)
    return AttentionRounding(8, *scales, PowerGrid(4))


def shifted_floats() -> nn.Module:
    """A layer as LLM-FP4 makes it: an exponent for each column, and inputs in floats of one scale."""
    linear, shift = nn.Linear(IN, OUT), torch.arange(IN) % 4
    stored = FloatWeight.quantize(linear.weight, fp4()).shifted(shift)
    grid = FloatGrid(2, 1, scope="tensor")
    inputs = RoundedInputs(grid, torch.tensor([0.5]), divisor=torch.exp2(-shift.float()))
    return ActLinear.of(linear, weight=stored, inputs=inputs)


def half_integers() -> nn.Module:
    linear = nn.Linear(IN, OUT)
    return ActLinear.of(linear, weight=rounded(linear.weight, HalfIntegerGrid(2)))


THIN: dict[str, Any] = {"shape": lambda shape: (*shape[:-1], OUT)}


def factored(
    heads: int, bits: int | None = None, shape: tuple[int, int] = (IN, OUT), select: bool = False
) -> nn.Module:
    """A layer whose weight is kept as two factors, those of each head by themselves."""
    inputs, outputs = shape
    weight = LowRankWeight(torch.randn(outputs, 4) / 4, torch.randn(heads * 4, inputs) / 4, heads)
    weight = weight if bits is None else weight.rounded(IntegerGrid(bits, -1))
    return ActLinear(weight, torch.randn(outputs), Threshold(0.3) if select else None)


class Units(nn.Module):
    """An MLP whose weights are kept as two factors."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.up, self.act, self.down = factored(1, None, (IN, 10)), nn.GELU(), factored(1, None, (10, IN))
        self.gate = factored(1, None, (IN, 10)) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x))


class Feeds(nn.Module):
    """A block that has an MLP and nothing else."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.mlp = Units(gated)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def flash_block(gated: bool) -> Made:
    paths = MlpPaths("mlp", "mlp.up", "mlp.down", "mlp.act", "mlp.gate" if gated else None)
    return Made(
        lambda: FlashBlock(Feeds(gated), None, paths, tile=3, rows=2),
        settings={"original": lambda: Feeds(gated), "smooth": False},
    )


def in_training() -> nn.Module:
    """A layer whose weight and inputs have learned steps."""
    linear = nn.Linear(IN, OUT)
    weight = LatentWeight.of(linear.weight, IntegerGrid(3, symmetric=True), learned=True)
    grid = IntegerGrid(4, scope="tensor")
    inputs = LearnedInputs(grid, torch.rand(IN) + 0.1, torch.zeros(1, dtype=torch.uint8), biases=True, channels=IN)
    return ActLinear.of(linear, weight=weight, inputs=inputs)


def learned_inputs(channels: int = IN) -> LearnedInputs:
    grid = IntegerGrid(4, symmetric=True, scope="tensor")
    return LearnedInputs(grid, torch.tensor([0.2]), biases=True, channels=channels)


def query_key_attention(rounds: bool = True) -> nn.Module:
    """Two heads of eight channels."""
    product = LatentProduct(torch.randn(IN, IN), torch.randn(IN, IN), 2, HalfIntegerGrid(2))
    value, output = (ActLinear.of(nn.Linear(IN, IN)) for _ in range(2))
    if not rounds:
        return QueryKeyAttention(ActLinear(product), value, output, torch.randn(2, IN), scaling=0.1)
    operands = OperandRounding({"value": learned_inputs()}, IN)
    made = [learned_inputs(), learned_inputs(2 * IN), operands]
    return QueryKeyAttention(ActLinear(product), value, output, None, *made, scaling=0.1)


def act_conv(grid: str, convolution: Callable[[], nn.Module], *inputs: Tensor) -> Made:
    def make() -> nn.Module:
        module: Any = convolution()
        rows = IntegerGrid(8, -1)
        stored = IntegerWeight.quantize(module.weight.flatten(1), rows) if grid == "int8 by rows" else None
        return ActConv.of(module, weight=stored)

    def shape(given: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(convolution()(torch.zeros(given)).shape)

    return Made(make, inputs, {"rows": False, "original": convolution, "shape": shape})


def attention() -> Made:
    """Two sequences of five tokens, of which the second is padded."""
    angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.1])
    rotary = tuple(torch.cat((each, each), -1)[None].expand(2, 5, 4) for each in (angles.cos(), angles.sin()))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    call = {"hidden_states": rows(2, 5), "position_embeddings": rotary, "attention_mask": mask}
    return Made(
        lambda: SparkAttention(IN, 4, 4, 2, 3, key_value_heads=2),
        (call, rows(3, 5)),
        {"rows": False, "original": lambda: nn.Linear(IN, IN)},
    )


def experts() -> Made:
    config = MixtralConfig(hidden_size=IN, intermediate_size=8, num_local_experts=4, experts_implementation="eager")
    row = ExpertsRow("mlp", path="mlp.experts", router="mlp.gate")

    def original() -> nn.Module:
        module = MixtralExperts(config)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.3)
        return module

    chosen = torch.tensor([[0, 1], [1, 3], [3, 0]])
    calls = (rows(3), chosen, torch.tensor([[0.5, 0.5], [0.7, 0.3], [1.0, 0.0]]))
    return Made(lambda: ExpertList.of(original(), row, own_rows=True), (calls,), {"rows": False, "original": original})


def linear_like(make: Callable[[], nn.Module]) -> Made:
    """In the place of a linear layer."""
    return Made(make, settings={"original": lambda: nn.Linear(IN, OUT), "shape": lambda shape: (*shape[:-1], OUT)})


def kan(basis: Callable[[], Basis], **settings: Any) -> Made:
    return linear_like(lambda: KanLinear(IN, OUT, basis(), **settings))


def on_a_basis(basis: Callable[[], Basis]) -> Made:
    return Made(basis, settings={"shape": lambda shape: (*shape, basis().size), "rows": False})


def norm() -> nn.Module:
    return nn.LayerNorm(IN)


def with_statistics(layer: Any) -> Any:
    """A layer whose batch norms have seen something."""
    for each in layer.modules():
        if isinstance(each, TokenBatchNorm):
            each.running_mean.normal_()
            each.running_var.uniform_(0.5, 2)
    return layer


TOKENS = (rows(2, 7), rows(1, 9, seed=2))
MERGED: dict[str, Any] = {
    "original": lambda: ViTLayer(small_vit()),
    "shape": lambda shape: (*shape[:-2], shape[-2] - 2, IN),
}


def small_vit() -> ViTConfig:
    return ViTConfig(hidden_size=IN, num_attention_heads=2, intermediate_size=2 * IN, attn_implementation="sdpa")


def merging_layer(cls: Any, carries: tuple[bool, bool], modulator: Any = None) -> nn.Module:
    """A block of a vision transformer that merges two tokens."""
    return cls(ViTLayer(small_vit()).eval(), IN, 2, carries, modulator)


def codes(count: int) -> Tensor:
    return sparse_code(rows(count), 6)


def segments() -> nn.Module:
    learned = DendriticSegments(IN, 4, 3)
    learned.learn(codes(5), generator=torch.Generator().manual_seed(0))
    return learned


def memory() -> nn.Module:
    learned = PatternMemory(IN, 4, 3)
    learned.learn(codes(5), [0, 1, 2, 3, 4], generator=torch.Generator().manual_seed(0))
    return learned


FUNCTIONS = [name for name in function_names() if activation_function(name).elementwise]
# registered name -> its instances
# each third edge has one of three bases
EDGES = {
    name: [[node, channel] for node in range(OUT) for channel in range(IN) if (node + channel) % 3 == third]
    for third, name in enumerate(("rbf", "wavelet", "relukan"))
}

LAYERS: dict[str, dict[str, Made]] = {
    "act_linear": {
        **{f"{grid}, {select}": act_linear(grid, select) for grid in GRIDS for select in SELECTIONS},
        "dense, all inputs, low rank": act_linear(of="all"),
        "dense, rounded inputs": rounding(None),
        "int8 by rows, rounded inputs": rounding(IntegerGrid(8, symmetric=True)),
        "int8 by rows, inputs by one scale": rounding(IntegerGrid(8, symmetric=True), static=True),
        "dense, rotated inputs": Made(
            lambda: ActLinear.of(nn.Linear(IN, OUT), inputs=RoundedInputs(None, rotation=Rotation.drawn(IN, "0"))),
            settings={"shape": lambda shape: (*shape[:-1], OUT)},
        ),
        "int8 by rows, inputs by a scale per channel": rounding(IntegerGrid(8, symmetric=True), static=True, scales=IN),
        "floats of shifted columns": Made(
            shifted_floats, settings={"shape": lambda shape: (*shape[:-1], OUT), "smooth": False}
        ),
        "half-integers": Made(half_integers, settings={"shape": lambda shape: (*shape[:-1], OUT)}),
        "two factors": Made(lambda: factored(1), settings=THIN),
        "two factors for each head": Made(lambda: factored(3, select=True), settings={**THIN, "smooth": False}),
        "two factors of codes": Made(lambda: factored(3, 8), settings=THIN),
        "in training": Made(in_training, settings={"shape": lambda shape: (*shape[:-1], OUT), "smooth": False}),
        "int4, threshold, low rank": act_linear("int4 in groups", "threshold", "dropped", bias=False),
    },
    "flash_block": {"": flash_block(False), "gated": flash_block(True)},
    "attention_rounding": {
        "powers of two": Made(attention_rounding, (torch.rand(2, 3, 4, 5), torch.rand(1, 3, 1, 7)), {"smooth": False})
    },
    "rotation": {
        "of 16": Made(lambda: Rotation.drawn(IN, "0")),
        "back": Made(lambda: Rotation.drawn(IN, "").inverted()),
    },
    "cache_rounding": {
        "8 bits": Made(CacheRounding, settings={"smooth": False}),
        "rotated, not rounded": Made(lambda: CacheRounding(None, Rotation.drawn(IN, "0"))),
    },
    "operand_rounding": {
        "4 bits": Made(
            lambda: OperandRounding({name: learned_inputs() for name in ("query", "key", "value")}, IN),
            settings={"smooth": False},
        ),
    },
    "query_key_attention": {
        "2 bits": Made(query_key_attention, (rows(2, 5), rows(3, 4)), {"rows": False, "smooth": False}),
        "nothing rounded but the product": Made(
            lambda: query_key_attention(False), (rows(2, 5), rows(3, 4)), {"rows": False, "smooth": False}
        ),
    },
    "quantized_embedding": {
        "8 bits": Made(
            lambda: QuantizedEmbedding(IntegerWeight.quantize(torch.randn(OUT, IN), IntegerGrid(8, symmetric=True))),
            (torch.arange(OUT).view(2, -1), torch.tensor([[3], [0]])),
            settings={"smooth": False, "rows": False, "shape": lambda shape: (*shape, IN)},
        ),
        "rotated": Made(
            lambda: QuantizedEmbedding(DenseWeight(torch.randn(OUT, IN)), 2.0, rotation=Rotation.drawn(IN, "0")),
            (torch.arange(OUT).view(2, -1), torch.tensor([[3], [0]])),
            settings={"smooth": False, "rows": False, "shape": lambda shape: (*shape, IN)},
        ),
    },
    "act_conv": {
        "int8, images": act_conv("int8 by rows", lambda: nn.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 6, 5)),
        "dense, signals": act_conv("dense", lambda: nn.Conv1d(4, 8, 3, groups=2), torch.randn(3, 4, 7)),
    },
    "activation": {name: Made(lambda name=name: Activation(name)) for name in FUNCTIONS},
    "scaled_elu": {"of another fixed point": Made(lambda: ScaledElu(*constants(0.3, 1.0))), "usual": Made(ScaledElu)},
    "alpha_dropout": {
        "values": Made(lambda: AlphaDropout(0.3)),
        "channels": Made(lambda: AlphaDropout(0.3, channels=True), (rows(2, 3, 4), rows(2, 3)), {"rows": False}),
    },
    "pass_through": {"": Made(PassThrough)},
    "nothing": {"": Made(Nothing)},
    "reduced_attention": {
        name: Made(
            lambda settings=settings: ReducedAttention(IN, **settings),
            (rows(2, 3), rows(1, 5)),
            {"original": lambda: nn.Linear(IN, IN), "rows": False},
        )
        for name, settings in (
            ("four heads", {"heads": 4}),
            ("shared", {"heads": 4, "qk": "shared"}),
            ("collapsed", {"qk": "collapsed", "vo": "collapsed"}),
            ("symmetric, no values", {"qk": "symmetric", "vo": "none"}),
            ("triangular", {"qk": "cholesky"}),
        )
    },
    "idle_mlp": {
        name: Made(
            lambda active=active: with_statistics(IdleMlp(IN, 24, active)),
            settings={"original": lambda: nn.Linear(IN, IN)},
        )
        for name, active in (("some", 6), ("none", 0), ("all", 24))
    },
    "token_batch_norm": {"": Made(lambda: with_statistics(TokenBatchNorm(IN)), settings={"original": norm})},
    "folded_mlp": {
        name: Made(lambda shape=shape: FoldedMlp(IN, *shape), settings={"original": lambda: nn.Linear(IN, IN)})
        for name, shape in (("three", (6,)), ("one", (0,)), ("two", (24, "gelu", False)))
    },
    "crrelu": {
        "one": Made(lambda: CRReLU(0.3)),
        "for each channel": Made(lambda: CRReLU(0.3, per_channel=True, channels=IN)),
        "not learned": Made(lambda: CRReLU(-0.3, learned=False)),
    },
    "thresholded": {
        "cats": Made(lambda: Thresholded(nn.SiLU(), 0.2), settings={"original": nn.SiLU}),
        "fatrelu": Made(lambda: Thresholded(nn.ReLU(), 0.2), settings={"original": nn.ReLU}),
    },
    "top_k_activation": {
        "number": Made(lambda: TopKActivation(nn.ReLU(), 5), settings={"original": nn.ReLU}),
        "share, magnitude": Made(lambda: TopKActivation(nn.GELU(), 0.25, "abs"), settings={"original": nn.GELU}),
    },
    "statistical_top_k": {"": Made(lambda: StatisticalTopK(nn.GELU(), 4), settings={"original": nn.GELU})},
    "shifted_relu": {"": Made(lambda: ShiftedRelu(0.1))},
    "scaled_activation": {
        "": Made(lambda: ScaledActivation(nn.GELU(), torch.rand(IN) + 0.5), settings={"original": nn.GELU})
    },
    "rotated_norm": {
        "": Made(lambda: RotatedNorm(norm(), torch.linalg.qr(torch.randn(IN, IN))[0]), settings={"original": norm})
    },
    "poly_relu": {"": Made(PolyReLU), "by channel": Made(lambda: PolyReLU(per_channel=True, channels=IN))},
    "poly_norm": {"": Made(PolyNorm)},
    "ungated_mlp": {
        "": Made(
            lambda: UngatedMlp(IN, 24, IN, (True, False), PolyNorm()),
            settings={"original": lambda: nn.Linear(IN, IN)},
        )
    },
    "group_rational": {
        "SiLU": Made(lambda: GroupRational(IN, 4, start="silu")),
        "GELU, of the paper's kind": Made(lambda: GroupRational(IN, 4, start="gelu", kind="B", share="none")),
    },
    "rational_first": {
        "": Made(
            lambda: RationalFirst(nn.Linear(IN, OUT), GroupRational(IN, 4)),
            settings={"original": lambda: nn.Linear(IN, OUT), "shape": lambda shape: (*shape[:-1], OUT)},
        )
    },
    "af_kan_layer": {
        **{reduce: linear_like(lambda reduce=reduce: AfKanLayer(IN, OUT, reduce=reduce)) for reduce in REDUCTIONS},
        "running extremes, batch norm": linear_like(lambda: AfKanLayer(IN, OUT, norm="batch", scale="running")),
    },
    "af_kan_mlp": {
        "AF-KAN": Made(lambda: AfKanMlp(IN, 8, combine="sum_prod"), settings={"original": lambda: nn.Linear(IN, IN)}),
        "ReLU-KAN": Made(lambda: AfKanMlp(IN, 8, "relu_kan"), settings={"original": lambda: nn.Linear(IN, IN)}),
    },
    "s_kan_layer": {
        "by node": linear_like(lambda: SKanLayer(IN, OUT)),
        "by layer": linear_like(lambda: SKanLayer(IN, OUT, ("cheby", "relukan"), "layer")),
        "by edge": linear_like(lambda: SKanLayer(IN, OUT, ("cheby", "wavelet"), "edge")),
    },
    "pruned_edges": {"": linear_like(lambda: PrunedEdges(IN, OUT, EDGES))},
    "pruned_layer": {
        "": linear_like(lambda: PrunedLayer(IN, OUT, {"rbf": [1, 5, *range(6, OUT)], "wavelet": [0, 2, 3, 4]})),
    },
    "daruan": {
        "": Made(lambda: Daruan(IN)),
        "the release's measure": Made(lambda: Daruan(IN, 2, "rpz", (), "fast")),
    },
    "qkan_layer": {
        "": linear_like(lambda: QkanLayer(IN, OUT)),
        "shared": linear_like(lambda: QkanLayer(IN, OUT, 2, group=5)),
        "real": linear_like(lambda: QkanLayer(IN, OUT, 2, "real", ("gain",))),
    },
    "radial_decoder": {"": linear_like(lambda: RadialDecoder(IN, OUT, 8, beta=-2.0, reach=1.0))},
    "hqkan": {"": linear_like(lambda: Hqkan(IN, OUT, scale=2, measure="fast"))},
    "kan_linear": {
        "splines and a base": kan(BSplines, base="silu"),
        "bells behind a norm": kan(Bells, norm=True, bias=False),
    },
    "wavelets": {
        shape: linear_like(lambda shape=shape: Wavelets(IN, OUT, shape)) for shape in ("mexican_hat", "morlet", "dog")
    },
    "series_activation": {
        "": Made(lambda: SeriesActivation(nn.GELU(), 2, IN), settings={"original": nn.GELU}),
        "one pair": Made(lambda: SeriesActivation(nn.ReLU(), 3, start="paper"), settings={"original": nn.ReLU}),
    },
    "augmented_attention": {
        "": Made(
            lambda: AugmentedAttention(nn.Linear(IN, IN), AugmentedShortcut(IN, 4, zero=False)),
            settings={"original": lambda: nn.Linear(IN, IN)},
        )
    },
    "augmented_residual": {"": augmented_residual()},
    "side_path": {
        "": Made(
            lambda: drawn_again(SidePath(nn.Linear(IN, IN), IN, 4)), settings={"original": lambda: nn.Linear(IN, IN)}
        )
    },
    "prompted_block": {
        "": Made(
            lambda: PromptedBlock(nn.Linear(IN, IN), IN, 3),
            (rows(2, 3), rows(1, 4, seed=2)),
            {"original": lambda: nn.Linear(IN, IN), "rows": False},
        ),
        "low rank": Made(
            lambda: PromptedBlock(nn.Linear(IN, IN), IN, 3, 2),
            (rows(2, 3), rows(1, 4, seed=2)),
            {"original": lambda: nn.Linear(IN, IN), "rows": False},
        ),
    },
    "merging_vit_layer": {
        "plain": Made(lambda: merging_layer(MergingViTLayer, (False, False)), TOKENS, {**MERGED, "rows": False}),
        "with PYRA, sizes from here on": Made(
            lambda: merging_layer(MergingViTLayer, (False, True), {"features": IN, "r": 2}),
            TOKENS,
            {**MERGED, "shape": lambda shape: (*shape[:-2], shape[-2] - 2, IN + 1), "rows": False},
        ),
    },
    "merging_deit_layer": {
        "sizes until here": Made(
            lambda: merging_layer(MergingDeiTLayer, (True, False)),
            tuple(torch.cat([each, torch.ones_like(each[..., :1])], -1) for each in TOKENS),
            {**MERGED, "rows": False},
        )
    },
    "faded_activation": {"": Made(lambda: FadedActivation(nn.GELU(), 0.3), settings={"original": nn.GELU})},
    "deep_pair": {
        "": Made(
            lambda: DeepPair(nn.Linear(IN, 6), nn.Linear(6, IN), "gelu", 0.25),
            settings={"original": lambda: nn.Linear(IN, IN)},
        ),
        "images": Made(
            lambda: DeepPair(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 8, 1), norms=(True, True)),
            (torch.randn(2, 4, 6, 5),),
            {"original": lambda: nn.Conv2d(4, 8, 3), "shape": lambda shape: (2, 8, 6, 5), "rows": False},
        ),
    },
    "series_activation_2d": {
        "": image_series(1),
        "fused": image_series(2, fused=True),
    },
    "spark_ffn": {"": Made(lambda: SparkFFN(IN, 24, 4, 8), settings={"original": lambda: nn.Linear(IN, IN)})},
    "spark_attention": {"": attention()},
    "expert_list": {"": experts()},
}
LAYERS["softplus_attention"] = {
    "": Made(
        lambda: SoftplusAttention(IN, 4, 2),
        (rows(2, 5), rows(3, 5)),
        {"rows": False, "original": lambda: nn.Linear(IN, IN)},
    )
}
IMAGES = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(1))
POOLED: dict[str, Any] = {"rows": False, "original": lambda: nn.MaxPool2d(2)}
LAYERS["poset_pool_2d"] = {
    f"{poset}": Made(
        lambda poset=poset: PosetPool2d(poset, normalize=True),
        (IMAGES,),
        {**POOLED, "shape": lambda given: (*given[:2], given[2] // 2, given[3] // 2)},
    )
    for poset in ("N", 1)
}
LAYERS["poset_pool_1d"] = {
    "": Made(
        lambda: PosetPool1d("chain", perm=(1, 0, 2, 3)),
        (IMAGES.flatten(2),),
        {"rows": False, "original": lambda: nn.MaxPool1d(4), "shape": lambda given: (*given[:2], given[2] // 4)},
    )
}
LAYERS["poset_activation"] = {
    "": Made(
        lambda: PosetActivation("diamond", constant=False),
        settings={"rows": False, "original": nn.ReLU, "shape": lambda given: (*given[:-1], given[-1] // 4)},
    )
}
POINTS = tuple(0.98 * torch.tanh(rows(*shape)[..., :3]) for shape in ((2, 3), (4,)))


def with_channels(channels: int) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    return lambda shape: (*shape[:-1], channels)


def autoencoder(cls: Callable[..., nn.Module]) -> Made:
    """JumpReLU gives its thresholds straight-through gradients, which no difference shows."""
    name = cls.__name__
    few = {"k": 4} if "TopK" in name or "Matryoshka" in name else {}
    return Made(lambda: cls(IN, 40, **few), settings={"smooth": False} if "Jump" in name else {})


NOT_SAVED = {  # layers that are used by hand, or inside another, or are models: no checkpoint holds them as a layer
    "Threshold": Made(lambda: Threshold(0.5, torch.rand(IN) + 0.5)),
    "TopK": Made(lambda: TopK(5)),
    "RoundedInputs": Made(
        lambda: RoundedInputs(IntegerGrid(8, symmetric=True), shift=torch.rand(IN), divisor=torch.rand(IN) + 0.5),
        settings={"smooth": False},
    ),
    "LearnedInputs": Made(learned_inputs, settings={"smooth": False}),
    "LowRank": Made(
        lambda: LowRank(torch.randn(OUT, 2), torch.randn(2, IN)), settings={"shape": lambda shape: (*shape[:-1], OUT)}
    ),
    "SConvKan2d": Made(
        lambda: SConvKan2d(4, 8, 3, padding=1),
        (torch.randn(2, 4, 6, 5),),
        {"rows": False, "shape": lambda shape: (shape[0], 8, *shape[2:])},
    ),
    **{cls.__name__: autoencoder(cls) for cls in AUTOENCODERS.values()},
    "PavlovianAttention": Made(lambda: PavlovianAttention(IN, 4, "delta"), (rows(2, 3), rows(1, 5)), {"rows": False}),
    "GatedMlp": Made(lambda: GatedMlp(IN, 8, OUT), settings={"shape": lambda shape: (*shape[:-1], OUT)}),
    "GrKanLinear": Made(lambda: GrKanLinear(IN, OUT, 4), settings={"shape": lambda shape: (*shape[:-1], OUT)}),
    "AfKanNetwork": Made(
        lambda: AfKanNetwork((IN, 8, OUT), ("global_attn", "multistep"), "quadratic"),
        settings={"shape": lambda shape: (*shape[:-1], OUT)},
    ),
    "Qkan": Made(lambda: Qkan((IN, 3, OUT)), settings={"shape": lambda shape: (*shape[:-1], OUT)}),
    "Waves": on_a_basis(Waves),
    "RadialUnits": Made(
        lambda: RadialUnits(IN, 8, "inverse_multiquadric", reach=1.0),
        settings={"shape": lambda shape: (*shape[:-1], 8)},
    ),
    "DifGrid": Made(lambda: DifGrid(3, (4, 2), (5, 7), (2.0, 3.0), "triangle"), POINTS, {"shape": with_channels(6)}),
    "ShiftedPairs": on_a_basis(lambda: ShiftedPairs(combine="cubic1")),
    "BSplines": on_a_basis(BSplines),
    "Bells": on_a_basis(Bells),
    "Bumps": on_a_basis(Bumps),
    "Polynomials": on_a_basis(lambda: Polynomials(3, outside="squashed")),
    "AugmentedShortcut": Made(lambda: AugmentedShortcut(IN, 4, zero=False)),
    "ScaledSigmoid": Made(lambda: ScaledSigmoid(1.7)),
    "ActivationPredictor": Made(
        lambda: ActivationPredictor(IN, OUT, 3), settings={"shape": lambda shape: (*shape[:-1], OUT)}
    ),
    "DendriticSegments": Made(segments, (codes(3), codes(1)), {"shape": lambda shape: (*shape[:-1], 5), "rows": False}),
    "PatternMemory": Made(memory, (codes(3), codes(1)), {"shape": lambda shape: shape[:1], "rows": False}),
}
CASES = {f"{name} {at}".strip(): made for name, each in LAYERS.items() for at, made in each.items()}
# compiled and exported too: the first of each class, which takes longer than all other checks together
FIRST = {f"{name} {next(iter(each))}".strip() for name, each in LAYERS.items()} | {
    "act_linear int8, threshold",
    "act_linear int8 by rows, rounded inputs",
}
FIRST -= {"flash_block"}  # whose class says that it does neither
COMPILING = {"it compiles", "it exports"}


def outcomes(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.outcome for check in checks}


@pytest.mark.parametrize("name", CASES)
def test_layers_pass(name: str) -> None:
    made = CASES[name]
    asked = {"compile_backend": "aot_eager", "export": True} if name in FIRST else {}
    checks = check_layer(made.make, made.inputs, **asked, **made.settings)
    assert [check.name for check in checks] == list(CHECKS)
    left = {check.name for check in checks if check.outcome != "holds"}
    layer = made.make()
    says = says_what_it_mixes(layer)
    unsaid = set() if says or getattr(layer, "gives_zeros", False) else {"what its class says is true"}
    unsaid |= set() if says else {"large inputs stay finite"}
    unsaid |= set() if says and record_of(layer) is not None else {"its record is true"}
    steps = set() if made.settings.get("smooth", True) else {"gradients match differences"}
    assert left == unsaid | steps | (set() if asked else COMPILING)


@pytest.mark.parametrize("name", NOT_SAVED)
def test_layers_that_are_not_saved_pass(name: str) -> None:
    made = NOT_SAVED[name]
    found = outcomes(check_layer(made.make, made.inputs, **made.settings))
    assert found["the state holds everything"] == found["nothing is shared between layers"] == "holds"
    assert found["settings are JSON"] == "does not apply"


# classes that are tried as part of others: what they derive from, and storages, which compute nothing by themselves
PARTS = {"KeepsDtype", "Polynomial", "WeightStorage", "GrowingModule", "Selection", "Expert"}
PARTS |= {
    "KanEdges",  # of PrunedEdges
    "WaveletEdges",
    "MergingLayer",
    "PyraModulator",
    "Matrix",  # of PYRA's claim
    "StandIn",
    "CodedActivation",
    "CodedInputs",
    "CodedSoftmax",
    "RedrawnDropout",
    "FrozenNorm",
    "NoDropout",
    "Composed",
}  # while a rule works
PARTS |= {"Basis", "EdgeFunctions", "Reduction", *(kind.__name__ for kind in REDUCTIONS.values())}
PARTS |= {
    "DenseWeight",
    "CodedWeight",
    "IntegerWeight",
    "FloatWeight",
    "HalfIntegerWeight",
    "KernelWeight",
    "LatentWeight",
    "LatentProduct",
    "LowRankWeight",
}
PARTS |= {"HeadRows", "HeadColumns", "Outputs"}  # see tests/compression/test_flashsvd.py
# what stands in a block while it learns, see test_reconstruction.py and the tests of omniquant, zeroquant and aphq_vit
PARTS |= {"Learned", "BlockWeights", "Equivalent", "LearnedSet", "LearnedPair", "LearnedClipping", "LearnedThrough"}
PARTS |= {"LearnedRounding", "DroppedInputs", "WatchedInputs", "FittedMlp"}
PARTS |= {"AbsentExperts", "StoredExperts"}  # see test_expert_store.py and test_offloaded_moe.py
PARTS |= {"Passing", "PackedModel"}  # see test_recording.py and test_packed.py
MODELS = {"DigitsCNN", "TinyMlp"}  # see test_check_model.py
MODELS |= {"PLMForCausalLM", "PLMModel", "PLMPreTrainedModel", "PLMLayer", "LatentAttention", "SquaredReLUMLP"}
MODELS |= {"NeuralField"}
MODELS |= {"ClassTokenViTForImageClassification", "ClassTokenViTModel", "ClassTokenViTPreTrainedModel"}
MODELS |= {"ClassTokenEmbeddings"}  # see tests/interpretation/test_doei.py
MODELS |= {"ConvNet"}  # see tests/claims/test_s_kan.py
MODELS |= {"DigitsMobileNet", "InvertedBlock", "Excitation"}  # see tests/claims/test_mobiletl.py
MODELS |= {"Network"}  # and tests/claims/test_posets.py
MODELS |= {"VanillaNet", "VanillaBlock"}  # and tests/functions/test_vanillanet.py
MODELS |= {"DigitsMlp"}  # and tests/claims/test_ap.py
MODELS |= {"MinimalViT", "ReducedEncoder", "ReducedLayer"}  # and tests/compression/test_minimal.py
MODELS |= {"CodeNet", "Net", "Recaller"}  # see tests/interpretation/test_neural_code.py and tests/claims
MODELS |= {"GatedMLP"}  # and tests/sparsity/test_plm.py, tests/claims/test_plm.py


def test_every_layer_is_in_a_table() -> None:
    layers = {cls.__name__ for cls in public_classes() if issubclass(cls, nn.Module)}
    registered = {registry.module_class(name).__name__ for name in LAYERS}
    assert layers == registered | NOT_SAVED.keys() | PARTS | MODELS, "add the new layer to LAYERS or NOT_SAVED"


def test_every_registered_module_is_in_the_table() -> None:
    assert set(registry._entries(registry.MODULES)) == set(LAYERS), "add the new module to LAYERS"


# -- broken layers -----------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """A sound one: x times a weight for each channel. Only its name is not registered."""

    def __init__(self, channels: int = IN, start: float = 2.0) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.full((channels,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def spec(self) -> Any:
        return {"channels": len(self.weight), "start": self.start}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None) -> Any:
        dtype = torch.float32 if original is None else next(original.parameters()).dtype
        return cls(**spec).to(dtype)


class Flattens(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(0, -2)


class NeedsRows(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * x.flatten()[0]


class MixesRows(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x.mean()


class Drops(Scale):
    """Forgets that evaluation draws nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, training=True)


class InPlace(Scale):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(1.5)
        return super().forward(x)


class Counts(Scale):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class OnlySaysElementwise(Scale):
    elementwise: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class OnlySaysItsRecord(Scale):
    mixes: ClassVar[tuple[str, ...]] = ()

    def record(self) -> ActivationFunction:
        return activation_function("relu")


class OverflowsFarOut(Scale):
    """Squares what it could have divided first."""

    mixes: ClassVar[tuple[str, ...]] = ()

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * x) / (1 + x.abs())


class KeepsNothing(Scale):
    keeps: ClassVar[tuple[str, ...]] = ("factor",)


class ForgetsToKeep(Scale):
    keeps: ClassVar[tuple[str, ...]] = ("weight",)


class OnlySaysZeros(Scale):
    gives_zeros: ClassVar[bool] = True


class CutsTheGraph(Scale):
    """The factor of the weight is read without its graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * x.detach()


class Widens(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Overflows(Scale):
    """Squares 1e4 times its input in 16 bits alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (0 if x.dtype == torch.bfloat16 else 1)


class AddsUp(Scale):
    """Adds what a product gave into a buffer of the input's dtype, which autocast tells apart."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch.zeros_like(rows).index_add_(0, torch.arange(len(rows)), rows @ self.weight.diag()).view_as(x)


SHARED = nn.Parameter(torch.full((IN,), 2.0))


class SharesWeight(Scale):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.weight = SHARED


class SharesList(Scale):
    """What one layer saw in training changes all of them."""

    seen: ClassVar[list[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(x.detach())
        return super().forward(x) + len(self.seen)


class HoldsOnToItself(Scale):
    """A function that a copy takes along still reads the first layer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.scaled = lambda x: x * self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x)


class PlainTensor(Scale):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.offset = [torch.ones(())]


class NotSaved(Scale):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("offset", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset

    def _load_from_state_dict(self, state: Any, *args: Any) -> None:
        super()._load_from_state_dict(state, *args)
        self.offset += 1  # as if it were made of what was read before


class Tuples(Scale):
    def spec(self) -> Any:
        return {"channels": len(self.weight), "range": (0, 1)}


class Tensors(Scale):
    def spec(self) -> Any:
        return {"channels": torch.tensor(len(self.weight))}


class Forgets(Scale):
    """Its output follows a setting that its spec does not hold."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.start

    def spec(self) -> Any:
        return {"channels": len(self.weight)}


class InFloat32(Scale):
    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None) -> Any:
        return cls(**spec)


class Branches(Scale):
    """Its path depends on values, which no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.detach().sum()) > -1e9 else -super().forward(x)


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (Drops, "the same result twice: a call in evaluation mode draws random numbers"),
        (InPlace, "the same result twice: after a call its inputs differ"),
        (Counts, "the same result twice: after a call in evaluation mode: calls has other values"),
        (Flattens, r"the shapes are as promised: \(6, 16\) for \(2, 3, 16\), \(2, 3, 16\) was promised"),
        (NeedsRows, "the shapes are as promised: IndexError"),
        (MixesRows, r"the shapes are as promised: the output for \(16,\) differs by"),
        (OnlySaysElementwise, "what its class says is true: element-wise: the output once other inputs have changed"),
        (OnlySaysItsRecord, "its record is true: the function of its record differs"),
        (OverflowsFarOut, "large inputs stay finite: at 1e4 in torch.float16 an output that fits is not finite"),
        (KeepsNothing, "the dtype is kept: keeps: 'factor' is no parameter"),
        (ForgetsToKeep, "the dtype is kept: weight is torch.bfloat16 in a torch.bfloat16 layer"),
        (OnlySaysZeros, "what its class says is true: gives_zeros: no output is 0"),
        (Widens, r"the dtype is kept: the output is torch.float32 in a torch.bfloat16 layer"),
        (Overflows, "the dtype is kept: the output holds NaN or Inf in a torch.bfloat16 layer"),
        (CutsTheGraph, "gradients match differences: of weight, input 0: .*Jacobian mismatch"),
        (AddsUp, "it runs under autocast: RuntimeError"),
        (SharesWeight, "nothing is shared between layers: another layer shares weight"),
        (SharesList, "nothing is shared between layers: once a layer was used and changed, the outputs of another"),
        (HoldsOnToItself, "nothing is shared between layers: once a layer was used and changed, the outputs of a deep"),
        (PlainTensor, "the state holds everything: offset is a tensor in a plain attribute"),
        (NotSaved, "the state holds everything: the outputs of a layer that loaded the state differ"),
        (Tuples, "settings are JSON: JSON gives"),
        (Tensors, "settings are JSON: spec.. gave .*not JSON serializable"),
        (Forgets, "it is rebuilt from its settings: the outputs of the rebuilt torch.float32 layer differ"),
        (InFloat32, "it is rebuilt from its settings: weight is torch.float32, not torch.bfloat16"),
        (Scale, r"it is rebuilt from its settings: RecipeError: Scale is not registered: add `name = "),
    ],
)
def test_broken_layers_are_caught(broken: type[nn.Module], text: str) -> None:
    start = {"start": 3.0} if broken is Forgets else {}
    inputs = [rows(2, 3), rows(4, seed=2)]
    with pytest.raises(AssertionError, match=f"^({text})"):
        check_layer(lambda: broken(**start), inputs, original=lambda: nn.Linear(IN, IN))


def test_what_no_graph_holds_is_caught_unless_the_class_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "module_name", lambda cls: "branches")
    monkeypatch.setattr(registry, "module_class", lambda name: Branches)
    asked = {"original": lambda: nn.Linear(IN, IN), "compile_backend": "aot_eager", "export": True}
    with pytest.raises(AssertionError, match=r"^it compiles: "):
        check_layer(Branches, [rows(2)], **asked)
    Branches.compiles = False
    with pytest.raises(AssertionError, match=r"^it exports: "):
        check_layer(Branches, [rows(2)], **asked)
    Branches.exports = False
    found = outcomes(check_layer(Branches, [rows(2)], **asked))
    left = {name for name, outcome in found.items() if outcome != "holds"}
    unsaid = {"what its class says is true", "its record is true", "large inputs stay finite"}
    assert left == unsaid | COMPILING


def test_a_gradient_that_is_passed_by_on_purpose() -> None:
    class Rounds(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + (x.round() - x).detach())

    with pytest.raises(AssertionError, match=r"^gradients match differences: of weight, input 0"):
        check_layer(Rounds, [rows(2)])
    with pytest.raises(AssertionError, match=r"^it is rebuilt from its settings: RecipeError: Rounds is not"):
        check_layer(Rounds, [rows(2)], smooth=False, original=lambda: nn.Linear(IN, IN))
