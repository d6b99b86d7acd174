"""The training loop: AdamW on accelerate, with a validation split, under training rules, and resumable to the bit.

    trained = train(model, batches, validation=held_out, steps=500, rules=[ActivationPenalty(weight=1e-3)], out="run")

One optimizer step takes `gradient_accumulation` batches per process; its loss is the mean over all their labels, as if
they were one batch, and the penalties of the rules are averaged over the batches. The order of the batches follows from
seed and epoch alone. With `out`, the state (weights, moments, random numbers, rules) is kept beside it in
`out.training`, as safetensors and JSON; when training ends, `out` is a folder that `actkit.load` reads, with the
history in `training.json`, and the state is removed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.core.edit import changes
from actkit.core.forward.hooks import evaluating
from actkit.core.ground import processes, whole_folder
from actkit.core.ground.errors import CheckpointError, NonFiniteError, ProcessError
from actkit.core.ground.offload import refuse_offloaded
from actkit.core.ground.progress import track
from actkit.core.ground.random_numbers import own_random_numbers, random_state, set_random_state
from actkit.core.ground.whole_file import write_whole
from actkit.core.recipe.rule import parse_rules
from actkit.core.recipe.runner import check_model
from actkit.core.recipe.stage import Keep, Precision, Schedule
from actkit.core.store import checkpoint
from actkit.core.store.tensor_files import read_values, write_values
from actkit.core.train.objective import Loss, Objective, mask_of, parameter_groups
from actkit.core.train.rules import AttachedRules, attached
from actkit.core.train.training_setup import (
    RECORD,
    Settings,
    check_folder,
    check_parameters,
    checked,
    count_steps,
    fingerprints,
    interruptible,
    modes_restored,
    one_accelerator,
    rate,
    sequences,
    state_folder,
    steps_per_epoch,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.table import Table


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingStep:
    """One optimizer step. loss: without penalty, in nats per label. gradient_norm: before clipping. validation: loss
    on the validation split after it, where it was measured. Step 0 is the model before training."""

    step: int
    loss: float | None = None
    penalty: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    validation: float | None = None


@dataclass(frozen=True)
class Trained:
    """A trained model. best_step: the one with the least validation loss (never step 0). kept: which weights the model
    has, 'best' or 'last'. validation: their loss, after the edits that rules finish with. folder: where the model was
    saved, if it was."""

    model: nn.Module
    history: tuple[TrainingStep, ...]
    best_step: int
    kept: Keep
    validation: float
    trainable: int
    seconds: float
    folder: Path | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps that were taken."""
        return self.history[-1].step

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as JSON takes it."""
        return {
            "steps": self.steps,
            "best_step": self.best_step,
            "kept": self.kept,
            "validation": self.validation,
            "trainable": self.trainable,
            "seconds": self.seconds,
            "folder": None if self.folder is None else str(self.folder),
            "history": [asdict(step) for step in self.history],
        }

    def table(self) -> Table:
        """The steps after which the validation loss was measured."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Training ({self.steps} steps, {self.trainable:,} parameters, {self.seconds:.0f} s; kept: {self.kept})"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("step", "loss", "penalty", "validation loss", "learning rate"):
            table.add_column(name, justify="right", no_wrap=True)
        for step in self.history:
            if step.validation is not None:
                numbers = (step.loss, step.penalty, step.validation, step.learning_rate)
                cells = ["" if number is None else f"{number:.4g}" for number in numbers]
                table.add_row(f"{step.step}{' *' if step.step == self.best_step else ''}", *cells)
        return table


