"""A transformer without its MLPs, to see what they are worth (2024, arXiv:2410.13732).

    h = x + attention(norm x),   h + mlp(norm h)    ->    h = x + attention(norm x),   h

Softmax of a product of tokens, times tokens, is no linear function: a transformer without MLP still learns.

When to use it: as an ablation before or in place of a training: how much of a model's quality is in its MLPs? Or to
train what is left. `only: {block: [...]}` takes some blocks.
Cost: none; at the usual width two thirds of a block's numbers and multiplications are gone.
Settled here: the MLP and the norm in front of it alone go out, and modules that give zeros and that pass their input on
stand there, so that the model is saved, loaded and trained as any other. An MLP that adds the residual stream itself,
or whose norm stands behind the sum, stays, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.layers.nothing import Nothing, PassThrough
from actkit.core.model.anatomy import Block, Mlp
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform


class StripMlp(Transform):
    """Take the MLPs out, and the norms that nothing else reads."""

    tags: ClassVar[Tags] = Tags(least_coverage=0.2)
    not_proposed: ClassVar[str] = "a model without MLPs is to be trained"

    def targets(self, block: Block) -> Iterable[Target]:
        mlp = block.mlp
        return [] if mlp is None or _why_not(block, mlp) else [*mlp.inputs, mlp.down]

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        mlp = block.mlp
        reason = "no MLP that actkit reads" if mlp is None else _why_not(block, mlp)
        if mlp is None or reason is not None:
            yield Skip(block.path or "model", str(reason))
            return
        norm = mlp.norm if mlp.norm is not None and mlp.norm.role == "mlp" else None
        gone = [mlp.module, *([] if norm is None else [norm.module])]
        numbers = sum(parameter.numel() for module in gone for parameter in module.parameters())
        products = 2 * sum(linear.in_features * linear.out_features for linear in (*mlp.inputs, mlp.down))
        whole = sum(parameter.numel() for parameter in block.module.parameters())
        yield Replace(mlp.path, Nothing().train(mlp.module.training))
        if norm is not None:
            yield Replace(norm.path, PassThrough().train(norm.module.training))
        yield Note(
            mlp.path,
            f"{numbers:,} of the block's {whole:,} numbers are gone, {products:,} operations a token",
            {"parameters": numbers, "of": whole, "operations": products},
        )


def _why_not(block: Block, mlp: Mlp) -> str | None:
    if not all(linear.path.startswith(f"{mlp.path}.") for linear in (*mlp.inputs, mlp.down)):
        return "its MLP is no module of its own, so that the residual sum would go with it"
    if any(norm.path.startswith(f"{mlp.path}.") for norm in block.norms):
        return "its MLP holds a norm and the residual sum"
    if mlp.norm is not None and mlp.norm.feeds_residual:
        return "the residual stream reads the norm in front of its MLP too"
    return None
