"""Every site of every row is compared with the same tensor recomputed from the raw weights in plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import CoverageError, UnsupportedModelError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import (
    SITE_NAMES,
    Anatomy,
    EqualizationSet,
    Linear,
    Norm,
    Site,
    Tap,
    anatomy,
    equalization_sets,
    read_tap,
    register_architecture,
)
from actkit.core.model.equalization import SharedHeads
from actkit.core.model.experts import ExpertList
from actkit.core.model.fused_layers import PartRows
from actkit.core.model.llama_rows import LLAMA

HIDDEN, HEADS, LENGTH = 24, 4, 7
DECODER = {
    "vocab_size": 50,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
ENCODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "attn_implementation": "eager",
}
GPT2 = {
    "vocab_size": 50,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": HEADS,
    "n_positions": 16,
    "attn_implementation": "eager",
}
VIT = {**ENCODER, "image_size": 8, "patch_size": 4}


def llama(**changes: Any) -> LlamaForCausalLM:
    return randomised(LlamaForCausalLM(LlamaConfig(**{**DECODER, "attention_bias": True, "mlp_bias": True, **changes})))


def randomised(model: nn.Module) -> Any:
    """Biases and norms are drawn too, so that a forgotten one shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


CASES = {
    "llama": llama,
    "mistral": lambda: randomised(MistralForCausalLM(MistralConfig(**DECODER, head_dim=8))),
    "qwen2": lambda: randomised(Qwen2ForCausalLM(Qwen2Config(**DECODER))),
    "qwen3": lambda: randomised(Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=8))),
    "gemma": lambda: randomised(GemmaForCausalLM(GemmaConfig(**DECODER, head_dim=8))),
    "mixtral": lambda: randomised(MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4))),
    "mixtral opened": lambda: opened(randomised(MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4)))),
    "gpt2": lambda: randomised(GPT2LMHeadModel(GPT2Config(**GPT2))),
    "bert": lambda: randomised(BertForMaskedLM(BertConfig(**ENCODER, vocab_size=50))),
    "roberta": lambda: randomised(RobertaForMaskedLM(RobertaConfig(**ENCODER, vocab_size=50))),
    "vit": lambda: randomised(ViTForImageClassification(ViTConfig(**VIT))),
}


def opened(model: nn.Module) -> nn.Module:
    for block in anatomy(model).blocks:
        assert block.experts is not None
        parent, _, name = block.experts.path.rpartition(".")
        setattr(model.get_submodule(parent), name, ExpertList.of(block.experts.module, block.experts.row))
    return model


