"""What transforms are shown, and that models are restored, against plain forward passes and snapshots."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
import torch
from test_blockwise import block_inputs
from tiny_models import KINDS, LAYERS, batches, build, run, snapshot
from torch import Tensor, nn

from actkit.core.edit import changes
from actkit.core.edit.edits import Note, Replace, Set, Skip, get_module
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground import memory, registry
from actkit.core.ground.errors import CoverageError, DataError, EditError, MemoryLimitError, NonFiniteError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import Block, Site, anatomy
from actkit.core.model.experts import ExpertList
from actkit.core.recipe import runner
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.store import checkpoint
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Gram, Moments, Spectrum


class Round(Transform):
    """Rounds the layers of some blocks to 4 bits, and moves a norm's weight: one of each edit that has values."""

    chosen: int | None = None
    tags: ClassVar[Tags] = Tags(slot="weight")

    def edit(self, block: Block, seen: Seen) -> Iterator[Any]:
        if self.chosen is not None and block.index != self.chosen:
            return
        for norm in block.norms[:1]:
            yield Set(f"{norm.path}.weight", norm.module.weight * 1.5)
        for linear in block.linears():
            if isinstance(linear.module, nn.Linear):  # in place first, as AWQ does
                yield Set(f"{linear.path}.weight", linear.weight.detach() * 0.5)
            stored = IntegerWeight.quantize(linear.weight, IntegerGrid(4, -1))
            yield Replace(linear.path, ActLinear.of(linear, weight=stored))
        yield Note(block.path, "rounded")


def held() -> dict[int, int]:
    """Address and bytes of every tensor in memory."""
    found = {}
    for each in gc.get_objects():
        if isinstance(each, Tensor):
            with suppress(RuntimeError):  # what a compiler traced in another test has no address
                found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return found


class Spy(Transform):
    """Keeps what it was shown and changes nothing."""

    tags: ClassVar[Tags] = Tags(needs_data=True, stream="edited")
    log: ClassVar[list[dict[str, Any]]] = []
    path: str | None = None  # of a layer inside the block, whose calls are recorded
    max_tokens: int | None = None
    weigh: bool = False  # log only which tensors are held then, by address

    def conflicts(self, earlier: Transform) -> str | None:
        return None

    def observe(self, block: Block) -> dict[Site, Any]:
        return {inputs.site: Moments() for inputs in block.linear_inputs()}

    def edit(self, block: Block, seen: Seen) -> Iterator[Any]:
        entry: dict[str, Any] = {
            "name": type(self).__name__,
            "block": block.index,
            "hidden": [call.hidden for call in seen.block_calls] if block.path else None,
            "moments": {site: seen[site] for site in self.observe(block)},
        }
        if self.path is not None:
            full = f"{block.path}.{self.path}" if block.path else self.path
            entry["calls"] = seen.calls(full, max_tokens=self.max_tokens)
            entry["outputs"] = [call.replay(block.root.get_submodule(full)) for call in entry["calls"]]
        if self.weigh:
            entry = {"held": held()}
        self.log.append(entry)
        yield Skip(block.path, "only looked at")


class Again(Round):
    """Observes two sites in the middle of its edits, all sites behind them, and counts the layers that ran for it."""

    tags: ClassVar[Tags] = Tags(slot="weight", needs_data=True)
    log: ClassVar[list[Any]] = []

    def edit(self, block: Block, seen: Seen) -> Iterator[Any]:
        sites = [inputs.site for inputs in block.linear_inputs()]
        ran: list[bool] = []
        last = get_module(block.root, block.linears()[-1].path)
        handle = last.register_forward_hook(lambda *_: ran.append(True))
        early = seen.observe(dict.fromkeys(sites[:2], Moments()))
        handle.remove()
        yield from super().edit(block, seen)
        late = seen.observe({site: [Moments(), Gram()] for site in sites})
        self.log.append((block, early, late, len(ran)))
        yield Note(block.path, "observed again", {"sites": len(sites)})


