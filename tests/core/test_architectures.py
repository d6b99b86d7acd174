"""Every architecture keeps every contract: its sites are the tensors that the real transformers class computes (by its
own attention function, and by hand from the raw weights), every parameter is accounted for, scales move without a
trace, and the transforms apply, save, load and undo."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from actkit.core.edit.edits import apply_edit, set_module
from actkit.core.edit.folding import fold
from actkit.core.measure.cost import measure_cost
from actkit.core.model import architectures
from actkit.core.model.anatomy import CoverageError, Site, anatomy, equalization_sets
from actkit.core.model.architectures import known_model_types
from actkit.core.model.fused_layers import PartRows, query_key_value_rows
from actkit.core.recipe.blockwise import Walk
from actkit.core.recipe.plan import make_plan
from actkit.core.recipe.transform import Transform
from actkit.core.watch.capture import live, opened_experts, record
from actkit.core.watch.statistics import Moments
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.families import FAMILIES
from actkit.sparsity.cats.cats import Cats
from actkit.sparsity.cats.gate_sparsity import gate_sparsity
from actkit.sparsity.lazy_neuron.top_k_mlp import TopKMlp
from actkit.sparsity.spark.sparkify import Sparkify
from actkit.sparsity.teal import Teal
from actkit.sparsity.wina.rotate_columns import RotateColumns
from actkit.sparsity.wina.wina import Wina
from actkit.testing import check_transform, tiny_batches, tiny_model
from actkit.testing.models import ARCHITECTURES, HEADS, HIDDEN, INNER
from representative import product

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ARCHITECTURES},
    "phi3, as many value heads": ("phi3", {"num_key_value_heads": HEADS}),
    "gpt_neox, MLP after attention": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon, one key-value head": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon, as many value heads, alibi": (
        "falcon",
        {
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "num_kv_heads": HEADS,
        },
    ),
    "stablelm, side by side": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "bloom, norms feed the residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "exaone4, without windows": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "deepseek_v3, queries of full rank": ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}),
    "opt, norms after": ("opt", {"do_layer_norm_before": False, "activation_function": "gelu"}),
}
VARIANTS = [case for case in CASES if case not in ARCHITECTURES]  # of an architecture, at other settings
TRANSFORMS = {
    "teal": Teal(sparsity=0.5),
    "wina": Wina(sparsity=0.5),
    "rtn": RoundToNearest(bits=4, group_size=8),
    "awq": Awq(bits=3, group_size=8, n_grid=2),
}
PAIRS = [*product(TRANSFORMS, list(ARCHITECTURES)), *product(TRANSFORMS, VARIANTS, often=("awq",))]


def build(case: str, **changes: Any) -> Any:
    kind, settings = CASES[case]
    return tiny_model(kind, **{**settings, **changes})


def given(case: str) -> list[Any]:
    return tiny_batches(CASES[case][0], lengths=((9, 4, 6),))


def test_every_model_type_with_a_row_is_in_the_table() -> None:
    assert set(ARCHITECTURES) == set(known_model_types())
    assert all(tiny_model(kind).config.model_type == kind for kind in ARCHITECTURES)


# -- sites -------------------------------------------------------------------------------------------------------------


class ByHand:
    """The sites of one block, from its input, its weights, and what its attention function was called with and gave.

    W(name) is a tensor of the state dict, by its name below the block's path.
    """

    def __init__(
        self,
        model: nn.Module,
        state: dict[str, Tensor],
        path: str,
        attended: dict[str, Tensor],
        real: Tensor | None,
    ) -> None:
        self.real = real
        self.config, self.kind, self.path, self.state = model.config, model.config.model_type, path, state
        self.sites = {f"attention.{name}": value for name, value in attended.items()}

    def W(self, name: str) -> Tensor | None:
        return self.state.get(f"{self.path}.{name}")

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.W(f"{name}.weight"), self.W(f"{name}.bias")
        return x @ (weight if self.kind == "gpt2" else weight.T) + (0 if bias is None else bias)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Root mean square where there is no bias, else a layer norm, as of Cohere and OLMo."""
        weight, bias = self.W(f"{name}.weight"), self.W(f"{name}.bias")
        names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
        eps = next((getattr(self.config, each) for each in names if hasattr(self.config, each)), 1e-5)
        centered = bias is not None or self.kind in ("cohere", "cohere2", "olmo")
        x = x - x.mean(-1, keepdim=True) if centered else x
        x = x / (x.square().mean(-1, keepdim=True) + (1e-5 if self.kind == "olmo" else eps)).sqrt()
        weight = 1 if self.kind == "olmo" else weight + ("gemma" in self.kind or self.kind == "nemotron")
        return x * weight + (0 if bias is None else bias)

    def run(self, x: Tensor) -> dict[str, Tensor]:
        self.sites["block.input"] = x
        alike = {"roberta": "bert", "deit": "vit", "class_token_vit": "vit", "exaone4": "olmo2", "cohere2": "cohere"}
        name = alike.get(self.kind, self.kind)
        getattr(self, name, self.llama)(x)
        return self.sites

    def attention(self, x: Tensor, output: str, after: str | None = None) -> Tensor:
        self.sites["attention.input"] = x
        y = self.linear(self.sites["attention.mixed"], output)
        self.sites["attention.output"] = y if after is None else self.norm(y, after)
        return self.sites["attention.output"]

    def mlp(self, x: Tensor, up: str, down: str, gate: str | None = None, after: str | None = None) -> Tensor:
        s = self.sites
        s["mlp.input"], s["mlp.preactivation"] = x, self.linear(x, gate or up)
        if gate is None:
            s["mlp.hidden"] = self.function(s["mlp.preactivation"])
        else:
            s["mlp.gate"] = self.function(s["mlp.preactivation"])
            s["mlp.hidden"] = s["mlp.gate"] * self.linear(x, up)
        y = self.linear(s["mlp.hidden"], down)
        s["mlp.output"] = y if after is None else self.norm(y, after)
        return s["mlp.output"]

    def function(self, x: Tensor) -> Tensor:
        names = ("hidden_activation", "activation_function", "hidden_act", "activation")
        name = next((getattr(self.config, each) for each in names if getattr(self.config, each, None)), "gelu_new")
        if name == "silu":
            return x / (1 + (-x).exp())
        if name.startswith("relu"):
            return x.clamp(min=0) ** (2 if name == "relu2" else 1)
        if name == "gelu":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        assert name in ("gelu_new", "gelu_pytorch_tanh")
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    # the families

    def llama(self, x: Tensor) -> None:
        x = x + self.attention(self.norm(x, "input_layernorm"), "self_attn.o_proj")
        h = self.norm(x, "post_attention_layernorm")
        if self.W("mlp.experts.down_proj") is not None:
            self.sites["block.output"] = x + self.experts(h)
        else:
            self.sites["block.output"] = x + self.mlp(h, "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")

    def granite(self, x: Tensor) -> None:
        r = self.config.residual_multiplier
        x = x + r * self.attention(self.norm(x, "input_layernorm"), "self_attn.o_proj")
        h = self.norm(x, "post_attention_layernorm")
        self.sites["block.output"] = x + r * self.mlp(h, "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")

    def starcoder2(self, x: Tensor, up: str = "mlp.c_fc", down: str = "mlp.c_proj") -> None:
        x = x + self.attention(self.norm(x, "input_layernorm"), "self_attn.o_proj")
        self.sites["block.output"] = x + self.mlp(self.norm(x, "post_attention_layernorm"), up, down)

    def nemotron(self, x: Tensor) -> None:
        self.starcoder2(x, "mlp.up_proj", "mlp.down_proj")

    def phi(self, x: Tensor) -> None:
        h = self.norm(x, "input_layernorm")
        self.sites["block.output"] = x + self.attention(h, "self_attn.dense") + self.mlp(h, "mlp.fc1", "mlp.fc2")

    def cohere(self, x: Tensor) -> None:
        h = self.norm(x, "input_layernorm")
        after = x + self.attention(h, "self_attn.o_proj")
        self.sites["block.output"] = after + self.mlp(h, "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")

    def stablelm(self, x: Tensor) -> None:
        self.cohere(x) if self.config.use_parallel_residual else self.llama(x)

    def glm4(self, x: Tensor) -> None:
        gate, up = self.W("mlp.gate_up_proj.weight").chunk(2)
        self.state |= {f"{self.path}.gate.weight": gate, f"{self.path}.up.weight": up}
        h = self.norm(x, "input_layernorm")
        x = x + self.attention(h, "self_attn.o_proj", "post_self_attn_layernorm")
        h = self.norm(x, "post_attention_layernorm")
        self.sites["block.output"] = x + self.mlp(h, "up", "mlp.down_proj", "gate", "post_mlp_layernorm")

    def lfm2(self, x: Tensor) -> None:
        """The MLP's nonlinearity is no module: its gate and preactivation are not offered."""
        h = self.norm(x, "operator_norm")
        if self.W("conv.conv.weight") is None:
            x = x + self.attention(h, "self_attn.out_proj")
        else:
            mask = torch.ones(h.shape[:2]) if self.real is None else self.real
            first, second, third = self.linear(h * mask[..., None], "conv.in_proj").chunk(3, dim=-1)
            weight, past = self.W("conv.conv.weight"), first * third
            y = self.W("conv.conv.bias") + weight[:, 0, -1] * past
            for back in range(1, weight.shape[-1]):
                y[:, back:] += weight[:, 0, -1 - back] * past[:, :-back]
            x = x + self.linear(second * y, "conv.out_proj")
        self.config.hidden_act = "silu"
        self.sites["block.output"] = x + self.mlp(
            self.norm(x, "ffn_norm"), "feed_forward.w3", "feed_forward.w2", "feed_forward.w1"
        )
        del self.sites["mlp.preactivation"], self.sites["mlp.gate"]

    def gptj(self, x: Tensor) -> None:
        """Query, key and value are not offered: no call says how the first two are turned."""
        for name in ("query", "key", "value"):
            del self.sites[f"attention.{name}"]
        h = self.norm(x, "ln_1")
        self.sites["block.output"] = x + self.attention(h, "attn.out_proj") + self.mlp(h, "mlp.fc_in", "mlp.fc_out")

    def gpt_neo(self, x: Tensor) -> None:
        x = x + self.attention(self.norm(x, "ln_1"), "attn.attention.out_proj")
        self.sites["block.output"] = x + self.mlp(self.norm(x, "ln_2"), "mlp.c_fc", "mlp.c_proj")

    def bloom(self, x: Tensor) -> None:
        instead = self.config.apply_residual_connection_post_layernorm
        h = self.norm(x, "input_layernorm")
        x = (h if instead else x) + self.attention(h, "self_attention.dense")
        h = self.norm(x, "post_attention_layernorm")
        self.sites["block.output"] = (h if instead else x) + self.mlp(h, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

    def falcon(self, x: Tensor) -> None:
        grouped, parallel = self.config.new_decoder_architecture, self.config.parallel_attn
        h = self.norm(x, "ln_attn" if grouped else "input_layernorm")
        after = x + self.attention(h, "self_attention.dense")
        if grouped:
            h = self.norm(x, "ln_mlp")
        elif not parallel:
            h = self.norm(after, "post_attention_layernorm")
        self.sites["block.output"] = after + self.mlp(h, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

    def deepseek_v3(self, x: Tensor) -> None:
        """Query, key and value are not offered: no layer's output is one."""
        for name in ("query", "key", "value"):
            del self.sites[f"attention.{name}"]
        self.llama(x)

    def plm(self, x: Tensor) -> None:
        for name in ("query", "key", "value"):
            del self.sites[f"attention.{name}"]
        self.nemotron(x)

    def phi3(self, x: Tensor) -> None:
        gate, up = self.W("mlp.gate_up_proj.weight").chunk(2)
        self.state |= {f"{self.path}.gate.weight": gate, f"{self.path}.up.weight": up}
        x = x + self.attention(self.norm(x, "input_layernorm"), "self_attn.o_proj")
        h = self.norm(x, "post_attention_layernorm")
        self.sites["block.output"] = x + self.mlp(h, "up", "mlp.down_proj", "gate")

    def olmo2(self, x: Tensor) -> None:
        x = x + self.attention(x, "self_attn.o_proj", "post_attention_layernorm")
        names = ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", "post_feedforward_layernorm")
        self.sites["block.output"] = x + self.mlp(x, *names)

    def gemma2(self, x: Tensor) -> None:
        h = self.norm(x, "input_layernorm")
        x = x + self.attention(h, "self_attn.o_proj", "post_attention_layernorm")
        h = self.norm(x, "pre_feedforward_layernorm")
        names = ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", "post_feedforward_layernorm")
        self.sites["block.output"] = x + self.mlp(h, *names)

    gemma3_text = gemma2

    def gpt2(self, x: Tensor) -> None:
        x = x + self.attention(self.norm(x, "ln_1"), "attn.c_proj")
        self.sites["block.output"] = x + self.mlp(self.norm(x, "ln_2"), "mlp.c_fc", "mlp.c_proj")

    def gpt_neox(self, x: Tensor) -> None:
        after = x + self.attention(self.norm(x, "input_layernorm"), "attention.dense")
        h = self.norm(x if self.config.use_parallel_residual else after, "post_attention_layernorm")
        self.sites["block.output"] = after + self.mlp(h, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

    def opt(self, x: Tensor) -> None:
        """The query is recorded after OPT scaled it; the layers of the MLP are called on flat rows."""
        self.sites["attention.query"] = self.sites["attention.query"] * math.sqrt(HIDDEN // HEADS)
        before = self.config.do_layer_norm_before
        x = x + self.attention(self.norm(x, "self_attn_layer_norm") if before else x, "self_attn.out_proj")
        x = x if before else self.norm(x, "self_attn_layer_norm")
        shape, x = x.shape, x.flatten(0, 1)
        x = x + self.mlp(self.norm(x, "final_layer_norm") if before else x, "fc1", "fc2")
        self.sites["block.output"] = (x if before else self.norm(x, "final_layer_norm")).reshape(shape)

    def bert(self, x: Tensor) -> None:
        x = self.norm(x + self.attention(x, "attention.output.dense"), "attention.output.LayerNorm")
        y = self.mlp(x, "intermediate.dense", "output.dense")
        self.sites["block.output"] = self.norm(x + y, "output.LayerNorm")

    def vit(self, x: Tensor) -> None:
        x = x + self.attention(self.norm(x, "layernorm_before"), "attention.o_proj")
        self.sites["block.output"] = x + self.mlp(self.norm(x, "layernorm_after"), "mlp.fc1", "mlp.fc2")

    def experts(self, h: Tensor) -> Tensor:
        s, oss = self.sites, self.kind == "gpt_oss"
        flat = h.flatten(0, 1)
        logits = s["router.logits"] = self.linear(flat, "mlp.router" if oss else "mlp.gate")
        scores = logits if oss else logits.sigmoid() if self.kind == "deepseek_v3" else logits.softmax(-1)
        if self.kind == "deepseek_v3":  # the better one of two groups of two experts
            first, second = scores.chunk(2, dim=-1)
            worse = (first.sum(-1) < second.sum(-1)).long()[:, None] == torch.tensor([1, 1, 0, 0])
            scores = scores.masked_fill(worse, 0)
        top, chosen = scores.topk(self.config.num_experts_per_tok)
        top = top.softmax(-1) if oss else top
        if self.kind == "mixtral" or getattr(self.config, "norm_topk_prob", False):
            top = top / top.sum(-1, keepdim=True) * getattr(self.config, "routed_scaling_factor", 1.0)
        gate_up, down = self.W("mlp.experts.gate_up_proj"), self.W("mlp.experts.down_proj")
        result = torch.zeros_like(flat)
        for e in range(len(down)):
            rows, slots = (chosen == e).nonzero(as_tuple=True)
            x = flat[rows]
            if oss:
                both = x @ gate_up[e] + self.W("mlp.experts.gate_up_proj_bias")[e]
                part = {"input": x, "preactivation": both[:, ::2].clamp(max=self.config.swiglu_limit)}
                limit = self.config.swiglu_limit
                part["gate"] = part["preactivation"] * torch.sigmoid(self.config.swiglu_alpha * part["preactivation"])
                part["hidden"] = part["gate"] * (both[:, 1::2].clamp(-limit, limit) + 1)
                part["output"] = part["hidden"] @ down[e] + self.W("mlp.experts.down_proj_bias")[e]
            else:
                gate, up = (x @ gate_up[e].T).chunk(2, dim=-1)
                part = {"input": x, "preactivation": gate, "gate": self.function(gate)}
                part["hidden"] = part["gate"] * up
                part["output"] = part["hidden"] @ down[e].T
            result[rows] += part["output"] * top[rows, slots, None]
            s |= {f"experts.{e}.mlp.{name}": value for name, value in part.items()}
        s["mlp.input"], s["mlp.output"] = h, result.reshape(h.shape)
        if self.kind == "qwen2_moe":
            gate, up = (self.linear(h, f"mlp.shared_expert.{name}_proj") for name in ("gate", "up"))
            added = self.linear(self.function(gate) * up, "mlp.shared_expert.down_proj")
            s["mlp.output"] = s["mlp.output"] + self.linear(h, "mlp.shared_expert_gate").sigmoid() * added
        if self.kind == "deepseek_v3":
            gate, up = (self.linear(h, f"mlp.shared_experts.{name}_proj") for name in ("gate", "up"))
            s["mlp.output"] = s["mlp.output"] + self.linear(self.function(gate) * up, "mlp.shared_experts.down_proj")
        return s["mlp.output"]


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> dict[nn.Module, dict[str, Tensor]]:
    """What each attention module's own function was called with and gave, filled while `watch(model)` runs."""
    found: dict[nn.Module, dict[str, Tensor]] = {}

    def watch(model: nn.Module) -> dict[nn.Module, dict[str, Tensor]]:
        ours = {
            "plm": "actkit.sparsity.plm.latent_attention",
            "class_token_vit": "transformers.models.vit.modeling_vit",
        }
        source = sys.modules[ours.get(model.config.model_type, type(model).__module__)]
        if not hasattr(source, "eager_attention_forward"):
            watch_modules(model, source)
            return found
        stock = source.eager_attention_forward

        def keeping(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            mixed, weights = stock(module, query, key, value, *args, **kwargs)
            found[module] = {"query": query, "key": key, "value": value, "weights": weights, "mixed": mixed.flatten(2)}
            return mixed, weights

        monkeypatch.setattr(source, "eager_attention_forward", keeping)
        return found

    def watch_modules(model: nn.Module, source: Any) -> None:
        """Attention that no function of the source computes: GPT-J's and GPT-Neo's method, the others by hand."""
        for module in model.modules():
            if hasattr(module, "_attn"):
                monkeypatch.setattr(module, "_attn", keeping_method(module, module._attn))
            elif hasattr(module, "_split_heads") or hasattr(module, "_reshape"):
                module.register_forward_hook(by_hand(source), with_kwargs=True)

    def keeping_method(module: nn.Module, stock: Any) -> Any:
        def keeping(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Any:
            mixed, weights = stock(query, key, value, mask)
            flat = mixed.transpose(1, 2).flatten(2)
            found[module] = {"query": query, "key": key, "value": value, "weights": weights, "mixed": flat}
            return mixed, weights

        return keeping

    def by_hand(source: Any) -> Any:
        """Bloom's and Falcon's, from the layer's output as the module splits it; rotary embedding or alibi."""

        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            layer = module.query_key_value
            fused = nn.functional.linear(args[0], layer.weight, layer.bias)
            split = module._reshape if hasattr(module, "_reshape") else module._split_heads
            query, key, value = (x if hasattr(module, "_reshape") else x.transpose(1, 2) for x in split(fused))
            own = getattr(module, "num_kv_heads", module.num_heads)
            key, value = (x[:, :: x.shape[1] // own] for x in (key, value))
            alibi = kwargs["alibi"]
            if alibi is None:
                query, key = source.apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
            every = [x.repeat_interleave(module.num_heads // own, 1) for x in (key, value)]
            scores = query @ every[0].transpose(2, 3)
            if alibi is not None:  # Falcon scales it with the scores, Bloom does not
                alibi = alibi.reshape(len(query), module.num_heads, 1, -1)
                scores = scores + (alibi if module.beta != 1 else alibi * math.sqrt(module.head_dim))
            weights = (scores / math.sqrt(module.head_dim) + kwargs["attention_mask"]).softmax(-1)
            mixed = (weights @ every[1]).transpose(1, 2).flatten(2)
            found[module] = {"query": query, "key": key, "value": value, "weights": weights, "mixed": mixed}

        return hook

    return watch  # type: ignore[return-value]


def rows_of(value: Tensor, real: Tensor | None) -> Tensor:
    """The rows [tokens, channels] of real tokens."""
    value = value.transpose(1, 2).flatten(2) if value.dim() == 4 else value
    rows = value.reshape(-1, value.shape[-1])
    return rows if real is None else rows[real.flatten().bool()]


def middle(block: Any, sites: dict[str, Tensor], factor: float) -> Tensor:
    """The stream in front of the MLP: what is left of the output without the MLP, or the norm that both read."""
    given, output = sites["mlp.input"], sites["block.output"]
    if any(norm.role == "mlp" and norm.feeds_residual for norm in block.norms):
        return given.reshape(output.shape)
    return (output - factor * sites["mlp.output"].reshape(output.shape)).reshape(given.shape)


@pytest.mark.parametrize("case", CASES)
def test_every_site_is_what_the_model_computes(case: str, attended: Any) -> None:
    model = build(case, attn_implementation="eager")
    batch = given(case)[0]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls, view = attended(model), anatomy(model)
    with opened_experts(view), torch.no_grad():
        blocks = [view.block(block.index) for block in view.blocks]
        sites = [site for block in blocks for site in block.sites()]
        with live(model, sites, view) as seen:
            model(**batch, **({"use_cache": False} if "input_ids" in batch else {}))
        moments = record(model, dict.fromkeys(sites, Moments()), [batch], anatomy=view, progress=False)
    inner = {name: module for name, module in model.named_modules() if module in calls}
    for block in blocks:
        own = next((module for name, module in inner.items() if name.startswith(block.path + ".")), None)
        given_to = calls.get(own, {})  # a convolution has no attention
        by_hand = ByHand(model, state, block.path, given_to, batch.get("attention_mask"))
        expected = by_hand.run(seen[Site("block.input", block.index)][0])
        mine = {str(site).removeprefix(f"blocks.{block.index}."): site for site in sites if site.block == block.index}
        if "block.middle" in mine:
            expected["block.middle"] = middle(block, expected, getattr(model.config, "residual_multiplier", 1.0))
        assert set(mine) == {name for name, value in expected.items() if len(value)}
        for name, site in mine.items():
            torch.testing.assert_close(
                seen[site][0], expected[name], atol=5e-5, rtol=5e-5, msg=lambda text, site=site: f"{site}: {text}"
            )
            if site.expert is None and name != "attention.weights":  # padding is told from tokens in every layout
                real = rows_of(expected[name], batch.get("attention_mask"))
                assert moments[site].count == len(real), site
                torch.testing.assert_close(moments[site].mean.float(), real.mean(0), atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("case", CASES)
def test_blocks_run_alone(case: str) -> None:
    """Masks, windows and rotary tables differ between the layers of some families: each block gets its own."""
    model, batches = build(case), given(case)
    view = anatomy(model)
    walk = Walk(view, batches, lambda items, text: items)
    walk.start(["original"])
    assert walk.chained
    with live(model, "block.output", view) as seen, torch.no_grad():
        for batch in batches:
            model(**batch, **({"use_cache": False} if "input_ids" in batch else {}))
        for block in view.blocks:
            for call, expected in zip(
                walk.calls(block.index, "original"), list(seen[Site("block.output", block.index)])
            ):
                assert torch.equal(call.replay(block.module), expected)
            walk.move("original", walk.following(block.index, "original"))


# -- structure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_coverage_and_plans(case: str) -> None:
    model = build(case)
    view = anatomy(model)
    coverage = view.coverage()
    assert [row.parameter for row in coverage.rows] == [name for name, _ in model.named_parameters()]
    assert sum(row.numel for row in coverage.rows) == sum(p.numel() for p in model.parameters())
    left = {row.parameter.partition("layers.")[2].partition(".")[2]: row.reason for row in coverage.uncovered()}
    routers = {"mixtral": ["mlp.gate.weight"], "qwen3_moe": ["mlp.gate.weight"]}
    routers |= dict.fromkeys((case for case in CASES if "deepseek" in case), routers["mixtral"])
    routers["olmoe"], routers["qwen2_moe"] = routers["mixtral"], ["mlp.gate.weight", "mlp.shared_expert_gate.weight"]
    routers["lfm2"] = ["conv.conv.weight", "conv.conv.bias"]
    routers["gpt_oss"] = ["mlp.router.weight", "mlp.router.bias", "self_attn.sinks"]
    assert sorted(left) == sorted(routers.get(case, []))
    assert all(left.values())
    plan = make_plan(view, list(TRANSFORMS.values()), given(case), min_coverage=0.9)
    assert len(plan.coverage) == len(TRANSFORMS)


def test_what_differs_between_blocks() -> None:
    blocks = anatomy(tiny_model("qwen3_moe")).blocks
    assert [(block.mlp is None, block.experts is None) for block in blocks] == [(False, True), (True, False)]
    view = anatomy(tiny_model("smollm3"))
    assert [view.tap(Site("attention.query", index)).rotary for index in (0, 1)] == [True, False]
    before, after = (anatomy(build(case)).blocks[0] for case in ("opt", "opt, norms after"))
    assert (before.attention.norm.path, before.mlp.norm.path) == (
        "model.decoder.layers.0.self_attn_layer_norm",
        "model.decoder.layers.0.final_layer_norm",
    )
    assert after.attention.norm is None
    assert after.mlp.norm.feeds_residual


def test_a_layer_for_gate_and_up() -> None:
    block = anatomy(tiny_model("phi3")).blocks[0]
    mlp, attention = block.mlp, block.attention
    assert (mlp.gated, mlp.gate, mlp.up.role, mlp.inputs, mlp.width) == (True, None, "gate_up", (mlp.up,), INNER)
    assert mlp.up_rows == PartRows(INNER, INNER)
    assert attention.value_rows == PartRows(HIDDEN + 8, 8)
    assert [linear.role for linear in block.linears()] == ["query_key_value", "output", "gate_up", "down"]


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_rows_of_fused_layers(heads: int, shared: int) -> None:
    """Against views, as the modeling files split: all queries first, or head by head."""
    size, x = 5, torch.randn(2, (heads + 2 * shared) * 5)
    query, key, value = (rows.of(x) for rows in query_key_value_rows("parts", heads, shared, size))
    assert torch.equal(torch.cat((query, key, value), -1), x)
    assert [part.shape[-1] for part in (query, key, value)] == [heads * size, shared * size, shared * size]
    groups = x.view(2, shared, heads // shared + 2, size)
    expected = groups[:, :, :-2].reshape(2, -1), groups[:, :, -2].reshape(2, -1), groups[:, :, -1].reshape(2, -1)
    for rows, wanted in zip(query_key_value_rows("by_head", heads, shared, size), expected, strict=True):
        assert torch.equal(rows.of(x), wanted)
        assert len(rows) == wanted.shape[-1]


# -- where scales can move ---------------------------------------------------------------------------------------------

RESIDUAL, BESIDE = "post-norm", "an expert that every token goes to reads the norm's output too"
UNKNOWN = "what produces this input is not described"
BARE, CLAMPED = "the norm has no weight", "the value is clamped to 0.5"
FREE = [None, None, None, None]  # attention's input, value to output, the MLP's input, up to down
REFUSED: dict[str, list[str | None]] = {
    **{case: [None, None, None, None] for case in CASES},
    **dict.fromkeys(
        ("gpt2", "gpt_neox", "gpt_neox, MLP after attention", "opt", "vit", "deit", "class_token_vit"), FREE
    ),
    **dict.fromkeys(("gpt_neo", "bloom", "falcon, as many value heads, alibi"), FREE),
    "gptj": [None, None, None],  # one norm for attention and MLP
    **{key: [None, None, None] for key in ("phi", "cohere", "cohere2", "stablelm, side by side")},
    "falcon, one key-value head": [None, None, None],
    "bloom, norms feed the residual": [RESIDUAL, None, RESIDUAL, None],
    "olmo": [BARE, CLAMPED, BARE, None],
    "olmoe": [None, CLAMPED, None] + [None] * 4,
    "qwen2_moe": [None, None, BESIDE] + [None] * 4 + [UNKNOWN] * 2,
    "lfm2": [None, None, UNKNOWN, UNKNOWN],
    **{key: [RESIDUAL, None, RESIDUAL, None] for key in ("exaone4", "exaone4, without windows")},
    "phi3, as many value heads": FREE,
    "olmo2": [RESIDUAL, None, RESIDUAL, None],
    **{case: [RESIDUAL, None, RESIDUAL, None] for case in ("bert", "roberta", "opt, norms after")},
    "mixtral": [None, None, None] + [None] * 4,
    "qwen3_moe": [None, None, None] + [None] * 4,
    "gpt_oss": [None, None, None] + ["up is clamped or shifted"] * 4,
    "deepseek_v3": [BESIDE] + [None] * 4 + [UNKNOWN] * 6,
    "plm": [None, None] + [UNKNOWN] * 3,
    "deepseek_v3, queries of full rank": [BESIDE] + [None] * 4 + [UNKNOWN] * 5,
}


@pytest.mark.parametrize("case", CASES)
def test_scales_move_where_they_can(case: str) -> None:
    """In float64, by powers of two: the model stays to rounding (Gemma's norms compute in float32). What cannot move is
    refused, with the reason. No padding: transformers' masks in float64 overflow in its softmax in float32."""
    model, kind = build(case).double(), CASES[case][0]
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batches(kind, lengths=((9, 9),))[0].items()}
    generator, view = torch.Generator().manual_seed(0), anatomy(model)
    with opened_experts(view), torch.no_grad():
        before = model(**batch).logits
        for index in range(len(view.blocks)):
            found = equalization_sets(view.block(index))
            for group in found:
                if group.refused is None:
                    scale = 2.0 ** torch.randint(-2, 3, (group.consumers[0].in_features,), generator=generator)
                    for edit in fold(view.block(index), group, group.tied(scale)):
                        apply_edit(model, edit, remember=False)
        reasons = [group.refused for group in found]
        assert len(reasons) == len(REFUSED[case])
        for reason, expected in zip(reasons, REFUSED[case], strict=True):
            assert (reason or "").startswith(expected or "") and bool(reason) == bool(expected)
        torch.testing.assert_close(
            model(**batch).logits,
            before,
            **({"rtol": 1e-4, "atol": 1e-4} if "gemma" in kind else {"rtol": 1e-9, "atol": 1e-10}),
        )


# -- transforms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_transforms_keep_their_promises(name: str, case: str) -> None:
    check_transform(TRANSFORMS[name], build(case), given(case))


@pytest.mark.parametrize("transform", [Cats(sparsity=0.6), TopKMlp(k=0.25), Sparkify(density=0.2), RotateColumns()])
def test_other_methods_on_fused_layers(transform: Transform) -> None:
    check_transform(transform, tiny_model("phi3"), given("phi3"))


def test_what_a_gate_skips_of_a_fused_layer() -> None:
    """Behind a zero of the gate: up's half of the fused layer and the column of down, two of three equal matrices."""
    (layer, _) = gate_sparsity(tiny_model("phi3", hidden_act="relu"), given("phi3"), progress=False).layers
    assert 0.2 < layer.zeros < 0.8
    assert layer.traffic == pytest.approx(1 - layer.zeros * 2 / 3)


# -- one more architecture ---------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The known rows; what a test adds is forgotten after it."""
    known = dict(architectures._rows)
    monkeypatch.setattr(architectures, "_rows", known)
    return known


def test_the_page_lists_the_rows() -> None:
    page = (DOCS / "architectures.md").read_text(encoding="utf-8")
    listed = [
        (cells[0].strip(), tuple(cells[1].strip().split(", ")))
        for cells in (line.strip("|").split("|") for line in page.splitlines() if line.startswith("| "))
    ][1:]
    assert sorted(listed) == sorted({(row.name, row.model_types) for row in architectures._rows.values()})


def test_the_page_lists_what_the_decoder_takes() -> None:
    page = (DOCS / "architectures.md").read_text(encoding="utf-8")
    section = page[page.index("## What the CPU decoder takes") :]
    assert re.findall(r"`(\w+)`[,.]", section[: section.index(". Where")] + ".") == sorted(FAMILIES)
    assert set(FAMILIES) <= set(ARCHITECTURES)


def test_the_example_of_the_page_is_enough(rows: dict[str, Any]) -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    section = page[page.index("## Add an architecture") :]
    block = re.search(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert "arcee" not in rows
    exec(compile(block[1], "architecture.md", "exec"), {})
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2}
    config = transformers.ArceeConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=2)
    model = transformers.ArceeForCausalLM(config).eval()
    assert not anatomy(model).coverage().uncovered()
    check_transform(Wina(sparsity=0.5), model, tiny_batches("llama"))


class Attention(nn.Module):
    """Grouped-query attention with one layer for query, key and value, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 32), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        both = self.qkv(x).view(*x.shape[:2], 2, 4, 4)  # two groups of two queries, a key and a value
        query, key, value = both[..., :2, :], both[..., 2:3, :], both[..., 3:, :]
        weights = torch.einsum("bqghd,bkgod->bghqk", query, key).softmax(-1)
        return self.out(torch.einsum("bghqk,bkgod->bqghd", weights, value).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.act, self.down = nn.Linear(HIDDEN, 2 * INNER), nn.SiLU(), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attn, self.second, self.mlp = nn.LayerNorm(HIDDEN), Attention(), nn.LayerNorm(HIDDEN), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.first(x))
        return x + self.mlp(self.second(x))


class MadeUp(nn.Module):
    """A class that no library knows: [batch, length, 16] -> [batch, length, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="made_up", num_attention_heads=HEADS, num_key_value_heads=2)
        self.blocks, self.last = nn.ModuleList([Block(), Block()]), nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def made_up(layout: Any) -> tuple[MadeUp, list[Tensor]]:
    architectures.register_architecture(
        architectures.Architecture(
            name="made_up",
            model_types=("made_up",),
            blocks="blocks",
            stem=(),
            head=("last",),
            norms=(architectures.NormRow("first", "attention"), architectures.NormRow("second", "mlp")),
            attention=architectures.AttentionRow("attn", query_key_value="attn.qkv", layout=layout, output="attn.out"),
            mlp=architectures.MlpRow("mlp", gate_up="mlp.both", down="mlp.down", activation="mlp.act"),
        )
    )
    torch.manual_seed(0)
    return MadeUp().eval(), [torch.randn(3, 5, HIDDEN), torch.randn(2, 4, HIDDEN)]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_class_of_ones_own(name: str, rows: dict[str, Any]) -> None:
    model, batches = made_up("by_head")
    check_transform(TRANSFORMS[name], model, batches)
    with live(model, ["attention.query", "attention.value", "mlp.hidden"], anatomy(model)) as seen:
        model(batches[0])
    attention = model.blocks[0].attn
    both = attention.qkv(model.blocks[0].first(batches[0])).view(3, 5, 2, 4, 4)
    assert torch.equal(seen["blocks.0.attention.query"][0], both[..., :2, :].flatten(2, 3).transpose(1, 2))
    assert torch.equal(seen["blocks.0.attention.value"][0], both[..., 3, :].transpose(1, 2))


def test_unknown_rows_are_refused(rows: dict[str, Any]) -> None:
    """Where a row does not say how a fused layer is laid out, nothing is read or moved by guess."""
    model, _ = made_up(None)
    view = anatomy(model)
    assert not {"attention.query", "attention.key", "attention.value"} & {site.name for site in view.blocks[0].sites()}
    model.config.num_key_value_heads = HEADS  # no grouped-query attention: only the layout is missing
    refused = equalization_sets(view.block(0))[1].refused
    assert refused == "which output rows of blocks.0.attn.qkv are the value's is not known"


def test_rows_that_do_not_fit_are_refused(rows: dict[str, Any]) -> None:
    model, _ = made_up("parts")
    model.config.num_key_value_heads = 1
    with pytest.raises(CoverageError, match=r"blocks.0.attn.qkv: it has 32 outputs.*4 and 1 heads of 4"):
        anatomy(model)


# -- bytes behind zeros ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_bytes_read_follow_the_zeros_of_activations(kind: str) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind, lengths=((7, 7),))
    mlps = [mlp for block in anatomy(model).blocks for _, mlp in block.mlps()]
    if not mlps:
        pytest.skip("its experts are closed; tests/core/test_cost.py opens them")
    shares: list[float] = []
    for mlp in mlps:
        relu = nn.ReLU()
        relu.register_forward_hook(lambda module, args, output: shares.append(float((output > 0).double().mean())))
        set_module(model, mlp.activation, relu)
    with torch.no_grad():
        model(**batches[0])
    saved = 0.0
    for mlp, share in zip(mlps, list(shares), strict=True):
        up = mlp.up.weight.nbytes * mlp.width / mlp.up.out_features if mlp.gated else 0
        saved += (1 - share) * (mlp.down.weight.nbytes + up)
    cost = measure_cost(model, batches, progress=False)
    assert saved > 0 and cost.bytes_per_token == pytest.approx(cost.dense_bytes_per_token - saved)
