"""The training loop: what it minimises, what it keeps, and that an interrupted training goes on to the bit."""

from __future__ import annotations

import json
import math
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from actkit.core.ground.errors import CheckpointError, DataError, NonFiniteError
from actkit.core.layers.keeps_dtype import KeepsDtype
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.core.store import checkpoint
from actkit.core.train.choice import parameter_groups
from actkit.core.train.training import train
from actkit.core.train.training_setup import Settings, count_steps, rate, steps_per_epoch
from actkit.sparsity.prosparse.activation_penalty import ActivationPenalty


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        attention_dropout=0.3,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def counting(count: int, start: int = 0) -> list[dict[str, Tensor]]:
    """Sequences that count upwards modulo 20: each token follows from the one before."""
    firsts = torch.arange(start, start + 2 * count).reshape(count, 2)
    return [{"input_ids": (first[:, None] + torch.arange(8)) % 20} for first in firsts]


class Interrupt(TrainingRule):
    """Presses Ctrl-C in a step, or raises; keeps a state of its own that the resumed training needs."""

    at: int = 0
    crash: bool = False

    def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
        return AttachedInterrupt(self)


class AttachedInterrupt(AttachedRule):
    last: AttachedInterrupt

    def __init__(self, settings: Interrupt) -> None:
        self.settings, self.total, self.detached = settings, torch.zeros(3), False
        AttachedInterrupt.last = self

    def after_step(self, progress: float) -> None:
        self.total = self.total + progress
        self.step = round(progress * 8)
        if self.step == STOP["at"]:
            if STOP["crash"]:
                raise RuntimeError("killed")
            signal.raise_signal(signal.SIGINT)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "nested": {"tensor": self.total * 2, "number": 0.1}}

    def load_state_dict(self, state: Any) -> None:
        self.total = state["total"]
        assert torch.equal(state["nested"]["tensor"], self.total * 2) and state["nested"]["number"] == 0.1

    def detach(self) -> None:
        self.detached = True


STOP: dict[str, Any] = {"at": -1, "crash": False}  # outside the settings, which must be the same on resuming


def run(model: nn.Module, out: Path | None, **settings: Any) -> Any:
    rules = [ActivationPenalty(weight=0.1, schedule=((0, 0), (1, 1))), Interrupt()]
    defaults: dict[str, Any] = {
        "validation": counting(2, start=30),
        "steps": 8,
        "learning_rate": 1e-2,
        "rules": rules,
        "gradient_accumulation": 2,
        "evaluate_every": 2,
        "seed": 3,
        "out": out,
    }
    return train(model, counting(5), **{**defaults, **settings})


def assert_equal_models(a: nn.Module, b: nn.Module) -> None:
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


# -- what it does ------------------------------------------------------------------------------------------------------


def test_training_lowers_the_validation_loss_and_keeps_the_best() -> None:
    model = llama().eval()
    result = train(
        model, counting(10), validation=counting(2, start=21), steps=60, learning_rate=2e-2, evaluate_every=20
    )
    losses = {step.step: step.validation for step in result.history if step.validation is not None}
    assert list(losses) == [0, 20, 40, 60] and result.steps == 60
    assert result.validation == min(loss for step, loss in losses.items() if step) == losses[result.best_step]
    assert result.validation < 0.3 * losses[0]
    total = 0.0
    with torch.no_grad():
        for batch in counting(2, start=21):  # equal sizes: the mean of means is the mean
            logits = model.double()(**batch).logits
            total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())) / 2
    assert result.validation == pytest.approx(total, rel=1e-5)
    assert not model.training and result.kept == "best" and result.to_dict()["history"][0]["loss"] is None
    assert "validation loss" in [column.header for column in result.table().columns]


def test_the_best_weights_are_kept_where_training_goes_wrong() -> None:
    """A learning rate that overshoots at the end: the weights of the best step come back, or the last on demand."""
    both = {}
    for keep in ("best", "last"):
        model = llama()
        result = train(
            model,
            counting(6),
            validation=counting(2, start=21),
            steps=12,
            learning_rate=0.3,
            evaluate_every=1,
            schedule="constant",
            keep=keep,  # type: ignore[arg-type]
        )
        both[keep] = (result, model)
    best, last = both["best"][0], both["last"][0]
    assert best.best_step == last.best_step < 12 and best.validation < last.validation
    assert last.validation == last.history[-1].validation


