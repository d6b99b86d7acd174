"""R-Sparse against the release's rules written out, TEAL and WINA bit for bit, and its search on known losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from actkit.core.ground.errors import RecipeError
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.low_rank import low_rank
from actkit.core.layers.selections import Threshold, TopK
from actkit.core.layers.weights import IntegerWeight
from actkit.core.measure.quality import measure_quality
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.recipe import Recipe, transforms_of
from actkit.core.recipe.runner import apply
from actkit.core.recipe.seen import Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.r_sparse.importance_map import importance_map
from actkit.sparsity.r_sparse.r_sparse import Budget, RSparse
from actkit.sparsity.r_sparse.rank_search import GRID, evolve
from actkit.sparsity.teal import Teal
from actkit.sparsity.wina.rotate_columns import RotateColumns
from actkit.sparsity.wina.wina import Wina
from actkit.testing import check_transform, tiny_batches, tiny_model
from representative import architectures

DOWN = "model.layers.0.mlp.down_proj"


def inputs_by_hand(model: nn.Module, path: str, batches: list[Any]) -> Tensor:
    """The real input rows of a layer, by a plain hook."""
    found: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return torch.cat([x[mask] for x, mask in zip(found, masks, strict=True)])


# -- the release, re-expressed -----------------------------------------------------------------------------------------


def release_integers(m: int, n: int, s: float, alpha: float) -> tuple[int, int]:
    channels = max(int(n * (1 - s) * alpha), 1)
    return channels, max(int((n * m * (1 - s) - channels * m) / (n + m)), 1)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9, 0.97])
def test_integers_are_the_releases(alpha: float) -> None:
    for shape in ((4096, 4096), (1024, 4096), (11008, 4096), (4096, 11008), (24, 16)):
        for s in (0.25, 0.5, 0.7):
            found = Budget.of(*shape, s, alpha)
            assert (found.channels, found.rank) == release_integers(*shape, s, alpha)
            m, n = shape
            traffic = (found.channels * m + found.rank * (m + n)) / (m * n)
            assert found.rank == 1 or traffic <= (1 - s) * (1 + 1e-9)  # the least rank is 1
            assert traffic > 1 - s - (m + n + m) / (m * n)  # each integer is rounded down


def test_at_the_ends_only_one_path_is_left() -> None:
    assert Budget.of(64, 32, 0.5, 1.0) == Budget(0.5, 16, 0)
    assert Budget.of(64, 32, 0.5, 0.0) == Budget(1.0, 0, release_integers(64, 32, 0.5, 0.0)[1])
    for s in (0.1, 0.35, 0.65, 0.7):
        assert Budget.of(64, 32, s, 1.0).dropped == s


def test_threshold_and_output_are_the_releases() -> None:
    """t: the k-th smallest of |x| c over tokens and channels, k = int(numel (1 - C alpha)); to a histogram bin."""
    s, alpha = 0.4, 0.8
    original, model = tiny_model("llama"), tiny_model("llama")
    batches = tiny_batches("llama", lengths=((30, 11, 25), (28, 9)))
    apply(model, RSparse(sparsity=s, alpha=alpha), batches, progress=False)
    real = inputs_by_hand(original, DOWN, batches)
    weight = original.get_submodule(DOWN).weight.detach()
    u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    c = (vh.T * sigma).norm(dim=1)  # the release's: row norms of V S, which are the columns' norms of W
    torch.testing.assert_close(c.float(), weight.norm(dim=0), rtol=1e-5, atol=0)
    scored = (real.abs() * c.float()).flatten()
    expected = float(scored.kthvalue(int(scored.numel() * (1 - (1 - s) * alpha))).values)
    layer = model.get_submodule(DOWN)
    gap = float(scored.sort().values.diff().max())  # of few values, a quantile may lie anywhere between two
    assert float(layer.select.threshold) == pytest.approx(expected, rel=1 / 512, abs=gap)

    rank = release_integers(16, 24, s, alpha)[1]
    assert layer.correction.left.shape == (16, rank) and layer.correction.of == "dropped"
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(3))
    mask = x.abs() * weight.norm(dim=0) > layer.select.threshold
    best = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
    by_hand = (x * mask).double() @ weight.double().T + (x * ~mask).double() @ best.T
    torch.testing.assert_close(layer(x).double(), by_hand, rtol=1e-4, atol=1e-5)


def test_factors_are_the_best_of_their_rank() -> None:
    module = nn.Linear(20, 12)
    left, right = low_rank(module.weight, 5)
    sigma = torch.linalg.svdvals(module.weight.double())
    error = (module.weight.double() - left.double() @ right.double()).norm()
    torch.testing.assert_close(error, sigma[5:].norm(), rtol=1e-5, atol=0)  # Eckart and Young
    assert low_rank(module.bfloat16().weight, 5)[0].dtype == torch.bfloat16


# -- the special cases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit", "mlp"])
def test_alpha_one_is_teal_or_wina_bit_for_bit(kind: str) -> None:
    batches = tiny_batches(kind)
    for criterion, other in (("magnitude", Teal(sparsity=0.35)), ("wina", Wina(sparsity=0.35, norms="each"))):
        mine, theirs = tiny_model(kind), tiny_model(kind)
        apply(mine, RSparse(sparsity=0.35, alpha=1.0, criterion=criterion), batches, progress=False)
        apply(theirs, other, batches, progress=False)
        first, second = mine.state_dict(), theirs.state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        assert sum(isinstance(m, ActLinear) for m in mine.modules()) > 1


def test_alpha_zero_is_the_low_rank_copy_alone_and_the_bias_counts_once() -> None:
    for kind, path in (("llama", DOWN), ("bert", "bert.encoder.layer.0.intermediate.dense")):
        model, original = tiny_model(kind), tiny_model(kind).get_submodule(path)
        apply(model, RSparse(alpha=0.0), tiny_batches(kind), progress=False)
        layer = model.get_submodule(path)
        assert isinstance(layer.select, TopK) and layer.select.k == 0
        x = torch.randn(7, original.in_features)
        expected = x @ (layer.correction.left @ layer.correction.right).T
        expected = expected if original.bias is None else expected + original.bias
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        u, s, vh = torch.linalg.svd(original.weight.detach().double())
        rank = release_integers(*original.weight.shape, 0.5, 0.0)[1]
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close((layer.correction.left @ layer.correction.right).double(), best, rtol=0, atol=1e-5)


def test_no_channel_is_counted_twice_or_dropped() -> None:
    """With the whole weight as its own low-rank copy the layer is the dense one, whatever the threshold."""
    linear = nn.Linear(16, 24)
    left, right = low_rank(linear.weight, 16)
    layer = ActLinear.of(linear, select=Threshold(0.8), correction=LowRank(left, right, of="dropped"))
    x = torch.randn(40, 16)
    x[0, :3] = torch.tensor([0.8, -0.8, 0.0])  # on the threshold
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-5)


def test_grouped_queries_are_budgeted_by_their_true_shape() -> None:
    model = tiny_model("llama")
    notes = apply(model, RSparse(alpha=0.5), tiny_batches("llama"), progress=False).report.notes
    for name, out in (("k_proj", 8), ("q_proj", 16)):
        layer = model.get_submodule(f"model.layers.0.self_attn.{name}")
        assert layer.correction.left.shape == (out, release_integers(out, 16, 0.5, 0.5)[1])
    note = next(note for note in notes if "layers.0.self_attn.k_proj" in note)
    share = 1 * (8 + 16) / (8 * 16)  # rank 1
    assert f"4 of 16 channels and rank 1: reads {0.25 + share:.1%}" in note and f"takes {share:.1%} more" in note


def test_alphas_by_pattern() -> None:
    model = tiny_model("llama")
    settings = RSparse(alpha={"*.layers.1.mlp.*": 0.5, "*mlp*": 0.25, "*.o_proj": 0})
    applied = apply(model, settings, tiny_batches("llama"), progress=False)
    expected = {"layers.1.mlp.up_proj": 0.5, "layers.0.mlp.up_proj": 0.25, "layers.0.self_attn.o_proj": 0.0}
    for path, alpha in expected.items():
        layer = model.model.get_submodule(path)
        assert layer.correction.left.shape[1] == Budget.of(layer.out_features, layer.in_features, 0.5, alpha).rank
    assert model.model.layers[0].self_attn.q_proj.correction is None
    assert "3 entries, mean 0.25" in settings.label and "alpha=0.5" in RSparse(alpha=0.5).label
    assert len(applied.report.notes) == 14


# -- the contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", architectures(["llama", "mixtral", "bert", "vit", "mlp"]))
def test_it_is_a_transform(kind: str) -> None:
    batches = tiny_batches(kind, lengths=((20, 20, 20),) * 3) if kind == "mixtral" else tiny_batches(kind)
    conflicting = (Teal(), Wina(norms="each"))
    check_transform(RSparse(alpha=0.6), tiny_model(kind), batches, conflicting=conflicting)


def test_a_search_is_saved_and_does_the_same_again(tmp_path) -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=((9, 9), (8, 8)))
    apply(model, RSparse(alpha="search", generations=2, population=4), batches, progress=False)
    from actkit.core.edit import changes

    (found,) = transforms_of(changes.of(model).recipe)
    assert isinstance(found.alpha, dict) and len(found.alpha) == 14
    again = Recipe.load(Recipe([found]).save(tmp_path / "recipe.yaml"))
    assert again.transforms == (found,)
    other = tiny_model("llama")
    apply(other, again, batches, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_conflicts_go_by_both_slots() -> None:
    class Correction(Transform):
        tags = Tags(slot="correction")

    for other in (Teal(), Wina(), Correction(), RSparse()):
        assert RSparse().conflicts(other) and other.conflicts(RSparse())
    assert "correction slot" in (RSparse().conflicts(Correction()) or "")
    assert "put it first" in (Awq().conflicts(RSparse()) or "")
    assert "rotate first" in (RotateColumns().conflicts(RSparse()) or "")
    assert RSparse().conflicts(RoundToNearest()) is None and RoundToNearest().conflicts(RSparse()) is None
    assert (Tags().slots, Tags(slot="weight").slots, RSparse.tags.slots) == ((), ("weight",), ("select", "correction"))


def test_over_quantized_weights_both_paths_use_what_is_stored() -> None:
    model, quantized, batches = tiny_model("llama"), tiny_model("llama"), tiny_batches("llama")
    apply(quantized, RoundToNearest(group_size=8), batches, progress=False)
    report = apply(model, [RoundToNearest(group_size=8), RSparse(alpha=0.5)], batches, progress=False).report
    layer, weight = model.get_submodule(DOWN), quantized.get_submodule(DOWN).dequantized()
    assert isinstance(layer.storage, IntegerWeight) and torch.equal(layer.dequantized(), weight)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = layer.correction.left.shape[1]
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    torch.testing.assert_close((layer.correction.left @ layer.correction.right).double(), best, rtol=0, atol=1e-5)
    x = torch.randn(9, 24)
    kept = layer.select(x)
    torch.testing.assert_close(layer(x), kept @ weight.T + (x - kept) @ best.float().T, rtol=1e-4, atol=1e-5)
    note = next(note for note in report.notes if note.startswith(DOWN))
    share = layer.correction.nbytes / layer.storage.nbytes  # float32 factors over 4-bit codes with their scales
    assert share > 2 * rank * (16 + 24) / (16 * 24) and f"takes {share:.1%} more memory" in note


def test_bad_input_is_refused_by_name() -> None:
    for settings in ({"sparsity": 1.0}, {"sparsity": -0.1}, {"population": 1}, {"generations": 0}, {"skip": ("head",)}):
        with pytest.raises(ValidationError, match=next(iter(settings))):
            RSparse(**settings)
    for alpha in (1.5, -0.1, "best", {"*": 2.0}):
        with pytest.raises(ValidationError, match="alpha"):
            RSparse(alpha=alpha)
    with pytest.raises(RecipeError, match=r"alpha: '\*\.wrong' matches no linear layer; this model has model\.layers"):
        apply(tiny_model("llama"), RSparse(alpha={"*.wrong": 0.5}), tiny_batches("llama"), progress=False)
    with pytest.raises(RecipeError, match=r"search.*has not run"):
        RSparse(alpha="search").alpha_of("layer")
    with pytest.raises(RecipeError, match=r"alpha.*1\.5 was given"):
        Recipe.parse({"actkit": 1, "transforms": [{"r_sparse": {"alpha": 1.5}}]})


def test_sparsity_zero_keeps_everything_whatever_alpha() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    expected = model(**batches[0]).logits
    for alpha in (0.3, "search"):
        apply(model, RSparse(sparsity=0.0, alpha=alpha), batches, undo="memory", progress=False)
        torch.testing.assert_close(model(**batches[0]).logits, expected, rtol=1e-4, atol=1e-5)
        model = tiny_model("llama")


# -- the search --------------------------------------------------------------------------------------------------------


def test_evolution_on_a_loss_whose_minimum_is_known() -> None:
    wanted = dict(zip("abcdef", (0.9, 0.9, 1.0, 0.8, 0.7, 0.95), strict=True))
    calls = []

    def loss(alphas: dict[str, float]) -> float:
        assert all(0 <= value <= 1 for value in alphas.values())
        calls.append(tuple(alphas.values()))
        return sum((alphas[name] - wanted[name]) ** 2 for name in wanted)

    found = evolve(loss, list(wanted), seed=1, progress=False)
    assert len(calls) == len(set(calls)) == found.evaluations <= 134
    assert calls[: len(GRID)] == [(value,) * 6 for value in GRID]
    assert found.uniform == 0.9 and found.uniform_loss == pytest.approx(loss(dict.fromkeys(wanted, 0.9)))
    assert found.loss == min(map(loss, [found.alphas])) < 0.5 * found.uniform_loss
    assert list(found.history) == sorted(found.history, reverse=True) and len(found.history) == 5
    again, other = (evolve(loss, list(wanted), seed=seed, progress=False) for seed in (1, 2))
    assert again == found and other.alphas != found.alphas
    assert evolve(lambda alphas: 0.0, ["a"], generations=1, population=2, progress=False).alphas == {"a": 1.0}
    with pytest.raises(ValueError, match="names: none were given"):
        evolve(loss, [], progress=False)


def test_the_search_measures_what_apply_gives() -> None:
    batches = tiny_batches("llama", lengths=((9, 9), (8, 8)))
    model = tiny_model("llama")
    settings = RSparse(alpha="search", generations=2, population=4, seed=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = settings.search(Trial(anatomy(model), batches), batches, progress=False)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for alpha, loss in ((found.alphas, found.loss), (found.uniform, found.uniform_loss)):
        model = tiny_model("llama")
        apply(model, RSparse(alpha=alpha), batches, progress=False)
        measured = measure_quality(model, batches, task="language", resamples=1, progress=False)
        assert measured.metrics["perplexity"].value == pytest.approx(loss, rel=1e-5)
    assert found.loss <= found.uniform_loss


@pytest.mark.parametrize("kind", ["bert", "vit", "mlp", "mixtral"])
def test_other_models_are_searched_too(kind: str) -> None:
    batches = tiny_batches(kind, lengths=((20, 20, 20),) * 3)
    applied = apply(
        tiny_model(kind), RSparse(alpha="search", generations=1, population=2), batches, min_coverage=0, progress=False
    )
    assert applied.report.changed


# -- the importance map ------------------------------------------------------------------------------------------------


def test_importance_map_against_the_definition() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    found = importance_map(model, DOWN, batches, progress=False)
    x = inputs_by_hand(model, DOWN, batches).double()
    _, s, vh = torch.linalg.svd(model.get_submodule(DOWN).weight.detach().double(), full_matrices=False)
    every = (x[:, :, None] * (s[:, None] * vh).T).abs().mean(0)  # [in, rank]
    torch.testing.assert_close(found.importance, every[found.channels])
    energy = every.square().sum(1)[found.channels]
    assert (energy.diff() <= 0).all() and found.tokens == len(x)
    top = every[found.channels][:12, :4].square().sum() / every.square().sum()
    assert found.captured(0.5, 0.25) == pytest.approx(float(top))
    assert found.captured(1, 1) == pytest.approx(1) and found.captured(0, 1) == 0
    assert found.table().row_count == 5 and len(found.figure().data[0].z) == 24
    assert torch.tensor(found.to_dict()["importance"]).shape == (24, 16)
    with pytest.raises(ValueError, match="channels: 2 was given"):
        found.captured(2, 1)
    with pytest.raises(ValueError, match=r"path: 'lost' is no linear layer; this model has model\.layers"):
        importance_map(model, "lost", batches)
    traced = importance_map(tiny_model("mlp"), "second", tiny_batches("mlp"), progress=False)
    assert traced.importance.shape == (24, 8)
