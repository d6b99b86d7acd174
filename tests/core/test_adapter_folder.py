"""An adapter's folder: over the model that it was trained on it is what was trained, over any other it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batches, build, run

import actkit
from actkit.compression.cfsp import Cfsp
from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.fingerprint import model_fingerprint
from actkit.core.store.adapter_folder import BASE, is_adapter
from actkit.core.store.deltas import Delta, LowRank
from actkit.finetuning.adapters import Lora
from actkit.finetuning.low_rank_training import train_adapter

peft = pytest.importorskip("peft")


def trained(folder: Path, kind: str = "llama", recipe: Any = None, dtype: Any = torch.float32) -> tuple[Any, Any]:
    """A base saved in `base`, and an adapter that was trained on it, in `adapter`."""
    model = build(kind).to(dtype)
    if recipe is not None:
        actkit.apply(model, recipe, batches(kind), progress=False)
    base = actkit.load(actkit.save(model, folder / "base"))
    layers = Lora(rank=2).layers(base, batches(kind))
    settings: dict[str, Any] = {"merge": False, "out": folder / "adapter", "steps": 5, "learning_rate": 0.02}
    return base, train_adapter(
        base, batches(kind), validation=batches(kind, padding=False), layers=layers, progress=False, **settings
    )


@pytest.mark.parametrize(
    ("kind", "recipe"), [("llama", None), ("gpt2", None), ("llama", Cfsp(sparsity=0.4, multiple_of=None))]
)
def test_it_opens_over_its_base_as_what_was_trained_and_plain_peft_opens_it(
    tmp_path: Path, kind: str, recipe: Any
) -> None:
    base, result = trained(tmp_path, kind, recipe)
    batch = batches(kind)[0]
    assert is_adapter(tmp_path / "adapter") and result.folder == tmp_path / "adapter"
    untouched = actkit.load(tmp_path / "base")
    assert torch.equal(run(base, batch), run(untouched, batch))  # the model itself is as it was
    loaded = actkit.load(tmp_path / "adapter")
    assert type(loaded) is type(untouched) and not any("lora" in name for name, _ in loaded.named_modules())
    by_peft = peft.PeftModel.from_pretrained(untouched, tmp_path / "adapter").eval()
    assert not torch.allclose(run(loaded, batch), run(base, batch), atol=1e-3)
    assert torch.allclose(run(loaded, batch), run(by_peft, batch), atol=1e-4)
    again = actkit.load(actkit.save(loaded, tmp_path / "again"))
    assert torch.equal(run(again, batch), run(loaded, batch))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    actkit.apply(loaded, "rtn", None, progress=False)  # an ordinary model, which recipes take


def test_what_it_adds_is_a_delta_of_its_rank(tmp_path: Path) -> None:
    base, _ = trained(tmp_path)
    delta = Delta.of_adapter(base, tmp_path / "adapter").low_rank(2)
    assert delta.parts and all(isinstance(part, LowRank) for part in delta.parts.values())
    expected, found = actkit.load(tmp_path / "adapter"), actkit.load(tmp_path / "base")
    delta.add_to(found)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_the_validated_loss_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    _, result = trained(tmp_path)
    held_out = batches("llama", padding=False)
    from actkit.core.train.training import train

    again = train(actkit.load(tmp_path / "adapter"), batches("llama"), validation=held_out, steps=1, progress=False)
    assert again.history[0].validation == pytest.approx(result.validation, rel=1e-5)
    assert json.loads((tmp_path / "adapter" / "training.json").read_text())["steps"] == 5


def test_another_base_is_refused_and_the_same_one_elsewhere_is_not(tmp_path: Path) -> None:
    trained(tmp_path)
    expected = run(actkit.load(tmp_path / "adapter"), batches("llama")[0])
    moved = shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"the model that its adapter was trained on, .*base', does not load"):
        actkit.load(tmp_path / "adapter")
    found = actkit.load(tmp_path / "adapter", base=lambda: actkit.load(moved))
    assert torch.equal(run(found, batches("llama")[0]), expected)

    def other() -> Any:
        model = actkit.load(moved)
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-3
        return model

    with pytest.raises(CheckpointError, match=r"trained on another model than .*base is now: their tensors differ"):
        actkit.load(tmp_path / "adapter", base=other)


def test_a_model_of_16_bits_is_known_again_in_float32(tmp_path: Path) -> None:
    trained(tmp_path, dtype=torch.bfloat16)
    short, wide = (actkit.load(tmp_path / "base", dtype=dtype) for dtype in (None, "float32"))
    assert model_fingerprint(short, widened=True) == model_fingerprint(wide, widened=True)
    assert model_fingerprint(short) != model_fingerprint(wide)
    assert actkit.load(tmp_path / "adapter").dtype == torch.bfloat16  # as it was trained
    assert actkit.load(tmp_path / "adapter", dtype="float32").dtype == torch.float32


def test_what_is_no_adapter_of_a_known_base_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "adapter" / BASE).unlink()
    with pytest.raises(CheckpointError, match="it holds an adapter"):
        actkit.load(tmp_path / "adapter")


def test_of_a_model_in_memory_nobody_knows_the_name(tmp_path: Path) -> None:
    model = build("llama")
    layers = Lora(rank=2).layers(model, batches("llama"))
    settings: dict[str, Any] = {"merge": False, "out": tmp_path / "adapter", "steps": 1}
    train_adapter(
        model, batches("llama"), validation=batches("llama", padding=False), layers=layers, progress=False, **settings
    )
    with pytest.raises(CheckpointError, match="it holds an adapter of a model that had no name; give base="):
        actkit.load(tmp_path / "adapter")
    assert actkit.load(tmp_path / "adapter", base=lambda: build("llama")).training is False
