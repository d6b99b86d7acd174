"""GGUF in: transformers' reader, the package gguf and the model that was written say what must come out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import actkit
from actkit.core.edit import changes
from actkit.core.ground.errors import CheckpointError
from actkit.core.recipe.runner import apply
from actkit.formats.export import export
from actkit.gguf.file import GgufFile

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from gguf_files import small_tensors, write_gguf  # noqa: E402

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.arange(12)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def random_model(config: Any, cls: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = cls(config(**{**SHAPE, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    return model.eval()


MODELS = {
    "llama": lambda: random_model(LlamaConfig, LlamaForCausalLM, head_dim=32),
    "mistral": lambda: random_model(MistralConfig, MistralForCausalLM, rope_parameters={"rope_theta": 1e5}),
    "llama with biases": lambda: random_model(LlamaConfig, LlamaForCausalLM, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: random_model(Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True),
    "qwen3": lambda: random_model(Qwen3Config, Qwen3ForCausalLM, head_dim=128),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_was_written_comes_back(name, tmp_path):
    model = MODELS[name]()
    (file,) = export(model, tmp_path / "out", "gguf", proof=False).folder.glob("*.gguf")
    found = actkit.load(file)
    assert found.dtype == torch.float32  # nothing in the file is quantized, so it stays as it is stored
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "bits"), [("llama", 8), ("qwen2", 4)])
def test_weights_are_those_of_two_other_readers(name, bits, tmp_path):
    recipe = {"actkit": 1, "transforms": [{"rtn": {"bits": bits, "group_size": 32, "symmetric": bits == 8}}]}
    model = apply(MODELS[name](), recipe, None, min_coverage=0.0, progress=False).model
    (file,) = export(model, tmp_path / "out", "gguf", proof=False).folder.glob("*.gguf")
    found = actkit.load(file, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    expected = theirs.state_dict()
    assert set(found.state_dict()) == set(expected)
    for key, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    (down,) = (t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_down.weight")
    values = gguf.quants.dequantize(down.data, down.tensor_type)
    assert np.array_equal(found.model.layers[1].mlp.down_proj.weight.detach().numpy(), values)
    rounded = actkit.load(file)
    assert rounded.dtype == torch.bfloat16
    for key, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, expected[key].bfloat16()), key
    grid = changes.source_grid(rounded)
    kind = {8: "Q8_0", 4: "Q4_1"}[bits]
    assert grid.format == "gguf" and grid.layers["model.layers.0.self_attn.q_proj"] == kind
    assert f"14 x {kind}" in grid.describe()


def test_what_save_writes_keeps_the_grid(tmp_path):
    file = write_gguf(
        tmp_path / "a.gguf", quantize=lambda name: "Q8_0" if "ffn" in name and "norm" not in name else None
    )
    model = actkit.load(file)
    again = actkit.load(actkit.save(model, tmp_path / "saved"))
    assert changes.source_grid(again) == changes.source_grid(model)
    assert set(changes.source_grid(model).layers) == {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert not (tmp_path / "saved" / "actkit.json").exists()  # a plain checkpoint, which transformers reads
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert "quantized source" in str(list(actkit.show(again)._rows()))


def test_gemma3(tmp_path):
    model = random_model(
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        num_hidden_layers=7,
        head_dim=32,
        sliding_window=4,
        query_pre_attn_scalar=32,
        pad_token_id=0,
        rms_norm_eps=1e-6,
    )
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight.detach().numpy(),
        "output_norm.weight": model.model.norm.weight.detach().numpy() + 1,
    }
    for index, layer in enumerate(model.model.layers):
        for here, there in names.items():
            weight = layer.get_submodule(here).weight.detach().numpy()
            tensors[f"blk.{index}.{there}.weight"] = weight + 1 if "norm" in here else weight
    settings = {
        "embedding_length": 64,
        "block_count": 7,
        "feed_forward_length": 96,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.sliding_window": 4,
        "rope.freq_base": 1e6,
    }
    file = write_gguf(tmp_path / "gemma.gguf", architecture="gemma3", settings=settings, tensors=tensors)
    found = actkit.load(file)
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


KINDS = sorted(kind.name for kind in gguf.quants._type_traits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block(kind, tmp_path):
    named = gguf.GGMLQuantizationType[kind]
    count, size = gguf.GGML_QUANT_SIZES[named]
    raw = np.random.default_rng(1).integers(0, 60, (3, 2 * size), dtype=np.uint8)  # small halves are finite numbers
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("first", np.ones(5, np.float32))
    writer.add_tensor("second", raw, raw_dtype=named)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    file = GgufFile(tmp_path / "a.gguf")
    entry = file.tensors["second"]
    assert entry.shape == (3, 2 * count) and entry.kind == kind
    assert np.array_equal(file.values(entry), gguf.quants.dequantize(raw, named).reshape(3, 2 * count))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_scaled_rotations(settings, expected, tmp_path):
    found = actkit.load(write_gguf(tmp_path / "a.gguf", settings=settings)).config.rope_parameters
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_rotation(factor, tmp_path):
    config = LlamaConfig(
        **SHAPE,
        head_dim=64,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    scaled = LlamaForCausalLM(config).model.rotary_emb.inv_freq
    plain = 1 / 5e5 ** (torch.arange(32) / 32)
    tensors = small_tensors() | {"rope_freqs.weight": (plain / scaled).numpy()}
    wide = {"attention.head_count": 4, "attention.key_length": 64, "attention.value_length": 64, "rope.freq_base": 5e5}
    draw = np.random.default_rng(0)
    for name, shape in (("q", (256, 32)), ("k", (128, 32)), ("v", (128, 32)), ("output", (32, 256))):
        tensors[f"blk.0.attn_{name}.weight"] = draw.normal(size=shape).astype(np.float32)
    found = actkit.load(write_gguf(tmp_path / "a.gguf", settings=wide, tensors=tensors))
    torch.testing.assert_close(found.model.rotary_emb.inv_freq, scaled, rtol=1e-5, atol=0)


def test_a_folder_with_a_single_file(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    assert actkit.load(tmp_path).config.hidden_size == 32
    write_gguf(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\)"):
        actkit.load(tmp_path)


def test_a_damaged_header_is_named_or_read(tmp_path):
    """Any cut and any flipped byte of the header is a CheckpointError, or leaves a file that can be read."""
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    draw = np.random.default_rng(2)
    file = tmp_path / "cut.gguf"
    for length in sorted(draw.integers(0, len(whole), 40)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GgufFile(file)
    for at in draw.integers(0, 1200, 300):
        changed = bytearray(whole)
        changed[at] ^= int(draw.integers(1, 256))
        file.write_bytes(changed)
        try:
            GgufFile(file)
        except CheckpointError as error:
            assert "cut.gguf" in str(error)


def test_the_file_is_converted_once(tmp_path, cache, monkeypatch):
    from actkit.gguf import cached

    file = write_gguf(tmp_path / "a.gguf")
    actkit.load(file)
    (folder,) = (path for path in (cache / "gguf").iterdir() if not path.name.startswith("."))
    monkeypatch.setattr(cached, "convert", None)  # it is not called again
    moved = file.rename(tmp_path / "b.gguf")
    assert changes.source(actkit.load(moved)).name == str(folder)
    half = folder.rename(cache / "gguf" / "half")  # as if a process had been killed: nothing of it is taken for whole
    assert half.exists()
    with pytest.raises(TypeError):
        actkit.load(moved)
    assert not folder.exists()


def test_the_tokenizer_and_its_templates_come_along(tmp_path):
    model, tokenizer = actkit.load("swiglu"), actkit.load_tokenizer("swiglu")
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "tools"}
    folder = export(model, tmp_path / "out", "gguf", tokenizer=tokenizer, proof=False).folder
    found = actkit.load_tokenizer(next(folder.glob("*.gguf")))
    assert found.chat_template == tokenizer.chat_template and found.eos_token == tokenizer.eos_token
    for text in ("Return the 12 names,\n\n  it's  é 日本<|endoftext|>x", *tokenizer.get_vocab()):
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]


class Merging:
    """SentencePiece's BPE by its definition: merge the neighbours whose union scores best, the leftmost of equals."""

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, text):
        pieces = list("\u2581" + text.replace(" ", "\u2581"))
        while True:
            unions = [a + b for a, b in pairwise(pieces)]
            pairs = [(self.scores[union], -at) for at, union in enumerate(unions) if union in self.scores]
            if not pairs:
                return [byte for piece in pieces for byte in self.bytes_of(piece)]
            at = -max(pairs)[1]
            pieces[at : at + 2] = ["".join(pieces[at : at + 2])]

    def bytes_of(self, piece):
        return [piece] if piece in self.scores else [f"<0x{byte:02X}>" for byte in piece.encode()]


