"""Training rules by name; in a hand-written loop, in ours and in transformers' Trainer, with the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from actkit.core.edit import changes
from actkit.core.edit.edits import Edit, Replace, Set
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import CheckpointError, EditError, RecipeError, UnsupportedModelError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.core.recipe.rule import AttachedRule, TrainingRule, dump_rules, parse_rules
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.core.store.tensor_files import read_values, write_values
from actkit.core.train.rules import RuleCallback, attached
from actkit.core.train.training import train
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.prosparse.activation_penalty import ActivationPenalty

WEIGHT = 3.0
RULE = ActivationPenalty(weight=WEIGHT)


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def padded_rows(count: int = 6, length: int = 10, seed: int = 1) -> list[dict[str, list[int]]]:
    """Rows of different lengths, so that means over tokens and over batches differ."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        real = length - 2 * (index % 4)
        ids = torch.randint(0, 50, (length,), generator=generator)
        mask = (torch.arange(length) < real).long()
        labels = ids.masked_fill(mask == 0, -100)
        rows.append({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()})
    return rows


def in_batches(rows: list[dict[str, list[int]]], size: int) -> list[dict[str, Tensor]]:
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [{key: torch.tensor([row[key] for row in group]) for key in group[0]} for group in groups]


def by_hand(model: LlamaForCausalLM, group: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of one optimizer step in float64, written without the library: sum of the cross entropy over the labels
    of all batches, and the mean over batches of WEIGHT * sum over blocks of the masked mean of |input of down_proj|."""
    double = llama().double()
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in group)
    for batch in group:
        seen: list[Tensor] = []
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            for layer in double.model.layers
        ]
        logits = double(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for handle in handles:
            handle.remove()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum") / labels
        real = batch["attention_mask"].bool()
        penalty = sum(x[real].abs().mean() for x in seen)
        (loss + WEIGHT * penalty / len(group)).backward()
    return {name: parameter.grad for name, parameter in double.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, gradient in found.items():
        scale = expected[name].abs().max()
        assert (gradient.double() - expected[name]).abs().max() <= 2e-5 * scale + 1e-9, name


class Probe(TrainingRule):
    """Copies the gradients after each optimizer step; counts the calls it gets."""

    def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
        return AttachedProbe(model)


class AttachedProbe(AttachedRule):
    last: AttachedProbe

    def __init__(self, model: nn.Module) -> None:
        self.model, self.gradients, self.progress, self.detached = model, [], [], False
        AttachedProbe.last = self

    def before_step(self, progress: float) -> None:
        self.progress.append(progress)

    def after_step(self, progress: float) -> None:
        self.progress.append(progress)
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters()})

    def state_dict(self) -> dict[str, Any]:
        return {"steps": len(self.gradients), "last": torch.tensor([float(len(self.gradients))])}

    def load_state_dict(self, state: Any) -> None:
        self.loaded = dict(state)

    def detach(self) -> None:
        self.detached = True


def watch(model: nn.Module) -> list[dict[str, Tensor]]:
    """The batches that a model is trained on, as they come."""
    seen: list[dict[str, Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            seen.append({key: kwargs[key].clone() for key in ("input_ids", "attention_mask", "labels")})

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def arguments(folder: Any, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "num_train_epochs": 1,
        "logging_strategy": "no",
    }
    return TrainingArguments(**{**defaults, **settings})


def still(model: nn.Module) -> tuple[torch.optim.Optimizer, None]:
    """An optimizer that leaves the weights alone, so that every step sees the same model."""
    return torch.optim.SGD(model.parameters(), lr=0.0), None


# -- by name -----------------------------------------------------------------------------------------------------------


def test_rules_are_read_from_text_mapping_and_yaml(tmp_path: Any) -> None:
    expected = (ActivationPenalty(weight=0.5, sites=("mlp.gate", "mlp.hidden")),)
    (tmp_path / "rules.yaml").write_text(
        "actkit: 1\nrules:\n  - activation_penalty: {weight: 0.5, sites: [mlp.gate, mlp.hidden]}\n"
    )
    assert parse_rules("activation_penalty:weight=0.5,sites=[mlp.gate, mlp.hidden]") == expected
    assert parse_rules(["activation_penalty:weight=5e-1,sites=[mlp.gate, mlp.hidden]"]) == expected
    assert parse_rules(tmp_path / "rules.yaml") == expected
    assert parse_rules(dump_rules(expected)) == expected
    assert parse_rules("activation_penalty") == (ActivationPenalty(),)
    assert parse_rules(None) == () and parse_rules(RULE) == (RULE,)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing_such", "not known"),
        ("wina", "not a training rule"),
        ("activation_penalty:wieght=1", "wieght: no such setting"),
        ("activation_penalty:weight=-1", "weight"),
        ("activation_penalty:weight=[", "write it like"),
        ([3], "give a rule"),
        ({"rules": [], "actkit": 2}, "actkit: 1"),
        ({"activation_penalty": 3}, "mapping of names"),
    ],
)
def test_bad_rules_are_refused(source: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_rules(source)


def test_settings_are_frozen_and_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RULE.weight = 2.0  # type: ignore[misc]
    assert RULE.name == "activation_penalty" and RULE.label == "ActivationPenalty(weight=3.0)"


# -- in a hand-written loop --------------------------------------------------------------------------------------------


def test_gradients_in_a_hand_written_loop() -> None:
    model, batches = llama(), in_batches(padded_rows(), 2)
    expected = [by_hand(model, [batch]) for batch in batches]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attached([RULE, Probe()], model, optimizer) as rules:  # the loop of the module's docstring
        for step, batch in enumerate(batches):
            rules.before_step(step / len(batches))
            loss = rules.add(model(**batch).loss, batch.get("attention_mask"))
            loss.backward()
            optimizer.step()
            rules.after_step((step + 1) / len(batches))
            optimizer.zero_grad()
    probe = AttachedProbe.last
    for found, wanted in zip(probe.gradients, expected, strict=True):
        assert_same(found, wanted)
    assert probe.progress == [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1] and probe.detached
    assert hooks(model) == 0


def test_an_exception_leaves_nothing_behind() -> None:
    model = llama()
    with pytest.raises(RuntimeError, match="mine"), attached([RULE], model):
        raise RuntimeError("mine")
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="site"), attached([RULE, ActivationPenalty(sites=("mlp.hiden",))], model):
        pass
    assert hooks(model) == 0


def test_the_state_of_rules_survives_files(tmp_path: Any) -> None:
    model = llama()
    with attached([RULE, Probe()], model) as rules:
        state = rules.state_dict()
        assert list(state) == ["1.Probe"]
        write_values(tmp_path / "state", state)
        assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [
            "actkit.sha256",
            "tensors.safetensors",
            "values.json",
        ]
        back = read_values(tmp_path / "state")
        rules.load_state_dict(back)
        assert AttachedProbe.last.loaded["steps"] == 0 and torch.equal(back["1.Probe"]["last"], torch.zeros(1))
        with pytest.raises(CheckpointError, match=r"2\.Other"):
            rules.load_state_dict({"2.Other": {}})
        with pytest.raises(CheckpointError, match="keeps no state"):
            rules.load_state_dict({"0.ActivationPenalty": {"a": 1}})
    with pytest.raises(CheckpointError, match="neither safetensors nor JSON"):
        write_values(tmp_path / "bad", {"value": object()})
    (tmp_path / "state" / "tensors.safetensors").write_bytes(b"12345")
    for words in (
        r"tensors\.safetensors: the file is damaged.*start the training anew",
        "not readable.*start the training",
    ):
        with pytest.raises(CheckpointError, match=words):
            read_values(tmp_path / "state")
        (tmp_path / "state" / "actkit.sha256").unlink(missing_ok=True)


# -- the same gradients in all three -----------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_trainer_our_loop_and_hand_agree(tmp_path: Any, accumulation: int) -> None:
    """One optimizer step over the same batches, whose numbers of real tokens differ."""
    rows = padded_rows(2 * accumulation)
    batches = in_batches(rows, 2)
    expected = by_hand(llama(), batches)

    model = llama()
    with RuleCallback([RULE, Probe()]) as callback:
        settings = arguments(tmp_path, gradient_accumulation_steps=accumulation)
        Trainer(model, settings, train_dataset=rows, callbacks=[callback], optimizers=still(model)).train()
    (trainer,) = AttachedProbe.last.gradients
    model = llama()
    train(
        model,
        batches,
        validation=in_batches(padded_rows(2, seed=5), 2),
        steps=1,
        learning_rate=1e-30,
        weight_decay=0,
        rules=[RULE, Probe()],
        gradient_accumulation=accumulation,
        max_grad_norm=None,
    )
    (ours,) = AttachedProbe.last.gradients
    assert_same(trainer, expected)
    assert_same(ours, expected)
    assert_same(ours, {name: gradient.double() for name, gradient in trainer.items()})


def test_last_step_of_an_epoch_has_fewer_batches(tmp_path: Any) -> None:
    """5 batches by 2: the third step of each epoch averages over 1, in the Trainer and in our loop."""
    rows = padded_rows(10)
    model = llama()
    seen = watch(model)
    with RuleCallback([RULE, Probe()]) as callback:
        settings = arguments(tmp_path, gradient_accumulation_steps=2, num_train_epochs=2)
        Trainer(model, settings, train_dataset=rows, callbacks=[callback], optimizers=still(model)).train()
    found = AttachedProbe.last.gradients
    groups = [seen[0:2], seen[2:4], seen[4:5], seen[5:7], seen[7:9], seen[9:10]]
    assert len(found) == len(groups)
    for gradients, group in zip(found, groups, strict=True):
        assert_same(gradients, by_hand(model, group))

    model = llama()
    seen = watch(model)
    batches = in_batches(rows, 2)
    train(
        model,
        batches,
        validation=in_batches(padded_rows(2, seed=5), 2),
        epochs=1,
        learning_rate=1e-30,
        weight_decay=0,
        rules=[RULE, Probe()],
        gradient_accumulation=2,
        max_grad_norm=None,
    )
    found = AttachedProbe.last.gradients
    groups = [seen[0:2], seen[2:4], seen[4:5]]
    for gradients, group in zip(found, groups, strict=True):
        assert_same(gradients, by_hand(model, group))


class Plain(nn.Module):
    """A model whose call takes no keywords beyond its own: the Trainer divides its loss by the accumulation steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.act, self.second = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.second(self.act(self.first(x)))
        output = {"logits": logits}
        return output if labels is None else {"loss": F.cross_entropy(logits, labels), **output}


def test_penalty_where_the_trainer_divides(tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
    rows = [{"x": x[i], "labels": y[i]} for i in range(6)]
    model = Plain()
    rule = ActivationPenalty(weight=WEIGHT, sites=("layer.input:second",))
    with RuleCallback([rule, Probe()], example={"x": x[:2]}) as callback:
        settings = arguments(tmp_path, gradient_accumulation_steps=3, remove_unused_columns=False)
        Trainer(model, settings, train_dataset=rows, callbacks=[callback], optimizers=still(model)).train()
    (found,) = AttachedProbe.last.gradients
    double = Plain().double()
    hidden = double.act(double.first(x.double()))  # batches are of one size: the mean over all is the mean of means
    (F.cross_entropy(double.second(hidden), y) + WEIGHT * hidden.abs().mean()).backward()
    assert_same(found, {name: parameter.grad for name, parameter in double.named_parameters()})


# -- what rules finish with --------------------------------------------------------------------------------------------


class Rounder(TrainingRule):
    """Has hooks on the down projections while the model trains, and puts 4-bit layers there at the end. fits: else the
    last edit is one that no model takes."""

    fits: bool = True

    def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
        return AttachedRounder(model, self.fits)


class AttachedRounder(AttachedRule):
    def __init__(self, model: nn.Module, fits: bool) -> None:
        self.model, self.fits = model, fits
        self.hooks = {
            path: module.register_forward_hook(lambda *_: None)
            for path, module in model.named_modules()
            if path.endswith("down_proj")
        }

    def detach(self) -> None:
        for hook in self.hooks.values():
            hook.remove()

    def finish(self) -> Iterator[Edit]:
        for path in self.hooks:
            linear = self.model.get_submodule(path)
            grid = IntegerGrid(bits=4, group_size=8)
            yield Replace(path, ActLinear.of(linear, weight=IntegerWeight.quantize(linear.weight, grid)))
        if not self.fits:
            yield Set("nothing", torch.ones(1))


def assert_finished(model: Any) -> None:
    """As `rtn` rounds the weights that the training ended with, recorded as its edits are."""
    expected = llama()
    expected.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if "down_proj" not in name}, strict=False
    )
    apply(expected, RoundToNearest(bits=4, group_size=8, scale_dtype="float32"), progress=False)
    for path in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"):
        ours, theirs = model.get_submodule(path), expected.get_submodule(path)
        assert torch.equal(ours.storage.codes, theirs.storage.codes), path
    edits = changes.of(model).edits
    assert edits == [edit for edit in changes.of(expected).edits if "down_proj" in edit["replace"]]
    assert changes.of(model).architecture == changes.of(expected).architecture
    assert type(model).__name__ == "ActkitLlamaForCausalLM" and hooks(model) == 0


