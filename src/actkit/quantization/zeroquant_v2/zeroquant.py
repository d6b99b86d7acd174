"""ZQ-Local and ZQ-Global: the weights of a block are trained through their rounding (ZeroQuant-V2, arXiv:2303.08302).

    minimize over W:   |block_round(W)(x) - block(x')|^2     x': the float model's states
                                                             x:  x' (local), or what the rounded blocks left (global)

Gradients go straight through the rounding to W, whose ranges are found anew in each step.
When to use it: for 2- and 3-bit weights, or 4-bit weights with 8-bit inputs, if minutes of learning are no matter;
`gptq` is quicker. With global targets a block also makes up for the error of those before it. `lorc` may stand behind.
Cost: `steps` steps of `rows` rows per block, once for each learning rate that is tried; the memory of one block's
graph, and of five float32 copies of its weights.
Settled here: a learning rate is chosen by the block's error on all calibration rows, rounding to nearest among the
choices; rows come in a new order each round. From memory of the paper (no code was published): some hundred to 2,000
steps of Adam, and the rates that are tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import Block, Site
from actkit.core.recipe.reconstruction import Learned, error_of, examples, graph_bytes, learned_bytes, reconstruct
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Slot, Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import Statistic
from actkit.quantization.rtn import refuse_groups


class ZeroQuant(Transform):
    """Train the weights of each block through their rounding, then round them.

    Attributes:
        inputs: 'local' (the block reads the float model's states) or 'global' (it reads what the rounded blocks left).
        bits: 2 to 8, of the weights.
        input_bits: 2 to 8, of what linear layers read, per token; None leaves it.
        group_size: consecutive inputs per scale, must divide the layer; -1 a whole row; 'auto' the largest of 128, 64,
            32 and 16 that divides it.
        symmetric: no zero points, in weights and in inputs.
        steps: per block and learning rate.
        rows: of a step.
        rates: learning rates that are tried.
        scale_dtype: what scales of weights are rounded to and stored in.
        seed: of the order of rows.

    Raises:
        ValueError: a value is out of bounds.
    """

    inputs: Literal["local", "global"] = "global"
    bits: int = Field(4, ge=2, le=8)
    input_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    group_size: Annotated[int, Field(ge=-1)] | Literal["auto"] = "auto"
    symmetric: bool = False
    steps: int = Field(300, ge=1)
    rows: int = Field(4, ge=1)
    rates: tuple[Annotated[float, Field(gt=0)], ...] = Field((1e-3, 1e-4, 1e-5), min_length=1)
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    seed: int = Field(0, ge=0)

    tags: ClassVar[Tags] = Tags(slot="weight", needs_data=True, stream="both", needs_targets=True)
    not_proposed: ClassVar[str] = "it trains for minutes; try it with recipes=['zeroquant']"

    @property
    def grid(self) -> IntegerGrid:
        """The grid that weights are rounded to."""
        return IntegerGrid(self.bits, self.group_size, "input", self.symmetric, scale_dtype=self.scale_dtype)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return ("weight",) if self.input_bits is None else ("weight", "inputs")

    def rounded_inputs(self) -> RoundedInputs | None:
        """Make what rounds the inputs of a layer, if something does."""
        return (
            None if self.input_bits is None else RoundedInputs(IntegerGrid(self.input_bits, symmetric=self.symmetric))
        )

    def passes(self, tokens: int, rows: int) -> float:
        return 2 + 3.0 * len(self.rates) * self.steps * min(self.rows, rows) / max(1, rows)

    def memory(self, block: Block, length: int) -> int:
        weights = sum(linear.in_features * linear.out_features for linear in block.linears())
        return graph_bytes(block, length * self.rows) + learned_bytes(weights)

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        refuse_groups(self.grid, block)
        return {}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        linears = block.linears()
        lessons = examples(seen, self.rows, stream="original" if self.inputs == "local" else "edited")
        best = BlockWeights(block, self.grid, 0.0)
        with seen.trial(Replace(each.path, ActLinear.of(each, inputs=self.rounded_inputs())) for each in linears):
            errors = {"nearest": error_of(block, best, lessons)}
            for rate in self.rates:
                learned = BlockWeights(block, self.grid, rate)
                reconstruct(block, learned, lessons, steps=self.steps, seed=self.seed + block.index)
                error = error_of(block, learned, lessons)
                if isfinite(error) and error < min(errors.values()):
                    best = learned
                errors[f"rate {rate:g}"] = error
        least = min(errors, key=lambda name: errors[name] if isfinite(errors[name]) else float("inf"))
        tried = ", ".join(f"{name} {error:.3g}" for name, error in errors.items())
        yield Note(block.path or "model", f"{least} errs least (squared error of the outputs: {tried})", errors)
        for linear, weight in zip(linears, best.weights, strict=True):
            stored = IntegerWeight.quantize(weight.detach().to(linear.weight.dtype), self.grid)
            yield Replace(linear.path, ActLinear.of(linear, weight=stored, inputs=self.rounded_inputs()))


class BlockWeights(Learned):
    """The weights of a block, seen through their grid.

    Args:
        block: whose linear layers are meant.
        grid: of their weights.
        rate: of learning.
    """

    def __init__(self, block: Block, grid: IntegerGrid, rate: float) -> None:
        super().__init__()
        self.grid, self.rate = grid, rate
        self.paths = [(linear.path, linear.weight.dtype) for linear in block.linears()]
        self.weights = nn.ParameterList(nn.Parameter(each.weight.detach().float().clone()) for each in block.linears())

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{path}.storage.tensor": self.grid.fake(weight, *self.grid.parameters(weight)).to(dtype)
            for (path, dtype), weight in zip(self.paths, self.weights, strict=True)
        }

    def rates(self) -> Iterator[tuple[Sequence[nn.Parameter], float]]:
        yield list(self.weights), self.rate
