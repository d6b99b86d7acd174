"""A thin path beside each block: the side module of S2A (2025, arXiv:2503.08154).

    y = block(x) + W_up f(W_down x + b_down) + b_up,   W_down: d -> d / reduction,  W_up: 0 at the start

When to use it: before a training under the rule `s2a`, which trains these paths, if biases alone learn too little.
Cost: 2 d^2 / reduction weights and multiplications per token and block, also after training.
Settled here: a model computes at first what it did. What the path reads is the block's input, of which the rule keeps
codes; it keeps d / reduction numbers more per token. A model that records the hidden states of its blocks by their
class (`output_hidden_states` in transformers) records them in front of the path.
Our own reading: widths, biases and the place are ours, as the paper was read in abstracts only. In the paper's ladder
the gradient of side paths does not enter the body; here it does, so that biases train with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module
from actkit.core.ground.errors import EditError
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.layers.activations import Activation
from actkit.core.model.anatomy import Block
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform


class SidePath(nn.Module):
    """A block with a thin path beside it; it is called as the block is, and gives what it gives.

    Args:
        inner: the block; its first argument, or `hidden_states`, is [..., features].
        features: d.
        hidden: width of the path.
        act: f, the name of a function.
    """

    wraps: ClassVar[str] = "inner"

    def __init__(self, inner: nn.Module, features: int, hidden: int, act: str = "gelu") -> None:
        super().__init__()
        self.inner = inner
        self.down, self.act_fn, self.up = nn.Linear(features, hidden), Activation(act), nn.Linear(hidden, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block and add to its first output."""
        added = self.up(self.act_fn(self.down(args[0] if args else kwargs["hidden_states"])))
        output = self.inner(*args, **kwargs)
        return output + added if isinstance(output, Tensor) else (output[0] + added, *output[1:])

    def own_parameters(self) -> list[str]:
        """Return the names of its parameters, without those of the block."""
        return [name for name, _ in self.named_parameters() if not name.startswith("inner.")]

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {"features": self.down.in_features, "hidden": self.down.out_features, "act": self.act_fn.name}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> SidePath:
        """Make it around the block that stands in its place, in its dtype."""
        made = cls(original, **spec)
        for part in (made.down, made.up):
            part.to(next(original.parameters()).dtype)
        return made


class AddSidePath(Transform):
    """Put a thin path beside each block.

    Attributes:
        reduction: how many times narrower than the hidden states it is.
        act: its activation, by name.
        seed: of its first weights.

    Raises:
        EditError: it would have no unit.
    """

    reduction: int = Field(8, ge=1)
    act: str = "gelu"
    seed: int = Field(0, ge=0)

    tags: ClassVar[Tags] = Tags(changes_function="exact", least_coverage=0.0)
    not_proposed: ClassVar[str] = "it adds what is yet to be trained"

    def targets(self, block: Block) -> Iterable[Target]:
        return [block.path] if block.path else []

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        features = width_of(block)
        if features is None:
            yield Skip(block.path or "model", "no block of attention and MLP that actkit reads as one")
            return
        if self.reduction > features:
            raise EditError(
                f"reduction: {self.reduction} was given, and the hidden states have {features} channels, so that the "
                f"side path would have no unit; give at most {features}."
            )
        inner = get_module(block.root, block.path)
        like = next(inner.parameters())
        with own_random_numbers(torch.device("cpu"), self.seed + block.index):
            made = SidePath(inner, features, features // self.reduction, self.act)
        for part in (made.down, made.up):
            part.to(like.device, like.dtype)
        yield Replace(block.path, made.train(inner.training))


def width_of(block: Block) -> int | None:
    """The channels of a block's hidden states; None for a model that was traced.

    Args:
        block: of the model.

    Raises:
        EditError: its tokens are merged, so that what stands beside them or in front of them does not fit.
    """
    if not block.path or block.attention is None:
        return None
    if hasattr(block.module, "hidden_columns"):
        raise EditError(
            f"{block.path}: its tokens are merged (merge_tokens), so that no side path fits those that are left, and "
            f"prompts would be merged too; use one of the two."
        )
    return block.attention.inputs[0].in_features
