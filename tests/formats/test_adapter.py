"""Low-rank corrections for others: as a peft adapter beside compressed-tensors, or merged into a dense folder."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actkit.core.edit import changes
from actkit.core.edit.edits import Replace, apply_edit
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import ExportError
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.weights import IntegerWeight
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load
from actkit.formats import compressed_tensors, dense, peft_adapter
from actkit.formats.export import export, read
from actkit.formats.reading import expected_outputs, read_back
from actkit.testing.models import HIDDEN, tiny_model

RTN = {"bits": 3, "group_size": 8, "symmetric": True}
BATCH = {"input_ids": torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(3))}
QUERY = "model.layers.0.self_attn.q_proj"


def corrected(rtn: dict[str, Any] = RTN, *, dtype: torch.dtype = torch.float32, **lorc: Any) -> Any:
    model = tiny_model("llama", num_key_value_heads=4).to(dtype)  # one word would not hold fewer zero points
    recipe = {"actkit": 1, "transforms": [{"rtn": rtn}, {"lorc": {"rank": 3, **lorc}}]}
    return apply(model, recipe, None, min_coverage=0.0, progress=False).model


def in_floats(format: str, dtype: torch.dtype) -> Any:
    recipe = {"actkit": 1, "transforms": [{"round_floats": {"format": format}}, {"lorc": {"rank": 3}}]}
    model = tiny_model("llama", hidden_size=32, intermediate_size=64).to(dtype)
    return apply(model, recipe, None, min_coverage=0.0, progress=False).model


def of_two_kinds() -> Any:
    model = corrected()
    layer = model.get_submodule(QUERY)
    weight = IntegerWeight.quantize(layer.dequantized(), IntegerGrid(8, 8, symmetric=True))
    apply_edit(model, Replace(QUERY, ActLinear.of(layer, weight=weight)))
    return model


def of_two_ranks() -> Any:
    """One layer with a correction of another rank, one without any."""
    model = corrected()
    layer = model.get_submodule(QUERY)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(HIDDEN, 5, generator=generator), torch.randn(5, HIDDEN, generator=generator)
    apply_edit(model, Replace(QUERY, ActLinear.of(layer, correction=LowRank(left / 4, right / 4))))
    other = model.get_submodule("model.layers.1.mlp.up_proj")
    apply_edit(model, Replace("model.layers.1.mlp.up_proj", ActLinear(other.storage, other.bias)))
    return model


CASES = {
    "floats": corrected,
    "factors in 8 bits": lambda: corrected(bits=8),
    "zero points": lambda: corrected({**RTN, "symmetric": False}),
    "two ranks": of_two_ranks,
    "bfloat16": lambda: corrected(dtype=torch.bfloat16),
    "fp8": lambda: in_floats("fp8", torch.float32),
    "mxfp4": lambda: in_floats("mxfp4", torch.bfloat16),
}
FORMATS = {"adapter": {"adapter": True}, "dense": {"format": "dense"}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Per case and way: the report, the model, and what memory computes as the reader does."""
    pytest.importorskip("compressed_tensors", reason="the extra 'export' is not installed")
    out = tmp_path_factory.mktemp("exported")
    found = {}
    for name, make in CASES.items():
        model = make()
        for way, settings in FORMATS.items():
            report = export(model, out / f"{name}-{way}".replace(" ", "-"), proof=False, **settings)
            plain = read(model, report.format, adapter=way == "adapter")
            if way == "adapter":
                layers = peft_adapter.as_read(plain, compressed_tensors.as_read(plain, report.quantized))
            else:
                layers = dense.as_read(plain)
            found[name, way] = (report, model, expected_outputs(model, BATCH, layers))
    return found


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra 'finetune' is not installed")
def test_transformers_and_peft_compute_the_same(exported):
    jobs = [(report.folder, model.dtype, BATCH, None) for report, model, _ in exported.values()]
    for (case, (_, _, expected)), outputs in zip(exported.items(), read_back(jobs), strict=True):
        close = {"bfloat16": 0.0, "mxfp4": 0.03}.get(case[0], 1e-5)  # mxfp4: summed in another order, in bfloat16
        assert float((outputs - expected).abs().max()) <= close * float(expected.abs().max()), case


