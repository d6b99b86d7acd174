"""The model card (README.md) of a saved model: what it is, how it was made, what was measured, on what.

Metadata are those of `huggingface_hub.ModelCardData`, measured numbers among them as evaluation results (the hub's
model-index), so that `ModelCard.load(folder / "README.md").data.eval_results` gives them back. What was not measured is
said to be so. Names that come from a user or a file are escaped: none of them can end the metadata, a table row or a
block of code.
"""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml
from torch import nn

from actkit.core.edit import changes
from actkit.core.ground.estimate import Estimate
from actkit.core.ground.machine import versions
from actkit.core.ground.modules import is_pretrained
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.prefill import decoding_only

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# The metric that a task is measured by -> the hub's name of the task; what is classified, the class says.
TASKS = {"perplexity": "text-generation", "fidelity": "feature-extraction"}
CLASSES = {"ImageClassification": "image-classification", "SequenceClassification": "text-classification"}
KEPT = ("license", "license_name", "license_link", "language")  # of the original's card


@dataclass(frozen=True)
class Card:
    """What a card says. All texts are taken as they are and escaped where they are put.

    Attributes:
        title: the first heading.
        library: who loads it ('actkit', 'transformers', 'gguf').
        made: a sentence or two of Markdown.
        use: Python that loads it.
        base_model: what it was made from, by name, or None.
        task: the hub's name of it, by default what the metrics say.
        metrics: by name, of the data in `data`.
        data: what was measured on.
        rows: (label, text) of further numbers.
        recipe: as a recipe lists it.
        notes: what else to know, one line each.
        kept: metadata of the original's card.
        machine: of the measurements, one line.
        methods: names of what was applied.
        tags: of the hub.
        versions: of the packages, by name.
    """

    title: str
    library: str
    made: str
    use: str
    base_model: str | None = None
    task: str | None = None
    methods: Sequence[str] = ()
    tags: Sequence[str] = ()
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    data: str = ""
    rows: Sequence[tuple[str, str]] = ()
    recipe: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    kept: Mapping[str, Any] = field(default_factory=dict)
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=versions)

    def text(self) -> str:
        """The whole README.md: metadata, then Markdown."""
        from huggingface_hub import ModelCard, ModelCardData

        task = self.task or next((TASKS[name] for name in self.metrics if name in TASKS), None)
        results = self.results(task)
        data = ModelCardData(
            base_model=self.base_model,
            library_name=self.library,
            pipeline_tag=task,
            tags=list(dict.fromkeys(("actkit", *self.tags, *self.methods))),
            model_name=self.title if results else None,
            eval_results=results or None,
            **self.kept,
        )
        return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{self._body()}"))

    def results(self, task: str | None) -> list[EvalResult]:
        """The metrics as the hub's model-index has them; those that are not finite are left out."""
        from huggingface_hub import EvalResult

        return [
            EvalResult(
                task_type=task or "other",
                dataset_type=re.sub(r"[^a-z0-9]+", "-", self.data.lower()).strip("-")[:64] or "given-data",
                dataset_name=self.data or "given data",
                metric_type=name,
                metric_value=_rounded(estimate.value),
                metric_name=f"{name.replace('_', ' ')}, 95 % interval {estimate.text().partition(' ')[2]}",
            )
            for name, estimate in self.metrics.items()
            if math.isfinite(estimate.value)
        ]

    def _body(self) -> str:
        parts = [f"# {escape(self.title)}", self.made, _fenced(self.use, "python")]
        rows = [(name.replace("_", " "), estimate.text()) for name, estimate in self.metrics.items()]
        rows += self.rows
        if rows:
            where = f" on {escape(self.data)}" if self.data else ""
            lines = "\n".join(f"| {escape(label)} | {escape(text)} |" for label, text in rows)
            parts.append(f"| measured{where} | value, 95 % interval |\n|---|---|\n{lines}")
        else:
            parts.append("Its quality was not measured: `actkit evaluate FOLDER --against ORIGINAL` does it.")
        parts += ["\n".join(f"- {escape(note)}" for note in self.notes)] if self.notes else []
        known = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        last = ([f"Machine: {escape(self.machine)}."] if self.machine else []) + [f"Versions: {escape(known)}."]
        parts.append("\n".join(last))
        if self.recipe:
            dumped = yaml.safe_dump(changes.recipe_of(self.recipe), sort_keys=False)
            parts += ["## Recipe", _fenced(dumped, "yaml")]
        return "\n\n".join(parts) + "\n"


