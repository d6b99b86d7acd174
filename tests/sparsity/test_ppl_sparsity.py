"""PPL-p% sparsity of whole models: the numbers of its result, against transformers' own loss."""

from __future__ import annotations

import json
import math

import pytest
import torch

from actkit.core.ground.errors import CoverageError, DataError, NonFiniteError
from actkit.core.layers.linear import ActLinear
from actkit.core.recipe.runner import apply
from actkit.sparsity.sparsing_law.perplexity_sparsity import PerplexitySparsity
from actkit.sparsity.sparsing_law.ppl_sparsity import ppl_sparsity
from actkit.testing import tiny_batches, tiny_model


@pytest.fixture(scope="module")
def batches():
    """Token batches whose labels are the tiny model's likeliest next tokens, so that dropping neurons hurts."""
    model, found = tiny_model("llama"), []
    for batch in tiny_batches("llama", lengths=((24, 24, 20), (24, 16))):
        with torch.no_grad():
            likely = model(**batch).logits.argmax(-1)
        labels = torch.cat([batch["input_ids"][:, :1], likely[:, :-1]], dim=1)
        found.append({**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)})
    return found


def nats(model, batches):
    total = count = 0
    for batch in batches:
        labels = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total, count = total + float(model(**batch).loss) * labels, count + labels
    return total / count


def test_the_result_is_what_its_thresholds_do(batches):
    model = tiny_model("llama")
    found = ppl_sparsity(model, batches, 5.0, held_out=batches[:1], progress=False)
    assert found.ppl_dense == pytest.approx(math.exp(nats(model, batches)), rel=1e-6)
    assert found.reached and 1 < found.ppl_ratio <= 1.05 + 1e-6 and found.bracket[0] == found.cett
    first = math.exp(nats(model, batches[:1]))
    apply(model, PerplexitySparsity(thresholds=found.thresholds), batches, min_coverage=0.0, progress=False)
    assert math.exp(nats(model, batches)) == pytest.approx(found.ppl_sparse, rel=1e-6)
    assert found.held_out is not None
    assert math.exp(found.held_out.rise) == pytest.approx(math.exp(nats(model, batches[:1])) / first, rel=1e-5)
    kept = total = 0
    for path, layer in model.named_modules():
        if isinstance(layer, ActLinear):
            masks = []
            layer.register_forward_pre_hook(lambda module, args, masks=masks: masks.append(module.select.mask(args[0])))
            for batch in batches:
                with torch.no_grad():
                    model(**batch)
            mask = torch.cat([m[b["attention_mask"].bool()] for m, b in zip(masks, batches, strict=True)])
            assert found.ratios[path] == pytest.approx(float(mask.float().mean()), rel=1e-6)
            low, middle, high = found.per_token[path]
            assert low <= middle <= high
            kept, total = kept + int(mask.sum()), total + mask.numel()
    assert found.activation_ratio == pytest.approx(kept / total) and found.sparsity == 1 - found.activation_ratio


def test_more_perplexity_buys_more_sparsity(batches):
    model = tiny_model("llama")
    found = [ppl_sparsity(model, batches, p, progress=False) for p in (2.0, 10.0, 50.0)]
    assert [each.reached for each in found] == [True] * 3
    assert found[0].sparsity <= found[1].sparsity <= found[2].sparsity
    assert found[0].sparsity < found[2].sparsity


def test_an_unreachable_target_is_flagged(batches):
    found = ppl_sparsity(tiny_model("llama"), batches, 1e5, progress=False)
    assert not found.reached and found.cett == 1 and found.activation_ratio < 0.05
    assert "not reached" in found.table().title


def test_any_callable_gives_the_loss():
    """A traced encoder's own loss; the ratio is exp of its rise."""
    model, batches = tiny_model("bert"), tiny_batches("bert")
    with torch.no_grad():
        targets = [model(**batch).logits for batch in batches]

    def loss(model, batch):
        index = next(i for i, each in enumerate(batches) if each is batch)
        return 10 * (model(**batch).logits - targets[index]).square().mean()

    found = ppl_sparsity(model, batches, 1.0, loss=loss, progress=False)
    assert found.reached and 1 < found.ppl_ratio <= 1.01 + 1e-6 and found.ppl_dense == 1
    with pytest.raises(DataError, match="is no language model"):
        ppl_sparsity(model, batches, progress=False)


def test_what_it_shows(batches):
    found = ppl_sparsity(tiny_model("llama"), batches, 5.0, method="grid", held_out=batches, progress=False)
    assert found.table().row_count == 2 and "held out" in found.table().title
    assert json.loads(json.dumps(found.to_dict()))["sparsity"] == found.sparsity
    pytest.importorskip("plotly")
    assert len(found.figure().data[0].x) == 2


def test_bad_input(batches):
    model = tiny_model("llama")
    for p in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="p: "):
            ppl_sparsity(model, batches, p, progress=False)
    with pytest.raises(DataError, match="batches: 0 were given"):
        ppl_sparsity(model, [], progress=False)
    with pytest.raises(CoverageError, match="no MLP was found in TinyMlp"):
        ppl_sparsity(tiny_model("mlp"), tiny_batches("mlp"), progress=False)
    with pytest.raises(NonFiniteError, match="loss: it is nan"):
        ppl_sparsity(model, batches, loss=lambda model, batch: model(**batch).loss * math.nan, progress=False)
