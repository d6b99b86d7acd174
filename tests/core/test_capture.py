"""What is recorded, against tensors taken by hand: one sequence at a time, without padding, with own hooks."""

from __future__ import annotations

import copy
import gc
import io
import math
import time
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTModel,
)

from actkit.core.forward.batch import BatchContext, forward
from actkit.core.ground import progress
from actkit.core.ground.errors import DataError, MemoryLimitError, NonFiniteError, UnsupportedModelError
from actkit.core.ground.memory import MemoryPlan, format_bytes, parse_bytes
from actkit.core.model.anatomy import Site, anatomy, read_tap
from actkit.core.model.experts import ExpertList
from actkit.core.watch.calls import Call
from actkit.core.watch.capture import Observations, calls, live, observe, opened_experts, plan_memory, record
from actkit.core.watch.extremes import Extremes
from actkit.core.watch.rows import Keys
from actkit.core.watch.statistics import AbsMax, Density, Gram, Moments, Quantiles, Sample

HIDDEN, INNER, HEADS, VOCABULARY = 16, 24, 4, 50
LENGTHS = ((7, 4, 5), (6, 2))  # real tokens of the sequences of two batches
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
}
ENCODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "attn_implementation": "eager",
}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**DECODER))
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=HIDDEN,
                n_inner=INNER,
                n_layer=2,
                n_head=HEADS,
                n_positions=32,
                attn_implementation="eager",
            )
        )
    elif kind == "bert":
        model = BertForSequenceClassification(BertConfig(**ENCODER, vocab_size=VOCABULARY))
    else:
        model = ViTModel(ViTConfig(**ENCODER, image_size=8, patch_size=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def padded(side: str = "right") -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    batches = []
    for lengths in LENGTHS:
        longest = max(lengths)
        ids = torch.randint(1, VOCABULARY, (len(lengths), longest))
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
        batches.append({"input_ids": ids, "attention_mask": mask.flip(1) if side == "left" else mask})
    return batches


def single(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The sequences one by one, without padding; positions stay those of the padded batch."""
    return [
        {"input_ids": ids[mask.bool()][None], "attention_mask": torch.ones_like(ids[mask.bool()])[None]}
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def by_hand(model: nn.Module, site: Site, batches: list[Any]) -> Tensor:
    """All rows of a site, from single sequences: an own hook, and the layout written out again."""
    tap = anatomy(model).tap(site)
    found: list[Tensor] = []
    angles: list[Any] = [None]

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        angles[0] = kwargs.get("position_embeddings")

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.append(read_tap(tap, args, kwargs, output, angles[0]).detach())

    handles = [model.get_submodule(tap.path).register_forward_hook(keep, with_kwargs=True)]
    if tap.attention:
        attention = model.get_submodule(tap.attention)
        handles.append(attention.register_forward_pre_hook(remember, with_kwargs=True))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    rows = []
    for value in found:
        if tap.layout == "heads":
            value = torch.cat(list(value.unbind(1)), dim=-1)
        rows.append(value.reshape(-1, value.shape[-1]))
    return torch.cat(rows)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-4)


# -- statistics of sites -----------------------------------------------------------------------------------------------

SITES = [
    (kind, name)
    for kind in ("llama", "gpt2", "bert")
    for name in (
        "block.input",
        "block.output",
        "attention.input",
        "attention.query",
        "attention.key",
        "attention.value",
        "attention.mixed",
        "attention.output",
        "mlp.input",
        "mlp.preactivation",
        "mlp.gate",
        "mlp.hidden",
        "mlp.output",
    )
    if not (name == "mlp.gate" and kind != "llama")
]


@pytest.mark.parametrize(("kind", "name"), SITES)
def test_every_site_counts_real_tokens_only(kind: str, name: str) -> None:
    model, batches = build(kind), padded()
    seen = record(model, {name: [Gram(), Sample(100)]}, batches, progress=False)
    assert [str(site) for site in seen] == [f"blocks.{i}.{name}" for i in range(2)]
    for site, (gram, sample) in seen.items():
        rows = by_hand(model, site, single(batches))
        assert gram.count == len(rows) == sum(map(sum, LENGTHS))
        close(gram.value, rows.double().t() @ rows.double())
        close(sample.rows, rows)  # in order of document and position
        lengths = [length for batch in LENGTHS for length in batch]
        assert sample.documents.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
        assert sample.positions.tolist() == [i for length in lengths for i in range(length)]
    assert hooks(model) == 0


def test_left_padding() -> None:
    model, batches = build("llama"), padded("left")
    seen = record(model, {"mlp.input": Sample(100)}, batches, progress=False)
    sample = seen["blocks.0.mlp.input"]
    # the first block's input is the embedding, which knows no position
    rows = record(model, {"block.input": Sample(100)}, batches, progress=False)["blocks.0.block.input"].rows
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    close(rows, model.model.embed_tokens.weight[ids])
    assert sample.count == len(ids)
    assert sample.positions.tolist()[:7] == list(range(7)) and sample.positions.tolist()[7:11] == [3, 4, 5, 6]


@pytest.mark.parametrize("side", ["left", "right"])
def test_extremes_name_row_column_place_and_token(side: str) -> None:
    model, batches = build("llama"), padded(side)
    seen = record(model, {"block.input": Extremes(60), "attention.weights": Extremes(1)}, batches, progress=False)
    rows = [row for batch in batches for row in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)]
    embedding = model.model.embed_tokens.weight.detach()
    found = seen["blocks.0.block.input"].entries
    assert len(found) == 60
    for each in found:
        ids, real = rows[each.sequence]
        assert real[each.position] and each.place == int(real[: each.position].sum())
        assert each.token_id == int(ids[each.position]) and each.document == each.sequence
        assert each.value == float(embedding[each.token_id, each.channel])
    ids = torch.cat([ids[real] for ids, real in rows])
    largest = embedding[ids].abs().flatten().topk(60).values
    close(torch.tensor([abs(each.value) for each in found]), largest)


def test_tokens_of_packed_documents_are_told_apart() -> None:
    """Documents and columns are shared by many; row and column are not."""
    batch = {"input_ids": torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))}
    context = BatchContext.of(batch, first_row=3, documents=torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(4, 6))
    rows = Keys(context, torch.device("cpu")).tokens
    assert len(torch.stack((rows.documents, rows.positions)).unique(dim=1).T) == 6
    assert len(torch.stack((rows.sequences, rows.positions)).unique(dim=1).T) == 24
    assert rows.sequences.unique().tolist() == [3, 4, 5, 6]
    assert torch.equal(rows.token_ids, batch["input_ids"].flatten()) and torch.equal(rows.places, rows.positions)
    part = Keys(context.rows(1, 3), torch.device("cpu")).tokens
    assert torch.equal(part.token_ids, batch["input_ids"][1:3].flatten())
    images = Keys(BatchContext.of({"pixel_values": torch.zeros(2, 3, 4, 4)}), torch.device("cpu")).tokens
    assert images.token_ids.tolist() == [-1, -1]


def test_attention_weights_of_one_length_and_of_several() -> None:
    model = build("llama")
    site = Site("attention.weights", 1)
    ids = torch.randint(1, VOCABULARY, (3, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        expected = model(**batch, output_attentions=True).attentions[1]
    seen = record(model, {site: Sample(100)}, [batch], progress=False)[site]
    close(seen.rows, expected.transpose(1, 2)[mask.bool()].flatten(1))
    values = record(model, {site: [Sample(10_000), Density()]}, iter([batch]), progress=False)[site]  # length unknown
    real = [expected[i][:, :n, :n].flatten() for i, n in enumerate((6, 4, 6))]
    close(values[0].rows[:, 0].sort().values, torch.cat(real).sort().values)
    assert values[0].documents.unique().tolist() == [0, 1, 2]
    assert values[1].density == pytest.approx((21 + 10 + 21) / (36 + 16 + 36))  # causal: k (k + 1) / 2 of k * k
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="set_attn_implementation"):
        record(model, {"attention.weights": Density()}, [batch], progress=False)


def test_one_vector_per_sequence() -> None:
    model, batches = build("bert"), padded("left")
    seen = record(model, {"layer.input:classifier": Sample(10)}, batches, progress=False)
    sample = seen["layer.input:classifier"]
    places = [(batch["attention_mask"].cumsum(1) - 1).clamp(min=0) for batch in batches]
    with torch.no_grad():
        pooled = [model.bert(**b, position_ids=place).pooler_output for b, place in zip(batches, places, strict=True)]
    close(sample.rows, torch.cat(pooled))
    assert sample.documents.tolist() == [0, 1, 2, 3, 4]
    assert sample.positions.tolist() == [0, 3, 2, 0, 4]  # of the first real token


def test_images_give_a_row_per_patch() -> None:
    model = build("vit")
    batch = {"pixel_values": torch.randn(3, 3, 8, 8)}
    seen = record(model, {"mlp.hidden": Sample(100), "layer.output:embeddings.*": Sample(100)}, [batch], progress=False)
    sample = seen["blocks.0.mlp.hidden"]
    assert sample.count == 3 * 5 and sample.documents.tolist() == [i for i in range(3) for _ in range(5)]
    assert sample.positions.tolist() == list(range(5)) * 3
    convolution = "embeddings.patch_embeddings.projection"
    with torch.no_grad():
        expected = model.get_submodule(convolution)(batch["pixel_values"])
    close(seen[f"layer.output:{convolution}"].rows, expected.flatten(2).transpose(1, 2).flatten(0, 1))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).mean((2, 3)))


def test_any_other_module_is_traced() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [torch.randn(5, 6), torch.randn(2, 6)]
    seen = record(mlp, {"layer.input:2": [Density(), Sample(10)]}, batches, progress=False)
    hidden = torch.cat([mlp[1](mlp[0](x)) for x in batches]).detach()
    density, sample = seen["layer.input:2"]
    assert density.density == float((hidden > 0).double().mean())
    close(sample.rows, hidden)
    cnn, image = Convolutions(), torch.randn(2, 1, 6, 6)
    seen = record(cnn, {"layer.output:first": Moments(), "layer.input": Moments()}, [image], progress=False)
    assert seen["layer.output:first"].count == 72
    close(seen["layer.output:first"].mean, cnn.first(image).mean((0, 2, 3)))
    assert seen["layer.input:second"].count == 2
    assert record(mlp, {"layer.output:1": AbsMax()}, batches, progress=False)["layer.output:1"].count == 7  # an nn.ReLU
    alone = record(mlp, {"layer.input:0": AbsMax()}, batches[0], progress=False)["layer.input:0"]  # one bare tensor
    assert torch.equal(alone.value, batches[0].double().abs().amax(0))


def test_experts_see_the_tokens_that_were_sent_to_them() -> None:
    model, batches = build("mixtral"), padded()
    stock = [block.experts.module for block in anatomy(model).blocks]  # type: ignore[union-attr]
    wanted = {"mlp.hidden": [Gram(), Sample(200)], "router.logits": Sample(200), "mlp.input": Sample(200)}
    seen = record(model, wanted, batches, progress=False)
    assert [block.experts.module for block in anatomy(model).blocks] == stock  # type: ignore[union-attr]
    for block in range(2):
        inputs, logits = seen[Site("mlp.input", block)], seen[Site("router.logits", block)]
        assert inputs.count == logits.count == sum(map(sum, LENGTHS))
        module: Any = model.model.layers[block].mlp
        close(logits.rows, inputs.rows @ module.gate.weight.t())
        chosen = logits.rows.topk(2).indices
        for e in range(4):
            mine = (chosen == e).any(1)
            gram, sample = seen[Site("mlp.hidden", block, e)]
            gate, up = (inputs.rows[mine] @ module.experts.gate_up_proj[e].t()).chunk(2, dim=-1)
            hidden = nn.functional.silu(gate) * up
            assert gram.count == int(mine.sum())
            assert torch.equal(sample.documents, inputs.documents[mine])
            assert torch.equal(sample.positions, inputs.positions[mine])
            close(sample.rows, hidden)
            close(gram.value, hidden.double().t() @ hidden.double())
    # one block's experts, and one expert, by name
    assert len(record(model, {"blocks.1.mlp.hidden": AbsMax()}, batches, progress=False)) == 4
    assert len(record(model, {"blocks.1.experts.2.mlp.gate": AbsMax()}, batches, progress=False)) == 1
    layer = "layer.input:model.layers.0.mlp.experts.3.down"
    shared = record(model, {layer: AbsMax(), "blocks.0.mlp.hidden": AbsMax()}, batches, progress=False)
    assert shared[layer] is shared["blocks.0.experts.3.mlp.hidden"]


def test_experts_stand_again_after_an_error() -> None:
    model = build("mixtral")
    stock, state = model.model.layers[0].mlp.experts, copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="stop"):
        with opened_experts(anatomy(model)):
            assert isinstance(model.model.layers[0].mlp.experts, ExpertList)
            raise RuntimeError("stop")
    assert model.model.layers[0].mlp.experts is stock
    assert list(model.state_dict()) == list(state)


def test_an_expert_without_tokens_is_unseen() -> None:
    model = build("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()  # all logits are 0: the first two are chosen
    seen = record(model, {"blocks.0.mlp.hidden": Moments()}, padded(), progress=False, max_memory="1MB")
    chosen = [site for site in seen if seen[site].count]
    assert len(chosen) == 2 and set(seen.unseen) == set(seen) - set(chosen)


# -- names, sharing, merging -------------------------------------------------------------------------------------------


def test_names_patterns_and_lists() -> None:
    model, batches = build("llama"), padded()

    def sites(*keys: Any) -> list[str]:
        return [str(site) for site in record(model, {key: AbsMax() for key in keys}, batches, progress=False)]

    assert sites("blocks.1.mlp.hidden") == ["blocks.1.mlp.hidden"]
    assert sites(Site("mlp.hidden")) == ["blocks.0.mlp.hidden", "blocks.1.mlp.hidden"]
    assert sites("blocks.*.mlp.[gh]*") == [f"blocks.{i}.mlp.{name}" for i in range(2) for name in ("gate", "hidden")]
    assert sites("layer.input:*.down_proj") == [f"layer.input:model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert len(sites("layer.output")) == 2 * 7 + 1  # lm_head too
    assert sites("layer.output:model.norm") == ["layer.output:model.norm"]
    seen = record(model, {"mlp.hidden": AbsMax(), "blocks.0.mlp.hidden": [Moments()]}, batches, progress=False)
    assert [type(s) for s in seen["blocks.0.mlp.hidden"]] == [AbsMax, Moments]
    assert isinstance(seen["blocks.1.mlp.hidden"], AbsMax)
    for key, text in [
        ("mlp.hiden", "mlp.hiden"),
        ("blocks.7.mlp.hidden", "has 2"),
        ("router.logits", "not in this llama model"),
        ("*.nothing", "no site matches"),
        ("layer.input:nowhere", "no module 'nowhere'"),
    ]:
        with pytest.raises(ValueError, match=text):
            sites(key)
    with pytest.raises(TypeError, match="give a statistic"):
        record(model, {"mlp.hidden": "moments"}, batches, progress=False)
    with pytest.raises(KeyError, match=r"recorded are blocks\.0\.mlp\.hidden"):
        _ = seen["blocks.0.mlp.input"]
    assert repr(seen).startswith("Observations(2 sites") and seen.seconds > 0


def test_shared_inputs_are_counted_once() -> None:
    model, batches = build("llama"), padded()
    q, k, v = (f"layer.input:model.layers.0.self_attn.{name}_proj" for name in "qkv")
    score = torch.rand(HIDDEN)
    wanted = {q: Moments(), k: Moments(), "blocks.0.attention.input": Moments(), v: [Moments(), Quantiles(score)]}
    seen = record(model, wanted, batches, progress=False)
    assert seen[q] is seen[k] is seen["blocks.0.attention.input"] is seen[v][0]
    assert seen[q].count == seen[v][1].count == sum(map(sum, LENGTHS))
    weighted = {q: Quantiles(score), k: Quantiles(2 * score)}  # one tensor, two scores
    seen = record(model, weighted, batches, progress=False)
    assert seen[k].quantile(0.5) == pytest.approx(2 * seen[q].quantile(0.5), rel=1 / 256)


def test_given_statistics_stay_empty_and_shards_merge() -> None:
    model, batches = build("gpt2"), padded()
    mine = AbsMax()
    whole = record(model, {"mlp.hidden": mine}, batches, progress=False)
    assert mine.count == 0
    parts = [record(model, {"mlp.hidden": mine}, [batch], progress=False) for batch in batches]
    for site, statistic in whole.items():
        assert torch.equal(parts[0][site].merge(parts[1][site]).value, statistic.value)


def test_document_ids_are_the_keys() -> None:
    class Documents(list):  # type: ignore[type-arg]
        document_ids: ClassVar = [torch.tensor([[7, 7, 8, 8, 8, 9, 9]] * 3), torch.full((2, 6), 11)]

    seen = record(build("llama"), {"blocks.0.mlp.input": Sample(100)}, Documents(padded()), progress=False)
    documents = seen["blocks.0.mlp.input"].documents.tolist()
    assert sorted(set(documents)) == [7, 8, 9, 11] and documents.count(11) == 6 + 2
    Documents.document_ids = Documents.document_ids[:1]
    with pytest.raises(DataError, match="1 tensors were given for more batches"):
        record(build("llama"), {"blocks.0.mlp.input": Sample(1)}, Documents(padded()), progress=False)


def test_sequence_and_position_say_which_token_a_row_is() -> None:
    """Of packed rows, where one document fills several; every site that has a row per token."""

    class Documents(list):  # type: ignore[type-arg]
        document_ids: ClassVar = [torch.zeros(3, 7, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)]

    model, batches = build("llama"), Documents(padded())
    seen = record(model, {"mlp.hidden": Sample(100), "block.input": Sample(9)}, batches, progress=False)
    hidden: list[Tensor] = []
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, args: hidden.extend(args[0]))
    for batch in batches:
        forward(model, batch)
    handle.remove()
    sample = seen["blocks.1.mlp.hidden"]
    expected = [hidden[row][column] for row, column in zip(sample.sequences, sample.positions, strict=True)]
    close(sample.rows, torch.stack(expected))
    tokens = [(row, column) for row, n in enumerate(sum(LENGTHS, ())) for column in range(n)]
    assert sorted(zip(sample.sequences.tolist(), sample.positions.tolist(), strict=True)) == tokens
    few = seen["blocks.1.block.input"]
    assert len(set(zip(few.sequences.tolist(), few.positions.tolist(), strict=True))) == 9


def test_the_runner_can_observe_one_block_alone() -> None:
    model, batch = build("llama"), padded()[0]
    view = anatomy(model)
    block_calls: list[Any] = []
    handle = view.blocks[1].module.register_forward_pre_hook(
        lambda module, args, kwargs: block_calls.append((args, kwargs)), with_kwargs=True
    )
    whole = record(model, {"blocks.1.attention.query": Gram()}, [batch], progress=False)
    handle.remove()
    (args, kwargs), site = block_calls[0], Site("attention.query", 1)
    with observe(view, {site: Gram()}) as observer, torch.no_grad():
        observer.begin(BatchContext.of(batch), kwargs)
        view.blocks[1].module(*args, **kwargs)
    assert torch.equal(observer.statistics[site].value, whole[site].value)
    with observe(view, {site: Gram()}) as observer, pytest.raises(ValueError, match="begin"):
        view.blocks[1].module(*args, **kwargs)
    assert hooks(model) == 0


# -- what must not happen silently -------------------------------------------------------------------------------------


class Halving(nn.Module):
    """Pools pairs of tokens, so that its second layer has half as many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.second = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.first(self.embedding(input_ids))
        return self.second(x.unflatten(1, (-1, 2)).mean(2))


def test_rows_of_a_call_that_padding_cannot_be_told_from_are_refused() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    context = BatchContext(2, 3, mask, torch.zeros(2, 3), torch.zeros(2, 3))
    call = Call((), {}, context)
    x = torch.randn(2, 3, 4)
    for shape in (x, x.flatten(0, 1)):
        assert torch.equal(call.real(shape), x[mask])
    assert torch.equal(call.real(x[:, 0]), x[:, 0])  # one row per sequence
    with pytest.raises(DataError, match=r"\[2, 4, 3, 4\] has 24 rows for \[2, 3\] tokens"):
        call.real(torch.randn(2, 4, 3, 4))
    whole = Call((), {}, BatchContext(2, 3, torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3), torch.zeros(2, 3)))
    assert len(whole.real(torch.randn(2, 4, 3, 4))) == 24


def test_rows_that_padding_cannot_be_told_from_are_refused() -> None:
    model, ids = Halving(), torch.randint(9, (2, 6))
    mask = torch.ones_like(ids)
    seen = record(
        model, {"layer.input:second": Sample(9)}, [{"input_ids": ids, "attention_mask": mask}], progress=False
    )
    assert seen["layer.input:second"].count == 6
    assert seen["layer.input:second"].documents.tolist() == [0, 0, 0, 1, 1, 1]
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    assert record(model, {"layer.input:first": AbsMax()}, [batch], progress=False)["layer.input:first"].count == 10
    with pytest.raises(DataError, match=r"layer\.input:second.*\[2, 3, 'channels'\].*\[2, 6\]"):
        record(model, {"layer.input:second": AbsMax()}, [batch], progress=False)
    assert hooks(model) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_name_the_site(value: float) -> None:
    model, batches = build("llama"), padded()
    token = int(batches[1]["input_ids"][1, 1])
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = value
    keys = [(d, p) for d, (b, r) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)])
            for p in range(LENGTHS[b][r]) if batches[b]["input_ids"][r, p] == token]  # fmt: skip
    with pytest.raises(
        NonFiniteError, match=rf"blocks\.0\.block\.input.*document {keys[0][0]} at position {keys[0][1]},"
    ):
        record(model, {"block.input": AbsMax()}, batches, progress=False)
    assert hooks(model) == 0