def batch(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    return {"input_ids": torch.randint(3, 50, (2, LENGTH))}


def read(model: nn.Module, view: Anatomy, sites: list[Site]) -> dict[Site, Tensor]:
    """The sites' tensors in one forward pass, by plain hooks that follow the taps."""
    found: dict[Site, Tensor] = {}
    rotary: dict[str, Any] = {}
    handles = []

    def watch(site: Site, tap: Tap) -> None:
        if tap.attention is not None:

            def remember(module: Any, args: Any, kwargs: Any, path: str = tap.attention) -> None:
                rotary[path] = kwargs["position_embeddings"]

            attention = model.get_submodule(tap.attention)
            handles.append(attention.register_forward_pre_hook(remember, with_kwargs=True))

        def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            found[site] = read_tap(tap, args, kwargs, output, rotary.get(tap.attention or "")).detach().clone()

        handles.append(model.get_submodule(tap.path).register_forward_hook(after, with_kwargs=True))

    for site in sites:
        watch(site, view.tap(site))
    try:
        with torch.no_grad():
            model(**batch(model))
    finally:
        for handle in handles:
            handle.remove()
    return found


# -- the same tensors by hand ------------------------------------------------------------------------------------------


class ByHand:
    """Recomputes a block from the state dict. `W(name)` is the weight [out, in] (or vector) below the block's path."""

    def __init__(self, model: nn.Module, view: Anatomy, index: int) -> None:
        self.state, self.path, self.config = model.state_dict(), view.blocks[index].path, model.config
        self.kind = self.config.model_type
        self.sites: dict[str, Tensor] = {}

    def W(self, name: str) -> Tensor | None:
        return self.state.get(f"{self.path}.{name}")

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight = self.W(f"{name}.weight")
        y = x @ (weight if self.kind == "gpt2" else weight.T)
        bias = self.W(f"{name}.bias")
        return y if bias is None else y + bias

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.W(f"{name}.weight") + self.W(
            f"{name}.bias"
        )

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        scale = self.W(f"{name}.weight") + (1 if self.kind == "gemma" else 0)
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * scale

    def heads(self, x: Tensor, count: int) -> Tensor:
        return x.reshape(*x.shape[:2], count, -1).permute(0, 2, 1, 3)

    def rotary(self, x: Tensor) -> Tensor:
        """Rotation as a product of complex numbers."""
        d = x.shape[-1]
        frequency = self.config.rope_parameters["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        angle = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * frequency
        turned = torch.complex(x[..., : d // 2].double(), x[..., d // 2 :].double()) * torch.polar(
            torch.ones(()).double(), angle
        )
        return torch.cat((turned.real, turned.imag), -1).float()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> None:
        repeat = query.shape[1] // key.shape[1]
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(repeat, 1)) / math.sqrt(query.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        mixed = torch.einsum("bhqk,bhkd->bqhd", weights, value.repeat_interleave(repeat, 1)).flatten(2)
        self.sites |= {"attention.query": query, "attention.key": key, "attention.value": value}
        self.sites |= {"attention.weights": weights, "attention.mixed": mixed}  # scores: test_intervene.py

    def run(self, x: Tensor) -> dict[str, Tensor]:
        self.sites["block.input"] = x
        {"gpt2": self.gpt2, "bert": self.bert, "roberta": self.bert, "vit": self.vit}.get(self.kind, self.llama)(x)
        return self.sites

    def llama(self, x: Tensor) -> None:
        s, c = self.sites, self.config
        h = s["attention.input"] = self.rms_norm(x, "input_layernorm")
        q = self.heads(self.linear(h, "self_attn.q_proj"), c.num_attention_heads)
        k = self.heads(self.linear(h, "self_attn.k_proj"), c.num_key_value_heads)
        if self.kind == "qwen3":
            q, k = self.rms_norm(q, "self_attn.q_norm"), self.rms_norm(k, "self_attn.k_norm")
        v = self.heads(self.linear(h, "self_attn.v_proj"), c.num_key_value_heads)
        self.attend(self.rotary(q), self.rotary(k), v, causal=True)
        s["attention.output"] = self.linear(s["attention.mixed"], "self_attn.o_proj")
        x = s["block.middle"] = x + s["attention.output"]
        h = s["mlp.input"] = self.rms_norm(x, "post_attention_layernorm")
        if self.kind == "mixtral":
            self.mixtral(h)
        else:
            s["mlp.preactivation"] = self.linear(h, "mlp.gate_proj")
            s["mlp.gate"] = (gelu_tanh if self.kind == "gemma" else silu)(s["mlp.preactivation"])
            s["mlp.hidden"] = s["mlp.gate"] * self.linear(h, "mlp.up_proj")
            s["mlp.output"] = self.linear(s["mlp.hidden"], "mlp.down_proj")
        s["block.output"] = x + s["mlp.output"]

    def mixtral(self, h: Tensor) -> None:
        s = self.sites
        flat = h.flatten(0, 1)
        s["router.logits"] = flat @ self.W("mlp.gate.weight").T
        top, chosen = torch.softmax(s["router.logits"], -1).topk(self.config.num_experts_per_tok)
        result = torch.zeros_like(flat)
        for e in range(self.config.num_local_experts):
            rows = (chosen == e).any(-1)
            gate, up, down = self.expert(e)
            part = {"mlp.input": flat[rows], "mlp.preactivation": flat[rows] @ gate.T}
            part["mlp.gate"] = silu(part["mlp.preactivation"])
            part["mlp.hidden"] = part["mlp.gate"] * (flat[rows] @ up.T)
            part["mlp.output"] = part["mlp.hidden"] @ down.T
            result[rows] += part["mlp.output"] * ((top * (chosen == e)).sum(-1) / top.sum(-1))[rows, None]
            s |= {f"experts.{e}.{name}": value for name, value in part.items()}
        s["mlp.output"] = result.reshape(h.shape)

    def expert(self, e: int) -> tuple[Tensor, Tensor, Tensor]:
        stacked = self.W("mlp.experts.gate_up_proj")
        if stacked is None:
            return tuple(self.W(f"mlp.experts.{e}.{role}.weight") for role in ("gate", "up", "down"))
        gate, up = stacked[e].split(stacked.shape[1] // 2)
        return gate, up, self.W("mlp.experts.down_proj")[e]

    def gpt2(self, x: Tensor) -> None:
        s = self.sites
        h = s["attention.input"] = self.layer_norm(x, "ln_1", self.config.layer_norm_epsilon)
        parts = self.linear(h, "attn.c_attn").split(HIDDEN, dim=-1)
        self.attend(*(self.heads(part, HEADS) for part in parts), causal=True)
        s["attention.output"] = self.linear(s["attention.mixed"], "attn.c_proj")
        x = s["block.middle"] = x + s["attention.output"]
        h = s["mlp.input"] = self.layer_norm(x, "ln_2", self.config.layer_norm_epsilon)
        self.plain_mlp(h, "mlp.c_fc", "mlp.c_proj", gelu_tanh)
        s["block.output"] = x + s["mlp.output"]

    def plain_mlp(self, h: Tensor, up: str, down: str, activation: Any) -> None:
        s = self.sites
        s["mlp.preactivation"] = self.linear(h, up)
        s["mlp.hidden"] = activation(s["mlp.preactivation"])
        s["mlp.output"] = self.linear(s["mlp.hidden"], down)

    def bert(self, x: Tensor) -> None:
        s, eps = self.sites, self.config.layer_norm_eps
        s["attention.input"] = x
        self.attend(
            *(self.heads(self.linear(x, f"attention.self.{r}"), HEADS) for r in ("query", "key", "value")), causal=False
        )
        s["attention.output"] = self.linear(s["attention.mixed"], "attention.output.dense")
        h = s["block.middle"] = s["mlp.input"] = self.layer_norm(
            x + s["attention.output"], "attention.output.LayerNorm", eps
        )
        self.plain_mlp(h, "intermediate.dense", "output.dense", gelu)
        s["block.output"] = self.layer_norm(h + s["mlp.output"], "output.LayerNorm", eps)

    def vit(self, x: Tensor) -> None:
        s, eps = self.sites, self.config.layer_norm_eps
        h = s["attention.input"] = self.layer_norm(x, "layernorm_before", eps)
        self.attend(*(self.heads(self.linear(h, f"attention.{r}_proj"), HEADS) for r in "qkv"), causal=False)
        s["attention.output"] = self.linear(s["attention.mixed"], "attention.o_proj")
        x = s["block.middle"] = x + s["attention.output"]
        h = s["mlp.input"] = self.layer_norm(x, "layernorm_after", eps)
        self.plain_mlp(h, "mlp.fc1", "mlp.fc2", gelu)
        s["block.output"] = x + s["mlp.output"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("case", CASES)
def test_every_site_is_the_tensor_that_the_design_names(case: str) -> None:
    model = CASES[case]()
    view = anatomy(model)
    for block in view.blocks:
        sites = list(block.sites())
        found = read(model, view, sites)
        expected = ByHand(model, view, block.index).run(found[Site("block.input", block.index)])
        if block.experts is not None and not block.experts.members:
            expected = {name: value for name, value in expected.items() if not name.startswith("experts.")}
        assert {str(site).removeprefix(f"blocks.{block.index}.") for site in sites} == set(expected)
        for site, value in found.items():
            wanted = expected[str(site).removeprefix(f"blocks.{block.index}.")]
            torch.testing.assert_close(
                value, wanted, atol=2e-5, rtol=2e-5, msg=lambda text, site=site: f"{site}: {text}"
            )


def test_the_rows_together_have_every_site_of_the_design() -> None:
    names = {site.name for case in ("llama", "mixtral") for site in anatomy(CASES[case]()).sites()}
    assert names == {*SITE_NAMES} - {"attention.scores"}  # read by name alone


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "text"),
    [
        (Site("mlp.hidden", 3), "blocks.3.mlp.hidden"),
        (Site("mlp.hidden", 3, expert=1), "blocks.3.experts.1.mlp.hidden"),
        (Site("layer.input", path="model.layers.0.mlp.down_proj"), "layer.input:model.layers.0.mlp.down_proj"),
        (Site("router.logits"), "router.logits"),
    ],
)
def test_sites_read_back_from_their_text(site: Site, text: str) -> None:
    assert str(site) == text
    assert Site.parse(text) == site


@pytest.mark.parametrize("text", ["mlp.hiden", "blocks.x.mlp.hidden", "blocks.1.layer.input", "mlp.hidden:a.b", ""])
def test_wrong_site_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="site"):
        Site.parse(text)


def test_taps_are_refused_with_what_to_do() -> None:
    view = anatomy(llama(attn_implementation="sdpa"))
    assert "attention.weights" not in {site.name for site in view.blocks[0].sites()}
    with pytest.raises(ValueError, match=r"'sdpa'.*set_attn_implementation\('eager'\)"):
        view.tap(Site("attention.weights", 0))
    with pytest.raises(ValueError, match="not in this llama model"):
        view.tap(Site("router.logits", 0))
    with pytest.raises(ValueError, match="which has 2"):
        view.tap(Site("mlp.hidden", 2))
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        view.tap(Site("layer.input", path="nowhere"))
    view.model.set_attn_implementation("eager")
    assert view.tap(Site("attention.weights", 0)).layout == "weights"


def test_one_tensor_has_one_canonical_site() -> None:
    view = anatomy(CASES["mixtral opened"]())
    path = "model.layers.1"
    assert view.canonical(Site("layer.input", path=f"{path}.self_attn.k_proj")) == Site("attention.input", 1)
    assert view.canonical(Site("layer.input", path=f"{path}.self_attn.o_proj")) == Site("attention.mixed", 1)
    assert view.canonical(Site("layer.input", path=f"{path}.mlp.experts.3.up")) == Site("mlp.input", 1, expert=3)
    assert view.canonical(Site("layer.input", path=f"{path}.mlp.experts.3.down")) == Site("mlp.hidden", 1, expert=3)
    assert view.canonical(Site("layer.input", path="lm_head")) == Site("layer.input", path="lm_head")
    assert view.tap(Site("layer.output", path=f"{path}.mlp.experts.3.down")).expert == f"{path}.mlp.experts.3"


# -- structure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "stem", "head"),
    [
        (lambda: LlamaModel(LlamaConfig(**DECODER)), "layers.1", ("embed_tokens", "rotary_emb"), ("norm",)),
        (llama, "model.layers.1", ("model.embed_tokens", "model.rotary_emb"), ("model.norm", "lm_head")),
        (lambda: GPT2Model(GPT2Config(**GPT2)), "h.1", ("wte", "wpe", "drop"), ("ln_f",)),
        (lambda: BertModel(BertConfig(**ENCODER)), "encoder.layer.1", ("embeddings",), ("pooler",)),
        (
            lambda: BertForSequenceClassification(BertConfig(**ENCODER)),
            "bert.encoder.layer.1",
            ("bert.embeddings",),
            ("bert.pooler", "classifier"),
        ),
        (lambda: BertForMaskedLM(BertConfig(**ENCODER)), "bert.encoder.layer.1", ("bert.embeddings",), ("cls",)),
        (lambda: ViTModel(ViTConfig(**VIT)), "layers.1", ("embeddings",), ("layernorm", "pooler")),
        (
            lambda: LlamaForQuestionAnswering(LlamaConfig(**DECODER)),
            "transformer.layers.1",
            ("transformer.embed_tokens", "transformer.rotary_emb"),
            ("transformer.norm", "qa_outputs"),
        ),
    ],
)
def test_base_models_and_wrappers_are_both_found(make: Any, name: str, stem: Any, head: Any) -> None:
    model = make()
    view = anatomy(model)
    assert [view.blocks[1].path, view.stem, view.head] == [name, stem, head]
    rows = {row.parameter: row for row in view.coverage().rows}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert not view.coverage().uncovered()


@pytest.mark.parametrize("case", CASES)
def test_coverage_accounts_for_every_parameter_once(case: str) -> None:
    model = CASES[case]()
    coverage = anatomy(model).coverage()
    assert [row.parameter for row in coverage.rows] == [name for name, _ in model.named_parameters()]
    assert sum(row.numel for row in coverage.rows) == sum(p.numel() for p in model.parameters())
    assert all(row.reason for row in coverage.uncovered())
    assert {row.parameter.rpartition("layers.")[2] for row in coverage.uncovered()} == (
        {"0.mlp.gate.weight", "1.mlp.gate.weight"} if "mixtral" in case else set()
    )
    assert 0.8 < coverage.share < 1
    where = {row.where for row in coverage.rows}
    assert ("experts" in where) == (case == "mixtral")
    assert f"{coverage.share:.1%}" in coverage.table().title == coverage.describe()
    assert coverage.table().row_count == len({(row.where, row.reason) for row in coverage.rows})
    assert sum(numel for _, numel, _ in coverage.groups()) == sum(row.numel for row in coverage.rows)


def test_coverage_share_by_hand() -> None:
    coverage = anatomy(llama()).coverage()
    kv = HIDDEN * 12 * 2
    weights = 2 * HIDDEN * HIDDEN + kv + 3 * HIDDEN * 40
    biases = 2 * HIDDEN + 2 * 12 + 2 * 40 + HIDDEN
    assert coverage.share == pytest.approx(weights / (weights + biases + 2 * HIDDEN))


def test_what_a_row_does_not_describe_is_named() -> None:
    model = GPT2LMHeadModel(GPT2Config(**GPT2, add_cross_attention=True))
    reasons = {row.reason for row in anatomy(model).coverage().uncovered()}
    assert reasons == {"cross attention is not described by the row gpt2"}
    model = llama()
    model.model.layers[0].adapter = nn.Bilinear(3, 3, 3)
    uncovered = anatomy(model).coverage().uncovered()
    assert {row.parameter for row in uncovered} == {f"model.layers.0.adapter.{name}" for name in ("weight", "bias")}
    assert uncovered[0].reason == "Bilinear is not described by the row llama"
    del model.model.layers[1].mlp
    with pytest.raises(CoverageError, match=r"row 'llama' expects a module at 'model.layers.1.mlp"):
        anatomy(model)


def test_linear_inputs_hold_the_layers_that_share_a_tensor() -> None:
    groups = {str(g.site): [x.role for x in g.linears] for g in anatomy(llama()).blocks[0].linear_inputs()}
    assert groups == {
        "blocks.0.attention.input": ["query", "key", "value"],
        "blocks.0.attention.mixed": ["output"],
        "blocks.0.mlp.input": ["gate", "up"],
        "blocks.0.mlp.hidden": ["down"],
    }
    block = anatomy(CASES["mixtral opened"]()).blocks[0]
    assert len(block.linears()) == 4 + 3 * 4
    last = block.linears()[-1]
    assert (last.path, last.role, last.expert) == ("model.layers.0.mlp.experts.3.down", "down", 3)
    assert [x.role for x in anatomy(CASES["gpt2"]()).blocks[0].linears()] == ["query_key_value", "output", "up", "down"]


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_linear_handles_compute_what_the_layer_computes(case: str) -> None:
    model = CASES[case]()
    for linear in anatomy(model).blocks[0].linears():
        x = torch.randn(3, linear.in_features)
        assert linear.weight.shape == (linear.out_features, linear.in_features)
        assert linear.weight.data_ptr() == linear.module.weight.data_ptr()
        torch.testing.assert_close(F.linear(x, linear.weight, linear.bias), linear.module(x))


def test_attention_numbers() -> None:
    attention = anatomy(CASES["qwen3"]()).blocks[0].attention
    assert (attention.heads, attention.key_value_heads, attention.head_dim) == (4, 2, 8)
    assert attention.norm.path == "model.layers.0.input_layernorm"
    assert anatomy(CASES["gemma"]()).blocks[0].mlp.norm.offset == 1
    bert = anatomy(CASES["bert"]()).blocks[0]
    assert bert.attention.norm is None
    assert bert.mlp.norm.feeds_residual


# -- after edits -------------------------------------------------------------------------------------------------------


def test_a_changed_model_reads_like_its_base() -> None:
    model = llama()
    view = anatomy(model)
    down = view.blocks[0].mlp.down
    weight = IntegerWeight.quantize(down.weight, IntegerGrid(4, 8))
    model.model.layers[0].mlp.down_proj = ActLinear.of(down, weight=weight, select=Threshold(0.1))
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Identity())
    model.config.model_type = "actkit_llama"
    fresh, old = view.block(0), view.blocks[0]
    assert isinstance(old.mlp.down.module, nn.Linear)
    assert isinstance(fresh.mlp.down.module, ActLinear)
    assert torch.equal(fresh.mlp.down.weight, weight.dequantize())
    assert (fresh.mlp.down.in_features, fresh.mlp.down.out_features) == (40, HIDDEN)
    again = anatomy(model)
    assert again.architecture == "llama"
    row = next(row for row in again.coverage().rows if row.parameter == f"{down.path}.weight")
    assert (row.where, row.numel) == ("linear", 40 * HIDDEN)
    assert again.coverage().share == pytest.approx(view.coverage().share)
    kept = {down.path: down.module}
    assert view.block(0, kept).original(down.path) is down.module
    assert view.block(0).original(down.path) is fresh.mlp.down.module


