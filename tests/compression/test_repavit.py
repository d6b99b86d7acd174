"""RePaViT against the literal training block in float64, the sizes that the paper prints, and what stands on a fold."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.compression.cfsp import Cfsp
from actkit.compression.repavit.folded import FoldedMlp, Reparameterize, fold
from actkit.compression.repavit.idle import IdleMlp, Repavit, TokenBatchNorm, active_channels, idle_share
from actkit.core.ground.errors import CoverageError, EditError, RecipeError
from actkit.core.layers.nothing import PassThrough
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.core.train.training import train
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_transform, tiny_batches, tiny_model

FEATURES, WIDTH = 12, 48
ACTS: dict[str, Any] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def disturbed(*modules: nn.Module) -> None:
    """Random parameters and statistics, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(3)
    for module in modules:
        for parameter in module.parameters():
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for norm in module.modules():
            if isinstance(norm, TokenBatchNorm):
                norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator, dtype=torch.float64))
                norm.running_var.copy_(torch.rand(norm.num_features, generator=generator, dtype=torch.float64) + 0.2)


def pair(idle: float, act: str, biases: bool = True) -> tuple[TokenBatchNorm, IdleMlp]:
    """A norm and an MLP in float64, with random values."""
    norm = TokenBatchNorm(FEATURES).double()
    mlp = IdleMlp(FEATURES, WIDTH, active_channels(WIDTH, idle), act, biases=(biases, biases)).double()
    disturbed(norm, mlp)
    return norm, mlp


def literal(norm: TokenBatchNorm, mlp: IdleMlp, x: Tensor, training: bool) -> Tensor:
    """The training block as the paper writes it, on the transposed tensor; the residual sum is in it."""

    def batch_norm(module: Any, rows: Tensor) -> Tensor:
        statistics = (None, None) if training else (module.running_mean, module.running_var)
        moved = F.batch_norm(rows.mT, *statistics, module.weight, module.bias, training, eps=module.eps)
        return moved.mT

    h = batch_norm(norm, x) @ mlp.up.weight.T + (0 if mlp.up.bias is None else mlp.up.bias)
    h = torch.stack([ACTS[mlp.act_fn.name](h[..., i]) if i < mlp.active else h[..., i] for i in range(WIDTH)], -1)
    return x + batch_norm(mlp.norm, h) @ mlp.down.weight.T + (0 if mlp.down.bias is None else mlp.down.bias)


@pytest.mark.parametrize(("act", "idle", "biases"), [*itertools.product(ACTS, SHARES, (True, False))])
def test_training_form_and_fold_are_the_literal_block(act: str, idle: float, biases: bool) -> None:
    norm, mlp = pair(idle, act, biases)
    x = torch.randn(3, 7, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            x + mlp.train()(norm.train()(x)), literal(norm, mlp, x, True), rtol=1e-10, atol=1e-10
        )
        norm, mlp = pair(idle, act, biases)
        expected = literal(norm.eval(), mlp.eval(), x, False)
        folded = fold(norm, mlp)
        error = (x + folded(x) - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-10
        narrow = fold(norm.float(), mlp.float())
        error = (x.float() + narrow(x.float()) - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-5
    assert (folded.skip is None) == (idle == 0) and (folded.up is None) == (idle == 1)


def test_a_fold_has_the_weights_of_the_formula() -> None:
    norm, mlp = pair(0.75, "gelu")
    folded = fold(norm.eval(), mlp.eval())
    weights = sum(parameter.numel() for parameter in folded.parameters() if parameter.dim() == 2)
    assert weights / (2 * FEATURES * WIDTH) == 0.375
    assert all(parameter.dtype == torch.float64 for parameter in folded.parameters())


@pytest.mark.parametrize(
    ("patch", "features", "depth", "heads", "millions"),
    [(16, 768, 12, 12, 51.1), (16, 1024, 24, 16, 178.4), (16, 1280, 32, 16, 369.9)],
    ids=["Base", "Large", "Huge, patches of 16"],
)
def test_published_sizes(patch: int, features: int, depth: int, heads: int, millions: float) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    shape: dict[str, Any] = {"hidden_size": features, "intermediate_size": 4 * features, "patch_size": patch}
    with torch.device("meta"):
        model = ViTForImageClassification(
            ViTConfig(**shape, num_hidden_layers=depth, num_attention_heads=heads, num_labels=1000)
        )
        for block in anatomy(model).blocks:
            assert block.mlp is not None and block.mlp.norm is not None
            active = active_channels(block.mlp.width, 0.75)
            model.set_submodule(block.mlp.path, FoldedMlp(features, active))
            model.set_submodule(block.mlp.norm.path, PassThrough())
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


def test_shares_and_channels() -> None:
    assert [active_channels(100, idle) for idle in (0.0, 0.3, 0.7, 0.93, 0.99, 1.0)] == [100, 70, 30, 7, 1, 0]
    assert active_channels(10, 0.75) == 3  # 2.5 are active
    shares = [idle_share(0.75, "linear", index, 12) for index in range(12)]
    assert shares[0] == pytest.approx(0.5 + 0.5 / 11) and shares[10] == 1.0 and shares[11] == 0.0
    assert shares[:11] == sorted(shares[:11]) and idle_share(0.3, "static", 5, 12) == 0.3
    assert idle_share(0.75, "linear", 0, 1) == 0.0


def test_whole_rows_are_dropped_in_training_alone() -> None:
    torch.manual_seed(0)
    mlp = IdleMlp(FEATURES, WIDTH, 12, drop_path=0.5, batch_norm=False)
    x = torch.randn(64, 5, FEATURES)
    y, plain = mlp.train()(x), mlp.eval()(x)
    dropped = (y == 0).flatten(1).all(1)
    assert 16 < int(dropped.sum()) < 48
    torch.testing.assert_close(y[~dropped], 2 * plain[~dropped])


def idle_model(**settings: Any) -> Any:
    """A tiny ViT with idle channels, as after a training."""
    model = apply(tiny_model("vit"), Repavit(**{"idle": 0.75, **settings}), progress=False).model
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, TokenBatchNorm):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    return model


def test_a_whole_model_is_folded_and_gives_the_same() -> None:
    torch.manual_seed(0)
    model, batch = idle_model(), tiny_batches("vit")[0]
    before = model(**batch).logits
    report = apply(model, Reparameterize(), progress=False).report
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-5, atol=1e-5)
    assert any(note.startswith("Reparameterize: what blocks give on a probe batch moved by") for note in report.notes)
    assert sum(isinstance(module, PassThrough) for module in model.modules()) == 2


