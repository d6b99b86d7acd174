"""How a user meets the errors of attention functions: one function per way, which raises it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import batches, build
from transformers import AttentionInterface, LlamaForCausalLM

from actkit import zoo
from actkit.core.edit.edits import ATTENTION, Configure, apply_edit, describe
from actkit.core.forward.batch import check_batch
from actkit.core.ground import registry
from actkit.core.layers.attention_function import read_mask
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.data import load_data
from actkit.functions.softplus_attention.attention import MappedAttention
from actkit.functions.softplus_attention.entropy import attention_entropy
from actkit.functions.softplus_attention.layer import SoftplusAttention
from actkit.functions.softplus_attention.length_curve import extrapolation_curve, passkeys
from actkit.functions.softplus_attention.lssar import Lssa
from actkit.functions.softplus_attention.weights import attention_weights, softplus_attention
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.testing import tiny_batches, tiny_model
from error_proofs import Place, points, proof, run

X = torch.ones(1, 1, 2, 4)


def configured(value: Any, model: Any = None) -> Any:
    model = build("llama") if model is None else model
    apply_edit(model, Configure(ATTENTION, value))
    return model


proof(lambda p: configured({"name": "lssar", "powers": 3}))


proof(lambda p: configured({"name": "lssar", "power": 0}))


proof(lambda p: configured({"name": "no_such"}))


proof(lambda p: configured({"name": "lssar"}, apply(build("llama"), QuantizeCache(), progress=False).model))


@proof
def a_name_that_transformers_has(p: Place) -> None:
    points(p, registry.ATTENTIONS, ("sdpa", "actkit.core.layers.cache_rounding:RoundedAttention"))
    registry._load.cache_clear()
    p.patch.setattr(registry, "attention_name", lambda cls: "sdpa")
    configured({"name": "sdpa"})


@proof
def a_class_that_cannot_be_told(p: Place) -> None:
    p.patch.setattr(LlamaForCausalLM, "_can_set_attn_implementation", lambda self: False)
    configured({"name": "lssa"})


@proof
def registered_by_hand(p: Place) -> None:
    p.patch.setitem(AttentionInterface._global_mapping, "by_hand", configured)
    describe(Configure(ATTENTION, "by_hand"))


@proof
def set_by_hand(p: Place) -> None:
    checkpoint.save(configured("lssa"), p.path / "out")


proof(lambda p: run(Lssa(), kind="mlp"))


proof(lambda p: read_mask(None, X, X, causal=True))


proof(lambda p: softplus_attention(X, X, X, mask=torch.full((2, 2), -1e4)))


proof(lambda p: softplus_attention(X, X, X, power=0))


proof(lambda p: softplus_attention(X[..., :1], X[..., :1], X))


proof(lambda p: attention_weights(X, X, torch.ones(2, 2).bool(), "soft"))  # type: ignore[arg-type]


proof(lambda p: MappedAttention(kind="soft"))  # type: ignore[arg-type]


proof(lambda p: MappedAttention(offset_rows=-1))


proof(lambda p: SoftplusAttention(16, 3))


proof(lambda p: SoftplusAttention(16, 16))


@proof
def an_attention_that_forms_no_weights(p: Place) -> None:
    attention_entropy(apply(build("llama"), QuantizeCache(), progress=False).model, batches("llama"), progress=False)


@proof
def an_attention_that_no_row_describes(p: Place) -> None:
    p.patch.setattr("actkit.functions.softplus_attention.entropy.forms_weights", lambda model: True)
    attention_entropy(tiny_model("mlp"), tiny_batches("mlp"), progress=False)


@proof
def nothing_to_attend_to(p: Place) -> None:
    attention_entropy(build("llama"), [], progress=False)


IDS = torch.zeros(2, 9, dtype=torch.long)


proof(lambda p: extrapolation_curve(build("llama"), IDS, [1, 4]))


proof(lambda p: extrapolation_curve(build("llama"), IDS, [4, 8], last=5))


proof(lambda p: extrapolation_curve(build("llama"), IDS, [4, 9]))


proof(lambda p: extrapolation_curve(build("llama"), IDS, [4, 8], progress=False).at(5))


proof(lambda p: passkeys(zoo.tokenizer("swiglu"), "grass", 40, count=0))


proof(lambda p: passkeys(zoo.tokenizer("swiglu"), "", 40))


proof(lambda p: passkeys(zoo.tokenizer("swiglu"), "grass", 10))


proof(lambda p: check_batch(tiny_model("gpt2"), {"input_ids": torch.zeros(1, 99, dtype=torch.long)}, "data"))


proof(lambda p: load_data("random", tiny_model("gpt2"), None, length=99, beyond_context=True))
