"""Interpretation beside the packages that others use: the largest difference of each number that both compute.

    make interpretation-peers                               # installs the peers into .venv-interpretation
    python benchmarks/interpretation_parity.py [--only PEER ...] [--json PATH|-]

Random models of two blocks (a Llama with grouped queries and a GPT-2, float32) and random rows, the same weights in
both; autoencoders of 8 channels and 24 latents. Each peer runs in a process of its own, as lxt changes classes of
transformers. What each is compared on stands in the rows; bounds are those that were set before the first run. A peer
that is not there or does not run is a row that says so.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import common  # isort: skip
import torch
from peers import add_peers, hooked_transformer
from torch import Tensor

from actkit import zoo
from actkit.core.forward.hooks import evaluating
from actkit.core.model.anatomy import anatomy
from actkit.core.model.transformer_lens_names import SAME
from actkit.core.watch.capture import live
from actkit.core.watch.intervene import intervene
from actkit.core.watch.site_changes import Scale
from actkit.data import load_data
from actkit.interpretation.relp.effects import patch_effects, read_pair
from actkit.interpretation.relp.metrics import LogitDifference
from actkit.interpretation.relp.rules import RelevanceRules
from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder
from actkit.interpretation.sparse_autoencoder.files import read_autoencoder, write_autoencoder
from actkit.interpretation.sparse_autoencoder.kinds import KINDS
from actkit.testing import tiny_model

ROWS, LENGTH = 3, 7
Row = dict[str, Any]


def compared(what: str, found: Any, expected: Any, bound: float, note: str = "") -> Row:
    """A row: how far apart two tensors are, relative to the largest number above 1."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    if found.shape != expected.shape:
        return {"what": what, "difference": None, "bound": bound, "met": False, "note": f"shapes {found.shape}"}
    scale = max(1.0, float(expected.abs().max()))
    difference = float((found - expected).abs().max()) / scale
    return {"what": what, "difference": difference, "bound": bound, "met": difference <= bound, "note": note}