# -- the loop ----------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    validation: Iterable[Any] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    learning_rate: float = 1e-4,
    rules: Any = (),
    gradient_accumulation: int = 1,
    warmup: float = 0.05,
    schedule: Schedule = "cosine",
    weight_decay: float = 0.01,
    mixed_precision: Precision = "no",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    max_grad_norm: float | None = 1.0,
    evaluate_every: int | None = None,
    keep: Keep | None = None,
    loss: Loss | None = None,
    progress: bool = True,
) -> Trained:
    """Train a model in place, where it lies (under `accelerate launch`, on the devices of its processes).

    batches: dicts of the model's keywords, or (input, labels). Labels are those of the batch; a language model without
    any learns the next token. validation: batches that are not trained on; needed. steps or epochs: how long; a step
    is one update of the weights. learning_rate: the peak; warmup: share of the steps in which it rises. rules: what
    `parse_rules` takes. weight_decay: of weight matrices (`parameter_groups`). max_grad_norm: gradients are scaled
    down to it; None: never. evaluate_every: steps between validations and saves, default a tenth of all. keep: weights
    to end with, default those of the least validation loss, or the last ones where a rule says so. loss: of (model,
    batch), a mean over the batch; batches then count equally. It may draw from the global random generators of torch,
    NumPy and Python: they begin with `seed`, in each validation anew, and are afterwards as before. out: folder for
    state and result; an interrupted training (Ctrl-C, a kill) goes on with the same call and resume=True. overwrite:
    replace what is in `out`.

    Raises ValueError for settings out of bounds or 16-bit parameters, UnsupportedModelError for a model that is
    compiled, sharded or offloaded, ProcessError inside `core.ground.processes.together`, DataError for unusable data,
    NonFiniteError where loss or gradient is NaN or Inf (naming the step), CheckpointError where `out` holds something
    else or its state is of another training, and what the rules raise.
    """
    started = time.perf_counter()
    rules = parse_rules(rules)
    if processes.several():
        raise ProcessError("train: it shares its batches out by itself; call it under torchrun, outside of `together`.")
    refuse_offloaded(model, "training changes all weights in place")
    check_model(model)
    if out is not None:
        checkpoint.check_savable(model)
    check_parameters(model)
    training, held_out = sequences(model, batches, validation)
    folder = None if out is None else Path(out)
    check_folder(folder, resume, overwrite)
    if folder is not None and not resume:
        whole_folder.discard(state_folder(folder))  # of a training that is given up
    with ExitStack() as stack:
        accelerator = stack.enter_context(one_accelerator(model, mixed_precision))
        settings = Settings(
            steps=count_steps(steps, epochs, len(training), gradient_accumulation * accelerator.num_processes),
            learning_rate=learning_rate,
            gradient_accumulation=gradient_accumulation,
            warmup=warmup,
            schedule=schedule,
            weight_decay=weight_decay,
            mixed_precision=mixed_precision,
            seed=seed,
            max_grad_norm=max_grad_norm,
            evaluate_every=0,
            processes=accelerator.num_processes,
            batches=len(training),
            validation_batches=len(held_out),
        )
        settings = checked(settings, evaluate_every)
        device = next(model.parameters()).device
        stack.enter_context(own_random_numbers(device, seed))
        optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate)
        described = [{type(rule).__name__: rule.model_dump(mode="json")} for rule in rules]
        keep = keep or ("last" if any(rule.keep == "last" for rule in rules) else "best")
        before = changes.of(model)
        with attached(rules, model, optimizer, training[0]) as running, ExitStack() as wrapped:
            run = _Loop(model, training, held_out, settings, optimizer, running, accelerator, loss, folder, described)
            wrapped.enter_context(modes_restored(model))  # before rules finish: new modules are in their mode then
            wrapped.callback(run.unwrap)
            if resume:
                run.restore()
            run.go(progress)
            result = run.finish(keep)
        if changes.of(model) is not before:  # by edits that a rule finished with
            result = replace(result, validation=run.validation_loss())
        result = replace(result, seconds=time.perf_counter() - started)
    if folder is not None and accelerator.is_main_process:
        checkpoint.save(model, folder, overwrite=True)
        write_whole(folder / RECORD, json.dumps(result.to_dict(), indent=1))
        whole_folder.discard(state_folder(folder))
    return result