class SpyOriginal(Spy):
    tags: ClassVar[Tags] = Tags(needs_data=True, stream="original")


class SpyBoth(Spy):
    tags: ClassVar[Tags] = Tags(needs_data=True, stream="both", records_calls=True)


class Freed(Transform):
    """Observes Gram matrices and spectra of each block, and keeps weak references to them."""

    tags: ClassVar[Tags] = Tags(needs_data=True)
    seen: ClassVar[list[Any]] = []
    alive: ClassVar[list[int]] = []

    def observe(self, block: Block) -> dict[Site, Any]:
        self.alive.append(sum(reference() is not None for reference in self.seen))
        kinds = itertools.cycle([Gram, Spectrum])
        return {inputs.site: next(kinds)() for inputs in block.linear_inputs()}

    def edit(self, block: Block, seen: Seen) -> Iterator[Any]:
        self.seen.extend(weakref.ref(seen[inputs.site]) for inputs in block.linear_inputs())
        yield Skip(block.path, "only looked at")


class Fail(Transform):
    """Fails in the last block, after whatever came before."""

    def edit(self, block: Block, seen: Seen) -> Iterator[Any]:
        if block.path == "" or block.index == LAYERS - 1:
            yield Set("no_such_parameter", torch.zeros(1))


class Rounded(Transform):
    """Rounds every layer, and keeps weak references to the weights before."""

    before: ClassVar[list[Any]] = []
    alive: ClassVar[list[int]] = []

    def edit(self, block: Block, seen: Seen) -> Iterator[Any]:
        self.alive.append(sum(reference() is not None for reference in self.before))
        for linear in block.linears():
            self.before.append(weakref.ref(linear.module.weight))
            weight = IntegerWeight.quantize(linear.weight, IntegerGrid(4))
            yield Replace(linear.path, ActLinear.of(linear, weight=weight))