def test_a_layer_of_another_kind_is_left_out_and_named() -> None:
    model = llama()
    model.model.layers[0].mlp.down_proj = nn.Sequential(nn.Linear(40, 3), nn.Linear(3, HIDDEN))
    view = anatomy(model)
    assert "down" not in [linear.role for linear in view.blocks[0].linears()]
    assert len(view.coverage().uncovered()) == 4
    with pytest.raises(CoverageError, match="a Sequential stands here"):
        _ = view.blocks[0].mlp.down.weight
    assert "does not read" in equalization_sets(view.blocks[0])[-1].refused


def test_compiled_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="compile after"):
        anatomy(torch.compile(llama()))


def test_rows_do_not_overwrite_each_other() -> None:
    register_architecture(LLAMA)
    from dataclasses import replace

    with pytest.raises(ValueError, match="'llama' is described already"):
        register_architecture(replace(LLAMA, name="other"))


# -- where scales can move ---------------------------------------------------------------------------------------------


def sets(model: nn.Module) -> list[EqualizationSet]:
    return list(equalization_sets(anatomy(model).blocks[0]))


def names(found: EqualizationSet) -> tuple[str, list[str], str]:
    producer = found.producer if isinstance(found.producer, str) else found.producer.path
    return producer, [linear.path for linear in found.consumers], found.inspect