def test_the_last_block_stays_whole_with_the_linear_heuristic() -> None:
    model = idle_model(heuristic="linear")
    assert [module.active for module in model.modules() if isinstance(module, IdleMlp)] == [0, 24]
    before = model(**tiny_batches("vit")[0]).logits
    apply(model, Reparameterize(), progress=False)
    torch.testing.assert_close(model(**tiny_batches("vit")[0]).logits, before, rtol=1e-5, atol=1e-5)
    first, last = (module for module in model.modules() if isinstance(module, FoldedMlp))
    assert first.up is None and last.skip is None
    assert [len(inputs.linears) for inputs in anatomy(model).blocks[0].other] == [1]


def test_transforms_keep_what_they_promise() -> None:
    batches = tiny_batches("vit")
    check_transform(Repavit(idle=0.5), tiny_model("vit"), batches)
    check_transform(Repavit(idle=0.75, heuristic="linear", norm="layer"), tiny_model("vit"), batches)
    check_transform(Reparameterize(), idle_model(), batches, compile_backend="aot_eager", export=True)


def test_trained_folded_and_rounded_it_is_one_checkpoint(tmp_path: Path) -> None:
    from actkit.data import digits

    torch.manual_seed(0)
    model = tiny_model("vit", num_channels=1, num_labels=10)
    apply(model, Repavit(), progress=False)
    pixels, labels = digits("train")
    batches = [{"pixel_values": pixels[at : at + 32], "labels": labels[at : at + 32]} for at in range(0, 128, 32)]
    train(model, batches, validation=batches[:1], steps=4, learning_rate=1e-3, progress=False)
    assert not torch.equal(model.vit.layers[0].mlp.norm.running_mean, torch.zeros(24))
    save(model, tmp_path / "trained")
    model = load(tmp_path / "trained")
    expected = model(batches[0]["pixel_values"]).logits.detach()
    report = apply(model, [Reparameterize(), RoundToNearest(bits=8, group_size=-1)], progress=False).report
    found = model(batches[0]["pixel_values"]).logits.detach()
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.05
    assert sum(path.endswith((".mlp.skip", ".mlp.up", ".mlp.down")) for path, _ in report.changed) == 6
    save(model, tmp_path / "small")
    again = load(tmp_path / "small")
    assert torch.equal(again(batches[0]["pixel_values"]).logits, found)
    with pytest.raises(RecipeError, match="applied already"):
        apply(again, Reparameterize(), progress=False)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: tiny_model("vit"), "has no MLP with idle channels; apply `repavit`"),
        (lambda: idle_model(norm="layer"), "layernorm_after: a LayerNorm stands there"),
        (lambda: idle_model().train(), "is in training mode"),
    ],
)
def test_what_cannot_be_folded_is_refused(make: Any, text: str) -> None:
    with pytest.raises(EditError, match=text):
        apply(make(), Reparameterize(), progress=False)


def test_a_norm_without_statistics_is_refused_with_its_block() -> None:
    model = idle_model()
    model.vit.layers[1].mlp.norm.running_mean = None
    with pytest.raises(EditError, match=r"layers\.1\.mlp: norm: .* without running statistics"):
        apply(model, Reparameterize(), progress=False)


def test_a_fold_comes_once_and_before_codes() -> None:
    model = idle_model()
    apply(model, Reparameterize(), progress=False)
    with pytest.raises(RecipeError, match="applied already"):
        apply(model, Reparameterize(), progress=False)
    rounded = apply(idle_model(), RoundToNearest(bits=8, group_size=-1), progress=False).model
    with pytest.raises(RecipeError, match="fold first, then round"):
        apply(rounded, Reparameterize(), progress=False)
    with pytest.raises(RecipeError, match="train and fold first"):
        rounded = apply(tiny_model("vit"), RoundToNearest(bits=8, group_size=-1), progress=False).model
        apply(rounded, Repavit(), progress=False)


def test_idle_channels_are_not_cut_and_texts_are_refused() -> None:
    with pytest.raises(CoverageError):
        apply(idle_model(), Cfsp(), tiny_batches("vit"), progress=False)
    with pytest.raises(EditError, match="reads texts"):
        apply(tiny_model("gpt_neo"), Repavit(), progress=False)
    with pytest.raises(EditError, match="less than one would be active"):
        apply(tiny_model("vit"), Repavit(idle=0.99), progress=False)
    with pytest.raises(EditError, match="heuristic 'linear'"):
        apply(tiny_model("vit", num_hidden_layers=4), Repavit(idle=0.1, heuristic="linear"), progress=False)
