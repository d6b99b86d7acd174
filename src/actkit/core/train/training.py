"""The training loop: on accelerate, with a validation split, under training rules, and resumable to the bit.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.core.edit import changes
from actkit.core.forward.batch import mask_of, reads_beyond
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.forward.stream import Stream
from actkit.core.ground import processes, whole_folder
from actkit.core.ground.errors import CheckpointError, NonFiniteError, ProcessError
from actkit.core.ground.offload import refuse_offloaded
from actkit.core.ground.progress import track
from actkit.core.ground.random_numbers import own_random_numbers, random_state, set_random_state
from actkit.core.ground.whole_file import write_whole
from actkit.core.recipe.rule import parse_rules
from actkit.core.recipe.runner import check_model
from actkit.core.recipe.schedule import ScheduleSettings
from actkit.core.recipe.stage import Keep, Precision
from actkit.core.store import checkpoint
from actkit.core.store.tensor_files import read_values, write_values
from actkit.core.train.choice import Trainable, chooses, trained_parameters
from actkit.core.train.objective import Loss, Objective
from actkit.core.train.optimizers import (
    Optimizer,
    chosen_optimizer,
    describe,
    make_optimizer,
    optimizer_state,
    restore_optimizer,
)
from actkit.core.train.rules import AttachedRules, attached
from actkit.core.train.score import Score
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
    prepare_modes,
    rate,
    refuse_integers,
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
    """One optimizer step; step 0 is the model before training.

    Attributes:
        step: its number.
        loss: without penalty, in nats per label.
        penalty: what the rules added to it.
        learning_rate: of the parameters that `learning_rates` does not name.
        gradient_norm: before clipping.
        validation: loss on the validation split after it, if it was measured.
        score: by which the best step is found, if it is not the validation loss and was measured.
        reports: what each rule had to say of it, by '0.name', if it was validated.
    """

    step: int
    loss: float | None = None
    penalty: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    validation: float | None = None
    score: float | None = None
    reports: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        model: the one that was given.
        history: the steps.
        best_step: the one with the best score, by default the least validation loss; never step 0.
        kept: which weights the model has, 'best' or 'last'.
        validation: their validation loss, after the edits that rules finish with.
        trainable: how many numbers were trained.
        seconds: it took.
        folder: that the model was saved to, if it was.
        beyond_context: whether rows may have been longer than the model's context (`load_data` was told so).
        ended: why a rule ended it before its last step; None if none did.
    """

    model: nn.Module
    history: tuple[TrainingStep, ...]
    best_step: int
    kept: Keep
    validation: float
    trainable: int
    seconds: float
    folder: Path | None = None
    beyond_context: bool = False
    ended: str | None = None

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
            "beyond_context": self.beyond_context,
            "ended": self.ended,
            "history": [asdict(step) for step in self.history],
        }

    def table(self) -> Table:
        """The steps after which the validation loss was measured."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        beyond = "; rows beyond the context" if self.beyond_context else ""
        beyond += "" if self.ended is None else f"; ended: {self.ended}"
        about = f"{self.steps} steps, {self.trainable:,} parameters, {self.seconds:.0f} s; kept: {self.kept}{beyond}"
        title = f"Training ({about})"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        scored = any(step.score is not None for step in self.history)
        names = ["step", "loss", "penalty", "validation loss", *["score"] * scored, "learning rate"]
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for step in self.history:
            if step.validation is not None:
                numbers = [step.loss, step.penalty, step.validation, *[step.score] * scored, step.learning_rate]
                cells = ["" if number is None else f"{number:.4g}" for number in numbers]
                table.add_row(f"{step.step}{' *' if step.step == self.best_step else ''}", *cells)
        return table


# -- the loop ----------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    batches: Iterable[Any] | Stream,
    *,
    validation: Iterable[Any] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    learning_rate: float = 1e-4,
    learning_rates: Mapping[str, float] | None = None,
    optimizer: Optimizer = "adamw",
    trainable: Trainable | None = None,
    rules: Any = (),
    gradient_accumulation: int = 1,
    warmup: float = 0.05,
    schedule: Any = "cosine",
    weight_decay: float = 0.01,
    mixed_precision: Precision = "no",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    max_grad_norm: float | None = 1.0,
    evaluate_every: int | None = None,
    keep: Keep | None = None,
    score: Any = None,
    loss: Loss | None = None,
    write: Callable[[nn.Module, Path], object] | None = None,
    progress: bool = True,
) -> Trained:
    """Train a model in place.

    The model stays on its device; under `accelerate launch` it is on those of its processes. An interrupted training
    (Ctrl-C, a kill) goes on with the same call and `resume=True`, and ends as if nothing had happened.

    Data:

    - A batch holds the model's keywords, and "labels". A language model without labels learns the next token.
    - The global random generators of torch, NumPy and Python begin with `seed`, in each validation anew, and are
      afterwards as before. So dropout, and a loss that draws, train alike however often is validated.

    Args:
        model: in float32, or with 16-bit parameters frozen.
        batches: what is trained on, in an order that follows from the seed; or a stream.
        validation: batches that are measured and not trained on; needed.
        steps: updates of the weights; or give `epochs`.
        epochs: passes over the batches.
        learning_rate: the peak.
        learning_rates: other peaks for some parameters, by a pattern of their names such as '*norm*'; the first that
            fits counts.
        optimizer: a class of torch.optim, 'sgd:momentum=0.9' or {'sgd': {'momentum': 0.9}}; or a function of parameter
            groups that makes one. A rule may bring its own.
        trainable: the parameters that train: names, patterns, or a function from the model to these; those that rules
            name train too. None: all that require a gradient.
        rules: what `parse_rules` takes.
        gradient_accumulation: batches of a step.
        warmup: share of the steps in which the rate rises.
        schedule: its course after that: 'cosine', 'linear', 'constant' or 'wsdc:stable=0.6,decay=0.2'
            (`core/recipe/schedule.py`).
        weight_decay: of weight matrices (`parameter_groups`), in the way of the optimizer.
        mixed_precision: 'no', 'bf16' or 'fp16'.
        seed: of the order of the batches and of everything random.
        out: folder for state and result.
        resume: go on with the state there.
        overwrite: replace what is there.
        max_grad_norm: gradients are scaled down to it; None: never.
        evaluate_every: steps between validations and saves; by default a tenth of all.
        keep: weights to end with, 'best' or 'last'; by default the best, or the last if a rule says so.
        score: by which a step is the best: a metric of the model's task with its direction, 'accuracy:better=higher',
            or a `Score` with a function. None: the validation loss, the lower the better.
        loss: of (model, batch), a mean over the batch; batches then count equally.
        write: of (model, folder), which writes `out` at the end, over what is there; by default as `actkit.load` reads
            it.
        progress: show a bar.

    Returns:
        The model with its history.

    Raises:
        ValueError: a setting is out of bounds, a trained parameter has 16 bits, or nobody chose what trains and weights
            are integers.
        UnsupportedModelError: the model is compiled, sharded or offloaded.
        ProcessError: it is called inside `core.ground.processes.together`.
        DataError: the data cannot be used.
        NonFiniteError: loss or gradient is NaN or Inf; the text names the step.
        CheckpointError: `out` holds something else, or its state is of another training.
    """
    started = time.perf_counter()
    rules = parse_rules(rules)
    optimizer = chosen_optimizer(rules, optimizer)
    if processes.several():
        raise ProcessError("train: it shares its batches out by itself; call it under torchrun, outside of `together`.")
    refuse_offloaded(model, "training changes all weights in place")
    check_model(model)
    if out is not None and write is None:
        checkpoint.check_savable(model)
    folder = None if out is None else Path(out)
    with ExitStack() as stack:
        if not chooses(rules, trainable):
            refuse_integers(model)
        stack.enter_context(trained_parameters(model, rules, trainable))
        if not (rules and chooses(rules, None)):  # a rule may add all that trains; asked again once it is attached
            check_parameters(model)
        training, held_out = sequences(model, batches, validation, loss)
        check_folder(folder, resume, overwrite)
        if folder is not None and not resume:
            whole_folder.discard(state_folder(folder))  # of a training that is given up
        accelerator = stack.enter_context(one_accelerator(model, mixed_precision))
        of_epoch = 0 if isinstance(training, Stream) else len(training)
        judge = None if score is None else Score.of(score)
        settings = Settings(
            steps=count_steps(steps, epochs, of_epoch, gradient_accumulation * accelerator.num_processes),
            learning_rate=learning_rate,
            gradient_accumulation=gradient_accumulation,
            warmup=warmup,
            schedule=ScheduleSettings.parse(schedule).dump(),
            weight_decay=weight_decay,
            mixed_precision=mixed_precision,
            seed=seed,
            max_grad_norm=max_grad_norm,
            evaluate_every=0,
            processes=accelerator.num_processes,
            batches=of_epoch,
            validation_batches=len(held_out),
            optimizer=describe(optimizer),
            learning_rates=dict(learning_rates or {}),
            trainable=_described(trainable),
            score=None if judge is None else judge.describe(),
        )
        settings = checked(settings, evaluate_every)
        device = next(model.parameters()).device
        stack.enter_context(own_random_numbers(device, seed))
        described = [{type(rule).__name__: rule.model_dump(mode="json")} for rule in rules]
        keep = keep or ("last" if any(rule.keep == "last" for rule in rules) else "best")
        before = changes.of(model)
        rates: dict[str, Any] = {
            "learning_rate": learning_rate,
            "learning_rates": learning_rates,
            "weight_decay": weight_decay,
        }
        made = make_optimizer(optimizer, model, **rates)
        with attached(rules, model, made, training[0], **rates) as running, ExitStack() as wrapped:
            check_parameters(model)  # those that a rule has unfrozen too
            run = _Loop(model, training, held_out, settings, made, running, accelerator, loss, judge, folder, described)
            wrapped.enter_context(modes_restored(model))  # before rules finish: new modules are in their mode then
            wrapped.callback(run.unwrap)
            if resume:
                run.restore()
            run.go(progress)
            result = run.finish(keep)
        if changes.of(model) is not before:  # by edits that a rule finished with
            result = replace(result, validation=run.measured()[0])
        beyond = reads_beyond(batches) or reads_beyond(validation)
        result = replace(result, seconds=time.perf_counter() - started, beyond_context=beyond)
    if folder is not None and accelerator.is_main_process:
        if write is None:
            checkpoint.save(model, folder, overwrite=True)
        else:
            write(model, folder)
        write_whole(folder / RECORD, json.dumps(result.to_dict(), indent=1))
        whole_folder.discard(state_folder(folder))
    return result


def _described(trainable: Trainable | None) -> Any:
    """What says which parameters train, as JSON keeps it."""
    if callable(trainable):
        return f"{trainable.__module__}.{getattr(trainable, '__qualname__', type(trainable).__name__)}"
    return trainable if trainable is None or isinstance(trainable, str) else list(trainable)


@dataclass(frozen=True)
class _Best:
    """The best step so far, and a copy of what training had changed after it."""

    score: float
    loss: float
    step: int
    tensors: dict[str, Tensor]


class _Loop:
    """One training: what changes from step to step, and how it is saved."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any] | Stream,
        validation: Sequence[Any],
        settings: Settings,
        optimizer: torch.optim.Optimizer,
        rules: AttachedRules,
        accelerator: Accelerator,
        loss: Loss | None,
        score: Score | None,
        folder: Path | None,
        described: list[dict[str, Any]],
    ) -> None:
        self.model, self.batches, self.validation, self.settings = model, batches, validation, settings
        self.inner, self.rules, self.accelerator, self.folder = optimizer, rules, accelerator, folder
        self.described, self.score = described, score
        self.output: Any = None  # of the last forward pass, for the penalties
        self.objective = Objective(model, loss)
        distributed = accelerator.num_processes > 1
        self.called = accelerator.prepare(model) if distributed else model
        self.optimizer: Any = accelerator.prepare(optimizer)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.step = 0
        self.history: list[TrainingStep] = []
        self.best: _Best | None = None

    def go(self, progress: bool) -> None:
        remaining = range(self.step, self.settings.steps)
        watched = hooked(self.model, after={"": self._see}) if self.described else nullcontext()
        with watched, interruptible(self.folder is not None) as interrupted:
            for _ in track(remaining, "Training", enabled=progress and self.accelerator.is_main_process):
                self.evaluate_if_due()
                if interrupted() or self.over is not None:
                    break
                self.update()
                if interrupted():
                    break
            else:
                self.evaluate_if_due()
            if interrupted():
                self.save()
                raise KeyboardInterrupt(f"stopped after step {self.step}; go on from {self.folder} with resume=True")

    @property
    def over(self) -> str | None:
        """Why a rule ends the training here."""
        return self.rules.over() if 0 < self.step < self.settings.steps else None

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.output = output if torch.is_grad_enabled() else None

    # -- one step

    def update(self) -> None:
        settings, accelerator = self.settings, self.accelerator
        share_of_peak, done = rate(self.step, settings), self.step / settings.steps
        for each in self.inner.param_groups:
            each["lr"] = each.setdefault("initial_lr", each["lr"]) * share_of_peak
        self.rules.before_step(done)
        prepare_modes(self.model)
        group = self._group()
        own = self.objective.loss is not None  # its batches count equally, and are read once
        labels = [1 if own else self.objective.labels(self.batches[index]) for index in group]
        mine = range(accelerator.process_index, len(group), accelerator.num_processes)
        total_loss, total_penalty, penalised = 0.0, 0.0, False
        for place in mine:
            batch = self.batches[group[place]]
            last = place == mine[-1]
            with nullcontext() if last or accelerator.num_processes == 1 else accelerator.no_sync(self.called):
                with accelerator.autocast():
                    loss = self.objective(self.called, batch)
                    penalty = self.rules.penalty(mask_of(batch, loss.device), batch, self.output)
                self.output = None
                self._check_finite("loss", loss, group[place])
                share = labels[place] / sum(labels)
                objective = loss * (share * accelerator.num_processes)
                total_loss += float(loss.detach()) * share
                if penalty is not None:
                    self._check_finite("penalty", penalty, group[place])
                    objective = objective + penalty.to(loss.device) / len(mine)
                    total_penalty, penalised = total_penalty + float(penalty.detach()) / len(mine), True
                accelerator.backward(objective)
        accelerator.unscale_gradients(self.optimizer)
        self.rules.after_backward(done)
        bound = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, bound)
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
        learning_rate = settings.learning_rate * share_of_peak
        self.history.append(TrainingStep(self.step, total_loss, penalties, learning_rate, float(norm)))

    def _group(self) -> list[int]:
        """Numbers of the batches of this step, those of all processes."""
        size = self.settings.gradient_accumulation * self.settings.processes
        if isinstance(self.batches, Stream):
            return list(range(self.step * size, (self.step + 1) * size))
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
        which = "" if batch is None else f" (batch {batch})"
        raise NonFiniteError(
            f"training: the {what} of step {self.step + 1}{which} is {number}; lower learning_rate, raise "
            f"warmup, or look at the batch.{saved}"
        )

    # -- validation and state

    def evaluate_if_due(self) -> None:
        settings = self.settings
        due = self.step % settings.evaluate_every == 0 or self.step == settings.steps or self.over is not None
        if not due or (self.history and self.history[-1].validation is not None):
            return
        reports = self.rules.report() if self.step else {}
        loss, score = self.measured()
        if self.step == 0:
            self.history.append(TrainingStep(0, validation=loss, score=score))
            return
        self.history[-1] = replace(self.history[-1], validation=loss, score=score, reports=reports or None)
        number = loss if score is None else score
        lower = self.score is None or self.score.better == "lower"
        if self.best is None or (number < self.best.score if lower else number > self.best.score):
            copies = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(self.model).items()}
            self.best = _Best(number, loss, self.step, copies)
        self.save()

    def measured(self) -> tuple[float, float | None]:
        """Nats per label on the validation split, of the weights as they are; and the score if there is one."""
        # With numbers of its own, the same each time: whether a step is measured does not change what is trained.
        own = own_random_numbers(self.parameters[0].device, self.settings.seed)
        with own, evaluating(self.model), self.accelerator.autocast():
            counts = [self.objective.labels(batch) for batch in self.validation]
            losses = [float(self.objective(self.model, batch)) for batch in self.validation]
            score = None if self.score is None else float(self.score.measure(self.model, self.validation))
        loss = math.fsum(count * each for count, each in zip(counts, losses, strict=True)) / sum(counts)
        for name, number in (("loss", loss), ("score", score)):
            if number is not None and not math.isfinite(number):
                raise NonFiniteError(
                    f"training: the validation {name} after step {self.step} is {number}; lower learning_rate."
                )
        return loss, score

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
            "best": None if self.best is None else vars(self.best),
            "model": _tensors(self.model),
            "optimizer": optimizer_state(self.inner, self._names()),
            "running": self.rules.state_dict(),
            "random": random_state(self.parameters[0].device),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        with whole_folder.complete_or_nothing(state_folder(self.folder)) as temporary:
            write_values(temporary, values)

    def restore(self) -> None:
        """Take the state of `out.training` back. Raises CheckpointError if it is of another training."""
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
        restore_optimizer(self.inner, values["optimizer"], self._names())
        self.rules.load_state_dict(values["running"])
        self.step, best = values["step"], values["best"]
        self.history = [TrainingStep(**step) for step in values["history"]]
        self.best = None if best is None else _Best(**best)
        if values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])  # type: ignore[union-attr]
        set_random_state(values["random"], self.parameters[0].device)

    def _names(self) -> dict[int, str]:
        return {id(tensor): name for name, tensor in _tensors(self.model).items()}

    def unwrap(self) -> None:
        """Undo what accelerate did to the model for several processes."""
        if self.called is not self.model:
            self.accelerator.unwrap_model(self.called, keep_fp32_wrapper=False)
            self.model.__dict__.pop("forward", None)  # of mixed precision; the class's own shows again

    def finish(self, keep: Keep) -> Trained:
        """The result, with the weights that are to be kept in the model; seconds: not known here."""
        assert self.best is not None
        last = self.history[-1].validation
        if keep == "best":
            _fill(_tensors(self.model), self.best.tensors, self.folder)
        validation = self.best.loss if keep == "best" else last
        assert validation is not None
        size = sum(parameter.numel() for parameter in self.parameters)
        history = tuple(self.history)
        return Trained(self.model, history, self.best.step, keep, validation, size, 0.0, self.folder, ended=self.over)


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
