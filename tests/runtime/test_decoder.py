"""The decoder against transformers' own forward pass."""

import os
import threading

import pytest
import torch
from decoded import FAMILIES, SHAPE, WINDOWS, family
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from actkit.core.edit.edits import set_module
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import DataError, MemoryLimitError, NonFiniteError, UnsupportedModelError
from actkit.core.layers.activations import Thresholded
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.selections import Threshold
from actkit.core.layers.weights import IntegerWeight
from actkit.core.recipe.runner import apply
from actkit.kernels import integer_dots
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.zeroquant_v2.lorc import Lorc
from actkit.runtime import prompt
from actkit.runtime.decoder import Decoder
from actkit.runtime.prompt import few_tokens
from actkit.sparsity.spark.sparkify import Sparkify, spark_lm
from actkit.sparsity.teal import Teal

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True, hidden_act="relu")),
    "llama3 rope": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "linear rope": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LINEAR)),
    "dynamic rope": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=DYNAMIC)),
    "yarn rope": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=YARN)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)),
}
IDS = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def dense_prompts(monkeypatch):
    """Models this small would read every prompt of these tests step by step."""
    monkeypatch.setattr("actkit.runtime.decoder.few_tokens", lambda *_: 2)


STEP = Decoder._step
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def test_a_short_prompt_is_read_the_faster_way(monkeypatch):
    """How short depends on the model, and is the same in every decoder of it; the logits are those of transformers."""
    monkeypatch.setattr("actkit.runtime.decoder.few_tokens", few_tokens)
    taken, few = [], {}
    monkeypatch.setattr(Decoder, "_step", lambda self, token, step=STEP: (taken.append(token), step(self, token)))
    for bits in (None, 8, 4):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | SMOLLM2)).eval()
        if bits:
            apply(model, [RoundToNearest(bits=bits, group_size=64)], progress=False)
        decoder = Decoder(model, threads=1, activations="float32")
        few[bits] = decoder.few
        assert Decoder(model, threads=1, activations="float32").few == decoder.few
        if bits and integer_dots.available():
            assert Decoder(model, threads=1).few < decoder.few  # as a pass in integers takes less time
        expected = reference(model)
        for length in (3, 20):
            taken.clear()
            decoder.reset()
            found = decoder(IDS[0, :length].tolist())
            assert (found - expected[length - 1]).norm() < 1e-4 * expected[length - 1].norm()
            assert len(taken) == (length if length <= decoder.few else 0)
    assert 1 < few[None] < few[8] < few[4]


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() == 1 else None
    return model


