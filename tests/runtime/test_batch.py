"""Several texts at once against each alone, and against transformers' own forward pass."""

from __future__ import annotations

import pytest
import torch
from decoded import FAMILIES, family
from transformers import LlamaConfig, LlamaForCausalLM

from actkit.core.edit.edits import set_module
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.layers.activations import Thresholded
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.selections import Threshold
from actkit.core.layers.weights import IntegerWeight
from actkit.core.measure.sampling import Sampling
from actkit.core.recipe.runner import apply
from actkit.runtime.batch import Batch
from actkit.runtime.decoder import Decoder
from actkit.sparsity.spark.sparkify import spark_lm
from actkit.sparsity.teal import Teal

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
IDS = torch.randint(300, (8, 20), generator=torch.Generator().manual_seed(0))
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).eval()  # type: ignore[arg-type]


@torch.no_grad()
def stepped(batch: Batch, ids: torch.Tensor, begins: list[int]) -> list[torch.Tensor]:
    """The logits after each token of each sequence, from where it begins on; until then it is a prompt."""
    found = [[batch.read(b, row[:begin].tolist())] for b, (row, begin) in enumerate(zip(ids, begins))]
    for step in range(ids.shape[1] - max(begins)):
        logits = batch([int(row[begin + step]) for row, begin in zip(ids, begins)])
        for own, row in zip(found, logits):
            own.append(row)
    return [torch.stack(own) for own in found]


@torch.no_grad()
def check(model: torch.nn.Module, number: int, most: float = 1e-4, threads: int = 2, **options: object) -> None:
    """Sequences of different lengths: each as the decoder alone and, exact caches and weights, as the model."""
    decoder = Decoder(model, threads=threads, **options)  # type: ignore[arg-type]
    begins = [2 + 3 * (b % 3) for b in range(number)]
    expected = model(IDS[:number]).logits.float()
    for found, row, logits, begin in zip(stepped(decoder.batch(number), IDS, begins), IDS, expected, begins):
        decoder.reset()
        alone = [decoder(row[:begin].tolist())]
        alone += [decoder([token]) for token in row[begin : begin + len(found) - 1].tolist()]
        assert (found - torch.stack(alone)).norm() < 1e-4 * found.norm()
        wanted = logits[begin - 1 :][: len(found)]
        assert (found - wanted).norm() < most * wanted.norm()


@pytest.mark.slow(reason="the kernels of a batch are compiled here first")
@pytest.mark.parametrize(("number", "threads"), [(2, 1), (3, 2), (8, 2)])
def test_logits_are_those_of_each_alone(number: int, threads: int) -> None:
    check(llama(), number, threads=threads)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.split(",")[0] in (
    "gemma2", "gemma3", "olmo2", "gpt_neox", "opt", "phi", "glm4", "granite", "smollm3", "cohere2"
)])  # fmt: skip
def test_families(name: str) -> None:
    check(family(name), 3)


def test_fewer_heads_than_threads() -> None:
    check(family("granite", num_key_value_heads=1), 2)


@pytest.mark.parametrize("mode", ["threshold", "top_k"])
@pytest.mark.parametrize("bits", [None, 4])
def test_each_sequence_selects_for_itself(mode: str, bits: int | None) -> None:
    model = llama(hidden_act="relu" if bits else "silu")
    apply(model, [Teal(sparsity=0.4, mode=mode)], [{"input_ids": IDS}], progress=False)  # type: ignore[arg-type]
    for layer in model.modules():
        if bits is not None and isinstance(layer, ActLinear):
            layer.storage = IntegerWeight.quantize(layer.storage.dequantize(), IntegerGrid(bits, 32, "input"))
    check(model, 3, activations="float32")


GRIDS = [IntegerGrid(4, 32, "input"), IntegerGrid(8, -1, "input", symmetric=True), IntegerGrid(4, 128, "output"),
         IntegerGrid(8, 64, "output")]  # fmt: skip