def pair(kind: str) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], LogitDifference]:
    """A model, two inputs, and a difference of logits."""
    model = tiny_model(kind, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    base, patch = (torch.randint(2, model.config.vocab_size, (ROWS, LENGTH), generator=generator) for _ in range(2))
    right, wrong = torch.randint(2, model.config.vocab_size, (2, ROWS), generator=generator)
    return model, {"input_ids": base}, {"input_ids": patch}, LogitDifference(right, wrong)


# -- TransformerLens ---------------------------------------------------------------------------------------------------


def transformer_lens() -> list[Row]:
    """Values at all names that both have, and exact patching."""
    from transformer_lens.patching import get_act_patch_block_every

    rows = []
    for kind in ("llama", "gpt2"):
        model, base, patch, metric = pair(kind)
        hooked = hooked_transformer(model)
        names = [name for name in SAME if kind == "llama" or "rot" not in name]
        with torch.no_grad(), live(model, names) as found:
            logits = model(**base).logits
        theirs, cache = hooked.run_with_cache(base["input_ids"])
        rows.append(compared(f"{kind}, logits", theirs, logits, 1e-5))
        for name in names:
            pairs = []
            for index in range(hooked.cfg.n_layers):
                own = found[f"blocks.{index}.{SAME[name]}"][0]
                other = cache[f"blocks.{index}.{name}"]
                if other.dim() == 4 and own.dim() == 3:  # heads side by side
                    other = other.flatten(2)
                if name.startswith("attn.") and own.dim() == 4 and other.shape != own.shape:
                    other = other.transpose(1, 2)
                seen = other.isfinite()
                pairs.append((own[seen], other[seen]))
            mine, others = (torch.cat([each[side] for each in pairs]) for side in (0, 1))
            rows.append(compared(f"{kind}, values at the same name: {name}", mine, others, 1e-5, f"ours: {SAME[name]}"))
        with torch.no_grad():
            _, clean = hooked.run_with_cache(patch["input_ids"])
            every = get_act_patch_block_every(hooked, base["input_ids"], clean, metric)
        sites = ("block.input", "attention.output", "mlp.output")
        ours = patch_effects(model, base, patch, metric, sites=sites, method="exact", progress=False)
        stacked = torch.stack([ours.values[site] for site in sites]) + ours.base
        rows.append(compared(f"{kind}, patching.get_act_patch_block_every", stacked, every, 1e-5, "method 'exact'"))
    return rows


# -- captum, nnsight, lxt ----------------------------------------------------------------------------------------------


def captum() -> list[Row]:
    """Gradients times activations, and integrated gradients."""
    from captum.attr import LayerGradientXActivation, LayerIntegratedGradients

    rows = []
    for kind in ("llama", "gpt2"):
        model, base, patch, metric = pair(kind)
        blocks = model.model.layers if kind == "llama" else model.transformer.h

        def answer(ids: Tensor, model: Any = model, metric: LogitDifference = metric) -> Tensor:
            logits = model(input_ids=ids).logits
            copies = len(ids) // ROWS  # steps of integrated gradients come as more rows
            return LogitDifference(metric.right.repeat(copies), metric.wrong.repeat(copies)).of_rows(logits)

        own, others = [], []
        with evaluating(model):
            run, places = read_pair(model, base, patch, metric, ["block.output"])
            zeros = {site: torch.zeros_like(run.other[site]) for site in places}  # as a patch run would give
            effects = replace(run, other=zeros).first_order()
            own = [effects[site] for site in places]
        for block in blocks:
            given = LayerGradientXActivation(answer, block).attribute(base["input_ids"])
            others.append(-_first(given).sum((0, 2)) / ROWS)  # ours are of the mean over rows
        note = "attribution with a patch run of zeros, negated"
        rows.append(compared(f"{kind}, LayerGradientXActivation", torch.stack(own), torch.stack(others), 1e-6, note))
        ours = patch_effects(
            model, base, patch, metric, sites=["block.output"], method="integrated", steps=10, progress=False
        )
        others = []
        for block in blocks:
            given = LayerIntegratedGradients(answer, block).attribute(
                patch["input_ids"], base["input_ids"], n_steps=10, method="riemann_left"
            )
            others.append(_first(given).sum((0, 2)) / ROWS)
        what = f"{kind}, LayerIntegratedGradients, 10 steps, riemann_left"
        rows.append(compared(what, ours.values["block.output"], torch.stack(others), 1e-6, "method 'integrated'"))
    return rows


def _first(given: Any) -> Tensor:
    return given[0] if isinstance(given, tuple) else given


def nnsight() -> list[Row]:
    """The logits of one model under the same change."""
    from nnsight import NNsight

    rows = []
    for kind in ("llama", "gpt2"):
        model, base, _, _ = pair(kind)
        site, name = ("model.layers", "layers") if kind == "llama" else ("transformer.h", "h")
        with torch.no_grad(), intervene(model, {"blocks.1.mlp.output": Scale(0.5, positions=[2, 3])}):
            ours = model(**base).logits
        wrapped = NNsight(model)
        blocks = getattr(wrapped.model if kind == "llama" else wrapped.transformer, name)
        with torch.no_grad(), wrapped.trace(**base):
            blocks[1].mlp.output[:, 2:4] = blocks[1].mlp.output[:, 2:4] * 0.5
            theirs = wrapped.lm_head.output.save()
        rows.append(compared(f"{kind}, logits, {site}[1].mlp halved at two positions", ours, theirs, 0.0, "intervene"))
    return rows


def lxt() -> list[Row]:
    """AttnLRP: relevance of the input embeddings, gradient times input."""
    import lxt as lxt_package
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    # Importing lxt.efficient imports all of its models, for which torchvision is needed and functions that transformers
    # 5 no longer has. Its `monkey_patch` also wraps a table of attention functions that is read in another way there.
    # So its functions are imported alone, and put in by hand.
    for name in ("lxt.efficient", "lxt.efficient.models"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(next(iter(lxt_package.__path__)), *name.split(".")[1:]))]
        sys.modules[name] = package
    from lxt.efficient import patches
    from lxt.efficient.models import gpt2 as of_gpt2

    models = {kind: pair(kind) for kind in ("llama", "gpt2")}
    ours = {}
    for kind, (model, base, _, metric) in models.items():
        with RelevanceRules.attnlrp().applied(anatomy(model)):
            ours[kind] = _relevance(model, base, metric)
        ours[f"{kind}, plain"] = _relevance(model, base, metric)
    ALL_ATTENTION_FUNCTIONS.register("lxt", patches.wrap_attention_forward(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    ALL_MASK_ATTENTION_FUNCTIONS.register("lxt", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    patches.patch_method(patches.gated_mlp_forward, LlamaMLP)
    patches.patch_method(patches.rms_norm_forward, LlamaRMSNorm)
    patches.patch_method(of_gpt2.mlp_forward, GPT2MLP)
    patches.patch_method(patches.layer_norm_forward, torch.nn.LayerNorm)
    rows = []
    for kind, (model, base, _, metric) in models.items():
        model.config._attn_implementation = "lxt"
        theirs = _relevance(model, base, metric)
        plain = float((ours[f"{kind}, plain"] - theirs).abs().max())
        note = f"RelevanceRules.attnlrp(); without rules {plain:.2g} apart"
        rows.append(compared(f"{kind}, AttnLRP of the embedded tokens", ours[kind], theirs, 1e-4, note))
    return rows


def _relevance(model: Any, base: dict[str, Tensor], metric: LogitDifference) -> Tensor:
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(base["input_ids"]).detach().requires_grad_()
        value = metric(model(inputs_embeds=embedded).logits)
        (gradient,) = torch.autograd.grad(value, embedded)
    return (gradient * embedded).detach().sum(-1)


def torchcam() -> list[Row]:
    """Class activation maps of the second convolution of the zoo's `cnn`, as they are, by two methods."""
    from torchcam.methods import GradCAM, LayerCAM

    from actkit.interpretation.doei.maps import gradient_maps

    model: Any = zoo.load("cnn").eval()
    batch = load_data(None, model, split="test", sequences=8, batch_size=8)[0]
    images = batch["pixel_values"] if isinstance(batch, dict) else batch
    with torch.no_grad():
        classes = model(images).argmax(1)
    rows = []
    for method, peer in (("grad_cam", GradCAM), ("layer_cam", LayerCAM)):
        found = gradient_maps(model, batch, classes[:, None], method, site="layer.output:conv2")[:, 0]  # type: ignore[arg-type]
        with peer(model, model.conv2) as extractor:
            theirs = extractor(classes.tolist(), model(images), normalized=False)[0]
        rows.append(compared(f"cnn, {peer.__name__}", found, theirs.detach(), 1e-5))
    return rows


# -- autoencoders ------------------------------------------------------------------------------------------------------


def noisy(module: Any) -> Any:
    """Biases and thresholds that are not 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.01, 0.3, generator=generator)
    return module


def made(kind: str, **settings: Any) -> SparseAutoencoder:
    """One of 8 channels and 24 latents."""
    torch.manual_seed(0)
    counted = {"k": 5} if kind in ("topk", "batchtopk", "matryoshka") else {}
    autoencoder = noisy(KINDS[kind](8, 24, **{**counted, **settings}))
    if kind in ("batchtopk", "matryoshka"):
        autoencoder.threshold.fill_(0.2)
    autoencoder.site = "blocks.3.block.output"
    return autoencoder.eval()


def rows_of() -> Tensor:
    """Of activations."""
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def sae_lens() -> list[Row]:
    """Folders both ways, of all kinds, centred or not."""
    from sae_lens import SAE

    x, rows = rows_of(), []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for centred in (True, False):
                own = made(kind, centred=centred)
                name = f"{kind}{'' if centred else ', not centred'}"
                theirs = SAE.load_from_disk(str(write_autoencoder(own, Path(folder) / name, overwrite=True)))
                rows.append(compared(f"opens ours: {name}, latents", theirs.encode(x), own.encode(x), 1e-5))
                rows.append(compared(f"opens ours: {name}, reconstruction", theirs(x), own(x), 1e-5))
                theirs.save_model(Path(folder) / f"theirs {name}")
                back = read_autoencoder(Path(folder) / f"theirs {name}")
                rows.append(compared(f"ours opens its: {name}, latents", back.encode(x), theirs.encode(x), 1e-5))
                rows.append(compared(f"ours opens its: {name}, reconstruction", back(x), theirs(x), 1e-5))
    return rows


def sparsify() -> list[Row]:
    """Folders both ways, the decoder, and the gradients of the error."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    x, rows = rows_of(), []
    with tempfile.TemporaryDirectory() as folder:
        own = made("topk")
        theirs = SparseCoder.load_from_disk(write_autoencoder(own, Path(folder) / "ours", form="sparsify"))
        code = theirs.encode(x)
        decoded = theirs.decode(code.top_acts, code.top_indices)
        rows.append(compared("opens ours, decode", decoded, own(x), 1e-5))
        torch.manual_seed(1)
        other = noisy(SparseCoder(8, SparseCoderConfig(k=5, num_latents=24)))
        other.save_to_disk(Path(folder) / "theirs")
        code, back = other.encode(x), read_autoencoder(Path(folder) / "theirs")
        rows.append(compared("ours opens its, decode", back(x), other.decode(code.top_acts, code.top_indices), 1e-5))
    own.train()
    error, fvu = own.losses(x)["error"], theirs(x).fvu
    rows.append(compared("loss (FVU)", error, fvu, 1e-5))
    mine = torch.autograd.grad(error, [own.encoder, own.encoder_bias, own.decoder, own.decoder_bias])
    others = torch.autograd.grad(fvu, [theirs.encoder.weight, theirs.encoder.bias, theirs.W_dec, theirs.b_dec])
    for name, one, other in zip(
        ("encoder", "bias of the encoder", "decoder", "bias of the decoder"), mine, others, strict=True
    ):
        rows.append(compared(f"gradients: {name}", one, other, 1e-5))
    return rows


def dictionary_learning() -> list[Row]:
    """The loss of each trainer on the same weights and rows."""
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    x, rows = rows_of(), []
    common: dict[str, Any] = {"steps": 5000, "activation_dim": 8, "dict_size": 24, "layer": 0, "lm_name": "a"}
    common["device"] = "cpu"
    own: Any

    trainer: Any = TopKTrainer(k=5, **common)
    its, own = noisy(trainer.ae), KINDS["topk"](8, 24, 5)
    with torch.no_grad():
        own.encoder.copy_(its.encoder.weight)
        own.encoder_bias.copy_(its.encoder.bias)
        own.decoder.copy_(its.decoder.weight.T)
        own.decoder_bias.copy_(its.b_dec)
    variance = (x - x.mean(0)).square().sum() / len(x)  # ours is a share of it
    rows.append(compared("loss: TopKTrainer, over the variance", own.loss(x), trainer.loss(x, step=0) / variance, 1e-5))

    trainer = GatedSAETrainer(l1_penalty=0.3, **common)
    its, own = noisy(trainer.ae), KINDS["gated"](8, 24, sparsity=0.3)
    trainer.sparsity_warmup_fn = lambda step: 1.0
    with torch.no_grad():
        own.encoder.copy_(its.encoder.weight)
        own.encoder_bias.copy_(its.gate_bias)
        own.log_scale.copy_(its.r_mag)
        own.magnitude_bias.copy_(its.mag_bias)
        own.decoder.copy_(its.decoder.weight.T)
        own.decoder_bias.copy_(its.decoder_bias)
    rows.append(compared("loss: GatedSAETrainer", own.loss(x), trainer.loss(x, step=0), 1e-5))

    trainer = JumpReluTrainer(target_l0=3.0, sparsity_penalty=0.3, bandwidth=0.001, **common)
    its, own = noisy(trainer.ae), KINDS["jumprelu"](8, 24, sparsity=0.3, target=3.0)
    trainer.sparsity_warmup_fn = lambda step: 1.0
    with torch.no_grad():
        own.encoder.copy_(its.W_enc.T)
        own.encoder_bias.copy_(its.b_enc)
        own.threshold.copy_(its.threshold)
        own.decoder.copy_(its.W_dec)
        own.decoder_bias.copy_(its.b_dec)
    rows.append(compared("loss: JumpReluTrainer", own.loss(x), trainer.loss(x, step=0), 1e-5))

    trainer = StandardTrainer(l1_penalty=0.3, **common)
    its, own = noisy(trainer.ae), KINDS["standard"](8, 24, sparsity=0.3)
    trainer.sparsity_warmup_fn = lambda step: 1.0
    with torch.no_grad():  # its penalty leaves the directions' norms out, and both keep them at 1
        its.decoder.weight.div_(its.decoder.weight.norm(dim=0))
        own.encoder.copy_(its.encoder.weight)
        own.encoder_bias.copy_(its.encoder.bias)
        own.decoder.copy_(its.decoder.weight.T)
        own.decoder_bias.copy_(its.bias)
    rows.append(compared("loss: StandardTrainer, directions of norm 1", own.loss(x), trainer.loss(x, step=0), 1e-5))
    return rows


# -- all of them -------------------------------------------------------------------------------------------------------

PEERS: dict[str, tuple[str, Callable[[], list[Row]]]] = {
    "transformer-lens": ("transformer-lens", transformer_lens),
    "captum": ("captum", captum),
    "nnsight": ("nnsight", nnsight),
    "lxt": ("lxt", lxt),
    "torchcam": ("torchcam", torchcam),
    "sae-lens": ("sae-lens", sae_lens),
    "sparsify": ("eai-sparsify", sparsify),
    "dictionary-learning": ("dictionary-learning", dictionary_learning),
}


def one(name: str) -> list[Row]:
    """The rows of one peer, in this process."""
    package, compare = PEERS[name]
    torch.manual_seed(0)
    about = {"peer": name, "version": "", "what": ""}
    try:
        about["version"] = importlib.metadata.version(package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [{**about, **row} for row in compare()]
    except Exception as error:  # whatever a peer does
        traceback.print_exc()
        note = f"did not run: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return [{**about, "difference": None, "bound": None, "met": None, "note": note[:160]}]


def main() -> None:
    """Compare, print and record."""
    if sys.argv[1:2] == ["--one"]:
        add_peers()
        torch.set_num_threads(1)
        Path(sys.argv[3]).write_text(json.dumps(one(sys.argv[2])), encoding="utf-8")
        return
    chosen = common.options(__doc__ or "", parts=list(PEERS))
    before = common.committed("interpretation_parity") or {"rows": []}
    rows: list[Row] = []
    for name in PEERS:
        if name not in chosen.only:
            rows += [row for row in before["rows"] if row["peer"] == name]
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            subprocess.run([sys.executable, __file__, "--one", name, str(path)], check=False)
            if path.exists():
                rows += json.loads(path.read_text(encoding="utf-8"))
            else:
                rows.append({"peer": name, "version": "", "what": "", "note": "did not run: its process ended"})
    common.report("interpretation_parity", rows, [], chosen, keep=not chosen.quick)


if __name__ == "__main__":
    main()
