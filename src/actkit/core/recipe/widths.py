"""The width of an MLP: cut units out of every layer that knows them, and say the new width in the config."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actkit.core.edit.edits import Configure, Resize
from actkit.core.ground.errors import EditError
from actkit.core.layers.activations import mixes_of
from actkit.core.model.anatomy import Anatomy
from actkit.core.model.parts import Mlp
from actkit.core.store.skeleton import plain_model

ENTRIES = ("intermediate_size", "n_inner", "ffn_dim")  # what configs call the width of their MLPs


def cut(mlp: Mlp, kept: Tensor) -> Iterator[Resize]:
    """Return the edits that leave some units of an MLP.

    Args:
        mlp: gated or not; gate and up may be one layer.
        kept: int64 [units that stay], in any order; they keep the order that they have.

    Raises:
        EditError: something else in the MLP knows its units.
    """
    kept = kept.sort().values
    _refuse_other_parts(mlp)
    if mlp.up_rows is not None:  # one layer computes gate and up
        up = mlp.up_rows.indices()
        others = torch.ones(mlp.up.out_features, dtype=torch.bool).index_fill(0, up, False)
        gate = others.nonzero().flatten()
        if len(gate) != len(up):
            raise EditError(f"{mlp.up.path}: {len(gate)} of its rows are no units, {len(up)} are; it cannot be cut.")
        yield Resize(mlp.up.path, outputs=torch.cat((gate[kept], up[kept])).sort().values)
    else:
        for linear in mlp.inputs:
            yield Resize(linear.path, outputs=kept)
    yield Resize(mlp.down.path, inputs=kept)


def configured(view: Anatomy) -> Configure | None:
    """Return the edit that says the width of all MLPs of a model in its config, or None if no entry can.

    Args:
        view: of a model, whatever its layers hold by now.
    """
    model = view.model
    downs = [mlp.down for block in view.blocks for _, mlp in view.block(block.index).mlps()]
    widths = {linear.in_features for linear in downs}
    if not isinstance(model, PreTrainedModel) or len(widths) != 1:
        return None
    width = widths.pop()
    for key in ENTRIES:
        if hasattr(model.config, key):
            plain = {name: tuple(each.shape) for name, each in plain_model(model, **{key: width}).state_dict().items()}
            fits = ({(x.out_features, width), (width, x.out_features)} for x in downs)  # a Conv1D is transposed
            if all(plain.get(f"{x.path}.weight") in shapes for x, shapes in zip(downs, fits, strict=True)):
                return Configure(key, width)
    return None


def _refuse_other_parts(mlp: Mlp) -> None:
    """Raise EditError if something in the MLP besides its layers would compute another function of fewer units."""
    name = mlp.activation.removeprefix(f"{mlp.path}.")
    activation = dict(mlp.module.named_modules()).get(name)
    if activation is not None and "channels" in (mixes_of(activation) or ()):
        raise EditError(
            f"{mlp.activation}: a {type(activation).__name__} mixes the units of its MLP, so that those that stay "
            f"would change if others are cut. Leave this MLP out, or replace the function first (swap)."
        )
    layers = [linear.path.removeprefix(f"{mlp.path}.") for linear in (*mlp.inputs, mlp.down)]
    for name, tensor in (*mlp.module.named_parameters(), *mlp.module.named_buffers()):
        if mlp.width in tensor.shape and not any(name.startswith(f"{layer}.") for layer in layers):
            raise EditError(
                f"{mlp.path}.{name}: it knows the {mlp.width} units of this MLP by number {tuple(tensor.shape)}, and "
                f"is no linear layer. Prune before what put it there, or leave this MLP out."
            )
