"""Wrapped blocks, attention and MLPs: found inside their wrappers, with the values of the model without them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import batches, build, run, snapshot
from torch import Tensor, nn

import actkit
from actkit.core.edit.edits import Edit, Replace, apply_edit
from actkit.core.ground import registry
from actkit.core.ground.errors import CoverageError
from actkit.core.measure.decoding import choose_engine
from actkit.core.model.anatomy import Block, anatomy, equalization_sets
from actkit.core.recipe.runner import apply
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.capture import live, opened_experts
from actkit.core.watch.intervene import intervene
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.teal import Teal

KINDS = ("llama", "gpt2", "bert", "vit", "mixtral")
PLACES = {  # of a block: its attention, its MLP
    "llama": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "bert": ("attention.self", "output"),
    "vit": ("attention", "mlp"),
    "mixtral": ("self_attn", "mlp"),
}


class Around(nn.Module):
    """Adds `shift` to the first output of what it wraps; with 0 it changes nothing."""

    wraps: ClassVar[str] = "inner"

    def __init__(self, inner: nn.Module, shift: float = 0.0) -> None:
        super().__init__()
        self.inner, self.shift = inner, shift

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        if not self.shift:
            return output
        return output + self.shift if isinstance(output, Tensor) else (output[0] + self.shift, *output[1:])

    def spec(self) -> dict[str, Any]:
        return {"shift": self.shift}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> Around:
        return cls(original, spec["shift"])


class Wrap(Transform):
    """Wraps what is named of each block; '' is the block itself."""

    tags: ClassVar[Tags] = Tags(changes_function="exact")
    parts: tuple[str, ...]

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit]:
        for part in self.parts:
            path = f"{block.path}.{part}".removesuffix(".")
            yield Replace(path, Around(block.root.get_submodule(path)))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both classes are known by name, as those of an installed package are."""
    real = registry._entries
    own = {
        registry.METHODS: {"wrap": (EntryPoint("wrap", f"{__name__}:Wrap", registry.METHODS),)},
        registry.MODULES: {"around": (EntryPoint("around", f"{__name__}:Around", registry.MODULES),)},
    }
    monkeypatch.setattr(registry, "_entries", lambda group: real(group) | own.get(group, {}))


def block_paths(model: nn.Module) -> list[str]:
    return [block.path for block in anatomy(model).blocks]


def wrap(model: nn.Module, *paths: str, shift: float = 0.0) -> nn.Module:
    for path in paths:  # innermost first, so that the paths stay what they are
        apply_edit(model, Replace(path, Around(model.get_submodule(path), shift)))
    return model


def all_wrapped(kind: str) -> Any:
    model = build(kind)
    for path in block_paths(model):
        wrap(model, *(f"{path}.{part}" for part in PLACES[kind]), path, path)  # the block twice
    return model


def read(model: nn.Module, batch: Any) -> dict[str, list[Tensor]]:
    view = anatomy(model, batch)
    with opened_experts(view):
        sites = [site for site in view.sites() if not site.is_at_module and site.name != "attention.weights"]
        with live(model, sites, view) as found, torch.no_grad():
            model(**batch)
        return {str(site): list(tensors) for site, tensors in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_sites_and_roles_are_those_of_the_model_without_wrappers(kind: str) -> None:
    plain, wrapped, batch = build(kind), all_wrapped(kind), batches(kind)[0]
    assert torch.equal(run(wrapped, batch), run(plain, batch))
    expected, found = read(plain, batch), read(wrapped, batch)
    assert list(found) == list(expected) and len(found) >= 20
    for site, tensors in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(found[site], tensors, strict=True)), site
    mine, theirs = anatomy(wrapped), anatomy(plain)
    for block, other in zip(mine.blocks, theirs.blocks, strict=True):
        assert [linear.role for linear in block.linears()] == [linear.role for linear in other.linears()]
        assert all(".inner." in linear.path for linear in block.linears()) and block.path == other.path
    assert mine.coverage().share == theirs.coverage().share
    assert [row.reason for row in mine.coverage().rows] == [row.reason for row in theirs.coverage().rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["block", "attention", "mlp"])
