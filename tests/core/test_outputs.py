"""A model's outputs as a measurement reads them: the same numbers through slices of the head, and kept ones."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

from actkit.core.forward import outputs
from actkit.core.forward.outputs import BeforeHead, Outputs, Whole, find_head
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight, widened
from actkit.core.measure.quality import measure_quality
from actkit.core.measure.tasks import predictions


def batches(count: int = 4, vocabulary: int = tiny_models.VOCABULARY) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(vocabulary, (2, 16), generator=generator)} for _ in range(count)]


def changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quality_through_slices_of_the_head_is_the_same(family, dtype, monkeypatch):
    original = tiny_models.build(family).to(dtype)
    model = changed(tiny_models.build(family).to(dtype))
    data = batches(vocabulary=original.config.vocab_size)
    assert find_head(model, data[0]) is model.get_output_embeddings()
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "find_head", lambda *_: None)  # whole logits, both models in turns
        expected = measure_quality(model, data, reference=original, progress=False)
    kept = Outputs(original, keep=1 << 20)
    monkeypatch.setattr(predictions, "SLICE", 5 * original.config.vocab_size)
    monkeypatch.setattr(predictions, "CHUNK", 2 * original.config.vocab_size)
    for _ in range(2):
        assert measure_quality(model, data, reference=kept, progress=False) == expected


def test_a_kept_original_runs_once_over_the_same_batches():
    original, model = tiny_models.build("llama"), changed(tiny_models.build("llama"))
    ran = []
    original.model.register_forward_hook(lambda *_: ran.append(1))
    data = batches()
    kept = Outputs(original, keep=1 << 20)
    first = measure_quality(model, data, reference=kept, progress=False)
    once = len(ran)
    assert once == len(data) + 2  # two for the head, on one row
    assert measure_quality(model, data, reference=kept, progress=False) == first and len(ran) == once
    assert kept.nbytes == sum(batch["input_ids"].numel() for batch in data) * original.config.hidden_size * 4
    assert measure_quality(original, data, reference=kept, progress=False).loss.value == 0 and len(ran) == once
    few = Outputs(original, keep=kept.nbytes // 2)
    assert measure_quality(model, data, reference=few, progress=False) == first
    assert few.nbytes <= few.keep


class Capped(nn.Module):
    """A language model that does something to its logits, as Gemma 2 does."""

    def __init__(self, cap: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.cap = cap

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.embedding(ids))
        return logits.tanh() if self.cap else logits


def test_logits_that_are_changed_after_the_head_are_taken_as_they_are():
    ids = torch.arange(12).reshape(2, 6)
    for cap, kind in ((False, BeforeHead), (True, Whole)):
        model = Capped(cap)
        with torch.no_grad():
            output = Outputs(model).of(ids, before_head=True)
            assert isinstance(output, kind)
            assert torch.equal(output.rows(torch.arange(12)), model(ids).flatten(0, 1))


@pytest.mark.parametrize("bits", [4, 8])
def test_widened_weights_give_the_same_and_are_dropped(bits):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = ActLinear(IntegerWeight.quantize(weight, IntegerGrid(bits, 32)))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = layer(x)
    with pytest.raises(ZeroDivisionError), widened(layer):
        held = layer.dequantized()
        assert held is layer.dequantized() and torch.equal(layer(x), expected)
        raise ZeroDivisionError
    assert layer.dequantized() is not held and torch.equal(layer(x), expected)


def test_a_measurement_stops_when_it_is_told_to_and_says_what_it_saw():
    original, model = tiny_models.build("llama"), changed(tiny_models.build("llama"))
    data = batches(8)
    whole = measure_quality(model, data, reference=original, progress=False)
    seen = []

    def stop(partial):
        seen.append(partial)
        return len(seen) == 2

    found = measure_quality(model, data, reference=original, progress=False, stop=stop)
    assert [each.documents for each in seen] == [10, 12] and found == seen[-1]
    assert not found.complete and found.confidence == pytest.approx(1 - 0.05 / 8)
    six = measure_quality(model, data[:6], reference=original, progress=False)
    assert found.loss.value == six.loss.value  # of the same documents
    assert found.loss.low < six.loss.low and six.loss.high < found.loss.high
    assert measure_quality(model, data, reference=original, progress=False, stop=lambda _: False) == whole