def test_rules_finish_in_all_three_loops(tmp_path: Any) -> None:
    """The weights stand still, so that the three end alike."""
    rows = padded_rows(2)
    model = llama()
    with attached([RULE, Rounder()], model) as rules:
        rules.add(model(**in_batches(rows, 2)[0]).loss).backward()
        assert hooks(model) > 2 and changes.of(model) is None
    assert_finished(model)

    model = llama()
    with RuleCallback([Rounder()]) as callback:
        settings = arguments(tmp_path)
        Trainer(model, settings, train_dataset=rows, callbacks=[callback], optimizers=still(model)).train()
        assert_finished(model)
    assert_finished(model)  # once only

    model = llama().eval()
    held_out = in_batches(padded_rows(2, seed=5), 2)
    settings = {"steps": 2, "learning_rate": 1e-30, "weight_decay": 0.0, "evaluate_every": 1, "progress": False}
    result = train(model, in_batches(rows, 2), validation=held_out, rules=Rounder(), out=tmp_path / "out", **settings)
    assert_finished(model)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        assert result.validation == pytest.approx(model(**held_out[0]).loss.item(), rel=1e-6)
    assert result.validation != result.history[-1].validation
    loaded = checkpoint.load(tmp_path / "out")
    assert_finished(loaded)
    loaded.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(loaded(**held_out[0]).logits, model(**held_out[0]).logits)


