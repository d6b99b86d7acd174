"""Vision transformers that merge tokens, plainly (ToMe) or scaled first (PYRA, 2024, ECCV, arXiv:2403.09192).

    after attention, r tokens M_s are averaged into those that they are most alike to, M_t, by sizes s (ToMe):
        x  <-  (M_t + sum of M_s) / (their sizes' sum),     M = s x;   a token of size s counts as s keys (log s)
    PYRA scales them first, by two vectors per block:
        M_s  <-  M_s + (M_s * 2 sigmoid(w_r^T I)) * (2 sigmoid(I w_d^T) - 1),     I = norm(M_s + M_t)
    w_d begins at 0, so that training begins at plain merging

When to use it: before a vision transformer is adapted: it is trained as it will run, at half the time or less. Plain
merging runs without training too, and loses more the more tokens go; adapted, PYRA was no better than it in our own
experiment, so compare both. `schedule: low` and `high` are the published ones, for 12 and 24 blocks; a list says how
many tokens go in each. Train PYRA with the adapter `pyra`.
Cost: T^2 / 4 products of a head's width a block for the choice, and the mean of its keys, which costs a head's; PYRA
r + 3 d numbers a block with its norm's, and about 4 r d products an image.
Settled here: sizes travel with the hidden states, as one channel more between blocks (which sites leave out, and
`output_hidden_states` does not). A schedule shorter than the model is filled up with zeros, a longer one refused; so
are more than half of the tokens at once, attention that is no softmax over all tokens of an image, prompts, which would
be merged too, and a model that merges already. The class token, and the distillation token of DeiT, stay.
Our own reading: an image of another size, whose tokens do not suffice, merges as many as half of them allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, field_validator
from torch import nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module
from actkit.core.ground.errors import EditError
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.model.anatomy import Block
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform
from actkit.finetuning.pyra.merging_layer import MERGING, MergingLayer

PUBLISHED: dict[tuple[str, int], tuple[int, ...]] = {
    ("low", 12): (*[16] * 11, 10),
    ("high", 12): (40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3),
    ("low", 24): (*[8] * 23, 6),
    ("high", 24): (20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1),
}
SOFTMAX = ("eager", "sdpa")  # transformers' attention functions that take log s as a mask


class MergeTokens(Transform):
    """Let the blocks of a vision transformer merge tokens.

    Attributes:
        schedule: tokens that go in each block: one number for all, a list, or 'low' or 'high' as published.
        pyra: scale tokens before they are merged, by vectors that are to be trained.
        channel: whether PYRA has a factor for each channel.
        token: whether it has one for each token.
        proportional: a merged token counts as many keys as it holds.
        seed: of PYRA's vectors.

    Raises:
        EditError: when applied: another model, or a schedule longer than it, or of more than half of the tokens.
    """

    schedule: int | tuple[int, ...] | Literal["low", "high"] = "low"
    pyra: bool = False
    channel: bool = True
    token: bool = True
    proportional: bool = True
    seed: int = Field(0, ge=0)

    tags: ClassVar[Tags] = Tags(spans_blocks=True, least_coverage=0.0)
    not_proposed: ClassVar[str] = "a model is to be trained with the tokens merged; try it with recipes="
    _goes: tuple[int, ...] = PrivateAttr(default=())

    @field_validator("schedule")
    @classmethod
    def _no_negative_number(cls, schedule: Any) -> Any:
        given = [0] if isinstance(schedule, str) else [schedule] if isinstance(schedule, int) else schedule
        if not given or min(given) < 0:
            raise ValueError(f"{schedule!r} was given; give numbers of at least 0, one for each block")
        return schedule

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        """Find how many tokens go in each block.

        Args:
            trial: the model as it is.
            data: none is read.
        """
        blocks = [get_module(trial.model, block.path) for block in trial.anatomy.blocks]
        reason = next((why for why in map(why_not, blocks) if why), None) or _why_not_attention(trial.model)
        if reason is not None:
            raise EditError(f"merge_tokens: this {type(trial.model).__name__} {reason}.")
        planned = self.model_copy()
        planned._goes = numbers(self.schedule, len(blocks), *tokens_of(trial.model))
        return planned

    def targets(self, block: Block) -> Iterable[Target]:
        return [block.path]

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        goes, index = self._goes, block.index
        carries = any(goes[:index]), any(goes[: index + 1]) and index + 1 < len(goes)
        if not any(goes[: index + 1]):
            yield Skip(block.path, "no token goes in it, or before it")
            return
        layer = get_module(block.root, block.path)
        features = int(block.root.config.hidden_size)  # type: ignore[union-attr, arg-type]
        modulator = None
        if self.pyra and goes[index]:
            modulator = {"features": features, "r": goes[index], "channel": self.channel, "token": self.token}
        with own_random_numbers(next(layer.parameters()).device, self.seed + index):
            made = MERGING[type(layer)](layer, features, goes[index], carries, modulator, self.proportional)
        yield Replace(block.path, made)
        left = tokens_of(block.root)[0] - sum(goes[: index + 1])
        yield Note(block.path, f"{goes[index]} tokens go, {left} are left", {"left": left})


def why_not(block: nn.Module) -> str | None:
    """Say why a block cannot merge tokens, or None.

    Args:
        block: of a model.
    """
    if isinstance(block, MergingLayer):
        return "merges tokens already; undo that, or load the original model"
    if type(block) in MERGING:
        return None
    if hasattr(block, "wraps"):
        return f"has a {type(block).__name__} around its blocks, which does not fit merged tokens; merge without it"
    return (
        f"is made of {type(block).__name__}, and merging needs blocks that attend to all tokens of an image at once "
        f"(no causal mask, no windows), those of ViT or DeiT; give such a model"
    )


def _why_not_attention(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if name in SOFTMAX:
        return None
    return f"attends by {name!r}, which takes no log of sizes; set 'sdpa' or 'eager'"


def numbers(schedule: int | Sequence[int] | str, depth: int, tokens: int, protected: int = 1) -> tuple[int, ...]:
    """Return how many tokens go in each block.

    Args:
        schedule: as of `MergeTokens`.
        depth: blocks.
        tokens: of an image, all of them.
        protected: how many of these are never merged.

    Raises:
        EditError: it does not fit the model.
    """
    if isinstance(schedule, str):
        if (schedule, depth) not in PUBLISHED:
            raise EditError(
                f"schedule: {schedule!r} was given, which is published for 12 and 24 blocks; this model has {depth}. "
                f"Give a number for each block."
            )
        schedule = PUBLISHED[schedule, depth]
    goes = (schedule,) * depth if isinstance(schedule, int) else tuple(schedule)
    if len(goes) > depth:
        raise EditError(f"schedule: {len(goes)} numbers were given for {depth} blocks; give one for each at most.")
    goes = (*goes, *[0] * (depth - len(goes)))
    left = tokens
    for index, r in enumerate(goes):
        most = (left - protected) // 2
        if r > most:
            raise EditError(
                f"schedule: {r} tokens were to go in block {index}, which has {left}; at most {most} can, half of "
                f"those that may be merged."
            )
        left -= r
    return goes


def tokens_of(model: nn.Module) -> tuple[int, int]:
    """Return how many tokens an image of a model's own size has, and how many of them are never merged.

    Args:
        model: a ViT or DeiT.
    """
    embeddings: Any = next(module for module in model.modules() if hasattr(module, "position_embeddings"))
    return int(embeddings.position_embeddings.shape[1]), 2 if hasattr(embeddings, "distillation_token") else 1
