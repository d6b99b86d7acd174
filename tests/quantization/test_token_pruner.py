"""Pruned prompts against a loop over the blocks written by hand, and against masks that hide what was dropped."""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.layers.attention_rounding import static_grid
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import DenseWeight
from actkit.core.recipe.runner import apply
from actkit.quantization.agile_quant.agile_quant import AgileQuant
from actkit.quantization.agile_quant.low_bits import LowBits, coarser
from actkit.quantization.agile_quant.prune_schedule import PruneSchedule
from actkit.quantization.agile_quant.reading import SCORES, Reading
from actkit.quantization.agile_quant.token_pruner import TokenPruner
from actkit.quantization.gptq import Gptq
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.testing import check_runtime, tiny_model

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that attention differs from token to token
}
IDS = torch.randint(100, (2, 20), generator=torch.Generator().manual_seed(0))
SCHEDULE = PruneSchedule.geometric([1, 2], 0.6)


def llama(attention: str = "eager", **settings: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **settings})).eval()
    model.set_attn_implementation(attention)
    return model


@cache
def quantized() -> Any:
    batches = [{"input_ids": IDS}]
    return apply(llama("sdpa"), [Gptq(bits=4, group_size=16), AgileQuant()], batches, progress=False).model


def score_of(weights: torch.Tensor, score: str) -> torch.Tensor:
    """The sheet's two formulas, element by element: weights [heads, tokens, tokens]."""
    heads, n, _ = weights.shape
    if score == "start_token":
        return torch.tensor([sum(float(weights[h, i, 0]) for h in range(heads)) for i in range(n)])
    return torch.tensor(
        [sum(float(weights[h, i, j]) for h in range(heads) for i in range(j, n)) / (n - j) for j in range(n)]
    )


