"""Stores of experts against the resident model of the same codes, and what a damaged or strange file does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import CheckpointError, UnsupportedModelError
from actkit.core.layers.weights import rounded
from actkit.core.model.expert_places import expert_places, expert_shape
from actkit.core.model.experts import ExpertList
from actkit.core.store import checkpoint
from actkit.core.store import expert_store as module
from actkit.core.store.expert_source import AbsentExperts, ExpertSource
from actkit.core.store.expert_store import PAGE, ROWS, ExpertStore, Unwanted
from actkit.core.store.tensor_source import TensorSource
from actkit.testing import tiny_model

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")


def folder_of(kind: str, path: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    model = tiny_model(kind, **settings).to(dtype)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("mixtral", tmp_path_factory.mktemp("models") / "mixtral")


def opened(model: Any) -> dict[int, ExpertList]:
    """The experts of a resident model, by block."""
    return {p.layer: ExpertList.of(model.get_submodule(p.path), p.row) for p in expert_places(model)}


@pytest.mark.parametrize(("kind", "tied"), [*((kind, False) for kind in KINDS), ("mixtral", True)])
def test_experts_and_the_rest_are_those_of_the_model_that_transformers_loads(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    folder = folder_of(kind, tmp_path / kind, tie_word_embeddings=tied)
    resident, source = checkpoint.load(folder), ExpertSource(folder)
    for layer, experts in opened(resident).items():
        for e, expert in enumerate(experts):
            found = source.expert(layer, e)
            for part, matrix in found.items():
                torch.testing.assert_close(matrix, getattr(expert, part).weight, rtol=0, atol=0)
    bare = source.model_without_experts()
    assert (bare.lm_head.weight is bare.model.embed_tokens.weight) is tied
    stock = resident.state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in bare.state_dict().items())
    assert all(tensor.dtype == stock[name].dtype for name, tensor in bare.state_dict().items())
    buffers = dict(resident.named_buffers())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in bare.named_buffers())
    assert {type(bare.get_submodule(place.path)) for place in expert_places(bare)} == {AbsentExperts}
    assert expert_shape(bare) == expert_shape(resident) == source.shape
    with pytest.raises(UnsupportedModelError, match="without its experts"):
        bare(input_ids=torch.tensor([[1, 2]]))


def test_a_checkpoint_in_several_files(mixtral: Path, tmp_path: Path) -> None:
    checkpoint.load(mixtral).save_pretrained(tmp_path / "cut", max_shard_size="8KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 3
    whole, cut = ExpertSource(mixtral), ExpertSource(tmp_path / "cut")
    assert whole.routers() == cut.routers()
    for e in range(4):
        assert all(torch.equal(x, cut.expert(1, e)[part]) for part, x in whole.expert(1, e).items())


def test_experts_that_lie_in_one_tensor(mixtral: Path, tmp_path: Path) -> None:
    """The layout of transformers' own modules, which its files have not by default."""
    model = checkpoint.load(mixtral)
    fused = tmp_path / "fused"
    model.config.save_pretrained(fused)
    save_file({n: x.clone() for n, x in model.state_dict().items()}, fused / "model.safetensors", {"format": "pt"})
    apart, together = ExpertSource(mixtral), ExpertSource(fused)
    for e in range(4):
        for part, matrix in apart.expert(1, e).items():
            assert torch.equal(matrix, together.expert(1, e)[part])
    assert apart.routers() == together.routers()


@pytest.mark.parametrize(("bits", "layout"), [*((bits, "codes") for bits in (2, 3, 4, 8, 16)), (2, "kernel"),
                                              (4, "kernel"), (7, "kernel"), (8, "kernel"), (16, "kernel")])  # fmt: skip
def test_a_store_gives_what_the_grid_gives(bits: int, layout: Any, mixtral: Path, tmp_path: Path) -> None:
    model = checkpoint.load(mixtral)
    with ExpertStore.create(mixtral, tmp_path / "store", bits, layout=layout, progress=False) as store:
        for layer, experts in opened(model).items():
            for e, expert in enumerate(experts):
                for part, weight in store.load(layer, e, torch.bfloat16).items():
                    original = getattr(expert, part).weight.detach()
                    expected = original if bits == 16 else rounded(original, replace(ROWS, bits=bits)).dequantize()
                    assert torch.equal(weight.dequantize(), expected)
        assert all(record.offset % PAGE == 0 and record.nbytes % PAGE == 0 for record in store.records.values())
        assert store.source["model_type"] == "mixtral" and store.nbytes == 8 * store.largest
        store.verify()
        store.check_model(model)