def reference(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits[0].float()


def stepped(decoder, ids=IDS):
    decoder.reset()
    return torch.stack([decoder([token]) for token in ids[0].tolist()])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
    model = made(name)
    expected, decoder = reference(model), Decoder(model)
    torch.testing.assert_close(stepped(decoder), expected, rtol=1e-4, atol=1e-4)
    decoder.reset()
    for end in (12, 19, 20):  # a prompt, a second part of it, a single token
        found = decoder(IDS[0, decoder.position : end].tolist())
        torch.testing.assert_close(found, expected[end - 1], rtol=1e-4, atol=1e-4)


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0],
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "passes",
    [
        [50, *range(51, 81)],  # tokens that cross the original context one by one
        [50, 60, 75, 76, 77],  # a part of a prompt that crosses it
        [50, 63, 65, 66],  # two tokens in one pass
        [70, 71],  # a prompt beyond it
        [64, 65],
    ],
)
def test_longrope_changes_its_frequencies_where_transformers_does(passes):
    torch.manual_seed(0)
    settings = {**SHAPE, "max_position_embeddings": 256, "rope_parameters": LONG, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    ids = torch.randint(300, (1, 80), generator=torch.Generator().manual_seed(1))
    decoder, cache = Decoder(model), None
    for _ in range(2):  # again after it has gone beyond
        decoder.reset()
        cache, begin = None, 0
        for end in passes:
            with torch.no_grad():
                output = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found = decoder(ids[0, begin:end].tolist())
            torch.testing.assert_close(found, output.logits[0, -1], rtol=1e-4, atol=1e-4)
            begin = end


@pytest.mark.parametrize("name", FAMILIES)
def test_families_decode_as_in_transformers(name):
    model = family(name)
    expected, decoder = reference(model), Decoder(model, threads=2)
    assert expected.std() > 0.3
    torch.testing.assert_close(stepped(decoder), expected, rtol=1e-4, atol=1e-4)
    decoder.reset()
    for end in (12, 19, 20):
        found = decoder(IDS[0, decoder.position : end].tolist())
        torch.testing.assert_close(found, expected[end - 1], rtol=1e-4, atol=1e-4)
    tokens = model.generate(IDS[:, :9], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert list(decoder.generate(IDS[0, :9], max_new_tokens=20, end=())) == tokens[0, 9:].tolist()


@pytest.mark.parametrize("name", ["nemotron", "granite", "cohere", "glm4", "gemma2", "olmo2"])
def test_fewer_heads_than_threads(name):
    """The first thread has no heads then, and the output projection's bias is added all the same."""
    model = family(name, num_key_value_heads=1)
    expected, decoder = reference(model), Decoder(model, threads=2)
    torch.testing.assert_close(stepped(decoder), expected, rtol=1e-4, atol=1e-4)
    decoder.reset()
    torch.testing.assert_close(decoder(IDS[0].tolist()), expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["phi3", "glm4", "nemotron", "cohere", "granite", "olmo, clamped", "gemma3", "gpt_neox", "opt"]
)
@pytest.mark.parametrize("bits", [None, 4])
def test_changed_families(name, bits):
    """Selected inputs, integer weights and a sparse gate (ReLU) in fused layers, without a gate and side by side."""
    model = family(name, **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), "relu"))
    apply(model, [Teal(sparsity=0.4)], [{"input_ids": IDS}], progress=False)
    for layer in model.modules():
        if bits is not None and isinstance(layer, ActLinear):
            layer.storage = IntegerWeight.quantize(layer.storage.dequantize(), IntegerGrid(bits, 32, "input"))
    expected, decoder = reference(model), Decoder(model, threads=2, activations="float32")
    assert (stepped(decoder) - expected).norm() < 1e-4 * expected.norm()
    decoder.reset()
    assert (decoder(IDS[0].tolist()) - expected[-1]).norm() < 1e-4 * expected[-1].norm()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("phi", {"qk_layernorm": True}, "in attention by the root mean square"),
        ("stablelm", {"qk_layernorm": True}, "StableLmLayerNormPerHead, whose forward pass"),
        ("cohere", {"use_qk_norm": True}, "in attention by the root mean square"),
        ("llama, biases", {"sliding_window": 5}, "has a sliding_window, which its class does not apply"),
        ("starcoder2", WINDOWS, "layer_types, which its class does not tell apart"),
        ("opt", {"do_layer_norm_before": False}, "stand behind the residual sum"),
        ("opt", {"word_embed_proj_dim": 32}, "project_in stands between embedding and blocks"),
        ("opt", {"_remove_final_layer_norm": True}, "no norm behind its last block"),
        ("gemma3", {"use_bidirectional_attention": True}, "see those behind them"),
    ],
)
def test_what_families_can_also_say_is_refused(name, changes, words):
    assert words in Decoder.supports(family(name, **changes))


def test_one_thread():
    model = made("llama")
    torch.testing.assert_close(stepped(Decoder(model, threads=1)), reference(model), rtol=1e-4, atol=1e-4)


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2}
GRIDS = [  # one per linear layer of two blocks
    IntegerGrid(4, 32, "input"),
    IntegerGrid(8, 64, "input", symmetric=True),
    IntegerGrid(3, -1, "input"),
    IntegerGrid(4, 128, "output"),
    IntegerGrid(8, 128, "output", symmetric=True),
    IntegerGrid(4, 16, "output"),
    IntegerGrid(8, 64, "output"),
    IntegerGrid(4, 4, "output"),  # groups that no kernel reads
]


