"""What a training needs before it starts and puts back when it ends: settings, data, folder, accelerate, Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from actkit.core.forward.batch import check_batch, reads_beyond, sequence_of
from actkit.core.forward.stream import Stream
from actkit.core.ground import whole_folder
from actkit.core.ground.errors import CheckpointError, DataError
from actkit.core.ground.fingerprint import fingerprint
from actkit.core.layers.weights import CodedWeight
from actkit.core.recipe.schedule import ScheduleSettings
from actkit.core.recipe.stage import Precision
from actkit.core.store import checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE, RECORD = ".training", "training.json"  # suffix of the state's folder; the history, in the finished one


@dataclass(frozen=True)
class Settings:
    """What must be the same when a training is resumed; `train` says what each is, `batches` is 0 for a stream."""

    steps: int
    learning_rate: float
    gradient_accumulation: int
    warmup: float
    schedule: Any
    weight_decay: float
    mixed_precision: str
    seed: int
    max_grad_norm: float | None
    evaluate_every: int
    processes: int
    batches: int
    validation_batches: int
    optimizer: Any = "adamw"
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    trainable: Any = None
    score: Any = None


def checked(settings: Settings, evaluate_every: int | None) -> Settings:
    """The settings, checked."""
    every = max(1, settings.steps // 10) if evaluate_every is None else evaluate_every
    norm = settings.max_grad_norm
    rates = settings.learning_rates
    bounds: dict[str, tuple[Any, bool, str]] = {
        "learning_rates": (rates, all(each > 0 for each in rates.values()), "numbers above 0, by patterns of names"),
        "learning_rate": (settings.learning_rate, settings.learning_rate > 0, "a number above 0"),
        "gradient_accumulation": (settings.gradient_accumulation, settings.gradient_accumulation >= 1, "1 or more"),
        "warmup": (settings.warmup, 0 <= settings.warmup < 1, "a share of the steps, 0 to below 1"),
        "weight_decay": (settings.weight_decay, settings.weight_decay >= 0, "0 or more"),
        "max_grad_norm": (norm, norm is None or norm > 0, "a number above 0, or None"),
        "evaluate_every": (every, every >= 1, "1 or more"),
        "seed": (settings.seed, settings.seed >= 0, "0 or more"),
    }
    for name, (value, fine, allowed) in bounds.items():
        if not fine:
            raise ValueError(f"{name}: {value!r} was given, allowed is {allowed}.")
    return Settings(**{**asdict(settings), "evaluate_every": every})


def count_steps(steps: int | None, epochs: int | None, batches: int, size: int) -> int:
    """The optimizer steps of a training that was given in steps or in epochs.

    Args:
        steps: as it was given.
        epochs: passes over the data.
        batches: of a pass; 0 for a stream, which has no end.
        size: batches of a step.

    Raises:
        ValueError: both or none are given, epochs of a stream, or a number that is not allowed.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"steps, epochs: {steps} and {epochs} were given; give one of the two.")
    given: Any = epochs if steps is None else steps
    if given < 1 or given != int(given):
        raise ValueError(f"{'epochs' if steps is None else 'steps'}: {given} was given, allowed is 1 or more, whole.")
    if epochs is not None and not batches:
        raise ValueError(f"epochs: {epochs} was given for a stream, which has no end; give steps.")
    return given if epochs is None else given * max(1, -(-batches // max(1, size)))


def steps_per_epoch(batches: int, size: int, processes: int) -> int:
    """Optimizer steps of an epoch; a last one that would leave a process without a batch is dropped."""
    whole, rest = divmod(batches, size)
    count = whole + (rest >= processes)
    if count == 0:
        raise DataError(f"batches: {batches} were given for {processes} processes; give at least one each.")
    return count


def rate(step: int, settings: Settings) -> float:
    """The share of the peak learning rate in a step, counted from 0."""
    return ScheduleSettings.parse(settings.schedule).ratio(step, settings.steps, settings.warmup)


def sequences(
    model: nn.Module, batches: Any, validation: Any, own_loss: Any = None
) -> tuple[Sequence[Any] | Stream, Sequence[Any]]:
    """Training and validation batches as sequences; training batches may be a stream.

    Args:
        model: that is trained.
        batches: what is trained on.
        validation: what is measured.
        own_loss: a loss of the user's, which may read batches of another kind.

    Raises:
        DataError: no validation, no batch, a batch that the model cannot be called with, or the training data again.
    """
    if validation is None:
        raise DataError(
            "validation: none was given; without data that is not trained on nobody sees when the model gets worse. "
            "Pass some batches."
        )
    if isinstance(validation, Stream):
        raise DataError(f"validation: {validation} has no end; give some of its batches: stream.take(8).")
    found: list[Any] = []
    for name, given in (("batches", batches), ("validation", validation)):
        sequence = given if isinstance(given, Stream) else sequence_of(given, name)
        if not isinstance(sequence, Stream) and not len(sequence):
            raise DataError(f"{name}: 0 batches were given; give at least one.")
        if own_loss is not None and not isinstance(sequence, Stream) and not _has_tokens(sequence[0]):
            found.append(sequence)  # any batch will do, and a store on disk is not read
            continue
        for batch in sequence.take(1) if isinstance(sequence, Stream) else sequence:
            if own_loss is None or _has_tokens(batch):
                check_batch(model, batch, name, beyond_context=reads_beyond(sequence))
        found.append(sequence)
    prints = [getattr(sequence, "fingerprint", None) for sequence in found]
    if batches is validation or (prints[0] is not None and prints[0] == prints[1]):
        raise DataError("validation: it is the training data; pass batches that are not trained on.")
    return found[0], found[1]


def _has_tokens(batch: Any) -> bool:
    return isinstance(batch, Mapping) and "input_ids" in batch


def fingerprints(*data: Any) -> list[str | None]:
    """The fingerprint of each data set; None if it has none. That of a stream is of its first two batches."""
    return [
        fingerprint(each.take(2)) if isinstance(each, Stream) else getattr(each, "fingerprint", None) for each in data
    ]


def prepare_modes(model: nn.Module) -> None:
    """Put a model in training mode, but leave frozen batch norms in evaluation mode, so that their statistics stay.

    A batch norm is frozen if none of its parameters trains; one without parameters, if none of the module around it
    does.

    Args:
        model: in place.
    """
    model.train()
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            around = model.get_submodule(path.rpartition(".")[0])
            deciding = list(module.parameters()) or list(around.parameters())
            if deciding and not any(parameter.requires_grad for parameter in deciding):
                module.eval()


def state_folder(folder: Path) -> Path:
    """The folder of a training's state while it runs: beside `folder`, so that this is never half done."""
    return folder.with_name(folder.name + STATE)


def check_folder(
    folder: Path | None,
    resume: bool,
    overwrite: bool,
    *,
    state: Path | None = None,
    record: str = RECORD,
    what: str = "training",
) -> None:
    """Refuse a folder whose state to resume is missing, or that holds something which nobody gave up.

    Args:
        folder: what is going to be written; None for nothing.
        resume: go on with a state that is there.
        overwrite: replace what is there.
        state: the folder of the state, by default that of a training into `folder`.
        record: the file by which a finished folder is known.
        what: whose state it is, for errors.

    Raises:
        ValueError: `resume` without a folder.
        CheckpointError: there is nothing to resume, or something would be lost.
    """
    if folder is None:
        if resume:
            raise ValueError(f"resume: it needs out=, the folder that the {what} was going to write.")
        return
    state = state or state_folder(folder)
    whole_folder.recover(state)
    if resume and not state.is_dir():
        reason = f"the {what} there is finished" if (folder / record).exists() else f"there is no state in {state}"
        raise CheckpointError(f"resume: {folder}: {reason}; leave resume out to start one.")
    if state.is_dir() and not (resume or overwrite):
        raise CheckpointError(
            f"out: {state} holds the state of a {what} that was not finished; go on with resume=True (--resume), or "
            f"start anew with overwrite=True (--overwrite)."
        )
    checkpoint.check_target(folder, overwrite=overwrite)
    empty = folder.is_dir() and not any(folder.iterdir())
    known = (*checkpoint.MODELS, record)
    if folder.exists() and not empty and not any((folder / name).exists() for name in known):
        raise CheckpointError(
            f"out: {folder} holds something else than a model, which overwriting would delete; choose another folder."
        )


def check_parameters(model: nn.Module) -> None:
    """Raise ValueError if nothing is trainable, or if parameters are too coarse for small updates."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("model: none of its parameters requires a gradient; call model.requires_grad_(True).")
    for name, parameter in trainable:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"model: {name} is {parameter.dtype}, too coarse for small updates; load it with dtype='float32' and "
                f"pass mixed_precision='bf16' for speed, or freeze it."
            )


def refuse_integers(model: nn.Module) -> None:
    """Refuse to train all of a model whose weights are in part integers, of which nothing would move.

    Args:
        model: whose trained parameters nobody has chosen.

    Raises:
        ValueError: a layer holds integers or other codes.
    """
    for path, module in model.named_modules():
        if isinstance(module, CodedWeight):
            layer = path.rpartition(".")[0]
            raise ValueError(
                f"model: {layer} holds {module.describe()} codes, which cannot be trained; train before they are made "
                f"(fake_quantize, train, freeze), or say with trainable= which of the other parameters train."
            )


@contextmanager
def one_accelerator(model: nn.Module, mixed_precision: str) -> Iterator[Accelerator]:
    """Provide accelerate for one training.

    Its settings belong to the process: what was not set before is unset after.

    Args:
        model: that is trained, on its device.
        mixed_precision: as in `train`.

    Raises:
        ValueError: the precision is unknown, or cannot be used here.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized

    if mixed_precision not in get_args(Precision):
        allowed = ", ".join(get_args(Precision))
        raise ValueError(f"mixed_precision: {mixed_precision!r} was given, allowed are {allowed}.")
    known = is_initialized()
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    on_cpu = next(model.parameters()).device.type == "cpu"
    try:
        # several processes train on the accelerators that there are, and without any on the processor
        stays = on_cpu and (alone or not torch.accelerator.is_available())
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=stays)
    except ValueError as error:
        raise ValueError(
            f"mixed_precision: {mixed_precision!r} cannot be used here: {error} If accelerate is in use in this "
            f"process with other settings, train in a new one."
        ) from error
    accelerator.sync_gradients = True  # another training in this process may have been cut off between two steps
    try:
        yield accelerator
    finally:
        if not known:
            AcceleratorState._reset_state(reset_partial_state=alone)


@contextmanager
def interruptible(enabled: bool) -> Iterator[Callable[[], bool]]:
    """Tell whether Ctrl-C was pressed, so that a step is finished first; pressed again it interrupts at once.

    Args:
        enabled: False leaves Ctrl-C as it is.
    """
    pressed = threading.Event()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Put each module back into its own mode afterwards, training or evaluation."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