def test_accumulation_is_one_large_batch() -> None:
    """Two batches of different lengths, accumulated, against one padded batch: the same update in closed form."""
    seen: list[dict[str, Tensor]] = []

    class Look(TrainingRule):
        def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
            class Attached(AttachedRule):
                def after_step(self, progress: float) -> None:
                    seen.append({name: p.grad.clone() for name, p in model.named_parameters()})

            return Attached()

    ids = torch.randint(0, 20, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    single = [{"input_ids": ids, "attention_mask": mask}]
    parts = [{"input_ids": ids[:1, :3]}, {"input_ids": ids[1:]}]
    for batches, accumulation in ((single, 1), (parts, 2)):
        model = llama().double()
        model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.0
        train(
            model,
            batches,
            validation=counting(1),
            steps=1,
            gradient_accumulation=accumulation,
            rules=[Look()],
            max_grad_norm=None,
        )
    for name, gradient in seen[0].items():
        assert torch.allclose(gradient, seen[1][name], rtol=1e-9, atol=1e-12), name


def test_labels_and_losses_of_other_models() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 4), torch.randint(0, 3, (32,))
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    pairs = [{"input": x[i : i + 8], "labels": y[i : i + 8]} for i in range(0, 32, 8)]
    result = train(model, pairs, validation=pairs[:1], epochs=20, learning_rate=3e-2, gradient_accumulation=3)
    assert result.steps == 20 * 2 and result.validation < 0.6 * result.history[0].validation
    with torch.no_grad():
        assert result.validation == pytest.approx(F.cross_entropy(model(x[:8]), y[:8]).item(), rel=1e-6)

    def own(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - 1).square().mean()

    model = nn.Sequential(nn.Linear(4, 2))
    result = train(model, [x[:8], x[8:]], validation=x, steps=50, learning_rate=0.1, loss=own)
    assert result.validation < 0.05
    with pytest.raises(DataError, match="labels"):
        train(nn.Sequential(nn.Linear(4, 2)), [x], validation=[x.clone()], steps=1)


def test_only_weight_matrices_decay() -> None:
    class Learned(nn.Module):
        weight_decay = False

        def __init__(self) -> None:
            super().__init__()
            self.coefficients, self.epsilon = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.tensor(0.1))

    class Kept(KeepsDtype):
        keeps = ("coefficients",)

        def __init__(self) -> None:
            super().__init__()
            self.coefficients, self.matrix = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))

    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "linear": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "act": Learned(),
            "kept": Kept(),
            "prelu": nn.PReLU(4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, others = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert {names[id(p)] for p in decaying["params"]} == {"embedding.weight", "linear.weight", "kept.matrix"}
    expected = {"linear.bias", "norm.weight", "norm.bias", "act.coefficients", "act.epsilon", "prelu.weight"}
    expected.add("kept.coefficients")
    assert {names[id(p)] for p in others["params"]} == expected
    tied = llama()
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    given = [p for group in parameter_groups(tied, 0.1) for p in group["params"]]
    assert len(given) == len({id(p) for p in given}) == len(list(tied.parameters()))


def test_schedules() -> None:
    def rates(kind: str, warmup: float) -> list[float]:
        settings = Settings(10, 1.0, 1, warmup, kind, 0.0, "no", 0, None, 1, 1, 1, 1)
        return [rate(step, settings) for step in range(10)]

    assert rates("constant", 0.0) == [1.0] * 10
    assert rates("linear", 0.2) == pytest.approx([0.5, 1.0] + [1 - k / 8 for k in range(8)])
    assert rates("cosine", 0.2) == pytest.approx([0.5, 1.0] + [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)])
    assert count_steps(None, 3, batches=5, size=2) == 9 and steps_per_epoch(5, 2, 1) == 3
    assert steps_per_epoch(5, 4, 2) == 1 and steps_per_epoch(6, 4, 2) == 2