@pytest.mark.parametrize(("activations", "most", "in_prompts"), [("float32", 1e-5, 1e-5), (None, 1e-4, 0.2)])
def test_integer_weights(activations, most, in_prompts):
    """All formats in one model, with thresholds, some of which inputs rounded to 8 bits in a prompt fall short of."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | WIDE)).eval()
    apply(model, [Teal(sparsity=0.4)], [{"input_ids": IDS}], progress=False)
    layers = [layer for layer in model.modules() if isinstance(layer, ActLinear)]
    for number, layer in enumerate(layers):
        grid = GRIDS[number % len(GRIDS)]
        layer.storage = IntegerWeight.quantize(layer.dequantized(), grid)
    decoder, expected = Decoder(model, activations=activations), reference(model)
    assert decoder.activations == (activations or ("int16" if integer_dots.available() else "float32"))
    assert (stepped(decoder) - expected).norm() < most * expected.norm()
    assert decoder.density == pytest.approx(0.6, abs=0.1)
    decoder.reset()
    assert (decoder(IDS[0].tolist()) - expected[-1]).norm() < in_prompts * expected[-1].norm()
    decoder.reset()
    assert (decoder.all_logits(IDS[0].tolist()) - expected).norm() < in_prompts * expected.norm()


def test_prompts_in_integers_lose_nothing_but_their_rounding(monkeypatch):
    """With the inputs left as they are, which the kernel's own tests round, the logits are those of transformers."""
    monkeypatch.setattr(prompt, "RoundedRows", lambda x, span: x)
    monkeypatch.setattr(prompt, "multiply_rounded", exact_product)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | WIDE, attention_bias=True)).eval()
    apply(model, [Teal(sparsity=0.4)], [{"input_ids": IDS}], progress=False)
    layers = [layer for layer in model.modules() if isinstance(layer, ActLinear)]
    for number, layer in enumerate(layers):
        layer.storage = IntegerWeight.quantize(layer.dequantized(), GRIDS[number % len(GRIDS)])
    decoder, expected = Decoder(model, threads=2), reference(model)
    taken.clear()
    assert (decoder.all_logits(IDS[0].tolist()) - expected).norm() < 1e-4 * expected.norm()
    assert len(taken) > 1 or not integer_dots.available()


taken = []


def exact_product(x, weight, bias, dtype):
    taken.append(weight)
    y = x.float() @ weight.dense().t()
    return (y if bias is None else y + bias[: y.shape[1]]).to(dtype)