def test_methods_on_top_give_what_they_give_without_wrappers(kind: str, part: str, tmp_path: Path) -> None:
    names = {"block": "", "attention": PLACES[kind][0], "mlp": PLACES[kind][1]}
    methods = [RoundToNearest(bits=4, group_size=-1), Teal(sparsity=0.4)]
    plain, data = build(kind), batches(kind)
    apply(plain, methods, data, progress=False)
    model = build(kind)
    before = snapshot(model)
    done = apply(model, [Wrap(parts=(names[part],)), *methods], data, progress=False)
    expected = [run(plain, batch) for batch in data]
    for batch, wanted in zip(data, expected, strict=True):
        assert torch.equal(run(model, batch), wanted)
    actkit.save(model, tmp_path / "model")
    loaded = actkit.load(tmp_path / "model")
    for batch, wanted in zip(data, expected, strict=True):
        assert torch.equal(run(loaded, batch), wanted)
    assert any(isinstance(module, Around) for module in loaded.modules())
    done.undo()
    assert snapshot(model) == before


def test_a_wrapped_model_that_was_loaded_is_undone_from_its_folder(tmp_path: Path) -> None:
    actkit.save(build("llama"), tmp_path / "plain")
    model = actkit.load(tmp_path / "plain")
    before = snapshot(model)
    done = apply(
        model,
        [Wrap(parts=("mlp", "")), RoundToNearest(bits=4, group_size=-1)],
        batches("llama"),
        undo="source",
        progress=False,
    )
    assert any(isinstance(module, Around) for module in model.modules())
    done.undo()
    assert snapshot(model) == before


def test_what_a_part_gives_is_read_outside_of_its_wrapper() -> None:
    model, batch = build("llama"), batches("llama")[0]
    path = "model.layers.1.mlp"
    wrap(model, path, shift=2.0)
    with live(model, ["blocks.1.mlp.output", "blocks.1.block.output"]) as found, torch.no_grad():
        model(**batch)
        (given,) = found["blocks.1.mlp.output"]
        (inner,) = (
            model.get_submodule(f"{path}.inner")(model.get_submodule("model.layers.1.post_attention_layernorm")(x))
            for x in _residual(model, batch)
        )
    assert torch.equal(given, inner + 2.0)
    expected = run(model, batch)
    with intervene(model, {"blocks.1.mlp.output": lambda x, at: x - 2.0}):
        back = run(model, batch)
    torch.testing.assert_close(back, run(build("llama"), batch))
    assert not torch.equal(back, expected)


def _residual(model: Any, batch: Any) -> list[Tensor]:
    """What the second norm of block 1 reads, by a hook."""
    seen: list[Tensor] = []
    norm = model.model.layers[1].post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(**batch)
    handle.remove()
    return seen


def test_no_scale_moves_through_a_wrapper_of_attention_or_mlp() -> None:
    """A wrapper may add something between the norm and the layers that read it."""
    model = wrap(build("llama"), "model.layers.0.mlp", "model.layers.0.self_attn", "model.layers.1")
    refused = [[found.refused for found in equalization_sets(block)] for block in anatomy(model).blocks]
    assert refused[1] == refused[2]  # a wrapper of the whole block stands around the norm too
    assert "is wrapped" in refused[0][0] and "is wrapped" in refused[0][2]
    done = apply(model, [Awq(bits=4, group_size=-1)], batches("llama"), progress=False)
    assert any("is wrapped" in reason for reason in done.report.notes)


def test_a_wrapped_model_is_left_to_transformers() -> None:
    model = all_wrapped("llama")
    engine = choose_engine(model, capacity=8)
    assert engine.decoder is None and "Around" in engine.reason


def test_a_wrapper_that_does_not_say_so_or_says_it_wrongly_is_an_error() -> None:
    class Silent(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    model = build("llama")
    model.model.layers[1].mlp = Silent(model.model.layers[1].mlp)
    with pytest.raises(CoverageError, match=r"expects a module at 'model\.layers\.1\.mlp\..*wraps = "):
        anatomy(model)
    model = build("llama")
    model.model.layers[1].mlp = type("Wrong", (Silent,), {"wraps": "other"})(model.model.layers[1].mlp)
    with pytest.raises(
        CoverageError, match=r"model\.layers\.1\.mlp: a Wrong says wraps = 'other', and holds no such module"
    ):
        anatomy(model)
