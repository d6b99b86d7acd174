"""The calls of blocks that are recorded without running the blocks are those of plain passes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actkit.core.forward.batch import BatchContext
from actkit.core.forward.hooks import evaluating
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.recording import Recorder, _equal
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.models import ARCHITECTURES

LENGTHS = ((9, 4, 6), (7, 9, 2), (9, 9, 9), (7, 2))


def recorded(model: Any, batches: list[Any], states: bool) -> tuple[list[Any], int]:
    """The calls of all batches, and how often the last block ran."""
    view = anatomy(model, batches[0])
    runs = []
    block = model.get_submodule(view.blocks[-1].path)
    handle = block.register_forward_hook(lambda *_: runs.append(1))
    recorder, found = Recorder(view), []
    with evaluating(model):
        for batch in batches:
            found.append(recorder.record(batch, BatchContext.of(batch, model), states))
    handle.remove()
    return found, len(runs)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_without_blocks_as_with_them(kind: str) -> None:
    model = tiny_model(kind)
    batches = tiny_batches(kind, lengths=LENGTHS)
    found, few = recorded(model, batches, states=False)
    expected, all_of_them = recorded(model, batches, states=True)
    assert all_of_them == 4
    assert few < 4
    for (calls, once), (true_calls, true_once) in zip(found, expected, strict=True):
        assert once == true_once
        for index, (call, true) in enumerate(zip(calls, true_calls, strict=True)):
            if index:
                call, true = call.with_hidden(torch.empty(0)), true.with_hidden(torch.empty(0))
            assert _equal((call.args, call.kwargs), (true.args, true.kwargs))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, told: Any) -> Any:
        return hidden_states + self.linear(hidden_states), None


class Telling(nn.Module):
    """Each block is told something: a number of its own, or the largest of what entered the block before it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        told: Any = 0.0
        for index, layer in enumerate(self.layers):
            told = x.max() if self.how == "states" else index
            if self.how == "class" and not isinstance(layer, Block):
                raise TypeError("no block of mine")
            x = layer(x, told)[0]
        return x


@pytest.mark.parametrize(("how", "runs"), [("index", 0), ("states", 2), ("class", 2)])
def test_blocks_that_are_told_of_each_other_run(how: str, runs: int) -> None:
    torch.manual_seed(0)
    model = Telling(how)
    blocks = [SimpleNamespace(path=f"layers.{i}", attention=None, mlp=None) for i in range(3)]
    recorder = Recorder(SimpleNamespace(model=model, blocks=blocks, head=()))  # type: ignore[arg-type]
    count: list[int] = []
    model.layers[1].register_forward_hook(lambda *_: count.append(1))
    for index in range(3):
        if index == 1:
            count.clear()  # the first one runs, and is replayed
        batch = torch.randn(2, 4)
        calls, _ = recorder.record(batch, BatchContext.of(batch, model))
        expected, x = [], batch
        for place, layer in enumerate(model.layers):
            expected.append(x.max() if how == "states" else place)
            with torch.no_grad():
                x = x + layer.linear(x)
        assert [float(call.args[1]) for call in calls] == [float(each) for each in expected]
    assert len(count) == runs


def test_another_shape_runs_through_the_model() -> None:
    model = tiny_model("llama")
    batches = tiny_batches("llama", lengths=((9, 4), (9, 4, 6), (9, 9), (9, 9, 9), (3, 4)))
    assert recorded(model, batches, states=False)[1] == 3
    assert all(module.__class__.__name__ != "_Passing" for module in model.modules())
