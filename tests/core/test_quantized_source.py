"""Quantized folders of others: the numbers that their own package reads, the grid that they lay on, or a refusal."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, run
from torch import Tensor
from transformers import FineGrainedFP8Config, GptOssForCausalLM, LlamaForCausalLM, MixtralForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import actkit
from actkit.core.edit import changes
from actkit.core.ground.errors import CheckpointError
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.core.store.quantized_source import _weight, mxfp4, unpack
from actkit.formats.export import export
from actkit.testing import tiny_model

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
RTN = {"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8}}]}
IDS = torch.arange(1, 13).view(2, 6)


def quantized_folder(folder: Path, kind: str, quantization: dict[str, Any], store: Any) -> Path:
    """A saved model whose linear layers are stored as `store(weight)` gives them: name -> tensor."""
    save(build(kind, num_key_value_heads=4).to(torch.bfloat16), folder)  # one word would not hold the zero points
    (path,) = folder.glob("*.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in LINEAR:
            tensors |= {f"{layer}.{leaf}": part.contiguous().clone() for leaf, part in store(tensor.float()).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": quantization}))
    (folder / "actkit.sha256").unlink()
    return folder


def compressed(scheme: dict[str, Any], format: str, inputs: Any = None) -> tuple[dict[str, Any], Any]:
    """The config of a compressed-tensors folder, and how its package stores a weight [out, in]."""
    package = pytest.importorskip("compressed_tensors", reason="the extra 'export' is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    group = {"targets": ["Linear"], "weights": scheme, "input_activations": inputs, "format": format}
    parsed = QuantizationScheme.model_validate(group)
    size = scheme.get("group_size")

    def store(weight: Tensor) -> dict[str, Tensor]:
        parts = weight.unflatten(1, (-1, size or weight.shape[1]))
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        if scheme["type"] == "float":
            found = {"weight_scale": parts.abs().amax(-1) / 448}
        elif scheme["symmetric"]:
            found = {"weight_scale": parts.abs().amax(-1) / (2 ** (scheme["num_bits"] - 1) - 1)}
        else:
            scale = (high - low) / (2 ** scheme["num_bits"] - 1)
            zero = (-low / scale).round() - 2 ** (scheme["num_bits"] - 1)
            found = {"weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        return BaseCompressor.get_value_from_registry(format).compress({"weight": weight, **found}, parsed)

    config = {
        "quant_method": "compressed-tensors",
        "version": package.__version__,
        "format": format,
        "config_groups": {"group_0": group},
    }
    return config, store


GROUPS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("scheme", "format", "how"),
    [
        (GROUPS, "pack-quantized", "4 bits, groups of 8 inputs, symmetric"),
        ({**GROUPS, "symmetric": False}, "pack-quantized", "4 bits, groups of 8 inputs, with zero points"),
        ({**ROWS, "symmetric": False}, "pack-quantized", "8 bits, one scale per row, with zero points"),
        ({**GROUPS, "num_bits": 2}, "pack-quantized", "2 bits, groups of 8 inputs, symmetric"),
        (
            {**GROUPS, "num_bits": 3, "symmetric": False},
            "pack-quantized",
            "3 bits, groups of 8 inputs, with zero points",
        ),
        ({**GROUPS, "num_bits": 5}, "pack-quantized", "5 bits, groups of 8 inputs, symmetric"),
        (ROWS, "int-quantized", "8 bits, one scale per row, symmetric"),
        (FLOAT, "float-quantized", "float8_e4m3fn, one scale per row, symmetric"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_compressed_tensors_are_what_the_package_reads(scheme, format, how, kind, tmp_path):
    config, store = compressed(scheme, format)
    folder = quantized_folder(tmp_path / "model", kind, config, store)
    model = load(folder)
    grid = changes.source_grid(model)
    assert model.dtype == torch.bfloat16 and grid is not None and grid.format == "compressed-tensors"
    assert set(grid.layers.values()) == {how} and grid.notes == ()
    assert not hasattr(model.config, "quantization_config")

    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    scheme_ = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    dense = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in grid.layers}
    for layer in grid.layers:
        parts = {name.removeprefix(f"{layer}."): t for name, t in tensors.items() if name.startswith(f"{layer}.")}
        decompressed = BaseCompressor.get_value_from_registry(format).decompress(parts, scheme_)
        dense[f"{layer}.weight"] = decompressed["weight"].to(torch.bfloat16)
    save(build(kind, num_key_value_heads=4).to(torch.bfloat16), tmp_path / "dense")
    save_file(dense, next((tmp_path / "dense").glob("*.safetensors")), metadata={"format": "pt"})
    cls = LlamaForCausalLM if kind == "llama" else MixtralForCausalLM
    expected = cls.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).eval().state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_targets_by_name_win_over_the_class(tmp_path):
    """Two widths in one folder, which transformers reads as if all layers were of the first kind."""
    config, store = compressed(GROUPS, "pack-quantized")
    _, wide = compressed({**GROUPS, "num_bits": 8}, "pack-quantized")
    groups = config["config_groups"]
    groups["group_1"] = {**groups["group_0"], "targets": ["re:.*down_proj"], "weights": {**GROUPS, "num_bits": 8}}
    inner = build("llama").config.intermediate_size
    folder = quantized_folder(
        tmp_path / "model", "llama", config, lambda weight: (wide if weight.shape[1] == inner else store)(weight)
    )
    model, plain = load(folder, dtype="float32"), build("llama", num_key_value_heads=4).to(torch.bfloat16).float()
    grid = changes.source_grid(model)
    assert grid.layers["model.layers.1.mlp.down_proj"] == "8 bits, groups of 8 inputs, symmetric"
    assert grid.layers["model.layers.1.mlp.up_proj"] == "4 bits, groups of 8 inputs, symmetric"
    for name, steps in (("down_proj", 127), ("up_proj", 7)):
        weight = getattr(plain.model.layers[1].mlp, name).weight
        half = weight.unflatten(1, (-1, 8)).abs().amax(-1, keepdim=True) / steps / 2
        gap = (getattr(model.model.layers[1].mlp, name).weight - weight).unflatten(1, (-1, 8)).abs()
        assert (gap <= half * 1.01).all() and (gap > half / 4).any(), name


def test_rounded_activations_are_said(tmp_path):
    config, store = compressed(ROWS, "int-quantized", TOKENS)
    folder = quantized_folder(tmp_path / "model", "llama", config, store)
    said = "its own readers also round the inputs of quantized layers to 8 bits (int, per token); this model does not"
    with pytest.warns(UserWarning, match="also round the inputs of quantized layers to 8 bits"):
        model = actkit.load(folder)
    assert changes.source_grid(model).notes == (said,)
    apply(model, RTN, min_coverage=0.0, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = save(model, tmp_path / "saved")
        assert changes.source_grid(load(saved)).notes == (said,)
    assert "also round the inputs of quantized layers" in (saved / "README.md").read_text()


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2, "group_size": 8, "symmetric": True},
        {"bits": 2, "group_size": 8, "symmetric": False},
        {"bits": 3, "group_size": 8, "symmetric": True},
        {"bits": 3, "group_size": 8, "symmetric": False},
        {"bits": 4, "group_size": 8, "symmetric": False},
        {"bits": 6, "group_size": 8, "symmetric": True},
        {"bits": 8, "group_size": -1, "symmetric": True},
    ],
)
@pytest.mark.filterwarnings("ignore:.*also round the inputs")
def test_an_export_of_ours_is_read_as_the_model_was(settings, tmp_path):
    model = tiny_model("llama")
    apply(model, {"actkit": 1, "transforms": [{"rtn": settings}]}, min_coverage=0.0, progress=False)
    export(model, tmp_path / "out", proof=False)
    loaded = load(tmp_path / "out")
    assert torch.equal(run(loaded, {"input_ids": IDS}), run(model, {"input_ids": IDS}))
    again = apply(loaded, RTN, min_coverage=0.0, progress=False)
    assert run(again.model, {"input_ids": IDS}).isfinite().all()
    again.undo()  # from the folder, dequantized anew
    assert torch.equal(run(loaded, {"input_ids": IDS}), run(model, {"input_ids": IDS}))
    plain = load(save(loaded, tmp_path / "plain"))
    assert changes.source_grid(plain) == changes.source_grid(loaded) and plain.dtype == loaded.dtype
    assert "quantized source, compressed-tensors" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*also round the inputs")
@pytest.mark.parametrize("block", [(8, 16), (4, 8)])
def test_float8_blocks_are_what_transformers_reads(block, tmp_path):
    def store(weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape[0] // block[0], weight.shape[1] // block[1]
        parts = weight.view(rows, block[0], columns, block[1])
        scale = parts.abs().amax((1, 3)) / 448
        codes = (parts / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        return {"weight": codes.view(weight.shape), "weight_scale_inv": scale}

    config = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    folder = quantized_folder(tmp_path / "model", "llama", config, store)
    model = load(folder)
    expected = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    grid = changes.source_grid(model)
    assert set(grid.layers.values()) == {f"float8_e4m3fn, blocks of {block[0]} x {block[1]}, symmetric"}
    assert grid.notes[0].startswith("its own readers also round the inputs of quantized layers to float8")


def test_mxfp4_experts_are_what_transformers_reads(tmp_path):
    model: Any = tiny_model("gpt_oss", hidden_size=32, intermediate_size=32)
    save(model, tmp_path / "model")
    (path,) = (tmp_path / "model").glob("*.safetensors")
    tensors, plain = load_file(path), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 130, (experts, outputs, inputs // 32), dtype=torch.uint8)
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert torch.equal(mxfp4(blocks, scales), plain[name])
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, path, metadata={"format": "pt"})
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model" / "actkit.sha256").unlink()
    loaded = load(tmp_path / "model")
    assert isinstance(loaded, GptOssForCausalLM) and plain
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in plain.items())
    assert set(changes.source_grid(loaded).layers) == set(plain)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("across", [True, False])
def test_codes_lie_from_the_low_bits_up(bits, across):
    codes = torch.randint(2**bits, (3, 50))
    assert torch.equal(unpack(_words(codes, bits, across), bits, 50, across).long(), codes)


def _words(codes: Tensor, bits: int, across: bool) -> Tensor:
    """Packed code by code, in Python's integers: int32 [rows, words]."""
    each = 32 // bits
    count = -(-codes.shape[1] * bits // 32) if across else -(-codes.shape[1] // each)
    rows = []
    for row in codes.tolist():
        place = {i: i * bits if across else i // each * 32 + i % each * bits for i in range(len(row))}
        number = sum(code << place[i] for i, code in enumerate(row))
        rows.append(list(number.to_bytes(4 * count, "little")))
    return torch.tensor(rows, dtype=torch.uint8).view(torch.int32)


@pytest.mark.parametrize("inputs", [9, 12, 48, 64, 576])
@pytest.mark.parametrize("across", [True, False])
def test_three_bits_of_older_versions_are_told_apart(inputs, across):
    """By the number of words, or, in short rows such as those of 12 inputs, by the version that the config names."""
    codes = torch.randint(8, (2, inputs))
    parts = {
        "weight_packed": _words(codes, 3, across),
        "weight_scale": torch.full((2, 1), 0.5),
        "weight_shape": torch.tensor([2, inputs]),
    }
    group = {"targets": ["Linear"], "weights": {"num_bits": 3, "type": "int"}}
    config = {"config_groups": {"g": group}, "version": "0.20.0" if across else "0.17.1"}
    found, how = _weight("layer.", parts, config)
    assert torch.equal(found, (codes - 4) * 0.5) and how.startswith("3 bits, ")
    if inputs not in (12, 48):
        assert torch.equal(_weight("layer.", parts, {"config_groups": {"g": group}})[0], found)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "as nvfp4-pack-quantized"),
        (
            {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": {"format": "sparse-bitmask"}},
            "as dense",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "int-quantized", "transform_config": {"a": 1}},
            "rotated activations",
        ),
    ],
)
def test_other_formats_are_refused_by_name_before_any_tensor_is_read(quantization, named, tmp_path):
    folder = save(build("llama"), tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": quantization}))
    (folder / "actkit.sha256").unlink()
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=rf"quantized by .*{named}.*, which is not read here; .* dequantize"):
        load(folder)


