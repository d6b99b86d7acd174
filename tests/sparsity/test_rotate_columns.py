"""The rotation changes no output and makes the chosen columns orthogonal: checked in float32 and in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from actkit.core.ground.errors import CoverageError, RecipeError
from actkit.core.ground.modules import tied_names
from actkit.core.layers.linear import ActLinear
from actkit.core.recipe.runner import apply
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.wina.rotate_columns import RotateColumns, RotatedNorm
from actkit.sparsity.wina.wina import Wina
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.transforms import outputs

# per family: the anchors (matrices made orthogonal) of its first block, and their norms
FAMILIES: dict[str, dict[str, str]] = {
    "llama": {"self_attn.k_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"},
    "gemma": {"self_attn.k_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"},
    "gpt2": {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"},
    "vit": {"attention.k_proj": "layernorm_before", "mlp.fc1": "layernorm_after"},
    "mixtral": {"self_attn.k_proj": "input_layernorm"},
}
BLOCKS = {"gpt2": "transformer.h.0", "vit": "vit.layers.0"}


def block(model: Any, kind: str) -> Any:
    return model.get_submodule(BLOCKS.get(kind, "model.layers.0"))


def doubled(kind: str) -> list[Any]:
    return [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in tiny_batches(kind)]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_outputs_stay_and_columns_become_orthogonal(kind: str) -> None:
    # Gemma's norm computes in float32 whatever the model's dtype, gain included
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-6 if kind == "gemma" else 1e-9)):
        batches = doubled(kind) if dtype == torch.float64 else tiny_batches(kind)
        model = tiny_model(kind).to(dtype)
        if kind == "mixtral":
            model.set_experts_implementation("eager")  # the other one has no float64
        before = outputs(model, batches)
        apply(model, RotateColumns(), batches, min_coverage=0.05, progress=False)
        assert difference(outputs(model, batches), before) < bound
        for path, norm in FAMILIES[kind].items():
            layer = block(model, kind).get_submodule(path)
            assert isinstance(layer, ActLinear)
            assert isinstance(block(model, kind).get_submodule(norm), RotatedNorm)
            gram = layer.dequantized().double().T @ layer.dequantized().double()
            off = gram - torch.diag(gram.diagonal())
            assert float(off.abs().max() / gram.abs().max()) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_inputs_are_those_of_the_rotated_stream() -> None:
    """The paper's form: x without gain, times Q from the SVD of W diag(gain); so the masks are the paper's too."""
    original, model = tiny_model("llama").double(), tiny_model("llama").double()
    apply(model, RotateColumns(), doubled("llama"), progress=False)
    norm, key = original.model.layers[0].input_layernorm, original.model.layers[0].self_attn.k_proj
    x = torch.randn(7, 16, dtype=torch.float64)
    _, _, vh = torch.linalg.svd(key.weight.detach() * norm.weight.detach(), full_matrices=True)
    stream = x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    found = model.model.layers[0].input_layernorm(x)
    torch.testing.assert_close(found.abs(), (stream @ vh.T).abs(), rtol=1e-6, atol=1e-6)  # the norm works in float32


def test_grouped_queries_leave_only_the_key_heads_columns() -> None:
    model = tiny_model("llama")
    apply(model, RotateColumns(), tiny_batches("llama"), progress=False)
    norms = model.model.layers[0].self_attn.k_proj.dequantized().norm(dim=0)  # 8 rows, 16 columns
    assert (norms[:8] > 0.1).all() and (norms[8:] < 1e-5).all()


def test_ties_stay_and_everything_else_does_too() -> None:
    model = tiny_model("llama")
    before, embedding = tied_names(model), model.get_input_embeddings().weight.detach().clone()
    applied = apply(model, RotateColumns(), tiny_batches("llama"), progress=False)
    assert tied_names(model) == before and before
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    changed = {path.rpartition(".")[2] for path, _ in applied.report.changed}
    assert changed == {"input_layernorm", "post_attention_layernorm", "weight", "q_proj", "k_proj", "v_proj",
                       "gate_proj", "up_proj"}  # fmt: skip


def test_post_norm_is_refused() -> None:
    with pytest.raises(CoverageError, match="RotateColumns would touch 0%"):
        apply(tiny_model("bert"), RotateColumns(), progress=False)
    model = tiny_model("bert")
    applied = apply(model, RotateColumns(), min_coverage=0.0, progress=False)
    assert not applied.edits
    assert {reason.partition(":")[0] for _, _, reason in applied.report.skipped} == {
        "post-norm",
        "no norm of the block produces what these layers read",
    }


def test_experts_keep_the_norm_that_their_router_reads() -> None:
    applied = apply(tiny_model("mixtral"), RotateColumns(), min_coverage=0.05, progress=False)
    assert [reason for _, _, reason in applied.report.skipped] == ["the router reads the norm's output too"] * 2


def test_it_goes_first() -> None:
    batches = tiny_batches("llama")
    for earlier in (Wina(), RoundToNearest(group_size=8)):
        with pytest.raises(RecipeError, match="rotate first"):
            apply(tiny_model("llama"), [earlier, RotateColumns()], batches, progress=False)
    reference = outputs(tiny_model("llama"), batches)
    found = []
    for first in ([], [RotateColumns()]):
        model = tiny_model("llama")
        apply(model, [*first, Awq(bits=8, group_size=8, n_grid=4)], batches, progress=False)
        errors = [(a - b).norm() / b.norm() for a, b in zip(outputs(model, batches), reference, strict=True)]
        found.append(float(torch.stack(errors).mean()))
    assert 0 < found[1] < 2 * found[0]  # 8 bits are as harmless after the rotation as before
    apply(model, Wina(), batches, progress=False)
    attention = model.model.layers[0].self_attn
    rotated = [attention.get_submodule(name).dequantized() for name in ("q_proj", "k_proj", "v_proj")]
    torch.testing.assert_close(attention.k_proj.select.score, torch.cat(rotated).norm(dim=0))
