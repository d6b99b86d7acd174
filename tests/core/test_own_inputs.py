"""Models that take something else than one sequence of tokens or images: the user's batch goes all the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from actkit import verbs
from actkit.core.forward.batch import check_batch, forward
from actkit.core.forward.example import Inputs, example_of
from actkit.core.forward.limits import is_encoder_decoder
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.measure.quality import measure_quality, task_of
from actkit.core.measure.speed import measure_speed
from actkit.data import Batches, load_data

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
AUDIO = {
    **SIZES,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
SPECTRUM = {**SIZES, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
IDS = torch.randint(3, 40, (3, 8), generator=torch.Generator().manual_seed(0))
NEXT = IDS[:, :5].flip(1)


def built(kind: str) -> tuple[Any, dict[str, Tensor]]:
    """A tiny random model, and a batch of three examples of it."""
    torch.manual_seed(0)
    if kind == "wav2vec2":
        return Wav2Vec2ForCTC(Wav2Vec2Config(**AUDIO)).eval(), {"input_values": torch.randn(3, 400)}
    if kind == "spectrogram":
        return ASTForAudioClassification(ASTConfig(**SPECTRUM)).eval(), {"input_values": torch.randn(3, 16, 8)}
    if kind == "clip":
        vision = {**SIZES, "image_size": 8, "patch_size": 4}
        model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=8)).eval()
        return model, {"input_ids": IDS, "pixel_values": torch.rand(3, 3, 8, 8)}
    model = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)).eval()
    return model, {"input_ids": IDS, "decoder_input_ids": NEXT}


@pytest.mark.parametrize("kind", ["wav2vec2", "clip"])
def test_applied_saved_and_proved_on_the_batch_of_the_user(kind, tmp_path):
    model, batch = built(kind)
    saved = verbs.apply_and_save(model, "teal", tmp_path / "x", iter([batch]), min_coverage=0, progress=False)
    assert saved.proof is not None and saved.proof.passed
    assert len(saved.report.changed) > 4
    speeds = measure_speed({"a": tmp_path / "x"}, rounds=1, precision=None, example=batch, progress=False)
    assert (speeds["a"].kind, speeds["a"].batch, speeds["a"].unit) == ("forward", 3, "examples/s")


@pytest.mark.parametrize("kind", ["wav2vec2", "spectrogram", "clip", "t5"])
def test_shown_profiled_and_changed(kind):
    model, batch = built(kind)
    assert verbs.show(model, [batch]).parameters == sum(p.numel() for p in model.parameters())
    assert len(verbs.profile(model, [batch]).sites) > 4
    before = forward(model, batch)[0]
    applied = verbs.apply(model, "teal", [batch, batch], min_coverage=0, progress=False)
    assert not torch.equal(forward(model, batch)[0], before)
    applied.undo()
    assert torch.equal(forward(model, batch)[0], before)


def test_only_what_random_rows_cannot_be_needs_the_batch():
    for kind, covered in (("wav2vec2", False), ("spectrogram", False), ("clip", False), ("t5", True)):
        model, batch = built(kind)
        assert Inputs.of(model).covers(batch) is covered
        example = example_of(model, [batch])
        assert (
            example is None
            if covered
            else {name: len(value) for name, value in example.items()} == dict.fromkeys(batch, 2)
        )
    assert example_of(built("wav2vec2")[0], iter([])) is None


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("wav2vec2", "Wav2Vec2ForCTC takes input_values, and text alone is no input"),
        ("clip", "CLIPModel takes input_ids, and text alone is no input"),
        ("t5", r"T5ForConditionalGeneration is an encoder-decoder.*decoder_input_ids \(or labels\).*random"),
    ],
)
def test_text_is_refused_before_it_is_read(kind, text):
    with pytest.raises(DataError, match=text):
        load_data(None, built(kind)[0], lambda *_, **__: pytest.fail("the text was read"))


@pytest.mark.parametrize("kind", ["wav2vec2", "spectrogram", "clip"])
def test_random_rows_are_refused_where_nothing_tells_them(kind):
    model, _ = built(kind)
    with pytest.raises(DataError, match="source='random': the model states neither"):
        load_data("random", model)
    with pytest.raises(DataError, match="the model does not say what it takes"):
        Inputs.of(model).batch()


def test_random_rows_of_an_encoder_decoder():
    model, _ = built("t5")
    for batch in (load_data("random", model, sequences=2, length=9)[0], Inputs.of(model).batch(2, 9)):
        assert batch["input_ids"].shape == batch["decoder_input_ids"].shape == (2, 9)
        assert forward(model, batch).logits.shape == (2, 9, 40)
    assert not Inputs.of(model).causal and verbs.show(model).parameters > 0


def test_labels_become_the_tokens_of_the_decoder():
    model, _ = built("t5")
    given = {"input_ids": IDS, "labels": NEXT}
    check_batch(model, given)
    torch.testing.assert_close(forward(model, given).logits, model(**given).logits)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"decoder_input_ids": None}, "a batch has no decoder_input_ids"),
        ({"attention_mask": torch.tensor([[1] * 8, [1] * 8, [1] * 7 + [0]])}, "attention_mask: a batch is padded"),
        ({"decoder_attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 3)}, "decoder_attention_mask: a batch is padded"),
    ],
)
def test_batches_that_an_encoder_decoder_is_not_recorded_on(change, text):
    model, batch = built("t5")
    wrong = {name: value for name, value in {**batch, **change}.items() if value is not None}
    with pytest.raises(DataError, match=text):
        verbs.apply(model, "teal", [batch, wrong], progress=False)


def test_an_encoder_decoder_is_refused_and_its_encoder_is_measured():
    model, _ = built("t5")
    assert is_encoder_decoder(model)
    with pytest.raises(UnsupportedModelError, match="get_encoder"):
        verbs.evaluate(model, None)  # before any data is read
    encoder, batch = model.get_encoder(), Batches([{"input_ids": IDS}])
    assert task_of(encoder) == "embedding" and not is_encoder_decoder(encoder)
    found = measure_quality(encoder, batch, reference=encoder, progress=False)
    assert found.metrics["fidelity"].value == 1