class Measured(Protocol):
    """What `evaluate` measured, as a saved folder keeps it (`core.measure.evaluation.Evaluation`)."""

    def card_fields(self) -> dict[str, Any]:
        """The fields of `Card` that it fills."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        ...


def card_of(
    model: nn.Module, evaluation: Measured | None = None, *, title: str | None = None, made: str = "", **given: Any
) -> Card:
    """Make the card of a model in memory: its recipe, what it was made from, and what `evaluate` measured of it.

    Args:
        model: changed or not.
        evaluation: what was measured, or None.
        title: by default the class, and the methods.
        made: how it was made, in a sentence.
        given: other fields of `Card`, which win.

    Returns:
        The card.
    """
    known = changes.of(model)
    recipe = [] if known is None else known.recipe
    methods = changes.methods_of(recipe)
    plain = is_pretrained(model) and not (known is not None and known.edits)
    kept = _kept(model)
    base = kept.pop("base_model", None) or base_model(model)
    base_class = getattr(type(model), "actkit_base", type(model)).__name__
    fields: dict[str, Any] = {
        "title": title or ", ".join((base or base_class, *methods)),
        "library": "transformers" if plain else "actkit",
        "made": made or _made(base_class, methods),
        "use": 'import actkit\n\nmodel = actkit.load("path/to/this/folder")\n',
        "base_model": base,
        "task": next((task for name, task in CLASSES.items() if name in base_class), None),
        "methods": methods,
        "recipe": recipe,
        "kept": kept,
    }
    rounded = Counter(m.inputs.describe() for m in model.modules() if isinstance(m, ActLinear) and m.inputs is not None)
    if rounded:
        lines = (f"{count} linear layers: {what}" for what, count in rounded.items())
        given["notes"] = (*lines, *given.get("notes", ()))
    only = len(decoding_only(model))
    if only:
        note = f"{only} linear layers select inputs in decoding only, and read all of them in a prompt (prefill: dense)"
        given["notes"] = (f"{note}; figures of quality are of every token sparse", *given.get("notes", ()))
    grid = changes.source_grid(model)
    if grid is not None:
        given["notes"] = (f"quantized source, {grid.describe()}", *grid.notes, *given.get("notes", ()))
    if evaluation is not None:
        fields |= evaluation.card_fields()
    return Card(**fields | given)


def measured_before(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a card for what a saved folder's actkit.json says was measured; none if nothing was.

    Args:
        results: of the manifest: an 'evaluation' that `save` was given, or the 'candidate' of a search with its 'data'.
    """
    found = results.get("evaluation", {}).get("quality") or results.get("candidate") or {}
    metrics = {
        name: Estimate(each["value"], *(math.inf * sign if bound is None else bound for sign, bound in _bounds(each)))
        for name, each in found.get("metrics", {}).items()
        if each["value"] is not None
    }
    data = found.get("data") or results.get("data") or ""
    return {"metrics": metrics, "data": data} if metrics else {}


def _bounds(each: Mapping[str, Any]) -> tuple[tuple[int, float | None], tuple[int, float | None]]:
    return (-1, each["low"]), (1, each["high"])


def base_model(model: nn.Module) -> str | None:
    """What a model was loaded from, by name: a hub id, an embedded model, or a folder's own name; None if unknown."""
    origin = changes.source(model)
    if origin is None:
        return None
    path = Path(origin.name)
    hub = next((part for part in path.parts if part.startswith("models--")), None)  # the hub's cache of downloads
    return hub.removeprefix("models--").replace("--", "/") if hub else path.name


def escape(text: str) -> str:
    """Text for one line of Markdown, none of which acts as markup."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_|\[\]#])", r"\\\1", plain)


def _fenced(text: str, language: str) -> str:
    """A block of code whose fence is longer than any inside."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _made(base_class: str, methods: Iterable[str]) -> str:
    names = ", ".join(f"`{name}`" for name in methods)
    if not names:
        return f"A `{base_class}`, saved by actkit."
    return (
        f"A `{base_class}` changed by actkit: {names}. It needs `import actkit` to load; without it, loading fails "
        f"instead of giving wrong weights."
    )


def _kept(model: nn.Module) -> dict[str, Any]:
    """Licence and language from the card beside the original, if it has one that reads.

    If the original is itself a folder that actkit saved, also what that one was made from.
    """
    from huggingface_hub import ModelCard

    origin = changes.source(model)
    path = None if origin is None else Path(origin.name) / "README.md"
    if path is None or not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            if not file.readline().startswith("---"):
                return {}
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):  # another's card, which need not be well-formed
        return {}
    keys = (*KEPT, "base_model") if (path.parent / "actkit.json").exists() else KEPT
    return {key: data.get(key) for key in keys if data.get(key) is not None}


def _rounded(value: float) -> float:
    """Six digits, which no interval here supports more of."""
    return float(f"{value:.6g}")
