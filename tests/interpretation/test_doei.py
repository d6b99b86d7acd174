"""Class tokens, their maps and the edits: models, maps, edits and seeds against loops written from the formulas."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

import actkit
from actkit import zoo
from actkit.core.model.anatomy import anatomy
from actkit.core.train.training import train
from actkit.data import digits
from actkit.data.digit_scenes import digit_scenes
from actkit.interpretation.doei.class_activation_maps import class_activation_maps
from actkit.interpretation.doei.class_token_vit import ClassTokenViTConfig, ClassTokenViTForImageClassification
from actkit.interpretation.doei.doei import DOEI, Edited, affinity, confidence, neighbours, shared_direction
from actkit.interpretation.doei.maps import (
    attention_of,
    attention_rollout,
    class_token_maps,
    grad_cam,
    grad_cam_pp,
    layer_cam,
)
from actkit.interpretation.doei.seeds import cam_miou, miou_at_best_threshold
from actkit.interpretation.doei.tokens import Tokens
from actkit.testing import check_rule, tiny_model

CLASSES, GRID = 3, (4, 4)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)  # transformers' softmax is in float32
SHOWN = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]])


def made(seed=0, **changes) -> ClassTokenViTForImageClassification:
    """Four blocks over 4 x 4 patches, weights drawn so that all of them matter."""
    torch.manual_seed(seed)
    settings = {
        "image_size": 8,
        "patch_size": 2,
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_labels": CLASSES,
        "attn_implementation": "eager",
    }
    model = ClassTokenViTForImageClassification(ClassTokenViTConfig(**{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def images(count=4, seed=1, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()


def norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def through(model, x, edits=None):
    """Tokens behind each block, and attention, as a pre-norm transformer computes them by hand."""
    embeddings, heads = model.vit.embeddings, model.config.num_attention_heads
    kernel = embeddings.patch_embeddings.projection
    patches = nn.functional.unfold(x, 2, stride=2).mT @ kernel.weight.flatten(1).T + kernel.bias
    tokens = torch.cat((embeddings.class_tokens.expand(len(x), -1, -1), patches), 1) + embeddings.position_embeddings
    behind, seen = [], []
    for index, block in enumerate(model.vit.layers):
        y, part = norm(tokens, block.layernorm_before), block.attention
        query, key, value = (
            layer(y).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (part.q_proj, part.k_proj, part.v_proj)
        )
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        tokens = tokens + part.o_proj((weights @ value).transpose(1, 2).flatten(2))
        y = norm(tokens, block.layernorm_after)
        tokens = tokens + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(y)))
        seen.append(weights.mean(1))
        tokens = tokens if edits is None else edits(index, tokens, seen[-1])
        behind.append(tokens)
    return behind, seen


# -- the model ---------------------------------------------------------------------------------------------------------


def test_the_model_is_its_formula():
    model, x = made(), images()
    tokens = through(model, x)[0][-1]
    maps = nn.functional.conv2d(
        tokens[:, CLASSES:].mT.reshape(4, 12, *GRID), model.map_head.weight, model.map_head.bias, padding=1
    )
    patch_logits = torch.zeros(4, CLASSES).double()
    for row, each in product(range(4), range(CLASSES)):
        values = sorted(maps[row, each].flatten().tolist(), reverse=True)
        weights = [0.996**rank for rank in range(len(values))]
        patch_logits[row, each] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    class_logits = tokens[:, :CLASSES].mean(-1)
    found = model(pixel_values=x, labels=SHOWN)
    for name, wanted in (("maps", maps), ("class_logits", class_logits), ("patch_logits", patch_logits)):
        close(getattr(found, name), wanted)
    close(found.logits, (class_logits + patch_logits) / 2)
    soft = nn.functional.multilabel_soft_margin_loss
    close(found.loss, soft(class_logits, SHOWN) + soft(patch_logits, SHOWN))
    one = torch.tensor([0, 1, 2, 0])
    assert model(x, labels=one).loss == model(x, labels=nn.functional.one_hot(one, CLASSES)).loss


def test_it_has_the_sites_of_a_vision_transformer():
    view = anatomy(made())
    assert view.architecture == "vit" and len(view.blocks) == 4 and view.blocks[0].attention.heads == 3
    assert view.stem == ("vit.embeddings",) and view.head == ("vit.layernorm", "map_head")


def test_it_is_saved_and_loaded(tmp_path):
    model, x = made().float(), images().float()
    actkit.save(model, tmp_path / "saved")
    again = actkit.load(tmp_path / "saved")
    assert type(again).__name__.endswith("ClassTokenViTForImageClassification")
    close(again(x).logits, model(x).logits)


# -- the edits ---------------------------------------------------------------------------------------------------------


def test_what_belongs_together_is_the_mean_of_three_views():
    draw = torch.Generator().manual_seed(0)
    colours = torch.rand(2, 3, 3, 4, generator=draw).double()
    tokens = torch.randn(2, 12, 5, generator=draw).double()
    attention = torch.rand(2, 12, 12, generator=draw).double()
    found = affinity(colours, tokens, attention, (2.0, 1.0, 1.0), None)
    close(found.sum(-1), torch.ones(2, 12).double())
    places = list(product(range(3), range(4)))
    for row in range(2):
        flat = [colours[row, :, y, x] for y, x in places]
        mean = sum(flat) / 12
        variance = sum(float((each - mean).square().sum()) for each in flat) / 12
        views = torch.zeros(3, 12, 12).double()
        for (i, (y, x)), (j, (v, u)) in product(enumerate(places), enumerate(places)):
            near = any(abs(y - v) in (0, step) and abs(x - u) in (0, step) for step in (1, 2, 4))
            views[0, i, j] = near * math.exp(-float((flat[i] - flat[j]).square().sum()) / (2 * variance))
            cosine = float(tokens[row, i] @ tokens[row, j] / tokens[row, i].norm() / tokens[row, j].norm())
            views[1, i, j] = max(0.0, cosine)
            views[2, i, j] = (attention[row, i, j] + attention[row, j, i]) / 2
        views = views / views.sum(-1, keepdim=True)
        close(found[row], 0.5 * views[0] + 0.25 * views[1] + 0.25 * views[2])
    assert int(neighbours(3, 4)[0].sum()) == 7  # itself, three at one step, three at two


def test_one_colour_and_tokens_of_zero_give_no_nan():
    found = affinity(torch.ones(1, 3, 2, 2), torch.zeros(1, 4, 5), torch.full((1, 4, 4), 0.25), (1, 1, 1), None)
    close(found.sum(-1), torch.ones(1, 4))
    assert (confidence(torch.full((1, 2, 4), 0.1), found, 1) == 0).all()


def by_hand(rule: DOEI, x, labels, blocks):
    """The edits of one block, class by class and patch by patch."""

    def edits(index, tokens, attention):
        if index not in blocks:
            return tokens
        share = (blocks.index(index) + 1) / len(blocks)
        colours = nn.functional.avg_pool2d(x, 2)
        spread = affinity(colours, tokens[:, CLASSES:], attention[:, CLASSES:, CLASSES:], rule.hfa_weights, None)
        rows = []
        for row in range(len(x)):
            classes, patches = tokens[row, :CLASSES].clone(), tokens[row, CLASSES:].clone()
            shown = [each for each in range(CLASSES) if labels[row, each]]
            sure = attention[row, :CLASSES, CLASSES:] @ spread[row].T
            sure = torch.stack([(each - each.min()) / (each.max() - each.min()) for each in sure])

            def gain(value, mean):
                if rule.mode == "hard":
                    return 1.0 if value > rule.tau[1] else -1.0 if value < rule.tau[0] else 0.0
                return math.tanh((value - mean) / rule.temperature)

            if shown and rule.ppdo:
                best = [max(float(sure[c, i].detach()) for c in shown) for i in range(16)]
                mean, before = sum(best) / 16, patches.norm(dim=-1).mean()
                for i in range(16):
                    patches[i] *= 1 + share * rule.amplify * gain(best[i], mean)
                patches *= before / patches.norm(dim=-1).mean()
            if shown and rule.cpdo:
                certain = {c: float(sure[c].sort(descending=True).values[:2].mean()) for c in shown}
                mean = sum(certain.values()) / len(shown)
                old = tokens[row, :CLASSES]
                for c in shown:
                    classes[c] = old[c] * (1 + share * rule.amplify * gain(certain[c], mean))
                    for d in shown:
                        if c != d:
                            cosine = max(0.0, float(old[c] @ old[d] / old[c].norm() / old[d].norm()))
                            classes[c] -= share * rule.decouple * cosine * old[d] / old[d].norm() * old[c].norm()
            rows.append(torch.cat((classes, patches)))
        return torch.stack(rows)

    return edits


@pytest.mark.parametrize(
    ("rule", "blocks"),
    [
        (DOEI(amplify=0.5, decouple=0.5), [3]),
        (DOEI(amplify=0.5, layers="all", cpdo=False), [0, 1, 2, 3]),
        (DOEI(amplify=0.5, decouple=0.5, layers=(2, 1), ppdo=False), [1, 2]),
        (DOEI(amplify=0.5, mode="hard", layers=(0, 3), hfa_weights=(0, 1, 0)), [0, 3]),
    ],
)
def test_edits_are_their_formula(rule, blocks):
    model, x = made(), images()
    with torch.no_grad(), rule.on(model) as edited:
        found = model(x, labels=SHOWN)
    behind, _ = through(model, x, by_hand(rule, x, SHOWN, blocks))
    close(found.class_logits, behind[-1][:, :CLASSES].mean(-1))
    plain = model(x).logits
    assert not torch.allclose(found.logits[:3], plain[:3], atol=1e-3)
    assert torch.equal(found.logits[3], plain[3])  # it shows nothing
    assert (edited.images, edited.left_alone) == (4 * len(blocks), len(blocks))


def test_no_amplification_and_no_context_change_no_bit():
    model, x = made().float(), images().float()
    plain = model(x).logits
    with DOEI(amplify=0).on(model):
        assert torch.equal(model(x).logits, plain)
    with DOEI().on(model) as edited:
        assert not torch.equal(model(x, labels=SHOWN).logits, plain)
        edited.active = False
        assert torch.equal(model(x, labels=SHOWN).logits, plain)
    assert torch.equal(model(x).logits, plain)


def test_edits_follow_the_order_of_a_batch_and_find_classes_themselves():
    model, x = made(), images()
    order = torch.tensor([2, 0, 3, 1])
    with DOEI(layers="all").on(model) as edited:
        close(model(x[order], labels=SHOWN[order]).logits, model(x, labels=SHOWN).logits[order])
        edited.images = edited.left_alone = 0
        alone = model(x).logits
    predicted = torch.stack([each[:, :CLASSES].mean(-1) > 0 for each in through(model, x)[0]])
    assert edited.left_alone >= int((~predicted[0].any(-1)).sum()) and not torch.equal(alone, model(x).logits)


def test_what_is_sure_is_not_differentiated_through():
    """The gradient of an edited patch is the factor, as if attention and colours were numbers."""
    model, x = made(num_hidden_layers=1), images()
    value = through(model, x)[0][-1].detach().requires_grad_(True)
    rule, attention = DOEI(cpdo=False), through(model, x)[1][-1]
    out = rule._edited(value, attention[:, None], x, SHOWN, Tokens(model), 1.0, Edited())
    out.sum().backward()
    close(value.grad, (out / value).detach())
    before, after = (each[:, CLASSES:].norm(dim=-1).mean(-1) for each in (value, out))
    close(before, after)


def test_a_shared_direction_goes_and_an_absent_class_stays():
    classes = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]])
    found = shared_direction(classes, torch.tensor([[True, True, False]]))
    close(found, torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]]))


def test_a_plain_vision_transformer_is_edited_by_its_one_class_token():
    model = tiny_model("vit", attn_implementation="eager", num_hidden_layers=3)
    x = images(2).float()
    with DOEI(layers=(1,)).on(model) as edited:
        assert not torch.equal(model(x).logits, model(x * 0.999).logits)
    assert edited.left_alone == 0 and edited.images == 4


def test_what_the_mlp_reads_can_be_edited_in_its_place():
    model, x = made(), images()
    with DOEI(site="mlp.input").on(model):
        inside = model(x, labels=SHOWN).logits
    assert not torch.allclose(inside[:3], model(x).logits[:3])


def test_a_training_begins_without_edits():
    model = made().float()
    batches = [{"pixel_values": images(seed=seed).float(), "labels": SHOWN} for seed in range(4)]
    plain, edited = made().float(), made().float()
    settings = {"validation": batches[:1], "steps": 4, "learning_rate": 1e-2, "progress": False, "keep": "last"}
    train(plain, batches, **settings)
    train(model, batches, rules=[DOEI(begin=0.99)], **settings)  # every step begins before that share
    trained = train(edited, batches, rules=[DOEI(begin=0.5, layers="all")], evaluate_every=1, **settings)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert not torch.equal(edited.map_head.weight, plain.map_head.weight)
    told = [step.reports["0.DOEI"] for step in trained.history if step.reports]
    assert told[0]["images"] == 0 and told[-1]["images"] > 0


def test_the_rule_is_a_rule():
    batches = [{"pixel_values": images(seed=seed).float(), "labels": SHOWN} for seed in range(4)]
    check_rule(DOEI(begin=0.0, layers="all"), made().float(), batches)


# -- maps --------------------------------------------------------------------------------------------------------------


def by_definition(values, slopes):
    """Three maps, place by place, of values and gradients [channels, rows, columns]."""
    channels, rows, columns = values.shape
    grad, plus, layer = (torch.zeros(rows, columns).double() for _ in range(3))
    for k in range(channels):
        mean = float(slopes[k].mean())
        weight = 0.0
        for y, x in product(range(rows), range(columns)):
            g = float(slopes[k, y, x])
            below = 2 * g * g + float(values[k].sum()) * g**3
            weight += (g * g / below if below else 0.0) * max(0.0, g)
        for y, x in product(range(rows), range(columns)):
            a, g = float(values[k, y, x]), float(slopes[k, y, x])
            grad[y, x] += mean * a
            plus[y, x] += weight * a
            layer[y, x] += max(0.0, g) * a
    return [each.relu() for each in (grad, plus, layer)]


def test_maps_of_a_convolution_are_their_formulas():
    model = zoo.load("cnn").double()
    x = digits("test")[0][:2].double()
    last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    kept = []
    handle = last.register_forward_hook(lambda module, args, output: kept.append(output) or output)
    logits = model(x)
    handle.remove()
    classes = torch.tensor([[0, 3], [1, 7]])
    found = [method(model, x, classes) for method in (grad_cam, grad_cam_pp, layer_cam)]
    for row, at in product(range(2), range(2)):
        (slopes,) = torch.autograd.grad(logits[row, classes[row, at]], kept[0], retain_graph=True)
        wanted = by_definition(kept[0][row].detach(), slopes[row])
        for have, want in zip(found, wanted, strict=True):
            close(have[row, at], want, rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_maps_of_a_vision_transformer_are_of_its_patches():
    """LayerCAM at one patch, its gradient by finite differences in each feature."""
    model, x, place, step = made(), images(2), 5, 1e-5
    found = layer_cam(model, x, torch.tensor([[1], [2]]), site="blocks.2.block.output")
    tokens = through(model, x)[0][2].detach()
    assert found.shape == (2, 1, *GRID)

    def logit(feature, change):
        def moved(index, tokens, attention):
            if index == 2:
                tokens = tokens.clone()
                tokens[0, CLASSES + place, feature] += change
            return tokens

        behind = through(model, x, moved)[0][-1]
        maps = model.map_head(behind[:, CLASSES:].mT.unflatten(2, GRID)).flatten(2).sort(-1, descending=True).values
        weights = 0.996 ** torch.arange(16).double()
        return float((behind[:, :CLASSES].mean(-1) + maps @ weights / weights.sum())[0, 1].detach() / 2)

    slopes = [(logit(at, step) - logit(at, -step)) / (2 * step) for at in range(12)]
    wanted = sum(max(0.0, slope) * float(tokens[0, CLASSES + place, at]) for at, slope in enumerate(slopes))
    assert float(found[0, 0].flatten()[place]) == pytest.approx(max(0.0, wanted), rel=1e-3, abs=1e-6)
    assert len(set(found[0].flatten().tolist())) > 2


def test_rollout_is_a_product_of_matrices():
    model, x = made(), images(2)
    seen = through(model, x)[1]
    found = attention_rollout(model, x)
    for row in range(2):
        total = torch.eye(CLASSES + 16).double()
        for attention in seen:
            total = (0.5 * attention[row] + 0.5 * torch.eye(CLASSES + 16).double()) @ total
        close(found[row].flatten(1), total[:CLASSES, CLASSES:])


@pytest.mark.parametrize("fuse", ["sqrt", "product", "attention", "patches"])
@pytest.mark.parametrize("refine", [True, False])
def test_maps_of_class_tokens_are_their_formula(fuse, refine):
    model, x = made(), images()
    model.set_attn_implementation("sdpa")  # weights are formed for the time of the call
    found = class_token_maps(model, x, SHOWN, fuse=fuse, refine=refine, layers=3, enlarge=False)
    seen, maps = through(model, x)[1], model(x).maps
    assert model.config._attn_implementation == "sdpa"
    for row, each in product(range(4), range(CLASSES)):
        if not SHOWN[row, each]:
            assert (found[row, each] == 0).all()
            continue
        values = []
        for place in range(16):
            attention = sum(float(seen[block][row, each, CLASSES + place]) for block in (1, 2, 3)) / 3
            patch = max(0.0, float(maps[row, each].flatten()[place]))
            values.append(
                {
                    "sqrt": math.sqrt(attention * patch),
                    "product": attention * patch,
                    "attention": attention,
                    "patches": patch,
                }[fuse]
            )
        if refine:
            mean = sum(block[row, CLASSES:, CLASSES:] for block in seen) / 4
            values = [sum(float(mean[i, j]) * values[j] for j in range(16)) for i in range(16)]
        low, high = min(values), max(values)
        wanted = torch.tensor([(value - low) / (high - low) if high > low else 0.0 for value in values]).double()
        close(found[row, each].flatten(), wanted)
    assert class_token_maps(model, x).shape == (4, CLASSES, 8, 8)


def test_attention_is_that_of_the_edits():
    model, x = made(), images()
    rule = DOEI(layers=(0,), amplify=0.5)
    with rule.on(model):
        attention, _ = attention_of(model, x, SHOWN)
    close(attention[1], through(model, x, by_hand(rule, x, SHOWN, [0]))[1][1], rtol=1e-6, atol=1e-6)


def test_the_analysis_maps_the_surest_classes():
    model, x = made(), images()
    found = class_activation_maps(model, [x[:2], x[2:]], method="class_tokens", classes=2, images=3, progress=False)
    assert [each.image for each in found.maps] == [0, 0, 1, 1, 2, 2]
    order = model(x).logits.argsort(-1, descending=True)
    assert [each.class_index for each in found.maps] == order[:3, :2].flatten().tolist()
    assert all(max(max(row) for row in each.values) in (0.0, 1.0) for each in found.maps)
    assert "Image 2, class" in found.page().html()


# -- seeds and scenes --------------------------------------------------------------------------------------------------


def test_seeds_are_counted_pixel_by_pixel():
    draw = torch.Generator().manual_seed(0)
    cams, masks = torch.rand(3, 4, 5, 6, generator=draw), torch.randint(0, 4, (3, 5, 6), generator=draw)  # not class 3
    found, both, either = {}, [0] * 5, [0] * 5
    for threshold in (0.3, 0.9):
        both, either = [0] * 5, [0] * 5
        for image, y, x in product(range(3), range(5), range(6)):
            values = cams[image, :, y, x].tolist()
            guess = values.index(max(values)) + 1 if max(values) > threshold else 0
            true = int(masks[image, y, x])
            both[true] += guess == true
            for each in {guess, true}:
                either[each] += 1
        found[threshold] = sum(b / e for b, e in zip(both, either, strict=True) if e) / sum(e > 0 for e in either)
        assert cam_miou(cams, masks, threshold) == pytest.approx(found[threshold])
    best = max(found, key=found.get)
    assert miou_at_best_threshold(cams, masks, (0.3, 0.9)) == (best, pytest.approx(found[best]))
    perfect = torch.nn.functional.one_hot(masks, 5)[..., 1:].movedim(-1, 1).float()
    assert miou_at_best_threshold(perfect, masks)[1] == 1


def test_scenes_show_what_their_masks_say():
    scenes = digit_scenes(40, seed=3)
    again = digit_scenes(40, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(scenes, again, strict=True))
    assert not torch.equal(scenes.pixel_values, digit_scenes(40, seed=4).pixel_values)
    assert (
        scenes.pixel_values.shape == (40, 3, 56, 56)
        and 0 <= scenes.pixel_values.min() <= scenes.pixel_values.max() <= 1
    )
    for labels, mask in zip(scenes.labels, scenes.masks, strict=True):
        assert set((mask.unique() - 1).tolist()) - {-1} == set(labels.nonzero().flatten().tolist())
    assert set(scenes.labels.sum(1).int().tolist()) <= {2, 3}
