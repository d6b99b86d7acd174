"""Saved is loaded: equal bit for bit, strict about everything else, and whole after any interruption."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, INNER, KINDS, Perceptron, batches, bits, build, run, snapshot
from torch import nn

from actkit.core.edit import changes
from actkit.core.edit.edits import Configure, Replace, Set, apply_edit, describe
from actkit.core.ground import whole_folder
from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.modules import tied_names
from actkit.core.layers.folding import ScaledActivation
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.measure.summary import summarise
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint, checksums
from actkit.core.store.checkpoint import MANIFEST, load, read_manifest, save
from actkit.core.store.pretrained import record

STACK = {"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8}}, {"teal": {"sparsity": 0.4}}]}


def changed(kind: str, dtype: torch.dtype = torch.float32, recipe: Any = STACK, **settings: Any) -> Any:
    model = build(kind, **settings).to(dtype)
    given = [cast(batch, dtype) for batch in batches(kind)]
    return apply(model, recipe, given, min_coverage=0.0, progress=False).model


def cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, dict):
        return {name: cast(value, dtype) for name, value in batch.items()}
    return batch.to(dtype) if batch.is_floating_point() else batch


def equal(first: nn.Module, second: nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> bool:
    given = [cast(batch, dtype) for batch in batches(kind)]
    return all(bits(run(first, batch)) == bits(run(second, batch)) for batch in given)


def rewrite(folder: Path, change: Any) -> None:
    """Change the content of actkit.json."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    checksums.write(folder)