def test_nan_in_padding_does_not_count() -> None:
    model, batches = build("gpt2"), padded()
    unused = next(t for t in range(VOCABULARY) if not any((b["input_ids"] == t).any() for b in batches))
    with torch.no_grad():
        model.transformer.wte.weight[unused] = math.nan
    for batch in batches:
        batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"].bool(), unused)
    seen = record(model, {"blocks.0.block.input": AbsMax()}, batches, progress=False)
    assert seen["blocks.0.block.input"].value.isfinite().all()


def test_unusable_data() -> None:
    model = build("llama")
    for nothing in ([], iter(()), ()):
        with pytest.raises(DataError, match="calibration data: 0 batches"):
            record(model, {"mlp.hidden": AbsMax()}, nothing, progress=False)
    with pytest.raises(DataError, match="33 tokens"):
        record(model, {"mlp.hidden": AbsMax()}, [torch.ones(1, 33, dtype=torch.int64)], progress=False)
    with pytest.raises(DataError, match="every token of a batch is masked"):
        record(
            model,
            {"mlp.hidden": AbsMax()},
            {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.zeros(1, 3)},
            progress=False,
        )
    with pytest.raises(DataError, match="a batch is a str"):
        record(model, {"mlp.hidden": AbsMax()}, ["text"], progress=False)


