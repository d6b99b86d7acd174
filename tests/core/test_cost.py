"""Bytes and densities against numbers written out by hand, and densities counted by own hooks, sequence by sequence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from actkit.core.edit.edits import set_module
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import DataError, NonFiniteError
from actkit.core.layers.activations import Thresholded
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.selections import Threshold, TopK
from actkit.core.layers.weights import IntegerWeight
from actkit.core.measure.cost import folder_bytes, measure_cost
from actkit.core.model.anatomy import anatomy
from actkit.core.model.experts import ExpertList
from actkit.sparsity.lazy_neuron.top_k_mlp import TopKActivation
from actkit.zoo.cnn import DigitsCNN

HIDDEN, INNER, VOCABULARY, BLOCKS = 16, 24, 50, 2
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
}
ATTENTION = HIDDEN * HIDDEN * 2 + HIDDEN * HIDDEN  # q and o; k and v are half as wide
F32 = 4


def build(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**DECODER, **settings))
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, **settings))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=BLOCKS, n_head=4, n_positions=32)
        )
    else:
        model = DigitsCNN()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def padded() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    batches = []
    for lengths in ((7, 4, 5), (6, 2)):
        ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)))
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


TOKENS = 7 + 4 + 5 + 6 + 2


def single(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The sequences one by one, without padding."""
    return [
        {"input_ids": ids[mask.bool()][None]}
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def kept_by_hand(model: nn.Module, layers: dict[str, float], batches: list[Any]) -> dict[str, Tensor]:
    """Per layer, how many inputs of each token are above its threshold: plain comparisons in own hooks."""
    counts: dict[str, list[Tensor]] = {path: [] for path in layers}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            counts[path].append((x.abs() > layers[path]).sum(1))

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in layers]
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(found).double() for path, found in counts.items() if found}


def nearest_rank(values: Tensor, p: float) -> float:
    return float(values.sort().values[max(0, math.ceil(p * len(values)) - 1)])


# -- models as they come -----------------------------------------------------------------------------------------------


def test_a_dense_llama() -> None:
    block = ATTENTION + 3 * HIDDEN * INNER + 2 * HIDDEN
    rest = BLOCKS * block + HIDDEN  # and the last norm
    head = VOCABULARY * HIDDEN
    for tied in (False, True):
        model = build("llama", tie_word_embeddings=tied)
        cost = measure_cost(model)
        assert cost.weight_bytes == F32 * (rest + head * (1 if tied else 2))
        assert cost.bytes_per_token == cost.dense_bytes_per_token == F32 * (rest + head + HIDDEN)
        assert (cost.density, cost.density_p05, cost.density_p95, cost.disk_bytes) == (None, None, None, None)
        assert measure_cost(model, padded(), progress=False) == cost
    half = measure_cost(build("llama", tie_word_embeddings=True).bfloat16())
    assert half.weight_bytes == cost.weight_bytes / 2 and half.bytes_per_token == F32 / 2 * (rest + head + HIDDEN)


def test_a_dense_gpt2() -> None:
    attention = HIDDEN * 3 * HIDDEN + 3 * HIDDEN + HIDDEN * HIDDEN + HIDDEN
    mlp = 2 * HIDDEN * 4 * HIDDEN + 5 * HIDDEN
    rest = BLOCKS * (attention + mlp + 4 * HIDDEN) + 2 * HIDDEN
    cost = measure_cost(build("gpt2"))
    assert cost.weight_bytes == F32 * (rest + VOCABULARY * HIDDEN + 32 * HIDDEN)  # the head is tied
    assert cost.bytes_per_token == F32 * (rest + VOCABULARY * HIDDEN + 2 * HIDDEN)  # one row of each embedding