def test_mixed_precision_leaves_no_trace() -> None:
    """bf16, then none, in one process; the model's own forward is not replaced."""
    AcceleratorState._reset_state(reset_partial_state=True)  # transformers' Trainer, in other tests, leaves its own
    for precision in ("bf16", "no"):
        model = llama()
        result = train(
            model,
            counting(4),
            validation=counting(2, start=21),
            steps=20,
            learning_rate=2e-2,
            mixed_precision=precision,  # type: ignore[arg-type]
        )
        assert result.validation < result.history[0].validation
        assert "forward" not in model.__dict__ and model.lm_head.weight.dtype == torch.float32


# -- random numbers ----------------------------------------------------------------------------------------------------


def noisy(kinds: str) -> Callable[[nn.Module, Any], Tensor]:
    """A loss that draws from the global generators, in validation too; its gradient depends on what it drew."""
    draws = {"t": lambda: float(torch.rand(())), "n": lambda: float(np.random.randn()), "p": random.random}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["input_ids"]).logits.square().mean() * (1 + sum(draws[kind]() for kind in kinds))

    return loss


@pytest.mark.parametrize("kinds", ["t", "n", "p", "tnp"])
def test_how_often_is_measured_changes_nothing_that_is_trained(kinds: str) -> None:
    """Dropout on, a penalty, and a loss with random numbers: against a run that measures only at its ends."""
    STOP.update(at=-1, crash=False)
    plain = llama()
    options = {"loss": noisy(kinds), "keep": "last"}
    expected = run(plain, None, evaluate_every=8, **options)
    for every in (1, 3):
        model = llama()
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        found = run(model, None, evaluate_every=every, **options)
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
        assert_equal_models(model, plain)
        assert [step.loss for step in found.history] == [step.loss for step in expected.history]
        assert (found.history[0].validation, found.validation) == (expected.history[0].validation, expected.validation)


def test_validations_draw_the_same_numbers() -> None:
    """Without a change of the weights the validation loss is one number, however many draws lie between."""
    STOP.update(at=-1, crash=False)
    still = run(llama(), None, evaluate_every=1, loss=noisy("tnp"), learning_rate=1e-30, weight_decay=0.0)
    assert len({step.validation for step in still.history}) == 1 and len(still.history) == 9


def test_a_loss_with_random_numbers_is_resumed_to_the_bit(tmp_path: Path) -> None:
    whole, model = llama(), llama()
    STOP.update(at=-1, crash=False)
    run(whole, None, loss=noisy("tnp"))
    STOP.update(at=3)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut", loss=noisy("tnp"))
    STOP.update(at=-1)
    for draw in (torch.rand, np.random.rand, lambda n: [random.random() for _ in range(n)]):
        draw(7)  # nothing outside the state matters
    model = llama()
    run(model, tmp_path / "cut", resume=True, loss=noisy("tnp"))
    assert_equal_models(model, whole)


# -- interrupted and resumed -------------------------------------------------------------------------------------------


