"""All analyses of actkit, each at one setting on a tiny model; and how tests find what is in no table."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import actkit
from actkit.compression.ap.dead_neurons import dead_neuron_rate
from actkit.compression.flashsvd.flashsvd import FlashSvd
from actkit.compression.flashsvd.memory import activation_bytes
from actkit.compression.minimal.budget import parameter_budget
from actkit.compression.svd import Svd
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.recipe.runner import apply
from actkit.core.store.deltas import Delta, Dense
from actkit.core.train.masks import Masks, layer_weights
from actkit.finetuning.atlas.selection import disentanglement
from actkit.finetuning.eva import Eva
from actkit.finetuning.explained_variance import explained_variance
from actkit.finetuning.lift.probe import weight_probe
from actkit.functions.crrelu.eafo import eafo
from actkit.functions.pangu_pi.collapse import collapse_bound
from actkit.functions.pangu_pi.diversity import diversity
from actkit.functions.polycom.degrees import polynomial_degrees
from actkit.functions.s_kan.basis_choice import basis_choice
from actkit.functions.s_kan.s_kan_layer import SKanLayer
from actkit.functions.selu.self_normalizing import self_normalizing
from actkit.functions.softplus_attention.entropy import attention_entropy
from actkit.functions.softplus_attention.length_curve import extrapolation_curve
from actkit.functions.swap import swap
from actkit.interpretation.dark_matter.error_split import split_error
from actkit.interpretation.dark_matter.widths import compare_widths
from actkit.interpretation.doei.class_activation_maps import class_activation_maps
from actkit.interpretation.lib.lib import lib
from actkit.interpretation.massive_activations.dynamics import dynamics
from actkit.interpretation.massive_activations.law import original_curve
from actkit.interpretation.massive_activations.massive_activations import massive_activations
from actkit.interpretation.neural_code.neural_code import neural_code
from actkit.interpretation.neural_code.phase_chart import PhaseChart, Reading
from actkit.interpretation.pavlovian.capacity import capacity_curve
from actkit.interpretation.pavlovian.head_memory import head_memory
from actkit.interpretation.relp.effects import patch_effects
from actkit.interpretation.relp.latents import latent_effects
from actkit.interpretation.relp.relp import relp
from actkit.interpretation.representational_geometry.representational_geometry import representational_geometry
from actkit.interpretation.sparse_autoencoder.top_k import TopKAutoencoder
from actkit.interpretation.sparse_autoencoder.training import measure_autoencoder
from actkit.quantization.adadim.sensitivity import weight_sensitivity
from actkit.quantization.zeroquant_v2.ptq_study import ptq_study
from actkit.search.profile import profile
from actkit.sparsity.active_dendrites.pattern_simulation import expected_vs_observed
from actkit.sparsity.active_dendrites.pattern_theory import threshold_curve
from actkit.sparsity.cats.gate_sparsity import gate_sparsity
from actkit.sparsity.lazy_neuron.activity_curve import activity_curve
from actkit.sparsity.lazy_neuron.neuron_activity import neuron_activity
from actkit.sparsity.plm.activated_parameters import activated_parameters
from actkit.sparsity.prosparse.fatrelu import sweep_threshold
from actkit.sparsity.r_sparse.importance_map import importance_map
from actkit.sparsity.sparsing_law.activation_ratio import activation_ratio, pareto
from actkit.sparsity.sparsing_law.laws import fit_relu_law, fit_silu_law, fit_width_law, relu_law, silu_law
from actkit.sparsity.sparsing_law.ppl_sparsity import ppl_sparsity
from actkit.testing import tiny_batches, tiny_model


@dataclass(frozen=True)
class Made:
    """An analysis and what it is run on. result: the name of its class. several: it says that processes share it."""

    run: Callable[[Any, Any], Any]
    result: str
    kind: str = "llama"
    relu: bool = False
    several: bool = True

    def model(self) -> Any:
        return tiny_model(self.kind, **({"hidden_act": "relu"} if self.relu else {}))

    def batches(self) -> Any:
        return tiny_batches(self.kind, lengths=((9, 4, 6), (7, 2), (8, 8)))


def quiet(analysis: Callable[..., Any], *places: Any, **settings: Any) -> Callable[[Any, Any], Any]:
    return lambda model, batches: analysis(model, *places, batches, **settings, progress=False)


def curve(model: Any, batches: Any) -> Any:
    return activity_curve({"start": model, "end": model}, batches, progress=False)


def degrees(model: Any, batches: Any) -> Any:
    return polynomial_degrees(swap(model, "silu", "poly_relu", inplace=False).model, batches, progress=False)


def lengths_of(batches: Any) -> Any:
    """Rows of seven tokens."""
    return torch.cat([batch["input_ids"][:, :7] for batch in batches])


def bound(model: Any, batches: Any) -> Any:
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return collapse_bound(model, {"input_ids": batches[0]["input_ids"]})
    finally:
        model.set_attn_implementation(implementation)


def explained(model: Any, batches: Any) -> Any:
    plan = Eva(rank=3).plan(model, batches[:2], progress=False)
    return explained_variance(model, plan, batches, progress=False)


def in_tiles(model: Any, batches: Any) -> Any:
    changed = apply(copy.deepcopy(model), [Svd(), FlashSvd()], progress=False).model
    return activation_bytes(changed, batches[0])


def probed(model: Any, batches: Any) -> Any:
    masks = {"all": Masks.all_of(layer_weights(model))}
    return weight_probe(model, masks, lambda model: float(model(**batches[0]).logits.detach().std()), progress=False)


def disturbed_tasks(model: Any, batches: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(each.shape, generator=generator) for name, each in model.named_parameters()}
    vectors = {
        task: scale * Delta({name: Dense(each) for name, each in drawn.items()}) for task, scale in TASKS.items()
    }
    return disentanglement(model, vectors, dict.fromkeys(TASKS, batches[:1]))


def chosen(layer: SKanLayer) -> SKanLayer:
    layer.hard.fill_(1.0)
    return layer


def effects(model: Any, batches: Any) -> Any:
    other = {**batches[0], "input_ids": batches[0]["input_ids"].flip(0)}
    return patch_effects(model, batches[0], other, lambda logits: logits[:, 0].mean(), tokens="abc", progress=False)


def of_latents(model: Any, batches: Any) -> Any:
    other = {**batches[0], "input_ids": batches[0]["input_ids"].flip(0)}
    with own_random_numbers(torch.device("cpu"), 0):
        coders = {"blocks.0.block.output": TopKAutoencoder(model.config.hidden_size, 24, 3).eval()}
    return latent_effects(model, batches[0], other, lambda logits: logits[:, 0].mean(), coders, exact=3, progress=False)


def of_an_autoencoder() -> Any:
    return measure_autoencoder(TopKAutoencoder(4, 8, 2), [torch.randn(30, 4)])


def of_an_error() -> Any:
    torch.manual_seed(0)
    return split_error(TopKAutoencoder(4, 8, 2), [torch.randn(30, 4)], [torch.randn(20, 4)])


def of_widths() -> Any:
    torch.manual_seed(0)
    coders = [TopKAutoencoder(4, width, 2) for width in (8, 9)]
    return compare_widths(coders, [torch.randn(60, 4)], [torch.randn(50, 4)])


def pairs(model: Any, batches: Any) -> Any:
    base = batches[0]["input_ids"]
    answers = {"right": base[:, 0], "wrong": base[:, 1]}
    given = {"input_ids": base, "clean_input_ids": base.flip(0), **answers, "tokens": ("<b>",) * base.shape[1]}
    return relp(model, [given], checked=2, progress=False)


def geometry(model: Any, batches: Any) -> Any:
    count = sum(len(batch["input_ids"]) for batch in batches)
    conditions = torch.arange(count) % 2
    return representational_geometry(model, batches, conditions=conditions, progress=False)


TASKS = {"one": 0.1, "other": -0.2}
ANALYSES: dict[str, Made] = {
    "representational_geometry": Made(geometry, "RepresentationalGeometry"),
    "latent_effects": Made(of_latents, "LatentEffects", several=False),
    "relp": Made(pairs, "PatchEffects", several=False),
    "patch_effects": Made(effects, "PatchEffects", several=False),
    "dead_neuron_rate": Made(quiet(dead_neuron_rate), "DeadNeurons", relu=True),
    "dead_neuron_rate of images": Made(quiet(dead_neuron_rate, granularity="channel", eps=0.1), "DeadNeurons", "vit"),
    "activation_bytes": Made(in_tiles, "ActivationBytes", several=False),
    "explained_variance": Made(explained, "ExplainedVariance"),
    "weight_probe": Made(probed, "WeightProbe", several=False),
    "disentanglement": Made(disturbed_tasks, "Disentanglement", several=False),
    "profile": Made(quiet(profile), "Profile"),
    "profile of experts": Made(quiet(profile), "Profile", "mixtral"),
    "profile of a traced model": Made(quiet(profile), "Profile", "mlp"),
    "neuron_activity": Made(quiet(neuron_activity), "NeuronActivity", relu=True),
    "activated_parameters": Made(quiet(activated_parameters), "ActivatedParameters", relu=True),
    "neuron_activity of images": Made(quiet(neuron_activity, threshold=0.1), "NeuronActivity", "vit"),
    "eafo": Made(quiet(eafo), "Eafo", relu=True),
    "eafo of a traced model": Made(quiet(eafo), "Eafo", "mlp"),
    "self_normalizing": Made(quiet(self_normalizing), "SelfNormalizing", "mlp"),
    "activity_curve": Made(curve, "ActivityCurve", relu=True),
    "neural_code": Made(quiet(neural_code, fitted=2), "NeuralCode", relu=True),
    "neural_code of a traced model": Made(quiet(neural_code), "NeuralCode", "mlp"),
    "class_activation_maps": Made(
        quiet(class_activation_maps, method="class_tokens", classes=2),
        "ClassActivationMaps",
        "class_token_vit",
        several=False,
    ),
    "class_activation_maps of a plain model": Made(
        quiet(class_activation_maps), "ClassActivationMaps", "vit", several=False
    ),
    "head_memory": Made(quiet(head_memory), "HeadMemories", several=False),
    "lib": Made(quiet(lib, directions=4), "LocalInteraction", several=False),
    "lib of a traced model": Made(quiet(lib, sources=3), "LocalInteraction", "mlp", several=False),
    "massive_activations": Made(quiet(massive_activations), "MassiveActivations"),
    "massive_activations of images": Made(quiet(massive_activations, top=1), "MassiveActivations", "vit"),
    "gate_sparsity": Made(quiet(gate_sparsity), "GateSparsity", "mixtral", relu=True),
    "polynomial_degrees": Made(degrees, "PolynomialDegrees", several=False),
    "diversity": Made(quiet(diversity, skip=0), "Diversity", several=False),
    "diversity of images": Made(quiet(diversity, skip=0), "Diversity", "vit", several=False),
    "collapse_bound": Made(bound, "CollapseBound", several=False),
    "weight_sensitivity": Made(quiet(weight_sensitivity), "Sensitivity", several=False),
    "ptq_study": Made(
        lambda model, batches: ptq_study(
            model, batches, batches, weights=((4, 8),), symmetric=(False,), ranks=(0, 2), progress=False
        ),
        "Study",
        several=False,
    ),
    "attention_entropy": Made(quiet(attention_entropy), "AttentionEntropy", several=False),
    "extrapolation_curve": Made(
        lambda model, batches: extrapolation_curve(model, lengths_of(batches), [3, 6], progress=False, resamples=20),
        "LengthCurve",
        several=False,
    ),
    "importance_map": Made(quiet(importance_map, "model.layers.1.mlp.up_proj"), "ImportanceMap"),
    "sweep_threshold": Made(quiet(sweep_threshold, grid=(0.05, 0.2)), "ThresholdSweep", relu=True),
    "expected_vs_observed": Made(
        quiet(expected_vs_observed, active=6, synapses=4, threshold=2, tokens=30), "ExpectedVsObserved"
    ),
    "ppl_sparsity": Made(quiet(ppl_sparsity, sample=16), "PerplexitySparsityResult", several=False),
    "activation_ratio": Made(
        quiet(activation_ratio, method="cett", value=0.2, sample=16), "ActivationRatio", several=False
    ),
    "pareto": Made(quiet(pareto, methods=("zero", "fat", "cett"), grid=(0.3,), sample=16), "Pareto", several=False),
}
TOKENS = [1e9, 4e9, 2e10, 6e10, 1e11, 2e11]
STEPS = [0.0, 1, 2, 4, 8, 16, 30, 60, 100]
RISE = original_curve(STEPS, {"A": 30, "lambda": 0.3, "gamma": 0.2, "t0": 0.5, "K": 40}).tolist()
BILLIONS = [tokens / 1e9 for tokens in TOKENS]
# results that are of no model: laws, fits
WITHOUT_A_MODEL: dict[str, Callable[[], Any]] = {
    "measure_autoencoder": of_an_autoencoder,
    "split_error": of_an_error,
    "compare_widths": of_widths,
    "threshold_curve": partial(threshold_curve, [1000, 2000], [0.02], [20], range(8, 12)),
    "capacity_curve": lambda: capacity_curve("hebb", 8, [1, 2], trials=2),
    "phase_chart": lambda: PhaseChart((Reading(4, 10, 20, 0, 0.5, 0.4, 0.6, 0.5, 0.7, 0.9),)),
    "dynamics": lambda: dynamics({"blocks.0.block.output": (STEPS, RISE), "blocks.1.block.output": (STEPS, [1.0] * 9)}),
    "parameter_budget": lambda: parameter_budget(tiny_model("llama")),
    "relu law": lambda: fit_relu_law(TOKENS, [relu_law(each, 0.4, -1.0, 0.5, 0.1) for each in BILLIONS]),
    "silu law": lambda: fit_silu_law(TOKENS, [silu_law(each, 0.4, 0.2, 0.6) for each in BILLIONS]),
    "basis_choice": lambda: basis_choice(nn.Sequential(SKanLayer(3, 4), chosen(SKanLayer(4, 2)).pruned())),
    "width law": lambda: fit_width_law([10, 20, 30, 40, 60], [0.1, 0.15, 0.2, 0.25, 0.25]),
}


def public_classes() -> Iterator[type]:
    """All public classes of actkit, each once."""
    seen = set()
    for module in pkgutil.walk_packages(actkit.__path__, "actkit."):
        if module.name == "actkit.__main__" or ("triton" in module.name and find_spec("triton") is None):
            continue
        for name, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if cls.__module__.startswith("actkit.") and not name.startswith("_") and cls not in seen:
                seen.add(cls)
                yield cls
