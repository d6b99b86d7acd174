"""Every registered transform compiles and exports as its tags say, and the page that lists them agrees."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import actkit
from actkit.compression.repavit.idle import Repavit
from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating
from actkit.core.ground import registry
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.recipe.runner import apply
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.functions.vanillanet.deepen import Deepen
from actkit.quantization.fake_quantize import FakeQuantize
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.teal import Teal
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.transforms import Case, NotApplicable, compiles, exports

SETTINGS: dict[str, dict[str, Any]] = {  # where the defaults do not fit a tiny model
    "adadim": {"group_size": 8},
    "add_nonlinearity": {"ratio": 4},
    "aphq_vit": {"steps": 2, "search_rows": 32, "rounds": 1},
    "awq": {"bits": 3, "group_size": 8, "n_grid": 2},
    "gptq": {"bits": 4, "group_size": 8},
    "lorc": {"rank": 2},
    "ofq": {"operands": False, "inputs": {"by": "lsq", "bits": 4, "per": "tensor"}},
    "reconstruct_mlp": {"steps": 2},
    "merge_tokens": {"schedule": (1,), "pyra": True},
    "rtn": {"bits": 4, "group_size": 8},
    "self_normalize": {"force": True},
    "swap": {"where": "*", "new": "relu2"},
    "top_k_mlp": {"k": 5},
}
BEFORE = {  # what must stand before a method
    "collapse": Deepen(where="*.up_proj"),
    "freeze": FakeQuantize(),
    "lorc": RoundToNearest(bits=4, group_size=8),
    "reparameterize": Repavit(),
}
IMAGES = (lambda: tiny_model("vit", num_hidden_layers=1), tiny_batches("vit"))
OTHERS: dict[str, Any] = {  # another model than a Llama, and its batches
    "collapse_attention": (
        lambda: tiny_model("vit", num_hidden_layers=1, num_attention_heads=1),
        tiny_batches("vit"),
    ),
    "repavit": IMAGES,
    "reparameterize": IMAGES,
    "merge_tokens": IMAGES,
    "prompts": (lambda: tiny_model("vit", num_hidden_layers=1), tiny_batches("vit")),
    "replace_pooling": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval(),
        [torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))],
    ),
}
CONFIG = {"fatrelu": {"hidden_act": "relu"}}  # entries of the config that a method needs


def transforms() -> dict[str, type[Transform]]:
    classes = {name: registry.method_class(name) for name in registry.method_names()}
    return {name: cls for name, cls in classes.items() if isinstance(cls, type) and issubclass(cls, Transform)}


def asked(transform: Transform, model: Any, batches: Any) -> Case:
    return Case(transform, model, batches, compile_backend="aot_eager", export=True)


@pytest.mark.parametrize("name", transforms())
def test_tags_are_true(name: str) -> None:
    transform = transforms()[name](**SETTINGS.get(name, {}))
    if name in OTHERS:
        found = asked(transform, OTHERS[name][0](), OTHERS[name][1])
    else:
        model = tiny_model("llama", num_hidden_layers=1, **CONFIG.get(name, {}))
        found = asked(transform, model, tiny_batches("llama"))
    if name in BEFORE:
        vars(found)["changed"] = found.apply(found.model(), [BEFORE[name], transform]).model
    if transform.tags.compiles:
        compiles(found)
    if transform.tags.exports:
        exports(found)


def test_a_mixture_of_changed_experts_compiles_and_exports() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1, num_local_experts=2)
    found = asked(Teal(sparsity=0.4), model, tiny_batches("mixtral"))
    compiles(found)
    exports(found)


class ReadsItsInputs(Transform):
    """Puts in a module whose path depends on values, which no graph can hold."""

    tags: ClassVar[Tags] = Tags(slot="select")

    @property
    def name(self) -> str:
        return "reads_its_inputs"

    def edit(self, block: Any, seen: Any) -> Any:
        for linear in block.linears():
            yield actkit.core.edit.edits.Replace(linear.path, Branching.of(linear, select=Threshold(0.1)))


class Branching(ActLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)


def test_a_claim_that_is_not_true_is_caught() -> None:
    found = asked(ReadsItsInputs(), tiny_model("mlp"), tiny_batches("mlp"))
    for check in (compiles, exports):
        with pytest.raises(Exception) as raised:  # whatever torch says
            check(found)
        assert not isinstance(raised.value, NotApplicable)


@pytest.mark.parametrize("select", ["threshold", "top_k"])
def test_a_packed_layer_is_one_graph_with_its_kernel(select: str) -> None:
    model, x = tiny_model("mlp"), torch.randn(1, 16)
    apply(model, Teal(sparsity=0.5, mode=select), tiny_batches("mlp"), min_coverage=0.0, progress=False)
    with evaluating(model):
        expected = model(x)
        assert actkit.core.layers.linear.pack_for_decode(model) == 2
        seen: list[str] = []

        def backend(graph: Any, inputs: Any) -> Any:
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), expected)
        assert sum("actkit.sparse_linear" in target for target in seen) == 2
        program = torch.export.export(model, (x,))
    assert not any("actkit" in str(node.target) for node in program.graph.nodes)  # it runs where actkit is not
    assert set(program.state_dict) == set(model.state_dict())


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++, and there is no g++")
def test_a_model_of_the_zoo_runs_under_inductor() -> None:
    model, batches = actkit.load("cnn", dtype="float32"), [torch.rand(4, 1, 8, 8)]
    actkit.apply(model, [RoundToNearest(bits=4, group_size=-1), Teal(sparsity=0.5)], batches, progress=False)
    torch.compiler.reset()
    with evaluating(model):
        found, expected = torch.compile(model, fullgraph=True)(batches[0]), forward(model, batches[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_page_lists_what_the_tags_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compile-and-export.md").read_text(encoding="utf-8")
    listed = {name: (a, b) for name, a, b in re.findall(r"^\| (\w+) \| (yes|no) \| (yes|no) \|$", page, re.MULTILINE)}
    words = {True: "yes", False: "no"}
    assert listed == {name: (words[c.tags.compiles], words[c.tags.exports]) for name, c in transforms().items()}
