"""Padding before the tokens changes nothing: every sequence gives what it gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_limits import encoder
from torch import Tensor, nn

from actkit.core.forward.batch import first_tensor, forward
from actkit.core.ground.errors import DataError
from actkit.core.measure.quality import measure_quality
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Moments
from actkit.data import Batches
from actkit.testing import tiny_model

DECODERS = ("llama", "gpt2", "opt", "gemma2", "gpt_neox", "mixtral")
# Their tables of positions begin at 0, behind the padding token, or at 2 of a longer one.
ENCODERS = ("bert", "distilbert", "deberta", "mpnet", "roberta", "longformer", "esm", "mra", "openai-gpt")
GENERATOR = torch.Generator().manual_seed(0)
SEQUENCES = [torch.randint(5, 40, (length,), generator=GENERATOR) for length in (6, 9, 3)]


def left_padded(pad: int) -> dict[str, Tensor]:
    before = [9 - len(ids) for ids in SEQUENCES]
    return {
        "input_ids": torch.stack([torch.cat([ids.new_full((n,), pad), ids]) for n, ids in zip(before, SEQUENCES)]),
        "attention_mask": torch.tensor([[0] * n + [1] * len(ids) for n, ids in zip(before, SEQUENCES)]),
    }


def drawn(kind: str) -> Any:
    """With weights large enough for a position to count."""
    if kind in DECODERS:
        return tiny_model(kind), 0
    model = encoder(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model, 1


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
@torch.no_grad()
def test_left_padded_rows_are_as_they_are_alone(kind):
    model, pad = drawn(kind)
    batch = left_padded(pad)
    together = first_tensor(forward(model, batch))
    for ids, mask, found in zip(SEQUENCES, batch["attention_mask"].bool(), together):
        alone = first_tensor(model(input_ids=ids[None]))[0]
        torch.testing.assert_close(found[mask], alone, rtol=1e-4, atol=1e-4)


def test_perplexity_is_that_of_the_documents_one_by_one():
    model = tiny_model("gpt2")
    one_by_one = measure_quality(model, Batches([{"input_ids": ids[None]} for ids in SEQUENCES]), progress=False)
    together = measure_quality(model, [left_padded(0)], progress=False)
    assert together.tokens == one_by_one.tokens == 15
    assert together.metrics["perplexity"].value == pytest.approx(one_by_one.metrics["perplexity"].value, rel=1e-5)


def test_statistics_are_those_of_the_documents_one_by_one():
    model = tiny_model("gpt2")
    found = [
        record(model, {"blocks.1.mlp.hidden": Moments()}, data, progress=False)["blocks.1.mlp.hidden"]
        for data in ([left_padded(0)], [{"input_ids": ids[None]} for ids in SEQUENCES])
    ]
    torch.testing.assert_close(found[0].mean, found[1].mean, rtol=1e-4, atol=1e-5)


def test_positions_of_the_user_are_kept_and_other_padding_is_left_alone():
    model, seen = tiny_model("gpt2"), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    batch = left_padded(0)
    own = torch.arange(9).expand(3, 9)
    forward(model, {**batch, "position_ids": own})
    forward(model, {name: value.flip(1) for name, value in batch.items()})
    assert torch.equal(seen[0]["position_ids"], own) and "position_ids" not in seen[1]


def test_a_model_that_counts_from_the_first_column_is_refused():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(40, 8), nn.Embedding(9, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]

    batch = left_padded(0)
    with pytest.raises(DataError, match=r"padding stands before the tokens.*Counting.*pad on the right"):
        forward(Counting(), batch)
    forward(Counting(), {name: value.flip(1) for name, value in batch.items()})
