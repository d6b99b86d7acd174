"""How a user meets the errors of core, the room `recipe`: one function per way, which raises it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from tiny_models import batches, build

from actkit.core.edit.edits import Set
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe import rule, stage
from actkit.core.recipe.analysis import parse_analysis, settings_of
from actkit.core.recipe.exactness import Probe
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.recipe.seen import check_shares
from actkit.core.recipe.steps import Steps
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.store import checkpoint
from actkit.core.train import rules
from actkit.sparsity.teal import Teal
from error_proofs import HOST, STACK, Lazy, Place, beside, broken, proof, run

proof(lambda p: rules.AttachedRules([("A", rules.AttachedRule())]).load_state_dict({"0.A": {"x": 1}}))


proof(lambda p: Recipe.of("prosparse"))


proof(lambda p: Recipe.parse({"actkit": 1, "stages": ["teal"]}))


proof(lambda p: Recipe([stage.Train(steps=1), stage.Apply()]).check())


proof(lambda p: Recipe.parse({"actkit": 1, "stages": [{"apply": "teal"}]}))


proof(lambda p: Recipe.parse({"actkit": 1, "stages": [{"train": 300}]}))


proof(lambda p: Recipe.parse({"actkit": 1, "stages": [{"train": {"steps": 1, "rules": ["teal"]}}]}))


proof(lambda p: Recipe.parse({"actkit": 1, "stages": [{"train": {}}]}))


proof(lambda p: run(stage.Train(steps=1)))


proof(lambda p: Recipe.parse({"actkit": 1, "transforms": [{"teal": {}, "rtn": {}}]}))


proof(lambda p: Recipe.of(3))


proof(lambda p: Recipe.of([3]))


proof(lambda p: Recipe.parse({"recipe": 1}))


proof(lambda p: Recipe.parse({"actkit": 1, "transforms": [], "more": 1}))


proof(lambda p: Recipe.parse({"actkit": 2, "transforms": []}))


proof(lambda p: Recipe.of([]).check())


proof(lambda p: Recipe.parse({"actkit": 1, "transforms": [{"teal": 3}]}))


proof(lambda p: Recipe.parse({"actkit": 1, "transforms": [{"teal": {"sparsity": 2}}]}))


proof(lambda p: Recipe.of("teal,wina").check())


proof(lambda p: rule.parse_rules(p.file("actkit: 1")))


proof(lambda p: rule.parse_rules({"rules": [], "actkit": 2}))


proof(lambda p: rule.parse_rules([3]))


proof(lambda p: rule.parse_rules("activation_penalty:weight=[1"))


proof(lambda p: rule.parse_rules("teal"))


proof(lambda p: rule.parse_rules({"activation_penalty": 3}))


proof(lambda p: rule.parse_rules("activation_penalty:weight=-1"))


@proof
def another_source(p: Place) -> None:
    folder = p.copy("plain")
    applied = apply(checkpoint.load(folder), STACK, None, progress=False, undo="source")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    applied.undo()


proof(lambda p: run(STACK, None, undo="off").undo())


@proof
def undone_out_of_order(p: Place) -> None:
    model = build("llama")
    first = apply(model, STACK, None, progress=False)
    apply(model, "teal", batches("llama"), progress=False)
    first.undo()


proof(lambda p: run("teal", "a text"))


proof(lambda p: run("teal", None))


proof(lambda p: run(Lazy(), None))


proof(lambda p: run(Lazy(how="calls"), None))


proof(lambda p: run(Lazy(how="block_calls"), None))


proof(lambda p: run(Lazy(how="trial"), None))


proof(lambda p: run(Lazy(how="targets"), None))


proof(lambda p: apply(broken(), "teal", batches("llama"), progress=False))


@proof
def a_block_is_skipped(p: Place) -> None:
    model = build("llama")
    model.forward = lambda input_ids, **_: model.lm_head(model.model.embed_tokens(input_ids))
    apply(model, "teal", [HOST], progress=False)


@proof
def a_block_runs_twice(p: Place) -> None:
    model = build("llama")
    first, second = model.model.layers[:2]
    plain = second.forward
    second.forward = lambda x, **keywords: plain(first(x, **keywords), **keywords)
    apply(model, "teal", [HOST], progress=False)


proof(lambda p: run({"actkit": 1, "transforms": [{"teal": {"skip": ["gate", "up", "down"]}}]}))


proof(lambda p: run("teal", max_memory="100 B"))


proof(lambda p: (beside(p), check_shares("Lazy", Lazy.tags)))


proof(lambda p: Steps(1).check([SimpleNamespace(needs_data=True, tags=Tags()), None]))


proof(lambda p: run(Lazy(how="site"), None))


proof(lambda p: apply("llama", "teal", []))


proof(lambda p: run("teal", undo="magic"))


proof(lambda p: run(Teal(sparsity=0.5, only={"block": 7})))


proof(lambda p: parse_analysis(["eafo"]))


proof(lambda p: parse_analysis({"eafo": 3}))


proof(lambda p: parse_analysis("eafo:colour=red"))


proof(lambda p: settings_of("mine", len))


class Halves(Transform):
    """Says that it is exact, and is not."""

    tags: ClassVar[Tags] = Tags(changes_function="exact", least_coverage=0.0)

    @property
    def name(self) -> str:
        return "halves"

    def edit(self, block: Any, seen: Any) -> Any:
        yield Set(f"{block.mlp.down.path}.weight", block.mlp.down.weight.detach() / 2)


@proof
def what_claims_to_be_exact_is_not(p: Place) -> None:
    run(Halves())


@proof
def outputs_of_another_shape(p: Place) -> None:
    model = build("llama")
    Probe(anatomy(model), batches("llama")).compare("Halves", "", torch.zeros(3))
