"""Every registered rule passes; each kind of broken one is caught by the right property."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Set
from actkit.core.ground import registry
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.sparsity.prosparse.activation_penalty import ActivationPenalty
from actkit.sparsity.prosparse.prosparse import ProSparse
from actkit.testing import Check, check_rule, tiny_batches, tiny_model
from actkit.testing.checks import State
from actkit.testing.rules import CHECKS

LENGTHS = ((9, 4, 6), (7, 2), (5, 5), (8, 3, 3))
# registered name -> settings to check
RULES: dict[str, list[TrainingRule]] = {
    "activation_penalty": [
        ActivationPenalty(weight=3.0, sites=("mlp.hidden", "attention.mixed"), schedule=((0.0, 1.0), (1.0, 2.0))),
        ActivationPenalty(weight=0.5, measure="hoyer"),
    ],
    "prosparse": [ProSparse(peaks=(1.0, 3.0), ends=(0.4, 0.9), start=0.0)],
}
ELSEWHERE = {  # rules for models in training rounded are checked beside their own tests
    "choose_basis": "functions/test_s_kan.py",
    "confidence_annealing": "quantization/test_ofq.py",
    "oscillation_tracker": "quantization/test_ofq.py",
    "fade_activations": "functions/test_vanillanet.py",
    "ap": "compression/test_ap.py",
    "lift": "finetuning/test_lift.py",
    "atlas": "finetuning/test_atlas.py",
    "keep_masks": "core/test_masks.py",
    "tract": "finetuning/test_tract.py",
    "meter": "core/test_meter.py",
    "doei": "interpretation/test_doei.py",
    "s2a": "finetuning/test_s2a.py",
    "mobiletl": "finetuning/test_mobiletl.py",
}


def outcomes(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.outcome for check in checks}


# kind of model -> changes of its config: a ReLU, and no dropout
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "relu"},
    "opt": {"dropout": 0.0},
    "gpt2": {"activation_function": "relu", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_registered_rules_pass(name: str, kind: str) -> None:
    for rule in RULES[name][: 2 if kind == "llama" else 1]:
        checks = check_rule(rule, tiny_model(kind, **KINDS[kind]), tiny_batches(kind, lengths=LENGTHS))
        assert [check.name for check in checks] == list(CHECKS)
        left = {check.name for check in checks if check.outcome != "holds"}
        apart = {"the Trainer trains as one by hand"} if kind == "gpt2" else set()
        assert left == {"what it ends with is saved"} | apart


def test_every_registered_rule_is_in_the_table() -> None:
    classes = {name: registry.method_class(name) for name in registry.method_names()}
    rules = {name for name, cls in classes.items() if issubclass(cls, TrainingRule)}
    assert rules == {*RULES, *ELSEWHERE}, "add the new rule to RULES, or to ELSEWHERE with its tests"
    folder = Path(__file__).parents[1]
    assert all("check_rule(" in (folder / file).read_text(encoding="utf-8") for file in ELSEWHERE.values())


# -- broken rules ------------------------------------------------------------------------------------------------------


class Small(TrainingRule):
    """A sound one: the mean square of the first MLP's output. Only its name is made up, so nothing registers it."""

    weight: float = 2.0
    _kind: Any = PrivateAttr(default=None)

    @property
    def name(self) -> str:
        return "small"

    def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
        return (self._kind or AttachedSmall)(self, model, optimizer)


class AttachedSmall(AttachedRule):
    def __init__(self, settings: Small, model: Any, optimizer: Any) -> None:
        self.settings, self.model, self.optimizer, self.seen = settings, model, optimizer, None
        self.handle = model.model.layers[0].mlp.register_forward_hook(self.see)

    def see(self, module: Any, args: Any, output: Tensor) -> None:
        self.seen = output

    def factor(self) -> Any:
        return self.settings.weight

    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        return self.factor() * self.seen[mask.bool()].square().mean()

    def detach(self) -> None:
        self.handle.remove()


class EndsWithAnEdit(AttachedSmall):
    """Sound: what it finishes with is done in all three loops."""

    def finish(self) -> list[Edit]:
        return [Set("model.norm.weight", torch.full_like(self.model.model.norm.weight, 0.5))]


def at_work(kind: type) -> Small:
    """The rule that works as `kind` says."""
    rule = Small()
    rule._kind = kind
    return rule


class DoesNothing(AttachedSmall):
    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        return None


class Draws(AttachedSmall):
    generator = torch.Generator().manual_seed(0)

    def factor(self) -> Any:
        return 2 + torch.rand((), generator=self.generator)


class CountsEvaluations(AttachedSmall):
    """Its factor grows with each pass of the model, those of a validation too."""

    passes = 0

    def see(self, module: Any, args: Any, output: Tensor) -> None:
        self.passes += 1
        super().see(module, args, output)

    def factor(self) -> Any:
        return self.passes