def test_compiled_and_sharded_models_are_refused() -> None:
    model = build("llama")

    class FSDPLinear(nn.Linear):
        pass

    sharded = nn.Sequential(FSDPLinear(2, 2))
    for bad, text in ((torch.compile(model), "compile after"), (sharded, "shard after")):
        with pytest.raises(UnsupportedModelError, match=text):
            record(bad, {"mlp.hidden": AbsMax()}, padded(), progress=False)  # type: ignore[arg-type]
        with pytest.raises(UnsupportedModelError, match=text):
            with live(bad, "mlp.hidden"):  # type: ignore[arg-type]
                pass
        with pytest.raises(UnsupportedModelError, match=text):
            with calls(bad, "0"):  # type: ignore[arg-type]
                pass
    with pytest.raises(ValueError, match="read off another model"):
        record(model, {"mlp.hidden": AbsMax()}, padded(), anatomy=anatomy(build("llama")), progress=False)


def test_the_model_is_left_as_it_was() -> None:
    model, batches = build("llama"), padded()
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    own = model.model.layers[0].register_forward_hook(lambda *_: None)
    seen = record(model, {"mlp.hidden": [Gram(), Density()]}, batches, progress=False)
    assert seen["blocks.0.mlp.hidden"][0].count
    with pytest.raises(RuntimeError, match="stop"):
        with calls(model, "model.layers.0"):
            raise RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"):
        with live(model, "mlp.hidden"):
            raise RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"):
        record(model, {"mlp.hidden": Density(active=failing)}, batches, progress=False)
    assert [module.training for module in model.modules()] == flags
    assert hooks(model) == 1 and torch.is_grad_enabled() and model.config.use_cache is True
    own.remove()


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("stop")