def retensor(folder: Path, change: Any) -> None:
    """Change the tensors of the one weights file, and its size in actkit.json with it."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    rewrite(folder, lambda manifest: manifest["files"][path.name].update(bytes=path.stat().st_size))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(changed("llama"), tmp_path / "model")


# -- equality ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_is_saved(kind, dtype, tmp_path):
    model = changed(kind, torch.float32)
    scales = {name: b.clone() for name, b in model.named_buffers() if name.endswith(("scale", "threshold"))}
    model.to(dtype)  # also where the dtype changes after the transform
    assert all(torch.equal(b, scales[name]) for name, b in model.named_buffers() if name in scales)
    model.generation_config = getattr(model, "generation_config", None)
    loaded = load(save(model, tmp_path / "model"))
    rotary = {name for name, _ in model.named_buffers() if "inv_freq" in name}
    if dtype != torch.float32:  # `.to` rounded the tables in memory; loading computes them
        for name in rotary:
            module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            module._buffers[leaf] = loaded.get_buffer(name)
    before, after = snapshot(model), snapshot(loaded)
    before.pop("config"), after.pop("config")
    assert after == before
    assert equal(loaded, model, kind, dtype)
    assert type(loaded) is type(model)
    assert changes.of(loaded).recipe == changes.of(model).recipe
    for name, buffer in build(kind).named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name  # tables that are not saved


@pytest.mark.parametrize("kind", KINDS)
def test_an_unchanged_model_is_saved_as_transformers_does(kind, tmp_path):
    model = build(kind)
    folder = save(model, tmp_path / "model")
    assert not (folder / MANIFEST).exists()
    assert equal(type(model).from_pretrained(folder), model, kind)
    assert equal(load(folder), model, kind)


def test_dtype_at_load_casts_weights_only(tmp_path):
    model = changed("llama")
    loaded = load(save(model, tmp_path / "model"), dtype="bfloat16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for name, buffer in loaded.named_buffers():
        assert bits(buffer) == bits(model.get_buffer(name)), name  # rotary tables, codes, scales, thresholds
    assert loaded.config.dtype == torch.bfloat16
    plain = load(save(build("llama"), tmp_path / "plain"), dtype=torch.bfloat16)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert plain.model.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype: 'int4' was given, allowed are float32, bfloat16 and float16"):
        load(tmp_path / "model", dtype="int4")


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_module_of_ones_own(kind, tmp_path):
    model = changed(kind, recipe=STACK)
    folder = save(model, tmp_path / "model")
    assert equal(load(folder, base=lambda: build(kind)), model, kind)
    with pytest.raises(CheckpointError, match=f"{type(model).__name__}, which is not a transformers model; pass base="):
        load(folder)
    with pytest.raises(CheckpointError, match=r"(edits|weights) do not fit"):
        load(folder, base=lambda: build("conv" if kind == "mlp" else "mlp"))
    with pytest.raises(TypeError, match="base: it gave a int"):
        load(folder, base=lambda: 3)


def test_the_grid_of_a_quantized_source_is_kept(tmp_path):
    grid = changes.SourceGrid("gguf", {"model.layers.0.mlp.up_proj": "Q4_K", "lm_head": "Q6_K"}, ("it rounds more",))
    model = load(save(build("llama"), tmp_path / "plain"))
    assert changes.source_grid(model) is None
    model.__dict__[changes.SOURCE] = changes.Source.of(str(tmp_path / "plain"), model, grid=grid)
    apply(model, STACK, batches("llama"), min_coverage=0.0, progress=False)
    folder = save(model, tmp_path / "model")
    loaded = load(folder)
    assert changes.source_grid(loaded) == changes.source_grid(changes.copy_of(loaded)) == grid
    line = "gguf: 1 x Q4_K, 1 x Q6_K; dequantized when it was read"
    assert dict(summarise(loaded)._rows())["quantized source"] == f"{line}\nit rounds more"
    assert changes.SourceGrid.from_dict(json.loads(json.dumps(summarise(loaded).to_dict()["source_grid"]))) == grid
    assert "gguf: 1 x Q4\\_K" in (folder / "README.md").read_text()

    rewrite(folder, lambda manifest: manifest.update(source_grid={"format": "gguf"}))
    with pytest.raises(CheckpointError, match="source_grid is missing or malformed"):
        load(folder)
    rewrite(folder, lambda manifest: manifest.pop("source_grid"))  # as earlier versions wrote it
    assert changes.source_grid(load(folder)) is None


def test_every_kind_of_edit(tmp_path):
    model = build("llama")
    layer = model.model.layers[0]
    correction = LowRank(torch.randn(INNER, 2), torch.randn(2, HIDDEN), "dropped")
    edits = [
        Set("model.layers.0.input_layernorm.weight", torch.full((HIDDEN,), 0.25)),
        Replace("model.layers.0.mlp.act_fn", ScaledActivation(layer.mlp.act_fn, torch.rand(INNER) + 1)),
        Replace("model.layers.0.mlp.up_proj", ActLinear.of(layer.mlp.up_proj, correction=correction)),
        Configure("rms_norm_eps", 1e-3),
        Configure("attn_implementation", "eager"),
    ]
    described = []
    for edit in edits:
        described.append(describe(edit, model))
        apply_edit(model, edit)
    record(model, described, [], "llama")
    loaded = load(save(model, tmp_path / "model"))
    assert equal(loaded, model, "llama")
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config.rms_norm_eps == 1e-3


def test_ties_stay(tmp_path):
    model = changed("llama", tie_word_embeddings=True)
    folder = save(model, tmp_path / "model")
    loaded = load(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied_names(loaded) == tied_names(model) != {}
    stored = [name for facts in read_manifest(folder)["files"].values() for name in facts["tensors"]]
    assert ("lm_head.weight" in stored) + ("model.embed_tokens.weight" in stored) == 1
    untied = changed("llama", tie_word_embeddings=True)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach() * 2)
    loaded = load(save(untied, tmp_path / "untied"))
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert equal(loaded, untied, "llama")


def test_shards(tmp_path):
    model = changed("llama")
    folder = save(model, tmp_path / "model", max_shard="4KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"actkit-00001-of-{len(files):05d}.safetensors"
    for path in files:
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 4000 or len(tensors) == 1
    assert equal(load(folder), model, "llama")
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"{files[1].name}: the file is missing"):
        load(folder)


def test_what_stands_beside_the_weights_is_copied(tmp_path):
    source = save(build("bert"), tmp_path / "source")
    beside = {"tokenizer.json": "{}", "vocab.txt": "a", "chat_template.jinja": "b", "modules.json": "[]"}
    for name, text in (beside | {"pytorch_model.bin": "pickle", "README.md": "old", ".hidden": "x"}).items():
        (source / name).write_text(text)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling": "mean"}')
    model = load(source)
    apply(model, STACK, batches("bert"), min_coverage=0.0, progress=False)
    folder = save(model, tmp_path / "changed", card="# new")
    for name, text in beside.items():
        assert (folder / name).read_text() == text
    assert json.loads((folder / "1_Pooling" / "config.json").read_text()) == {"pooling": "mean"}
    assert (folder / "README.md").read_text() == "# new"
    assert not (folder / "pytorch_model.bin").exists()
    assert not (folder / "model.safetensors").exists()


def test_undo_after_save(tmp_path):
    model = load(save(build("gpt2"), tmp_path / "source"))
    before = snapshot(model)
    applied = apply(model, STACK, batches("gpt2"), min_coverage=0.0, progress=False)
    save(model, tmp_path / "changed")
    applied.undo()
    assert snapshot(model) == before
    assert equal(load(save(model, tmp_path / "again")), build("gpt2"), "gpt2")
    assert not (tmp_path / "again" / MANIFEST).exists()


# -- strictness --------------------------------------------------------------------------------------------------------

NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(NORM), f"do not fit the model: missing {NORM}"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda t: t.update({NORM: torch.zeros(3)}), rf"{NORM} is \(3,\) in the file and \(16,\) in the model"),
        (lambda t: t.update({NORM: torch.zeros(16, dtype=torch.int32)}), "int32 in the file and torch.float32"),
        (
            lambda t: t.update({k: v.float() for k, v in t.items() if k.endswith("codes")}),
            "codes is torch.float32 in the file and torch.uint8 in the model",
        ),
        (lambda t: t.clear() or t.update(x=torch.zeros(1)), "missing"),
    ],
)
def test_tensors_must_agree(folder, change, text):
    retensor(folder, change)
    with pytest.raises(CheckpointError, match=text):
        load(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(schema=99), "schema 99 is newer than this actkit reads .*; upgrade actkit"),
        (lambda m: m.pop("schema"), "schema is missing or malformed"),
        (lambda m: m.update(schema="1"), "schema is missing or malformed"),
        (lambda m: m.update(schema=0), "schema is missing or malformed"),
        (lambda m: m.pop("edits"), "edits is missing or malformed"),
        (lambda m: m.update(files=[]), "files is missing or malformed"),
        (lambda m: m.update(files={"../other": {"bytes": 1}}), "malformed"),
        (lambda m: m.update(base_class="os.system"), "'os.system' is not a model class of transformers"),
        (lambda m: m.update(base_class=3), "base_class is missing or malformed"),
        (
            lambda m: m["edits"].append({"run": "rm"}),
            "edits do not fit .* none of replace, insert, resize, set, configure",
        ),
        (lambda m: m["edits"][0].update(module="os:system"), "'os:system' is not known"),
        (lambda m: m["edits"][0].update(spec={}), "edits do not fit"),
        (lambda m: m["edits"][0]["spec"].update(in_features=5), "do not fit"),
        (lambda m: m["edits"][0].update(replace="model.nowhere.x"), "no module 'model.nowhere.x'"),
        (lambda m: m["tied"].update(alias="nothing"), "unexpected alias.*tied to nothing"),
    ],
)
def test_the_manifest_must_be_right(folder, change, text):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=text):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("name", [MANIFEST, "config.json"])
def test_damaged_json(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: .*save the model again"):
        load(folder)
    (folder / checksums.NAME).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: .*(damaged|save the model again)"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
@pytest.mark.parametrize("own", [True, False])
def test_truncated_weights(own, keep, tmp_path):
    folder = save(changed("llama") if own else build("llama"), tmp_path / "model")
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        load(folder)
    (folder / checksums.NAME).unlink()
    with pytest.raises(CheckpointError, match="truncated" if own else "not readable"):
        load(folder)


def test_flipped_bytes_in_the_header(folder):
    """Where nothing tells of the digests; with them every flip is an error (test_damage.py)."""
    (folder / checksums.NAME).unlink()
    (path,) = folder.glob("*.safetensors")
    whole = path.read_bytes()
    model = load(folder)
    length = int.from_bytes(whole[:8], "little")
    text = whole[8 : 8 + length]
    start = text.index(b'"__metadata__"') if b'"__metadata__"' in text else length  # its values mean nothing
    end = text.index(b"}", start) if start < length else length
    generator = random.Random(0)
    for position in generator.sample([i for i in range(8 + length) if not start <= i - 8 <= end], 60):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = load(folder)
        except CheckpointError:
            continue
        assert snapshot(loaded) == snapshot(model), f"byte {position} changed the model in silence"


def test_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither actkit\.json nor config\.json"):
        load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"there is no folder '.*/nowhere'"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"there is no actkit\.json"):
        read_manifest(tmp_path / "empty")
    folder = save(build("llama"), tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    checksums.write(folder)
    with pytest.raises(CheckpointError, match="reads no pickle"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "actkit_llama", "architectures": ["ActkitNothing"]}')
    checksums.write(folder)
    with pytest.raises(CheckpointError, match="pickled"):
        load(folder)


def test_a_plain_folder_is_read_strictly(tmp_path):
    folder = save(build("llama"), tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    for change, text in (
        (lambda t: t.pop(NORM), f"missing: {NORM}"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda t: t.update({NORM: torch.zeros(3)}), NORM),
    ):
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        checksums.write(folder)
        with pytest.raises(CheckpointError, match=text):
            load(folder)


# -- all or nothing ----------------------------------------------------------------------------------------------------


def whole(folder: Path, expected: nn.Module) -> None:
    """The folder holds that model, and nothing is left beside it."""
    assert snapshot(load(folder)) == snapshot(expected)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.fixture
def old(tmp_path: Path) -> tuple[Path, nn.Module]:
    folder = save(changed("mlp"), tmp_path / "out" / "model")
    return folder, load_own(folder)


def load_own(folder: Path) -> nn.Module:
    return load(folder, base=Perceptron)


def test_an_existing_folder_is_not_touched(old, tmp_path):
    folder, model = old
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="exists already; choose another one, or pass overwrite=True"):
        save(changed("mlp"), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for target in (documents, tmp_path / "file"):
        with pytest.raises(CheckpointError, match="holds something else than a checkpoint"):
            save(model, target, overwrite=True)
    assert (documents / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "a file"


def test_overwriting_through_a_link(old):
    folder, _ = old
    link = folder.parent / "link"
    link.symlink_to(folder)
    save(build("mlp"), link, overwrite=True)
    assert link.is_symlink()
    assert equal(load_own(folder), build("mlp"), "mlp")
    folder.rename(whole_folder.previous_of(folder))  # killed between the two renames
    assert equal(load_own(link), build("mlp"), "mlp")


def failing(original: Any, after: int, error: OSError) -> Any:
    """The function, which raises at its call number `after`."""
    count = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise error
        return original(*args, **kwargs)

    return call


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (checkpoint, "save_file", 0),
        (os, "fsync", 0),
        (os, "fsync", 1),
        (Path, "rename", 0),
        (Path, "write_text", 0),
        (Path, "mkdir", 0),
    ],
)
def test_a_failure_while_writing_changes_nothing(old, monkeypatch, owner, name, after):
    folder, model = old
    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), after, FULL))
        with pytest.raises(CheckpointError, match=r"could not be written \(.*No space left.*nothing was changed there"):
            save(changed("mlp"), folder, overwrite=True)
    assert snapshot(load_own(folder)) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_a_failure_between_the_two_renames_brings_the_old_folder_back(old, monkeypatch, error):
    folder, model = old
    with monkeypatch.context() as patch:
        real, calls = Path.rename, []

        def rename(self: Path, target: Path) -> Path:
            calls.append(target)
            if len(calls) == 2:
                raise error
            return real(self, target)

        patch.setattr(Path, "rename", rename)
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            save(changed("mlp"), folder, overwrite=True)
    assert len(calls) == 3
    assert snapshot(load_own(folder)) == snapshot(model)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_full_disk_is_seen_before_writing(old, monkeypatch):
    folder, model = old
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(CheckpointError, match=r"needs .* 1 KB are free there; free some space"):
            save(model, target, overwrite=True)
    assert snapshot(load_own(folder)) == snapshot(model)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    folder = tmp_path / "out" / "model"
    first, second = build("mlp"), build("mlp")
    with torch.no_grad():
        second.up.weight.mul_(2)
    save(first, folder)
    states = [snapshot(first), snapshot(second)]
    generator = random.Random(0)
    for _ in range(25):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:  # writes the two models in turn until it is killed
            try:
                while True:
                    save(second, folder, overwrite=True)
                    os.write(writer, b".")
                    save(first, folder, overwrite=True)
            finally:
                os._exit(1)
        os.read(reader, 1)  # it has started to write
        time.sleep(generator.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
        assert snapshot(load_own(folder)) in states
    save(first, folder, overwrite=True)  # what the killed ones left beside it goes
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_kill_between_the_renames(old):
    folder, model = old
    folder.rename(whole_folder.previous_of(folder))
    assert snapshot(load_own(folder)) == snapshot(model)
    folder.rename(whole_folder.previous_of(folder))
    with pytest.raises(CheckpointError, match="exists already"):
        save(model, folder)
    assert snapshot(load_own(folder)) == snapshot(model)


def test_names_with_special_characters(tmp_path):
    folder = tmp_path / "a[1]*?" / "model [2]"
    (tmp_path / "a[1]*?").mkdir()
    (folder.parent / f".{folder.name}.saving-by-hand").mkdir()  # no process number: not ours to remove
    model = changed("mlp")
    save(model, folder)
    save(model, folder, overwrite=True)
    assert equal(load_own(folder), model, "mlp")
    assert (folder.parent / f".{folder.name}.saving-by-hand").exists()


def test_a_folder_of_an_earlier_version_loads(tmp_path: Path) -> None:
    """Until schema 2 the tensors of a changed layer were called `weight.codes` and so on."""
    model = changed("llama")
    save(model, tmp_path / "old")
    old_names = {}

    def older(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".storage." in name]:
            old_names[name] = name.replace(".storage.", ".weight.")
            tensors[old_names[name]] = tensors.pop(name)

    def older_manifest(manifest: dict[str, Any]) -> None:
        manifest["schema"] = 1
        for entry in manifest["files"].values():
            entry["tensors"] = [old_names.get(name, name) for name in entry["tensors"]]

    retensor(tmp_path / "old", older)
    rewrite(tmp_path / "old", older_manifest)
    assert any(name.endswith("weight.codes") for name in old_names.values())
    assert equal(load(tmp_path / "old"), model, "llama")
