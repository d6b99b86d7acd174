"""Recipes with stages: as the same steps by hand, to the bit; killed and resumed; saved, loaded, proved and undone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batches, bits, build, run
from torch import Tensor, nn

from actkit.core.edit import changes
from actkit.core.ground.errors import CheckpointError, DataError, EditError, NonFiniteError, ProcessError, RecipeError
from actkit.core.measure.proof import prove
from actkit.core.recipe.recipe import Recipe, transforms_of
from actkit.core.recipe.runner import apply
from actkit.core.recipe.stage import Apply, Train
from actkit.core.store import checkpoint
from actkit.core.train import staged_run, training
from actkit.core.train.training import train
from actkit.functions.swap import Swap
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.prosparse.activation_penalty import ActivationPenalty
from actkit.sparsity.prosparse.fatrelu import FatRelu
from actkit.sparsity.wina.wina import Wina

RULE = ActivationPenalty(weight=0.1)
TRAIN = Train(rules=(RULE,), steps=4, learning_rate=1e-2, evaluate_every=2, seed=3)
STAGES = (Swap(where="silu", new="relu"), TRAIN, FatRelu(threshold=0.02), Wina(sparsity=0.25))


def model() -> Any:
    return build("llama", attention_dropout=0.2)


def rows(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 50, (2, 8), generator=generator)} for _ in range(3)]


def data(recipe: Recipe) -> list[Any]:
    return [(rows(7), rows(8)) if isinstance(stage, Train) else batches("llama") for stage in recipe.stages]


def staged(given: nn.Module, items: Any = STAGES, **options: Any) -> Any:
    recipe = Recipe(items)
    return staged_run.run(given, recipe, data(recipe), progress=False, **options)


def by_hand(given: nn.Module) -> nn.Module:
    apply(given, STAGES[0], batches("llama"), progress=False)
    settings = {"steps": 4, "learning_rate": 1e-2, "evaluate_every": 2, "seed": 3}
    train(given, rows(7), validation=rows(8), rules=[RULE], progress=False, **settings)
    apply(given, list(STAGES[2:]), batches("llama"), progress=False)
    return given


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert bits(tensor) == bits(states[1][name]), name
    for batch in batches("llama"):
        assert bits(run(a, batch)) == bits(run(b, batch))


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / checkpoint.MANIFEST).read_text())


# -- as by hand --------------------------------------------------------------------------------------------------------


def test_stages_are_the_same_steps_by_hand() -> None:
    ours, theirs = model(), by_hand(model())
    done = staged(ours)
    assert_equal(ours, theirs)
    mine, other = changes.of(ours), changes.of(theirs)
    assert mine.edits == other.edits == done.edits and repr(transforms_of(mine.recipe)) == repr(
        transforms_of(other.recipe)
    )
    assert [next(iter(entry)) for entry in mine.recipe] == ["swap", "train", "fatrelu", "wina"]
    assert [entry for entry in mine.recipe if "train" not in entry] == other.recipe
    assert not ours.training and [next(iter(each)) for each in done.report.stages] == ["apply", "train", "apply"]
    assert {method for _, method in done.report.changed} == {"Swap", "FatRelu", "Wina"}
    assert any("trained: 4 steps, validation loss" in note for note in done.report.notes)


def test_a_later_stage_sees_the_model_that_those_before_it_left() -> None:
    """Two transforms in one stage are observed on the first model; in two stages the second one on the changed model.
    By hand they are two applies."""
    ours, theirs = model(), model()
    staged(ours, [Apply(RoundToNearest(bits=4, group_size=8)), Apply(Wina(sparsity=0.3))])
    for transform in (RoundToNearest(bits=4, group_size=8), Wina(sparsity=0.3)):
        apply(theirs, transform, batches("llama"), progress=False)
    assert_equal(ours, theirs)


def test_one_training_is_train() -> None:
    ours, theirs = model(), model()
    staged(ours, [TRAIN])
    trained = train(theirs, rows(7), validation=rows(8), progress=False, **TRAIN.options())
    assert_equal(ours, theirs)
    assert type(ours) is type(theirs) is type(model()) and trained.kept == "last"
    assert changes.of(ours).recipe == [{"train": TRAIN.dump()}] and not changes.of(ours).edits


def test_several_trainings_and_a_model_of_ones_own() -> None:
    """No transformers model, trained twice with a swap in between."""
    pairs = [
        {"x": torch.randn(4, 16, generator=torch.Generator().manual_seed(n)), "labels": torch.arange(4)} for n in (0, 1)
    ]
    recipe = Recipe([Train(steps=2), Swap(where="middle_act", new="relu"), Train(epochs=1)])

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.middle_act, self.down = nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.middle_act(self.up(x)))

    def made() -> Own:
        torch.manual_seed(0)
        return Own()

    given = [(pairs[:1], pairs[1:]), [pairs[0]["x"]], (pairs[:1], pairs[1:])]
    ours, theirs = made(), made()
    done = staged_run.run(ours, recipe, given, progress=False)
    train(theirs, pairs[:1], validation=pairs[1:], steps=2, progress=False)
    apply(theirs, recipe.transforms, [pairs[0]["x"]], progress=False)
    train(theirs, pairs[:1], validation=pairs[1:], epochs=1, progress=False)
    for (name, one), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert changes.of(ours).architecture == changes.of(theirs).architecture
    done.undo()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), made().state_dict().values(), strict=True))
    assert isinstance(ours.middle_act, nn.GELU) and changes.of(ours) is None


# -- killed and resumed ------------------------------------------------------------------------------------------------

KILL = """
# Forks a process per way to be killed; this one computes nothing, so that it has no threads when it forks.
import os, sys
sys.path[:0] = {path!r}
from actkit.core.recipe import runner
from actkit.core.store import checkpoint
from actkit.core.train import staged_run, training
from actkit.sparsity.wina import wina
from pathlib import Path
from test_staged_run import KILLS, model, staged

