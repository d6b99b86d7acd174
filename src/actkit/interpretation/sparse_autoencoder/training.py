"""Train a sparse autoencoder on a store of activations, and say what it is worth on rows that it has not seen.

    trained = train_autoencoder(ActivationStore.open("acts"), kind="topk", latents=4096, out="my-sae")
    explained variance = 1 - sum |x - x'|^2 / sum |x - mean x|^2       both over the same held-out rows

The loop is `core.train.training.train`; batches are read from the store as they are needed. Activations are divided by
their mean norm over sqrt(channels), so that one penalty means the same for any model, and the weights that come out are
those of the activations as they are.

When to use it: after `actkit harvest`; with rows of many more tokens than latents, or the held-out rows say so.
Cost: a step is an encoder's product forward, and three times that (backward, and the decoder's) for all kinds but topk.
Settled here: the decoder's bias starts at the geometric median of a batch; Adam with 2e-4 / sqrt(latents / 2^14),
falling to 0 in a line, gradients at most 1 long; the penalty grows over the first tenth of the steps. A latent is dead
that has not fired for a tenth of the training's rows, or 10 million. Rows ten times as long as the median, such as
attention sinks, are left out. Documents are whole: none has rows on both sides.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.ground import processes
from actkit.core.ground.figures import plotly
from actkit.core.ground.progress import track
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.ground.whole_file import write_whole
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.core.store.activation_store import ActivationStore
from actkit.core.train.training import Trained, train
from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder
from actkit.interpretation.sparse_autoencoder.files import write_autoencoder
from actkit.interpretation.sparse_autoencoder.kinds import KINDS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

REPORT = "report.json"
RAMP = 0.1  # of the steps, in which the penalty grows
MEASURED = 16  # batches that are held out, at most
WITH_DEAD = ("topk", "batchtopk", "matryoshka")  # kinds with an auxiliary loss for latents that have not fired
LONGEST = 10.0  # times the median norm; attention sinks are 100 times as long, and would rule every sum of squares
FIRST = 4  # batches that tell the norm of activations


# -- what it is worth --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AutoencoderReport:
    """What an autoencoder is worth on rows that it was not trained on.

    Attributes:
        kind: of the autoencoder.
        latents: how many it has.
        rows: that were measured.
        explained_variance: 1 is all.
        active: latents above 0 in a row, on average (L0).
        dead: share of the latents that never fired on these rows.
        densities: of each latent, the share of rows in which it fires.
        site: that it was trained on.
        left_out: rows that were neither trained on nor measured, as their norm is far from that of all others.
    """

    kind: str
    latents: int
    rows: int
    explained_variance: float
    active: float
    dead: float
    densities: tuple[float, ...]
    site: str | None = None
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**asdict(self), "densities": list(self.densities)}

    def table(self) -> Table:
        """The figures, a row each."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Sparse autoencoder ({self.kind}, {self.latents:,} latents) of {self.site or 'activations'}"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column(f"on {self.rows:,} held-out rows")
        table.add_column("", justify="right")
        table.add_row("explained variance", f"{self.explained_variance:.4f}")
        table.add_row("active latents per row", f"{self.active:.2f}")
        table.add_row("latents that never fire", f"{self.dead:.1%}")
        if self.left_out:
            table.add_row("rows left out, far longer than others", f"{self.left_out:,}")
        return table

    def figure(self) -> Figure:
        """Draw how often latents fire, the most frequent first, on a logarithmic axis.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        found = sorted((each for each in self.densities if each > 0), reverse=True)
        figure = graph_objects.Figure(graph_objects.Scatter(x=list(range(1, len(found) + 1)), y=found, mode="lines"))
        figure.update_yaxes(type="log", title="share of rows in which a latent fires")
        return figure.update_layout(title=f"{self.latents:,} latents, {self.dead:.1%} never fire", xaxis_title="latent")


def measure_autoencoder(autoencoder: SparseAutoencoder, batches: Iterable[Tensor]) -> AutoencoderReport:
    """Measure an autoencoder on rows.

    Args:
        autoencoder: any.
        batches: of rows [n, channels] that it was not trained on.

    Returns:
        Explained variance, active latents and dead ones.

    Raises:
        ValueError: there are no rows, or they have another width.
    """
    device, before = autoencoder.decoder.device, autoencoder.training
    autoencoder.eval()
    rows, squares, errors, mean = 0, 0.0, 0.0, torch.zeros(autoencoder.channels, dtype=torch.float64, device=device)
    fired = torch.zeros(autoencoder.latents, dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            for batch in batches:
                x = batch.to(device, torch.float32)
                latents = autoencoder.encode(x)
                error = (x - autoencoder.decode(latents)).double()
                fired += (latents > 0).sum(0)
                # Chan's update: means of batches far from 0 lose no digits
                total, own = rows + len(x), x.double().mean(0)
                squares += float((x.double() - own).square().sum())
                squares += float((own - mean).square().sum()) * rows * len(x) / total
                mean += (own - mean) * len(x) / total
                errors, rows = errors + float(error.square().sum()), total
    finally:
        autoencoder.train(before)
    if not rows:
        raise ValueError("batches: no rows were given; give at least one batch.")
    return AutoencoderReport(
        kind=autoencoder.kind,
        latents=autoencoder.latents,
        rows=rows,
        explained_variance=1 - errors / squares if squares else float("nan"),
        active=float(fired.sum()) / rows,
        dead=float((fired == 0).double().mean()),
        densities=tuple((fired.double() / rows).tolist()),
        site=autoencoder.site,
    )


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedAutoencoder:
    """An autoencoder, and how its training went.

    Attributes:
        autoencoder: of the activations as they are; of the kinds batchtopk and matryoshka a JumpReLU one.
        report: on held-out rows.
        training: the steps, with losses of scaled activations.
        scale: activations were multiplied by it in training.
    """

    autoencoder: SparseAutoencoder
    report: AutoencoderReport
    training: Trained
    scale: float

    def table(self) -> Table:
        """That of the report."""
        return self.report.table()

    def to_dict(self) -> dict[str, Any]:
        """The report and the steps, as JSON takes them."""
        return {"report": self.report.to_dict(), "scale": self.scale, "training": self.training.to_dict()}


def train_autoencoder(
    store: ActivationStore,
    site: str | None = None,
    *,
    kind: str = "topk",
    latents: int = 4096,
    settings: Mapping[str, Any] | None = None,
    steps: int = 1000,
    size: int = 4096,
    learning_rate: float | None = None,
    skip: int = 0,
    longest: float = LONGEST,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    evaluate_every: int | None = None,
    progress: bool = True,
) -> TrainedAutoencoder:
    """Train an autoencoder on the rows of a site; a training that was killed goes on with `resume`.

    Args:
        store: of activations.
        site: one of its sites; None if it has one.
        kind: 'topk', 'batchtopk', 'matryoshka', 'jumprelu', 'gated' or 'standard'.
        latents: how many.
        settings: of the kind's class, such as {'k': 32} or {'sparsity': 2.0}.
        steps: updates of the weights.
        size: rows of a batch.
        learning_rate: the peak; None: 2e-4 / sqrt(latents / 2^14).
        skip: leave out so many first tokens of each sequence.
        longest: leave out rows whose norm is more than so many times the median; inf for none.
        held_out: share of the rows, at the end of the data, that is measured and not trained on.
        seed: of weights and order.
        device: to train on.
        out: folder to write, which SAELens and `read_autoencoder` open; the state is kept beside it meanwhile.
        resume: go on with the state there.
        overwrite: replace what is there.
        evaluate_every: steps between validations and saves; by default a tenth of all.
        progress: show a bar.

    Returns:
        The autoencoder with its report.

    Raises:
        ValueError: a setting is out of bounds, the site is unknown, or there are too few rows.
        ProcessError: several processes were started.
        CheckpointError: what `train` raises of folders.
        NonFiniteError: loss or gradient is NaN or Inf.
    """
    processes.refuse("train_autoencoder", "start it without torchrun")
    site = _site(store, site)
    rows = store.numbers(site, skip=skip, longest=longest)
    left_out = len(store.numbers(site, skip=skip)) - len(rows)
    learned, measured = store.split(site, held_out, skip=skip, rows=rows)
    training = store.batches(site, size, seed=seed, rows=learned)
    count = min(MEASURED, max(1, len(measured) // size))
    held = store.batches(site, min(size, len(measured)), seed=seed, rows=measured)
    validation = [held[index].float() for index in range(min(count, len(held)))]
    own = dict(settings or {})
    if kind in WITH_DEAD:
        own.setdefault("dead_after", min(10_000_000, steps * size // 10))
    described = {"kind": kind, "latents": latents, "settings": own}
    autoencoder = _made(kind, training[0].shape[1], latents, own, seed).to(device)
    autoencoder.site, autoencoder.model = site, store.model
    first = torch.cat([training[index].float() for index in range(min(FIRST, len(training)))]).to(device)
    scale = sqrt(autoencoder.channels) / float(first.norm(dim=1).mean())
    with torch.no_grad():
        autoencoder.decoder_bias.copy_(geometric_median(first[:size] * scale))

    def kept(model: nn.Module) -> SparseAutoencoder:
        found: SparseAutoencoder = copy.deepcopy(model)  # type: ignore[assignment]
        found.rescale(scale)
        return found.finished().eval()

    trained = train(
        autoencoder,
        training,
        validation=validation,
        steps=steps,
        learning_rate=2e-4 / sqrt(latents / 2**14) if learning_rate is None else learning_rate,
        optimizer="adam",
        weight_decay=0.0,
        schedule="linear",
        rules=[Constrained(of=described)],
        loss=lambda model, x: model.loss(x.to(device, torch.float32) * scale),  # type: ignore[operator]
        write=lambda model, folder: write_autoencoder(kept(model), folder, overwrite=True),
        keep="last",
        seed=seed,
        out=out,
        resume=resume,
        overwrite=overwrite,
        evaluate_every=evaluate_every,
        progress=progress,
    )
    found = kept(autoencoder)
    report = measure_autoencoder(found, track(validation, "Measuring", len(validation), progress))
    report = replace(report, left_out=left_out)
    if out is not None:
        write_whole(Path(out) / REPORT, json.dumps(report.to_dict(), indent=1))
    return TrainedAutoencoder(found, report, trained, scale)


def geometric_median(rows: Tensor, *, steps: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Find the point with the least sum of distances to rows, by Weiszfeld's iteration.

    Args:
        rows: [n, channels].
        steps: at most.
        tolerance: move of the last step.

    Returns:
        [channels].
    """
    guess = rows.mean(0)
    for _ in range(steps):
        weights = 1 / (rows - guess).norm(dim=1).clamp_min(1e-12)
        before, guess = guess, (weights / weights.sum()) @ rows
        if float((guess - before).norm()) < tolerance:
            break
    return guess


