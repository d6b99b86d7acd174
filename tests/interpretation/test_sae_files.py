"""Files of sparse autoencoders, and what is damaged or foreign.

`sae_folders` holds folders that SAELens 6.54 and sparsify 1.3.3 wrote, each with what the package computes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actkit.core.ground.errors import CheckpointError
from actkit.interpretation.sparse_autoencoder.files import read_autoencoder, write_autoencoder
from actkit.interpretation.sparse_autoencoder.gates import JumpReLUAutoencoder
from actkit.interpretation.sparse_autoencoder.kinds import KINDS
from actkit.interpretation.sparse_autoencoder.top_k import TopKAutoencoder

FOLDERS = Path(__file__).parent / "sae_folders"


def made(kind: str = "topk", **settings: Any) -> Any:
    torch.manual_seed(0)
    if kind in ("topk", "batchtopk", "matryoshka"):
        settings["k"] = 5
    found = KINDS[kind](8, 24, **settings)
    for parameter in found.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.01, 0.3)
    if kind in ("batchtopk", "matryoshka"):
        found.threshold.fill_(0.2)
    found.site, found.model = "blocks.3.block.output", "a" * 64
    return found.eval()


@pytest.mark.parametrize("folder", sorted(path.name for path in FOLDERS.iterdir()))
def test_what_others_wrote_computes_what_it_computes_there(folder: str) -> None:
    expected = load_file(FOLDERS / folder / "expected.safetensors")
    found = read_autoencoder(FOLDERS / folder)
    assert not found.training
    torch.testing.assert_close(found.encode(expected["x"]), expected["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found(expected["x"]), expected["reconstruction"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centred", [True, False])
def test_what_is_written_is_read_back(kind: str, centred: bool, tmp_path: Path) -> None:
    given = made(kind, centred=centred)
    found = read_autoencoder(write_autoencoder(given, tmp_path / "sae"))
    x = torch.randn(20, 8)
    assert torch.equal(found.encode(x), given.encode(x)) and torch.equal(found(x), given(x))
    assert (found.site, found.model) == (given.site, given.model)
    assert found.kind == ("jumprelu" if kind in ("batchtopk", "matryoshka") else kind)


def test_the_keys_are_those_of_saelens(tmp_path: Path) -> None:
    config = json.loads((write_autoencoder(made(), tmp_path / "sae") / "cfg.json").read_text())
    theirs = json.loads((FOLDERS / "saelens-topk" / "cfg.json").read_text())
    assert set(theirs) <= set(config)
    assert config["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert int(config["metadata"]["sae_lens_version"].partition(".")[0]) >= 6
    tensors = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert {name: list(value.shape) for name, value in tensors.items()} == {
        name: list(value.shape)
        for name, value in load_file(FOLDERS / "saelens-topk" / "sae_weights.safetensors").items()
    }
    other = made()
    other.site = "blocks.1.attention.mixed"
    config = json.loads((write_autoencoder(other, tmp_path / "mixed") / "cfg.json").read_text())
    assert config["reshape_activations"] == "hook_z"
    other.site = "blocks.1.experts.2.mlp.hidden"
    config = json.loads((write_autoencoder(other, tmp_path / "expert") / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] is None


def test_sparsify_both_ways(tmp_path: Path) -> None:
    given = made()
    found = read_autoencoder(write_autoencoder(given, tmp_path / "sae", form="sparsify"))
    x = torch.randn(20, 8)
    assert torch.equal(found(x), given(x)) and found.site == given.site
    theirs = json.loads((FOLDERS / "sparsify" / "cfg.json").read_text())
    assert set(theirs) <= set(json.loads((tmp_path / "sae" / "cfg.json").read_text()))
    with pytest.raises(ValueError, match="write it as 'saelens'"):
        write_autoencoder(made("gated"), tmp_path / "other", form="sparsify")
    with pytest.raises(ValueError, match="form: 'pickle'"):
        write_autoencoder(made(), tmp_path / "other", form="pickle")  # type: ignore[arg-type]


def gemma(path: Path, **more: Any) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "W_enc": generator.normal(size=(8, 24)).astype(np.float32),
        "W_dec": generator.normal(size=(24, 8)).astype(np.float32),
        "b_enc": generator.normal(size=24).astype(np.float32),
        "b_dec": generator.normal(size=8).astype(np.float32),
        "threshold": generator.uniform(0.5, 1.5, size=24).astype(np.float32),
        **more,
    }
    np.savez(path, **arrays)
    return arrays


def test_gemma_scope(tmp_path: Path) -> None:
    a = gemma(tmp_path / "params.npz")
    x = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    pre = x @ a["W_enc"] + a["b_enc"]
    latents = pre * (pre > a["threshold"])
    for source in (tmp_path, tmp_path / "params.npz"):
        found = read_autoencoder(source)
        assert isinstance(found, JumpReLUAutoencoder) and not found.centred
        np.testing.assert_allclose(found.encode(torch.from_numpy(x)).detach().numpy(), latents, rtol=1e-5, atol=1e-5)
        expected = latents @ a["W_dec"] + a["b_dec"]
        np.testing.assert_allclose(found(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_objects_in_a_npz_are_not_unpickled(tmp_path: Path) -> None:
    gemma(tmp_path / "params.npz", b_dec=np.array([object()]))
    with pytest.raises(CheckpointError, match="arrays of numbers only"):
        read_autoencoder(tmp_path)
    gemma(tmp_path / "params.npz", scaling_factor=np.float32(2.0))
    with pytest.raises(CheckpointError, match="scaling_factor"):
        read_autoencoder(tmp_path)
    (tmp_path / "params.npz").write_bytes(b"PK nothing")
    with pytest.raises(CheckpointError, match="not readable"):
        read_autoencoder(tmp_path)


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "ae.pt").write_bytes(b"\x80\x04.")
    for source in (tmp_path, tmp_path / "ae.pt"):
        with pytest.raises(CheckpointError, match=r"it is a pickle.*save_model"):
            read_autoencoder(source)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"architecture": "transcoder"}, "'transcoder' is not known"),
        ({"normalize_activations": "layer_norm"}, "fold it into the weights"),
        ({"metadata": {}}, "SAELens before 6"),
        ({"d_sae": 25}, "not those of its cfg.json"),
        ({"k": 0}, "not as they should be"),
        ({"d_in": "eight"}, "not as they should be"),
    ],
)
def test_a_config_that_says_something_else(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    folder = write_autoencoder(made(), tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match="changed since"):
        read_autoencoder(folder)
    (folder / "actkit.sha256").unlink()
    with pytest.raises(CheckpointError, match=text):
        read_autoencoder(folder)


def test_weights_that_are_damaged_or_of_another_kind(tmp_path: Path) -> None:
    folder = write_autoencoder(made(), tmp_path / "sae")
    (folder / "actkit.sha256").unlink()
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "W_skip": torch.zeros(8, 8)}, path)
    with pytest.raises(CheckpointError, match="W_skip"):
        read_autoencoder(folder)
    save_file({name: value for name, value in tensors.items() if name != "b_dec"}, path)
    with pytest.raises(CheckpointError, match="b_dec"):
        read_autoencoder(folder)
    path.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="copy the folder again"):
        read_autoencoder(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="neither sae_weights"):
        read_autoencoder(folder)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        read_autoencoder(folder)
    with pytest.raises(CheckpointError, match="there is nothing"):
        read_autoencoder(tmp_path / "none")


def test_a_folder_is_replaced_only_if_it_is_one(tmp_path: Path) -> None:
    folder = write_autoencoder(made(), tmp_path / "sae")
    with pytest.raises(CheckpointError, match="exists already"):
        write_autoencoder(made(), folder)
    write_autoencoder(made("gated"), folder, overwrite=True)
    assert read_autoencoder(folder).kind == "gated"
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="something else"):
        write_autoencoder(made(), folder, overwrite=True)
    assert (folder / "mine.txt").exists()


def test_sixteen_bits_stay(tmp_path: Path) -> None:
    found = read_autoencoder(write_autoencoder(made().bfloat16(), tmp_path / "sae"))
    assert found.decoder.dtype == torch.bfloat16 and found(torch.randn(2, 8)).dtype == torch.float32
    assert isinstance(found, TopKAutoencoder)