NAMES = {
    "again": Again,
    "freed": Freed,
    "round": Round,
    "rounded": Rounded,
    "spy": Spy,
    "spy_original": SpyOriginal,
    "spy_both": SpyBoth,
    "fail": Fail,
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transforms above are known by name, as those of an installed package are."""
    real = registry._entries
    own = {
        name: (EntryPoint(name, f"{cls.__module__}:{cls.__qualname__}", registry.METHODS),)
        for name, cls in NAMES.items()
    }
    monkeypatch.setattr(registry, "_entries", lambda group: real(group) | (own if group == registry.METHODS else {}))
    Spy.log.clear()


ALL = (*KINDS, "mlp", "conv", "loose")
SPIED = {  # a layer of each kind whose calls are recorded
    "llama": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "bert": "output.dense",
    "vit": "mlp.fc2",
    "mixtral": "mlp.experts.1.down",
    "mlp": "middle",
    "conv": "hidden",
    "loose": "self_attn.o_proj",
}


def given(kind: str) -> list[Any]:
    return batches("llama" if kind == "loose" else kind)


def changed(model: nn.Module, kind: str, recipe: Any, **settings: Any) -> Any:
    return apply(model, recipe, given(kind), **{"min_coverage": 0.0, "progress": False, **settings})


def layer_inputs(model: nn.Module, path: str, batch: Any) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, args: found.append(args[0].clone()))
    run(model, batch)
    handle.remove()
    return found[0]


# -- what transforms are shown -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("mlp", "conv")])
def test_the_streams_are_those_of_plain_passes(kind):
    model, data = build(kind), given(kind)
    paths = [block.path for block in anatomy(model).blocks]
    original = block_inputs(build(kind), paths, data)
    applied = changed(model, kind, [SpyOriginal(), Round(), Spy()])
    edited = block_inputs(model, paths, data)  # of the model as it is at the end
    for entry in Spy.log:
        expected = original if entry["name"] == "SpyOriginal" else edited
        for hidden, plain in zip(entry["hidden"], expected[entry["block"]], strict=True):
            if kind == "mixtral":  # experts get few rows, which a walk multiplies by weights that it keeps widened
                torch.testing.assert_close(hidden, plain, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(hidden, plain), entry["name"]
            assert hidden.grad_fn is None
    assert len(Spy.log) == 2 * len(paths)
    assert not torch.equal(original[-1][0], edited[-1][0])
    said = any("not the next block's input" in note for note in applied.report.notes)
    assert said == (kind == "loose")


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_observed_again_as_it_stands(kind):
    """What a transform observes between its edits is what whole passes through the model see at the end."""
    model, data = build(kind), given(kind)
    data = [*data, *data]  # each shape twice, so that passes are ended early
    Again.log.clear()
    applied = apply(model, Again(), data, min_coverage=0.0, progress=False)
    final = record(model, {site: Moments() for _, _, late, _ in Again.log for site in late}, data, progress=False)
    for block, early, late, runs in Again.log:
        for site, (moments, gram) in late.items():
            assert moments.count == gram.count == final[site].count
            torch.testing.assert_close(moments.mean_abs, final[site].mean_abs, rtol=1e-5, atol=1e-6)
        assert all(early[site].count == late[site][0].count for site in early)
        if kind != "mixtral":  # experts were opened behind the first pass, so nobody knows how often they run
            assert runs == 0, "a pass went on behind what is observed"
        assert (block.path, "Again", {"sites": len(late)}) in applied.report.values
    assert applied.report.to_dict()["values"] and "values" not in changed(build(kind), kind, Round()).report.to_dict()


@pytest.mark.parametrize("kind", ALL)
def test_recorded_calls_are_those_of_the_module(kind):
    model = build(kind)
    changed(model, kind, [SpyOriginal(path=SPIED[kind])])
    plain = build(kind)
    view = anatomy(plain, given(kind)[0])
    for entry in Spy.log:
        block = view.block(entry["block"])
        path = f"{block.path}.{SPIED[kind]}" if block.path else SPIED[kind]
        if kind == "mixtral":
            experts = block.experts
            plain.get_submodule(block.path).mlp.experts = ExpertList.of(experts.module, experts.row)
        assert len(entry["calls"]) == 2
        for call, output, batch in zip(entry["calls"], entry["outputs"], given(kind), strict=True):
            expected = layer_inputs(plain, path, batch)
            # Equal to rounding: how many rows share a product differs, and with it the order of its sums.
            torch.testing.assert_close(call.args[0], expected, rtol=1e-5, atol=1e-6)
            module = plain.get_submodule(path)
            torch.testing.assert_close(output, module(expected).detach(), rtol=1e-5, atol=1e-6)
            assert output.grad_fn is None


def test_recorded_calls_end_where_they_are_told_to():
    changed(build("llama"), "llama", [Spy(path="mlp.up_proj", max_tokens=12)])  # the first batch has exactly 12
    assert [len(entry["calls"]) for entry in Spy.log] == [1, 1, 1]
    Spy.log.clear()
    changed(build("llama"), "llama", [Spy(path="mlp.up_proj", max_tokens=13)])
    assert [len(entry["calls"]) for entry in Spy.log] == [2, 2, 2]


@pytest.mark.parametrize("kind", ["llama", "bert", "mixtral"])
def test_padding_is_left_out_of_the_statistics(kind):
    real = sum(int(batch["attention_mask"].sum()) for batch in given(kind))
    changed(build(kind), kind, [Spy()])
    for entry in Spy.log:
        counts = {site: moments.count for site, moments in entry["moments"].items()}
        assert {n for site, n in counts.items() if site.expert is None} == {real}
        if kind == "mixtral":  # each token goes to two experts
            assert sum(n for site, n in counts.items() if site.name == "mlp.hidden") == 2 * real


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_traced_models(kind):
    model, data = build(kind), given(kind)
    changed(model, kind, [Round(), Spy()])
    (entry,) = Spy.log
    for site, moments in entry["moments"].items():
        rows = torch.cat([layer_inputs(model, site.path, batch) for batch in data]).double()
        assert moments.count == len(rows)
        torch.testing.assert_close(torch.as_tensor(moments.mean).double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    assert isinstance(model.hidden if kind == "conv" else model.middle, ActLinear)


class Late(SpyOriginal):
    """Logs the outputs of the model that it plans on."""

    tags: ClassVar[Tags] = Tags(needs_data=True, stream="original", plans_in_turn=True)
    name: ClassVar[str] = "spy"  # type: ignore[assignment]
    planned: ClassVar[list[Any]] = []

    def plan(self, trial: Any, data: Any) -> Any:
        self.planned.append((snapshot(trial.model), list(trial.outputs())))
        return self


@pytest.mark.parametrize("kind", ["llama", "mixtral", "conv", "loose"])
def test_who_plans_in_turn_sees_what_those_before_left(kind):
    """As two runs one after the other would: the plan, the original stream, and the way back."""
    apart, data = build(kind), given(kind)
    changed(apart, kind, [Round()])
    expected = snapshot(apart), [run(apart, batch) for batch in data]
    changed(apart, kind, [SpyOriginal()])
    alone = list(Spy.log)
    Spy.log.clear()
    Late.planned.clear()
    model = build(kind)
    before = snapshot(model)
    done = changed(model, kind, [Round(), Late(), SpyBoth()])
    ((state, outputs),) = Late.planned
    of_the_record = ("mode", "gradient", "config", "module ")  # written when the run ends
    same = {
        key: value for key, value in state.items() if key.startswith("module m") or not key.startswith(of_the_record)
    }
    assert same == {key: expected[0][key] for key in same}
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected[1], strict=True))
    late = [entry for entry in Spy.log if entry["name"] == "Late"]
    assert len(late) == len(alone)
    for mine, other in zip(late, alone, strict=True):
        for site, moments in mine["moments"].items():
            assert torch.equal(torch.as_tensor(moments.mean), torch.as_tensor(other["moments"][site].mean))
    assert [name for _, name in done.report.changed] and "Late" in {name for _, name, _ in done.report.skipped}
    done.undo()
    assert snapshot(model) == before


def test_a_trial_inside_and_before_the_run_is_taken_back():
    class Searching(Round):
        def plan(self, trial: Any, data: Any) -> Any:
            before = snapshot(trial.model)
            with trial([Set("model.norm.weight", torch.zeros(16))]):
                assert all((output == 0).all() for output in trial.outputs())
            assert snapshot(trial.model) == before
            return self.model_copy(update={"chosen": 1})

        def edit(self, block: Block, seen: Seen) -> Iterator[Any]:
            before = snapshot(block.root)
            with seen.trial([Set(f"{block.norms[0].path}.weight", torch.zeros(16))]):
                assert snapshot(block.root) != before
            assert snapshot(block.root) == before
            yield from super().edit(block, seen)

        tags: ClassVar[Tags] = Tags(needs_data=True)
        name: ClassVar[str] = "round"  # type: ignore[assignment]

    applied = changed(build("llama"), "llama", [Searching()])
    assert {path.split(".")[2] for path, _ in applied.report.changed} == {"1"}


def test_layers_of_experts_can_be_tried_before_the_run():
    class Trying(Round):
        def plan(self, trial: Any, data: Any) -> Any:
            plain = list(trial.outputs())
            down = next(x for x in trial.anatomy.block(0).linears() if x.expert == 2 and x.role == "down")
            with trial([Set(f"{down.path}.weight", torch.zeros(down.out_features, down.in_features))]):
                assert any(not torch.equal(a, b) for a, b in zip(plain, trial.outputs(), strict=True))
            assert all(torch.equal(a, b) for a, b in zip(plain, trial.outputs(), strict=True))
            return self

        name: ClassVar[str] = "round"  # type: ignore[assignment]

    model = build("mixtral")
    before = snapshot(model)
    changed(model, "mixtral", [Trying()]).undo()
    assert snapshot(model) == before


# -- restoring ---------------------------------------------------------------------------------------------------------


def training(kind: str) -> Any:
    """A model with flags of its own: in training mode, with a frozen parameter."""
    model = build(kind).train()
    model.get_parameter(next(name for name, _ in model.named_parameters() if "weight" in name)).requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", ALL)
def test_undo_from_memory(kind):
    model = training(kind)
    before, modules = snapshot(model), dict(model.named_modules())
    outputs = [run(model.eval(), batch) for batch in given(kind)]
    model.train()
    applied = changed(model, kind, [Round(), Spy()], undo="memory")
    assert model.training
    assert all(module.training for module in model.modules())
    assert any(not torch.equal(run(model.eval(), b), y) for b, y in zip(given(kind), outputs, strict=True))
    model.train()
    assert applied.undo() is model
    assert snapshot(model) == before
    assert dict(model.named_modules()) == modules
    assert changes.of(model) is None
    with pytest.raises(EditError, match="undone already"):
        applied.undo()


@pytest.mark.parametrize("kind", KINDS)
def test_undo_from_the_source(kind, tmp_path):
    model = checkpoint.load(checkpoint.save(build(kind), tmp_path / "source")).train()
    frozen = next(name for block in anatomy(model).blocks[:1] for name, _ in block.module.named_parameters(block.path))
    model.get_parameter(frozen).requires_grad_(False)
    before = snapshot(model)
    applied = changed(model, kind, [Round(), Spy()])  # the source is the default
    assert applied._undo is not None
    assert snapshot(model) != before
    assert not applied.report.notes or not any("memory" in note for note in applied.report.notes)
    applied.undo()
    assert snapshot(model) == before
    again = changed(model, kind, [Round()], undo="source")  # the model counts as its files again
    again.undo()
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, "memory") for kind in ("llama", "gpt2", "mixtral", "conv", "mlp")]
    + [(kind, "source") for kind in ("llama", "gpt2", "mixtral")],  # the others have no folder
)
def test_an_error_midway_restores_the_model(kind, mode, tmp_path):
    if mode == "source":
        model = checkpoint.load(checkpoint.save(build(kind), tmp_path / "source"))
    else:
        model = build(kind)
    before = snapshot(model)
    with pytest.raises(EditError, match="no_such_parameter"):
        changed(model, kind, [Round(), Spy(), Fail()], undo=mode)
    assert snapshot(model) == before
    assert changes.of(model) is None
    assert type(model) is type(build(kind))


def test_an_error_with_undo_off_leaves_a_model_that_says_what_was_done(tmp_path):
    model = build("mixtral")
    with pytest.raises(EditError, match="no_such_parameter"):
        changed(model, "mixtral", [Round(chosen=1), Fail()], undo="off")
    assert not isinstance(model.model.layers[0].mlp.experts, ExpertList)
    assert isinstance(model.model.layers[1].mlp.experts, ExpertList)
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "half"))
    for batch in given("mixtral"):
        assert torch.equal(run(loaded, batch), run(model, batch))


def test_undo_off():
    applied = changed(build("llama"), "llama", [Round()], undo="off")
    with pytest.raises(EditError, match="undo='off'"):
        applied.undo()
    with pytest.raises(ValueError, match="undo: 'never' was given, allowed are source, memory, off"):
        changed(build("llama"), "llama", [Round()], undo="never")


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_runs_on_top_of_each_other_are_undone_in_order(kind):
    model = build(kind)
    states = [snapshot(model)]
    first = changed(model, kind, "rtn" if kind == "none" else [Round()])
    states.append(snapshot(model))
    second = changed(model, kind, "teal", min_coverage=0.5)
    assert isinstance(next(m for m in model.modules() if isinstance(m, ActLinear)).storage, IntegerWeight)
    with pytest.raises(EditError, match="changed again since"):
        first.undo()
    second.undo()
    assert snapshot(model) == states[1]
    assert [next(iter(entry)) for entry in changes.of(model).recipe] == ["round"]
    first.undo()
    assert snapshot(model) == states[0]
    assert type(model) is type(build(kind))


def test_a_later_run_that_fails_leaves_the_earlier_one():
    for kind in ("llama", "mixtral"):
        model = build(kind)
        changed(model, kind, [Round()])
        before, record = snapshot(model), changes.of(model)
        with pytest.raises(EditError):
            changed(model, kind, [*Recipe.of("teal"), Fail()])
        assert snapshot(model) == before
        assert changes.of(model) is record


@pytest.mark.parametrize("kind", ["llama", "mixtral", "mlp"])
def test_on_a_copy(kind, tmp_path):
    model = build(kind)
    if kind == "llama":
        model = checkpoint.load(checkpoint.save(model, tmp_path / "source"))
    before = snapshot(model)
    applied = changed(model, kind, [Round()], inplace=False)
    assert applied.model is not model
    assert snapshot(model) == before
    assert changes.of(model) is None
    assert snapshot(applied.model) != before
    assert applied.report.notes == [f"{block.path}: rounded" for block in anatomy(model, given(kind)[0]).blocks]
    assert snapshot(applied.undo()) == before


def test_the_source_must_be_as_it_was(tmp_path):
    folder = checkpoint.save(build("llama"), tmp_path / "source")
    model = checkpoint.load(folder)
    applied = changed(model, "llama", [Round()])
    checkpoint.save(model, folder, overwrite=True)
    state = snapshot(model)
    with pytest.raises(EditError, match="was changed since the model was loaded"):
        applied.undo()
    assert snapshot(model) == state
    assert changes.of(model) is not None

    model = checkpoint.load(checkpoint.save(build("llama"), tmp_path / "other"))
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    with pytest.raises(ValueError, match="its tensors were changed since"):
        changed(model, "llama", [Round()], undo="source")
    with pytest.raises(ValueError, match="not loaded by actkit"):
        changed(build("llama"), "llama", [Round()], undo="source")
    before = snapshot(model)
    applied = changed(model, "llama", [Round()])
    assert any("undo keeps the old tensors in memory" in note for note in applied.report.notes)
    applied.undo()
    assert snapshot(model) == before


# -- what a run says and refuses ---------------------------------------------------------------------------------------


def test_the_report():
    model = build("llama")
    applied = changed(model, "llama", [Round(chosen=0), Spy()])
    rounded = [path for path, method in applied.report.changed if method == "Round"]
    assert rounded[0] == "model.layers.0.input_layernorm.weight"
    assert {p.removesuffix(".weight") for p in rounded[1:]} == {b.path for b in anatomy(model).block(0).linears()}
    assert ("model.layers.2", "Spy", "only looked at") in applied.report.skipped
    assert applied.report.recipe["transforms"][0] == {"round": {"chosen": 0}}
    assert applied.report.to_dict()["seconds"] > 0
    assert [edit.get("replace", edit.get("set")) for edit in applied.edits] == [p for p, _ in applied.report.changed]
    assert changes.of(model).edits == applied.edits


def test_the_identity_setting_changes_nothing():
    model = build("llama")
    before, cls = snapshot(model), type(model)
    applied = apply(model, Recipe.parse({"actkit": 1, "transforms": [{"teal": {"sparsity": 0.0}}]}), progress=False)
    assert snapshot(model) == before
    assert type(model) is cls
    assert applied.edits == []
    assert "identity" in applied.report.notes[0]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_experts_and_layers_that_nothing_touched_stand_as_before(kind):
    model = build(kind)
    before, modules = snapshot(model), dict(model.named_modules())
    applied = changed(model, kind, [Spy()])
    assert snapshot(model) == before
    assert dict(model.named_modules()) == modules
    assert applied.edits == []


@pytest.mark.parametrize("kind", ["llama", "loose", "vit", "mixtral"])
def test_max_memory_is_a_hard_cap(kind):
    gc.collect()
    before = set(held())
    model, recipe = build(kind), [SpyBoth(path=SPIED[kind], weigh=True)]
    before |= {x.untyped_storage().data_ptr() for x in model.state_dict().values()}
    plan = changed(model, kind, recipe).report.plan
    assert plan.bytes > 0
    for entry in Spy.log:
        taken = sum(size for address, size in entry["held"].items() if address not in before)
        assert taken <= plan.bytes + 4096, "the run held more than the plan says"
    changed(build(kind), kind, recipe, max_memory=plan.bytes)
    model = build(kind)
    state = snapshot(model)
    Spy.log.clear()
    with pytest.raises(MemoryLimitError, match=r"max_memory: the plan needs .* the cap is .* largest is .* Give less"):
        changed(model, kind, recipe, max_memory=plan.bytes - 1)
    assert snapshot(model) == state
    assert Spy.log == []


def test_min_coverage():
    model = build("llama")
    before = snapshot(model)
    # of a block's parameters: attention 16 * (16 + 8 + 8 + 16), MLP 3 * 16 * 32, norms 2 * 16
    share = 3 * 16 * 32 / (16 * 48 + 3 * 16 * 32 + 32)
    recipe = {"actkit": 1, "transforms": [{"teal": {"skip": ["query", "key", "value", "output"]}}]}
    with pytest.raises(CoverageError, match=f"Teal would touch {share:.0%} .* min_coverage=90%.*Lower min_coverage"):
        changed(model, "llama", recipe, min_coverage=0.9)
    assert snapshot(model) == before
    plan = changed(model, "llama", recipe, min_coverage=0.5).report.plan
    assert plan.coverage["Teal"] == pytest.approx(share)
    with pytest.raises(ValueError, match=r"min_coverage: 1\.5 was given; it is a share"):
        changed(build("llama"), "llama", recipe, min_coverage=1.5)


def test_one_batch_may_be_given_without_a_list():
    batch = given("llama")[0]
    assert apply(build("llama"), "teal", batch, progress=False).edits
    assert apply(build("mlp"), "teal", given("mlp")[0], progress=False).edits
    assert apply(build("llama"), "teal", iter(given("llama")), progress=False).edits
    with pytest.raises(DataError, match="a text was given"):
        apply(build("llama"), "teal", "some text", progress=False)


def test_statistics_are_freed_block_by_block() -> None:
    gc.disable()  # by reference counts alone
    try:
        apply(build("llama"), [Freed()], batches("llama"))
    finally:
        gc.enable()
    assert Freed.seen and not any(Freed.alive)


@pytest.mark.parametrize("mode", ["off", "source"])
def test_replaced_weights_are_freed_block_by_block(mode, tmp_path) -> None:
    model = checkpoint.load(checkpoint.save(build("llama"), tmp_path / "plain"))
    Rounded.before.clear()
    Rounded.alive.clear()
    gc.disable()  # by reference counts alone
    try:
        apply(model, [Rounded()], undo=mode)
    finally:
        gc.enable()
    assert len(Rounded.before) > len(Rounded.alive) > 1 and not any(Rounded.alive)


@pytest.mark.parametrize(("large", "calls"), [(1, LAYERS), (2**20, 0)])
def test_freed_memory_goes_back_behind_each_large_block(monkeypatch: Any, large: int, calls: int) -> None:
    """What the allocator keeps between small pieces grew by 20 MB a block of SmolLM2 else."""
    model, done = build("llama"), []
    monkeypatch.setattr(memory, "LARGE", large)
    monkeypatch.setattr(memory, "release_memory", lambda cycles: done.append(cycles))
    apply(model, Round(), progress=False)
    assert done == [False] * calls


def test_a_value_that_is_not_finite_is_found_wherever_it_stands(monkeypatch: Any) -> None:
    monkeypatch.setattr(runner, "PART", 3)  # values that are looked at in one go
    model = build("llama")
    tensor = next(iter(anatomy(model).blocks[0].linears())).weight
    with torch.no_grad():
        tensor.view(-1)[-1] = torch.inf
    with pytest.raises(NonFiniteError, match="holds NaN or Inf"):
        apply(model, Round(), progress=False)