class Constrained(TrainingRule):
    """Keeps the norm of an autoencoder's directions, and lets its penalty grow.

    Attributes:
        of: what the autoencoder is, so that a training that goes on knows it.
    """

    of: dict[str, Any] = Field(default_factory=dict)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedRule:
        """See `TrainingRule.attach`."""
        return _Constrained(model)  # type: ignore[arg-type]


class _Constrained(AttachedRule):
    def __init__(self, autoencoder: SparseAutoencoder) -> None:
        self.autoencoder = autoencoder

    def before_step(self, progress: float) -> None:
        self.autoencoder.ramp = min(1.0, progress / RAMP)

    def after_backward(self, progress: float) -> None:
        self.autoencoder.constrain_gradients()

    def after_step(self, progress: float) -> None:
        self.autoencoder.constrain()

    def detach(self) -> None:
        self.autoencoder.ramp = 1.0

    def report(self) -> dict[str, Any]:
        silent = self.autoencoder.silent
        return {"silent for 10,000 rows": float((silent > 10_000).double().mean())}


def _site(store: ActivationStore, site: str | None) -> str:
    if site is not None:
        return site
    if len(store.sites) > 1:
        raise ValueError(f"site: {store.folder} holds {', '.join(store.sites)}; say which one.")
    return next(iter(store.sites))


def _made(kind: str, channels: int, latents: int, settings: dict[str, Any], seed: int) -> SparseAutoencoder:
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} was given, allowed are {', '.join(KINDS)}.")
    with own_random_numbers(torch.device("cpu"), seed):
        try:
            return KINDS[kind](channels, latents, **settings)
        except TypeError as error:
            raise ValueError(f"settings: {settings} were given for {kind}: {error}.") from error
