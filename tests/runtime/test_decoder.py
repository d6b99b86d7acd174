"""The decoder against transformers' own forward pass."""

import threading

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from actkit.core.errors import DataError, MemoryLimitError, UnsupportedModelError
from actkit.core.runner import apply
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
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True, hidden_act="relu")),
    "llama3 rope": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "linear rope": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LINEAR)),
    "yarn rope": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=YARN)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)),
}
IDS = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(0))


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() == 1 else None
    return model


def reference(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits[0].float()


def stepped(decoder, ids=IDS):
    decoder.reset()
    return torch.stack([decoder([token]) for token in ids[0].tolist()])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
    model = made(name)
    expected, decoder = reference(model), Decoder(model)
    torch.testing.assert_close(stepped(decoder), expected, rtol=1e-4, atol=1e-4)
    decoder.reset()
    for end in (12, 19, 20):  # a prompt, a second part of it, a single token
        found = decoder(IDS[0, decoder.position : end].tolist())
        torch.testing.assert_close(found, expected[end - 1], rtol=1e-4, atol=1e-4)


def test_one_thread():
    model = made("llama")
    torch.testing.assert_close(stepped(Decoder(model, threads=1)), reference(model), rtol=1e-4, atol=1e-4)


def test_changed_layers():
    model = made("llama")
    apply(model, [RoundToNearest(bits=4, group_size=32), Teal(sparsity=0.4)], [{"input_ids": IDS}], progress=False)
    decoder = Decoder(model)
    torch.testing.assert_close(stepped(decoder), reference(model), rtol=1e-4, atol=1e-4)
    assert decoder.density == pytest.approx(0.6, abs=0.1)


def test_the_largest_inputs_of_all_threads():
    model = made("llama")
    apply(model, [Teal(sparsity=0.4, mode="top_k")], [{"input_ids": IDS}], progress=False)
    decoder = Decoder(model)
    torch.testing.assert_close(stepped(decoder), reference(model), rtol=1e-4, atol=1e-4)
    decoder.reset()
    torch.testing.assert_close(decoder(IDS[0].tolist()), reference(model)[-1], rtol=1e-4, atol=1e-4)


def test_two_decoders_in_two_threads():
    decoders, found = [Decoder(made("llama")) for _ in range(2)], {}
    workers = [
        threading.Thread(target=lambda n=n: found.update({n: stepped(decoders[n])})) for n in range(len(decoders))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert torch.equal(found[0], found[1])


def test_the_order_of_sums_is_fixed():
    decoder = Decoder(made("llama"))
    assert torch.equal(stepped(decoder), stepped(decoder))


def test_generates_what_transformers_does():
    model = made("llama")
    found = list(Decoder(model).generate(IDS[0, :6], max_new_tokens=8, end=()))
    expected = model.generate(IDS[:, :6], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found == expected[0, 6:].tolist()


def test_bad_input(monkeypatch):
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        Decoder(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)))
    model = made("llama")
    with pytest.raises(ValueError, match="give 1 to 64"):
        Decoder(model, capacity=65)
    with pytest.raises(ValueError, match="side by side"):
        Decoder(model, threads=1000)
    decoder = Decoder(model, capacity=4)
    with pytest.raises(DataError, match="holds 4 tokens"):
        decoder([1, 2, 3, 4, 5])
    with pytest.raises(DataError, match="exceed the cache of 4"):
        decoder.generate([1, 2], max_new_tokens=3)
    with pytest.raises(DataError, match="embeds 0 to 299"):
        decoder([300])
    monkeypatch.setattr("actkit.runtime.decoder.psutil.virtual_memory", lambda: type("Memory", (), {"available": 10}))
    with pytest.raises(MemoryLimitError, match="smaller capacity"):
        Decoder(model)