@pytest.mark.parametrize(
    ("parts", "how"),
    [
        ({"weight": torch.ones(2, 2), "weight_scale": torch.ones(2, 1)}, "as torch.float32 beside a scale"),
        ({"weight_packed": torch.ones(2, 1, dtype=torch.int32)}, "as weight_packed alone"),
        (
            {
                "weight_packed": torch.ones(2, 2, dtype=torch.int32),
                "weight_scale": torch.ones(2, 1),
                "weight_shape": torch.tensor([2, 12]),
            },
            r"in 2 words a row, packed with 3 bits in one of two ways \(the config says no version\)",
        ),
        (
            {
                "weight_packed": torch.ones(2, 3, dtype=torch.int32),
                "weight_scale": torch.ones(2, 1),
                "weight_shape": torch.tensor([2, 12]),
            },
            "as 3 words for 12 codes of 3 bits",
        ),
        (
            {
                "weight": torch.ones(2, 2, dtype=torch.int8),
                "weight_scale": torch.ones(2, 1),
                "weight_global_scale": torch.ones(1),
            },
            "with weight_global_scale",
        ),
    ],
)
def test_a_layer_that_is_stored_otherwise_is_named(parts, how, tmp_path):
    group = {"targets": ["Linear"], "weights": {**GROUPS, "num_bits": 3}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    folder = quantized_folder(tmp_path / "model", "llama", config, lambda weight: parts)
    with pytest.raises(CheckpointError, match=rf"model\.layers\.0\..*: its weight is stored {how}, which is not read"):
        load(folder)