def test_labels_are_dropped_and_iterators_are_enough() -> None:
    model, batches = build("llama"), padded()
    seen = record(model, {"mlp.hidden": AbsMax()}, ({**b, "labels": "none"} for b in batches), progress=False)
    same = record(model, {"mlp.hidden": AbsMax()}, batches, progress=False)
    assert all(torch.equal(seen[site].value, same[site].value) for site in same)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_memory_plan_is_known_and_capped() -> None:
    model, batches = build("mixtral"), padded()
    wanted = {"mlp.hidden": [Gram(), Moments()], "block.input": Quantiles(), "attention.query": AbsMax()}
    plan = plan_memory(model, wanted, batches)
    gram, moments, quantiles = 2 * 4 * 8 * INNER**2, 2 * 4 * 5 * 8 * INNER, 2 * 8 * (Quantiles.BINS + 1)
    assert plan.total == gram + moments + quantiles + 2 * 8 * HIDDEN
    assert plan.seconds is not None and plan.seconds > 0
    sizes, sites, statistics = plan.table().columns
    assert sizes.footer == format_bytes(plan.total) and sites.footer == "total"
    assert list(statistics.cells)[1] == "Quantiles" and len(list(sites.cells)) == len(plan.rows)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    handle = model.register_forward_hook(count)
    with pytest.raises(MemoryLimitError, match=r"need 2\.14 MB, the cap is 1 MB. Largest is Quantiles at blocks\.0"):
        record(model, wanted, batches, max_memory="1MB", progress=False)
    assert passes == 1  # the one that finds the sizes
    handle.remove()
    assert record(model, wanted, batches, max_memory=plan.total, progress=False).unseen == ()
    assert not isinstance(model.model.layers[0].mlp.experts, ExpertList) and hooks(model) == 0


