"""One result of everything: each part is what its own function gives, and a person can read it."""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from actkit import zoo
from actkit.core.edit.edits import Replace, temporarily
from actkit.core.ground.errors import DataError
from actkit.core.ground.estimate import Estimate
from actkit.core.ground.machine import versions
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.measure import evaluation, speed
from actkit.core.measure.cost import measure_cost
from actkit.core.measure.evaluation import evaluate
from actkit.core.measure.fresh import FreshProcess
from actkit.core.measure.generation import check_generation
from actkit.core.measure.quality import measure_quality
from actkit.core.measure.speed import Speed
from actkit.core.store import checkpoint
from actkit.data import Batches, load_data

VOCABULARY = 61


def llama(seed=6):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def rows(count=8, length=24):
    ids = torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))
    batch = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]
    return Batches(batch, description="random rows")


def sparse(model):
    """Edits that drop small inputs of every down projection."""
    for path, module in list(model.named_modules()):
        if path.endswith("down_proj"):
            yield Replace(path, ActLinear.of(module, select=Threshold(0.1)))


def shown(result, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(result.table())
    return console.export_text()


def test_the_parts_are_those_of_their_functions(tmp_path):
    original, model, data = llama(), llama(), rows()
    checkpoint.save(original, tmp_path / "original")
    with temporarily(model, sparse(model)):
        found = evaluate(model, data, reference=original, reference_folder=tmp_path / "original", resamples=200, seed=3)
        assert found.quality == measure_quality(model, data, reference=original, resamples=200, seed=3)
        assert found.cost == measure_cost(model, data)
        prompts = data[0]["input_ids"]
        assert found.generation == check_generation(model, prompts, max_new_tokens=32, reference=original)
    assert found.original_cost == measure_cost(original, folder=tmp_path / "original")
    assert found.original_cost.disk_bytes == sum(f.stat().st_size for f in (tmp_path / "original").iterdir())
    assert 0 < found.cost.density < 1 and found.cost.bytes_per_token < found.original_cost.bytes_per_token
    assert (found.speed, found.original_speed, found.memory) == (None, None, None)
    assert (found.model, found.dtype, found.seed, found.threads) == (
        "LlamaForCausalLM",
        "float32",
        3,
        torch.get_num_threads(),
    )
    assert (found.data, found.fingerprint, found.versions) == ("random rows", data.fingerprint, versions())
    assert found.machine["cores"] >= 1

    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["quality"]["metrics"]["kl"]["value"] == found.quality.metrics["kl"].value
    assert stored["cost"]["density"] == found.cost.density and stored["speed"] is None
    assert stored["generation"]["passed"] is True and stored["fingerprint"] == data.fingerprint
    text = shown(found)
    for part in (
        "LlamaForCausalLM, float32",
        "perplexity ratio",
        "weights read per token",
        "of the original",
        "inputs read by layers that choose some",
        "Writes: 4 greedy texts of 32 tokens",
        "torch " + versions()["torch"],
        "seed 3",
    ):
        assert part in text, part
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_model_alone_and_one_that_equals_its_original():
    model, data = llama(), rows()
    alone = evaluate(model, data, resamples=50)
    assert alone.quality.loss is None and alone.original_cost is None
    assert alone.generation.passed and alone.generation.agreeing_prefix is None
    assert "of the original" not in shown(alone) and "speed through" not in shown(alone)
    same = evaluate(model, iter(list(data)), reference=model, resamples=50)
    assert same.quality.loss == Estimate(0, 0, 0) and same.generation.agreeing_prefix == 32
    assert same.cost == same.original_cost and same.fingerprint is None and same.data == "given batches"


def test_memory_in_a_fresh_process(tmp_path):
    model, data = llama(), rows()
    checkpoint.save(model, tmp_path / "model")
    with FreshProcess(threads=1) as process:
        found = evaluate(model, data, folder=tmp_path / "model", process=process, resamples=50)
        assert not process.closed
        assert process.memory()["resident_bytes"] > 50e6
    assert found.memory.peak_bytes >= found.memory.resident_bytes > 50e6
    assert found.cost.disk_bytes == sum(f.stat().st_size for f in (tmp_path / "model").iterdir())
    assert "peak of the process" in shown(found) and "on disk" in shown(found)
    json.dumps(found.to_dict(), allow_nan=False)


def fake_speed(rate, ratio, peak):
    first = Estimate(0.25 / rate, 0.2 / rate, 0.3 / rate)
    estimate = Estimate(rate, 0.9 * rate, 1.1 * rate)
    return Speed("decode", "tokens/s", estimate, first, ratio, peak, 1, 16, 8, 2, "float32", 3, 0, "decoder")


def test_speed_is_timed_in_turns_with_the_original(tmp_path, monkeypatch):
    model, data = llama(), rows()
    for name in ("one", "two"):
        checkpoint.save(model, tmp_path / name)
    calls = []

    def measure(folders, **settings):
        calls.append((folders, settings))
        old, new = fake_speed(100.0, None, 10**9), fake_speed(150.0, Estimate(1.5, 1.4, 1.6), 8 * 10**8)
        return {"original": old, "changed": new} if len(folders) == 2 else {"changed": fake_speed(150.0, None, 10**9)}

    monkeypatch.setattr(speed, "measure_speed", measure)
    settings = {"batch": 1, "prompt": 16, "max_new_tokens": 8, "rounds": 3, "threads": 2, "dtype": "bfloat16"}
    both = evaluate(
        model,
        data,
        reference=model,
        folder=tmp_path / "two",
        reference_folder=tmp_path / "one",
        speed=True,
        resamples=50,
        **settings,
    )
    folders, given = calls.pop()
    assert list(folders.items()) == [("original", tmp_path / "one"), ("changed", tmp_path / "two")]
    assert settings.items() <= given.items()
    assert both.speed.ratio.value == 1.5 and both.original_speed.ratio is None
    assert (both.memory.peak_bytes, both.memory.resident_bytes) == (8 * 10**8, None)
    text = shown(both, 120)
    for part in (
        "tokens/s, 1 x 16 + 8 tokens, 2 threads",
        "150 (135 to 165)",
        "1.50 (1.40 to 1.60) x",
        "ms to the first token",
        "1.67 (1.33 to 2)",
        "80.0%",
        "speed through decoder; ",
    ):
        assert part in text, part
    assert json.loads(json.dumps(both.to_dict(), allow_nan=False))["speed"]["engine"] == "decoder"
    other = replace(both, speed=replace(both.speed, engine="transformers", engine_reason="its model_type is 'gpt2'"))
    assert "speed through transformers (its model_type is 'gpt2'); " in shown(other, 120)
    alone = evaluate(model, data, folder=str(tmp_path / "two"), speed=True, resamples=50)
    assert list(calls.pop()[0]) == ["changed"] and alone.original_speed is None
    assert "150 (135 to 165)" in shown(alone)


def test_an_encoder_and_a_classifier():
    encoder, tokenizer = zoo.load("minilm"), zoo.tokenizer("minilm")
    texts = ["Open a file.", "Return the name of the file.", "Weather"]  # of its own, as reading the corpus takes long
    found = evaluate(encoder, [dict(tokenizer(texts, padding=True, return_tensors="pt"))], reference=encoder)
    assert found.quality.metrics["fidelity"] == Estimate(1, 1, 1) and found.generation is None
    cnn = zoo.load("cnn")
    found = evaluate(cnn, load_data(None, cnn, split="test", sequences=40))
    assert found.quality.task == "classification" and found.generation is None
    assert "accuracy" in shown(found) and "weights read per token or example" in shown(found)


@pytest.mark.parametrize(
    ("lengths", "side", "expected"),
    [([40, 40], "right", 32), ([9, 20, 30], "right", 9), ([9, 20, 30], "left", 9), ([1, 5], "right", 1)],
)
def test_prompts_are_real_tokens(lengths, side, expected):
    longest = max(lengths)
    ids = torch.arange(longest * len(lengths)).view(len(lengths), longest) % (VOCABULARY - 1) + 1
    mask = torch.stack([torch.arange(longest) < n for n in lengths]).long()
    mask = mask.flip(1) if side == "left" else mask
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    prompts, new_tokens = evaluation._prompts(llama(), [batch])
    assert prompts.shape == (len(lengths), expected) and new_tokens == 32
    for row, prompt in enumerate(prompts):
        assert torch.equal(prompt, ids[row][mask[row].bool()][:expected])


def test_prompts_fit_the_context():
    model = llama()
    model.config.max_position_embeddings = 20
    prompts, new_tokens = evaluation._prompts(model, [torch.ones(2, 18, dtype=torch.int64)])
    assert (prompts.shape[1], new_tokens) == (10, 10)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=24, n_layer=1, n_head=2)  # states no context
    many = [torch.ones(3, 40, dtype=torch.int64)] * 3
    assert evaluation._prompts(BloomForCausalLM(config), many)[0].shape == (4, 32)
    with pytest.raises(DataError, match="no token that is not masked"):
        ids = torch.ones(1, 4, dtype=torch.int64)
        evaluation._prompts(model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])


