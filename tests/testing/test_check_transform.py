"""Every registered transform passes on every family, and each kind of broken one is caught by the right property."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import nn

from actkit.core.edit.edits import Edit, Replace
from actkit.core.ground import registry
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import DenseWeight
from actkit.core.measure.fresh import FreshProcess
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.functions.swap import Swap
from actkit.quantization.adadim.adadim import AdaDim
from actkit.quantization.awq import Awq
from actkit.quantization.gptq import Gptq
from actkit.quantization.round_floats import RoundFloats
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.teal import Teal
from actkit.sparsity.wina.rotate_columns import RotateColumns
from actkit.sparsity.wina.wina import Wina
from actkit.testing import Check, check_transform, tiny_batches, tiny_model
from actkit.testing.models import KINDS
from actkit.testing.transforms import CHECKS, State
from representative import product

AWQ, RTN = Awq(bits=3, group_size=8, n_grid=4), RoundToNearest(bits=4, group_size=8)
# registered name -> settings to check, each with what it must refuse to follow; the first one on every family
SETTINGS: dict[str, list[tuple[Transform, tuple[Transform, ...]]]] = {
    "teal": [(Teal(sparsity=0.5), (Wina(),)), (Teal(mode="top_k", allocation="greedy", step=0.5), ())],
    "wina": [(Wina(sparsity=0.5), (Teal(),)), (Wina(mode="top_k", norms="release"), ())],
    "rotate_columns": [(RotateColumns(), (Wina(), RTN))],
    "rtn": [(RTN, (AWQ,))],
    "round_floats": [(RoundFloats(), (AWQ, RTN)), (RoundFloats(format="fp4", group_size=8), ())],
    "awq": [(AWQ, (Wina(), RTN))],
    "gptq": [(Gptq(bits=3, group_size=8), (AWQ, RTN)), (Gptq(group_size=8, group_axis="output"), ())],
    "adadim": [(AdaDim(group_size=8), (AWQ, RTN)), (AdaDim(group_size=8, method="gptq"), ())],
    "swap": [(Swap(where="*", new="relu2"), ())],  # one swap may follow another
}


ELSEWHERE = {  # those that do not fit every kind of model, or say less of it, are checked beside their own tests
    "cats": "sparsity/test_cats.py",
    "cfsp": "compression/test_cfsp.py",
    "svd": "compression/test_svd.py",
    "collapse_attention": "compression/test_minimal.py",
    "strip_mlp": "compression/test_minimal.py",
    "repavit": "compression/test_repavit.py",
    "reparameterize": "compression/test_repavit.py",
    "side_path": "finetuning/test_s2a.py",
    "prompts": "finetuning/test_s2a.py",
    "merge_tokens": "finetuning/test_pyra.py",
    "flashsvd": "compression/test_flashsvd.py",
    "expert_bits": "sparsity/test_expert_bits.py",
    "fatrelu": "sparsity/test_fatrelu.py",
    "ppl_sparsity": "sparsity/test_sparsing_law.py",
    "r_sparse": "sparsity/test_r_sparse.py",
    "sparkify": "sparsity/test_spark.py",
    "top_k_mlp": "sparsity/test_lazy_neuron.py",
    "fake_quantize": "quantization/test_fake_quantize.py",
    "freeze": "quantization/test_fake_quantize.py",
    "llm_fp4": "quantization/test_llm_fp4.py",
    "ofq": "quantization/test_ofq.py",
    "aphq_vit": "quantization/test_aphq_vit.py",
    "af_kan": "functions/test_af_kan.py",
    "gr_kan": "functions/test_kat.py",
    "hqkan": "functions/test_qkan.py",
    "rbf": "functions/test_rbfnet.py",
    "reconstruct_mlp": "functions/test_reconstruct_mlp.py",
    "self_normalize": "functions/test_selu.py",
    "ungate": "functions/test_polycom.py",
    "lssa": "functions/test_softplus_attention.py",
    "replace_pooling": "functions/test_posets.py",
    "lssar": "functions/test_softplus_attention.py",
    "deepen": "functions/test_vanillanet.py",
    "collapse": "functions/test_vanillanet.py",
    "add_nonlinearity": "functions/test_pangu_pi.py",
    "noisyquant": "quantization/test_noisyquant.py",
    "omniquant": "quantization/test_omniquant.py",
    "outliertune": "quantization/test_outliertune.py",
    "lorc": "quantization/test_lorc.py",
    "agile_quant": "quantization/test_agile_quant.py",
    "quantize_cache": "quantization/test_quantize_cache.py",
    "rotate": "quantization/test_rotate.py",
    "roste": "quantization/test_roste.py",
    "round_inputs": "quantization/test_round_inputs.py",
    "smooth": "quantization/test_smooth.py",
    "zeroquant": "quantization/test_zeroquant.py",
    "smoothquant_plus": "quantization/test_smoothquant_plus.py",
}


def outcomes(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.outcome for check in checks}


@pytest.mark.parametrize(("name", "kind"), product(SETTINGS, KINDS))
def test_registered_transforms_pass(name: str, kind: str) -> None:
    if name == "rotate_columns" and kind == "mlp":
        pytest.skip("a plain MLP has no norm in front of its layers")
    model = tiny_model(kind)
    for transform, conflicting in SETTINGS[name][: 2 if kind in ("llama", "vit") else 1]:
        checks = check_transform(
            transform, model, tiny_batches(kind), conflicting=conflicting, repeatable=name == "swap"
        )
        assert [check.name for check in checks] == list(CHECKS)
        found = outcomes(checks)
        held = {name for name, outcome in found.items() if outcome == "holds"}
        assert {"the same result twice", "save and load", "undo is exact", "settings are strict"} <= held
        assert (found["ties are kept"] == "holds") == (kind in ("llama", "gemma", "gpt2"))
        assert (found["the identity setting changes nothing"] == "holds") == (name in ("teal", "wina"))
        assert (found["undo from the source is exact"] == "holds") == (kind != "mlp")
        assert all(check.reason for check in checks if check.outcome == "does not apply")


def test_every_registered_transform_is_in_the_table() -> None:
    classes = {name: registry.method_class(name) for name in registry.method_names()}
    transforms = {name for name, cls in classes.items() if isinstance(cls, type) and issubclass(cls, Transform)}
    assert transforms == {*SETTINGS, *ELSEWHERE}, "add the new transform to SETTINGS, or to ELSEWHERE with its tests"
    folder = Path(__file__).parents[1]
    assert all("check_transform(" in (folder / file).read_text(encoding="utf-8") for file in ELSEWHERE.values())


def test_a_fresh_process_the_compiler_and_the_exporter(worker: FreshProcess) -> None:
    model, batches = tiny_model("llama", num_hidden_layers=1), tiny_batches("llama", lengths=((9, 4),))
    checks = check_transform(Wina(sparsity=0.5), model, batches, fresh=worker, compile_backend="aot_eager", export=True)
    found = outcomes(checks)
    assert found["load in a fresh process"] == found["it compiles"] == found["it exports"] == "holds"


# -- broken transforms -------------------------------------------------------------------------------------------------


class Halving(Transform):
    """A sound one: halves the weights of the linear layers. Only its name is made up, so recipes do not know it."""

    tags: ClassVar[Tags] = Tags(slot="weight")
    strength: float = 0.5

    @property
    def name(self) -> str:
        return "halving"

    def factor(self) -> Any:
        return self.strength

    def edit(self, block: Any, seen: Any) -> Iterable[Edit]:
        for linear in block.linears():
            weight = DenseWeight((linear.weight.detach() * self.factor()).to(linear.weight.dtype))
            yield Replace(linear.path, ActLinear.of(linear, weight=weight))


class Random(Halving):
    """Draws from the global generator."""

    def factor(self) -> Any:
        return 1 + torch.rand(())


class LeavesHook(Halving):
    def edit(self, block: Any, seen: Any) -> Iterable[Edit]:
        block.module.register_forward_hook(lambda module, args, output: None)
        yield from super().edit(block, seen)


class ForgetsUndo(Halving):
    """Changes weights behind the runner's back."""

    def edit(self, block: Any, seen: Any) -> Iterable[Edit]:
        block.norms[0].module.weight.data.mul_(2)
        yield from super().edit(block, seen)