def test_a_rule_that_cannot_finish_leaves_the_trained_model() -> None:
    model = llama()
    with pytest.raises(EditError, match="nothing"), attached([Rounder(fits=False)], model):
        pass
    assert type(model) is LlamaForCausalLM and changes.of(model) is None and hooks(model) == 0
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), llama().state_dict().values()))
    with pytest.raises(RuntimeError, match="mine"), attached([Rounder()], model):
        raise RuntimeError("mine")  # what fails does not finish
    assert changes.of(model) is None and hooks(model) == 0


# -- the Trainer -------------------------------------------------------------------------------------------------------


def test_evaluation_and_the_model_afterwards_are_untouched(tmp_path: Any) -> None:
    rows, model = padded_rows(4), llama()
    with RuleCallback([RULE]) as callback:
        settings = arguments(tmp_path, eval_strategy="steps", eval_steps=1, prediction_loss_only=True)
        trainer = Trainer(
            model, settings, train_dataset=rows, eval_dataset=rows[:2], callbacks=[callback], optimizers=still(model)
        )
        trainer.train()
        assert hooks(model) == 0  # gone when training ends, not only when the context does
    model.eval()
    batch = in_batches(rows[:2], 2)[0]
    with torch.no_grad():
        plain = float(model(**batch).loss)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and all(abs(loss - plain) < 1e-5 for loss in losses)