class CallsTheModel(AttachedSmall):
    """Makes a pass of its own, which the Trainer's hook on the model takes for one of the training."""

    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        ids = torch.arange(5)[None]
        return self.model(input_ids=ids, labels=ids).loss


class KeepsTheGraph(AttachedSmall):
    """Adds up the penalties of a step's batches, whose graphs are gone once the first was run backward."""

    total: Any = 0.0

    def before_step(self, progress: float) -> None:
        self.total = 0.0

    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        self.total = self.total + super().penalty(mask, batch, output)
        return self.total


class ForgetsItsCount(AttachedSmall):
    """Its factor grows with the steps, which it counts and does not keep."""

    steps = 0

    def after_step(self, progress: float) -> None:
        self.steps += 1

    def factor(self) -> Any:
        return 1.0 + self.steps


class LeavesHook(AttachedSmall):
    def detach(self) -> None: ...


class LeavesModule(AttachedSmall):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.model.model.layers[1].mlp.act_fn = nn.GELU()


class Freezes(AttachedSmall):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)


class ChangesAnAttribute(AttachedSmall):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.model.model.norm.variance_epsilon = 0.5


class BreaksTie(AttachedSmall):
    """Unties after the first step, once it is at work."""

    def after_step(self, progress: float) -> None:
        self.model.lm_head.weight = nn.Parameter(self.model.lm_head.weight.detach().clone())


class SharesItsCount(AttachedSmall):
    """Counts the steps of whoever trains, and begins anew with the training of a model that is at its start."""

    steps: ClassVar[dict[str, int]] = {"done": 0}

    def before_step(self, progress: float) -> None:
        if progress == 0.0:
            self.steps["done"] = 0

    def after_step(self, progress: float) -> None:
        self.steps["done"] += 1

    def state_dict(self) -> Any:
        return dict(self.steps)

    def load_state_dict(self, state: Any) -> None:
        self.steps.update(state)

    def factor(self) -> Any:
        return 1.0 + self.steps["done"]


class EndsWithMore(EndsWithAnEdit):
    """Changes a plain attribute at its end, which no checkpoint holds."""

    def finish(self) -> list[Edit]:
        self.model.model.norm.variance_epsilon = 0.5
        return super().finish()


class CountsPadding(AttachedSmall):
    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        return self.factor() * self.seen.square().mean()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (DoesNothing, "it changes the training: the training is the same without it"),
        (Draws, "the same result twice: gradients or weights differ"),
        (CountsEvaluations, "our loop trains as one by hand: core.train.training.train, step 1: the gradient of"),
        (CallsTheModel, "the Trainer trains as one by hand: RecursionError"),
        (KeepsTheGraph, "gradients are accumulated: RuntimeError: Trying to backward through the graph a second time"),
        (ForgetsItsCount, "a resumed training is the same to the bit: step 3 was"),
        (LeavesHook, r"detach leaves the plain model: after detach\(\): model.layers.0.mlp._forward_hooks"),
        (LeavesModule, r"detach leaves the plain model: after detach\(\): other modules"),
        (Freezes, r"detach leaves the plain model: after detach\(\): requires_grad differs"),
        (ChangesAnAttribute, r"detach leaves the plain model: after detach\(\) the outputs and a plain model's differ"),
        (BreaksTie, "ties are kept: .* is no longer tied to"),
        (SharesItsCount, "nothing is shared between models: model 1 of two trained differently"),
        (CountsPadding, "padding counts for nothing: with other tokens in the padding, step 1: the gradient of"),
        (EndsWithMore, "what it ends with is saved: the outputs of the loaded model differ"),
        (AttachedSmall, "settings are strict: RecipeError: methods: 'small' is not known"),
        (EndsWithAnEdit, "settings are strict: RecipeError: methods: 'small' is not known"),
    ],
)
def test_broken_rules_are_caught(kind: type, text: str) -> None:
    model = tiny_model("llama")
    before = State.of(model)
    with pytest.raises(AssertionError, match=f"^({text})"):
        check_rule(at_work(kind), model, tiny_batches("llama", lengths=LENGTHS))
    before.compare(model, "the model that was checked")


def test_mutable_settings_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loose(Small):
        model_config = {"frozen": False, "extra": "ignore"}  # noqa: RUF012

    monkeypatch.setattr(registry, "method_class", lambda name: Loose)
    with pytest.raises(AssertionError, match=r"^settings are strict: an unknown setting was accepted"):
        check_rule(Loose(), tiny_model("llama"), tiny_batches("llama"))


def test_one_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="batches: 1 were given; give two, four or more"):
        check_rule(RULES["prosparse"][0], tiny_model("llama"), tiny_batches("llama")[:1])
