"""One vector for each example: against plain tensors, in parts, merged and in any order."""

from __future__ import annotations

import pytest
import torch

from actkit.core.ground.errors import DataError
from actkit.core.watch.by_example import ByExample
from actkit.core.watch.capture import record
from actkit.core.watch.streaming import Rows
from actkit.testing import tiny_batches, tiny_model


@pytest.mark.parametrize("position", ["mean", "first", "last"])
def test_tokens_of_a_text_without_the_padding(position):
    model, batches = tiny_model("llama"), tiny_batches("llama")
    found = record(model, {"blocks.1.block.output": ByExample(position)}, batches, progress=False)
    wanted = []
    for batch in batches:
        with torch.no_grad():
            hidden = model.model(**batch, output_hidden_states=True).hidden_states[1]
            kept: list[torch.Tensor] = []
            hook = model.model.layers[1].register_forward_hook(lambda m, a, o: kept.append(o))  # noqa: B023
            model(**batch)
            hook.remove()
            hidden = kept[0]
        for row, mask in zip(hidden, batch["attention_mask"].bool(), strict=True):
            real = row[mask]
            wanted.append({"mean": real.mean(0), "first": real[0], "last": real[-1]}[position])
    torch.testing.assert_close(found["blocks.1.block.output"].vectors, torch.stack(wanted), rtol=1e-5, atol=1e-6)


def test_all_rows_side_by_side_in_any_order_and_merged():
    x = torch.randn(6, 3)
    rows = Rows(torch.arange(6) // 2, torch.arange(6) % 2)
    shuffled = torch.tensor([4, 1, 0, 5, 3, 2])
    one, other = ByExample("flat"), ByExample("flat")
    one.update(x[shuffled], rows[shuffled])
    assert torch.equal(one.vectors, x.view(3, 6))
    other.update(x[4:], rows[4:])
    first = ByExample("flat")
    first.update(x[:4], rows[:4])
    assert torch.equal(other.merge(first).vectors, x.view(3, 6))


def test_examples_of_unequal_length_have_no_rows_side_by_side():
    flat = ByExample("flat")
    flat.update(torch.ones(3, 2), Rows(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])))
    with pytest.raises(DataError, match="examples have 1 to 2 rows"):
        _ = flat.vectors