def test_equalization_sets_of_a_gated_model() -> None:
    a, m = "model.layers.0.self_attn", "model.layers.0.mlp"
    found = sets(llama())
    assert [names(x) for x in found] == [
        ("model.layers.0.input_layernorm", [f"{a}.q_proj", f"{a}.k_proj", f"{a}.v_proj"], a),
        (f"{a}.v_proj", [f"{a}.o_proj"], f"{a}.o_proj"),
        ("model.layers.0.post_attention_layernorm", [f"{m}.gate_proj", f"{m}.up_proj"], m),
        (f"{m}.up_proj", [f"{m}.down_proj"], f"{m}.down_proj"),
    ]
    assert [x.refused for x in found] == [None] * 4
    assert found[1].shared == SharedHeads(heads=2, readers=2, width=HIDDEN // 4)
    assert sets(llama(num_key_value_heads=4))[1].shared is None


def test_equalization_sets_of_the_other_families() -> None:
    found = sets(CASES["gpt2"]())
    assert found[1].producer_rows == PartRows(2 * HIDDEN, HIDDEN)
    assert names(found[3]) == ("transformer.h.0.mlp.act", ["transformer.h.0.mlp.c_proj"], "transformer.h.0.mlp.c_proj")
    assert [x.refused for x in found] == [None] * 4
    relu = sets(randomised(GPT2LMHeadModel(GPT2Config(**GPT2, activation_function="relu"))))
    assert relu[3].producer.path == "transformer.h.0.mlp.c_fc"
    bert = sets(CASES["bert"]())
    assert bert[0].producer is None
    assert [x.refused and x.refused.split(":")[0] for x in bert] == ["post-norm", None, "post-norm", None]
    mixtral = sets(CASES["mixtral opened"]())
    assert mixtral[2].refused is None and mixtral[2].rescaled == ("model.layers.0.mlp.gate.weight",)
    assert len(mixtral[2].consumers) == 8
    assert [x.producer.expert for x in mixtral[3:]] == [0, 1, 2, 3]


def test_shared_norms_are_refused() -> None:
    model = llama()
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    assert sets(model)[0].refused == "model.layers.0.input_layernorm is shared with another part of the model"


@pytest.mark.parametrize("case", ["llama", "gemma", "qwen3", "gpt2", "vit", "bert", "mixtral opened"])
def test_moving_a_scale_keeps_the_function(case: str) -> None:
    """What is not refused is exact: producer / s, consumers * s (activations: the scale divides their output)."""
    model = CASES[case]()
    with torch.no_grad():
        before = model(**batch(model)).logits
        for block in anatomy(model).blocks:
            for found in equalization_sets(block):
                if found.refused is None:
                    move(model, found)
        torch.testing.assert_close(model(**batch(model)).logits, before, atol=1e-4, rtol=1e-4)


def move(model: nn.Module, found: EqualizationSet) -> None:
    columns = torch.rand(found.consumers[0].in_features) + 0.5
    if found.shared is not None:  # heads 0 and 1 read value head 0
        columns = columns.view(2, 2, -1)[:, :1].expand(2, 2, -1).flatten()
    scale = columns if found.shared is None else columns.view(2, 2, -1)[:, 0].flatten()
    producer = found.producer
    if isinstance(producer, Norm):
        weight = producer.module.weight
        weight.copy_((weight + producer.offset) / scale - producer.offset)
        if getattr(producer.module, "bias", None) is not None:
            producer.module.bias /= scale
    elif isinstance(producer, Linear):
        rows = slice(None) if found.producer_rows is None else found.producer_rows.indices()
        producer.weight[rows] /= scale[:, None]
        if producer.bias is not None:
            producer.bias[rows] /= scale
    else:
        parent, _, name = producer.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Sequential(model.get_submodule(producer), Divide(scale)))
    for linear in found.consumers:
        linear.weight.mul_(columns)
    for name in found.rescaled:
        model.get_parameter(name).mul_(columns)


class Divide(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale


def test_held_blocks_are_those_that_were_read() -> None:
    model = llama()
    view = anatomy(model)
    assert view.block(0) is not view.blocks[0]
    with view.held():
        assert view.block(0) is view.blocks[0]
        with view.held():
            assert view.block(1) is view.blocks[1]
        assert view.block(1) is view.blocks[1]
        view.refresh(1)
        assert view.block(1) is view.blocks[1]
    assert view.block(1) is not view.blocks[1]
