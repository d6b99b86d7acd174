"""How good a model is, and how far a changed one is from its original, with intervals over documents.

Every token goes through the model as it stands, also where a runtime would treat the prompt otherwise: what is measured
is what decoding does. Model and reference run batch by batch side by side, and only sums per document are kept
(negative log-likelihoods, divergences, hits and how many of each); several processes each measure their share of the
batches and exchange these sums. The intervals resample documents: of one resample
the sums of model and reference go together, so what both find hard cancels (a paired bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.forward.example import is_encoder_decoder
from actkit.core.forward.hooks import BatchContext, check_batch, evaluating, refuse_compiled_or_sharded
from actkit.core.forward.outputs import Output, Outputs, Whole
from actkit.core.ground import processes
from actkit.core.ground.errors import DataError, NonFiniteError, UnsupportedModelError
from actkit.core.ground.estimate import Estimate
from actkit.core.ground.fingerprint import fingerprint, model_fingerprint
from actkit.core.ground.progress import track

if TYPE_CHECKING:
    from rich.table import Table

Task = Literal["language", "embedding", "classification"]
TASKS: tuple[Task, ...] = get_args(Task)
CONFIDENCE = 0.95
IGNORED = -100  # the label that losses leave out, as in transformers
FEWEST = 10  # documents before a measurement may stop: fewer give no interval that means something
STOP_RESAMPLES = 4000  # its quantiles lie further out
_SLICE = 1 << 23  # logits that a head gives at a time: 16 MiB in bf16, and still a product at full speed
_CHUNK = 1 << 20  # logits turned to float32 at a time: 4 MiB and as much for each intermediate, which stay in a cache
_DRAWS = 1 << 22  # documents drawn at a time in the bootstrap: 32 MiB of counts

Sums = dict[str, Tensor]  # float64, one value per token, image or sequence, summed per document later
Scale = Callable[[Tensor], Tensor]


# -- results -----------------------------------------------------------------------------------------------------------


# name -> (format of a number, what it is)
_METRICS = {
    "perplexity": (".2f", "exp of the mean negative log-likelihood per token; lower is better"),
    "perplexity_ratio": (".4f", "perplexity over the original's; 1 is unchanged"),
    "kl": (".5f", "Kullback-Leibler divergence, original || changed, in nats per prediction; 0 is unchanged"),
    "agreement": (".2%", "share of predictions whose first choice is the original's"),
    "fidelity": (".5f", "mean cosine between changed and original embedding; 1 is unchanged"),
    "accuracy": (".2%", "share of labels that are the first choice; higher is better"),
}
_LOSSES = {
    "language": "perplexity ratio - 1",
    "embedding": "1 - fidelity",
    "classification": "accuracy of the original - accuracy",
}


@dataclass(frozen=True)
class Quality:
    """What `measure_quality` found.

    metrics: perplexity, perplexity_ratio, kl, agreement (language); fidelity (embedding); accuracy, agreement, kl
    (classification); those against the original only where there was a reference. loss: what a limit on the loss is
    compared with, None without a reference: perplexity_ratio - 1, 1 - fidelity, or the drop of accuracy. documents: how
    many were resampled. tokens: predictions (language, classification) or real tokens (embedding). data: one line.
    """

    task: Task
    metrics: dict[str, Estimate]
    loss: Estimate | None
    documents: int
    tokens: int
    data: str
    confidence: float = CONFIDENCE
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
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
        """One row per metric: value, 95 % interval, what it is."""
        from rich import box
        from rich.table import Table

        about = f"{self.data}; {self.documents:,} documents, {self.tokens:,} {_unit(self.task)}"
        table = Table(title=f"Quality ({about})", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("metric", "value", "95 % interval"):
            table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
        table.add_column("what it is", overflow="fold")
        rows = [(name.replace("_", " "), estimate, *_METRICS[name]) for name, estimate in self.metrics.items()]
        if self.loss is not None:
            rows.append(("loss", self.loss, ".2%", _LOSSES[self.task]))
        for name, estimate, form, meaning in rows:
            known = math.isfinite(estimate.low) or math.isfinite(estimate.high)
            interval = f"{estimate.low:{form}} to {estimate.high:{form}}" if known else "one document"
            table.add_row(name, f"{estimate.value:{form}}", interval, meaning)
        return table


def _unit(task: Task) -> str:
    return {"language": "predicted tokens", "embedding": "tokens", "classification": "predictions"}[task]


# -- measuring ---------------------------------------------------------------------------------------------------------


def task_of(model: nn.Module) -> Task:
    """How a model's quality is measured: next tokens, embeddings, or classes.

    A transformers model that generates is a language model, one named for classification a classifier, any other an
    encoder; a plain module that begins with an embedding of tokens is a language model, any other a classifier.
    Raises UnsupportedModelError for an encoder-decoder.
    """
    if is_encoder_decoder(model):
        raise UnsupportedModelError(
            f"model: {type(model).__name__} is an encoder-decoder, whose quality actkit does not measure; measure its "
            f"encoder (model.get_encoder()) with task='embedding'."
        )
    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is not None:
        if can_generate():
            return "language"
        return "classification" if "Classification" in type(model).__name__ else "embedding"
    layers = (module for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
    return "language" if isinstance(next(layers, None), nn.Embedding) else "classification"


def measure_quality(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    reference: nn.Module | Outputs | None = None,
    task: Task | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
    stop: Callable[[Quality], bool] | None = None,
) -> Quality:
    """The quality of a model on batches, and against its original.

    batches: dicts of the model's keywords (with `labels` for a classifier: int64 [batch], or [batch, length] where -100
    is left out) or tensors; best `actkit.data.Batches`, whose `document_ids` say what to resample (without them every
    row is a document). A token counts for its own document, and only where the token before it belongs to the same
    one; a language model's labels, where given, leave out the tokens at -100. reference: the original; the model itself
    is allowed, and `Outputs` that keep what the original gave. task: default by `task_of`. resamples, seed: of the
    bootstrap. Where no document changed the interval is a point: of n documents, a change that touches fewer than 3 in
    n is easily not seen.
    stop: asked after each batch but the last, from 10 documents on, with the quality so far, whose intervals leave out
    5 % divided by the number of batches, so that all these looks together err in 5 % at most; True ends the measurement
    there, with that quality. Not in several processes.

    Raises DataError for data that the task cannot use (no labels, no reference for an encoder, outputs of different
    shapes), NonFiniteError naming the document where an output is NaN or Inf, UnsupportedModelError for what cannot
    be measured, ValueError for a task or a number of resamples that is not allowed.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task: {task!r} was given, allowed are {', '.join(TASKS)}.")
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
    task = task or task_of(model)
    if task == "embedding" and reference is None:
        raise DataError(
            "reference: none was given, and the quality of an encoder is how close its embeddings are to those of the "
            "original; pass the original as reference= (--against)."
        )
    if isinstance(batches, Mapping | Tensor):
        batches = [batches]
    if isinstance(batches, Sequence):
        _check_batches(models, batches)  # before any work is done
    if stop is not None and processes.several():
        raise ValueError("stop: one process cannot end the measurement of the others; leave it out under torchrun.")
    data = getattr(batches, "description", "given batches")
    measure = {"language": _language, "embedding": _embedding, "classification": _classification}[task]
    found: dict[str, Tensor] = {}  # by what it holds and the batch
    given: list[str] = []
    names: list[str] = []
    with ExitStack() as stack:
        for each in models:
            stack.enter_context(evaluating(each))
        total = len(batches) if isinstance(batches, Sized) else None
        tracked = track(_with_documents(batches), "Measuring quality", total, enabled=progress)
        for index, (batch, documents) in enumerate(tracked):
            if processes.several():
                given.append(fingerprint((batch, documents)))
            if not processes.mine(index):
                continue
            _check_batches(models, [batch])
            output = outputs.of(batch, task)
            other = None if originals is None else output if same else originals.of(batch, task)
            if other is not None and other.shape != output.shape:
                raise DataError(
                    f"reference: its output has shape {list(other.shape)}, the model's {list(output.shape)}; give the "
                    f"original of this model."
                )
            owners, sums = measure(output, other, batch, documents)
            names = list(sums)
            found[f"owners {index}"], found[f"totals {index}"] = _per_document(
                owners, torch.stack([sums[name] for name in names], dim=1)
            )
            if stop is None or total is None or index + 1 == total:
                continue
            if len(torch.cat([found[key] for key in found if key.startswith("owners")]).unique()) < FEWEST:
                continue
            partial = _quality(task, data, found, names, same, STOP_RESAMPLES, seed, looks=total, complete=False)
            if stop(partial):
                return partial
    if processes.several():
        processes.agree(model=model_fingerprint(model), data=fingerprint(given))
        for named, others in processes.everyone("sums of documents", found, about=names):
            found |= others
            names = names or named
    if not found:
        raise DataError("batches: 0 were given; give at least one.")
    return _quality(task, data, found, names, same, resamples, seed)


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
        what = "two tokens in a row" if task == "language" else "anything to measure"
        raise DataError(f"batches: no document has {what} (padding and label {IGNORED} left out); give other data.")
    confidence = 1 - (1 - CONFIDENCE) / looks
    metrics, loss = _estimates(task, dict(zip(names, totals.T)), same, resamples, seed, confidence)
    tokens = int(totals[:, names.index("tokens" if task == "embedding" else "count")].sum())
    return Quality(task, metrics, loss, len(owners), tokens, data, confidence, complete)


