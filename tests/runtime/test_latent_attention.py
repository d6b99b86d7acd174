"""Latent attention in the decoder: the logits of the models' own forward passes, from a cache of latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.measure.generation import generate_ids
from actkit.core.recipe.runner import apply
from actkit.kernels.decode_latent import CHUNK, attend_to_rows
from actkit.kernels.process import compiled
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.decoder import Decoder
from actkit.sparsity.plm.model import PLMConfig, PLMForCausalLM
from actkit.sparsity.teal import Teal

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "max_position_embeddings": 256,
}
IDS = torch.randint(300, (1, 120), generator=torch.Generator().manual_seed(0))


def drawn(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if "bias" in name else 1.0, 0.2)
            elif "embed" not in name:
                parameter.normal_(std=0.15)
    return model.eval()


def plm(**changes: Any) -> PLMForCausalLM:
    torch.manual_seed(0)
    return drawn(PLMForCausalLM(PLMConfig(**{**SHAPE, **changes})))


def deepseek(**changes: Any) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    settings = {"first_k_dense_replace": 2, "num_key_value_heads": 3, "q_lora_rank": 32, "moe_intermediate_size": 16}
    return drawn(DeepseekV3ForCausalLM(DeepseekV3Config(**{**SHAPE, **settings, "n_routed_experts": 8, **changes})))


def reference(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0].float()


def near(found: Tensor, expected: Tensor, most: float) -> None:
    assert float((found - expected).norm() / expected.norm()) < most


def checked(model: nn.Module, most: float = 1e-4, threads: int = 2, **settings: Any) -> Decoder:
    """A decoder whose prompts and single steps give the logits of the model."""
    expected, decoder = reference(model), Decoder(model, threads=threads, capacity=128, **settings)
    decoder.few = 0
    near(decoder(IDS[0, :40].tolist()), expected[39], most)
    near(decoder(IDS[0, 40:70].tolist()), expected[69], most)  # a prompt behind another
    decoder.few = 1
    near(torch.stack([decoder([token]) for token in IDS[0, 70:110].tolist()]), expected[70:110], most)  # and steps
    decoder.reset()
    near(torch.stack([decoder([token]) for token in IDS[0, :30].tolist()]), expected[:30], most)
    return decoder


CASES = {
    "plm": lambda: plm(),
    "halves of a head turn": lambda: plm(rope_interleave=False),
    "queries go through a narrow layer": lambda: plm(q_lora_rank=32),
    "widths that fill no tile": lambda: plm(kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=7),
    "biases": lambda: plm(attention_bias=True, q_lora_rank=32),
    "expanded": lambda: plm(attention_cache="expanded"),
    "expanded and narrow": lambda: plm(attention_cache="expanded", q_lora_rank=32, rope_interleave=False),
    "deepseek": lambda: deepseek(),
    "deepseek of full rank, halves": lambda: deepseek(q_lora_rank=None, rope_interleave=False),
    "deepseek, yarn": lambda: deepseek(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_models(case: str) -> None:
    checked(CASES[case]())


def test_one_thread() -> None:
    checked(plm(q_lora_rank=32), threads=1)


def test_more_threads_than_heads() -> None:
    checked(plm(num_attention_heads=1, q_lora_rank=32))


def test_the_cache_is_as_small_as_it_can_be() -> None:
    latent, expanded = checked(plm()), checked(plm(attention_cache="expanded"))
    assert latent.cache_bytes == 2 * 128 * (32 + 8) * 4
    assert expanded.cache_bytes == 2 * 128 * 3 * (16 + 8 + 24) * 4


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 16), (4, 24)])
def test_codes_are_absorbed_as_they_are(bits: int, group: int) -> None:
    """Against the model with the same codes."""
    sizes = {"kv_lora_rank": 48, "hidden_size": 96, "intermediate_size": 384} if group == 24 else {"v_head_dim": 32}
    model = plm(**sizes)
    apply(model, [RoundToNearest(bits=bits, group_size=group)], progress=False)
    checked(model, 1e-3, activations="float32")


def test_bfloat16_weights() -> None:
    model = plm().to(torch.bfloat16)
    expected = reference(model.float())
    decoder = Decoder(model.to(torch.bfloat16), threads=2, capacity=128)
    decoder.few = 1
    near(torch.stack([decoder([token]) for token in IDS[0, :30].tolist()]), expected[:30], 1e-3)
    decoder.reset()
    decoder.few = 0
    near(decoder(IDS[0, :60].tolist()), expected[59], 3e-2)


def test_zeros_of_squared_relu_are_not_read() -> None:
    model = plm()
    with torch.no_grad():
        hidden = []
        handle = model.model.layers[0].mlp.act_fn.register_forward_hook(
            lambda _, __, y: hidden.append((y != 0).float())
        )
        model(IDS[:, :30])
        handle.remove()
    decoder = checked(model)
    share = float(hidden[0].mean())
    assert 0.3 < share < 0.7
    assert decoder.density is not None and abs(decoder.density - share) < 0.15  # of the down projection, both layers


def test_selected_inputs_of_other_layers() -> None:
    model = plm()
    apply(model, [Teal(sparsity=0.4)], [{"input_ids": IDS}], progress=False)
    reason = Decoder.supports(model)
    assert reason is not None and "kv_b_proj selects its inputs" in reason


def test_experts_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="experts"):
        Decoder(deepseek(first_k_dense_replace=1, n_group=2, topk_group=1, num_experts_per_tok=2))


def test_blocks_of_two_kinds_are_refused() -> None:
    model = plm()
    model.model.layers[1].self_attn.cache = "expanded"
    with pytest.raises(UnsupportedModelError, match="latent attention of another shape"):
        Decoder(model)


def test_generation_is_the_models() -> None:
    model = plm()
    with Decoder(model, threads=2, capacity=64) as decoder:
        found = list(decoder.generate(IDS[0, :10], max_new_tokens=20, end=()))
    expected = model.generate(IDS[:, :10], max_new_tokens=20, do_sample=False, pad_token_id=0)[0, 10:]
    assert found == expected.tolist()
    assert list(generate_ids(model, IDS[0, :10], max_new_tokens=20, end=())) == found


@compiled()
def attended(queries, rows, rank, scaling, scores, largest, total, out):  # type: ignore[no-untyped-def]
    attend_to_rows(queries, rows, rows, rank, scaling, scores, largest, total, out)


@pytest.mark.parametrize("tokens", [1, 7, 8, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_the_kernel_is_softmax_in_float64(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    queries, rows = torch.randn(3, 20, generator=generator), 3 * torch.randn(tokens, 20, generator=generator)
    out, state = np.empty(3 * 16, np.float32), np.empty((2, 3), np.float32)
    scores = np.empty((3, CHUNK), np.float32)
    attended(queries.numpy(), rows.numpy(), 16, np.float32(0.3), scores, state[0], state[1], out)
    expected = (queries.double() @ rows.double().T * 0.3).softmax(-1) @ rows[:, :16].double()
    torch.testing.assert_close(torch.from_numpy(out).view(3, 16).double(), expected, rtol=1e-5, atol=1e-5)
