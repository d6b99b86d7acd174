"""How good a model is, and how far a changed one is from its original, with intervals over documents.

Every token goes through the model as it stands, even if a runtime would treat the prompt otherwise: what is measured is
what decoding does. Model and reference run batch by batch side by side, and only sums per document are kept (negative
log-likelihoods, divergences, hits and how many of each). Several processes each measure their share of the batches and
exchange these sums. The intervals resample documents: of one resample the sums of model and reference go together, so
what both find hard cancels (a paired bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import BatchContext, as_batches, check_batch, reads_beyond
from actkit.core.forward.hooks import evaluating, refuse_compiled_or_sharded
from actkit.core.forward.limits import is_encoder_decoder
from actkit.core.forward.outputs import Outputs
from actkit.core.ground import processes, registry
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.ground.estimate import Estimate
from actkit.core.ground.fingerprint import fingerprint, model_fingerprint
from actkit.core.ground.memory import release_memory
from actkit.core.ground.progress import track
from actkit.core.measure.tasks.task import IGNORED, Scale, Sums, Task

if TYPE_CHECKING:
    from rich.table import Table


OURS = ("language", "regression", "classification", "embedding")
CONFIDENCE = 0.95
FEWEST = 10  # documents before a measurement may stop: fewer give no interval that means something
STOP_RESAMPLES = 4000  # its quantiles lie further out
_DRAWS = 1 << 22  # documents drawn at a time in the bootstrap: 32 MiB of counts

# -- results -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """What `measure_quality` found.

    Attributes:
        task: its registered name; the task (`core/measure/tasks`) says what its metrics, its loss and its unit are.
        metrics: by name; those against the original only if there was a reference.
        loss: what a limit on the loss is compared with; None without a reference.
        documents: how many were resampled.
        tokens: how many of the task's unit were measured: predictions, real tokens, numbers.
        data: one line.
        confidence: of the intervals.
        complete: False if the measurement was stopped before its end.
    """

    task: str
    metrics: dict[str, Estimate]
    loss: Estimate | None
    documents: int
    tokens: int
    data: str
    confidence: float = CONFIDENCE
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return {
            "task": self.task,
            "metrics": {name: estimate.to_dict() for name, estimate in self.metrics.items()},
            "loss": None if self.loss is None else self.loss.to_dict(),
            "documents": self.documents,
            "tokens": self.tokens,
            "data": self.data,
            "confidence": self.confidence,
            "complete": self.complete,
        }

    def table(self) -> Table:
        """Show one row per metric: value, 95 % interval, what it is."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        task = registry.task_class(self.task)
        about = f"{self.data}; {self.documents:,} documents, {self.tokens:,} {task.unit}"
        table = PlainTable(title=f"Quality ({about})", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("metric", "value", "95 % interval"):
            table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
        table.add_column("what it is", overflow="fold")
        rows = [(name.replace("_", " "), estimate, *task.metrics[name]) for name, estimate in self.metrics.items()]
        if self.loss is not None:
            rows.append(("loss", self.loss, ".2%", task.loss))
        for name, estimate, form, meaning in rows:
            known = math.isfinite(estimate.low) or math.isfinite(estimate.high)
            interval = f"{estimate.low:{form}} to {estimate.high:{form}}" if known else "one document"
            table.add_row(name, f"{estimate.value:{form}}", interval, meaning)
        return table


# -- measuring ---------------------------------------------------------------------------------------------------------


def task_of(model: nn.Module) -> str:
    """Name the task by which a model's quality is measured: those of other packages are asked first, then ours.

    - A transformers model that generates is a language model.
    - One named for classification is a regressor if its config says so, else a classifier.
    - Any other transformers model is an encoder.
    - A plain module that begins with an embedding of tokens is a language model, any other a classifier.

    Args:
        model: any.

    Returns:
        The registered name of the task.

    Raises:
        UnsupportedModelError: it is an encoder-decoder.
    """
    if is_encoder_decoder(model):
        raise UnsupportedModelError(
            f"model: {type(model).__name__} is an encoder-decoder, whose quality actkit does not measure; measure its "
            f"encoder (model.get_encoder()) with task='embedding'."
        )
    others = [name for name in registry.task_names() if name not in OURS]
    return next(name for name in (*others, *OURS) if registry.task_class(name).fits(model))


def measure_quality(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    reference: nn.Module | Outputs | None = None,
    task: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
    stop: Callable[[Quality], bool] | None = None,
) -> Quality:
    """Measure the quality of a model on batches, and against its original.

    A token counts for its own document, and only if the token before it belongs to the same one. If no document
    changed, the interval is a point. Of n documents, a change that touches fewer than 3 in n is easily not seen.

    Args:
        model: what is measured.
        batches: dicts of the model's keywords, or tensors; best `actkit.data.Batches`, whose `document_ids` say what to
            resample (without them every row is a document). A classifier needs `labels`: int64 [batch], or [batch,
            length]. Labels of -100 are left out, also those of a language model if it has any.
        reference: the original; the model itself is allowed, and `Outputs` that keep what the original gave.
        task: a registered name; None for what `task_of` says.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        progress: show a bar.
        stop: called after each batch but the last, from 10 documents on, with the quality so far; True ends the
            measurement there, with that quality. These intervals leave out 5 % divided by the number of batches, so
            that all these looks together err in 5 % at most. Not in several processes.

    Returns:
        The metrics and the loss, with their intervals.

    Raises:
        DataError: the task cannot use the data: there are no labels, no reference for an encoder, or outputs of
            different shapes.
        NonFiniteError: an output is NaN or Inf; the error names the document.
        UnsupportedModelError: the model cannot be measured.
        ValueError: a task, a number of resamples or `stop` is not allowed.
    """
    if task is not None and task not in registry.task_names():
        raise ValueError(f"task: {task!r} was given, allowed are {', '.join(registry.task_names())}.")
    if resamples < 1:
        raise ValueError(f"resamples: {resamples} was given; give at least 1, best 1000.")
    outputs = originals = None
    if reference is not None:
        originals = reference if isinstance(reference, Outputs) else Outputs(reference)
        outputs = originals if originals.model is model else None
    outputs = outputs or Outputs(model)
    same = outputs is originals
    models = [model] if originals is None or same else [model, originals.model]
    for each in models:
        refuse_compiled_or_sharded(each)
    measured: Task = registry.task_class(task or task_of(model))()
    kind = {"before_head": measured.before_head, "hidden_states": measured.hidden_states}
    if measured.needs_reference is not None and reference is None:
        raise DataError(
            f"reference: none was given, and {measured.needs_reference}; pass the original as reference= (--against)."
        )
    batches = as_batches(batches)
    beyond = reads_beyond(batches)
    if isinstance(batches, Sequence):
        _check_batches(models, batches, beyond)  # before any work is done
    if stop is not None and processes.several():
        raise ValueError("stop: one process cannot end the measurement of the others; leave it out under torchrun.")
    data = getattr(batches, "description", "given batches")
    found: dict[str, Tensor] = {}  # by what it holds and the batch
    given: list[str] = []
    names: list[str] = []
    with ExitStack() as stack:
        for each in models:
            stack.enter_context(evaluating(each))
        total = len(batches) if isinstance(batches, Sized) else None
        tracked = track(_with_documents(model, batches), "Measuring quality", total, enabled=progress)
        for index, (batch, documents) in enumerate(tracked):
            if processes.several():
                given.append(fingerprint((batch, documents)))
            if not processes.mine(index):
                continue
            _check_batches(models, [batch], beyond)
            output = outputs.of(batch, **kind)
            other = None if originals is None else output if same else originals.of(batch, **kind)
            if other is not None and other.shape != output.shape:
                raise DataError(
                    f"reference: its output has shape {list(other.shape)}, the model's {list(output.shape)}; give the "
                    f"original of this model."
                )
            owners, sums = measured.sums(output, other, batch, documents)
            names = list(sums)
            found[f"owners {index}"], found[f"totals {index}"] = _per_document(
                owners, torch.stack([sums[name] for name in names], dim=1)
            )
            del output, other
            release_memory(cycles=False)  # what is kept of outputs lies between what was dropped
            if stop is None or total is None or index + 1 == total:
                continue
            if len(torch.cat([found[key] for key in found if key.startswith("owners")]).unique()) < FEWEST:
                continue
            partial = _quality(measured, data, found, names, same, STOP_RESAMPLES, seed, looks=total, complete=False)
            if stop(partial):
                return partial
    if processes.several():
        processes.agree(model=model_fingerprint(model), data=fingerprint(given))
        for named, others in processes.everyone("sums of documents", found, about=names):
            found |= others
            names = names or named
    if not found:
        raise DataError("batches: 0 were given; give at least one.")
    return _quality(measured, data, found, names, same, resamples, seed)


def _quality(
    task: Task,
    data: str,
    found: Mapping[str, Tensor],
    names: Sequence[str],
    same: bool,
    resamples: int,
    seed: int,
    looks: int = 1,
    complete: bool = True,
) -> Quality:
    """The quality from the owners and the sums of each batch. looks: how often it is looked at."""
    order = sorted(int(key.split()[1]) for key in found if key.startswith("owners"))  # that of one process
    owners, totals = _per_document(*(torch.cat([found[f"{what} {i}"] for i in order]) for what in ("owners", "totals")))
    if complete and not len(owners):
        raise DataError(
            f"batches: no document has {task.nothing} (padding and label {IGNORED} left out); give other data."
        )
    confidence = 1 - (1 - CONFIDENCE) / looks
    metrics, loss = _estimates(task, dict(zip(names, totals.T)), same, resamples, seed, confidence)
    tokens = int(totals[:, names.index(task.counted)].sum())
    return Quality(task.name, metrics, loss, len(owners), tokens, data, confidence, complete)


def _check_batches(models: Sequence[nn.Module], batches: Iterable[Any], beyond_context: bool) -> None:
    for batch in batches:
        for model in models:
            check_batch(model, batch, beyond_context=beyond_context)


def _with_documents(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    """Each batch with the document of each token int64 [batch, length] or row [batch]; -1 on padding."""
    given = getattr(batches, "document_ids", None)
    first = 0
    for index, batch in enumerate(batches):
        context = BatchContext.of(batch, model, first_row=first, documents=None if given is None else given[index])
        first += context.batch_size
        documents = context.documents.cpu()
        if context.length is not None:
            shape = (context.batch_size, context.length)
            if documents.dim() == 1 and len(documents) == shape[0]:
                documents = documents[:, None].expand(shape)
            if documents.shape != shape:
                raise DataError(
                    f"document_ids: shape {list(documents.shape)} was given for a batch of shape {list(shape)}; give "
                    f"one document per token, or per row."
                )
            if context.mask is not None:
                documents = documents.masked_fill(~context.mask.cpu(), -1)
        elif documents.shape != (context.batch_size,):
            raise DataError(
                f"document_ids: shape {list(documents.shape)} was given for {context.batch_size} rows; give one "
                f"document per row."
            )
        yield batch, documents


def _per_document(owners: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """owners int64 [n], values float64 [n, columns] -> the distinct owners, sorted, and the sum of each."""
    distinct, place = owners.unique(return_inverse=True)
    return distinct, torch.zeros(len(distinct), values.shape[1], dtype=torch.float64).index_add_(0, place, values)


# -- estimates ---------------------------------------------------------------------------------------------------------


def resampled_totals(sums: Tensor, resamples: int, seed: int) -> Tensor:
    """Sum as many documents as there are, drawn with replacement.

    The columns of a row are of the same draw, so what is computed from several of them is paired.

    Args:
        sums: float64 [documents, columns].
        resamples: how often it is drawn.
        seed: of the drawing.

    Returns:
        float64 [resamples, columns].
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(sums)
    totals = []
    for start in range(0, resamples, step := max(1, _DRAWS // count)):
        rows = min(step, resamples - start)
        drawn = torch.randint(count, (rows, count), generator=generator)
        times = torch.zeros(rows, count, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand(drawn.shape))
        totals.append(times @ sums)
    return torch.cat(totals)


def _estimates(
    task: Task, sums: Sums, same: bool, resamples: int, seed: int, confidence: float = CONFIDENCE
) -> tuple[dict[str, Estimate], Estimate | None]:
    """The metrics and the loss. sums: float64 [documents] each. same: the reference is the model itself."""
    documents = len(sums["count"])
    table = torch.stack(list(sums.values()), dim=1)
    total, drawn = table.sum(0), resampled_totals(table, resamples, seed)

    def estimate(mean: Callable[[Sums], Tensor], scale: Scale = _as_it_is, compares: bool = False) -> Estimate:
        mid = mean(dict(zip(sums, total)))
        if same and compares:  # equal on any document
            low = high = mid
        elif documents < 2:
            return Estimate(float(scale(mid)), -math.inf, math.inf)
        else:
            ends = mid.new_tensor([(1 - confidence) / 2, (1 + confidence) / 2])
            low, high = torch.quantile(mean(dict(zip(sums, drawn.T))), ends)
        return Estimate(*(float(scale(number)) for number in (mid, low, high)))

    return task.estimates(estimate, frozenset(sums))


def _as_it_is(value: Tensor) -> Tensor:
    return value