@torch.no_grad()
def by_hand(model: Any, ids: torch.Tensor, schedule: PruneSchedule, score: str, positions: str) -> Any:
    """One text through the blocks: kept positions of each, and the logits of all tokens, dropped ones early."""
    base = model.model
    hidden, kept = base.embed_tokens(ids), list(range(len(ids)))
    last: dict[int, torch.Tensor] = {}
    read = []
    for index, block in enumerate(base.layers):
        read.append(tuple(kept))
        place = torch.tensor([kept if positions == "keep" else list(range(len(kept)))])
        mask = torch.zeros(len(kept), len(kept)).masked_fill(
            torch.ones(len(kept), len(kept)).triu(1).bool(), -torch.inf
        )
        seen: list[torch.Tensor] = []
        handle = block.self_attn.register_forward_hook(lambda m, a, output, seen=seen: seen.append(output[1][0]))
        turned = base.rotary_emb(hidden[None], place)
        hidden = block(hidden[None], attention_mask=mask[None, None], position_embeddings=turned)[0]
        handle.remove()
        last.update(zip(kept, hidden, strict=True))
        number = int(schedule.shares.get(index, 0) * len(kept))
        if number:
            scores = score_of(seen[0], score)
            middle = sorted(range(1, len(kept) - 1), key=lambda i: (float(scores[i]), i))
            stay = sorted({0, len(kept) - 1, *middle[number:]})
            hidden, kept = hidden[stay], [kept[i] for i in stay]
    whole = torch.stack([last[i] for i in range(len(ids))])
    return read, kept, model.lm_head(base.norm(whole))


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("score", ["start_token", "column_mean"])
@pytest.mark.parametrize("make", [llama, quantized])
def test_a_text_is_read_as_by_hand(make: Any, score: Any, positions: Any) -> None:
    model = make()
    pruned = TokenPruner(model, SCHEDULE, score=score, positions=positions).read(IDS)
    for row, ids in enumerate(IDS):
        read, left, logits = by_hand(model, ids, SCHEDULE, score, positions)
        assert [tuple(each[row].tolist()) for each in pruned.kept] == read
        assert pruned.left[row].tolist() == left and 0 in left and 19 in left
        assert pruned.kept_mask[row].nonzero().flatten().tolist() == left
        torch.testing.assert_close(pruned.logits[row], logits, rtol=1e-4, atol=1e-4)
    lengths = [each.shape[1] for each in pruned.kept]
    share = 1 - 0.4**0.5
    assert lengths == [20, 20, 20 - int(20 * share), 13 - int(13 * share)] == [20, 20, 13, 9]


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("score", ["start_token", "column_mean"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gpt_neox"])
def test_scores_are_formed_beside_attention_that_forms_none(kind: str, score: Any, positions: Any) -> None:
    """Queries and keys of layers apart, behind norms, of one fused layer, turned in part: as eager attention has it."""
    found = []
    for attention in ("eager", "sdpa"):
        model = tiny_model(kind)
        for parameter in model.parameters():
            parameter.data.mul_(3)  # so that attention differs from token to token
        model.set_attn_implementation(attention)
        schedule = PruneSchedule.geometric([0], 0.5)
        found.append(TokenPruner(model, schedule, score=score, positions=positions).read(IDS % 40))
    assert torch.equal(found[0].left, found[1].left)
    close = 1e-4 * float(found[0].logits.abs().max())
    torch.testing.assert_close(found[0].logits, found[1].logits, rtol=1e-4, atol=close)


@torch.no_grad()
def test_kept_positions_are_what_masks_give() -> None:
    """Hiding dropped tokens from the blocks behind is the same function for those that stay: nothing is cut out."""
    model = llama()
    pruner = TokenPruner(model, SCHEDULE)
    pruned = pruner.read(IDS[:1])
    kept = [set(each[0].tolist()) for each in pruned.kept]
    causal = torch.full((20, 20), -torch.inf).triu(1)

    def hiding(index: int) -> Any:
        mask = causal.clone()
        mask[:, [i for i in range(20) if i not in kept[index]]] = -torch.inf
        mask.fill_diagonal_(0)  # dropped rows read themselves, and are not looked at

        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "attention_mask": mask[None, None]}

        return hook

    handles = [
        block.register_forward_pre_hook(hiding(i), with_kwargs=True) for i, block in enumerate(model.model.layers)
    ]
    logits = model(IDS[:1]).logits[0]
    for handle in handles:
        handle.remove()
    left = pruned.left[0]
    torch.testing.assert_close(pruned.logits[0, left], logits[left], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def low_by_hand(model: Any, ids: torch.Tensor, low: LowBits) -> Any:
    """One text, nothing dropped but by SCHEDULE: of which positions each block reads 4 bits, and the last states."""
    base = model.model
    hidden, kept, coarse = base.embed_tokens(ids), list(range(len(ids))), set[int]()
    read = []
    for index, block in enumerate(base.layers):
        n = len(kept)
        given = {
            "attention_mask": torch.full((n, n), -torch.inf).triu(1)[None, None],
            "position_embeddings": base.rotary_emb(hidden[None], torch.tensor([kept])),
        }
        seen: list[torch.Tensor] = []
        handle = block.self_attn.register_forward_hook(lambda m, a, output, seen=seen: seen.append(output[1][0]))
        block(hidden[None], **given)
        handle.remove()
        scores = score_of(seen[0], "start_token")
        middle = sorted(range(1, n - 1), key=lambda i: (float(scores[i]), i))
        dropped, more = int(SCHEDULE.shares.get(index, 0) * n), int(low.shares.get(index, 0) * n)
        coarse = (coarse if low.inherited else set()) | {kept[i] for i in middle[dropped : dropped + more]}
        read.append(tuple(sorted(coarse & set(kept))))
        rows = [i for i, position in enumerate(kept) if position in coarse]

        def lower(layer: Any, args: Any, output: Any, rows: Any = rows) -> Any:
            step = layer.scale * 127.5 / 7.5  # of the same largest value
            four = torch.clamp(torch.round(args[0] / step), -8, 7) * step
            output = output.clone()
            output[:, rows] = four[:, rows]
            return output

        layers = (block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)
        handles = [layer.inputs.register_forward_hook(lower) for layer in layers]
        hidden = block(hidden[None], **given)[0]
        for handle in handles:
            handle.remove()
        stay = sorted({0, n - 1, *middle[dropped:]})
        hidden, kept = hidden[stay], [kept[i] for i in stay]
    return read, kept, model.lm_head(base.norm(hidden))


@pytest.mark.parametrize("inherited", [True, False])
@pytest.mark.parametrize("softmax", ["log2", "none"])
def test_of_tokens_of_low_scores_layers_read_four_bits(softmax: Any, inherited: bool) -> None:
    model = quantized()
    if softmax == "none":  # scaled dot-product attention, whose weights are formed beside it
        batches, plain = [{"input_ids": IDS}], AgileQuant(softmax="none", attention_bits=None)
        model = apply(llama("sdpa"), plain, batches, progress=False).model
    low = LowBits({0: 0.2, 2: 0.3}, inherited=inherited)
    pruned = TokenPruner(model, SCHEDULE, low=low).read(IDS)
    exact = TokenPruner(model, SCHEDULE).read(IDS)
    eager = copy.deepcopy(model)
    if softmax == "none":
        eager.set_attn_implementation("eager")
    for row, ids in enumerate(IDS):
        read, left, logits = low_by_hand(eager, ids, low)
        assert [tuple(each[row].nonzero().flatten().tolist()) for each in pruned.low] == read
        assert len(read[0]) == 4 and bool(read[1]) is inherited and pruned.left[row].tolist() == left
        torch.testing.assert_close(pruned.logits[row, left], logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(pruned.logits[row, left], exact.logits[row, left], rtol=1e-3, atol=1e-3)
    pruner = TokenPruner(model, SCHEDULE, low=low)
    pruner(IDS[0].tolist())
    assert list(pruner.lowered) == low_by_hand(eager, IDS[0], low)[0]
    before = pruner.lowered
    pruner([3])  # a token that follows is read as it is
    assert pruner.lowered == before


def test_coarser_inputs_have_the_range_of_the_others() -> None:
    largest = torch.tensor([0.5, 3.0, 7.0])
    for bits in (8, 6):
        scale, _ = static_grid(bits).from_range(-largest, largest)
        layer = ActLinear(DenseWeight(torch.zeros(2, 3)), inputs=RoundedInputs(static_grid(bits), scale))
        found = coarser(layer, "it", 4)
        torch.testing.assert_close(found.scale, static_grid(4).from_range(-largest, largest)[0])
    low, high = torch.tensor([-1.0]), torch.tensor([3.0])
    grid = IntegerGrid(8, scope="tensor")
    scale, zero = grid.from_range(low, high)
    layer = ActLinear(DenseWeight(torch.zeros(2, 3)), inputs=RoundedInputs(grid, scale, zero))
    found, (scale, zero) = coarser(layer, "it", 4), IntegerGrid(4, scope="tensor").from_range(low, high)
    assert torch.equal(found.zero, zero)
    torch.testing.assert_close(found.scale, scale)


def test_coarser_reading_needs_static_inputs_of_more_bits() -> None:
    low = LowBits({1: 0.2})
    with pytest.raises(UnsupportedModelError, match=r"o_proj does not read static inputs of more than 4 bits"):
        TokenPruner(llama(), low=low)
    four = apply(llama("sdpa"), AgileQuant(bits=4), [{"input_ids": IDS}], progress=False).model
    with pytest.raises(UnsupportedModelError, match="apply agile_quant first"):
        TokenPruner(four, low=low)
    with pytest.raises(ValueError, match="low: block 4 was given"):
        TokenPruner(quantized(), low=LowBits({4: 0.2}))
    for settings in ({"shares": {0: 1.0}}, {"shares": {-1: 0.1}}, {"bits": 8}):
        with pytest.raises(ValueError, match=r"shares|bits"):
            LowBits(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_tokens_that_follow_read_the_kept_ones(positions: Any) -> None:
    """A prompt and four tokens, alone and together, against one pass by hand over what each block holds."""
    model, ids = llama(), IDS[0].tolist()
    found = []
    for parts in ([ids[:16], *([token] for token in ids[16:])], [ids[:16], ids[16:]]):
        pruner = TokenPruner(model, SCHEDULE, positions=positions)
        for part in parts:
            logits = pruner(part)
        found.append(logits)
        assert pruner.position == 20
        prompt, _, _ = by_hand(model, IDS[0, :16], SCHEDULE, "start_token", positions)
        assert list(pruner.kept) == [(*read, 16, 17, 18, 19) for read in prompt]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # the same with what each block holds given from outside
        hidden, read = model.model.embed_tokens(IDS[0]), list(range(20))
        for index, block in enumerate(model.model.layers):
            kept = list(pruner.kept[index])
            inside = torch.tensor([place for place, i in enumerate(read) if i in kept])
            hidden, read = hidden[inside], kept
            place = torch.tensor([kept if positions == "keep" else list(range(len(kept)))])
            mask = torch.full((len(kept), len(kept)), -torch.inf).triu(1)
            turned = model.model.rotary_emb(hidden[None], place)
            hidden = block(hidden[None], attention_mask=mask[None, None], position_embeddings=turned)[0]
        expected = model.lm_head(model.model.norm(hidden))[-1]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def test_it_generates_from_a_pruned_prompt() -> None:
    model = llama()
    with TokenPruner(model, SCHEDULE) as pruner:
        written = list(pruner.generate(IDS[0, :16], max_new_tokens=4, end=()))
        assert len(written) == 4 and len(pruner.kept[3]) < len(pruner.kept[0]) == 19
    with TokenPruner(model) as pruner:
        plain = list(pruner.generate(IDS[0, :16], max_new_tokens=4, end=()))
    ids = IDS[:1, :16]
    assert plain == model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 16:].tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_a_schedule_it_keeps_what_runtimes_promise(attention: str) -> None:
    check_runtime(TokenPruner, llama(attention), IDS[0, :12].tolist(), tolerance=1e-5)


def test_losses_are_those_of_all_tokens_and_of_the_kept_ones() -> None:
    model, batches = llama(), [{"input_ids": IDS}, {"input_ids": IDS[:, :9], "attention_mask": torch.ones(2, 9)}]
    pruner = TokenPruner(model, SCHEDULE, score="random", seed=3)
    quality = pruner.quality(batches)
    sums, kept_sums, before, n, m = 0.0, 0.0, 0.0, 0, 0
    for batch in batches:
        pruned = pruner.read(batch["input_ids"])
        with torch.no_grad():
            exact = model(batch["input_ids"]).logits
        for row, ids in enumerate(batch["input_ids"]):
            for i in range(len(ids) - 1):
                loss = float(torch.nn.functional.cross_entropy(pruned.logits[row, i], ids[i + 1]))
                before += float(torch.nn.functional.cross_entropy(exact[row, i], ids[i + 1]))
                sums, n = sums + loss, n + 1
                if i in pruned.left[row].tolist():
                    kept_sums, m = kept_sums + loss, m + 1
    assert (quality.tokens, quality.kept_tokens) == (n, m) == (54, m)
    assert quality.all == pytest.approx(sums / n, rel=1e-5) and quality.kept == pytest.approx(kept_sums / m, rel=1e-5)
    assert quality.before == pytest.approx(before / n, rel=1e-5)
    assert f"on all {n} tokens; on the {m} kept ones alone" in quality.describe()
    nothing = TokenPruner(model).quality(batches)
    assert nothing.all == nothing.before == nothing.kept and nothing.sparsity == 0


def test_schedules_say_how_much_goes() -> None:
    assert SCHEDULE.shares == {1: pytest.approx(1 - 0.4**0.5), 2: pytest.approx(1 - 0.4**0.5)}
    assert SCHEDULE.sparsity(4) == pytest.approx((1 - 0.4**0.5 + 0.6) / 4)
    for wanted in (0.0, 0.02, 0.2):
        assert PruneSchedule.of_sparsity([1, 2], 4, wanted).sparsity(4) == pytest.approx(wanted, abs=1e-9)
    found = TokenPruner(llama(), PruneSchedule.of_sparsity([1, 2], 4, 0.2)).losses([{"input_ids": IDS}]).sparsity
    assert found == pytest.approx(0.2, abs=0.03)  # numbers of 20 tokens are rounded down
    assert PruneSchedule().sparsity(4) == 0


def test_equal_scores_go_in_order() -> None:
    """Scores that are all alike: the earlier tokens go, the first and the last stay."""
    model = llama()
    for block in model.model.layers:
        block.self_attn.q_proj.weight.data.zero_()  # each token attends to all before alike
        block.self_attn.k_proj.weight.data.zero_()
    pruned = TokenPruner(model, PruneSchedule({0: 0.5})).read(IDS[:1])
    assert pruned.left[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 19]  # 1 / (i + 1): the later, the less
    weights = torch.full((1, 2, 6, 6), 0.25)
    assert torch.equal(SCORES["start_token"](weights), torch.full((1, 6), 0.5))
    pruner = SimpleNamespace(score="start_token", schedule=PruneSchedule({0: 0.5}), position=0, seed=0)
    reading = Reading(pruner, IDS[:1, :6], None, prunes=True)  # type: ignore[arg-type]
    reading._scores = SCORES["start_token"](weights)
    assert reading._stay(3).tolist() == [[0, 4, 5]] and reading._stay(9).tolist() == [[0, 5]]


def test_what_is_refused() -> None:
    for settings in ({"shares": {0: 1.0}}, {"shares": {-1: 0.1}}):
        with pytest.raises(ValueError, match="shares"):
            PruneSchedule(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta"):
        PruneSchedule.geometric([], 0.5)
    with pytest.raises(ValueError, match="sparsity"):
        PruneSchedule.of_sparsity([3], 4, 0.1)  # behind the last block nothing reads less
    model = llama()
    with pytest.raises(ValueError, match="block 4 was given, and the model has the blocks 0 to 3"):
        TokenPruner(model, PruneSchedule({4: 0.5}))
    with pytest.raises(ValueError, match="score, positions"):
        TokenPruner(model, score="median")  # type: ignore[arg-type]
    cached = apply(llama("sdpa"), QuantizeCache(), progress=False).model
    with pytest.raises(UnsupportedModelError, match="'actkit_rounded_cache' does not form its weights"):
        TokenPruner(cached, SCHEDULE)
    for kind, text in (("gpt2", "rotary"), ("bert", "rotary|output layer"), ("mistral", "windows"), ("mlp", "no row")):
        with pytest.raises(UnsupportedModelError, match=text):
            TokenPruner(tiny_model(kind))
    pruner = TokenPruner(model, SCHEDULE)
    with pytest.raises(DataError, match="padded"):
        pruner.losses([{"input_ids": IDS, "attention_mask": torch.tensor([[0] + [1] * 19, [1] * 20])}])
    with pytest.raises(DataError, match="no position with a next token"):
        pruner.losses([{"input_ids": IDS[:, :1]}])
    with pytest.raises(DataError, match=r"shape \[20\] was given"):
        pruner.read(IDS[0])
    pruner.close()
    with pytest.raises(ValueError, match="it was closed"):
        pruner([1])
