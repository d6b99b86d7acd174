"""The verbs, as Python functions and as the command line calls them: on a model or its name, with data by name.

`model` is a model in memory, a zoo name, a folder or a hub id. `data` is what `load_data` takes: None for the embedded
data of the split that fits the verb, a file or folder, 'random', or batches. The work is done by the functions below
the verbs (`core.recipe.runner.apply`, `core.measure.evaluation.evaluate` ...), which take models and batches only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from actkit import zoo
from actkit.core.edit import changes
from actkit.core.forward.batch import sequence_of
from actkit.core.forward.hooks import refuse_compiled_or_sharded
from actkit.core.forward.limits import context_length
from actkit.core.ground import processes
from actkit.core.ground.errors import ActkitError, DataError
from actkit.core.ground.memory import format_bytes
from actkit.core.ground.whole_file import write_whole
from actkit.core.measure.summary import Summary, summarise
from actkit.core.model.architectures import find_architecture
from actkit.core.page.result_page import page_of
from actkit.core.recipe import runner
from actkit.core.recipe.analysis import parse_analysis
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.stage import Train
from actkit.core.recipe.transform import Transform
from actkit.core.store.adapter_folder import is_adapter
from actkit.core.store.checkpoint import MANIFEST, check_savable, check_target, read_manifest, save
from actkit.data import Batches, Split, Stream, load_data
from actkit.generating import generate as generate
from actkit.generating import generate_all as generate_all
from actkit.zoo.loading import load_tokenizer, locate, open_model

if TYPE_CHECKING:
    from rich.table import Table

    from actkit.core.ground.results import Result
    from actkit.core.measure.evaluation import Evaluation
    from actkit.core.measure.proof import Proof
    from actkit.core.train.training import Trained
    from actkit.formats.exported import Exported
    from actkit.interpretation.sparse_autoencoder.contexts import LatentContexts
    from actkit.interpretation.sparse_autoencoder.training import TrainedAutoencoder
    from actkit.runtime.packing import PackedExport
    from actkit.search.results import Profile

Model = nn.Module | str | Path
LONGEST = 512  # tokens of a row, if nothing else is said
OPENING = ("device", "dtype", "base", "trust_remote_code")  # options of `open_model`
READING = ("sequences", "length", "batch_size", "seed", "beyond_context")  # options of `load_data`


def open_data(data: Any, model: nn.Module, tokenizer: Any, split: Split, **options: Any) -> Batches:
    """Batches for a verb: the `split` of the embedded data, or all that the user gave. options: as in `load_data`."""
    refuse_compiled_or_sharded(model)  # no verb takes one, and its call says nothing of what it takes
    return load_data(data, model, tokenizer, split=split if data is None else None, **options)


def profile(
    model: Model,
    data: Any = None,
    *,
    store: str | Path | None = None,
    sites: Iterable[str] = (),
    max_memory: int | str | None = None,
    **options: Any,
) -> Profile:
    """Show what the activations of a model look like, and which methods that suggests.

    Args:
        model: a model, or its name.
        data: None for the embedded calibration split.
        store: a folder of kept activations, in place of data: its sites are profiled, and the model is not run.
        sites: further sites or patterns to show, such as 'activation.output'.
        max_memory: cap for the statistics, bytes or '2GB'.
        options: of `open_model` and `load_data`.

    Returns:
        Sites, weights and findings.

    Raises:
        ValueError: what these and `search.profile.profile` raise.
    """
    from actkit.search.profile import profile as measure

    opening, reading = _sorted(options)
    opened, tokenizer = open_model(model, **opening)
    if store is not None:
        from actkit.core.store.activation_store import ActivationStore

        return measure(opened, data, store=ActivationStore.open(store), sites=sites, max_memory=max_memory)
    batches = open_data(data, opened, tokenizer, "calibration", **reading)
    return measure(opened, batches, sites=sites, max_memory=max_memory)


def analyze(
    model: Model,
    analysis: Any,
    data: Any = None,
    *,
    html: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Result:
    """Run an analysis by its name, ours or one of a plug-in.

    Args:
        model: a model, or its name.
        analysis: 'neuron_activity', 'neuron_activity:threshold=0.1' or {'neuron_activity': {'threshold': 0.1}}.
        data: None for the embedded calibration split.
        html: a file to which its page is written, or its tables and pictures if it has no page of its own.
        out: a file to which all that it found is written, as JSON.
        overwrite: replace what is at `html` and `out`.
        progress: show bars.
        options: of `open_model` and `load_data`.

    Returns:
        What it found, with `.table()`, `.figure()` and `.to_dict()`.

    Raises:
        RecipeError: the analysis or one of its settings is unknown.
        ValueError: a file exists.
        ActkitError: what opening, reading and the analysis itself raise.
    """
    found = parse_analysis(analysis)
    for name, path in (("html", html), ("out", out)):
        _prepare_file(name, path, overwrite)
    opening, reading = _sorted(options)
    opened, tokenizer = open_model(model, **opening)
    if found.reader is None:
        batches = open_data(data, opened, tokenizer, "calibration", **reading)
    else:
        batches = found.reader(data, opened, tokenizer, **reading)
    result = found(opened, batches, progress=progress)
    if html is not None:
        name = model if isinstance(model, str) else type(opened).__name__
        write_whole(Path(html), page_of(result, found.name.replace("_", " ").capitalize(), name).html())
    if out is not None:
        write_whole(Path(out), json.dumps(result.to_dict(), indent=1))
    return result


def _prepare_file(name: str, path: str | Path | None, overwrite: bool) -> None:
    """Refuse a file that exists, and make the folder of a new one, before anything is measured."""
    if path is not None and Path(path).exists() and not overwrite:
        raise ValueError(f"{name}: {path} exists already; choose another file, or pass overwrite=True, --overwrite.")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Harvested:
    """Activations on disk.

    Attributes:
        folder: the store.
        rows: of each site.
        shards: how many.
        disk_bytes: of all shards.
        seconds: of this run.
    """

    folder: Path
    rows: Mapping[str, int]
    shards: int
    disk_bytes: int
    seconds: float

    def table(self) -> Table:
        """Sites with their rows, and the size."""
        from actkit.core.ground.tables import PlainTable

        found = PlainTable(show_header=False, title=f"{self.folder}", title_justify="left", box=None, padding=(0, 2))
        for site, rows in self.rows.items():
            found.add_row(site, f"{rows:,} rows")
        found.add_row("on disk", f"{format_bytes(self.disk_bytes)} in {self.shards} shards")
        found.add_row("time", f"{self.seconds:.1f} s")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "folder": str(self.folder),
            "rows": dict(self.rows),
            "shards": self.shards,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
        }


def harvest(
    model: Model,
    sites: str | Sequence[str],
    data: Any = None,
    *,
    out: str | Path,
    tokens: int | None = None,
    max_disk: int | str | None = None,
    announce: Callable[[str], None] | None = None,
    progress: bool = True,
    **options: Any,
) -> Harvested:
    """Keep the activations of sites in a folder; the same call goes on where one was killed.

    Args:
        model: a model, or its name.
        sites: a site, a bare name or a pattern, or several.
        data: None for the embedded train split.
        out: the folder, which `core.store.activation_store.ActivationStore.open` reads.
        tokens: how many at least, in whole rows; None for all rows that are read.
        max_disk: cap for the folder, bytes or '2GB'.
        announce: called with a line that says bytes and seconds, before anything is written.
        progress: show a bar.
        options: of `open_model` and `load_data`.

    Returns:
        What is in the store.

    Raises:
        ValueError: tokens and sequences were given, or what `core.store.activation_store.harvest` raises.
        ActkitError: what opening and reading raise.
    """
    from actkit.core.store.activation_store import harvest as write

    started = time.perf_counter()
    opening, reading = _sorted(options)
    opened, tokenizer = open_model(model, **opening)
    if tokens is not None:
        if tokens < 1 or reading.get("sequences") is not None:
            raise ValueError(f"tokens: {tokens} was given; give 1 or more, and no sequences beside them.")
        length = reading.get("length") or min(LONGEST, context_length(opened) or LONGEST)
        reading |= {"length": length, "sequences": -(-tokens // length)}
    batches = open_data(data, opened, tokenizer, "train", **reading)
    store = write(opened, sites, batches, out, max_disk=max_disk, announce=announce, progress=progress)
    rows = {site: store.count(site) for site in store.sites}
    return Harvested(store.folder, rows, len(store.shards), store.bytes, time.perf_counter() - started)


def sae(
    store: str | Path,
    site: str | None = None,
    *,
    out: str | Path | None = None,
    kind: str = "topk",
    latents: int = 4096,
    k: float | None = None,
    sparsity: float | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> TrainedAutoencoder:
    """Train a sparse autoencoder on activations that `harvest` kept.

    Args:
        store: the folder.
        site: one of its sites; None if it has one.
        out: the folder to write, which SAELens opens; nothing if None.
        kind: 'topk', 'batchtopk', 'matryoshka', 'jumprelu', 'gated' or 'standard'.
        latents: how many.
        k: latents that are on in a row, of topk, batchtopk and matryoshka.
        sparsity: weight of the penalty of the others.
        settings: further ones of the kind's class.
        options: of `interpretation.sparse_autoencoder.training.train_autoencoder`.

    Returns:
        The autoencoder, and what it is worth on held-out rows.

    Raises:
        ValueError: a setting is out of bounds, or is none of this kind.
        ActkitError: what opening the store and training raise.
    """
    from actkit.core.store.activation_store import ActivationStore
    from actkit.interpretation.sparse_autoencoder.training import train_autoencoder

    own = dict(settings or {})
    if k is not None:
        own["k"] = int(k) if kind == "topk" and k == int(k) else k
    if sparsity is not None:
        own["sparsity"] = sparsity
    return train_autoencoder(
        ActivationStore.open(store), site, kind=kind, latents=latents, settings=own, out=out, **options
    )


def latents(
    autoencoder: str | Path,
    store: str | Path,
    site: str | None = None,
    *,
    text_of: str | None = None,
    count: int = 3,
    longest: float = 10.0,
    html: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> LatentContexts:
    """Find what the latents of a sparse autoencoder fire on, among activations that `harvest` kept.

    Args:
        autoencoder: the folder of one, ours or another tool's.
        store: the folder of the activations.
        site: one of its sites; None for that of the autoencoder.
        text_of: a model, by name or folder, whose tokenizer makes text of tokens; None shows their ids.
        count: places of each latent.
        longest: leave out rows whose norm is more than so many times the median, as in training.
        html: a file to which the page is written, to sort, to filter and to open.
        overwrite: replace what is there.
        progress: show a bar.

    Returns:
        The latents, with `.table()`, `.page()` and `.to_dict()`.

    Raises:
        ValueError: the file exists, or the site is not in the store.
        ActkitError: what opening the autoencoder, the store and the tokenizer raise.
    """
    from actkit.core.store.activation_store import ActivationStore
    from actkit.interpretation.sparse_autoencoder.contexts import latent_contexts
    from actkit.interpretation.sparse_autoencoder.files import read_autoencoder

    _prepare_file("html", html, overwrite)
    text = None if text_of is None else load_tokenizer(text_of).decode
    opened, kept = read_autoencoder(autoencoder), ActivationStore.open(store)
    found = latent_contexts(opened, kept, site, count=count, longest=longest, text=text, progress=progress)
    if html is not None:
        write_whole(Path(html), found.page().html())
    return found


def apply(
    model: Model,
    recipe: Any,
    data: Any = None,
    *,
    training: Any = None,
    validation: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    inplace: bool = True,
    undo: str | None = None,
    min_coverage: float | None = None,
    max_memory: int | str | None = None,
    progress: bool = True,
    announce: Callable[[str], None] | None = None,
    **options: Any,
) -> runner.Applied:
    """Apply a recipe: transforms, their names, a YAML file, or stages that apply and train (docs/recipes.md).

    Args:
        model: a model, which is changed in place unless `inplace` is False, or its name; one that is named and trained
            is opened in float32.
        recipe: transforms, names, a path, or stages.
        data: what transforms calibrate on, read only if one does; None is the embedded calibration split.
        training: what `train` stages that name no data of their own train on; by default the train split of `data`, or
            `data` itself if that is batches.
        validation: what they are measured on; by default the search split of the same. Needed for batches.
        out: the folder to write, nothing if None. A recipe with stages keeps its state beside it, and goes on there.
        resume: go on after the last finished stage of a recipe that was interrupted.
        overwrite: replace what is in `out`.
        inplace: change `model` itself, else a copy.
        undo: as in `core.recipe.runner.apply`; a recipe with stages is undone from memory.
        min_coverage: as in `core.recipe.runner.apply`.
        max_memory: cap for calibration, bytes or '2GB'.
        progress: show bars.
        announce: called with each line of the plan before work starts.
        options: of `open_model` and `load_data`. `sequences` is for calibration; a stage says how much it trains on.

    Returns:
        The changed model, its edits, and the report.

    Raises:
        ActkitError: what `core.recipe.runner.apply` and `core.train.staged_run.run` raise, DataError among them.
    """
    opening, reading = _sorted(options)
    recipe = Recipe.of(recipe)
    if not recipe.staged:
        if resume:
            raise ValueError("resume: it was given for a recipe without stages, which runs as one; leave it out.")
        if out is not None:
            target = out
            processes.on_first("the folder is free", lambda: check_target(target, overwrite=overwrite))
            if isinstance(model, nn.Module):
                check_savable(model)
    elif not isinstance(model, nn.Module) and opening.get("dtype") is None and _trains(recipe):
        opening["dtype"] = "float32"  # small updates vanish in 16 bits
    opened, tokenizer = open_model(model, **opening)
    settings: dict[str, Any] = {
        "inplace": inplace,
        "undo": undo,
        "min_coverage": min_coverage,
        "max_memory": max_memory,
        "progress": progress,
        "announce": announce,
    }

    def calibration(transforms: Iterable[Transform]) -> Batches | None:
        described = find_architecture(getattr(getattr(opened, "config", None), "model_type", None)) is not None
        if data is None and described and not any(transform.needs_data for transform in transforms):
            return None
        return open_data(data, opened, tokenizer, "calibration", **reading)

    if not recipe.staged:
        applied = runner.apply(opened, recipe, calibration(recipe), **settings)
        if out is not None:
            save(applied.model, out, overwrite=overwrite)
        return applied
    from actkit.core.train.staged_run import run

    recipe = Recipe(stage.under(**reading) if isinstance(stage, Train) else stage for stage in recipe.stages)
    training = data if training is None else training
    given: list[Any] = [
        _training_data(
            opened,
            tokenizer,
            stage.data or training,
            stage.validation or validation,
            f"stage {number} trains on batches",
            **stage.reading(),
        )
        if isinstance(stage, Train)
        else calibration(stage.transforms)
        for number, stage in enumerate(recipe.stages, 1)
    ]
    return run(opened, recipe, given, out=out, resume=resume, overwrite=overwrite, **settings)


def _trains(recipe: Recipe) -> bool:
    return any(isinstance(stage, Train) for stage in recipe.stages)


def _training_data(
    model: nn.Module,
    tokenizer: Any,
    data: Any,
    validation: Any,
    what: str,
    *,
    sequences: int | None = None,
    **reading: Any,
) -> tuple[Batches | Stream, Any]:
    """What is trained on, and what is measured: the train and search splits of data by name, or what was given.

    With `sequences` no more rows of the search split are read, to whole batches, so that a short training stays short.
    Raises DataError for batches without any to validate on (what: begins its text), and what `load_data` raises.
    """
    named = data is None or isinstance(data, str | Path)
    if isinstance(data, Stream) and sequences is not None:
        raise DataError(f"sequences: {sequences} was given for {data}, which has no end; leave it out, and give steps.")
    if not named and validation is None:
        raise DataError(f"validation: {what} without any to validate on; pass validation=, held-out batches.")
    batches: Any = data
    if not isinstance(data, Stream):
        batches = load_data(data, model, tokenizer, split="train" if named else None, sequences=sequences, **reading)
    if validation is None:
        held_out = load_data(data, model, tokenizer, split="search", **reading)
        return batches, held_out if sequences is None else held_out[: -(-sequences // len(held_out.document_ids[0]))]
    if isinstance(validation, str | Path):
        return batches, load_data(validation, model, tokenizer, **reading)
    return batches, validation


@dataclass(frozen=True)
class Saved:
    """A changed model on disk.

    Attributes:
        folder: what was written.
        disk_bytes: of the whole folder.
        report: what the run did.
        proof: that the folder loads as the model was.
    """

    folder: Path
    disk_bytes: int
    report: runner.Report
    proof: Proof | None

    def table(self) -> Table:
        """What changed, what was left alone and why, and whether it reloads."""
        from actkit.core.ground.tables import PlainTable

        found = PlainTable(show_header=False, title=f"{self.folder}", title_justify="left", box=None, padding=(0, 2))
        methods = dict.fromkeys(method for _, method in self.report.changed)
        for method in methods:
            found.add_row(method, f"{sum(m == method for _, m in self.report.changed)} edits")
        for path, method, reason in self.report.skipped:
            found.add_row(method, f"left {path} alone: {reason}")
        for note in alike(self.report.notes):
            found.add_row("note", note)
        found.add_row("on disk", format_bytes(self.disk_bytes))
        found.add_row("time", f"{self.report.seconds:.1f} s")
        found.add_row("proof", "not requested" if self.proof is None else self.proof.describe())
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        proof = None if self.proof is None else self.proof.to_dict()
        return {
            "folder": str(self.folder),
            "disk_bytes": self.disk_bytes,
            "report": self.report.to_dict(),
            "proof": proof,
        }


def alike(notes: Sequence[str]) -> list[str]:
    """Say once what notes say of many modules.

    Args:
        notes: such as 'model.layers.0.mlp: rounded without a scale'.

    Returns:
        Each text once, with the first module that it is about and how many more there are.
    """
    modules: dict[str, list[str]] = {}
    for note in notes:
        path, separator, text = note.partition(": ")
        if separator and "." in path and " " not in path:
            modules.setdefault(text, []).append(path)
        else:
            modules.setdefault(note, [])
    found = []
    for text, paths in modules.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        found.append(f"{paths[0]}{more}: {text}" if paths else text)
    return found


def apply_and_save(
    model: Model,
    recipe: Any,
    out: str | Path,
    data: Any = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    proof: bool = True,
    base: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> Saved:
    """Apply a recipe, save the model to `out`, and prove in a fresh process that the folder loads as the model was.

    The proof runs the first rows of given batches if the model takes more than tokens or images, else random ones. Of
    several processes the first one saves and proves; the others get no proof.

    Args:
        model: a model, or its name.
        recipe: as in `apply`.
        out: the folder to write.
        data: as in `apply`.
        resume: go on with a recipe of stages that was interrupted.
        overwrite: replace what is in `out`.
        proof: False leaves the proof out.
        base: for your own nn.Module, a function that builds the unchanged model.
        options: as in `apply`.

    Returns:
        The folder, the report and the proof.

    Raises:
        ActkitError: what `apply`, `save` and `prove` raise, or the proof fails (the folder is left for inspection).
    """
    from actkit.core.forward.example import example_of
    from actkit.core.measure.cost import folder_bytes
    from actkit.core.measure.proof import prove

    if not isinstance(model, nn.Module):
        options["base"] = base
    if not (data is None or isinstance(data, str | Path | Sequence)):  # read here, and once more for the proof
        data = sequence_of(data, "data")
    applied = apply(model, recipe, data, out=out, resume=resume, overwrite=overwrite, undo="off", **options)
    folder = Path(out)
    example = None if isinstance(data, str) else example_of(applied.model, data)
    proved = processes.on_first("proof", lambda: prove(applied.model, folder, example, base=base)) if proof else None
    if proved is not None and not proved.passed:
        raise ActkitError(f"proof: {proved.describe()}. The folder does not hold the model that was saved; report it.")
    return Saved(folder, folder_bytes(folder), applied.report, proved)


def export(
    model: Model,
    folder: str | Path,
    format: str = "compressed-tensors",
    *,
    adapter: bool = False,
    tokenizer: Any = None,
    evaluation: Evaluation | None = None,
    data: Any = None,
    measure: bool = False,
    overwrite: bool = False,
    proof: bool = True,
    max_shard: int | str = "4GB",
    **options: Any,
) -> Exported | PackedExport:
    """Write a model so that others load it without actkit, or packed as the decoder maps it (docs/formats.md).

    Args:
        model: changed, in memory or a folder that actkit saved.
        folder: where to write.
        format: 'compressed-tensors' (transformers, vLLM), 'gguf' (llama.cpp), 'dense' or 'transformers' (plain
            transformers), or 'packed' (the decoder of this package).
        adapter: write low-rank corrections (`lorc`) as a peft adapter inside the folder; compressed-tensors only.
        tokenizer: by default the one beside the model.
        evaluation: what `evaluate` found, for the card; by default what the model's folder says was measured.
        data: for `measure`, as in `evaluate`.
        measure: evaluate the model now.
        overwrite: replace a checkpoint at `folder`.
        proof: read the folder back in a fresh process with transformers alone.
        max_shard: largest size of a file, bytes or '4GB'.
        options: of `open_model` and `load_data`.

    Returns:
        What is quantized, what is dense and why, and the proof; for 'packed' its threads, bytes and proof.

    Raises:
        ActkitError: what `formats.export.export` and `runtime.packing.export_packed` raise.
        ValueError: a packed folder is to have a card.
    """
    from actkit.formats.export import SAME, check, read
    from actkit.formats.export import export as write

    format = SAME.get(format, format)
    if format == "packed":
        if adapter:
            raise ValueError("adapter: a packed folder holds corrections as they are; leave it out for 'packed'.")
        return _export_packed(model, folder, tokenizer, measure or evaluation is not None, overwrite, proof, **options)
    check(format, folder, overwrite=overwrite, proof=proof, adapter=adapter)
    opening, reading = _sorted(options)
    opened, found = open_model(model, **opening)
    measured = None
    if evaluation is None and measure:
        read(opened, format, adapter=adapter)  # what is refused is refused before it is measured
        evaluation = evaluate(opened, data, **reading)
    elif evaluation is None and not isinstance(model, nn.Module) and (locate(model) / MANIFEST).exists():
        from actkit.core.store.card import measured_before

        measured = measured_before(read_manifest(locate(model))["results"])
    return write(
        opened,
        folder,
        format,
        adapter=adapter,
        tokenizer=tokenizer or found,
        evaluation=evaluation,
        measured=measured,
        overwrite=overwrite,
        proof=proof,
        max_shard=max_shard,
    )


def _export_packed(
    model: Model, folder: str | Path, tokenizer: Any, measures: bool, overwrite: bool, proof: bool, **options: Any
) -> PackedExport:
    from actkit.runtime.packing import check_packed, export_packed

    if measures:
        raise ValueError("measure, evaluation: a packed folder has no card; leave them out for the format 'packed'.")
    check_packed(folder, overwrite=overwrite)
    opening, _ = _sorted(options)
    opened, found = open_model(model, to_decode=True, **opening)
    return export_packed(opened, folder, tokenizer=tokenizer or found, overwrite=overwrite, proof=proof)


def evaluate(
    model: Model,
    data: Any = None,
    *,
    against: Model | None = None,
    tasks: str | Path | Sequence[str | Path] | None = None,
    speed: bool = False,
    prompt: int = 128,
    max_new_tokens: int = 32,
    batch: int = 1,
    rounds: int = 5,
    threads: int | None = None,
    **options: Any,
) -> Evaluation:
    """Measure a model, and how far it is from an original: quality, cost, and with `speed` also speed.

    Args:
        model: a model, or its name.
        data: None for the embedded test split, which no calibration and no search saw.
        against: the original, a model or its name.
        tasks: names and task files of lm-eval (docs/tasks.md), run on both models beside the rest.
        speed: measure it too, in fresh processes.
        prompt: tokens of the prompt, for speed.
        max_new_tokens: tokens to decode, for speed.
        batch: rows, for speed.
        rounds: interleaved, for speed.
        threads: for speed; None for torch's number.
        options: of `open_model` and `load_data`.

    Returns:
        Every figure, with its interval.

    Raises:
        ActkitError: what opening, reading, `core.measure.evaluation.evaluate` and `core.measure.harness.load_tasks`
            raise.
    """
    from actkit.core.measure import harness
    from actkit.core.measure.evaluation import evaluate as measure
    from actkit.core.measure.quality import task_of

    opening, reading = _sorted(options)
    opened, tokenizer = open_model(model, **opening)
    task_of(opened)  # refuses what cannot be measured before any data is read
    original = None
    if against is not None:
        original, others = open_model(against, **opening)
        tokenizer = tokenizer or others
    loaded = None
    if tasks is not None:
        from actkit.data.tasks import TASKS

        harness.check_model(opened, tokenizer)
        loaded = harness.load_tasks(tasks, TASKS)
    batches = open_data(data, opened, tokenizer, "test", **reading)
    with ExitStack() as stack:
        found = measure(
            opened,
            batches,
            reference=original,
            folder=_folder(model, opened, stack, speed),
            reference_folder=None if against is None or original is None else _folder(against, original, stack, speed),
            speed=speed,
            batch=batch,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            rounds=rounds,
            threads=threads,
            dtype=opening.get("dtype"),
            base=opening.get("base"),
            trust_remote_code=bool(opening.get("trust_remote_code")),
            seed=reading.get("seed", 0),
        )
    if loaded is None:
        return found
    started = time.perf_counter()
    scores = harness.run_tasks(
        loaded,
        opened,
        tokenizer,
        original=original,
        batch_size=reading.get("batch_size", harness.BATCH),
        seed=reading.get("seed", 0),
    )
    return replace(found, tasks=scores, seconds=found.seconds + time.perf_counter() - started)


def train(
    model: Model,
    data: Any = None,
    *,
    out: str | Path | None = None,
    rules: Any = (),
    validation: Any = None,
    steps: int = 200,
    learning_rate: float = 1e-4,
    learning_rates: Mapping[str, float] | None = None,
    optimizer: Any = "adamw",
    trainable: Any = None,
    score: Any = None,
    schedule: Any = "cosine",
    warmup: float = 0.05,
    accumulation: int = 1,
    adapter: Any = None,
    merge: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Trained:
    """Fine-tune a model, under training rules if any.

    The test split of the embedded data stays unseen. docs/training.md shows what can be set.

    Args:
        model: a model, which is trained in place, or its name; one that is named is opened in float32.
        data: None for the embedded train split, validated on the search split; a file or folder is cut the same way;
            batches or a `data.Stream` need `validation`.
        out: the folder to write, nothing if None.
        rules: as in `core.recipe.rule.parse_rules`.
        validation: held-out batches, or their name.
        steps: of the optimizer.
        learning_rate: the peak.
        learning_rates: other peaks for some parameters, by a pattern of their names.
        optimizer: 'adamw', 'sgd:momentum=0.9' and so on, or a function of parameter groups.
        trainable: patterns of the names of the parameters that train, or a function of the model.
        score: what the best step is judged by, such as 'accuracy:better=higher'; None is the validation loss.
        schedule: the course of the rate: 'cosine', 'linear', 'constant' or 'wsdc:stable=0.6,decay=0.2'.
        warmup: share of the steps in which it rises.
        accumulation: batches per step.
        adapter: train low-rank changes beside the layers instead of the weights: 'lora:rank=8', 'eva:rank=8' and so on
            (`finetuning.adapters.parse_adapter`).
        merge: add them to the weights afterwards; otherwise `out` holds the adapter alone.
        resume: go on with the state kept in `out`.
        overwrite: replace what is in `out`.
        options: of `open_model` and `load_data`.

    Returns:
        The model with its history. The weights are those of the best step, or the last ones if a rule says so.

    Raises:
        ActkitError: what opening, reading and `core.train.training.train` raise.
    """
    from actkit.core.train.training import train as run_training

    if merge and adapter is None:
        raise ValueError("merge: it was given without an adapter to merge; give adapter= (--adapter), or leave it out.")
    opening, reading = _sorted(options)
    if not isinstance(model, nn.Module) and opening.get("dtype") is None:
        opening["dtype"] = "float32"  # small updates vanish in 16 bits
    settings: dict[str, Any] = {
        "steps": steps,
        "learning_rate": learning_rate,
        "learning_rates": learning_rates,
        "optimizer": optimizer,
        "score": score,
        "schedule": schedule,
        "warmup": warmup,
        "rules": rules,
        "gradient_accumulation": accumulation,
        "seed": reading.get("seed", 0),
        "out": out,
        "overwrite": overwrite,
    }
    if trainable is not None or adapter is None:
        settings["trainable"] = trainable
    if resume or adapter is None:
        settings["resume"] = resume
    if adapter is not None:
        from actkit.finetuning.adapters import parse_adapter
        from actkit.finetuning.low_rank_training import check, train_adapter

        chosen = parse_adapter(adapter)
        check(merge, **settings)
    opened, tokenizer = open_model(model, **opening)
    batches, held_out = _training_data(opened, tokenizer, data, validation, "batches were given", **reading)
    if adapter is None:
        return run_training(opened, batches, validation=held_out, **settings)
    layers = chosen.layers(opened, batches)
    name = None if isinstance(model, nn.Module) else _name_of(model)
    whole = chosen.whole(opened)
    return train_adapter(
        opened, batches, validation=held_out, layers=layers, also=whole, merge=merge, base=name, **settings
    )


def _name_of(model: str | Path) -> str:
    """A name that says the same from any folder."""
    return str(Path(model).absolute()) if model not in zoo.names() and Path(model).exists() else str(model)


def show(model: Model, data: Any = None, **options: Any) -> Summary:
    """Show what a model is: its parts, its coverage, and what actkit changed on it.

    Args:
        model: a model, or its name.
        data: one row of it is read if the architecture is not known; None for random values.
        options: as in `open_model`.

    Returns:
        The summary.
    """
    opened, tokenizer = open_model(model, **options)
    results = {}
    if not isinstance(model, nn.Module) and (locate(model) / MANIFEST).exists():
        results = read_manifest(locate(model))["results"]
    example = None
    if find_architecture(getattr(getattr(opened, "config", None), "model_type", None)) is None:
        few = {"sequences": 1} if data is None or isinstance(data, str | Path) else {}
        example = open_data("random" if data is None else data, opened, tokenizer, "calibration", **few)[0]
    return summarise(opened, example, results)


def _sorted(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `open_model`, and those of `load_data`. Raises TypeError for any other."""
    unknown = set(options) - {*OPENING, *READING}
    if unknown:
        allowed = ", ".join((*OPENING, *READING))
        raise TypeError(f"{', '.join(sorted(unknown))}: no such option; allowed are {allowed} besides the named ones.")
    opening = {name: value for name, value in options.items() if name in OPENING}
    return opening, {name: value for name, value in options.items() if name in READING}


def _folder(model: Model, opened: nn.Module, stack: ExitStack, needed: bool) -> Path | None:
    """A folder that holds the model: its own, or if one is needed a temporary copy."""
    folder = None
    if not isinstance(model, nn.Module):
        folder = locate(model)
    elif (origin := changes.source(model)) is not None and changes.of(model) is None and origin.untouched(model):
        folder = Path(origin.name)
    if folder is not None and is_adapter(folder):
        folder = None  # it does not hold the model, which has it merged
    loadable = folder is not None and ((folder / MANIFEST).exists() or changes.source(opened) is not None)
    if not needed or loadable:
        return folder
    temporary = stack.enter_context(TemporaryDirectory(prefix="actkit-"))
    return save(opened, Path(temporary) / "model")
