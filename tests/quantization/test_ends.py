"""Embedding and head in few bits: codes of numpy, one table for tied ends, saved, loaded, undone, decoded, counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import actkit
from actkit.core.ground.errors import CoverageError
from actkit.core.layers.embedding import QuantizedEmbedding
from actkit.core.layers.linear import ActLinear
from actkit.core.measure.cost import measure_cost
from actkit.core.measure.decoding import _own_forward as own_forward
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.proposals import Shapes
from actkit.core.recipe.runner import apply
from actkit.quantization.gptq import Gptq
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.decoder import Decoder
from actkit.testing import check_transform, tiny_batches, tiny_model

RECIPE = RoundToNearest(bits=4, group_size=8, embedding={"bits": 8})


def by_hand(table: np.ndarray) -> np.ndarray:
    scale = np.abs(table).max(1, keepdims=True) / np.float32(127)
    return (np.round(table / scale) * scale).astype(np.float32)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_those_of_numpy_and_tied_ends_share_their_codes(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    expected = by_hand(model.model.embed_tokens.weight.numpy())
    head = by_hand(model.lm_head.weight.numpy())
    ids = torch.tensor([[3, 0, 7], [1, 1, 2]])
    apply(model, RECIPE, progress=False)
    embedding = model.model.embed_tokens
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(model.lm_head, ActLinear)
    np.testing.assert_allclose(embedding(ids).numpy(), expected[ids.numpy()], rtol=1e-6)
    np.testing.assert_allclose(model.lm_head.dequantized().numpy(), head, rtol=1e-6)
    same = embedding.storage.codes.data_ptr() == model.lm_head.storage.codes.data_ptr()
    assert same is tied
    np.testing.assert_array_equal(np.array_equal(expected, head), tied)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["memory", "source"])
def test_they_are_undone_and_tied_again(mode: str, tmp_path: Any) -> None:
    actkit.save(tiny_model("llama", tie_word_embeddings=True), tmp_path / "original")
    model = actkit.load(tmp_path / "original")
    batch = tiny_batches("llama")[0]
    before = model(**batch).logits
    applied = apply(model, RECIPE, undo=mode, progress=False)
    assert not torch.equal(model(**batch).logits, before)
    applied.undo()
    assert torch.equal(model(**batch).logits, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@torch.no_grad()
def test_a_saved_folder_holds_the_table_once_and_computes_the_same(tmp_path: Any) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    batch = tiny_batches("llama")[0]
    apply(model, RECIPE, progress=False)
    actkit.save(model, tmp_path / "small")
    again = actkit.load(tmp_path / "small")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.lm_head.storage.codes.data_ptr() == again.model.embed_tokens.storage.codes.data_ptr()


@torch.no_grad()
def test_the_cost_counts_the_codes_and_one_row_of_them() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    words, width = model.model.embed_tokens.weight.shape
    before = measure_cost(model)
    apply(model, RECIPE, progress=False)
    found = {layer.path: layer for layer in measure_cost(model).layers}
    embedding, head = found["model.embed_tokens"], found["lm_head"]
    scales = model.lm_head.storage.scale.nbytes
    assert embedding.weight_bytes == words * width + scales
    assert embedding.bytes_per_token == pytest.approx((words * width + scales) / words)
    assert head.bytes_per_token == words * width + scales
    assert measure_cost(model).weight_bytes < before.weight_bytes


@torch.no_grad()
@pytest.mark.slow(reason="the decoder compiles for the head's codes")
def test_the_decoder_reads_rows_of_codes() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    apply(model, RECIPE, progress=False)
    ids = torch.tensor([[3, 9, 4, 1, 5, 9, 2]])
    expected = model(ids).logits[0]
    decoder = Decoder(model, threads=1, activations="float32")
    torch.testing.assert_close(decoder(ids[0, :5].tolist()), expected[4], rtol=1e-4, atol=1e-4)
    for at in (5, 6):
        torch.testing.assert_close(decoder([int(ids[0, at])]), expected[at], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_scaled_embedding_keeps_its_factor() -> None:
    model = tiny_model("gemma3_text")
    ids = torch.arange(5)[None]
    before = model.model.embed_tokens(ids)
    apply(model, RECIPE, progress=False)
    torch.testing.assert_close(model.model.embed_tokens(ids), before, rtol=0.02, atol=0.05)


def test_another_embedding_is_refused() -> None:
    class Doubled(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    model = tiny_model("llama", tie_word_embeddings=False)
    other = Doubled(*model.model.embed_tokens.weight.shape)
    model.model.embed_tokens = other
    with pytest.raises(CoverageError, match=r"embedding: a Doubled computes something else"):
        apply(model, RECIPE, progress=False)


def test_models_without_an_embedding_are_left_with_a_note() -> None:
    applied = apply(tiny_model("mlp"), RoundToNearest(group_size=8, embedding={}), tiny_batches("mlp"), progress=False)
    assert any("names none" in note for note in applied.report.notes)


@pytest.mark.parametrize("kind", ["llama", "bert", "gemma3_text"])
def test_the_transform_keeps_its_promises(kind: str) -> None:
    check_transform(RECIPE, tiny_model(kind), tiny_batches(kind))


def test_gptq_rounds_the_ends_to_nearest() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    apply(model, Gptq(group_size=8, embedding={"bits": 8}), tiny_batches("llama"), progress=False)
    apply(other, RECIPE, progress=False)
    assert torch.equal(model.lm_head.storage.codes, other.lm_head.storage.codes)


def test_the_search_tries_it_where_the_ends_are_large() -> None:
    shapes = Shapes.of(anatomy(tiny_model("llama")))
    words = tiny_model("llama").lm_head.weight.numel()
    assert shapes.ends == pytest.approx(words / sum(each.numel() for each in tiny_model("llama").parameters()))
    assert Shapes.of(anatomy(tiny_model("mlp"), tiny_batches("mlp")[0])).ends == 0.0
    assert Shapes.of(anatomy(tiny_model("vit"))).ends == 0.0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_an_export_holds_the_table_dense_and_computes_the_same(kind: str, tmp_path: Any) -> None:
    model = tiny_model(kind, **({"tie_word_embeddings": True} if kind == "llama" else {}))
    recipe = RoundToNearest(bits=8, group_size=8, symmetric=True, embedding={"bits": 8})
    apply(model, recipe, progress=False)
    actkit.export(model, tmp_path / "plain", "compressed-tensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_decoder_takes_rounded_ends_and_a_rounded_cache() -> None:
    model = tiny_model("llama")
    apply(model, [RECIPE, QuantizeCache()], progress=False)
    assert Decoder.supports(model) is None and own_forward(model) is None