class ChangesDtype(Halving):
    def edit(self, block: Any, seen: Any) -> Iterable[Edit]:
        for linear in block.linears():
            weight = DenseWeight(linear.weight.detach().float() * 0.5)
            yield Replace(linear.path, ActLinear.of(linear, weight=weight))


class BreaksTie(Halving):
    def edit(self, block: Any, seen: Any) -> Iterable[Edit]:
        block.root.lm_head.weight = nn.Parameter(block.root.lm_head.weight.detach().clone())
        yield from super().edit(block, seen)


class ChangesAtIdentity(Halving):
    """Says that strength 1 changes nothing, and adds a little all the same."""

    @classmethod
    def identity(cls) -> Self:
        return cls(strength=1.0)

    def factor(self) -> Any:
        return self.strength + 0.01


class OnlySaysExact(Halving):
    tags: ClassVar[Tags] = Tags(changes_function="exact")


class KeepsItToItself(Halving):
    """Changes a plain attribute, which no checkpoint holds."""

    def edit(self, block: Any, seen: Any) -> Iterable[Edit]:
        block.norms[0].module.variance_epsilon = 0.5
        yield from super().edit(block, seen)


class FollowsAnything(Halving):
    def conflicts(self, earlier: Transform) -> str | None:
        return None


class NeedsNone(Halving):
    """Asks for no data, and then reads them."""

    def edit(self, block: Any, seen: Any) -> Iterable[Edit]:
        _ = seen.block_calls
        yield from super().edit(block, seen)