def test_a_dense_mixtral_reads_the_chosen_experts_only() -> None:
    model = build("mixtral")
    expert = 3 * HIDDEN * INNER
    rest = BLOCKS * (ATTENTION + 2 * HIDDEN + 4 * HIDDEN) + HIDDEN + VOCABULARY * HIDDEN  # router, norms, head
    for batches in (None, padded()):
        cost = measure_cost(model, batches, progress=False)
        assert cost.weight_bytes == F32 * (rest + VOCABULARY * HIDDEN + BLOCKS * 4 * expert)
        assert cost.bytes_per_token == pytest.approx(F32 * (rest + HIDDEN + BLOCKS * 2 * expert), rel=1e-12)
        assert cost.density is None
    assert not isinstance(model.model.layers[0].mlp.experts, ExpertList)
    shares = [layer.share for layer in cost.layers if ".experts." in layer.path and layer.path.endswith("down")]
    assert len(shares) == 8 and sum(shares) == pytest.approx(4) and len(set(shares)) > 1  # as measured, not assumed


def test_a_dense_cnn_and_an_encoder() -> None:
    model = build("cnn")
    every = 16 * 9 + 16 + 32 * 16 * 9 + 32 + 512 * 64 + 64 + 64 * 10 + 10
    for batches in (None, [torch.rand(3, 1, 8, 8)]):
        cost = measure_cost(model, batches, progress=False)
        assert cost.weight_bytes == cost.bytes_per_token == cost.dense_bytes_per_token == F32 * every
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=20,
    )
    bert = BertModel(config)
    parameters = sum(p.numel() for p in bert.parameters())
    rows = (VOCABULARY - 1) + (20 - 1) + (2 - 1)  # of words, positions and token types that are not read
    assert measure_cost(bert).bytes_per_token == F32 * (parameters - rows * HIDDEN)


def test_a_model_that_nobody_knows() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer, self.scale = nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x)) * self.scale.sum()

    model = Own().eval()
    every = 4 * 4 + 12 + 3 + 2  # weight, bias, mean and variance of the norm; layer; scale
    assert measure_cost(model, [torch.rand(2, 4)], progress=False).bytes_per_token == F32 * every
    assert measure_cost(model).weight_bytes == F32 * every + 8  # the norm counts its batches in an int64
    with torch.device("meta"):
        meta = measure_cost(Own())
    assert meta.weight_bytes == F32 * every + 8 and meta.bytes_per_token == F32 * every


# -- selections --------------------------------------------------------------------------------------------------------