def test_the_logged_loss_holds_the_penalty(tmp_path: Any) -> None:
    rows, model = padded_rows(2), llama()
    with RuleCallback([RULE]) as callback:
        settings = arguments(tmp_path, logging_strategy="steps", logging_steps=1)
        trainer = Trainer(model, settings, train_dataset=rows, callbacks=[callback], optimizers=still(model))
        trainer.train()
    (batch,) = in_batches(rows, 2)
    with attached([RULE], model) as rules:
        expected = rules.add(model(**batch).loss, batch["attention_mask"]).item()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
    ],
)
def test_what_would_be_wrong_is_refused(tmp_path: Any, settings: dict[str, Any], message: str) -> None:
    model = llama()
    with RuleCallback([RULE]) as callback, pytest.raises((ValueError, UnsupportedModelError), match=message):
        Trainer(model, arguments(tmp_path, **settings), train_dataset=padded_rows(2), callbacks=[callback]).train()
    own = hooks(model.model.embed_tokens)  # re-entrant checkpointing has transformers put one there
    assert hooks(model) == own


def test_a_loss_outside_the_model_is_refused(tmp_path: Any) -> None:
    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())

    model = llama()
    with RuleCallback([RULE]) as callback, pytest.raises(ValueError, match="compute_loss_func"):
        settings = arguments(tmp_path)
        Trainer(model, settings, train_dataset=padded_rows(2), callbacks=[callback], compute_loss_func=own).train()
    assert hooks(model) == 0  # after the exception, because the context ended