class HoldsOn(Halving):
    """Keeps a state between runs: the second one finds the model changed already."""

    runs: ClassVar[list[int]] = []

    def factor(self) -> Any:
        self.runs.append(1)
        return 0.5 if len(self.runs) <= 14 else 0.25  # 14 layers in the model


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (Random, "the same result twice: the second run: .* has other values"),
        (HoldsOn, "the same result twice: the second run: .* has other values"),
        (LeavesHook, r"no hook is left behind: after the run: model\.layers\.0\._forward_hooks"),
        (ForgetsUndo, r"undo is exact: after undo: model\.layers\.0\.input_layernorm\.weight has other values"),
        (ChangesDtype, "the dtype is kept: "),
        (BreaksTie, "ties are kept: .* is no longer tied"),
        (ChangesAtIdentity, r"the identity setting changes nothing: run in full differs by"),
        (OnlySaysExact, "the same result twice: EditError: model.layers.0: OnlySaysExact claims to keep what"),
        (KeepsItToItself, "save and load: the outputs of the loaded model differ"),
        (FollowsAnything, "what it conflicts with is refused: after FollowsAnything: accepted"),
        (NeedsNone, "the same result twice: DataError: block_calls: this transform ran without data"),
    ],
)
def test_broken_transforms_are_caught(broken: type[Transform], text: str) -> None:
    model = tiny_model("llama")
    before = State.of(model)
    with pytest.raises(AssertionError, match=f"^{text}"):
        check_transform(broken(), model, tiny_batches("llama"))
    before.compare(model, "the model that was checked")


def test_a_sound_one_only_lacks_its_entry_point() -> None:
    with pytest.raises(AssertionError, match=r"^settings are strict: RecipeError: methods: 'halving' is not known"):
        check_transform(Halving(), tiny_model("llama"), tiny_batches("llama"))


def test_mutable_settings_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loose(Teal):
        model_config = {"frozen": False, "extra": "ignore"}  # noqa: RUF012

        @property
        def name(self) -> str:
            return "teal"

    monkeypatch.setattr(registry, "method_class", lambda name: Loose)
    with pytest.raises(AssertionError, match=r"^settings are strict: an unknown setting was accepted"):
        check_transform(Loose(), tiny_model("mlp"), tiny_batches("mlp"))
    assert isinstance(Recipe.parse({"actkit": 1, "transforms": ["teal"]}).transforms[0], Loose)
