"""How a user meets the errors of `formats`: one function per way, which raises it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import HIDDEN, build
from torch import nn
from transformers import (
    AttentionInterface,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from actkit.core.edit.edits import Replace, apply_edit, get_module
from actkit.core.grids.floats import fp8
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.hidden_act import enter
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import DenseWeight, FloatWeight, IntegerWeight
from actkit.formats import gguf_file, gguf_settings, reading
from actkit.formats.export import FORMATS, export
from actkit.formats.plain import Plain
from actkit.gguf.architectures import ARCHITECTURES
from error_proofs import STACK, Place, changed, proof, run

QUERY = "model.layers.0.self_attn.q_proj"


SMALLEST: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 40,
}


ROUNDED = RoundedInputs(IntegerGrid(8, symmetric=True))
CORRECTION = LowRank(torch.zeros(HIDDEN, 2), torch.zeros(2, HIDDEN))
ROTATED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


def written(p: Place, model: Any, **options: Any) -> Any:
    return export(model, p.path / "new", proof=False, **options)


def layer_with(model: Any, **slots: Any) -> Any:
    """The model with another slot in one layer."""
    apply_edit(model, Replace(QUERY, ActLinear.of(get_module(model, QUERY), **slots)))
    return model


def for_llama_cpp(**settings: Any) -> None:
    gguf_settings.refuse(Plain.of(LlamaForCausalLM(LlamaConfig(**SMALLEST, **settings))))


def a_reader(p: Place, script: str) -> None:
    """Read back by a process that does something else than ours."""
    path = p.file(f"#!/bin/sh\n{script}\n", "python")
    path.chmod(0o755)
    p.patch.setattr(reading.sys, "executable", str(path))
    reading.compare(changed(), p.path)


proof(lambda p: written(p, build("mlp")))


proof(lambda p: written(p, build("mixtral")))


@proof
def a_module_is_gone(p: Place) -> None:
    model = changed()
    del model.model.layers[0].mlp.up_proj
    written(p, model)


@proof
def attention_of_ones_own(p: Place) -> None:
    p.patch.setitem(AttentionInterface._global_mapping, "sdpa", build)
    written(p, build("llama"))


@proof
def a_bias_more(p: Place) -> None:
    model = changed()
    get_module(model, QUERY).bias = nn.Parameter(torch.zeros(HIDDEN))
    written(p, model)


proof(
    lambda p: written(p, run({"actkit": 1, "transforms": [{"awq": {"bits": 4, "group_size": 8}}]}, kind="gpt2").model)
)


proof(lambda p: written(p, run({"actkit": 1, "transforms": [*STACK["transforms"], {"teal": {"sparsity": 0.4}}]}).model))


proof(lambda p: written(p, layer_with(changed(), correction=CORRECTION)))


proof(lambda p: written(p, changed(), adapter=True))


proof(lambda p: written(p, changed(), format="gguf", adapter=True))


proof(lambda p: written(p, layer_with(changed(), inputs=ROUNDED), format="dense"))


proof(lambda p: written(p, layer_with(changed(), inputs=ROUNDED, correction=CORRECTION), adapter=True))


FP8_CACHE = {"quantize_cache": {"format": "fp8"}}
SYMMETRIC = {"rtn": {"bits": 4, "group_size": 8, "symmetric": True}}


proof(lambda p: written(p, run({"actkit": 1, "transforms": [SYMMETRIC, FP8_CACHE]}).model, format="dense"))


proof(lambda p: gguf_settings.refuse(Plain.of(run({"actkit": 1, "transforms": [SYMMETRIC, FP8_CACHE]}).model)))


proof(lambda p: written(p, run({"actkit": 1, "transforms": [*STACK["transforms"], FP8_CACHE]}).model))


@proof
def two_kinds_beside_an_adapter(p: Place) -> None:
    steps = [{"rtn": {"bits": 4, "group_size": 8, "symmetric": True}}]
    model = layer_with(run({"actkit": 1, "transforms": steps}, None).model, correction=CORRECTION)
    whole = get_module(model, QUERY).dequantized()
    written(p, layer_with(model, weight=IntegerWeight.quantize(whole, IntegerGrid(8, 8, symmetric=True))), adapter=True)


proof(lambda p: written(p, run({"actkit": 1, "transforms": [{"rotate": {"sites": ["R4"]}}]}).model))


proof(lambda p: written(p, build("llama").to("meta")))


proof(lambda p: written(p, build("llama")))


@proof
def two_kinds_of_weights(p: Place) -> None:
    model = run({"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8, "symmetric": False}}]}, None).model
    whole = get_module(model, QUERY).dequantized()
    written(p, layer_with(model, weight=IntegerWeight.quantize(whole, IntegerGrid(8, 8))))


proof(lambda p: written(p, layer_with(changed(), inputs=ROUNDED)))


proof(lambda p: written(p, layer_with(changed(), inputs=RoundedInputs(ROUNDED.grid, shift=torch.ones(HIDDEN)))))


@proof
def a_weight_in_floats(p: Place) -> None:
    model = changed()
    whole = get_module(model, QUERY).dequantized()
    written(p, layer_with(model, weight=FloatWeight.quantize(whole, fp8()), inputs=ROUNDED))


@proof
def a_dense_weight(p: Place) -> None:
    model = changed()
    whole = get_module(model, QUERY).dequantized()
    written(p, layer_with(model, weight=DenseWeight(whole.detach()), inputs=ROUNDED))


@proof
def inputs_of_six_bits(p: Place) -> None:
    written(p, layer_with(changed(), inputs=RoundedInputs(IntegerGrid(6, symmetric=True))))


proof(lambda p: written(p, layer_with(changed(), inputs=ROUNDED), format="gguf"))


proof(lambda p: gguf_settings.refuse(Plain.of(build("gpt2"))))


proof(lambda p: for_llama_cpp(hidden_act="relu"))


@proof
def capped_logits(p: Place) -> None:
    config = Gemma3TextConfig(**SMALLEST, final_logit_softcapping=3.0, query_pre_attn_scalar=256)
    gguf_settings.refuse(Plain.of(Gemma3ForCausalLM(config)))


proof(lambda p: for_llama_cpp(rope_parameters=ROTATED))


proof(lambda p: gguf_settings.refuse(Plain.of(Qwen3ForCausalLM(Qwen3Config(**SMALLEST, attention_bias=True)))))


proof(lambda p: gguf_settings.refuse(Plain.of(build("llama").double())))


proof(lambda p: gguf_file.gguf_name("model.layers.0.mlp.odd_proj", ARCHITECTURES["llama"]))


proof(lambda p: a_reader(p, 'echo \'[{"error": "no such file"}]\''))


proof(lambda p: a_reader(p, "exit 3"))


proof(lambda p: (p.patch.setattr(reading, "TIMEOUT", 0.05), a_reader(p, "exec sleep 1")))


@proof
def computes_something_else(p: Place) -> None:
    p.patch.setitem(FORMATS, "compressed-tensors", "json")  # as if the package were installed
    p.patch.setattr(reading, "read_back", lambda cases: [torch.zeros(1)])
    export(changed(), p.path / "new")


proof(lambda p: (p.patch.setattr("importlib.util.find_spec", lambda *_: None), export(changed(), p.path / "new")))


@proof
def a_function_of_ours_by_its_name(p: Place) -> None:
    enter("softplus")
    Plain.of(LlamaForCausalLM(LlamaConfig(**SMALLEST, hidden_act="softplus")))
