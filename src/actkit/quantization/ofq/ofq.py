"""OFQ: training vision transformers at 2 to 4 bits without weights that flip back and forth (2023, arXiv:2302.02210).

    weights     StatsQ: half-integers of a step of 2 mean|W| / n of the row, found anew in each step and not learned
    inputs      LSQ: a learned step for each position, codes without a sign behind the activation function, between two
                learned vectors
    attention   queries, keys (a step for each position), values (for each channel) and the weights of the softmax
                (without a sign) are rounded alike
    query_key   scores x A_h x^T: the product A_h = Wq_h^T Wk_h is rounded in place of both, and x once for all

A learned step moves with its weights, so that many of them sit at a threshold and flip between two levels; rounded
query and key weights excite one another. The third remedy is a rule for the end of the training,
`confidence_annealing`; `oscillation_tracker` says how many weights flip.
When to use it: 2 to 4 bits for weights and inputs of a vision transformer, with its training data; from the trained
model, with the model itself as a teacher if there is one. Then `freeze`. For language models, and for settings of your
own, `fake_quantize`.
Cost: a training (the paper: 300 epochs, then 30 under the rule). With `query_key` heads * in * in weights in place of
2 * in * in, also when the model runs.
Settled here: patch embedding, norms, biases and head stay as they are (the release rounds the first and last layer to 8
bits). Layers that read one tensor have a step each, as they are layers of their own here; the release has one for its
fused query_key_value. Steps begin from calibration data, not from the first batch.
Our own reading: the products A_h x have a step for each position, of all heads together (the release: of each head).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from pydantic import model_validator

from actkit.core.edit.edits import ATTENTION, Configure, Edit, Insert, Note, Replace, Skip, get_module
from actkit.core.ground.errors import CoverageError
from actkit.core.layers.attention_rounding import CHILD
from actkit.core.layers.cache_rounding import IMPLEMENTATION
from actkit.core.layers.learned_inputs import LearnedInputs
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.operand_rounding import OperandRounding
from actkit.core.model.anatomy import Anatomy, Block, Site
from actkit.core.model.own_attention import why_no_function
from actkit.core.model.parts import Linear, LinearRole
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.watch.statistics import Moments, Sample, Statistic
from actkit.quantization.fake_quantize import FakeQuantize, TrainedInputs, TrainedWeights
from actkit.quantization.ofq.query_key import Bias, QueryKeyAttention, why_no_product

ROWS = 256  # tokens from which the first step of the products is found
INSIDE: tuple[LinearRole, ...] = ("query", "key", "value")


class Ofq(FakeQuantize):
    """Put what OFQ trains into a vision transformer.

    Attributes:
        weights: how weights are seen.
        inputs: how inputs are rounded, and the operands of attention with them.
        operands: round the operands of attention too.
        query_key: round the product of query and key weights in place of both.
        query_bias: with `query_key`, 'keep' the bias of the queries or 'drop' it, as the release does.
        skip: roles that are left as they are.

    Raises:
        ValueError: a value is out of bounds, or has no meaning beside the others.
    """

    weights: TrainedWeights | None = TrainedWeights(by="statsq", bits=2)
    inputs: TrainedInputs | None = TrainedInputs(by="lsq", bits=2, per="position", unsigned=("down",))
    operands: bool = True
    query_key: bool = False
    query_bias: Bias = "keep"

    @model_validator(mode="after")
    def _attention_has_a_meaning(self) -> Self:
        if self.query_key and (self.weights is None or self.weights.by == "lsq" or self.weights.group_size != -1):
            raise ValueError("query_key: its product is rounded by rows, with steps found anew; give weights by statsq")
        if self.query_key and self.skip:
            raise ValueError(f"skip: {', '.join(self.skip)} was given beside query_key, which takes all of attention")
        if self.operands and (self.inputs is None or self.inputs.by != "lsq"):
            raise ValueError("operands: they are rounded as inputs by lsq are; give inputs by lsq, or operands: false")
        return self

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        model: Any = trial.model
        reason = _why_no_operands(model) if self.operands else None
        if reason is not None:
            raise CoverageError(f"ofq: {reason}; give operands: false.")
        return self

    def targets(self, block: Block) -> Iterable[Linear]:
        return [linear for linear in block.linears() if linear.role not in self.skip]

    def trained(self, block: Block) -> Sequence[Linear]:
        inside: tuple[LinearRole, ...] = INSIDE if self.query_key else ()
        return [linear for linear in super().trained(block) if linear.role not in inside]

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        wanted = dict(super().observe(block))
        if block.attention is not None and self.operands:
            read = ("value",) if self.query_key else INSIDE
            wanted |= {Site(f"attention.{name}", block.index): Moments() for name in read}
        if block.attention is not None and self.query_key and self.needs_data:
            wanted[Site("attention.input", block.index)] = Moments()
        return wanted

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        made = self._made(block) if self.query_key else None
        yield from super().edit(block, seen)
        attention: Any = block.attention
        if made is not None:
            made.o_proj = get_module(block.root, attention.output.path)
            if self.inputs is not None:
                self._round(made, block, seen)
            yield Replace(attention.path, made)
            if self.query_bias == "drop" and attention.query.bias is not None:
                yield Note(attention.path, "the bias of the queries was dropped, so that the function is another one")
        elif self.operands and attention is not None:
            operands = OperandRounding(self._operands(block, seen, INSIDE), attention.output.in_features)
            yield Insert(f"{attention.path}.{CHILD}", operands)

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        if self.operands and not self.query_key:
            yield Configure(ATTENTION, IMPLEMENTATION)

    def _operands(self, block: Block, seen: Seen, names: Sequence[str]) -> dict[str, LearnedInputs]:
        """What rounds some operands of an attention, and the weights of its softmax."""
        assert block.attention is not None and self.inputs is not None
        channels, dtype = block.attention.output.in_features, block.attention.output.weight.dtype
        positions, made = self._positions(seen), {}
        for name in names:
            magnitudes = seen[Site(f"attention.{name}", block.index)].mean_abs
            settings = self.inputs.model_copy(update={"per": "channel"}) if name == "value" else self.inputs
            made[name] = settings.learned(magnitudes, channels, positions, dtype)
        keys = positions or seen.block_calls[0].hidden.shape[-2]
        bare = self.inputs.model_copy(update={"biases": False, "per": "position" if positions else "tensor"})
        # each row of a softmax sums to 1, so that its mean is known
        made["weights"] = bare.learned(torch.full((1,), 1 / keys), keys, positions, dtype, unsigned=True)
        return made

    def _made(self, block: Block) -> QueryKeyAttention:
        """The attention by the product of query and key weights, checked against the one that stands there."""
        reason = why_no_product(block)
        if reason is not None:
            raise CoverageError(f"{block.path}: {reason}; give query_key: false.")
        attention: Any = block.attention
        assert self.weights is not None
        value = ActLinear.of(attention.value, weight=self.weights.of(attention.value.weight))
        return QueryKeyAttention.of(block, self.weights.grid, value=value, bias=self.query_bias)

    @torch.no_grad()
    def _round(self, made: QueryKeyAttention, block: Block, seen: Seen) -> None:
        """Put what rounds its input, its products, its values and its weights into an attention."""
        assert self.inputs is not None and block.attention is not None and block.attention.value is not None
        if not self.needs_data:
            made.inputs = self.inputs.of(block.attention.value, None, 0)
            return
        site, dtype, positions = Site("attention.input", block.index), made.product.storage.dtype, self._positions(seen)
        magnitudes = seen[site].mean_abs
        made.inputs = self.inputs.learned(magnitudes, len(magnitudes), positions, dtype)
        if not self.operands:
            return
        made.operands = OperandRounding(self._operands(block, seen, ("value",)), made.v_proj.out_features)
        rows = seen.observe({site: Sample(ROWS)})[site].rows.to(dtype)
        magnitudes = made.product(rows).float().abs().mean(0)
        made.products = self.inputs.learned(magnitudes, len(magnitudes), positions, dtype)


def _why_no_operands(model: Any) -> str | None:
    """Why the operands of a model's attention are not rounded, or None."""
    if getattr(model, "can_generate", lambda: False)():
        return (
            f"a {type(model).__name__} generates, and its attention reads a cache, whose keys `quantize_cache` rounds"
        )
    return why_no_function(model)