@pytest.mark.parametrize("name", [name for name in CASES if name != "mxfp4"])  # which our reader refuses
@pytest.mark.filterwarnings("ignore:.*a peft adapter in adapter/ corrects")
def test_the_files_alone_say_the_function(exported, name):
    """W + B A by hand, from the base that our reader gives and the adapter's tensors, in a plain model."""
    report, model, _ = exported[name, "adapter"]
    tensors = load_file(report.folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((report.folder / "adapter" / "adapter_config.json").read_text())
    base = load(report.folder).float()
    for path in config["target_modules"]:
        low, high = (tensors.pop(f"base_model.model.{path}.lora_{each}.weight").float() for each in "AB")
        rank = config["rank_pattern"].get(path, config["r"])
        assert low.shape[0] == high.shape[1] == rank == config["alpha_pattern"].get(path, config["lora_alpha"])
        base.get_submodule(path).weight.data += high @ low
    assert not tensors
    expected = expected_outputs(model, BATCH)
    close = 0.03 if name == "bfloat16" else 1e-5
    assert float((expected_outputs(base, BATCH) - expected).abs().max()) <= close * float(expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_a_dense_folder_holds_the_merged_weights(exported, name):
    report, model, _ = exported[name, "dense"]
    tensors = load_file(report.folder / "model.safetensors")
    for path, module in model.named_modules():
        if isinstance(module, ActLinear):
            exact = module.dequantized().detach().double()
            if module.correction is not None:
                left, right = (factor.detach().double() for factor in module.correction.factors())
                exact = exact + left @ right
            found = tensors[f"{path}.weight"]
            assert found.dtype == model.dtype
            close = torch.finfo(model.dtype).eps * float(exact.abs().max())
            assert float((found.double() - exact).abs().max()) <= close
    assert "quantization_config" not in json.loads((report.folder / "config.json").read_text())
    assert not report.quantized and any("correction merged" in why for why in report.dense.values())


def test_the_proofs_pass_and_the_report_says_where_the_adapter_is(tmp_path):
    pytest.importorskip("peft", reason="the extra 'finetune' is not installed")
    model = corrected()
    report = export(model, tmp_path / "out", adapter=True)
    assert report.reading.passed
    assert "corrections of 14 layers (rank 3, " in report.notes[-1] and "peft adapter in adapter/" in report.notes[-1]
    card = (report.folder / "README.md").read_text()
    assert 'PeftModel.from_pretrained(model, "path/to/this/folder/adapter")' in card
    export(model, tmp_path / "out", adapter=True, overwrite=True, proof=False)
    with pytest.warns(UserWarning, match="a peft adapter in adapter/ corrects its layers; this model is without it"):
        loaded = load(report.folder)
    assert "without it" in changes.source_grid(loaded).notes[-1]


def test_a_model_without_corrections_becomes_dense_too(tmp_path):
    recipe = {"actkit": 1, "transforms": [{"rtn": RTN}]}
    model = apply(tiny_model("gpt2"), recipe, None, min_coverage=0.0, progress=False).model
    report = export(model, tmp_path / "out", "dense")
    assert report.reading.passed and report.reading.moved == 0
    assert report.dense["transformer.h.0.mlp.c_fc"].startswith("3-bit")


# -- what is refused ---------------------------------------------------------------------------------------------------


def rounded_inputs() -> Any:
    rows = {"bits": 8, "group_size": -1, "symmetric": True}
    steps = [{"rtn": rows}, {"lorc": {"rank": 2}}, {"round_inputs": {}}]
    return apply(tiny_model("llama"), {"actkit": 1, "transforms": steps}, None, min_coverage=0.0, progress=False).model


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (corrected, {}, r"it has a low-rank correction \(recipe: rtn, lorc\).*adapter=True.*or as dense"),
        (corrected, {"format": "gguf"}, r"it has a low-rank correction.*adapter=True.*or as dense"),
        (of_two_kinds, {"adapter": True}, "has 2 kinds of weights, .* unpack them for an adapter"),
        (rounded_inputs, {"adapter": True}, "reads rounded inputs, and peft's adapter would read them before"),
        (rounded_inputs, {"format": "dense"}, "it rounds its inputs, which a dense folder does not say"),
        (lambda: tiny_model("llama"), {"adapter": True}, "no layer of the model has a low-rank correction"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(make, settings, words, tmp_path):
    with pytest.raises(ExportError, match=words):
        export(make(), tmp_path / "out", proof=False, **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["gguf", "dense"])
def test_other_formats_have_no_adapter(format, tmp_path):
    with pytest.raises(ValueError, match=f"adapter: True was given with the format '{format}'"):
        export(corrected(), tmp_path / "out", format, adapter=True, proof=False)
