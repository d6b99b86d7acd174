"""The hidden states of a walk are those of plain forward passes, whatever blocks return and whatever lies between."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import KINDS, batches, build, run
from torch import Tensor, nn

from actkit.core.forward.batch import BatchContext
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.recipe.blockwise import Walk
from actkit.core.watch.calls import Call
from actkit.core.watch.statistics import Moments


def quiet(items: Any, description: str) -> Any:
    return items


def block_inputs(model: nn.Module, paths: list[str], given: list[Any]) -> list[list[Tensor]]:
    """What enters each block in plain forward passes: [block][batch]."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            found[path].append((args[0] if args else kwargs["hidden_states"]).detach().clone())

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(keep(path), with_kwargs=True) for path in found if path
    ]
    for batch in given:
        run(model, batch)
    for handle in handles:
        handle.remove()
    return [found[path] for path in paths]


def edit(model: nn.Module, path: str) -> None:
    with torch.no_grad():
        for parameter in model.get_submodule(path).parameters():
            parameter.mul_(1.1)


@pytest.mark.parametrize("kind", [*KINDS, "loose"])
def test_both_streams(kind):
    model, given = build(kind), batches("llama" if kind == "loose" else kind)
    view = anatomy(model)
    paths = [block.path for block in view.blocks]
    original = block_inputs(build(kind), paths, given)
    walk = Walk(view, given, quiet)
    with evaluating(model):
        walk.start(("original", "edited"))
        assert walk.chained == (kind != "loose")
        for index, path in enumerate(paths):
            edited = block_inputs(model, paths, given)  # the blocks before this one are edited, the others do not count
            for stream, expected in (("original", original), ("edited", edited)):
                for call, hidden in zip(walk.calls(index, stream), expected[index], strict=True):
                    assert torch.equal(call.hidden, hidden)
                    assert not call.hidden.requires_grad
            following = walk.following(index, "original")
            edit(model, path)
            walk.move("edited", walk.following(index, "edited"))
            walk.move("original", following)
    assert walk.calls(len(paths), "edited") == []