def kill(*args, **options):
    os._exit(9)

def prepare(at):
    if at == "first apply":
        runner.apply = kill
    elif at == "first save":
        checkpoint.checksums.write = kill
    elif at == "training":
        update = training._Loop.update
        training._Loop.update = lambda self: kill() if self.step == 3 else update(self)
    elif at == "end of training":
        training.write_whole = kill
    elif at == "record of training":
        keep = staged_run._State.keep
        staged_run._State.keep = lambda self, number, record: kill() if number == 2 else keep(self, number, record)
    elif at == "second apply":
        wina.Wina.edit = kill
    elif at == "result":
        save = checkpoint.save
        checkpoint.save = lambda m, folder, **o: kill() if Path(folder).name == "out" else save(m, folder, **o)

for at in KILLS:
    child = os.fork()
    if child == 0:
        prepare(at)
        staged(model(), out=Path(sys.argv[1]) / at / "out")
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == 9, f"{{at}} ended with {{ended}}"
"""
KILLS = {  # where -> the stages that are not run again
    "first apply": 0,
    "first save": 0,
    "training": 1,
    "end of training": 1,
    "record of training": 2,
    "second apply": 2,
    "result": 2,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    staged(model(), out=out)
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of KILLS, with what a run left that was killed there."""
    folder, here = tmp_path_factory.mktemp("killed"), Path(__file__).parent
    code = KILL.format(path=[str(here), str(here.parent)])
    ended = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder


@pytest.mark.parametrize("at", KILLS)
def test_killed_and_resumed_equals_uninterrupted(at: str, killed: Path, uninterrupted: Path) -> None:
    out = killed / at / "out"
    assert not out.exists() and (killed / at / "out.stages" / "run.json").is_file()
    with pytest.raises(CheckpointError, match="resume=True"):
        staged(model(), out=out)

    torch.manual_seed(99)  # nothing outside the state matters
    lines: list[str] = []
    done = staged(model(), out=out, resume=True, announce=lines.append)
    skipped = [line for line in lines if "was finished before and is not run again" in line]
    assert len(skipped) == KILLS[at] and set(skipped) <= set(done.report.notes)
    assert not (killed / at / "out.stages").exists()
    assert_equal(checkpoint.load(out), checkpoint.load(uninterrupted))
    assert_equal(done.model, checkpoint.load(uninterrupted))
    ours, theirs = manifest(out), manifest(uninterrupted)
    assert all(ours[key] == theirs[key] for key in ("edits", "recipe", "architecture", "tied", "base_class"))
    records = [json.loads((folder / staged_run.RECORD).read_text()) for folder in (out, uninterrupted)]
    assert [each["apply"]["changed"] for each in records[0] if "apply" in each] == [
        each["apply"]["changed"] for each in records[1] if "apply" in each
    ]
    assert records[0][1]["train"]["history"] == records[1][1]["train"]["history"]
    done.undo()
    assert_equal(done.model, model())


