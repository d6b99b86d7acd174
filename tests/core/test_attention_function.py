"""Attention functions of ours: registered by an edit, told all by their mask, refused by whoever does not know them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

import actkit
from actkit.core.edit.edits import ATTENTION, Configure, apply_edit, describe, replay
from actkit.core.forward.batch import forward
from actkit.core.ground import registry
from actkit.core.ground.errors import CheckpointError, EditError, ExportError
from actkit.core.layers.attention_function import AttentionFunction, function_of, visible_mask
from actkit.core.measure.decoding import choose_engine
from actkit.core.model.anatomy import anatomy
from actkit.core.model.sites import Site
from actkit.core.recipe.runner import apply_edits
from actkit.core.store.checkpoint import check_savable, save
from actkit.formats.export import export
from actkit.runtime.decoder import Decoder
from actkit.testing import tiny_batches, tiny_model

SEEN: list[Tensor] = []


@dataclass(frozen=True)
class Uniform(AttentionFunction):
    """Every query takes the mean of what it sees."""

    factor: float = 1.0

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        SEEN.append(visible)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        weights = visible.expand(len(query), query.shape[1], query.shape[2], -1).to(query.dtype)
        weights = self.factor * weights / weights.sum(-1, keepdim=True).clamp(min=1)
        return weights @ value, weights

    def forms_weights(self, model: nn.Module) -> bool:
        return True


@pytest.fixture
def uniform(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """As if a package had registered it."""
    real, own = registry._entries, EntryPoint("uniform", f"{__name__}:Uniform", registry.ATTENTIONS)
    known = {**real(registry.ATTENTIONS), "uniform": (own,)}
    monkeypatch.setattr(registry, "_entries", lambda group: known if group == registry.ATTENTIONS else real(group))
    load = registry._load
    monkeypatch.setattr(registry, "_load", lambda group, name: Uniform if name == "uniform" else load(group, name))
    SEEN.clear()
    yield {"name": "uniform", "factor": 0.5}
    for interface in (AttentionInterface, AttentionMaskInterface):
        for name in [name for name in interface._global_mapping if name.startswith("uniform")]:
            interface._global_mapping.pop(name)


def test_an_edit_registers_it_and_a_record_brings_it_back(uniform: dict[str, Any]) -> None:
    model, batch = tiny_model("llama"), tiny_batches("llama")[0]
    expected = forward(model, batch).logits
    edit = Configure(ATTENTION, uniform)
    undo = apply_edit(model, edit)
    changed = forward(model, batch).logits
    assert function_of(model) == Uniform(0.5) and not torch.allclose(changed, expected)
    described = describe(edit)
    assert described == {"configure": ATTENTION, "value": {"name": "uniform", "factor": 0.5}}
    assert undo is not None
    undo()
    assert torch.equal(forward(model, batch).logits, expected)
    replay(model, [described])
    assert torch.equal(forward(model, batch).logits, changed)
    assert describe(Configure(ATTENTION, "uniform"))["value"] == {"name": "uniform", "factor": 1.0}
    assert describe(Configure(ATTENTION, "actkit_rounded_cache"))["value"] == "actkit_rounded_cache"
    assert describe(Configure(ATTENTION, "eager"))["value"] == "eager"


@torch.no_grad()
def test_the_mask_is_always_there_and_bool(uniform: dict[str, Any]) -> None:
    """transformers gives its own functions None for full rows."""
    model, ids = tiny_model("llama"), torch.randint(40, (2, 6))
    apply_edit(model, Configure(ATTENTION, uniform))
    model(ids)
    assert all(mask.dtype == torch.bool for mask in SEEN)
    assert torch.equal(SEEN[0][0, 0], torch.ones(6, 6).tril().bool())
    cache = model(ids[:, :4], use_cache=True).past_key_values
    SEEN.clear()
    model(ids[:, 4:], past_key_values=cache, attention_mask=torch.tensor([[0] + [1] * 5, [1] * 6]))
    assert SEEN[0][:, 0].int().tolist() == [[[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]], [[1] * 5 + [0], [1] * 6]]
    bert = tiny_model("bert")
    apply_edit(bert, Configure(ATTENTION, uniform))
    SEEN.clear()
    bert(ids)
    assert SEEN[0].all() and SEEN[0].dtype == torch.bool
    assert visible_mask(1, 3, 3).shape == (1, 1, 3, 3)


def test_it_opens_the_attention_weights(uniform: dict[str, Any]) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="set_attn_implementation"):
        anatomy(model).tap(Site("attention.weights", 0))
    apply_edit(model, Configure(ATTENTION, uniform))
    anatomy(model).tap(Site("attention.weights", 0))


def test_nobody_takes_it_for_softmax(uniform: dict[str, Any], tmp_path: Path) -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    apply_edits(model, [Configure(ATTENTION, uniform)], lambda: "llama")
    assert "computed by 'uniform" in str(Decoder.supports(model))
    assert choose_engine(model, capacity=8).decoder is None
    with pytest.raises(ExportError, match="computed by 'uniform"):
        export(model, tmp_path / "out", "gguf", proof=False)
    check_savable(model)  # it was recorded
    save(model, tmp_path / "kept")
    assert function_of(actkit.load(tmp_path / "kept")) == Uniform(0.5)
    other.set_attn_implementation(model.config._attn_implementation)
    with pytest.raises(CheckpointError, match=r"attention is computed by .*'uniform'.* the function of the model"):
        save(other, tmp_path / "other")
    model.set_attn_implementation("sdpa")  # by hand, which no record knows
    with pytest.raises(CheckpointError, match=r"attention is computed by 'sdpa', loading .* by .*'uniform'"):
        save(model, tmp_path / "other")
    with pytest.raises(EditError, match="which 'lssa' would silence"):
        apply_edits(actkit.load(tmp_path / "kept"), [Configure(ATTENTION, "lssa")], lambda: "llama")


def test_what_is_registered_by_hand_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "by_hand", lambda *_, **__: None)
    with pytest.raises(EditError, match="a fresh process would not know"):
        apply_edits(tiny_model("llama"), [Configure(ATTENTION, "by_hand")], lambda: "llama")
