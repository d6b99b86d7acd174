"""Sparse autoencoders on disk, as the tools that others use read and write them.

    SAELens 6       cfg.json, sae_weights.safetensors: W_enc [d, n], W_dec [n, d], b_dec, and by `architecture`
                    b_enc (standard, topk), b_enc and threshold (jumprelu), b_gate, r_mag and b_mag (gated)
    sparsify        cfg.json, sae.safetensors: encoder.weight [n, d], encoder.bias, W_dec [n, d], b_dec; topk alone
    Gemma Scope     params.npz: W_enc, W_dec, b_enc, b_dec, threshold; a JumpReLU that is not centred; read only

What a file holds that would change the numbers and is not known here is refused by name. Nothing is unpickled:
dictionary_learning's `ae.pt` is a pickle, and SAELens makes a folder of it that is none.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.whole_folder import complete_or_nothing, recover
from actkit.core.model.sites import Site
from actkit.core.model.transformer_lens_names import SAME, our_name
from actkit.core.store import checksums
from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder
from actkit.interpretation.sparse_autoencoder.gates import GatedAutoencoder, JumpReLUAutoencoder
from actkit.interpretation.sparse_autoencoder.top_k import TopKAutoencoder

Format = Literal["saelens", "sparsify"]
CONFIG, SAELENS, SPARSIFY, GEMMA = "cfg.json", "sae_weights.safetensors", "sae.safetensors", "params.npz"
BESIDE = ("report.json", "training.json", checksums.NAME)
VERSION = "6.0.0"  # of SAELens, whose folders since then have this form; without one it takes a folder for an old one

Tensors = dict[str, Tensor]
NAMES: dict[str, dict[str, str]] = {  # ours -> SAELens'
    "standard": {"encoder_bias": "b_enc"},
    "topk": {"encoder_bias": "b_enc"},
    "jumprelu": {"encoder_bias": "b_enc", "threshold": "threshold"},
    "gated": {"encoder_bias": "b_gate", "log_scale": "r_mag", "magnitude_bias": "b_mag"},
}


# -- writing -----------------------------------------------------------------------------------------------------------


def write_autoencoder(
    autoencoder: SparseAutoencoder, folder: str | Path, *, form: Format = "saelens", overwrite: bool = False
) -> Path:
    """Write an autoencoder as another tool reads it; one of the kinds batchtopk and matryoshka becomes jumprelu.

    Args:
        autoencoder: any.
        folder: that is written whole, or not at all.
        form: 'saelens' or 'sparsify'.
        overwrite: replace an autoencoder that is there.

    Returns:
        The folder.

    Raises:
        ValueError: the form is unknown, or does not hold this kind.
        CheckpointError: the folder exists, holds something else, or cannot be written.
    """
    if form not in get_args(Format):
        raise ValueError(f"form: {form!r} was given, allowed are {', '.join(get_args(Format))}.")
    folder, kept = Path(folder), autoencoder.finished()
    recover(folder)
    if folder.exists() and not overwrite:
        raise CheckpointError(f"folder: {folder} exists already; choose another one, or pass overwrite=True.")
    if folder.exists() and (not folder.is_dir() or not _replaceable(folder)):
        raise CheckpointError(
            f"folder: {folder} holds something else than a sparse autoencoder, which overwriting would delete; choose "
            f"another folder."
        )
    config, tensors, name = (_saelens_parts if form == "saelens" else _sparsify_parts)(kept)
    with complete_or_nothing(folder) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary / name)
        (temporary / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        checksums.write(temporary)
    return folder


def _replaceable(folder: Path) -> bool:
    known = {CONFIG, SAELENS, SPARSIFY, *BESIDE}
    return all(path.name in known for path in folder.iterdir())


def _saelens_parts(kept: SparseAutoencoder) -> tuple[dict[str, Any], Tensors, str]:
    hook = _hook_of(kept.site)
    config: dict[str, Any] = {
        "architecture": kept.kind,
        "d_in": kept.channels,
        "d_sae": kept.latents,
        "dtype": str(kept.decoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": kept.centred,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if hook is not None and hook.endswith("hook_z") else "none",
    }
    if isinstance(kept, TopKAutoencoder):
        config |= {"k": kept.k, "rescale_acts_by_decoder_norm": False}
    config["metadata"] = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "hook_name": hook,
        "actkit_site": kept.site,
        "actkit_model": kept.model,
    }
    own = dict(kept.named_parameters())
    tensors = {theirs: own[ours] for ours, theirs in NAMES[kept.kind].items()}
    return config, tensors | {"W_enc": own["encoder"].T, "W_dec": own["decoder"], "b_dec": own["decoder_bias"]}, SAELENS


def _sparsify_parts(kept: SparseAutoencoder) -> tuple[dict[str, Any], Tensors, str]:
    if not isinstance(kept, TopKAutoencoder) or not kept.centred:
        raise ValueError(
            f"form: sparsify holds centred topk autoencoders, and this one is {kept.kind}, "
            f"{'centred' if kept.centred else 'not centred'}; write it as 'saelens'."
        )
    config = {
        "activation": "topk",
        "expansion_factor": -(-kept.latents // kept.channels),
        "normalize_decoder": True,
        "num_latents": kept.latents,
        "k": kept.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": kept.channels,
        "actkit_site": kept.site,
        "actkit_model": kept.model,
    }
    tensors: Tensors = {
        "encoder.weight": kept.encoder,
        "encoder.bias": kept.encoder_bias,
        "W_dec": kept.decoder,
        "b_dec": kept.decoder_bias,
    }
    return config, tensors, SPARSIFY


def _hook_of(site: str | None) -> str | None:
    """The name that TransformerLens has for a site; None if it has none."""
    if site is None:
        return None
    block, _, name = site.rpartition(".") if site.count(".") == 1 else re.split(r"(?<=\d)(\.)", site, maxsplit=1)
    theirs = next((hook for hook, ours in SAME.items() if ours == name), None)
    return None if theirs is None else f"{block}.{theirs}"


# -- reading -----------------------------------------------------------------------------------------------------------


def read_autoencoder(source: str | Path) -> SparseAutoencoder:
    """Open an autoencoder of SAELens 6, of sparsify, of Gemma Scope, or of `write_autoencoder`.

    Args:
        source: the folder, or a file `params.npz`.

    Returns:
        The autoencoder in the dtype of its file, in evaluation mode.

    Raises:
        CheckpointError: nothing is there, it is damaged, a pickle, or of a kind that is not known here.
    """
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    if not source.exists():
        raise CheckpointError(f"{source}: there is nothing; give a folder of SAELens or sparsify, or a params.npz.")
    if source.is_dir() and not (folder / CONFIG).exists() and (folder / GEMMA).exists():
        source = folder / GEMMA
    if source.name.endswith(".npz"):
        return _gemma(source).eval()
    pickles = [path for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".pkl", ".bin")]
    if source.suffix in (".pt", ".pth", ".pkl", ".bin") or (pickles and not (folder / CONFIG).exists()):
        raise CheckpointError(
            f"{source if source.is_file() else pickles[0]}: it is a pickle, which can run any code when it is opened, "
            f"and is not read here. If you trust it, open it with SAELens (its loader dictionary_learning_1) and write "
            f"it with save_model, whose folder this reads."
        )
    checksums.verify(folder)
    config = _config(folder / CONFIG)
    for name, build in ((SAELENS, _saelens), (SPARSIFY, _sparsify)):
        if (folder / name).exists():
            return _built(folder, config, _tensors(folder / name), build).eval()
    raise CheckpointError(f"{folder}: there is neither {SAELENS} nor {SPARSIFY}; give a folder that holds one.")


def _built(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    build: Callable[[Mapping[str, Any], Tensors], tuple[SparseAutoencoder, Tensors]],
) -> SparseAutoencoder:
    try:
        made, own = build(config, tensors)
        given, wanted = {name: value.shape for name, value in own.items()}, dict(made.named_parameters())
        if tensors or given != {name: value.shape for name, value in wanted.items()}:
            different = [name for name in wanted if given.get(name) != wanted[name].shape]
            raise CheckpointError(
                f"{folder}: its tensors are not those of its {CONFIG}: {', '.join([*different, *tensors])}; write it "
                f"again with the tool that made it."
            )
        made.to(own["decoder"].dtype)
        made.load_state_dict(own, strict=False)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {CONFIG} or its tensors are not as they should be ({error!r}).") from error
    return made


def _saelens(config: Mapping[str, Any], tensors: Tensors) -> tuple[SparseAutoencoder, Tensors]:
    metadata = config.get("metadata") or {}
    version = str(metadata.get("sae_lens_version") or config.get("sae_lens_version") or "0")
    if int(version.partition(".")[0]) < 6:
        raise CheckpointError(
            f"{CONFIG}: it is of SAELens before 6 ({version}); open it with SAELens 6 and save_model, which writes the "
            f"form of today."
        )
    kind = config["architecture"]
    if kind not in NAMES:
        raise CheckpointError(f"{CONFIG}: architecture {kind!r} is not known here; {', '.join(NAMES)} are.")
    if config.get("normalize_activations", "none") != "none":
        raise CheckpointError(
            f"{CONFIG}: normalize_activations is {config['normalize_activations']!r}; fold it into the weights with "
            f"SAELens (fold_activation_norm_scaling_factor) and save_model."
        )
    channels, latents, centred = config["d_in"], config["d_sae"], bool(config.get("apply_b_dec_to_input", True))
    made: SparseAutoencoder
    if kind == "topk":
        made = TopKAutoencoder(channels, latents, config["k"], centred=centred)
    elif kind == "jumprelu":
        made = JumpReLUAutoencoder(channels, latents, centred=centred)
    else:
        made = (GatedAutoencoder if kind == "gated" else SparseAutoencoder)(channels, latents, centred=centred)
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    own = {ours: tensors.pop(theirs) for ours, theirs in NAMES[kind].items()}
    own |= {"encoder": tensors.pop("W_enc").T, "decoder": tensors.pop("W_dec"), "decoder_bias": tensors.pop("b_dec")}
    if kind == "topk" and config.get("rescale_acts_by_decoder_norm", False):
        norms = own["decoder"].norm(dim=1).clamp_min(1e-8)
        own["encoder"], own["encoder_bias"] = own["encoder"] * norms[:, None], own["encoder_bias"] * norms
        own["decoder"] = own["decoder"] / norms[:, None]
    made.site = metadata.get("actkit_site") or _site_of(metadata.get("hook_name"))
    made.model = metadata.get("actkit_model")
    return made, own


def _sparsify(config: Mapping[str, Any], tensors: Tensors) -> tuple[SparseAutoencoder, Tensors]:
    for name, wanted in (("activation", "topk"), ("transcode", False), ("skip_connection", False)):
        if config.get(name, wanted) != wanted:
            raise CheckpointError(f"{CONFIG}: {name} is {config[name]!r}, and {wanted!r} is what can be read here.")
    channels = config["d_in"]
    latents = config.get("num_latents") or channels * config["expansion_factor"]
    made = TopKAutoencoder(channels, latents, config["k"])
    made.site, made.model = config.get("actkit_site"), config.get("actkit_model")
    names = {"encoder": "encoder.weight", "encoder_bias": "encoder.bias", "decoder": "W_dec", "decoder_bias": "b_dec"}
    return made, {ours: tensors.pop(theirs) for ours, theirs in names.items()}


def _gemma(path: Path) -> SparseAutoencoder:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: not readable ({error}); give the params.npz of Gemma Scope, which holds arrays of numbers only."
        ) from error
    tensors = {f"W_{name[2:]}" if name.startswith("w_") else name: value for name, value in found.items()}
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        raise CheckpointError(f"{path}: it holds a scaling_factor that is not 1, which is not known here.")

    def build(config: Mapping[str, Any], tensors: Tensors) -> tuple[SparseAutoencoder, Tensors]:
        latents, channels = tensors["W_dec"].shape
        names = {**NAMES["jumprelu"], "decoder": "W_dec", "decoder_bias": "b_dec"}
        own = {ours: tensors.pop(theirs) for ours, theirs in names.items()}
        return JumpReLUAutoencoder(channels, latents), own | {"encoder": tensors.pop("W_enc").T}

    return _built(path, {}, tensors, build)


def _site_of(hook: Any) -> str | None:
    try:
        return str(Site.parse(our_name(hook))) if isinstance(hook, str) else None
    except ValueError:  # a hook that is no site: it is opened, and whoever names a site says which
        return None


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error}); give a folder of SAELens or sparsify.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: it is no JSON object, so it is damaged; copy the folder again.")
    return found


def _tensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not readable ({error}); copy the folder again.") from error