def of_integers() -> LlamaForCausalLM:
    model = llama(hidden_size=256, intermediate_size=512)
    linears = [path for path, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    for number, path in enumerate(linears):
        layer = ActLinear.of(model.model.get_submodule(path))
        layer.storage = IntegerWeight.quantize(layer.dequantized(), GRIDS[number % len(GRIDS)])
        set_module(model.model, path, layer)
    return model


def test_integer_weights() -> None:
    check(of_integers(), 4, activations="float32")


@torch.no_grad()
def test_integer_weights_and_rounded_activations() -> None:
    """Alone a step rounds activations to 16 bits; in a batch it does not."""
    model = of_integers()
    alone, batch = Decoder(model), Decoder(model).batch(2)
    expected = torch.stack([alone([token]) for token in IDS[0, :8].tolist()])
    found = torch.stack([batch([token, token])[1] for token in IDS[0, :8].tolist()])
    assert (found - expected).norm() < 2e-3 * expected.norm()


def test_sparse_gates_and_corrections() -> None:
    model, generator = llama(), torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        layer.mlp.act_fn = Thresholded(layer.mlp.act_fn, 0.02)
    for path in ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj"):
        linear = model.get_submodule(path)
        left, right = (0.2 * torch.randn(*shape, generator=generator) for shape in ((64, 5), (5, 64)))
        of = "dropped" if "o_proj" in path else "all"
        set_module(model, path, ActLinear.of(linear, select=Threshold(0.3), correction=LowRank(left, right, of)))
    check(model, 3)


def test_spark() -> None:
    torch.manual_seed(0)
    check(spark_lm(LlamaConfig(**SHAPE), density=0.2, attended=5).eval(), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_narrow_caches(cache: str) -> None:
    check(llama(), 3, most=0.05, cache=cache)


def test_writes_what_one_after_another_writes() -> None:
    """More prompts than sequences, of different lengths, some that end early or are stopped."""
    decoder = Decoder(llama(), capacity=40)
    prompts = [row[: 3 + n].tolist() for n, row in enumerate(IDS)]
    ends = set(range(0, 300, 12))
    batch = decoder.batch(3)
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
        expected = [list(decoder.generate(ids, max_new_tokens=12, end=ends, sampling=sampling)) for ids in prompts]
        expected[5] = expected[5][:4]
        assert len({len(own) for own in expected}) > 2
        for together in (None, 1):
            found: list[list[int]] = [[] for _ in prompts]
            for number, token in batch.generate(
                prompts,
                max_new_tokens=12,
                end=ends,
                sampling=sampling,
                stopped=lambda number, tokens: number == 5 and len(tokens) == 4,
                together=together,
            ):
                found[number].append(token)
            assert found == expected


def test_rates() -> None:
    rates = Decoder(llama(), capacity=16).batch(3).rates()
    assert list(rates) == [1, 2, 3] and min(rates.values()) > 0


def test_the_decoder_stays_usable() -> None:
    decoder = Decoder(llama())
    first = decoder([1, 2, 3])
    batch = decoder.batch(2)
    batch.read(0, [5, 6])
    batch([7] * 1)
    decoder.position = 2
    assert torch.allclose(decoder([3]), first, atol=1e-5)


def test_bad_input() -> None:
    decoder = Decoder(llama(), capacity=8)
    for sequences in (0, 9):
        with pytest.raises(ValueError, match="give 1 to 8"):
            decoder.batch(sequences)
    batch = decoder.batch(2)
    with pytest.raises(DataError, match="3 were given; give 1 to 2"):
        batch([1, 2, 3])
    with pytest.raises(DataError, match="the model embeds 0 to 299"):
        batch([1, 300])
    with pytest.raises(DataError, match="do not fit into a cache of 8"):
        batch.generate([[1, 2], [1] * 6], max_new_tokens=4)
    with pytest.raises(ValueError, match="together: 3 was given; give 1 to 2"):
        batch.generate([[1, 2]], max_new_tokens=4, together=3)
    batch.read(0, [1] * 8)
    with pytest.raises(DataError, match="is full"):
        batch([1, 2])
    with pytest.raises(UnsupportedModelError, match="change with the length"):
        Decoder(llama(rope_parameters=LONGROPE | {"original_max_position_embeddings": 16})).batch()
    decoder.close()
    with pytest.raises(ValueError, match="was closed"):
        batch([1])
