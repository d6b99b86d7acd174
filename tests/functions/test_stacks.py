"""Functions under other methods: changed, trained, changed again, saved, and read in a fresh process to equal bits.

What comes last keeps all that a transform promises also there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

import actkit
from actkit import zoo
from actkit.core.forward.batch import first_tensor
from actkit.core.ground.errors import ExportError
from actkit.core.measure.fresh import FreshProcess
from actkit.core.model.anatomy import anatomy
from actkit.core.model.equalization import equalization_sets
from actkit.core.recipe.runner import apply
from actkit.core.train.training import train
from actkit.functions.af_kan.replace import AfKan
from actkit.functions.kat.gr_kan import GrKan
from actkit.functions.pangu_pi.add_nonlinearity import AddNonlinearity
from actkit.functions.polycom.ungate import Ungate
from actkit.functions.softplus_attention.lssar import Lssar
from actkit.functions.swap import Swap
from actkit.functions.vanillanet.deepen import Collapse, Deepen
from actkit.functions.vanillanet.faded import FadeActivations
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.cats.cats import Cats
from actkit.sparsity.wina.wina import Wina
from actkit.testing import check_transform, tiny_batches, tiny_model

EIGHT = RoundToNearest(bits=8, group_size=8)
Stack = tuple[list[Any], list[Any]]  # before and after a training
STACKS: dict[str, Stack] = {
    "gr_kan, awq, wina": ([GrKan()], [Awq(bits=4, group_size=8, n_grid=3), Wina()]),
    "crrelu, cats": ([Swap(where=("silu",), new="crrelu")], [Cats(sparsity=0.3)]),
    "pangu, rtn": ([AddNonlinearity(ratio=4)], [EIGHT]),
    "poly_norm, rtn": ([Ungate(multiple_of=8)], [EIGHT]),
    "lssar, rtn": ([Lssar(power=3)], [EIGHT]),
}


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return first_tensor(model.eval()(**{name: each for name, each in batch.items() if name != "labels"}))


def trained(model: nn.Module, kind: str = "llama", **options: Any) -> nn.Module:
    batches = tiny_batches(kind)
    if kind == "vit":
        batches = [{**each, "labels": torch.zeros(len(each["pixel_values"]), dtype=torch.long)} for each in batches]
    train(model, batches, validation=batches[:1], steps=3, learning_rate=0.01, progress=False, **options)
    return model.eval()


@pytest.mark.slow(reason="a training, all promises of a transform, and a process that reads the folder")
@pytest.mark.parametrize("name", STACKS)
def test_trained_between_two_methods_and_loaded(name: str, tmp_path: Path, worker: FreshProcess) -> None:
    before, after = STACKS[name]
    model, batches = tiny_model("llama"), tiny_batches("llama")
    apply(model, before, batches, progress=False)
    learned = outputs(model, batches[0])
    trained(model)
    assert not torch.equal(outputs(model, batches[0]), learned)
    for earlier in after[:-1]:
        apply(model, earlier, batches, progress=False)
    check_transform(after[-1], model, batches)
    apply(model, after[-1], batches, progress=False)
    actkit.save(model, tmp_path / "stack")
    worker.load(tmp_path / "stack")
    assert torch.equal(worker.outputs(batches[0]), outputs(model, batches[0]))


def test_a_head_of_splines_in_eight_bits(tmp_path: Path, worker: FreshProcess) -> None:
    model, images = zoo.load("cnn"), torch.rand(8, 1, 8, 8)
    head = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)][-1]
    apply(model, [AfKan(where=(head,), kind="relu_kan"), RoundToNearest(bits=8)], [images], progress=False)
    actkit.save(model, tmp_path / "head")
    worker.load(tmp_path / "head")
    assert torch.equal(worker.outputs({"pixel_values": images}), outputs(model, {"pixel_values": images}))


PLAIN: dict[str, tuple[str | tuple[str, ...], Callable[..., Any]]] = {
    "llama": ("*.up_proj", AutoModelForCausalLM.from_pretrained),
    "vit": (("*projection", "*fc1"), AutoModelForImageClassification.from_pretrained),
}


@pytest.mark.slow(reason="a training, and a process without actkit that reads the export")
@pytest.mark.parametrize("kind", PLAIN)
def test_collapsed_it_is_a_plain_checkpoint(kind: str, tmp_path: Path) -> None:
    """Deepened, trained, collapsed: transformers alone reads a model of the class and the shapes of the first."""
    where, read = PLAIN[kind]
    model, batch = tiny_model(kind), tiny_batches(kind)[0]
    shapes = {name: each.shape for name, each in model.state_dict().items()}
    apply(model, Deepen(where=where), tiny_batches(kind), progress=False)
    trained(model, kind, rules=[FadeActivations(share=0.5)], keep="last")
    deep = outputs(model, batch)
    apply(model, Collapse(), tiny_batches(kind), progress=False)
    torch.testing.assert_close(outputs(model, batch), deep, rtol=1e-4, atol=1e-5)
    report = actkit.export(model, tmp_path / "plain", "dense")
    assert report.reading is not None and report.reading.passed
    again = read(tmp_path / "plain")
    assert {name: each.shape for name, each in again.state_dict().items()} == shapes
    assert torch.equal(outputs(again, batch), outputs(model, batch))
    assert not {"actkit.json"} & {each.name for each in (tmp_path / "plain").iterdir()}


def test_what_no_plain_checkpoint_holds_is_said(tmp_path: Path) -> None:
    deep = apply(tiny_model("llama"), Deepen(where="*.up_proj"), tiny_batches("llama"), progress=False).model
    with pytest.raises(ExportError, match=r"up_proj: a DeepPair stands here.*the plain LlamaForCausalLM has a Linear"):
        actkit.export(deep, tmp_path / "deep", "dense", proof=False)
    cnn, images = zoo.load("cnn"), [torch.rand(2, 1, 8, 8)]
    apply(cnn, [Deepen(), Collapse()], images, progress=False)
    with pytest.raises(ExportError, match="DigitsCNN is no transformers model"):
        actkit.export(cnn, tmp_path / "cnn", "dense", proof=False)


def test_decoded_with_a_cache_as_without(tmp_path: Path) -> None:
    """LSSAR under 8 bits, read from its folder: greedy tokens by the cache, and by whole prefixes."""
    model, batch = tiny_model("llama"), tiny_batches("llama")[0]
    apply(model, [Lssar(power=3), EIGHT], tiny_batches("llama"), progress=False)
    actkit.save(model, tmp_path / "out")
    loaded = actkit.load(tmp_path / "out").eval()
    prompt = batch["input_ids"][:1, :4]
    cached = loaded.generate(
        prompt, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None
    )
    row = prompt
    with torch.no_grad():
        for _ in range(8):
            row = torch.cat((row, loaded(row, use_cache=False).logits[:, -1:].argmax(-1)), -1)
    assert torch.equal(cached, row)


def test_no_scale_moves_through_the_rational_in_front_of_an_mlp() -> None:
    """Behind a function that bends, no layer could take back a scale of the norm; AWQ says that it leaves it."""
    model, batches = tiny_model("vit"), tiny_batches("vit")
    apply(model, GrKan(), batches, progress=False)
    sets = [found for block in anatomy(model).blocks for found in equalization_sets(block)]
    refused = [found.refused for found in sets if any(layer.path.endswith("fc1") for layer in found.consumers)]
    assert len(refused) == 2 and all("is wrapped" in (reason or "") for reason in refused)
    done = apply(model, [Awq(bits=4, group_size=8, n_grid=3)], batches, progress=False)
    assert any("is wrapped" in note for note in done.report.notes)