def test_a_model_that_no_longer_writes_is_told_so():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = evaluate(model, rows(), reference=llama(), resamples=50)
    assert not found.generation.passed and "Does not write: prompt 1 is continued by token 0" in shown(found)
    assert evaluate(model, rows(), generation=False, resamples=50).generation is None


def test_a_plain_language_model_has_no_generation_check():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))
    found = evaluate(model, [batch["input_ids"] for batch in rows()], resamples=50)
    assert found.quality.task == "language" and found.generation is None


def test_bad_input(tmp_path):
    model, data = llama(), rows()
    with pytest.raises(ValueError, match="speed: True was given without folder="):
        evaluate(model, data, speed=True)
    with pytest.raises(ValueError, match="process: one was given without folder="):
        evaluate(model, data, process=object())
    with pytest.raises(DataError, match="there is no folder"):
        evaluate(model, data, folder=tmp_path / "nowhere")
    with pytest.raises(DataError, match="batches: 0 were given"):
        evaluate(model, [])


def test_no_number_is_lost_in_json():
    """One document: intervals are unknown, so JSON says null, and the table says why."""
    model, data = llama(), rows(1)
    found = evaluate(model, data, reference=llama(1))
    assert found.quality.loss.high == math.inf
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert isinstance(stored, Mapping) and stored["quality"]["loss"]["high"] is None
    assert "one document" in shown(found)
