"""A model whose weights stay in their files: what it holds, and what a decoder makes of it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from actkit.core.edit.edits import Replace
from actkit.core.ground.errors import CheckpointError
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.measure.decoding import choose_engine
from actkit.core.measure.generation import generate_ids
from actkit.core.recipe.runner import apply, apply_edits
from actkit.core.store import checkpoint
from actkit.core.store.opening import open_pending
from actkit.core.store.pending import Pending, pending_of, whole
from actkit.quantization.ends import Ends
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.decoder import Decoder
from actkit.sparsity.teal import Teal

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(0))


def llama(dtype=torch.bfloat16, **settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **settings)).to(dtype).eval()


def quantized(model, **settings):
    apply(model, [RoundToNearest(bits=4, group_size=32, **settings)], progress=False)
    return model


def corrected(model):
    layer = model.model.layers[0].mlp.up_proj
    factors = LowRank(torch.randn(160, 4), torch.randn(4, 64))
    apply_edits(
        model, [Replace("model.layers.0.mlp.up_proj", ActLinear.of(layer, correction=factors))], lambda: "llama"
    )
    return model


MODELS = {
    "bfloat16": llama,
    "float32": lambda: llama(torch.float32),
    "float16": lambda: llama(torch.float16),
    "tied": lambda: llama(tie_word_embeddings=True),
    "4 bits": lambda: quantized(llama()),
    "4 bits, embedding too": lambda: quantized(llama(tie_word_embeddings=True), embedding=Ends()),
    "selected": lambda: apply(llama(torch.float32), [Teal(sparsity=0.5)], [{"input_ids": IDS}], progress=False).model,
    "corrected": lambda: corrected(llama(torch.float32)),
}


def logits(decoder):
    with decoder:
        found = [decoder([token]) for token in IDS[0, :3].tolist()]
        return torch.stack([*found, decoder(IDS[0, 3:].tolist())])


@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_makes_of_it_what_it_makes_of_the_whole_model(name, tmp_path):
    checkpoint.save(MODELS[name](), tmp_path / "model")
    opened = open_pending(tmp_path / "model")
    weights = pending_of(opened)
    assert weights is not None and all(
        value.is_meta for key, value in opened.state_dict().items() if weights.names(key)
    )
    expected = logits(Decoder(checkpoint.load(tmp_path / "model")))
    assert torch.equal(logits(Decoder(opened)), expected)


def test_one_block_at_a_time_is_read(tmp_path, monkeypatch):
    checkpoint.save(llama(), tmp_path / "model")
    opened, most, fill = open_pending(tmp_path / "model"), [], Pending.fill

    def watched(self, model, path, **settings):
        fill(self, model, path, **settings)
        most.append(
            [
                key
                for key, module in model.named_modules()
                if isinstance(module, nn.Linear) and not module.weight.is_meta
            ]
        )

    monkeypatch.setattr(Pending, "fill", watched)
    Decoder(opened).close()
    assert all(len({key.rpartition("layers.")[2][0] for key in held}) <= 1 for held in most)
    assert {key for held in most for key in held} == {
        key for key, module in opened.named_modules() if isinstance(module, nn.Linear)
    }
    assert all(module.weight.is_meta for module in opened.modules() if isinstance(module, nn.Linear))


def test_what_no_decoder_takes_is_loaded_whole(tmp_path):
    model = build("gpt2")
    checkpoint.save(model, tmp_path / "model")
    opened = open_pending(tmp_path / "model")
    engine = choose_engine(opened, capacity=8, decode_only=True)
    assert engine.decoder is None
    loaded = whole(opened)
    assert pending_of(loaded) is None
    expected = list(generate_ids(model, [1, 2, 3], max_new_tokens=4, end=()))
    assert list(generate_ids(loaded, [1, 2, 3], max_new_tokens=4, end=())) == expected


def test_names_that_transformers_translates_are_loaded_whole(tmp_path):
    model = llama()
    checkpoint.save(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(
        {f"{key}": value for key, value in load_file(file).items()}
        | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        file,
    )
    (tmp_path / "model" / "actkit.sha256").unlink()
    opened = open_pending(tmp_path / "model")
    assert pending_of(opened) is None and torch.equal(opened.lm_head.weight, model.lm_head.weight)


def test_damaged_folders(tmp_path):
    checkpoint.save(quantized(llama()), tmp_path / "model")
    (file,) = (tmp_path / "model").glob("actkit-*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        open_pending(tmp_path / "model")
    (tmp_path / "model" / "actkit.sha256").unlink()
    file.write_bytes(raw[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        open_pending(tmp_path / "model")