def test_accumulation_without_a_length_is_refused(tmp_path: Any) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(padded_rows(4))

    settings = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=1)
    with RuleCallback([RULE]) as callback, pytest.raises(ValueError, match="no length"):
        Trainer(llama(), settings, train_dataset=Stream(), callbacks=[callback]).train()


def test_reentrant_checkpointing_is_refused_and_the_other_kind_is_right() -> None:
    model, (batch,) = llama().train(), in_batches(padded_rows(2), 2)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedModelError, match="re-entrant"), attached([RULE], model):
        pass
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with attached([RULE, Probe()], model) as rules:
        for _ in range(2):  # what recomputation left behind must not count in the second step
            model.zero_grad()
            rules.add(model(**batch).loss, batch["attention_mask"]).backward()
            rules.after_step(1.0)
    for found in AttachedProbe.last.gradients:
        assert_same(found, by_hand(model, [batch]))


def test_trainer_resumes_with_the_state_of_rules(tmp_path: Any) -> None:
    rows, model = padded_rows(6), llama()
    with RuleCallback([RULE, Probe()]) as callback:
        settings = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
        Trainer(model, settings, train_dataset=rows, callbacks=[callback]).train()
        files = {p.name for p in (tmp_path / "checkpoint-2" / "actkit_rules").iterdir()}
        assert files == {"actkit.sha256", "tensors.safetensors", "values.json"}
    settings = arguments(tmp_path, max_steps=3)
    with RuleCallback([RULE, Probe()]) as callback:
        trainer = Trainer(model, settings, train_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    loaded = AttachedProbe.last.loaded
    assert loaded["steps"] == 2 and torch.equal(loaded["last"], torch.tensor([2.0]))
    assert AttachedProbe.last.progress == [2 / 3, 1.0]
