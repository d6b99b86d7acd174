"""FlashSVD: factored attention and MLPs in tiles, so that peak activation memory falls (2025, arXiv:2508.01506).

    MLP:        P = x R_up^T;  tile by tile of the units:  S += act(P L_up[D]^T + b[D]) R_down[:, D]^T;   y = S L_down^T
    attention:  head by head:  q, k, v = x R_h^T L_h^T + b_h;  S += softmax(q k^T / sqrt(d)) v R_out[:, h]^T

When to use it: behind `svd`, if the activations of long inputs or large batches are what does not fit: factors alone
shrink weights, and the peak hardly falls, as what they make is as wide as before. It computes the same outputs. It is
slower on a CPU in most shapes: products are thinner, and there are more of them.
Cost: no data; one pass over an example, in which each block is compared with itself as it was.
A block becomes a `FlashBlock`, which runs its library's own code on tiles. Heads go into W_out's factor one by one, so
that what attention gives is never whole either; nor is P of attention, which the release keeps for all heads.
Settled here: a tile of attention is one query head over all tokens (its keys and values are kept while other heads read
them), and the model's attention function streams over keys inside of it (torch's fused one by default); the release's
kernels, for GPUs, have tiles of tokens. Sums over tiles are float32 for models of 16 bits. There is no version with
Triton, and none that recomputes for a backward pass: gradients are refused.
Our own reading: rows of padding that see no key give what the attention function gives; a text without any key is an
error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, PrivateAttr
from torch import nn

from actkit.compression.flashsvd.flash_block import AttentionPaths, FlashBlock, MlpPaths, factored, part_in_tiles
from actkit.compression.flashsvd.memory import Call, calls_of
from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.example import make_example
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import RecipeError
from actkit.core.model.anatomy import Anatomy, Block
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform

ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest output


class FlashSvd(Transform):
    """Run factored blocks in tiles.

    Attributes:
        attention: run attention in tiles, if query, key or value is kept as two factors.
        mlp: run MLPs in tiles, if a layer of theirs is.
        tile: units of an MLP in a tile.
        rows: tokens in a tile of an MLP, and of what a block does behind attention.

    Raises:
        ValueError: a value is out of bounds.
        RecipeError: when applied, no layer is kept as factors.
    """

    attention: bool = True
    mlp: bool = True
    tile: int = Field(128, ge=1)
    rows: int = Field(512, ge=1)

    tags: ClassVar[Tags] = Tags(changes_function="exact", least_coverage=0.0, compiles=False, exports=False)
    not_proposed: ClassVar[str] = "it saves memory of activations, not of weights, and needs svd before it"

    _calls: dict[str, Call] = PrivateAttr(default_factory=dict)  # of blocks, on an example
    _changed: list[str] = PrivateAttr(default_factory=list)
    _reasons: list[str] = PrivateAttr(default_factory=list)  # why parts stay as they are

    @classmethod
    def cannot_be_limited(cls, *, whole_blocks: bool) -> str | None:
        return None if whole_blocks else "runs whole blocks, so give whole blocks: {block: ...}"

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        """Record how blocks are called on an example, to compare them on it."""
        planned = self.model_copy()
        planned._changed, planned._reasons = [], []
        model = trial.model
        batch = data[0] if len(data) else make_example(model)
        with evaluating(model):
            paths = [block.path for block in trial.anatomy.blocks]
            planned._calls = calls_of(model, paths, lambda: forward(model, batch))
        return planned

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        attention = _attention(block) if self.attention else "it is left out"
        mlp = _mlp(block) if self.mlp else "it is left out"
        call = self._calls.get(block.path)
        tried: dict[str, Any] = {}
        for name, paths in (("attention", attention), ("mlp", mlp)):
            if not isinstance(paths, str) and call is not None:
                paths = self._tried(block.module, name, paths, call)
            tried[name] = paths
            if isinstance(paths, str):
                self._reasons.append(paths)
                yield Skip(f"{block.path}.{name}".removeprefix("."), paths)
        kept = {name: None if isinstance(paths, str) else paths for name, paths in tried.items()}
        if any(kept.values()):
            self._changed.append(block.path)
            yield Replace(block.path, FlashBlock(block.module, kept["attention"], kept["mlp"], self.tile, self.rows))

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        if not self._changed and not any(isinstance(each, FlashBlock) for each in view.model.modules()):
            reasons = "; ".join(dict.fromkeys(self._reasons)) or "it has no blocks"
            raise RecipeError(
                f"flashsvd: nothing of the model runs in tiles ({reasons}). It runs what svd factored: put svd before "
                f"it."
            )
        yield Note("model", f"{len(self._changed)} blocks run in tiles")

    def _tried(self, module: nn.Module, name: str, paths: Any, call: Call) -> Any:
        """The paths, or why what stands there does not run in tiles: the part and the block are compared."""
        attention, mlp = (paths, None) if name == "attention" else (None, paths)
        made = FlashBlock(module, attention, mlp, self.tile, self.rows)
        with torch.no_grad():
            inner = calls_of(module, [paths.path], lambda: module(*call[0], **call[1]))[paths.path]
            try:
                for (plain, tiled), given in ((part_in_tiles(made, name), inner), ((module, made), call)):
                    outputs = (first_tensor(each(*given[0], **given[1])) for each in (plain, tiled))
                    expected, found = (each.nan_to_num() for each in outputs)  # of padding that sees nothing
                    largest = float(expected.abs().max())
                    off = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
                    if not off <= ALLOWED.get(expected.dtype, 1e-4) * largest:
                        return (
                            f"in tiles it gives something else, off by {off / max(largest, 1e-30):.1e} of the largest"
                        )
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
                return f"its code does not run on tiles: {str(error).splitlines()[0][:80]}"
        return paths


def _within(path: str, module: str) -> str | None:
    """A path inside of a module; None if it is not inside."""
    if not module:
        return path
    return path.removeprefix(f"{module}.") if path.startswith(f"{module}.") else None


def _attention(block: Block) -> AttentionPaths | str:
    """Where attention is, or why it does not run in tiles."""
    attention = block.attention
    if attention is None:
        return "it has no attention that is described"
    if not any(factored(linear.module) for linear in attention.inputs):
        return "no layer of query, key and value is kept as two factors"
    if attention.query_key_value is not None and not hasattr(attention.module, "split_size"):
        return "one layer computes query, key and value, and its code cuts it at fixed places"
    path = _within(attention.path, block.path)
    layers = (attention.query or attention.query_key_value, attention.key, attention.value, attention.output)
    names = [None if each is None else _within(each.path, attention.path) for each in layers]
    if not path or names[0] is None or names[3] is None:
        return "its layers are not inside of its module"
    return AttentionPaths(
        path, names[0], names[1], names[2], names[3], attention.heads, attention.key_value_heads, attention.head_dim
    )


def _mlp(block: Block) -> MlpPaths | str:
    """Where the MLP is, or why it does not run in tiles."""
    mlp = block.mlp
    if mlp is None:
        return "it has no MLP that is described"
    if not any(factored(linear.module) for linear in (*mlp.inputs, mlp.down)):
        return "no layer of its MLP is kept as two factors"
    given: Mapping[str, str | None] = {
        "path": _within(mlp.path, block.path),
        "up": _within(mlp.up.path, block.path),
        "down": _within(mlp.down.path, block.path),
        "act": _within(mlp.activation, block.path),
    }
    if not all(given.values()):
        return "a part of it is outside of the block"
    rows = None
    if mlp.up_rows is not None:
        if mlp.up_rows.count != 1:
            return "gate and up take turns in one layer"
        rows = (mlp.up_rows.start, 0 if mlp.up_rows.start else mlp.width)
    gate = None if mlp.gate is None else _within(mlp.gate.path, block.path)
    return MlpPaths(**given, gate=gate, up_rows=rows)  # type: ignore[arg-type]