def test_widths_by_expert_and_groups(mixtral: Path, tmp_path: Path) -> None:
    paths = [f"{p.path}.{e}" for p in expert_places(checkpoint.load(mixtral)) for e in range(4)]
    bits = {path: (2, 4, 8, 16)[i % 4] for i, path in enumerate(paths)}
    grid = IntegerGrid(8, 8, symmetric=True, scale_dtype="bfloat16")
    with ExpertStore.create(mixtral, tmp_path / "store", bits, layout="codes", grid=grid, progress=False) as store:
        assert [record.bits for record in store.records.values()] == [2, 4, 8, 16] * 2
        loaded = store.load(0, 0, torch.bfloat16)["gate"]
        expected = rounded(ExpertSource(mixtral).expert(0, 0)["gate"], replace(grid, bits=2))
        assert torch.equal(loaded.dequantize(), expected.dequantize())
        assert store.describe().startswith("8 experts of 2 blocks, 32.8 KB: 2 as they were, 2 in 8 bits, 2 in 4 bits")


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (9, "has 9; give 2 to 8, or 16"),
        ({}, "8 experts, such as model.layers.0.mlp.experts.0"),
        ({"other": 4}, "other is unknown"),
    ],
)
def test_widths_that_are_refused(bits: Any, message: str, mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertStore.create(mixtral, tmp_path / "store", bits, progress=False)
    with pytest.raises(ValueError, match="choose one of kernel, codes"):
        ExpertStore.create(mixtral, tmp_path / "store", layout="other", progress=False)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(mixtral: Path, tmp_path: Path) -> Path:
    ExpertStore.create(mixtral, tmp_path / "experts.bin", 4, progress=False).close()
    return tmp_path / "experts.bin"


def test_a_flipped_bit_names_its_record(stored: Path) -> None:
    with ExpertStore.open(stored) as store:
        offset = store.record(1, 2).offset
    content = bytearray(stored.read_bytes())
    content[offset + 5] ^= 1
    stored.write_bytes(content)
    with ExpertStore.open(stored) as store:
        store.load(1, 1, torch.bfloat16)
        with pytest.raises(CheckpointError, match="expert 2 of block 1 is damaged"):
            store.load(1, 2, torch.bfloat16)
        with pytest.raises(CheckpointError, match="expert 2 of block 1 is damaged"):
            store.verify()


def test_a_truncated_file_and_a_damaged_index(stored: Path) -> None:
    content = stored.read_bytes()
    for cut in (len(content) - 1, 3 * PAGE, PAGE, 30):
        stored.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            ExpertStore.open(stored)
    stored.write_bytes(content[:-2] + b" }")
    with pytest.raises(CheckpointError, match="its index is not what was written"):
        ExpertStore.open(stored)
    stored.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no store of experts"):
        ExpertStore.open(stored)
    with pytest.raises(CheckpointError, match="not readable"):
        ExpertStore.open(stored.parent / "missing")


def test_a_file_that_is_changed_while_it_is_open(stored: Path) -> None:
    with ExpertStore.open(stored) as store:
        store.load(0, 0, torch.bfloat16)
        with stored.open("ab") as file:
            file.write(b"more")
        with pytest.raises(CheckpointError, match="changed while it was open"):
            store.load(0, 0, torch.bfloat16)
        with pytest.raises(CheckpointError, match="changed while it was open"):
            store.load(1, 0, torch.bfloat16)


def test_a_file_that_is_replaced_while_it_is_open_stays_readable(stored: Path, mixtral: Path) -> None:
    with ExpertStore.open(stored) as store:
        before = store.load(0, 0, torch.bfloat16)["up"].dequantize()
        ExpertStore.create(mixtral, stored, 2, overwrite=True, progress=False).close()
        assert torch.equal(store.load(0, 0, torch.bfloat16)["up"].dequantize(), before)
    with pytest.raises(CheckpointError, match="was closed"):
        store.load(0, 0, torch.bfloat16)


def test_a_read_that_nobody_wants_is_broken_off(stored: Path) -> None:
    unwanted = Event()
    with ExpertStore.open(stored) as store:
        store.load(0, 0, torch.bfloat16, unwanted)
        unwanted.set()
        with pytest.raises(Unwanted):
            store.load(0, 0, torch.bfloat16, unwanted)
        store.load(0, 0, torch.bfloat16)


def test_existing_files_and_half_written_ones(stored: Path, mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        ExpertStore.create(mixtral, stored, 4)
    before = stored.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_put", full)
    with pytest.raises(CheckpointError, match="could not be written"):
        ExpertStore.create(mixtral, stored, 4, overwrite=True, progress=False)
    assert stored.read_bytes() == before and [path.name for path in stored.parent.iterdir()] == [stored.name]
    with pytest.raises(CheckpointError, match="existing folder of a larger disk"):
        ExpertStore.create(mixtral, stored.parent / "nowhere" / "store", 4, progress=False)


def test_another_model_is_refused(stored: Path, mixtral: Path) -> None:
    with ExpertStore.open(stored) as store:
        model = checkpoint.load(mixtral)
        store.check_model(model)
        store.check_model(checkpoint.load(mixtral, dtype=torch.float32))
        with torch.no_grad():
            model.model.layers[1].mlp.gate.weight[0, 0] += 1
        with pytest.raises(CheckpointError, match="made from another model"):
            store.check_model(model)
        with pytest.raises(UnsupportedModelError, match="no plain gated experts"):
            store.check_model(tiny_model("llama"))
        with pytest.raises(ValueError, match="experts 0 to 3 of the blocks 0, 1"):
            store.load(0, 9, torch.bfloat16)


def test_experts_as_they_were_want_their_own_dtype(mixtral: Path, tmp_path: Path) -> None:
    with ExpertStore.create(mixtral, tmp_path / "store", 16, progress=False) as store:
        with pytest.raises(UnsupportedModelError, match=r"keeps experts as they were, in torch\.bfloat16"):
            store.load(0, 0, torch.float32)
        with pytest.raises(UnsupportedModelError, match="keeps experts as they were"):
            store.check_model(checkpoint.load(mixtral, dtype=torch.float32))


def test_without_direct_reads_the_page_cache_is_dropped(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = []
    drop = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: dropped.append(given[1:]) or drop(*given))
    with ExpertStore.open(stored) as direct:
        expected = direct.load(0, 3, torch.bfloat16)["down"].dequantize()
    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.delattr(os, "preadv")
    with ExpertStore.open(stored) as store:
        assert store.reads == "dropped" and "dropped from the page cache" in store.describe()
        assert torch.equal(store.load(0, 3, torch.bfloat16)["down"].dequantize(), expected)
        record = store.record(0, 3)
        assert dropped == [(record.offset, record.nbytes, os.POSIX_FADV_DONTNEED)]


def test_sources_that_are_refused(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no plain gated experts"):
        ExpertSource(folder_of("llama", tmp_path / "llama"))
    with pytest.raises(UnsupportedModelError, match="no plain gated experts"):
        ExpertSource(folder_of("gpt_oss", tmp_path / "gpt_oss"))
    with pytest.raises(CheckpointError, match="not readable"):
        ExpertSource(tmp_path / "missing")
    tensors = load_file(mixtral / "model.safetensors")
    lacking = tmp_path / "lacking"
    checkpoint.load(mixtral).config.save_pretrained(lacking)
    name = next(name for name in tensors if "experts.2.w3" in name)
    save_file({n: x for n, x in tensors.items() if n != name}, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="up of expert 2 in block 0 is missing"):
        ExpertSource(lacking)
    save_file(tensors | {name: torch.zeros(3, 3)}, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has the shape \[3, 3\]"):
        ExpertSource(lacking).expert(0, 2)
    save_file({n: x for n, x in tensors.items() if "q_proj" not in n}, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="missing: model"):
        ExpertSource(lacking).model_without_experts()
    settings = json.loads((lacking / "config.json").read_text())
    (lacking / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CheckpointError, match="weights are quantized"):
        ExpertSource(lacking)
    (lacking / "actkit.json").write_text("{}")
    with pytest.raises(CheckpointError, match="actkit saved it"):
        ExpertSource(lacking)


# -- tensors read one at a time ----------------------------------------------------------------------------------------


def test_tensors_of_every_dtype_and_their_parts(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.arange(24).reshape(2, 3, 4).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    }
    save_file(tensors | {"empty": torch.zeros(0, 2), "one": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    source = TensorSource([tmp_path / "a.safetensors"])
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name), tensor) and source.read(name).dtype == tensor.dtype
        assert torch.equal(source.read(name, 1), tensor[1])
    assert source.read("empty").shape == (0, 2) and source.read("one").item() == 3
    with pytest.raises(CheckpointError, match="no tensor of that name"):
        source.read("other")


def test_damaged_tensor_files(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(100.0)}, file)
    content = file.read_bytes()
    source = TensorSource([file])
    for cut in (4, 20, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match="not readable"):
            TensorSource([file])
    with pytest.raises(CheckpointError, match="ends inside of x"):
        source.read("x")
    file.unlink()
    with pytest.raises(CheckpointError, match="x is not readable"):
        source.read("x")


BUILD = """
import resource, sys
from actkit.core.store.expert_store import ExpertStore
ExpertStore.create(sys.argv[1], sys.argv[2], 8, progress=False).close()  # imports, and the first use of everything
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ExpertStore.create(sys.argv[3], sys.argv[4], 8, progress=False).close()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_making_a_store_holds_an_expert_at_a_time(mixtral: Path, tmp_path: Path) -> None:
    """200 MB of experts; what the process takes grows by some megabytes."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 16, "num_hidden_layers": 4}
    folder = folder_of("mixtral", tmp_path / "large", **sizes)
    arguments = [mixtral, tmp_path / "small.bin", folder, tmp_path / "large.bin"]
    done = subprocess.run([sys.executable, "-c", BUILD, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    grown = int(done.stdout) * 1024
    assert stored > 190e6 and grown < 64e6, f"{grown / 1e6:.0f} MB for {stored / 1e6:.0f} MB"