def test_bytes_in_words() -> None:
    for text, size in [
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("512mb", 512 * 10**6),
        ("10", 10),
        (7, 7),
        ("3KB", 3000),
    ]:
        assert parse_bytes(text) == size  # type: ignore[arg-type]
    for bad in ("", "GB", "2XB", "-1GB", -1, 2.5, None, True):
        with pytest.raises(ValueError, match=r"memory: .* was given"):
            parse_bytes(bad)  # type: ignore[arg-type]
    assert [format_bytes(n) for n in (0, 999, 1500, 2 * 10**9, 5 * 10**12)] == [
        "0 B",
        "999 B",
        "1.5 KB",
        "2 GB",
        "5 TB",
    ]
    assert parse_bytes(format_bytes(123_000_000)) == 123_000_000
    MemoryPlan((("a", "Gram", 10),)).check("10B")


# -- live tensors and calls --------------------------------------------------------------------------------------------


def test_a_penalty_on_live_activations_reaches_the_weights() -> None:
    model, batch = build("llama").train(), padded()[0]
    with live(model, "mlp.hidden") as activations:
        model(**batch)
        assert [len(activations[site]) for site in activations] == [1, 1]
        penalty = sum(tensor.abs().mean() for tensors in activations.values() for tensor in tensors)
        penalty.backward()  # type: ignore[union-attr]
        layer = model.model.layers[0].mlp
        found = layer.gate_proj.weight.grad.clone()
        assert found.abs().sum() > 0
        assert model.lm_head.weight.grad is None  # it comes after the sites
        activations.clear()
        assert activations["blocks.0.mlp.hidden"] == []
        model(**batch)
        assert len(activations["blocks.1.mlp.hidden"]) == 1
    assert hooks(model) == 0 and model.training
    model.zero_grad()
    inputs: list[Tensor] = []
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0])) for block in model.model.layers
    ]
    model(**batch)
    sum(x.abs().mean() for x in inputs).backward()  # type: ignore[union-attr]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, layer.gate_proj.weight.grad)