def test_resumed_after_a_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder after the first stage is a plain checkpoint of transformers, which holds no record."""
    items = [TRAIN, Swap(where="silu", new="relu"), Train(steps=1)]
    staged(model(), items, out=tmp_path / "whole")
    real = staged_run.train

    def failing(*args: Any, **options: Any) -> Any:
        if options["steps"] == 1:
            raise RuntimeError("killed")
        return real(*args, **options)

    monkeypatch.setattr(staged_run, "train", failing)
    monkeypatch.setattr(staged_run.runner, "apply", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        staged(model(), items, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out.stages").iterdir()) == ["1", "1.json", "run.json"]
    assert not (tmp_path / "out.stages" / "1" / checkpoint.MANIFEST).exists()
    monkeypatch.setattr(staged_run.runner, "apply", apply)
    with pytest.raises(RuntimeError, match="killed"):
        staged(model(), items, out=tmp_path / "out", resume=True)
    assert sorted(path.name for path in (tmp_path / "out.stages").iterdir()) == ["1.json", "2", "2.json", "run.json"]
    monkeypatch.setattr(staged_run, "train", real)
    staged(model(), items, out=tmp_path / "out", resume=True)
    assert_equal(checkpoint.load(tmp_path / "out"), checkpoint.load(tmp_path / "whole"))
    assert manifest(tmp_path / "out")["recipe"] == manifest(tmp_path / "whole")["recipe"]


def test_a_changed_model_is_changed_further_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edits that it had before are not replayed on it again."""

    def changed() -> Any:
        return apply(model(), Swap(where="silu", new="relu"), batches("llama"), progress=False).model

    items = STAGES[1:]
    whole = staged(changed(), items, out=tmp_path / "whole")
    monkeypatch.setattr(staged_run.runner, "apply", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        staged(changed(), items, out=tmp_path / "out")
    monkeypatch.setattr(staged_run.runner, "apply", apply)
    done = staged(changed(), items, out=tmp_path / "out", resume=True)
    assert_equal(done.model, whole.model)
    assert done.edits == whole.edits
    assert manifest(tmp_path / "out")["recipe"] == manifest(tmp_path / "whole")["recipe"]
    assert_equal(done.undo(), changed())


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(staged_run, "train", pressed)
    given = model()
    with pytest.raises(KeyboardInterrupt, match="stopped in stage 2 of 3; go on with the same call and resume=True"):
        staged(given, out=tmp_path / "out")
    assert_equal(given, model())
    assert changes.of(given) is None and type(given) is type(model())


def test_another_run_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(staged_run, "train", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        staged(model(), out=out)
    other = (STAGES[0], TRAIN.model_copy(update={"steps": 5}), *STAGES[2:])
    with pytest.raises(
        CheckpointError, match=r"resume: the recipe is another .*stage 2 is .*'steps': 5.* was .*'steps': 4"
    ):
        staged(model(), other, out=out, resume=True)
    with pytest.raises(CheckpointError, match="resume: the recipe is another"):
        staged(model(), STAGES[:2], out=out, resume=True)
    nudged = model()
    with torch.no_grad():
        nudged.lm_head.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="resume: the model is another"):
        staged(nudged, out=out, resume=True)
    recipe = Recipe(STAGES)
    given = data(recipe)
    with pytest.raises(CheckpointError, match="resume: the data is another"):
        staged_run.run(model(), recipe, [given[0], (rows(9), rows(8)), given[2]], out=out, resume=True, progress=False)
    monkeypatch.undo()
    assert staged(model(), other, out=out, overwrite=True).report.stages[1]["train"]["steps"] == 5
    with pytest.raises(CheckpointError, match="the run there is finished; leave resume out"):
        staged(model(), out=out, resume=True)
    with pytest.raises(CheckpointError, match="exists already"):
        staged(model(), out=out)
    with pytest.raises(CheckpointError, match="there is no state in"):
        staged(model(), out=tmp_path / "new", resume=True)
    with pytest.raises(ValueError, match="resume: it needs out="):
        staged(model(), resume=True)


def test_a_damaged_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(staged_run, "train", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        staged(model(), out=out)
    weights = next((tmp_path / "out.stages" / "1").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        staged(model(), out=out, resume=True)
    (tmp_path / "out.stages" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="start the run anew"):
        staged(model(), out=out, resume=True)


# -- saved, proved, undone ---------------------------------------------------------------------------------------------


def test_a_staged_model_is_saved_loaded_and_proved(tmp_path: Path) -> None:
    done = staged(model(), out=tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    assert_equal(loaded, done.model)
    assert changes.of(loaded).recipe == changes.of(done.model).recipe
    assert transforms_of(changes.of(loaded).recipe) == STAGES[:1] + STAGES[2:]
    assert (tmp_path / "out" / "README.md").read_text().count("stages:") == 1
    proof = prove(done.model, tmp_path / "out")
    assert proof.passed and proof.bit_equal, proof.describe()
    again = Recipe.parse({"actkit": 1, "stages": yaml_of(tmp_path / "out" / "README.md")["stages"]})
    assert again.dump() == Recipe(STAGES).dump()
    records = json.loads((tmp_path / "out" / staged_run.RECORD).read_text())
    assert records[1]["train"]["data"] == "3 batches" and len(records[1]["train"]["history"]) == 5


def yaml_of(card: Path) -> Any:
    import yaml

    return yaml.safe_load(card.read_text().split("```yaml\n")[1].split("```")[0])


def test_undo_is_bit_for_bit_and_can_be_done_again() -> None:
    given = model()
    lm_head, config = given.lm_head.weight, dict(vars(given.config))
    first = staged(given)
    changed = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    assert given.config.hidden_act == "relu" and type(given) is not type(model())
    assert first.undo() is given
    assert_equal(given, model())
    assert given.lm_head.weight is lm_head and vars(given.config) == config and type(given) is type(model())
    assert changes.of(given) is None
    with pytest.raises(EditError, match="undone already"):
        first.undo()
    staged(given)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in given.state_dict().items())


def test_undo_refuses_a_model_that_was_changed_since() -> None:
    given = model()
    done = staged(given, STAGES[:2])
    later = apply(given, FatRelu(threshold=0.1), batches("llama"), progress=False)
    with pytest.raises(EditError, match="changed again since"):
        done.undo()
    later.undo()
    assert_equal(done.undo(), model())
    with pytest.raises(EditError, match="undo='off'"):
        staged(given, STAGES[:2], undo="off").undo()


def test_a_copy_is_changed_where_asked() -> None:
    given = model()
    done = staged(given, inplace=False)
    assert_equal(given, model())
    assert_equal(done.model, by_hand(model()))


def test_what_fails_restores_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last stage, after a swap and a training; and in the middle of a training."""
    given = model()
    with pytest.raises(RecipeError, match="is gelu, no ReLU"):
        staged(given, [Swap(where="silu", new="gelu"), TRAIN, FatRelu()])
    assert_equal(given, model())
    assert type(given) is type(model()) and given.config.hidden_act == "silu"

    real = training._Loop.update

    def update(self: Any) -> None:
        real(self)
        if self.step == 3:
            raise NonFiniteError("made up")

    monkeypatch.setattr(training._Loop, "update", update)
    with pytest.raises(NonFiniteError, match="made up"):
        staged(given)
    assert_equal(given, model())


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_any_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    given = model()
    with pytest.raises(ValueError, match="undo: 'source' was given"):
        staged(given, undo="source")
    with pytest.raises(ValueError, match="bfloat16"):
        staged(model().bfloat16())
    recipe = Recipe(STAGES)
    with pytest.raises(DataError, match="validation: none"):
        staged_run.run(given, recipe, [None, (rows(7), None), batches("llama")], progress=False)
    with pytest.raises(DataError, match="Wina calibrates on data"):
        staged_run.run(given, recipe, [None, (rows(7), rows(8)), None], progress=False)
    with pytest.raises(RecipeError, match="Wina cannot follow Wina"):
        staged(given, [Wina(sparsity=0.2), TRAIN, Wina(sparsity=0.2)])
    with pytest.raises(RecipeError, match=r"core\.recipe\.runner\.apply takes one list of transforms"):
        apply(given, recipe, batches("llama"))
    monkeypatch.setenv("RANK", "0")
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match="a recipe with stages: it runs in one process"):
        staged(given)
    assert_equal(given, model())