class Block(nn.Module):
    """Returns a tuple, takes its hidden states by keyword, and works on them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, *, hidden_states: Tensor, scale: float) -> tuple[Tensor, str]:
        return hidden_states + self.linear(hidden_states) * scale, "something else"


class Own(nn.Module):
    def __init__(self, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for scale, index in enumerate(self.order, start=1):
            x = self.layers[index](hidden_states=x, scale=float(scale))[0]
        return x


def view_of(model: Own) -> Any:
    blocks = [
        SimpleNamespace(index=i, path=f"layers.{i}", module=module, linears=tuple, attention=None, mlp=None)
        for i, module in enumerate(model.layers)
    ]
    return SimpleNamespace(model=model, head=(), blocks=blocks)


def test_blocks_that_return_tuples_and_take_keywords():
    torch.manual_seed(0)
    model, given = Own(), [torch.randn(2, 4), torch.randn(3, 4)]
    expected = block_inputs(model, [f"layers.{i}" for i in range(3)], given)
    walk = Walk(view_of(model), given, quiet)
    walk.start(["original"])  # without no_grad around it: the walk itself must keep no graph
    assert walk.chained
    for index in range(3):
        calls = walk.calls(index, "original")
        assert [call.kwargs["scale"] for call in calls] == [index + 1.0] * 2
        for call, hidden in zip(calls, expected[index], strict=True):
            assert torch.equal(call.hidden, hidden)
            assert call.hidden.grad_fn is None
        walk.move("original", walk.following(index, "original"))


@pytest.mark.parametrize(("order", "text"), [((0, 1, 1), r"layers\.1 runs several"), ((0, 2), r"layers\.1 does not")])
def test_blocks_that_do_not_run_once_are_refused(order, text):
    with pytest.raises(UnsupportedModelError, match=text):
        Walk(view_of(Own(order)), [torch.randn(2, 4)], quiet).start(["original"])


def test_replay_takes_what_a_whole_model_returns():
    for output in ({"states": torch.ones(2)}, [torch.ones(2)], (torch.ones(2), None), ([torch.ones(2)],)):
        call = Call((), {}, BatchContext.of(torch.zeros(1, 1)))
        assert call.replay(lambda output=output: output).sum() == 2
    for kind in ("llama", "mlp"):
        model, batch = build(kind), batches(kind)[0]
        args, kwargs = ((), batch) if kind == "llama" else ((batch,), {})
        call = Call(args, kwargs, BatchContext.of(batch))
        assert torch.equal(call.replay(model), run(model, batch))


def test_other_hidden_states_in_the_same_call():
    context = BatchContext.of(torch.zeros(2, 4))
    by_position = Call((torch.zeros(2), "mask"), {"a": 1}, context).with_hidden(torch.ones(2))
    by_name = Call((), {"hidden_states": torch.zeros(2), "a": 1}, context).with_hidden(torch.ones(2))
    assert by_position.args[1] == "mask"
    assert by_name.kwargs["a"] == 1
    assert by_position.hidden.sum() == by_name.hidden.sum() == 2


@pytest.mark.parametrize("kind", ["llama", "vit", "loose", "mlp"])
def test_bytes_are_what_the_walk_holds(kind):
    model, given = build(kind), batches("llama" if kind == "loose" else kind, padding=False)
    walk = Walk(anatomy(model, given[0]), given, quiet)
    with evaluating(model):
        walk.start(["original", "edited"])
    held = walk.bytes(["original", "edited"])
    if kind == "mlp":
        assert held == {}  # the batches themselves are the calls
        return
    hidden = sum(
        x.nbytes for x in block_inputs(model, ["vit.layers.0" if kind == "vit" else "model.layers.0"], given)[0]
    )
    assert held["hidden states (2 streams, old and new)"] == 4 * hidden
    assert held.get("hidden states of all blocks (no chain)") == (3 * hidden if kind == "loose" else None)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_some_calls_end_at_the_row_that_reaches_the_tokens(kind):
    model, given = build(kind), batches(kind)
    view = anatomy(model)
    path = view.blocks[0].path
    module = model.get_submodule(path)
    real = [BatchContext.of(batch).tokens for batch in given]
    first = given[0]["attention_mask"].sum(1).tolist()
    walk = Walk(view, given, quiet)
    with evaluating(model):
        walk.start(("original",))
        whole = walk.calls(0, "original")
        assert [index for index, _ in walk.some_calls(0, "original", None)] == list(range(len(given)))
        (index, cut), *others = walk.some_calls(0, "original", first[0])
        assert (index, others, cut.context.tokens) == (0, [], first[0])
        expected = whole[0].replay(module)[:1]
        torch.testing.assert_close(cut.replay(module), expected, rtol=0, atol=1e-5)
        (_, one), (_, two) = walk.some_calls(0, "original", real[0] + 1)
        assert one is whole[0] and len(two.hidden) == 1


def test_a_pass_that_runs_a_layer_twice_is_not_ended_before():
    """The first of two runs of a layer inside one block is not the last that a statistic must see."""
    model, given = build("llama"), batches("llama", padding=False)
    model.model.layers[1].mlp.up_proj = model.model.layers[1].mlp.gate_proj
    view = anatomy(model)
    walk = Walk(view, given, quiet)
    with evaluating(model):
        walk.start(("original",))
        for index in range(2):
            site = Site("layer.output", path=f"model.layers.{index}.mlp.gate_proj")
            seen = walk.observe(index, "original", {site: Moments()})[site]
            assert seen.count == sum(batch["input_ids"].numel() for batch in given) * (index + 1)
            walk.move("original", walk.following(index, "original"))


def test_a_call_whose_rows_cannot_be_told_apart_stays_whole(monkeypatch):
    model, given = build("llama"), batches("llama")
    walk = Walk(anatomy(model), given, quiet)
    with evaluating(model):
        walk.start(("original",))
        (call,) = walk.calls(0, "original")[:1]
        # as if a table [batch, ...] of another meaning were cut too
        monkeypatch.setattr(Call, "rows", lambda self, start, stop: self.with_hidden(self.hidden[start:stop] * 2))
        ((_, found),) = walk.some_calls(0, "original", 1)
        assert found is call