def test_live_query_is_rotated() -> None:
    model, batch = build("llama"), padded()[0]
    sites = [Site("attention.query", 0), "blocks.0.attention.key"]
    with live(model, sites) as activations:
        weights = model(**batch, output_attentions=True).attentions[0]
    query, key = (activations[site][0] for site in sites)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 2  # head_dim 4
    allowed = torch.ones(7, 7).tril().bool() & batch["attention_mask"].bool()[:, None, None]
    close(scores.masked_fill(~allowed, -torch.inf).softmax(-1)[0], weights[0])


def test_calls_replay_a_submodule() -> None:
    model, batches = build("llama"), padded()
    paths = ["model.layers.1", "model.layers.1.mlp.down_proj"]
    outputs: list[Tensor] = []
    handle = model.model.layers[1].register_forward_hook(lambda m, a, output: outputs.append(output))
    with calls(model, paths) as recorded:
        for batch in batches:
            model(**batch)
    handle.remove()
    assert [len(recorded[path]) for path in paths] == [2, 2]
    for call, batch, output in zip(recorded[paths[0]], batches, outputs, strict=True):
        assert torch.equal(call.context.mask, batch["attention_mask"].bool())
        assert torch.equal(call.replay(model.model.layers[1]), output)
        assert not any("past" in key for key in call.kwargs) and not call.hidden.requires_grad
    assert [call.context.documents[0, 0] for call in recorded[paths[0]]] == [0, 3]
    with calls(model, paths[0], max_tokens=10) as recorded:
        for batch in [*batches, *batches]:
            forward(model, batch)
    assert len(recorded[paths[0]]) == 1  # 16 tokens


