"""Packed folders: the logits of the decoder that they were written from, and what is refused."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actkit import verbs
from actkit.core.ground.errors import CheckpointError, UnsupportedModelError
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.core.store.mapped_arrays import Mapped, Writer
from actkit.core.store.opening import open_pending
from actkit.kernels.process import most_threads
from actkit.quantization.ends import Ends
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.decoder import Decoder
from actkit.runtime.packed import open_packed
from actkit.runtime.packing import export_packed
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
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0],
    "original_max_position_embeddings": 16,
}
IDS = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(0))


def llama(dtype=torch.bfloat16, **settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **settings})).to(dtype).eval()


def changed(model, *transforms):
    return apply(model, list(transforms), [{"input_ids": IDS}], progress=False).model


FOUR, EIGHT = RoundToNearest(bits=4, group_size=32), RoundToNearest(bits=8, group_size=32, group_axis="output")
MODELS = {
    "bfloat16, tied": lambda: llama(tie_word_embeddings=True),
    "float32, biases": lambda: llama(torch.float32, attention_bias=True, mlp_bias=True),
    "float16": lambda: llama(torch.float16),
    "4 bits, embedding too": lambda: changed(llama(), RoundToNearest(bits=4, group_size=32, embedding=Ends())),
    "8 bits along the outputs, selected": lambda: changed(llama(torch.float32), EIGHT, Teal(sparsity=0.5)),
    "4 bits behind a sparse gate": lambda: changed(llama(hidden_act="relu"), FOUR),
    "bundled units": lambda: llama(torch.float32, hidden_act="relu"),
    "a cache of codes": lambda: changed(llama(), QuantizeCache(bits=8)),
    "longrope": lambda: llama(rope_parameters=LONG),
}


def logits(decoder):
    with decoder:
        stepped = torch.stack([decoder([token]) for token in IDS[0, :18].tolist()])
        decoder.reset()
        return torch.cat([stepped, decoder(IDS[0].tolist())[None]])


@pytest.fixture(autouse=True)
def dense_prompts(monkeypatch):
    """Models this small would read every prompt of these tests step by step."""
    for module in ("decoder", "packed"):
        monkeypatch.setattr(f"actkit.runtime.{module}.few_tokens", lambda *_: 2)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_the_decoder_it_was_written_from(name, tmp_path):
    model = MODELS[name]()
    expected = {capacity: logits(Decoder(model, capacity=capacity)) for capacity in (20, 64)}
    found = export_packed(model, tmp_path / "packed")
    assert found.tokens and found.disk_bytes > found.weight_bytes > 0
    for capacity, wanted in expected.items():
        assert torch.equal(logits(Decoder(open_packed(tmp_path / "packed"), capacity=capacity)), wanted)


@pytest.mark.skipif(most_threads() < 2, reason="one thread can run here")
def test_one_and_several_threads(tmp_path):
    model = llama()
    for threads in (1, 2):
        folder = tmp_path / f"packed-{threads}"
        export_packed(model, folder, threads=threads, proof=False)
        assert Decoder(open_packed(folder)).threads == threads
        with pytest.raises(ValueError, match=f"was packed for {threads} threads, and {3 - threads} were asked for"):
            Decoder(open_packed(folder), threads=3 - threads)


def test_it_generates_what_the_model_does(tmp_path):
    kept = tmp_path / "rounded"
    verbs.apply_and_save("swiglu", [FOUR], kept, proof=False)
    said = []
    expected = "".join(verbs.generate(str(kept), "The", max_new_tokens=6))
    verbs.export(str(kept), tmp_path / "packed", "packed")
    written = "".join(verbs.generate(str(tmp_path / "packed"), "The", max_new_tokens=6, announce=said.append))
    assert written == expected and said[0].startswith("decoder")
    with pytest.raises(ValueError, match="packed for the CPU's decoder as it is"):
        verbs.generate(str(tmp_path / "packed"), "The", dtype="float32")
    with pytest.raises(ValueError, match="99 were asked for"):
        verbs.generate(str(tmp_path / "packed"), "The", threads=99)
    with pytest.raises(CheckpointError, match="packed for decoding"):
        checkpoint.load(tmp_path / "packed")
    with pytest.raises(UnsupportedModelError, match="is packed for the decoder"):
        open_packed(tmp_path / "packed")(torch.ones(1, 1))
    with pytest.raises(CheckpointError, match="exists already"):
        verbs.export(str(kept), tmp_path / "packed", "packed")
    with pytest.raises(ValueError, match="has no card"):
        verbs.export(str(kept), tmp_path / "other", "packed", measure=True)


def test_its_weights_are_written_from_files(tmp_path):
    checkpoint.save(llama(), tmp_path / "model")
    expected = logits(Decoder(checkpoint.load(tmp_path / "model"), capacity=20))
    export_packed(open_pending(tmp_path / "model"), tmp_path / "packed")
    assert torch.equal(logits(Decoder(open_packed(tmp_path / "packed"), capacity=20)), expected)


def rewritten(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_folders(tmp_path):
    export_packed(llama(), tmp_path / "packed", proof=False)
    header, weights = tmp_path / "packed" / "packed.json", tmp_path / "packed" / "packed.bin"
    text, whole = header.read_text(), weights.read_bytes()
    weights.write_bytes(whole[:-4096])
    with pytest.raises(CheckpointError, match="truncated or was changed"):
        open_packed(tmp_path / "packed")
    weights.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(CheckpointError, match="damaged or was changed"):
        open_packed(tmp_path / "packed")
    weights.unlink()
    with pytest.raises(CheckpointError, match="the file is missing"):
        open_packed(tmp_path / "packed")
    weights.write_bytes(whole)
    layout = json.loads(text)["layout"]
    header.write_text(text.replace("llama", "lamma"))
    with pytest.raises(CheckpointError, match="was changed since it was saved"):
        open_packed(tmp_path / "packed")
    (tmp_path / "packed" / "actkit.sha256").unlink()
    rewritten(header, layout={**layout, "byte order": "big"})
    with pytest.raises(CheckpointError, match=r"another layout \(byte order\)"):
        open_packed(tmp_path / "packed")
    header.write_text(text)
    rewritten(header, threads=64)
    with pytest.raises(ValueError, match="was packed for 64 threads"):
        Decoder(open_packed(tmp_path / "packed"))
    header.write_text(text)
    rewritten(header, heads=None)
    with pytest.raises(CheckpointError, match="does not describe a packed model"):
        Decoder(open_packed(tmp_path / "packed"))
    header.write_text(text[:-5])
    with pytest.raises(CheckpointError, match="not readable as the header"):
        open_packed(tmp_path / "packed")


def test_arrays_lie_on_pages(tmp_path):
    given = [np.arange(5, dtype=np.float32), np.empty((0, 3), np.int64), np.arange(6, dtype=np.uint8).reshape(2, 3)]
    with Writer(tmp_path / "arrays") as file:
        places = [file.add(each) for each in given]
    mapped = Mapped(tmp_path / "arrays", file.facts)
    for place, each in zip(places, given):
        found = mapped.array(place)
        assert place["at"] % 4096 == 0 and found.dtype == each.dtype and np.array_equal(found, each)
