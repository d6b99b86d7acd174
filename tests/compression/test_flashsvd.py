"""FlashSVD against the same factors run plainly: in float64, with padding on both sides, caches, rotary embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from actkit.compression.flashsvd.flash_block import FlashBlock
from actkit.compression.flashsvd.flashsvd import FlashSvd
from actkit.compression.flashsvd.memory import activation_bytes, block_peaks
from actkit.compression.flashsvd.tiles import Thin, by_rows, flashsvd_ffn
from actkit.compression.svd import Svd
from actkit.core.ground.errors import DataError, RecipeError, UnsupportedModelError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.low_rank_weight import LowRankWeight
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Moments
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.wina.wina import Wina
from actkit.testing import check_transform, tiny_batches, tiny_model

FLASH = FlashSvd(tile=5, rows=7)  # that divide nothing
KINDS = ["llama", "mistral", "qwen3", "gemma", "phi3", "gpt2", "bert", "vit", "opt"]


def factored(kind: str, **settings: Any) -> Any:
    model = tiny_model(kind).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # so large that attention and MLP count beside the residual stream
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    apply(model, Svd(**{"per_head": True, "budget": 0.6, **settings}), tiny_batches(kind), progress=False)
    return model


def outputs(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


def in_tiles(model: Any) -> list[FlashBlock]:
    return [module for module in model.modules() if isinstance(module, FlashBlock)]


def widened(batch: Any) -> Any:
    return {key: each.double() if torch.is_floating_point(each) else each for key, each in batch.items()}


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_factors_in_float64(kind: str, per_head: bool) -> None:
    batch = widened(tiny_batches(kind)[0])
    model = factored(kind, per_head=per_head)
    expected = outputs(model, batch)
    applied = apply(model, FLASH, [batch], progress=False)
    blocks = in_tiles(model)
    assert len(blocks) == len(anatomy(model).blocks) and all(block.mlp is not None for block in blocks)
    assert all((block.attention is None) == (kind == "phi3") for block in blocks), applied.report.skipped
    torch.testing.assert_close(outputs(model, batch), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    applied.undo()
    assert torch.equal(outputs(model, batch), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_padding_on_either_side_and_odd_lengths(kind: str, implementation: str, side: str) -> None:
    model = factored(kind)
    model.set_attn_implementation(implementation)
    if implementation == "eager":  # its mask is minus infinity in float64, and gives NaN
        model.float()
    ids = torch.randint(3, 30, (3, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate((13, 6, 1)):
        mask[row, : 13 - length] = 0
    batch = {"input_ids": ids, "attention_mask": mask if side == "left" else mask.flip(1)}
    expected = outputs(model, batch)
    apply(model, FLASH, [batch], progress=False)
    assert in_tiles(model)[0].attention is not None
    found, real = outputs(model, batch), batch["attention_mask"].bool()
    if kind == "llama":
        found, expected = found[real], expected[real]
    bound = 1e-10 if implementation == "sdpa" else 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * float(expected.abs().max()))


def test_a_cache_is_filled_and_texts_stay_the_same() -> None:
    model = factored("llama")
    ids = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
        keys = model(ids, use_cache=True).past_key_values.layers[0].keys
        apply(model, FLASH, progress=False)
        torch.testing.assert_close(model(ids, use_cache=True).past_key_values.layers[0].keys, keys)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_what_is_watched_runs_plainly_so_that_methods_behind_it_see_everything() -> None:
    model, batches = factored("llama"), tiny_batches("llama")
    before = record(model, {"mlp.hidden": Moments(), "attention.mixed": Moments()}, batches, progress=False)
    apply(model, FLASH, batches, progress=False)
    after = record(model, {"mlp.hidden": Moments(), "attention.mixed": Moments()}, batches, progress=False)
    for site, moments in before.items():
        assert after[site].count == moments.count and torch.allclose(after[site].mean, moments.mean)


class Steered(nn.Module):
    """Stands around an MLP."""

    wraps = "inner"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


def test_what_stands_around_a_part_counts() -> None:
    batch = tiny_batches("llama")[0]
    plain, model = factored("llama"), factored("llama")
    apply(model, FLASH, progress=False)
    plain.model.layers[0].mlp = Steered(plain.model.layers[0].mlp)
    model.model.layers[0].inner.mlp = Steered(model.model.layers[0].inner.mlp)
    assert len(anatomy(model).blocks) == 2
    torch.testing.assert_close(outputs(model, batch), outputs(plain, batch), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("later", [Wina(sparsity=0.4), RoundToNearest(bits=8, group_size=-1)])
def test_methods_behind_it_count(later: Any) -> None:
    batches = tiny_batches("llama")
    plain, model = factored("llama"), factored("llama")
    apply(plain, later, batches, progress=False)
    apply(model, [FLASH, later], batches, progress=False)
    torch.testing.assert_close(outputs(model, batches[0]), outputs(plain, batches[0]), rtol=1e-6, atol=1e-8)


def test_svd_rtn_flashsvd_in_one_recipe_comes_back(tmp_path: Path) -> None:
    recipe = [Svd(per_head=True, rank=4), RoundToNearest(bits=8, group_size=-1)]
    model, plain, batches = tiny_model("llama"), tiny_model("llama"), tiny_batches("llama")
    apply(plain, recipe, batches, progress=False)
    apply(model, [*recipe, FLASH], batches, progress=False)
    found = outputs(model, batches[0])
    torch.testing.assert_close(found, outputs(plain, batches[0]), rtol=1e-4, atol=1e-5)
    save(model, tmp_path / "thin")
    again = load(tmp_path / "thin")
    assert len(in_tiles(again)) == 2 and torch.equal(outputs(again, batches[0]), found)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "vit"])
def test_it_keeps_what_a_transform_promises(kind: str) -> None:
    model = tiny_model(kind)
    apply(model, Svd(per_head=True), progress=False)
    check_transform(FLASH, model, tiny_batches(kind), conflicting=(FlashSvd(),))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_gradients_are_refused() -> None:
    model, batch = factored("llama"), tiny_batches("llama")[0]
    apply(model, FLASH, progress=False)
    with pytest.raises(UnsupportedModelError, match="keep nothing for a backward pass"):
        model(**batch)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert model(**batch).logits.isfinite().all()


def test_a_text_without_a_key_is_refused_and_one_token_is_enough() -> None:
    model = factored("bert")
    apply(model, FLASH, progress=False)
    ids = torch.full((2, 4), 5)
    with pytest.raises(DataError, match="text 1 of the batch has no key"):
        outputs(model, {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])})
    outputs(model, {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]])})


def test_a_model_without_factors_is_refused() -> None:
    with pytest.raises(RecipeError, match="put svd before it"):
        apply(tiny_model("llama"), FLASH, progress=False)
    model = tiny_model("llama")
    applied = apply(model, [Svd(rank={"up": 4, "down": 4}), FLASH], progress=False)
    assert all(block.attention is None for block in in_tiles(model))
    assert any("kept as two factors" in str(line) for line in applied.report.skipped)


def test_what_does_not_run_on_tiles_stays_as_it_is_and_is_named() -> None:
    """A norm over all heads side by side gives something else on one head."""
    model = factored("olmo2")
    expected = outputs(model, tiny_batches("olmo2")[0])
    applied = apply(model, FLASH, progress=False)
    assert all(block.attention is None and block.mlp is not None for block in in_tiles(model))
    assert any("tiles" in str(line) for line in applied.report.skipped)
    torch.testing.assert_close(outputs(model, tiny_batches("olmo2")[0]), expected)


# -- the products ------------------------------------------------------------------------------------------------------


def layer(out: int, inputs: int, rank: int | None, bias: bool = True) -> Any:
    made = nn.Linear(inputs, out, bias).double().requires_grad_(False)
    if rank is None:
        return made
    left, right = torch.randn(out, rank).double(), torch.randn(rank, inputs).double()
    return ActLinear.of(made, weight=LowRankWeight(left, right))


@pytest.mark.parametrize("ranks", [(4, 3), (None, 3), (4, None), (None, None)])
@pytest.mark.parametrize("gated", [False, True])
def test_an_mlp_in_tiles(ranks: tuple[int | None, int | None], gated: bool) -> None:
    up, gate, down = layer(22, 10, ranks[0]), layer(22, 10, ranks[0]), layer(9, 22, ranks[1])
    x = torch.randn(3, 5, 10).double()
    hidden = F.gelu(gate(x)) * up(x) if gated else F.gelu(up(x))
    for block in (1, 7, 22, 50):
        found = flashsvd_ffn(x, Thin(up), Thin(down, True), F.gelu, gate=Thin(gate) if gated else None, block=block)
        torch.testing.assert_close(found, down(hidden), rtol=0, atol=1e-10)


def test_sums_over_tiles_are_not_rounded_to_16_bits() -> None:
    up, down = layer(512, 8, 4).bfloat16(), layer(8, 512, 4).bfloat16()
    x = torch.randn(6, 8).bfloat16()
    wide = [ActLinear.of(each, weight=each.storage) for each in (up, down)]
    exact = F.relu(x.double() @ up.dequantized().double().t() + up.bias.double()) @ down.dequantized().double().t()
    exact += down.bias.double()
    found, whole = (flashsvd_ffn(x, Thin(wide[0]), Thin(wide[1], True), F.relu, block=block) for block in (8, 512))
    assert (found.double() - exact).norm() < 1.5 * (whole.double() - exact).norm() + 1e-3 * exact.norm()


def test_rows_come_back_in_their_places() -> None:
    x, y = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    for rows in (1, 4, 15, 99):
        assert torch.equal(by_rows(lambda a, b: a + b, rows, x, y), x + y)


# -- memory ------------------------------------------------------------------------------------------------------------


def wide_bert() -> Any:
    config = BertConfig(
        hidden_size=128, num_attention_heads=8, intermediate_size=512, num_hidden_layers=1, vocab_size=60
    )
    return BertModel(config).eval()


def wide_llama() -> Any:
    shape = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 384}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, vocab_size=60)).eval()


def wide_gemma(key_heads: int = 1) -> Any:
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": key_heads, "intermediate_size": 384}
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape, head_dim=64, num_hidden_layers=1, vocab_size=60)).eval()


RANKS = {"query": 8, "key": 8, "value": 8, "output": 40, "gate": 40, "up": 40, "down": 40}


@pytest.mark.parametrize("make", [wide_bert, wide_llama])
@pytest.mark.parametrize("per_head", [True, False])
def test_the_peak_falls_and_counts_agree_with_the_meter(make: Any, per_head: bool) -> None:
    torch.manual_seed(0)
    model = make()
    apply(model, Svd(per_head=per_head, rank=RANKS), progress=False)
    batch = {"input_ids": torch.randint(60, (4, 128))}
    plain = max(block_peaks(model, batch).values())
    apply(model, FlashSvd(tile=32, rows=64), progress=False)
    tiled = max(block_peaks(model, batch).values())
    assert tiled < (0.5 if make is wide_bert else 0.75) * plain
    found = activation_bytes(model, batch)
    assert found.tokens == 512 and [each.part for each in found.parts] == ["attention", "mlp"]
    for each in found.parts:
        assert each.tiled < 0.7 * each.plain
        assert each.plain_count == pytest.approx(each.plain, rel=0.1)
        assert each.tiled_count == pytest.approx(each.tiled, rel=0.1)


@pytest.mark.parametrize("length", [50, 75, 128])  # with 64 rows a last tile is whole, or has 22 rows more
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_counts_know_norms_of_heads_and_a_single_key_head(key_heads: int, length: int) -> None:
    torch.manual_seed(0)
    model = wide_gemma(key_heads)
    apply(model, Svd(per_head=True, rank=RANKS), progress=False)
    ids = torch.randint(60, (2, length))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    apply(model, FlashSvd(tile=32, rows=64), progress=False)
    for each in activation_bytes(model, {"input_ids": ids, "attention_mask": mask}).parts:
        assert each.plain_count == pytest.approx(each.plain, rel=0.02)
        assert each.tiled_count == pytest.approx(each.tiled, rel=0.02)


def test_the_meter_needs_blocks_in_tiles() -> None:
    with pytest.raises(UnsupportedModelError, match="no block of it runs in tiles"):
        activation_bytes(tiny_model("llama"), tiny_batches("llama")[0])