def test_densities_of_a_llama_without_padding() -> None:
    model = build("llama")
    dense = measure_cost(model).dense_bytes_per_token
    layers = {}
    for index, threshold in enumerate((0.1, 0.3)):
        for name in ("q_proj", "k_proj"):  # they share an input
            layers[f"model.layers.{index}.self_attn.{name}"] = threshold
        layers[f"model.layers.{index}.mlp.down_proj"] = threshold / 10
    for path, threshold in layers.items():
        set_module(model, path, ActLinear.of(model.get_submodule(path), select=Threshold(threshold)))
    counts = kept_by_hand(model, layers, single(padded()))
    cost = measure_cost(model, padded(), progress=False)
    found = {layer.path: layer for layer in cost.layers}
    sizes = {path: model.get_submodule(path).weight.nbytes for path in layers}
    shares = {path: counts[path] / model.get_submodule(path).in_features for path in layers}
    for path in layers:
        assert len(shares[path]) == TOKENS
        assert found[path].density == pytest.approx(float(shares[path].mean()), rel=1e-12)
        assert found[path].density_p05 == pytest.approx(nearest_rank(shares[path], 0.05))
        assert found[path].density_p95 == pytest.approx(nearest_rank(shares[path], 0.95))
        assert found[path].bytes_per_token == pytest.approx(sizes[path] * float(shares[path].mean()))
        assert 0.05 < found[path].density < 0.95 and found[path].share == 1
    tokens = sum(shares[path] * sizes[path] for path in layers) / sum(sizes.values())
    assert isinstance(tokens, Tensor)
    assert cost.density == pytest.approx(float(tokens.mean()), rel=1e-12)
    assert cost.density_p05 == pytest.approx(nearest_rank(tokens, 0.05))
    assert cost.density_p95 == pytest.approx(nearest_rank(tokens, 0.95))
    saved = sum(sizes[path] * (1 - float(shares[path].mean())) for path in layers)
    assert cost.dense_bytes_per_token == dense
    assert cost.bytes_per_token == pytest.approx(dense - saved)

    unknown = measure_cost(model)  # thresholds say nothing without data
    assert (unknown.bytes_per_token, unknown.density) == (None, None)
    assert unknown.dense_bytes_per_token == dense and unknown.weight_bytes == cost.weight_bytes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_storage_scores_corrections_and_biases() -> None:
    model = build("gpt2")
    dense = measure_cost(model)
    path, out, width = "transformer.h.0.mlp.c_proj", HIDDEN, 4 * HIDDEN
    source = ActLinear.of(model.get_submodule(path))
    integers = IntegerWeight.quantize(source.dequantized(), IntegerGrid(4, 8, "input", symmetric=False))
    stored = out * width // 2 + (4 + 1) * out * (width // 8)  # codes, float32 scales and byte zeros
    low_rank = LowRank(torch.randn(out, 2), torch.randn(2, width))
    changed = ActLinear.of(source, weight=integers, select=TopK(16, torch.ones(width)), correction=low_rank)
    set_module(model, path, changed)
    expected = stored * 16 / width + F32 * (2 * (out + width) + out) + F32 * width  # correction, bias; scores
    original = F32 * (out * width + out)
    for batches in (None, padded()):
        cost = measure_cost(model, batches, progress=False)
        assert cost.density == 0.25
        assert cost.bytes_per_token == pytest.approx(dense.dense_bytes_per_token - original + expected)
        assert cost.dense_bytes_per_token == dense.dense_bytes_per_token - original + stored + F32 * (
            2 * (out + width) + out
        )
        assert cost.weight_bytes == dense.weight_bytes - F32 * out * width + stored + F32 * (2 * (out + width) + width)
    assert (cost.density_p05, cost.density_p95) == (0.25, 0.25)


def test_densities_inside_experts() -> None:
    model = build("mixtral")
    row = anatomy(model).block(0).experts.row  # type: ignore[union-attr]
    layers: dict[str, float] = {}
    for index in range(BLOCKS):
        path = f"model.layers.{index}.mlp.experts"
        set_module(model, path, ExpertList.of(model.get_submodule(path), row))
        for expert in range(3):  # the last one stays dense
            layers[f"{path}.{expert}.down"] = 0.2 * (expert + 1)
    for path, threshold in layers.items():
        set_module(model, path, ActLinear.of(model.get_submodule(path), select=Threshold(threshold)))
    layers["model.layers.1.self_attn.o_proj"] = 0.3
    set_module(
        model,
        "model.layers.1.self_attn.o_proj",
        ActLinear.of(model.model.layers[1].self_attn.o_proj, select=Threshold(0.3)),
    )
    counts = kept_by_hand(model, layers, single(padded()))
    cost = measure_cost(model, padded(), progress=False)
    found = {layer.path: layer for layer in cost.layers}
    kept = every = 0.0
    for path in layers:
        module = model.get_submodule(path)
        size, count = module.weight.nbytes, counts.get(path, torch.zeros(0, dtype=torch.float64))
        assert found[path].share == pytest.approx(len(count) / TOKENS)
        assert found[path].density == pytest.approx(float(count.mean()) / module.in_features)
        kept += size * float(count.sum()) / module.in_features
        every += size * len(count)
        assert found[path].bytes_per_token == pytest.approx(size * float(count.sum()) / module.in_features / TOKENS)
    assert cost.density == pytest.approx(kept / every)
    assert cost.density_p05 < cost.density < cost.density_p95  # type: ignore[operator]
    rest = BLOCKS * (ATTENTION + 2 * HIDDEN + 4 * HIDDEN) + HIDDEN + VOCABULARY * HIDDEN + HIDDEN
    assert cost.dense_bytes_per_token == pytest.approx(F32 * (rest + BLOCKS * 2 * 3 * HIDDEN * INNER))
    assert cost.bytes_per_token == pytest.approx(cost.dense_bytes_per_token - (every - kept) / TOKENS)


