"""How a user meets the errors of core, the room `train`: one function per way, which raises it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import batches, build

from actkit import verbs
from actkit.core.forward.batch import as_batches, check_batch, first_rows
from actkit.core.forward.stream import Stream
from actkit.core.recipe.rule import TrainingRule
from actkit.core.store.tensor_files import write_values
from actkit.core.train import rules, staged_run, training
from actkit.core.train.masks import AttachedMasks, KeepMasks, Masks, layer_weights
from actkit.core.train.meter import Meter, readings
from actkit.core.train.objective import Objective
from actkit.core.train.optimizers import chosen_optimizer
from actkit.core.train.training_setup import Settings, state_folder, steps_per_epoch
from actkit.data import load_data
from error_proofs import HOST, IDS, NAN, Place, beside, proof, raising, stages, train

STREAM = Stream(lambda generator: HOST)


class OwnOptimizer(TrainingRule):
    """A rule that brings its optimizer."""

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups)


proof(lambda p: chosen_optimizer([OwnOptimizer(), OwnOptimizer()]))


proof(lambda p: chosen_optimizer([OwnOptimizer()], "sgd"))


MASKS = Masks({"fc.weight": torch.ones(2, 2, dtype=torch.bool)})

proof(lambda p: (save_file({"x": torch.zeros(1)}, p.path / "x.safetensors"), Masks.load(p.path / "x.safetensors")))


proof(lambda p: Masks.load(p.path / "none.safetensors"))


proof(lambda p: KeepMasks.of(Masks({})).attach(build("mlp")))


proof(lambda p: MASKS.apply(build("mlp")))


proof(lambda p: layer_weights(build("mlp"), ["*norm*"]))


proof(lambda p: layer_weights(torch.nn.ReLU()))


proof(lambda p: AttachedMasks(build("mlp"), Masks({})).load_state_dict({"masks": dict(MASKS.kept)}))


proof(lambda p: rules.AttachedRules([("A", rules.AttachedRule())]).load_state_dict({"2.B": {"x": 1}}))


proof(
    lambda p: rules.RuleCallback._load(
        SimpleNamespace(resume_from=p.path, running=SimpleNamespace(state_dict=lambda: {"x": 1})), None, None
    )
)


proof(lambda p: training._fill({"a": torch.ones(1)}, {}, p.path))


@proof
def another_setting(p: Place) -> None:
    settings = Settings(9, 1e-3, 1, 0.0, "cosine", 0.0, "no", 0, None, 1, 1, 1, 1)
    write_values(state_folder(p.path / "out"), {"settings": {"steps": 8}})
    now = SimpleNamespace(folder=p.path / "out", settings=settings, described=[], batches=None, validation=None)
    training._Loop.restore(now)


proof(lambda p: train(p, out=p.path / "new", resume=True))


@proof
def another_recipe(p: Place) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged_run, "train", raising(RuntimeError("killed")))
        with pytest.raises(RuntimeError):
            stages(p)
    stages(p, steps=2, resume=True)


proof(lambda p: stages(p, resume=True))


proof(lambda p: ((p.path / "out.stages").mkdir(), stages(p)))


proof(lambda p: staged_run._read_json(p.path / "run.json"))


proof(lambda p: ((p.path / "out.training").mkdir(), train(p, out=p.path / "out")))


proof(lambda p: steps_per_epoch(1, 2, 2))


proof(lambda p: Objective(build("vit"), None).labels(batches("vit")[0]))


proof(lambda p: Objective(build("llama"), None).labels({**HOST, "labels": IDS * 0 - 100}))


proof(lambda p: Objective(_silent(), None)(_silent(), {**HOST, "labels": IDS}))


proof(lambda p: training.train(build("llama"), [HOST], validation=None, steps=1))


def _silent() -> Any:
    model = build("llama")
    model.forward = lambda **_: SimpleNamespace(loss=None)
    return model


proof(lambda p: train(p, loss=lambda model, batch: model(**batch).logits.sum() * (NAN if model.training else 1)))


proof(lambda p: train(p, loss=lambda model, batch: model(**batch).logits.sum() * NAN))


@proof
def reentrant(p: Place) -> None:
    model = build("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    rules.refuse_reentrant_checkpointing(model)


proof(lambda p: train(p, optimizer=3))


proof(lambda p: train(p, optimizer="sgd:lr=0.1"))


proof(lambda p: train(p, optimizer="sgd:speed=1"))


proof(lambda p: train(p, schedule=3))


proof(lambda p: train(p, schedule="steps"))


proof(lambda p: train(p, schedule="wsdc:length=1"))


proof(lambda p: train(p, schedule="wsdc:stable=2"))


proof(lambda p: train(p, score="accuracy"))


proof(lambda p: train(p, optimizer="sgd:["))


proof(lambda p: as_batches((IDS, IDS)))


proof(lambda p: check_batch(build("mlp"), (IDS.float(), IDS)))


proof(lambda p: check_batch(torch.nn.Bilinear(2, 2, 2), IDS.float()))


proof(lambda p: first_rows({"x": IDS.float(), "edge_index": torch.ones(2, 5).long()[:, :1].T}, 1))


proof(lambda p: STREAM[-1])


proof(lambda p: load_data(STREAM, build("llama")))


proof(lambda p: verbs.train(build("llama"), STREAM, sequences=3))


proof(lambda p: (beside(p), train(p)))


proof(lambda p: train(p, steps=None))


proof(lambda p: Meter(analysis="profile").attach(build("llama")))


@proof
def other_batches_for_a_meter(p: Place) -> None:
    meters = [Meter(analysis="profile").attach(build("llama"), example=batch) for batch in batches("llama")[:2]]
    meters[1].load_state_dict(meters[0].state_dict())


proof(lambda p: readings(p.path))


proof(lambda p: Meter(analysis="profile", at=(9,)).steps(3))


proof(lambda p: Meter(analysis="profile", until="loss = 3").attach(build("llama"), example=IDS))


@proof
def a_meter_ends_by_no_number(p: Place) -> None:
    meter = Meter(analysis="profile", until="sites < 3", at=(1,)).attach(build("llama"), example=batches("llama")[0])
    meter.before_step(0.0)
    meter.after_step(0.5)