def test_recorded_calls_survive_changes_in_place() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    x = torch.randn(4, 3)
    with calls(model, ["1"]) as recorded:
        model(x)
    with torch.no_grad():
        assert torch.equal(recorded["1"][0].args[0], model[0](x))


# -- progress ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_on(screen: io.StringIO, patch: pytest.MonkeyPatch) -> io.StringIO:
    """In the test's own body: pytest puts its stderr back between a fixture and the test."""
    gc.collect()  # the bar of an iterator that an error of a test before ended, and whose frame is not gone yet
    assert not progress._shown.locked(), "a bar of a test before is still there"
    patch.setattr("sys.stderr", screen)
    patch.setenv("TERM", "xterm")
    patch.delenv("NO_COLOR", raising=False)
    return screen


def wait_for(text: str, screen: io.StringIO) -> None:
    deadline = time.monotonic() + 20
    while text not in screen.getvalue():
        assert time.monotonic() < deadline, f"{text!r} did not appear in {screen.getvalue()!r}"
        time.sleep(0.01)


def test_nothing_is_shown_before_the_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = show_on(Terminal(), monkeypatch)
    monkeypatch.setattr(progress, "DELAY", 60.0)
    assert list(progress.track(range(3), "quick")) == [0, 1, 2]
    assert screen.getvalue() == ""


