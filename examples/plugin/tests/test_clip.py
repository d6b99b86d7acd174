"""Run with: pip install -e . && python -m pytest"""

import pytest
import torch
from actkit_clip import SQUAREPLUS, Clip, Clipped, ClippedClassifier, ClippedDecoder, LimitPenalty, headroom
from torch import nn

from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.functions.swap import swap
from actkit.testing import (
    check_analysis,
    check_function,
    check_layer,
    check_model,
    check_rule,
    check_runtime,
    check_transform,
    tiny_batches,
    tiny_model,
)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_it_keeps_what_every_transform_promises(kind):
    checks = check_transform(Clip(share=0.2), tiny_model(kind), tiny_batches(kind))
    held = {check.name for check in checks if check.outcome == "holds"}
    assert {"the identity setting changes nothing", "save and load", "undo is exact", "the dtype is kept"} <= held


def test_the_layer_keeps_what_every_layer_promises():
    checks = check_layer(
        lambda: Clipped(nn.GELU(), 0.4),
        [torch.randn(3, 5, 16)],
        original=nn.GELU,
        compile_backend="aot_eager",
        export=True,
    )
    assert {check.name for check in checks if check.outcome != "holds"} == {"its record is true"}  # it has none


def test_the_record_of_the_function_is_true():
    left = {check.name for check in check_function(SQUAREPLUS) if check.outcome != "holds"}
    assert left == {"what breaks is right"}  # nothing does


def test_the_function_is_known_by_its_name(tmp_path):
    model, batch = tiny_model("llama"), tiny_batches("llama")[0]
    swap(model, "silu", "squareplus")
    checkpoint.save(model, tmp_path / "swapped")
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "swapped")(**batch).logits, model(**batch).logits)


def test_the_analysis_keeps_what_every_analysis_promises():
    def analysis(model, batches):
        return headroom(model, batches, 0.1, progress=False)

    checks = check_analysis(analysis, tiny_model("mixtral"), tiny_batches("mixtral"))
    left = ["several processes find the same"]
    assert [check.name for check in checks if check.outcome != "holds"] == left


def test_the_rule_keeps_what_every_rule_promises():
    for rule in (LimitPenalty(weight=3.0, limit=0.1), LimitPenalty(weight=3.0, limit=0.1, only=["*mlp*", "*norm*"])):
        checks = check_rule(rule, tiny_model("llama"), tiny_batches("llama"))
        assert [check.name for check in checks if check.outcome != "holds"] == ["what it ends with is saved"]


def test_the_decoder_keeps_what_every_runtime_promises():
    model = tiny_model("llama")
    apply(model, Clip(share=0.2), tiny_batches("llama"), progress=False)
    checks = check_runtime(ClippedDecoder, model, range(1, 13), tolerance=1e-5)
    assert {check.outcome for check in checks} == {"holds"}


def test_the_model_keeps_what_every_model_promises():
    batches = [{"pixel_values": torch.randn(6, 16), "labels": torch.arange(6) % 4}]
    checks = check_model(ClippedClassifier, batches, compile_backend="aot_eager", export=True)
    left = {check.name for check in checks if check.outcome != "holds"}
    assert left == {"it is loaded in a fresh process"}


def test_it_clips():
    layer = Clipped(nn.Identity(), 1.5)
    assert layer(torch.tensor([-3.0, -1.0, 0.0, 1.5, 9.0])).tolist() == [-1.5, -1.0, 0.0, 1.5, 1.5]


def test_the_limit_is_the_quantile_of_what_the_function_gave():
    model, batches = tiny_model("vit"), tiny_batches("vit")
    mlp, seen = model.vit.layers[0].mlp, []
    handle = mlp.activation_fn.register_forward_hook(lambda module, args, output: seen.append(output.flatten().abs()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    apply(model, Clip(share=0.25), batches, progress=False)
    assert float(mlp.activation_fn.limit) == pytest.approx(float(torch.quantile(torch.cat(seen), 0.75)), rel=0.02)
