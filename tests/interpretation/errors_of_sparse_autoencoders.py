"""How a user meets the errors of sparse autoencoders: one function per way, which raises it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_models import batches, build

from actkit.core.watch.intervene import intervene
from actkit.interpretation.dark_matter.error_split import split_error
from actkit.interpretation.dark_matter.spliced_loss import spliced_loss
from actkit.interpretation.relp.latents import latent_effects
from actkit.interpretation.sparse_autoencoder.files import read_autoencoder, write_autoencoder
from actkit.interpretation.sparse_autoencoder.splice import Splice, check_model
from actkit.interpretation.sparse_autoencoder.top_k import TopKAutoencoder
from error_proofs import Place, proof


def saved(p: Place, **changes: Any) -> Path:
    """A folder whose config was changed by hand."""
    folder = write_autoencoder(TopKAutoencoder(4, 8, 2), p.path / "sae")
    (folder / "actkit.sha256").unlink()
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))
    return folder


proof(lambda p: read_autoencoder(p.path / "none"))


@proof
def a_pickle(p: Place) -> None:
    (p.path / "ae.pt").write_bytes(b"")
    read_autoencoder(p.path)


@proof
def no_weights(p: Place) -> None:
    folder = saved(p)
    (folder / "sae_weights.safetensors").unlink()
    read_autoencoder(folder)


@proof
def other_tensors(p: Place) -> None:
    folder = saved(p)
    save_file({"W_enc": torch.zeros(4, 8)}, folder / "sae_weights.safetensors")
    read_autoencoder(folder)


proof(lambda p: read_autoencoder(saved(p, d_sae=9)))


proof(lambda p: read_autoencoder(saved(p, metadata={})))


proof(lambda p: read_autoencoder(saved(p, architecture="transcoder")))


proof(lambda p: read_autoencoder(saved(p, normalize_activations="layer_norm")))


@proof
def a_transcoder_of_sparsify(p: Place) -> None:
    folder = write_autoencoder(TopKAutoencoder(4, 8, 2), p.path / "sae", form="sparsify")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "actkit.sha256").unlink()
    (folder / "cfg.json").write_text(json.dumps({**config, "transcode": True}))
    read_autoencoder(folder)


@proof
def no_config(p: Place) -> None:
    folder = saved(p)
    (folder / "cfg.json").write_text("[]")
    read_autoencoder(folder)


@proof
def no_arrays(p: Place) -> None:
    (p.path / "params.npz").write_bytes(b"none")
    read_autoencoder(p.path)


@proof
def scaled(p: Place) -> None:
    np.savez(p.path / "params.npz", scaling_factor=np.float32(2))
    read_autoencoder(p.path)


@proof
def another_model(p: Place) -> None:
    autoencoder = TopKAutoencoder(4, 8, 2)
    autoencoder.model = "0" * 64
    check_model(autoencoder, build("llama"))


ROWS = torch.ones(20, 4)

proof(lambda p: split_error(TopKAutoencoder(4, 8, 2), [ROWS], [ROWS.clone()]))


proof(lambda p: split_error(TopKAutoencoder(4, 8, 2), [ROWS], [ROWS]))


proof(lambda p: split_error(TopKAutoencoder(4, 8, 2), [torch.randn(7, 4)], [torch.randn(9, 4)]))


proof(lambda p: TopKAutoencoder(4, 8, 2)(torch.ones(3, 5)))


proof(lambda p: TopKAutoencoder(4, 8, 9))


def of_another_site() -> TopKAutoencoder:
    autoencoder = TopKAutoencoder(build("llama").config.hidden_size, 8, 2)
    autoencoder.site = "blocks.0.block.output"
    return autoencoder


@proof
def spliced_at_another_site(p: Place) -> None:
    model = build("llama")
    with intervene(model, {"blocks.1.block.output": Splice(of_another_site())}):
        model(**batches("llama")[0])


@proof
def latents_of_another_site(p: Place) -> None:
    batch, given = batches("llama")[0], {"blocks.1.block.output": of_another_site()}
    latent_effects(build("llama"), batch, batch, lambda logits: logits.mean(), given, progress=False)


def losses(p: Place, skip: int, mask: int = 1) -> None:
    model = build("llama")
    autoencoder = TopKAutoencoder(model.config.hidden_size, 40, 2)
    ids = torch.ones(1, 5, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, mask, mask, mask, mask]])}
    linear = torch.zeros(2 * [model.config.hidden_size])
    spliced_loss(model, [batch], "blocks.0.block.output", autoencoder, linear, skip=skip, progress=False)


proof(lambda p: losses(p, 9))


proof(lambda p: losses(p, 1, 0))