class _Loop:
    """One training: what changes from step to step, and how it is saved."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        validation: Sequence[Any],
        settings: Settings,
        optimizer: torch.optim.Optimizer,
        rules: AttachedRules,
        accelerator: Accelerator,
        loss: Loss | None,
        folder: Path | None,
        described: list[dict[str, Any]],
    ) -> None:
        self.model, self.batches, self.validation, self.settings = model, batches, validation, settings
        self.inner, self.rules, self.accelerator, self.folder = optimizer, rules, accelerator, folder
        self.described = described
        self.objective = Objective(model, loss)
        distributed = accelerator.num_processes > 1
        self.called = accelerator.prepare(model) if distributed else model
        self.optimizer: Any = accelerator.prepare(optimizer)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.step = 0
        self.history: list[TrainingStep] = []
        self.best: tuple[float, int, dict[str, Tensor]] | None = None

    def go(self, progress: bool) -> None:
        remaining = range(self.step, self.settings.steps)
        with interruptible(self.folder is not None) as interrupted:
            for _ in track(remaining, "Training", enabled=progress and self.accelerator.is_main_process):
                self.evaluate_if_due()
                if interrupted():
                    break
                self.update()
                if interrupted():
                    break
            else:
                self.evaluate_if_due()
            if interrupted():
                self.save()
                raise KeyboardInterrupt(f"stopped after step {self.step}; go on from {self.folder} with resume=True")

    # -- one step

    def update(self) -> None:
        settings, accelerator = self.settings, self.accelerator
        learning_rate = settings.learning_rate * rate(self.step, settings)
        for each in self.inner.param_groups:
            each["lr"] = learning_rate
        self.rules.before_step(self.step / settings.steps)
        self.model.train()
        group = self._group()
        labels = [self.objective.labels(self.batches[index]) for index in group]
        mine = range(accelerator.process_index, len(group), accelerator.num_processes)
        total_loss, total_penalty, penalised = 0.0, 0.0, False
        for place in mine:
            batch = self.batches[group[place]]
            last = place == mine[-1]
            with nullcontext() if last or accelerator.num_processes == 1 else accelerator.no_sync(self.called):
                with accelerator.autocast():
                    loss = self.objective(self.called, batch)
                    penalty = self.rules.penalty(mask_of(batch, loss.device))
                self._check_finite("loss", loss, group[place])
                share = labels[place] / sum(labels)
                objective = loss * (share * accelerator.num_processes)
                total_loss += float(loss.detach()) * share
                if penalty is not None:
                    self._check_finite("penalty", penalty, group[place])
                    objective = objective + penalty.to(loss.device) / len(mine)
                    total_penalty, penalised = total_penalty + float(penalty.detach()) / len(mine), True
                accelerator.backward(objective)
        bound = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
        norm = accelerator.clip_grad_norm_(self.parameters, bound)
        if settings.mixed_precision != "fp16":  # there the scaler skips such steps
            self._check_finite("gradient", norm)
        self.optimizer.step()
        self.rules.after_step((self.step + 1) / settings.steps)
        self.optimizer.zero_grad()
        self.step += 1
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(torch.tensor([total_loss, total_penalty], device=norm.device), "sum")
            total_loss, total_penalty = float(sums[0]), float(sums[1]) / accelerator.num_processes
        penalties = total_penalty if penalised else None
        self.history.append(TrainingStep(self.step, total_loss, penalties, learning_rate, float(norm)))

    def _group(self) -> list[int]:
        """Indices of the batches of this step, those of all processes."""
        size = self.settings.gradient_accumulation * self.settings.processes
        per_epoch = steps_per_epoch(len(self.batches), size, self.settings.processes)
        epoch, place = divmod(self.step, per_epoch)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.batches), generator=generator).tolist()
        group = order[place * size : (place + 1) * size]
        return group[: len(group) - len(group) % self.settings.processes]  # each process gets as many

    def _check_finite(self, what: str, value: Tensor, batch: int | None = None) -> None:
        number = float(value.detach())
        if math.isfinite(number):
            return
        saved = (
            "" if self.folder is None else f" The state before is in {state_folder(self.folder)}, if any was saved yet."
        )
        where = "" if batch is None else f" (batch {batch})"
        raise NonFiniteError(
            f"training: the {what} of step {self.step + 1}{where} is {number}; lower learning_rate, raise "
            f"warmup, or look at the batch.{saved}"
        )

    # -- validation and state

    def evaluate_if_due(self) -> None:
        settings = self.settings
        due = self.step % settings.evaluate_every == 0 or self.step == settings.steps
        if not due or (self.history and self.history[-1].validation is not None):
            return
        loss = self.validation_loss()
        if self.step == 0:
            self.history.append(TrainingStep(0, validation=loss))
            return
        self.history[-1] = TrainingStep(**{**asdict(self.history[-1]), "validation": loss})
        if self.best is None or loss < self.best[0]:
            copies = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(self.model).items()}
            self.best = (loss, self.step, copies)
        self.save()

    def validation_loss(self) -> float:
        """Nats per label on the validation split, of the weights as they are."""
        # With numbers of its own, the same each time: whether a step is measured does not change what is trained.
        own = own_random_numbers(self.parameters[0].device, self.settings.seed)
        with own, evaluating(self.model), self.accelerator.autocast():
            counts = [self.objective.labels(batch) for batch in self.validation]
            losses = [float(self.objective(self.model, batch)) for batch in self.validation]
        loss = math.fsum(count * each for count, each in zip(counts, losses, strict=True)) / sum(counts)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"training: the validation loss after step {self.step} is {loss}; lower learning_rate."
            )
        return loss

    def save(self) -> None:
        """Write the state to `out.training`, whole or not at all."""
        if self.folder is None or not self.accelerator.is_main_process:
            return
        scaler = getattr(self.accelerator, "scaler", None)
        values: dict[str, Any] = {
            "settings": asdict(self.settings),
            "rules": self.described,
            "data": fingerprints(self.batches, self.validation),
            "step": self.step,
            "history": [asdict(step) for step in self.history],
            "best": None
            if self.best is None
            else {"loss": self.best[0], "step": self.best[1], "tensors": self.best[2]},
            "model": _tensors(self.model),
            "optimizer": self._moments(),
            "running": self.rules.state_dict(),
            "random": random_state(self.parameters[0].device),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        with whole_folder.complete_or_nothing(state_folder(self.folder)) as temporary:
            write_values(temporary, values)

    def restore(self) -> None:
        """Take the state of `out.training` back. Raises CheckpointError where it is of another training."""
        assert self.folder is not None
        whole_folder.recover(state_folder(self.folder))
        values = read_values(state_folder(self.folder))
        now = {**asdict(self.settings), "rules": self.described, "data": fingerprints(self.batches, self.validation)}
        for key, value in now.items():
            before = values["settings"].get(key, values.get(key))
            if before != value:
                raise CheckpointError(
                    f"resume: {key} is {value!r}, the training in {self.folder} began with {before!r}; give the same, "
                    f"or start anew with overwrite=True."
                )
        tensors = _tensors(self.model)
        _fill(tensors, values["model"], self.folder)
        names = {id(tensor): name for name, tensor in tensors.items()}
        for parameter in self.parameters:
            moments = values["optimizer"].get(names[id(parameter)])
            if moments is not None:
                self.inner.state[parameter] = {
                    key: value.to(parameter.device if value.dim() else "cpu") for key, value in moments.items()
                }
        self.rules.load_state_dict(values["running"])
        self.step, best = values["step"], values["best"]
        self.history = [TrainingStep(**step) for step in values["history"]]
        self.best = None if best is None else (best["loss"], best["step"], best["tensors"])
        if values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])  # type: ignore[union-attr]
        set_random_state(values["random"], self.parameters[0].device)

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        names = {id(tensor): name for name, tensor in _tensors(self.model).items()}
        return {names[id(parameter)]: dict(state) for parameter, state in self.inner.state.items() if state}

    def unwrap(self) -> None:
        """Undo what accelerate did to the model for several processes."""
        if self.called is not self.model:
            self.accelerator.unwrap_model(self.called, keep_fp32_wrapper=False)
            self.model.__dict__.pop("forward", None)  # of mixed precision; the class's own shows again

    def finish(self, keep: Keep) -> Trained:
        """The result, with the weights that are to be kept in the model; seconds: not known here."""
        assert self.best is not None
        last = self.history[-1].validation
        loss, step, copies = self.best
        if keep == "best":
            _fill(_tensors(self.model), copies, self.folder)
        validation = loss if keep == "best" else last
        assert validation is not None
        size = sum(parameter.numel() for parameter in self.parameters)
        return Trained(self.model, tuple(self.history), step, keep, validation, size, 0.0, self.folder)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training can change: trainable parameters, each once, and buffers that are saved."""
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict(keep_vars=True)
    return found | {name: tensor for name, tensor in state.items() if name not in parameters}


@torch.no_grad()
def _fill(tensors: dict[str, Tensor], values: dict[str, Tensor], folder: Path | None) -> None:
    if set(tensors) != set(values) or any(tensors[name].shape != values[name].shape for name in tensors):
        different = sorted(set(tensors) ^ set(values))[:5] or "their shapes"
        raise CheckpointError(f"resume: {folder} is of another model: {different} differ; pass the same model.")
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
