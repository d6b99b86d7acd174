"""Learned tokens in front of those of a row, in each block: the prompts of S2A (2025, arXiv:2503.08154).

    block([P; x]) without its first rows,   P [tokens, d]  or  A B,  A [tokens, rank], B [rank, d]

When to use it: before a training under the rule `s2a`, which trains them, on an encoder of text or images.
Cost: `tokens` rows more in each block, also after training.
Settled here: every token reads the prompts, also where others are padding. Encoders alone: a model that writes would
keep the prompts in its cache, and rotary positions belong to tokens; both are refused.
Our own reading: the tokens of a block are gone behind it (deep prompts of VPT); the paper was read in abstracts only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module
from actkit.core.forward.example import Inputs
from actkit.core.ground.errors import EditError
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.model.anatomy import Block
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform
from actkit.finetuning.s2a.side_path import width_of

SPREAD = 0.02  # of the first values


class PromptedBlock(nn.Module):
    """A block that reads learned tokens in front of its rows.

    Args:
        inner: the block; its first argument, or `hidden_states`, is [batch, length, features].
        features: d.
        tokens: how many.
        rank: of P = A B; None for a P of its own.
    """

    wraps: ClassVar[str] = "inner"

    def __init__(self, inner: nn.Module, features: int, tokens: int, rank: int | None = None) -> None:
        super().__init__()
        self.inner, self.rank = inner, rank
        shapes = [(tokens, features)] if rank is None else [(tokens, rank), (rank, features)]
        size = SPREAD ** (1 / len(shapes)) / (1 if rank is None else rank**0.25)
        self.prompt = nn.ParameterList([nn.Parameter(torch.randn(shape) * size) for shape in shapes])

    def prompts(self) -> Tensor:
        """The learned tokens, [tokens, features]."""
        first, *second = self.prompt
        return first @ second[0] if second else first

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block with the tokens in front, and give the rows behind them."""
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        prompts = self.prompts().to(x.dtype).expand(x.shape[0], -1, -1)
        longer = torch.cat([prompts, x], 1)
        count = prompts.shape[1]
        args = (longer, *(_wider(each, count) for each in args[1:])) if args else ()
        kwargs = {name: _wider(each, count) if "mask" in name else each for name, each in kwargs.items()}
        output = self.inner(*args, **kwargs) if args else self.inner(**{**kwargs, "hidden_states": longer})
        return output[:, count:] if isinstance(output, Tensor) else (output[0][:, count:], *output[1:])

    def own_parameters(self) -> list[str]:
        """Return the names of its parameters, without those of the block."""
        return [name for name, _ in self.named_parameters() if not name.startswith("inner.")]

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {"features": self.prompt[-1].shape[1], "tokens": self.prompt[0].shape[0], "rank": self.rank}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> PromptedBlock:
        """Make it around the block that stands in its place, in its dtype."""
        made = cls(original, **spec)
        made.prompt.to(next(original.parameters()).dtype)
        return made


def _wider(mask: Any, count: int) -> Any:
    """A mask [batch, heads, queries, keys] with room for tokens in front, which all read; others as they are."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask
    reads = True if mask.dtype == torch.bool else 0.0
    wider = nn.functional.pad(mask, (count, 0), value=reads)
    if mask.shape[2] == 1:
        return wider
    return torch.cat([wider[:, :, :1].expand(-1, -1, count, -1), wider], 2)


class AddPrompts(Transform):
    """Put learned tokens in front of the rows of each block.

    Attributes:
        tokens: in each block.
        rank: of their matrix; None for all.
        seed: of their first values.

    Raises:
        EditError: the model writes, or turns its queries and keys by position.
    """

    tokens: int = Field(8, ge=1)
    rank: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)

    tags: ClassVar[Tags] = Tags(least_coverage=0.0)
    not_proposed: ClassVar[str] = "it adds what is yet to be trained"

    def targets(self, block: Block) -> Iterable[Target]:
        return [block.path] if block.path else []

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        features = width_of(block)
        if features is None or block.attention is None:
            yield Skip(block.path or "model", "no block of attention and MLP that actkit reads as one")
            return
        writes = Inputs.of(block.root).causal
        if writes or block.attention.pairs is not None:
            why = "writes token by token" if writes else "turns queries and keys by their positions"
            raise EditError(
                f"prompts: this {type(block.root).__name__} {why}, where tokens that stand in one block alone have no "
                f"place; give an encoder such as BERT or ViT, or use the transform side_path."
            )
        inner = get_module(block.root, block.path)
        like = next(inner.parameters())
        with own_random_numbers(torch.device("cpu"), self.seed + block.index):
            made = PromptedBlock(inner, features, self.tokens, self.rank)
        made.prompt.to(like.device, like.dtype)
        yield Replace(block.path, made.train(inner.training))
