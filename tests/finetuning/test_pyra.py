"""Token merging against loops, PYRA against float64, and blocks that carry sizes between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import actkit
from actkit.compression.repavit.folded import Reparameterize
from actkit.compression.repavit.idle import Repavit
from actkit.core.ground.errors import DataError, EditError, RecipeError
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.core.watch.capture import record
from actkit.core.watch.intervene import intervene
from actkit.core.watch.site_changes import Scale
from actkit.core.watch.statistics import Moments
from actkit.finetuning.pyra.merge_tokens import PUBLISHED, MergeTokens, numbers
from actkit.finetuning.pyra.merging import bipartite_match, merge_tokens, unmerge
from actkit.finetuning.pyra.merging_layer import MergingLayer
from actkit.finetuning.pyra.modulator import PyraModulator
from actkit.finetuning.pyra.token_sources import token_sources
from actkit.finetuning.s2a.prompts import AddPrompts
from actkit.finetuning.s2a.side_path import AddSidePath
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_transform, tiny_model

D = 16


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(x: Tensor, size: Tensor, metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
    """Merge the tokens of one image: pairs are tried one after the other."""
    even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    pairs = []
    for a in even[1 if protected else 0 :]:  # the class token goes nowhere
        partners = odd[1 if protected == 2 else 0 :]  # and nothing goes into the distillation token
        scores = [float(F.cosine_similarity(metric[a], metric[b], dim=0)) for b in partners]
        pairs.append((-max(scores), a, partners[scores.index(max(scores))]))
    pairs.sort()
    gone = {a: b for _, a, b in pairs[: min(r, (len(x) - protected) // 2)]}
    kept = [a for a in even if a not in gone]
    if not protected:  # without a class token the order is that of likeness
        kept = [a for _, a, _ in pairs if a not in gone]
    left = [*kept, *odd] if protected < 2 else [kept[0], odd[0], *kept[1:], *odd[1:]]
    rows, sizes = [], []
    for token in left:
        members = [token, *[a for a, b in gone.items() if b == token]]
        weight = sum(size[each] for each in members)
        rows.append(sum(size[each] * x[each] for each in members) / weight)
        sizes.append(weight)
    return torch.stack(rows), torch.stack(sizes)


@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize(("tokens", "r"), [(17, 3), (16, 7), (9, 20)])
def test_merging_is_that_of_loops(protected: int, tokens: int, r: int) -> None:
    x, metric = drawn(3, tokens, D), drawn(3, tokens, 4, seed=1)
    size = drawn(3, tokens, 1, seed=2).abs() + 1
    matching = bipartite_match(metric, r, protected=protected)
    found, sizes = merge_tokens(x, size, matching)
    for row in range(3):
        expected, own = by_loops(x[row], size[row], metric[row], r, protected)
        torch.testing.assert_close(found[row], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(sizes[row], own, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    assert found.shape[1] == tokens - min(r, (tokens - protected) // 2)


def literal(modulator: PyraModulator, s: Tensor, t: Tensor) -> Tensor:
    """The formula, one pair and channel after the other."""
    settings = modulator.settings
    seen = s + t
    if settings["norm"]:
        mean, variance = seen.mean(-1, keepdim=True), seen.var(-1, keepdim=True, unbiased=False)
        seen = (seen - mean) / (variance + 1e-5).sqrt() * modulator.norm.weight + modulator.norm.bias
    out = s.clone()
    for b in range(len(s)):
        for i in range(s.shape[1]):
            for d in range(D):
                channel, token = 1.0, 1.0
                if settings["channel"]:
                    product = sum(modulator.by_channel[k] * seen[b, k, d] for k in range(s.shape[1]))
                    channel = 2 / (1 + (-product).exp()) if settings["bounded"] else product
                if settings["token"]:
                    product = seen[b, i] @ modulator.by_token
                    token = 2 / (1 + (-product).exp()) - 1 if settings["bounded"] else product
                    out[b, i, d] = s[b, i, d] + s[b, i, d] * channel * token
                else:
                    out[b, i, d] = s[b, i, d] * channel if settings["bounded"] else s[b, i, d] * (1 + channel)
    return out


@pytest.mark.parametrize(
    "settings", [{}, {"token": False}, {"channel": False}, {"norm": False}, {"bounded": False}], ids=str
)
@torch.no_grad()
def test_the_modulator_is_the_formula(settings: dict[str, bool]) -> None:
    modulator = PyraModulator(D, 5, **settings).double()
    s, t = drawn(2, 5, D), drawn(2, 5, D, seed=3)
    torch.testing.assert_close(modulator(s, t), s)  # it begins at plain merging
    for index, parameter in enumerate(modulator.parameters()):
        parameter.copy_(drawn(*parameter.shape, seed=index + 4))
    torch.testing.assert_close(modulator(s, t), literal(modulator, s, t), rtol=1e-10, atol=1e-10)
    short = modulator(s[:, :3], t[:, :3])  # a sequence with fewer pairs
    torch.testing.assert_close(short, literal(modulator, s[:, :3], t[:, :3]), rtol=1e-10, atol=1e-10)


def test_schedules() -> None:
    assert numbers((3, 2), 4, 17) == (3, 2, 0, 0) and numbers(2, 3, 17) == (2, 2, 2)
    for (name, depth), schedule in PUBLISHED.items():
        assert len(schedule) == depth and numbers(name, depth, 197) == schedule
    for schedule, depth, text in (
        ((1,) * 5, 4, "5 numbers were given for 4"),
        ((9,), 1, "at most 8"),
        ("low", 3, "12"),
    ):
        with pytest.raises(EditError, match=text):
            numbers(schedule, depth, 17)


def vit(**settings: Any) -> Any:
    """A ViT of 17 tokens."""
    return tiny_model("vit", image_size=8, patch_size=2, num_hidden_layers=3, **settings)


def images(rows: int = 3) -> list[dict[str, Tensor]]:
    return [{"pixel_values": drawn(rows, 3, 8, 8, seed=seed).float()} for seed in range(2)]


def merging(**settings: Any) -> MergeTokens:
    return MergeTokens(**{"schedule": (4, 3), **settings})


@torch.no_grad()
def test_a_model_is_the_one_written_out() -> None:
    model, plain, batch = vit(), vit(), images()[0]
    apply(model, merging(), progress=False)
    x = plain.vit.embeddings(batch["pixel_values"])
    size = torch.ones_like(x[..., :1])
    for layer, r in zip(plain.vit.layers, (4, 3, 0), strict=True):
        attention, normed = layer.attention, layer.layernorm_before(x)
        q, k, v = (getattr(attention, f"{name}_proj")(normed).unflatten(-1, (4, -1)).transpose(1, 2) for name in "qkv")
        weights = (q @ k.mT / 2 + size.log().mT[:, None]).softmax(-1)
        x = x + attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
        x, size = merge_tokens(x, size, bipartite_match(k.mean(1), r))
        x = x + layer.mlp(layer.layernorm_after(x))
    expected = plain.classifier(plain.vit.layernorm(x)[:, 0])
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    hidden = model(**batch, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in hidden][:3] == [17, 13, 10]


@torch.no_grad()
def test_pyra_begins_as_plain_merging() -> None:
    one, other, batch = vit(), vit(), images()[0]
    apply(one, merging(), progress=False)
    apply(other, merging(pyra=True), progress=False)
    assert torch.equal(one(**batch).logits, other(**batch).logits)
    modulators = [layer.modulator for layer in other.vit.layers]
    assert [each is not None for each in modulators] == [True, True, False]
    assert sum(p.numel() for each in modulators[:2] for p in each.parameters()) == 4 + 3 + 2 * 3 * D


def test_transforms_keep_what_they_promise() -> None:
    check_transform(merging(pyra=True), vit(), images(), compile_backend="aot_eager", export=True)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_deit_keeps_its_two_tokens(implementation: str) -> None:
    model, batch = tiny_model("deit", image_size=8, patch_size=2), images()[0]
    model.set_attn_implementation(implementation)
    apply(model, merging(pyra=True), progress=False)
    sources = token_sources(model, batch)
    assert sources.shape == (3, 18 - 7, 18)
    assert torch.equal(sources[:, :2], torch.eye(18)[:2].expand(3, -1, -1))
    assert all(type(layer).__name__ == "MergingDeiTLayer" for layer in model.deit.layers)
    assert [state.shape[1] for state in model(**batch, output_hidden_states=True).hidden_states][:2] == [18, 14]


def test_sites_leave_the_sizes_out() -> None:
    model = vit()
    apply(model, merging(), progress=False)
    seen = record(model, {"block.input": Moments(), "block.output": Moments()}, images(), progress=False)
    assert len(seen) == 6 and all(len(found.mean) == D for found in seen.values())
    keys = record(model, {"attention.key": Moments()}, images(), progress=False)
    assert [found.count for found in keys.values()] == [6 * tokens for tokens in (17, 13, 10)]  # each token once


@torch.no_grad()
def test_what_is_put_into_the_stream_leaves_the_sizes_as_they_are() -> None:
    model, batch = vit(), images()[0]
    apply(model, merging(), progress=False)
    before = model(**batch).logits
    for site in ("block.input", "block.middle", "block.output"):
        with intervene(model, {f"blocks.1.{site}": Scale(1.0)}):
            torch.testing.assert_close(model(**batch).logits, before)
        with intervene(model, {f"blocks.1.{site}": Scale(0.5)}):
            assert not torch.allclose(model(**batch).logits, before)


@torch.no_grad()
def test_where_tokens_went() -> None:
    model, batch = vit(), images()[0]
    apply(model, merging(), progress=False)
    sources = token_sources(model, batch)
    assert sources.shape == (3, 10, 17) and torch.equal(sources.sum(1), torch.ones(3, 17))
    assert torch.equal(sources[:, 0], torch.eye(17)[0].expand(3, -1))  # the class token is itself
    sizes = []
    hook = model.vit.layers[2].register_forward_pre_hook(lambda layer, args: sizes.append(args[0][..., -1]))
    model(**batch)
    hook.remove()
    torch.testing.assert_close(sizes[0], sources.sum(-1))
    tokens = drawn(3, 10, D).float()
    whole = unmerge(tokens, sources)
    assert whole.shape == (3, 17, D)
    for row, patch in ((0, 3), (2, 16)):
        torch.testing.assert_close(whole[row, patch], tokens[row, int(sources[row, :, patch].argmax())])


def test_an_image_of_another_size_merges_what_it_can() -> None:
    model = vit()
    apply(model, merging(schedule=(8, 4), pyra=True), progress=False)
    small = {"pixel_values": drawn(2, 3, 4, 4).float(), "interpolate_pos_encoding": True}  # 5 tokens
    assert token_sources(model, small).shape == (2, 2, 5)


def test_it_stacks_on_folded_and_under_rounded_blocks(tmp_path: Path) -> None:
    model, batches = vit(), images()
    apply(model, Repavit(idle=0.5), progress=False)
    apply(model, Reparameterize(), progress=False)
    apply(model, [merging(pyra=True), RoundToNearest(bits=8, group_size=-1)], batches, progress=False)
    assert type(model.vit.layers[0].attention.k_proj).__name__ == "ActLinear"
    save(model, tmp_path / "fast")
    assert torch.equal(load(tmp_path / "fast")(**batches[0]).logits, model(**batches[0]).logits)


def test_rounded_blocks_merge_too(tmp_path: Path) -> None:
    model, batches = vit(), images()
    apply(model, RoundToNearest(bits=8, group_size=-1), batches, progress=False)
    before = model(**batches[0]).logits
    applied = apply(model, merging(), progress=False)
    merged = model(**batches[0]).logits
    save(model, tmp_path / "fast")
    assert torch.equal(load(tmp_path / "fast")(**batches[0]).logits, merged)
    assert not torch.allclose(merged, before)
    applied.undo()
    assert torch.equal(model(**batches[0]).logits, before)


def labelled(seed: int, rows: int = 4) -> list[dict[str, Tensor]]:
    return [{"pixel_values": drawn(rows, 3, 8, 8, seed=seed).float(), "labels": torch.arange(rows) % 4}]


def adapted(model: Any, **settings: Any) -> Any:
    defaults = {"adapter": "pyra:rank=2", "steps": 6, "learning_rate": 1e-2}
    return actkit.train(model, labelled(1), validation=labelled(2), **{**defaults, **settings})


def test_training_changes_vectors_layers_and_head_alone() -> None:
    model = vit(num_labels=4)
    apply(model, merging(pyra=True), progress=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = adapted(model, merge=True)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    layers = {f"vit.layers.{i}.attention.{n}_proj.weight" for i in range(3) for n in "qkv"}
    vectors = {name for name in before if ".modulator." in name}
    head = {"classifier.weight", "classifier.bias"}
    assert layers | head <= changed <= layers | vectors | head
    assert {name.split(".")[-1] for name in changed & vectors} >= {"by_token", "by_channel"}
    assert trained.trainable == 9 * 2 * 2 * D + 4 * (D + 1) + sum(before[name].numel() for name in vectors)
    assert all(type(module).__module__.split(".")[0] != "peft" for module in model.modules())


def test_the_adapter_alone_is_a_folder_over_the_merging_model(tmp_path: Path) -> None:
    model = vit(num_labels=4)
    apply(model, merging(pyra=True), progress=False)
    save(model, tmp_path / "base")
    other = load(tmp_path / "base")
    adapted(model, merge=True)
    adapted(str(tmp_path / "base"), out=tmp_path / "adapter")
    again = actkit.load(tmp_path / "adapter")
    batch = {"pixel_values": labelled(3)[0]["pixel_values"]}
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(again(**batch).logits, other(**batch).logits)


@pytest.mark.parametrize(
    ("make", "settings", "text"),
    [
        (lambda: tiny_model("bert"), {}, "is made of BertLayer"),
        (lambda: tiny_model("llama"), {}, "is made of LlamaDecoderLayer.*no causal mask"),
        (lambda: apply(vit(), AddPrompts(), progress=False).model, {}, "has a PromptedBlock around its blocks"),
        (vit, {"schedule": (1, 1, 1, 1)}, "4 numbers were given for 3 blocks"),
        (vit, {"schedule": (9,)}, "at most 8"),
        (vit, {"schedule": "high"}, "published for 12 and 24 blocks"),
    ],
)
def test_what_cannot_merge_is_refused(make: Any, settings: Any, text: str) -> None:
    with pytest.raises(EditError, match=text):
        apply(make(), merging(**settings), progress=False)


def test_another_attention_is_refused() -> None:
    model = vit()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(EditError, match="attends by 'flex_attention'"):
        apply(model, merging(), progress=False)


def test_a_model_merges_once_and_takes_no_prompts_after() -> None:
    model = vit()
    with pytest.raises(DataError, match="merges no tokens"):
        token_sources(model, images()[0])
    apply(model, merging(), progress=False)
    with pytest.raises(RecipeError, match="applied already"):
        apply(model, merging(), progress=False)
    for transform in (AddPrompts(), AddSidePath()):
        with pytest.raises(EditError, match="its tokens are merged"):
            apply(model, transform, progress=False)
    with pytest.raises(ValueError, match="give numbers of at least 0"):
        MergeTokens(schedule=(-1,))
    with pytest.raises(ValueError, match="no mask fits"):
        model.vit.layers[0](drawn(1, 17, D).float(), torch.zeros(1, 1, 17, 17))


def test_blocks_in_front_of_the_first_that_merges_stay() -> None:
    model = vit()
    report = apply(model, merging(schedule=(0, 3)), progress=False).report
    assert [isinstance(layer, MergingLayer) for layer in model.vit.layers] == [False, True, True]
    assert any("no token goes in it" in str(each) for each in report.skipped)