def test_sentencepiece(tmp_path):
    draw = np.random.default_rng(4)
    letters = ["\u2581", *"abcde"]
    words = sorted({"".join(draw.choice(letters, draw.integers(2, 6))) for _ in range(300)})
    scores = {word: -float(at) for at, word in enumerate(draw.permutation([*letters, *words]).tolist())}
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*fixed, *scores]
    settings = {
        ".tokenizer.ggml.model": "llama",
        ".tokenizer.ggml.tokens": tokens,
        ".tokenizer.ggml.scores": [0.0] * len(fixed) + list(scores.values()),
        ".tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(scores)],
        ".tokenizer.ggml.bos_token_id": 1,
        ".tokenizer.ggml.eos_token_id": 2,
        ".tokenizer.ggml.unknown_token_id": 0,
    }
    file = write_gguf(tmp_path / "a.gguf", settings=settings, tensors=small_tensors(len(tokens)))
    tokenizer, expected = actkit.load_tokenizer(file), Merging(scores)
    for _ in range(200):
        text = "".join(draw.choice([*"abcde ", "é"], draw.integers(1, 20)))
        found = tokenizer(text)["input_ids"]
        assert found[0] == 1 and [tokens[at] for at in found[1:]] == expected(text), text
        assert tokenizer.decode(found, skip_special_tokens=True) == text
