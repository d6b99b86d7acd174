"""PLM: against transformers' DeepSeek classes with equal weights, a float64 reference, and itself without a cache."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

import actkit
from actkit.core.ground.errors import CheckpointError
from actkit.sparsity.plm.activated_parameters import activated_parameters
from actkit.sparsity.plm.latent_attention import LatentAttention
from actkit.sparsity.plm.model import LatentCache, PLMConfig, PLMForCausalLM, SquaredReLUMLP, load_plm
from actkit.sparsity.teal import Teal
from actkit.testing import tiny_model

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "max_position_embeddings": 64,
}
IDS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))


def tiny(**changes: Any) -> PLMForCausalLM:
    torch.manual_seed(0)
    model = PLMForCausalLM(PLMConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.eval()


def deepseek(cls: Any, **changes: Any) -> Any:
    """The configuration of DeepSeek with the sizes of `tiny`, and no experts."""
    return cls(
        **{
            **SIZES,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "first_k_dense_replace": 2,
            "hidden_act": "relu2",
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
            "tie_word_embeddings": True,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
            **changes,
        }
    )


def attention_of(model: PLMForCausalLM) -> LatentAttention:
    found: Any = model.model.layers[0].self_attn
    return found


# -- the model ---------------------------------------------------------------------------------------------------------


def test_the_published_model_has_its_size() -> None:
    with torch.device("meta"):
        model = PLMForCausalLM(PLMConfig.preset("1.8b"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_825_458_176
    layer: nn.Module = model.model.layers[0]
    assert sum(parameter.numel() for parameter in layer.parameters()) == 47_321_600
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("query_rank", [None, 8])
@pytest.mark.parametrize("interleaved", [True, False])
def test_the_model_is_deepseeks_with_another_mlp(interleaved: bool, query_rank: int | None) -> None:
    ours = tiny(rope_interleave=interleaved, q_lora_rank=query_rank)

    class Ungated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(ACT2FN["relu2"](self.up_proj(x)))

    config = deepseek(DeepseekV3Config, rope_interleave=interleaved, q_lora_rank=query_rank)
    theirs = DeepseekV3ForCausalLM(config).eval()
    for layer in theirs.model.layers:
        layer.mlp = Ungated()
    theirs.load_state_dict(ours.state_dict())
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    with torch.no_grad():
        for implementation in ("sdpa", "eager"):
            ours.set_attn_implementation(implementation)
            theirs.set_attn_implementation(implementation)
            found, expected = ours(IDS, attention_mask=mask).logits, theirs(IDS, attention_mask=mask).logits
            torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


def test_attention_is_deepseek_v2s() -> None:
    """Which turns neighbours as complex numbers."""
    ours = attention_of(tiny())
    config = deepseek(DeepseekV2Config)
    theirs = DeepseekV2Attention(config, 0).eval()
    theirs.load_state_dict(ours.state_dict())
    x, places = torch.randn(2, 7, 16), torch.arange(7)[None]
    angles = DeepseekV2RotaryEmbedding(config)(x, places)
    cos, sin = (torch.cat((each, each), -1) for each in (angles.real, angles.imag))
    mask = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        expected = theirs(x, mask, position_embeddings=angles)[0]
        torch.testing.assert_close(ours(x, (cos, sin), mask)[0], expected, rtol=1e-5, atol=1e-5)


def by_hand(attention: LatentAttention, x: Tensor, theta: float) -> Tensor:
    """One sequence x [tokens, hidden] in float64, number by number: pairs (0, 1), (2, 3) ... turn."""
    weights = {name: value.double() for name, value in attention.state_dict().items()}
    x, rank, rope = x.double(), attention.kv_lora_rank, attention.qk_rope_head_dim
    nope, heads, size = attention.qk_nope_head_dim, attention.num_heads, attention.v_head_dim

    def turned(vector: Tensor, place: int) -> Tensor:
        out = vector.clone()
        for i in range(rope // 2):
            angle = place * theta ** (-2 * i / rope)
            a, b = float(vector[2 * i]), float(vector[2 * i + 1])
            out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
            out[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    latents, keys = [], []
    for place, row in enumerate(x):
        both = weights["kv_a_proj_with_mqa.weight"] @ row
        c = both[:rank]
        latents.append(c / (c.square().mean() + 1e-6).sqrt() * weights["kv_a_layernorm.weight"])
        keys.append(turned(both[rank:], place))
    rows = []
    for place, row in enumerate(x):
        mixed = []
        for head in range(heads):
            query = (weights["q_proj.weight"] @ row)[head * (nope + rope) :][: nope + rope]
            own = weights["kv_b_proj.weight"][head * (nope + size) :][: nope + size]
            scores = torch.stack(
                [
                    (query[:nope] @ (own[:nope] @ c) + turned(query[nope:], place) @ k) / math.sqrt(nope + rope)
                    for c, k in zip(latents[: place + 1], keys, strict=False)
                ]
            )
            mixed.append(sum(p * (own[nope:] @ c) for p, c in zip(scores.softmax(0), latents, strict=False)))
        rows.append(weights["o_proj.weight"] @ torch.cat(mixed))
    return torch.stack(rows)


def test_attention_is_its_formula() -> None:
    model = tiny()
    attention, x = attention_of(model), torch.randn(1, 9, 16)
    rotary = model.model.rotary_emb(x, torch.arange(9)[None])
    with torch.no_grad():
        found = attention(x, rotary)[0][0]
    torch.testing.assert_close(found.double(), by_hand(attention, x[0], 100_000.0), rtol=1e-5, atol=1e-5)


def test_the_mlp_is_its_formula() -> None:
    mlp, x = SquaredReLUMLP(16, 24), torch.randn(5, 16)
    hidden = (x @ mlp.up_proj.weight.T).clamp(min=0)
    torch.testing.assert_close(mlp(x), hidden * hidden @ mlp.down_proj.weight.T)


# -- the cache ---------------------------------------------------------------------------------------------------------


def decoded(model: PLMForCausalLM, cache: str, steps: int, mask: Tensor | None = None) -> tuple[Tensor, LatentCache]:
    """Logits of a prompt of 5 and of `steps` single tokens after it."""
    kept = LatentCache(config=model.config)
    for layer in model.model.layers:
        layer.self_attn.cache = cache
    found = []
    with torch.no_grad():
        for begin, end in [(0, 5), *((at, at + 1) for at in range(5, 5 + steps))]:
            seen = None if mask is None else mask[:, :end]
            found.append(model(IDS[:, begin:end], attention_mask=seen, past_key_values=kept).logits)
    return torch.cat(found, 1), kept


@pytest.mark.parametrize("query_rank", [None, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_changes_nothing(padded: bool, query_rank: int | None) -> None:
    model, mask = tiny(q_lora_rank=query_rank), torch.ones_like(IDS)
    if padded:
        mask[1, :3] = 0
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask).logits
    expanded, large = decoded(model, "expanded", 6, mask)
    latent, small = decoded(model, "latent", 6, mask)
    for found in (latent, expanded):
        torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-5)
    assert small.nbytes * (4 * (10 + 10)) == large.nbytes * (8 + 4)
    small.crop(-6)
    assert small.get_seq_length() == 5
    with torch.no_grad():
        again = model(IDS[:, 5:6], attention_mask=mask[:, :6], past_key_values=small).logits[:, -1]
    torch.testing.assert_close(again, latent[:, 5], rtol=1e-4, atol=1e-5)


def test_single_tokens_are_absorbed_and_prompts_are_not() -> None:
    attention = attention_of(tiny())
    assert attention.absorbs(1, 100) and not attention.absorbs(100, 100)
    assert not attention.train().absorbs(1, 100)
    shape = PLMConfig.preset()
    with torch.device("meta"):
        published = LatentAttention(shape.hidden_size, 16, 512, 128, 64, 128).eval()
    assert published.absorbs(1, 2) and published.absorbs(64, 4096) and not published.absorbs(512, 4096)


def test_absorbing_copies_nothing() -> None:
    attention = attention_of(tiny())
    keys, values = attention.absorb()
    assert (keys.shape, values.shape) == ((4, 6, 8), (4, 10, 8))
    assert keys.data_ptr() == attention.kv_b_proj.weight.data_ptr()
    assert values._base is not None


def test_generation_and_beams() -> None:
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.cache = "latent"
    for settings in ({}, {"num_beams": 3}):
        given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **settings}
        cached = model.generate(IDS[:, :5], past_key_values=LatentCache(config=model.config), **given)
        assert torch.equal(cached, model.generate(IDS[:, :5], use_cache=False, **given))


def test_a_changed_projection_is_called() -> None:
    """What a method puts in place of kv_b_proj has its say about every cached token."""
    model = tiny()
    batches = [{"input_ids": IDS}]
    actkit.apply(model, Teal(sparsity=0.5), batches, undo="off")
    with torch.no_grad():
        whole = model(IDS).logits
    found, _ = decoded(model, "latent", 6)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


# -- loading -----------------------------------------------------------------------------------------------------------


def published(model: PLMForCausalLM, folder: Path) -> Path:
    """A folder as it is published: with the name of code that would have to be trusted."""
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    for ours in ("attention_cache", "rope_parameters", "head_dim"):
        settings.pop(ours, None)
    settings |= {"rope_theta": 100_000.0, "rope_scaling": None, "torch_dtype": "float32"}
    settings["auto_map"] = {
        "AutoConfig": "configuration_plm.PLMConfig",
        "AutoModelForCausalLM": "modeling_plm.PLMForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_published_folder_is_read_without_its_code(tmp_path: Path) -> None:
    model = tiny()
    folder = published(model, tmp_path / "plm")
    with torch.no_grad():
        expected = model(IDS).logits
        for found in (load_plm(folder), actkit.load(folder), load_plm(folder, cache="expanded")):
            assert isinstance(found, PLMForCausalLM)
            assert torch.equal(found(IDS).logits, expected)
    assert attention_of(found).cache == "expanded"


def test_a_changed_one_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny()
    actkit.apply(model, Teal(sparsity=0.5), [{"input_ids": IDS}], undo="off")
    folder = actkit.save(model, tmp_path / "changed")
    assert AutoConfig.from_pretrained(folder).model_type == "actkit_plm"
    with torch.no_grad():
        for found in (actkit.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
            assert torch.equal(found(IDS).logits, model(IDS).logits)


def test_wrong_tensors_are_listed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = published(tiny(), tmp_path / "plm")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.gate_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: model.layers.0.mlp.up_proj.*unexpected: .*gate_proj"):
        load_plm(folder)


def test_another_model_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="model_type is 'llama'"):
        load_plm(tmp_path / "llama")


# -- activated parameters ----------------------------------------------------------------------------------------------


def test_activated_parameters_are_those_that_are_counted_by_hand() -> None:
    model, zeros = tiny(), []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda _, __, y: zeros.append(float((y == 0).float().mean())))
    with torch.no_grad():
        model(IDS)
    found = activated_parameters(model, [{"input_ids": IDS}], progress=False)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert [layer.zeros for layer in found.layers] == pytest.approx(zeros[:2])
    assert found.activated == pytest.approx(everything - sum(zeros[:2]) * 16 * 24)
    assert found.predicted == pytest.approx(everything - 2 * sum(zeros[:2]) * 16 * 24)
    assert 0 < found.zeros < 1


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim: 5 was given; features turn in pairs"),
        ({"kv_lora_rank": 0}, "kv_lora_rank: 0 was given; give 1 or more"),
        ({"q_lora_rank": -1}, "q_lora_rank: -1 was given"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: 2 was given; all heads read one latent"),
    ],
)
def test_bad_sizes(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        PLMConfig(**{**SIZES, **changes})


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="cache: 'narrow' was given, allowed are latent, expanded"):
        LatentAttention(16, 4, 8, 6, 4, 10, cache="narrow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"name: '7b' was given, allowed are 1\.8b"):
        PLMConfig.preset("7b")  # type: ignore[arg-type]
