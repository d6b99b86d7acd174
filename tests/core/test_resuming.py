"""Passes that begin behind what they have in common see, to the bit, what whole passes see."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from actkit.core.forward.hooks import evaluating
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.recipe.blockwise import Walk
from actkit.core.recipe.runner import apply
from actkit.core.watch.statistics import Moments
from actkit.quantization.gptq import Gptq
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.models import ARCHITECTURES
from actkit.testing.transforms import equal, outputs

LENGTHS = ((9, 4, 6), (7, 9, 2))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gptq_gives_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = tiny_batches(kind, lengths=LENGTHS)
    found = []
    for resuming in (True, False):
        monkeypatch.setattr(Gptq, "tags", replace(Gptq.tags, observes_in_turn=resuming))
        model = tiny_model(kind)
        report = apply(model, Gptq(bits=4, group_size=8), batches, progress=False).report
        found.append((outputs(model, batches), report.values))
        assert not any("Resumed" in type(module).__name__ for module in model.modules())
    equal(found[0][0], found[1][0], kind)
    assert found[0][1] == found[1][1]


def walk_of(model: Any, batches: list[Any]) -> Walk:
    walk = Walk(anatomy(model, batches[0]), batches, lambda items, text: items)
    walk.start(["edited"])
    return walk


def runs_of(model: Any, path: str) -> list[int]:
    runs: list[int] = []
    model.get_submodule(path).register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "vit"])
def test_any_order_of_edits(kind: str) -> None:
    """After each edit, in whatever order, a site is seen as in a whole pass."""
    model, batches = tiny_model(kind), tiny_batches(kind, lengths=LENGTHS)
    with evaluating(model):
        walk, plain = walk_of(model, batches), walk_of(model, batches)
        block = walk.anatomy.blocks[0]
        assert block.attention is not None and block.mlp is not None
        sites = [Site(name, 0) for name in ("attention.input", "attention.mixed", "mlp.input", "mlp.hidden")]
        layers = [*block.attention.inputs, block.attention.output, *block.mlp.inputs, block.mlp.down]
        paths = [*(layer.path for layer in layers), *(norm.path for norm in block.norms)]
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            path = paths[int(torch.randint(len(paths), (1,), generator=generator))]
            with torch.no_grad():
                next(model.get_submodule(path).parameters()).mul_(1.01)
            site = sites[int(torch.randint(4, (1,), generator=generator))]
            one = walk.observe(0, "edited", {site: Moments()}, in_turn=True)[site]
            other = plain.observe(0, "edited", {site: Moments()})[site]
            assert torch.equal(one.mean, other.mean) and torch.equal(one.variance, other.variance)
            assert one.count == other.count
        for one, other in zip(walk.outputs(0, "edited"), plain.outputs(0, "edited"), strict=True):
            assert torch.equal(one, other)


def test_attention_runs_once_for_all_that_comes_after_it() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    walk = walk_of(model, batches)
    path = walk.anatomy.blocks[0].path
    query, down, up = (
        runs_of(model, f"{path}.{name}") for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj")
    )
    with evaluating(model):
        for name in ("attention.mixed", "mlp.input", "mlp.hidden"):
            walk.observe(0, "edited", {Site(name, 0): Moments()}, in_turn=True)
        walk.following(0, "edited")
    assert (len(query), len(up), len(down)) == (2, 2, 2)  # each batch once


def test_gptq_runs_each_layer_once_and_the_output_layer_of_attention_again() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    counted: Counter[str] = Counter()
    for path, module in model.named_modules():
        if path.endswith(("act_fn", "norm")):
            module.register_forward_hook(lambda *_, path=path: counted.update((path,)))
    apply(model, Gptq(bits=4, group_size=8), batches, progress=False)
    first, last = (f"model.layers.{index}.mlp.act_fn" for index in range(2))
    # of two batches: recorded once; block 0 is also replayed, and the last block's output is not needed
    assert counted[last] == 1 + 2
    assert counted[first] == 2 + 2


def test_hooks_on_a_part_see_every_pass() -> None:
    """Somebody else's hook may change what attention gives, so it is not passed by."""
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    attention = anatomy(model).blocks[0].attention
    assert attention is not None
    model.get_submodule(attention.path).register_forward_hook(lambda module, args, output: (output[0] * 2, *output[1:]))
    with evaluating(model):
        walk, plain = walk_of(model, batches), walk_of(model, batches)
        site = Site("mlp.input", 0)
        for _ in range(2):
            one = walk.observe(0, "edited", {site: Moments()}, in_turn=True)[site]
            assert torch.equal(one.mean, plain.observe(0, "edited", {site: Moments()})[site].mean)


def test_a_site_inside_of_attention_runs_it() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    walk = walk_of(model, batches)
    with evaluating(model):
        walk.observe(0, "edited", {Site("attention.mixed", 0): Moments()}, in_turn=True)
        seen = walk.observe(0, "edited", {Site("attention.query", 0): Moments()}, in_turn=True)
    assert all(each.count for each in seen.values())