def test_densities_of_images() -> None:
    model = build("cnn")
    layers = {"fc1": 0.3, "fc2": 2.0}
    for path, threshold in layers.items():
        set_module(model, path, ActLinear.of(model.get_submodule(path), select=Threshold(threshold)))
    images = [torch.rand(3, 1, 8, 8), torch.rand(20, 1, 8, 8)]
    counts = kept_by_hand(model, layers, images)
    cost = measure_cost(model, images, progress=False)
    tokens = F32 * (counts["fc1"] * 64 + counts["fc2"] * 10)
    assert len(tokens) == 23
    total = F32 * (512 * 64 + 64 * 10)
    assert cost.density == pytest.approx(float(tokens.mean()) / total)
    assert cost.density_p05 == pytest.approx(nearest_rank(tokens / total, 0.05))
    assert cost.density_p95 == pytest.approx(float(np.sort(tokens / total)[21]))
    assert cost.bytes_per_token == pytest.approx(cost.dense_bytes_per_token - total + float(tokens.mean()))


# -- zeros of activations ----------------------------------------------------------------------------------------------


def units_by_hand(model: nn.Module, activations: list[str], batches: list[Any]) -> dict[str, float]:
    """Per activation, the share of its outputs that are not 0, in own hooks."""
    counts: dict[str, list[Tensor]] = {path: [] for path in activations}

    def watch(path: str) -> Any:
        return lambda module, args, output: counts[path].append((output != 0).flatten().double())

    handles = [model.get_submodule(path).register_forward_hook(watch(path)) for path in activations]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {path: float(torch.cat(found).mean()) for path, found in counts.items()}


@pytest.mark.parametrize("how", ["relu", "threshold", "top k"])
def test_rows_and_columns_that_a_gate_skips(how: str) -> None:
    model = build("llama", hidden_act="relu" if how == "relu" else "silu")
    for layer in model.model.layers:
        if how == "threshold":
            layer.mlp.act_fn = Thresholded(layer.mlp.act_fn, 0.1)
        elif how == "top k":
            layer.mlp.act_fn = TopKActivation(layer.mlp.act_fn, 6)
    acts = [f"model.layers.{index}.mlp.act_fn" for index in range(BLOCKS)]
    units = units_by_hand(model, acts, single(padded()))
    weight = F32 * HIDDEN * INNER
    cost = measure_cost(model, padded(), progress=False)
    found = {layer.path: layer for layer in cost.layers}
    for index, act in enumerate(acts):
        for name in ("up_proj", "down_proj"):
            layer = found[f"model.layers.{index}.mlp.{name}"]
            assert layer.units == pytest.approx(units[act]) and 0.1 < layer.units < 0.9
            assert layer.bytes_per_token == pytest.approx(weight * units[act])
        assert found[f"model.layers.{index}.mlp.gate_proj"].units is None
    saved = sum(2 * weight * (1 - share) for share in units.values())
    assert cost.bytes_per_token == pytest.approx(cost.dense_bytes_per_token - saved) and cost.density is None
    assert measure_cost(model).bytes_per_token is None  # zeros are not known without data

    # selections on top: of up both count, down reads what its own selection takes
    layers = {"model.layers.0.mlp.up_proj": 0.4, "model.layers.0.mlp.down_proj": 0.02}
    for path, threshold in layers.items():
        set_module(model, path, ActLinear.of(model.get_submodule(path), select=Threshold(threshold)))
    units = units_by_hand(model, acts, single(padded()))
    counts = kept_by_hand(model, layers, single(padded()))
    found = {layer.path: layer for layer in measure_cost(model, padded(), progress=False).layers}
    up, down = (found[path] for path in layers)
    inputs = float(counts[up.path].mean()) / HIDDEN
    assert up.bytes_per_token == pytest.approx(weight * inputs * units[acts[0]])
    assert down.bytes_per_token == pytest.approx(weight * float(counts[down.path].mean()) / INNER)
    assert 0.1 < inputs < 0.9 and down.density < units[acts[0]]  # type: ignore[operator]