def test_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Dropout on, accumulation, best weights, moments, rules: after Ctrl-C in step 3 all go on to the bit."""
    whole = llama()
    STOP.update(at=-1, crash=False)
    expected = run(whole, tmp_path / "whole")
    total = AttachedInterrupt.last.total

    model = llama()
    STOP.update(at=3, crash=False)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt, match="after step 3"):
        run(model, tmp_path / "cut")
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are not touched
    assert AttachedInterrupt.last.detached and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "cut").exists()
    assert {p.suffix for p in (tmp_path / "cut.training").iterdir()} == {".json", ".safetensors", ".sha256"}

    STOP.update(at=-1)
    torch.manual_seed(99)  # nothing outside the state matters
    model = llama()
    result = run(model, tmp_path / "cut", resume=True)
    assert_equal_models(model, whole)
    assert torch.equal(AttachedInterrupt.last.total, total)
    assert [step.__dict__ for step in result.history] == [step.__dict__ for step in expected.history]
    assert result.best_step == expected.best_step

    assert not (tmp_path / "cut.training").exists()
    assert json.loads((tmp_path / "cut" / "training.json").read_text())["steps"] == 8
    assert_equal_models(checkpoint.load(tmp_path / "cut"), whole)


def test_a_crash_between_saves_goes_on_from_the_last_one(tmp_path: Path) -> None:
    whole = llama()
    STOP.update(at=-1, crash=False)
    run(whole, None, keep="best")
    model = llama()
    STOP.update(at=5, crash=True)
    with pytest.raises(RuntimeError, match="killed"):
        run(model, tmp_path / "cut", keep="best")
    STOP.update(at=-1)
    model = llama()
    run(model, tmp_path / "cut", keep="best", resume=True)
    assert_equal_models(model, whole)


def test_another_training_cannot_be_resumed(tmp_path: Path) -> None:
    STOP.update(at=3, crash=False)
    with pytest.raises(KeyboardInterrupt):
        run(llama(), tmp_path / "cut")
    STOP.update(at=-1)
    for settings, message in (
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"steps": 9}, "steps"),
        ({"rules": [Interrupt()]}, "rules"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(llama(), tmp_path / "cut", resume=True, **settings)
    wider = LlamaConfig(**{**llama().config.to_dict(), "intermediate_size": 32})
    with pytest.raises(CheckpointError, match="another model"):
        run(LlamaForCausalLM(wider), tmp_path / "cut", resume=True)
    with pytest.raises(CheckpointError, match="resume=True"):
        run(llama(), tmp_path / "cut")
    values = tmp_path / "cut.training" / "tensors.safetensors"
    values.write_bytes(values.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        run(llama(), tmp_path / "cut", resume=True)
    assert run(llama(), tmp_path / "cut", overwrite=True).steps == 8


def test_folders_are_not_lost(tmp_path: Path) -> None:
    STOP.update(at=-1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="exists"):
        run(llama(), tmp_path / "notes")
    with pytest.raises(CheckpointError, match="something else"):
        run(llama(), tmp_path / "notes", overwrite=True)
    with pytest.raises(CheckpointError, match="no state"):
        run(llama(), tmp_path / "none", resume=True)
    with pytest.raises(ValueError, match="out="):
        run(llama(), None, resume=True)
    run(llama(), tmp_path / "done", steps=1)
    with pytest.raises(CheckpointError, match="finished"):
        run(llama(), tmp_path / "done", steps=1, resume=True)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear"


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_nan_stops_with_the_step() -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 100, x.new_tensor(math.nan), self.linear(x))

    def of(x: Tensor) -> dict[str, Tensor]:
        return {"x": x, "labels": torch.zeros(4, dtype=torch.int64)}

    good, bad = torch.zeros(4, 2), torch.full((4, 2), 1000.0)
    model = Bad()
    with pytest.raises(NonFiniteError, match=r"loss of step \d+ \(batch 1\) is nan"):
        train(model, [of(good), of(bad)], validation=[of(good + 1)], steps=4)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    with pytest.raises(NonFiniteError, match="validation loss after step 0"):
        train(Bad(), [of(good)], validation=[of(bad)], steps=4)


def test_bad_data_and_settings() -> None:
    data, held_out = counting(2), counting(1, start=9)
    with pytest.raises(DataError, match="validation: none"):
        train(llama(), data, steps=1)
    with pytest.raises(DataError, match="it is the training data"):
        train(llama(), data, validation=data, steps=1)
    with pytest.raises(DataError, match="0 batches"):
        train(llama(), [], validation=held_out, steps=1)
    with pytest.raises(DataError, match="0 batches"):
        train(llama(), data, validation=iter([]), steps=1)
    with pytest.raises(DataError, match="context"):
        train(llama(), [{"input_ids": torch.ones(1, 17, dtype=torch.int64)}], validation=held_out, steps=1)
    empty = [{"input_ids": torch.ones(1, 4, dtype=torch.int64), "labels": torch.full((1, 4), -100)}]
    with pytest.raises(DataError, match="labels: all"):
        train(llama(), empty, validation=held_out, steps=1)
    with pytest.raises(ValueError, match="bfloat16"):
        train(llama().bfloat16(), data, validation=held_out, steps=1)
    with pytest.raises(ValueError, match="requires_grad"):
        train(llama().requires_grad_(False), data, validation=held_out, steps=1)
    for settings in (
        {"steps": None},
        {"epochs": 1},
        {"steps": 0},
        {"learning_rate": 0.0},
        {"gradient_accumulation": 0},
        {"warmup": 1.0},
        {"schedule": "steps"},
        {"weight_decay": -1.0},
        {"mixed_precision": "int8"},
        {"max_grad_norm": 0.0},
        {"evaluate_every": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            train(llama(), data, validation=held_out, **{"steps": 1, **settings})