def test_bfloat16_weights_lose_less_than_in_transformers():
    """Errors against float32 arithmetic on the same weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | WIDE)).eval().bfloat16()
    exact = LlamaForCausalLM(model.config).eval()
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    expected, theirs = reference(exact), reference(model)
    decoder = Decoder(model)
    assert (stepped(decoder) - expected).norm() < 0.1 * (theirs - expected).norm()
    decoder.reset()
    prompt = (decoder(IDS[0].tolist()) - expected[-1]).norm()
    assert prompt <= (theirs[-1] - expected[-1]).norm()


def test_zeros_behind_a_relu_are_not_read():
    decoder = Decoder(made("tied"))
    stepped(decoder)
    dense = Decoder(made("llama"))
    stepped(dense)
    assert dense.density is None and 0.2 < decoder.density < 0.8
    assert decoder.bytes_per_token < dense.bytes_per_token
    narrow = made("tied").bfloat16()
    torch.testing.assert_close(stepped(Decoder(narrow)), reference(narrow.float()), rtol=0.02, atol=0.02)


def cut_gates(model, threshold=0.02):
    for layer in model.model.layers:
        layer.mlp.act_fn = Thresholded(layer.mlp.act_fn, threshold)
    return model


@pytest.mark.parametrize("name", ["llama", "tied"])  # SiLU and ReLU
def test_thresholded_gates(name):
    """Units are skipped whose gate is small: up rows and down columns side by side."""
    model = cut_gates(made(name))
    decoder, expected = Decoder(model), reference(model)
    torch.testing.assert_close(stepped(decoder), expected, rtol=1e-4, atol=1e-4)
    assert 0.1 < decoder.density < 0.5
    decoder.reset()
    torch.testing.assert_close(decoder(IDS[0].tolist()), expected[-1], rtol=1e-4, atol=1e-4)
    model.model.layers[0].mlp.act_fn.threshold.fill_(0.5)
    decoder.follow_selections()
    torch.testing.assert_close(stepped(decoder), reference(model), rtol=1e-4, atol=1e-4)


def test_thresholded_gates_beside_other_changes():
    """Nothing is bundled where the down projection selects its inputs, or the up projection holds integers."""
    model = cut_gates(made("llama"))
    apply(model, [RoundToNearest(bits=4, group_size=32)], progress=False)
    model.model.layers[0].mlp.up_proj = made("llama").model.layers[0].mlp.up_proj
    down = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = ActLinear.of(down, select=Threshold(0.01))
    decoder, expected = Decoder(model), reference(model)
    assert (stepped(decoder) - expected).norm() < 1e-4 * expected.norm()
    decoder.reset()
    torch.testing.assert_close(decoder(IDS[0].tolist()), expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [IntegerGrid(4, 32, "input"), IntegerGrid(8, -1, "input", symmetric=True)])
def test_integer_rows_behind_a_sparse_gate(grid):
    model = cut_gates(made("llama"))
    for layer in model.model.layers:
        up = ActLinear.of(layer.mlp.up_proj)
        up.storage = IntegerWeight.quantize(up.dequantized(), grid)
        layer.mlp.up_proj = up
    decoder, expected = Decoder(model), reference(model)
    assert (stepped(decoder) - expected).norm() < 1e-5 * expected.norm()
    assert 0.1 < decoder.density < 0.5
    decoder.reset()
    torch.testing.assert_close(decoder(IDS[0].tolist()), expected[-1], rtol=1e-4, atol=1e-4)


SPARK = [
    {"attended": None},
    {"density": None, "attended": 5},
    {"density": None, "attended": 1},  # the threshold is often above all scores
    {"density": 0.2, "attended": 5},
]


@pytest.mark.parametrize("settings", SPARK)
def test_spark(settings):
    """Neurons, keys, and both chosen by statistical top-k; in steps, as a prompt and as its second part."""
    torch.manual_seed(0)
    model = spark_lm(LlamaConfig(**SHAPE), **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    decoder, expected = Decoder(model), reference(model)
    torch.testing.assert_close(stepped(decoder), expected, rtol=1e-5, atol=1e-5)
    decoder.reset()
    for end in (12, 20):
        found = decoder(IDS[0, decoder.position : end].tolist())
        torch.testing.assert_close(found, expected[end - 1], rtol=1e-5, atol=1e-5)


def test_statistical_top_k_of_gated_mlps():
    model = made("llama")
    apply(model, [Sparkify(density=0.2, first=1)], min_coverage=0.2, progress=False)
    decoder, expected = Decoder(model), reference(model)
    torch.testing.assert_close(stepped(decoder), expected, rtol=1e-5, atol=1e-5)
    assert decoder.density == pytest.approx(0.2, abs=0.1)


@pytest.mark.parametrize("of", ["dropped", "all"])
@pytest.mark.parametrize("selects", [True, False])
def test_low_rank_corrections(of, selects):
    model, generator = made("qwen2"), torch.Generator().manual_seed(3)  # query, key and value have biases
    for path, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and "layers" in path:
            left = 0.2 * torch.randn(linear.out_features, 5, generator=generator)
            right = 0.2 * torch.randn(5, linear.in_features, generator=generator)
            select = Threshold(0.3) if selects else None
            set_module(model, path, ActLinear.of(linear, select=select, correction=LowRank(left, right, of)))
    decoder, expected = Decoder(model, decode_only=False), reference(model)
    torch.testing.assert_close(stepped(decoder), expected, rtol=1e-4, atol=1e-4)
    decoder.reset()
    torch.testing.assert_close(decoder(IDS[0].tolist()), expected[-1], rtol=1e-4, atol=1e-4)


def test_low_rank_corrections_of_quantized_weights_with_factors_in_8_bits():
    model = made("llama")
    apply(model, [RoundToNearest(bits=3, group_size=32), Lorc(rank=5, bits=8)], progress=False)
    decoder, expected = Decoder(model), reference(model)
    torch.testing.assert_close(stepped(decoder), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["threshold", "top_k"])
@pytest.mark.parametrize("density", [0, 1])
def test_nothing_and_everything_selected(mode, density):
    model = made("llama")
    apply(model, [Teal(sparsity=0.4, mode=mode)], [{"input_ids": IDS}], progress=False)
    for layer in model.modules():
        if isinstance(layer, ActLinear) and mode == "threshold":
            layer.select.threshold.fill_(0.0 if density else float("inf"))
        elif isinstance(layer, ActLinear):
            layer.select.k = layer.in_features if density else 0
    decoder = Decoder(model)
    torch.testing.assert_close(stepped(decoder), reference(model), rtol=1e-4, atol=1e-4)
    assert decoder.density == density


def test_selections_that_change_after_packing():
    model = made("llama")
    apply(model, [Teal(sparsity=0.2)], [{"input_ids": IDS}], progress=False)
    decoder = Decoder(model)
    selects = [layer.select for layer in model.modules() if isinstance(layer, ActLinear)]
    for select in selects:
        select.threshold.mul_(3)
    decoder.follow_selections()
    torch.testing.assert_close(stepped(decoder), reference(model), rtol=1e-4, atol=1e-4)
    model.model.layers[0].self_attn.q_proj.select.threshold.mul_(2)
    with pytest.raises(ValueError, match="select their inputs differently"):
        decoder.follow_selections()


@pytest.mark.parametrize("changed", [False, True])
def test_a_model_that_gives_up_its_weights(changed):
    model = made("tied")
    if changed:
        apply(model, [RoundToNearest(bits=4, group_size=32)], progress=False)
    expected = reference(model)
    decoder = Decoder(model, decode_only=True)
    torch.testing.assert_close(stepped(decoder), expected, rtol=1e-4, atol=1e-4)
    kept = sum(tensor.nbytes for tensor in model.state_dict().values() if not tensor.is_meta)
    assert kept < 2 * model.get_input_embeddings().weight.nbytes


def test_weights_that_are_not_finite():
    model = made("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    decoder = Decoder(model)
    for tokens in ([1], [1, 2, 3, 4]):
        with pytest.raises(NonFiniteError, match="NaN or Inf after token"):
            decoder(tokens)


def test_an_interrupt_in_mid_stream_leaves_it_usable():
    decoder = Decoder(made("llama"))
    expected = list(decoder.generate(IDS[0, :6], max_new_tokens=8, end=()))
    tokens = decoder.generate(IDS[0, :6], max_new_tokens=8, end=())
    next(tokens)
    with pytest.raises(KeyboardInterrupt):
        tokens.throw(KeyboardInterrupt)
    assert list(decoder.generate(IDS[0, :6], max_new_tokens=8, end=())) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_fork_after_use_says_what_to_do():
    decoder = Decoder(made("llama"))
    decoder([1])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            decoder([2])
        except BaseException as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    assert b"'spawn'" in os.read(reading, 1000)
    decoder([2])


def test_the_largest_inputs_of_all_threads():
    model = made("llama")
    apply(model, [Teal(sparsity=0.4, mode="top_k")], [{"input_ids": IDS}], progress=False)
    decoder = Decoder(model)
    torch.testing.assert_close(stepped(decoder), reference(model), rtol=1e-4, atol=1e-4)
    decoder.reset()
    torch.testing.assert_close(decoder(IDS[0].tolist()), reference(model)[-1], rtol=1e-4, atol=1e-4)


def test_two_decoders_in_two_threads():
    decoders, found = [Decoder(made("llama")) for _ in range(2)], {}
    workers = [
        threading.Thread(target=lambda n=n: found.update({n: stepped(decoders[n])})) for n in range(len(decoders))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert torch.equal(found[0], found[1])


def test_the_order_of_sums_is_fixed():
    decoder = Decoder(made("llama"))
    assert torch.equal(stepped(decoder), stepped(decoder))


def test_generates_what_transformers_does():
    model = made("llama")
    found = list(Decoder(model).generate(IDS[0, :6], max_new_tokens=8, end=()))
    expected = model.generate(IDS[:, :6], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found == expected[0, 6:].tolist()


def test_bad_input(monkeypatch):
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        Decoder(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)))
    model = made("llama")
    with pytest.raises(ValueError, match="give 1 to 64"):
        Decoder(model, capacity=65)
    with pytest.raises(ValueError, match="side by side"):
        Decoder(model, threads=1000)
    with pytest.raises(ValueError, match="float32, int16"):
        Decoder(model, activations="int4")
    with pytest.raises(ValueError, match="no integer weights"):
        Decoder(model, activations="int16")
    decoder = Decoder(model, capacity=4)
    with pytest.raises(DataError, match="holds 4 tokens"):
        decoder([1, 2, 3, 4, 5])
    with pytest.raises(DataError, match="exceed the cache of 4"):
        decoder.generate([1, 2], max_new_tokens=3)
    with pytest.raises(DataError, match="embeds 0 to 299"):
        decoder([300])
    monkeypatch.setattr("actkit.runtime.decoder.psutil.virtual_memory", lambda: type("Memory", (), {"available": 10}))
    with pytest.raises(MemoryLimitError, match="smaller capacity"):
        Decoder(model)