def _check_batches(models: Sequence[nn.Module], batches: Iterable[Any]) -> None:
    for batch in batches:
        for model in models:
            check_batch(model, batch)


def _with_documents(batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    """Each batch with the document of each token int64 [batch, length] or row [batch]; -1 on padding."""
    given = getattr(batches, "document_ids", None)
    first = 0
    for index, batch in enumerate(batches):
        context = BatchContext.of(batch, first_row=first, documents=None if given is None else given[index])
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


# -- what each task sums -----------------------------------------------------------------------------------------------


def _language(logits: Output, other: Output | None, batch: Any, documents: Tensor) -> tuple[Tensor, Sums]:
    tokens = _tokens(batch)
    if tokens is None or len(logits.shape) != 3 or logits.shape[:2] != tokens.shape:
        given = "no token ids" if tokens is None else f"token ids {list(tokens.shape)}"
        raise DataError(
            f"task='language': a batch holds {given} and the model's output is {list(logits.shape)}; it must be logits "
            f"[batch, length, vocabulary] for input_ids [batch, length]. Choose another task=, or other data."
        )
    targets, owners = tokens[:, 1:].cpu(), documents[:, 1:]
    counted = (owners >= 0) & (documents[:, :-1] == owners)
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.shape == tokens.shape:
        counted &= labels[:, 1:].cpu() != IGNORED
    rows, columns = counted.nonzero(as_tuple=True)
    position = rows * tokens.shape[1] + columns
    owners, targets = owners[counted], targets[counted]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
        raise DataError(
            f"input_ids: they hold token {int(targets.max())}, the model predicts 0 to {logits.shape[-1] - 1}; use the "
            f"model's own tokenizer."
        )
    return owners, _predictions(logits, other, position, targets, owners, likelihood=True)


def _classification(logits: Output, other: Output | None, batch: Any, documents: Tensor) -> tuple[Tensor, Sums]:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise DataError(
            "labels: none are in the data, and accuracy needs the right class of each example; give batches like "
            "{'pixel_values': ..., 'labels': int64 [batch]}, or pass task='embedding' with a reference to compare "
            "outputs instead."
        )
    if labels.is_floating_point() or len(logits.shape) < 2 or labels.shape != logits.shape[:-1]:
        raise DataError(
            f"labels: {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)} were given for an output of "
            f"shape {list(logits.shape)}; accuracy needs one whole number per prediction, {list(logits.shape[:-1])}."
        )
    labels = labels.cpu()
    per_token = labels.dim() == 2 and labels.shape == documents.shape
    owners = documents if per_token else _of_rows(documents).view(-1, *[1] * (labels.dim() - 1)).expand(labels.shape)
    counted = ((owners >= 0) & (labels != IGNORED)).flatten()
    owners, targets = owners.flatten()[counted], labels.flatten()[counted]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
        wrong = int(targets.min()) if int(targets.min()) < 0 else int(targets.max())
        raise DataError(
            f"labels: class {wrong} was given, the model knows 0 to {logits.shape[-1] - 1}; give labels of this model."
        )
    position = counted.nonzero(as_tuple=True)[0]
    return owners, _predictions(logits, other, position, targets, owners, likelihood=False)


def _embedding(output: Output, other: Output | None, batch: Any, documents: Tensor) -> tuple[Tensor, Sums]:
    assert isinstance(output, Whole) and isinstance(other, Whole)
    owners = _of_rows(documents)
    mask = (documents >= 0) if documents.dim() == 2 else None
    kept = owners >= 0
    vectors, others = (
        _pooled(each.tensor, mask, owners, whose)
        for each, whose in ((output, "the model's output"), (other, "the reference's output"))
    )
    # For vectors of length 1 this is their cosine, exact where they are equal and sharp where they nearly are. A vector
    # of zeros has no direction: it is like another one of zeros, and like nothing else.
    distance = (vectors - others).square().sum(1)
    zeros = ~(vectors.any(1) & others.any(1))
    cosine = torch.where(zeros, (distance == 0).double(), 1 - distance / 2)
    real = mask.sum(1) if mask is not None else torch.ones(len(owners))
    sums = {"cosine": cosine, "count": torch.ones(len(owners)), "tokens": real}
    return owners[kept], {name: value.double()[kept] for name, value in sums.items()}


def _pooled(output: Tensor, mask: Tensor | None, owners: Tensor, whose: str) -> Tensor:
    """float64 [batch, channels] of length 1: the mean over the real tokens, patches or pixels."""
    if output.dim() < 2 or len(output) != len(owners):
        raise DataError(
            f"task='embedding': the output has shape {list(output.shape)} for {len(owners)} rows; it must be "
            f"[batch, channels], [batch, length, channels] or [batch, channels, height, width]."
        )
    values = output.cpu().double()
    if values.dim() == 3:
        if mask is not None and mask.shape == values.shape[:2]:
            values = values.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        else:
            values = values.mean(1)
    elif values.dim() > 3:
        values = values.flatten(2).mean(2)
    _check_finite(values[owners >= 0], owners[owners >= 0], whose)
    return F.normalize(values, dim=1)


def _predictions(
    logits: Output, other: Output | None, position: Tensor, targets: Tensor, owners: Tensor, likelihood: bool
) -> Sums:
    """Sums of predictions: of the rows of logits those at position int64 [n] are wanted.

    likelihood: score by the negative log-likelihood of the targets, else by whether they are the first choice.
    Log-probabilities are float32, for a chunk of rows at a time.
    """
    classes = logits.shape[-1]
    rows, some = max(1, _SLICE // classes), max(1, _CHUNK // classes)
    parts: list[Sums] = []
    for where, target, owner in zip(position.split(rows), targets.split(rows), owners.split(rows)):
        mine = logits.rows(where)
        others = None if other is None else mine if other is logits else other.rows(where).to(mine.device)
        for at in range(0, max(1, len(where)), some):
            part = slice(at, at + some)
            parts.append(
                _scores(mine[part], None if others is None else others[part], target[part], owner[part], likelihood)
            )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _scores(logits: Tensor, other: Tensor | None, target: Tensor, owner: Tensor, likelihood: bool) -> Sums:
    """As `_predictions`, of logits [n, classes]."""
    logits, target = logits.float(), target.to(logits.device)
    _check_finite(logits, owner, "the model's logits")
    first = logits.argmax(-1)
    log = logits.log_softmax(-1)
    found = {"count": torch.ones(len(target))}
    if likelihood:
        found["nll"] = -log.gather(1, target[:, None])[:, 0]
    else:
        found["hits"] = first == target
    if other is not None:
        other = other.float()
        _check_finite(other, owner, "the reference's logits")
        other_first = other.argmax(-1)
        other_log = other.log_softmax(-1)
        found["kl"] = _divergence(other_log, log)
        found["agree"] = first == other_first
        if likelihood:
            found["other_nll"] = -other_log.gather(1, target[:, None])[:, 0]
        else:
            found["other_hits"] = other_first == target
    return {name: value.cpu().double() for name, value in found.items()}


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Kullback-Leibler divergence of log-probabilities [rows, classes], first || second, in nats: [rows].

    Summed as p (r - 1 - log r) with r = q / p, which is the same because both sum to 1. No term is negative, and the
    rounding of the two normalisations cancels, where the usual p (log p - log q) drowns small divergences in it.
    """
    p, difference = first.exp(), second - first
    near = p * (difference.expm1() - difference)
    if bool((difference < 1).all()):
        return near.sum(-1)
    far = second.exp() - p * (1 + difference)  # expm1 overflows where q is many times p
    return torch.where(difference < 1, near, far).sum(-1)


def _check_finite(values: Tensor, owners: Tensor, whose: str) -> None:
    """values: [n, columns] of the documents owners [n]."""
    bad = ~torch.isfinite(values).all(-1)
    if bool(bad.any()):
        document = int(owners[bad.cpu()][0])
        raise NonFiniteError(
            f"{whose} hold NaN or Inf in document {document}; check the weights and scales of the model, or compute in "
            f"a wider dtype."
        )


def _of_rows(documents: Tensor) -> Tensor:
    """The document of each row: that of its first real token; -1 where a row is all padding."""
    if documents.dim() == 1:
        return documents
    first = (documents >= 0).int().argmax(1, keepdim=True)
    return documents.gather(1, first)[:, 0]


def _tokens(batch: Any) -> Tensor | None:
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else batch[0] if isinstance(batch, tuple) else batch
    if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.dtype in (torch.int64, torch.int32):
        return tokens.long()
    return None


# -- estimates ---------------------------------------------------------------------------------------------------------


def resampled_totals(sums: Tensor, resamples: int, seed: int) -> Tensor:
    """Totals of the sums of as many documents, drawn with replacement.

    sums: float64 [documents, columns]; returns float64 [resamples, columns]. The columns of a row are of the same draw,
    so what is computed from several of them is paired.
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
        """scale: what rises with the mean and is applied to it and to its ends, so that these stay finite longer."""
        mid = mean(dict(zip(sums, total)))
        if same and compares:  # equal on any document
            low = high = mid
        elif documents < 2:
            return Estimate(float(scale(mid)), -math.inf, math.inf)
        else:
            ends = mid.new_tensor([(1 - confidence) / 2, (1 + confidence) / 2])
            low, high = torch.quantile(mean(dict(zip(sums, drawn.T))), ends)
        return Estimate(*(float(scale(number)) for number in (mid, low, high)))

    metrics: dict[str, Estimate] = {}
    loss: Estimate | None = None
    if task == "embedding":
        metrics["fidelity"] = estimate(lambda s: s["cosine"] / s["count"], compares=True)
        loss = estimate(lambda s: 1 - s["cosine"] / s["count"], compares=True)
    elif task == "language":
        metrics["perplexity"] = estimate(lambda s: s["nll"] / s["count"], torch.exp)
    else:
        metrics["accuracy"] = estimate(lambda s: s["hits"] / s["count"])
    if "other_nll" in sums:
        metrics["perplexity_ratio"] = estimate(_rise, torch.exp, compares=True)
        loss = estimate(_rise, torch.expm1, compares=True)
    elif "other_hits" in sums:
        loss = estimate(lambda s: (s["other_hits"] - s["hits"]) / s["count"], compares=True)
    if "kl" in sums:
        metrics["kl"] = estimate(lambda s: s["kl"] / s["count"], compares=True)
        metrics["agreement"] = estimate(lambda s: s["agree"] / s["count"], compares=True)
    return metrics, loss


def _rise(sums: Sums) -> Tensor:
    """By how much the mean negative log-likelihood is above the reference's."""
    return (sums["nll"] - sums["other_nll"]) / sums["count"]


def _as_it_is(value: Tensor) -> Tensor:
    return value