def test_a_bar_appears_after_the_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = show_on(Terminal(), monkeypatch)
    monkeypatch.setattr(progress, "DELAY", 0.05)
    for item in progress.track(iter("ab"), "slow", total=2):
        wait_for("slow" if item == "a" else "1/2", screen)
        for _ in progress.track(range(1), "inside"):  # one bar at a time
            time.sleep(0.5)
    assert "inside" not in screen.getvalue()
    for _ in progress.track(range(3), "stopped"):
        wait_for("stopped", screen)
        break
    assert not progress._shown.locked()


def test_no_bar_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.05)
    screen = Terminal()
    show_on(screen, monkeypatch)
    for _ in progress.track(range(1), "quiet", enabled=False):
        time.sleep(0.3)
    assert screen.getvalue() == ""
    file = io.StringIO()
    show_on(file, monkeypatch)
    for _ in progress.track(range(1), "a step"):
        time.sleep(0.3)
    assert file.getvalue() == "a step: 1 of 1, 0 s\n"  # a line and no bar


def test_observations_are_a_mapping() -> None:
    seen = Observations({Site("mlp.hidden", 0): AbsMax()})
    assert len(seen) == 1 and list(seen) == [Site("mlp.hidden", 0)] and "blocks.0.mlp.hidden" in seen
