"""Weights of two factors in the decoder: both are multiplied, as they are stored, and the product is formed nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoded import SHAPE
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from actkit.compression.svd import Svd
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.low_rank_weight import LowRankWeight
from actkit.core.measure.decoding import choose_engine
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.kernels.process import most_threads
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.decoder import Decoder
from actkit.runtime.packed import open_packed
from actkit.runtime.packing import export_packed
from actkit.sparsity.teal import Teal
from actkit.sparsity.wina.wina import Wina

IDS = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS}]
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "relu": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, hidden_act="relu")),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
}
RECIPES: dict[str, tuple[str, list[Any]]] = {
    "plain": ("llama", [Svd()]),
    "biases": ("qwen2", [Svd()]),
    "heads": ("llama", [Svd(per_head=True)]),
    "some layers": ("llama", [Svd(rank={"key": 4, "up": 20, "down": 16})]),
    "a sparse gate": ("relu", [Svd()]),
    "codes": ("llama", [Svd(rank=16), RoundToNearest(bits=8, group_size=16)]),
    "codes by heads": ("qwen2", [Svd(rank=4, per_head=True), RoundToNearest(bits=8, group_size=-1)]),
    "four bits": ("llama", [Svd(rank=32), RoundToNearest(bits=4, group_size=32)]),
    "selected": ("llama", [Svd(), Wina(sparsity=0.4)]),
    "selected codes": ("qwen2", [Svd(rank=16), RoundToNearest(bits=8, group_size=16), Teal(sparsity=0.3)]),
}


@pytest.fixture(autouse=True)
def dense_prompts(monkeypatch: Any) -> None:
    monkeypatch.setattr("actkit.runtime.decoder.few_tokens", lambda *_: 2)


def made(name: str) -> Any:
    kind, recipe = RECIPES[name]
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() == 1 else None
    apply(model, recipe, BATCHES, progress=False)
    return model


def reference(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits[0].float()


def stepped(decoder: Decoder) -> Tensor:
    return torch.stack([decoder([token]) for token in IDS[0].tolist()])


def never(self: LowRankWeight) -> Tensor:
    raise AssertionError("the product was formed")


@pytest.mark.slow(reason="the kernels of a step are compiled here first")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_logits_are_those_of_the_model(name: str, threads: int, monkeypatch: Any) -> None:
    if threads > most_threads():
        pytest.skip("one thread can run here")
    model = made(name)
    expected = reference(model)
    monkeypatch.setattr(LowRankWeight, "_values", never)
    assert Decoder.supports(model) is None
    decoder = Decoder(model, threads=threads, activations="float32")
    torch.testing.assert_close(stepped(decoder), expected, rtol=1e-4, atol=1e-4)
    decoder.reset()
    torch.testing.assert_close(decoder(IDS[0].tolist()), expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["codes", "four bits"])
def test_factors_of_codes_take_fixed_point(name: str) -> None:
    model = made(name)
    decoder, expected = Decoder(model), reference(model)
    found = stepped(decoder)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert decoder.nbytes < sum(x.weight.numel() for b in anatomy(model).blocks for x in b.linears()) * 4 + 4e5


def test_it_is_what_decodes_them() -> None:
    engine = choose_engine(made("plain"), capacity=16)
    assert engine.name == "decoder", engine.reason


def test_it_reads_fewer_bytes_than_the_weights_have() -> None:
    torch.manual_seed(0)
    dense = Decoder(MODELS["llama"]().eval(), threads=1)
    thin = Decoder(made("plain"), threads=1)
    for decoder in (dense, thin):
        decoder([1])
    assert thin.nbytes < dense.nbytes and thin.bytes_per_token < dense.bytes_per_token


@torch.no_grad()
@pytest.mark.slow(reason="the kernels of a batch are compiled here first")
@pytest.mark.parametrize("name", ["plain", "heads", "codes", "selected"])
def test_several_texts_at_once(name: str) -> None:
    model = made(name)
    batch, expected = Decoder(model, activations="float32").batch(2), reference(model)
    for token, logits in zip(IDS[0, :6].tolist(), expected, strict=False):
        torch.testing.assert_close(batch([5, token])[1], logits, rtol=1e-4, atol=1e-4)


def test_a_correction_stands_beside_the_factors() -> None:
    model = made("plain")
    layer = model.model.layers[0].mlp.up_proj
    generator = torch.Generator().manual_seed(2)
    left, right = (
        0.2 * torch.randn(shape, generator=generator) for shape in ((layer.out_features, 3), (3, layer.in_features))
    )
    model.model.layers[0].mlp.up_proj = ActLinear.of(layer, correction=LowRank(left, right))
    torch.testing.assert_close(stepped(Decoder(model)), reference(model), rtol=1e-4, atol=1e-4)


def test_what_no_product_does_is_left_to_transformers() -> None:
    model = made("plain")
    apply(model, Teal(sparsity=0.4, mode="top_k"), BATCHES, progress=False)
    assert "kept as two factors" in str(Decoder.supports(model))
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=300, n_positions=32)).eval()
    apply(gpt2, Svd(), progress=False)
    assert Decoder.supports(gpt2) is not None


def test_opened_from_files_and_packed(tmp_path: Path) -> None:
    model = made("heads")
    expected = reference(model)
    save(model, tmp_path / "thin")
    torch.testing.assert_close(stepped(Decoder(load(tmp_path / "thin"))), expected, rtol=1e-4, atol=1e-4)
    export_packed(model, tmp_path / "packed")
    torch.testing.assert_close(stepped(Decoder(open_packed(tmp_path / "packed"))), expected, rtol=1e-4, atol=1e-4)