def test_columns_behind_an_activation_without_a_gate() -> None:
    model = build("gpt2")
    for block in model.transformer.h:
        block.mlp.act = nn.ReLU()
    acts = [f"transformer.h.{index}.mlp.act" for index in range(BLOCKS)]
    units = units_by_hand(model, acts, single(padded()))
    cost = measure_cost(model, padded(), progress=False)
    saved = sum(F32 * HIDDEN * 4 * HIDDEN * (1 - share) for share in units.values())  # biases are read
    assert cost.bytes_per_token == pytest.approx(cost.dense_bytes_per_token - saved)
    assert {layer.path for layer in cost.layers if layer.units is not None} == {
        f"transformer.h.{index}.mlp.c_proj" for index in range(BLOCKS)
    }


def test_rows_of_a_layer_for_gate_and_up() -> None:
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**DECODER, hidden_act="relu", pad_token_id=0)).eval()
    acts = [f"model.layers.{index}.mlp.activation_fn" for index in range(BLOCKS)]
    units = units_by_hand(model, acts, single(padded()))
    cost = measure_cost(model, padded(), progress=False)
    saved = sum(2 * F32 * HIDDEN * INNER * (1 - share) for share in units.values())
    assert cost.bytes_per_token == pytest.approx(cost.dense_bytes_per_token - saved)


def test_zeros_inside_experts() -> None:
    model = build("mixtral", hidden_act="relu")
    cost = measure_cost(model, padded(), progress=False)
    for layer in cost.layers:
        if ".experts." in layer.path and not layer.path.endswith("gate"):
            assert 0.2 < layer.units < 0.8  # type: ignore[operator]
            assert layer.bytes_per_token == pytest.approx(F32 * HIDDEN * INNER * layer.units * layer.share)
    parts = {layer.path.rsplit(".", 1)[1] for layer in cost.layers if layer.units is not None}
    assert parts == {"up", "down"}


# -- the rest of what is held ------------------------------------------------------------------------------------------


def test_the_kernels_copy_is_held_but_not_read() -> None:
    model = build("llama")
    path = "model.layers.0.mlp.down_proj"
    layer = ActLinear.of(model.get_submodule(path), select=TopK(6))
    set_module(model, path, layer)
    before = measure_cost(model)
    assert layer.pack()
    after = measure_cost(model)
    assert after.weight_bytes == before.weight_bytes + layer._packed.nbytes > before.weight_bytes
    assert after.bytes_per_token == before.bytes_per_token == before.dense_bytes_per_token - 0.75 * F32 * HIDDEN * INNER
    assert before.density == 0.25


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_bytes_on_disk(tmp_path: Path) -> None:
    (tmp_path / "m" / "inner").mkdir(parents=True)
    (tmp_path / "m" / "a.json").write_bytes(b"x" * 11)
    (tmp_path / "m" / "inner" / "b").write_bytes(b"x" * 31)
    assert folder_bytes(tmp_path / "m") == 42
    cost = measure_cost(build("cnn"), folder=tmp_path / "m")
    assert cost.disk_bytes == 42 == cost.to_dict()["disk_bytes"]
    with pytest.raises(DataError, match="there is no folder"):
        measure_cost(build("cnn"), folder=tmp_path / "none")


def test_bad_data() -> None:
    model = build("llama")
    with pytest.raises(DataError, match="0 batches were given"):
        measure_cost(model, [], progress=False)
    path = "model.layers.1.mlp.down_proj"
    set_module(model, path, ActLinear.of(model.get_submodule(path), select=Threshold(0.1)))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or Inf in document 0"):
        measure_cost(model, padded(), progress=False)
