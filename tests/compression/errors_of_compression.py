"""How a user meets the errors of `compression`: one function per way, which raises it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tiny_models import build
from torch import nn

from actkit.compression.cfsp import Cfsp, width
from actkit.compression.flashsvd.flashsvd import FlashSvd
from actkit.compression.flashsvd.memory import activation_bytes
from actkit.compression.minimal.budget import overdetermination
from actkit.compression.minimal.collapse import CollapseAttention, collapse_stack, collapsed
from actkit.compression.minimal.minimal_vit import MinimalViT, ReducedEncoder, ReducedLayer
from actkit.compression.minimal.reduced_attention import ReducedAttention
from actkit.compression.repavit.folded import FoldedMlp, Reparameterize, fold
from actkit.compression.repavit.idle import IdleMlp, Repavit, TokenBatchNorm, active_channels, idle_share
from actkit.compression.svd import Svd
from actkit.core.edit.edits import Resize, apply_edit
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import TopK
from actkit.core.model.fused_layers import PartRows
from actkit.core.recipe.runner import apply
from actkit.core.recipe.widths import cut
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.zeroquant_v2.lorc import Lorc
from actkit.testing import tiny_model
from error_proofs import HOST, Place, proof, run

proof(lambda p: width(48, 0.5, 64, "model.layers.0.mlp"))


@proof
def nothing_left(p: Place) -> None:
    run(Cfsp(sparsity=0.99))


proof(lambda p: run([Svd(rank=2), RoundToNearest(bits=8, group_size=-1), Lorc()]))


proof(lambda p: run([FlashSvd()]))


proof(lambda p: run([Svd(), FlashSvd()]).model(**HOST))


@proof
def a_text_of_padding(p: Place) -> None:
    model = run([Svd(), FlashSvd()], kind="bert").model
    with torch.no_grad():
        model(**HOST, attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))


proof(lambda p: activation_bytes(build("llama"), HOST))


proof(lambda p: run([Svd(rank=3), RoundToNearest(bits=4, group_size=8)]))


proof(lambda p: apply_edit(nn.Sequential(nn.LayerNorm(4)), Resize("0", outputs=torch.tensor([0]))))


proof(lambda p: apply_edit(nn.Sequential(nn.Linear(4, 4)), Resize("0", outputs=torch.tensor([4]))))


@proof
def a_filled_slot(p: Place) -> None:
    model = nn.Sequential(ActLinear.of(nn.Linear(4, 4), select=TopK(2, None)))
    apply_edit(model, Resize("0", outputs=torch.tensor([0])))


def _mlp(module: nn.Module, rows: PartRows | None = None) -> SimpleNamespace:
    """An MLP of 4 units as `cut` reads one."""
    up, down = nn.Linear(2, 4), nn.Linear(4, 2)
    layers = [
        SimpleNamespace(path=f"mlp.{name}", out_features=layer.out_features)
        for name, layer in (("up", up), ("down", down))
    ]
    return SimpleNamespace(
        path="mlp",
        activation="mlp.act",
        module=module,
        width=4,
        inputs=layers[:1],
        up=layers[0],
        down=layers[1],
        up_rows=rows,
    )


@proof
def a_value_per_unit(p: Place) -> None:
    module = nn.Module()
    module.slopes = nn.Parameter(torch.ones(4))
    list(cut(_mlp(module), torch.tensor([0])))  # type: ignore[arg-type]


@proof
def rows_of_something_else(p: Place) -> None:
    list(cut(_mlp(nn.Module(), PartRows(0, 1)), torch.tensor([0])))  # type: ignore[arg-type]


class Mixing(nn.Module):
    """Reads all units of a row."""

    mixes = ("channels",)


@proof
def a_function_of_all_units(p: Place) -> None:
    module = nn.Module()
    module.act = Mixing()
    list(cut(_mlp(module), torch.tensor([0])))  # type: ignore[arg-type]


# -- repavit -----------------------------------------------------------------------------------------------------------

proof(lambda p: IdleMlp(4, 8, 9))


proof(lambda p: IdleMlp(4, 8, 2, drop_path=1.0))


proof(lambda p: FoldedMlp(4, 0, skip=False))


proof(lambda p: active_channels(48, 0.99))


proof(lambda p: idle_share(0.1, "linear", 0, 12))


@proof
def idle_channels_of_a_text_model(p: Place) -> None:
    apply(tiny_model("gpt_neo"), Repavit(), progress=False)


@proof
def nothing_to_fold(p: Place) -> None:
    apply(tiny_model("vit"), Reparameterize(), progress=False)


@proof
def a_fold_over_a_layer_norm(p: Place) -> None:
    apply(apply(tiny_model("vit"), Repavit(norm="layer"), progress=False).model, Reparameterize(), progress=False)


@proof
def a_fold_in_training_mode(p: Place) -> None:
    apply(apply(tiny_model("vit"), Repavit(), progress=False).model.train(), Reparameterize(), progress=False)


@proof
def a_norm_without_statistics(p: Place) -> None:
    model = apply(tiny_model("vit"), Repavit(), progress=False).model
    model.vit.layers[0].mlp.norm.running_mean = None
    apply(model, Reparameterize(), progress=False)


@proof
def a_fold_over_another_layer(p: Place) -> None:
    mlp = IdleMlp(4, 8, 2).eval()
    mlp.up = ActLinear.of(mlp.up)  # type: ignore[assignment]
    fold(TokenBatchNorm(4).eval(), mlp)


@proof
def a_norm_in_training_mode(p: Place) -> None:
    fold(TokenBatchNorm(4), IdleMlp(4, 8, 2).eval())


# -- minimal transformers ----------------------------------------------------------------------------------------------

proof(lambda p: ReducedAttention(8, qk="half"))  # type: ignore[arg-type]


proof(lambda p: ReducedAttention(8, 3))


proof(lambda p: ReducedAttention(8, 2, qk="cholesky"))


proof(lambda p: ReducedAttention(8, 2, vo="none"))


proof(lambda p: ReducedAttention(8, dropout=1.0))


proof(lambda p: ReducedAttention.of(nn.MultiheadAttention(8, 1, kdim=4)))


proof(lambda p: ReducedLayer(8, norm="behind"))  # type: ignore[arg-type]


proof(lambda p: ReducedLayer(8, norm="bare"))


proof(lambda p: ReducedEncoder(8, 0))


proof(lambda p: MinimalViT(8, 3, 8, 1, 10))


proof(lambda p: overdetermination(nn.Linear(2, 2), 0, 10))


proof(lambda p: collapsed(ReducedAttention(8, 2)))


proof(lambda p: collapsed(ReducedAttention(8, qk="collapsed", vo="none")))


proof(lambda p: collapse_stack(ReducedEncoder(8, 1)))


proof(lambda p: collapse_stack(ReducedEncoder(8, 1, None, "bare", heads=2)))


@proof
def heads_that_are_not_collapsed(p: Place) -> None:
    apply(tiny_model("vit"), CollapseAttention(), progress=False)


@proof
def heads_of_a_model_of_your_own(p: Place) -> None:
    model = MinimalViT(8, 4, 8, 1, 10, heads=2).eval()
    apply(model, CollapseAttention(), [model.example(2, 0)], progress=False)
