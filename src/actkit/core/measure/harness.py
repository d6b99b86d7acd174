"""Tasks of lm-eval (the extra `eval`) on models in memory, changed or not.

lm-eval builds the requests and the metrics; its own Hugging Face wrapper drives the model, so a task gives what it
gives for any other model. Log-probabilities are float32 whatever the model computes in. A task is the name of one that
comes with actkit, a YAML file, or a name of lm-eval's, whose data come from the hub.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import os
import random
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
import yaml
from torch import nn

from actkit.core.forward.example import Inputs
from actkit.core.forward.hooks import evaluating
from actkit.core.ground import processes
from actkit.core.ground.errors import ActkitError, DataError, UnsupportedModelError
from actkit.core.ground.estimate import Estimate
from actkit.core.ground.modules import is_pretrained
from actkit.core.measure.task_scores import NORMAL, TaskScore, score

FILES = (".yaml", ".yml")
LOCAL = ("json", "csv", "parquet", "text", "arrow", "pandas", "xml")  # loaders of `datasets` that read given files
BATCH = 8  # requests run at a time
WAIT = 3.0  # seconds for the hub to answer


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, ready to be run.

    Attributes:
        loaded: lm-eval's tasks and groups.
        by: lm-eval and its version.
    """

    loaded: dict[str, Any]
    by: str


def names_of(tasks: str | Path | Sequence[str | Path], own: Mapping[str, Path]) -> list[str | Path]:
    """Return what `tasks=` names, split at commas.

    Args:
        tasks: names and task files; a text may hold several with commas between them.
        own: task files by name, which stand for these names.

    Returns:
        Names and files, each once.

    Raises:
        ValueError: nothing is named, or an empty name is among them.
    """
    given = [tasks] if isinstance(tasks, str | Path) else list(tasks)
    found: list[str | Path] = []
    for each in given:
        parts = [part.strip() for part in each.split(",")] if isinstance(each, str) else [each]
        found += [own.get(str(part), part) for part in parts]
    if not found or any(str(part) == "" for part in found):
        raise ValueError(
            f"tasks: {tasks!r} names no task, or an empty one; give names or task files, with commas between them, "
            f"such as documentation."
        )
    return list(dict.fromkeys(found))


def load_tasks(tasks: str | Path | Sequence[str | Path], own: Mapping[str, Path]) -> Tasks:
    """Find tasks and read their data, before any model runs.

    Args:
        tasks: names and task files; a text may hold several with commas between them.
        own: the task files that come with actkit, by name.

    Returns:
        The tasks, for `run_tasks`.

    Raises:
        ImportError: lm-eval (the extra `eval`) is missing.
        ValueError: nothing was named, or lm-eval knows no task of a name.
        DataError: there is no such file, it is no task file, its data are not there, or the hub cannot be reached.
        ProcessError: in one of several processes.
    """
    processes.refuse("tasks", "lm-eval runs in one process: leave out tasks under torchrun, or evaluate without it")
    named = names_of(tasks, own)
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("tasks: lm-eval is missing, which runs them; pip install 'actkit[eval]'.")
    files = [Path(each) for each in named if _is_file(each)]
    others = [str(each) for each in named if not _is_file(each)]
    configs = {file: _config(file) for file in files}
    for file, config in configs.items():
        path = config.get("dataset_path")
        if isinstance(path, str) and path not in LOCAL and not Path(path).exists():
            _reach(f"{file} reads the data set {path!r} of the hub")
    for name in others:
        _reach(f"{name!r} is no task of actkit ({', '.join(own)}) and no .yaml file, and lm-eval's own read the hub")
    with _quiet(), TemporaryDirectory() as folder:
        from lm_eval import __version__
        from lm_eval.tasks import TaskManager

        groups = [str(file.parent) for file, config in configs.items() if "group" in config]
        manager = TaskManager(include_path=groups or None, include_defaults=bool(others or groups))
        specs: list[str] = []
        for name in others:
            if name not in manager.all_tasks:
                raise ValueError(
                    f"tasks: lm-eval {__version__} knows no task {name!r}; choose {', '.join(own)}, one that "
                    f"`lm_eval ls tasks` lists, or give a .yaml file."
                )
        for each in (*files, *others):
            config = configs[each] if isinstance(each, Path) else {}
            if "group" in config:
                specs.append(config["group"])  # found in its folder, with what it names
            else:
                specs.append(str(_with_data(each, config, Path(folder)) if isinstance(each, Path) else each))
        try:
            loaded = manager.load(specs)
        except Exception as error:  # whatever a task file, its functions, its templates or the hub raise
            what = f"{type(error).__name__}: {error}".split("\n")[0]
            raise DataError(
                f"tasks: lm-eval cannot load {', '.join(map(str, named))} ({what}); mend the task file or its data, or "
                f"check the network."
            ) from error
    return Tasks(dict(loaded), f"lm-eval {__version__}")


def check_model(model: nn.Module, tokenizer: Any) -> None:
    """Check that tasks can be run on a model.

    Args:
        model: should be a language model of transformers.
        tokenizer: its tokenizer.

    Raises:
        UnsupportedModelError: it is another model, or has no tokenizer.
    """
    if not is_pretrained(model) or not model.can_generate() or not Inputs.of(model).causal:
        raise UnsupportedModelError(
            f"tasks: {type(model).__name__} is no language model of transformers, and tasks are made of text; leave "
            f"out tasks."
        )
    if tokenizer is None:
        raise UnsupportedModelError("tasks: the model has no tokenizer beside it; save one with it, or leave them out.")


def run_tasks(
    tasks: Tasks,
    model: nn.Module,
    tokenizer: Any,
    *,
    original: nn.Module | None = None,
    batch_size: int = BATCH,
    seed: int = 0,
) -> tuple[TaskScore, ...]:
    """Run tasks on a model, and on its original, and pair the items of both.

    Args:
        tasks: what `load_tasks` found.
        model: a language model of transformers.
        tokenizer: its tokenizer; it is left as it is.
        original: what to compare with.
        batch_size: requests run at a time.
        seed: of examples that a task draws, and of the bootstrap.

    Returns:
        One score per task and metric.

    Raises:
        UnsupportedModelError: a model is no language model of transformers, or has no tokenizer.
        DataError: lm-eval fails on the items of a task.
    """
    for each in (model, original):
        if each is not None:
            check_model(each, tokenizer)
    runs = [_run(tasks, each, tokenizer, batch_size, seed) for each in (model, original) if each is not None]
    found = []
    for name, row in runs[0]["results"].items():
        for key, value in row.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = metric if kept == "none" else f"{metric} ({kept})"
            per_item = [_per_item(run, name, metric, kept) for run in runs]
            if all(values is not None for values in per_item):
                found.append(score(name, label, *per_item, by=tasks.by, seed=seed))  # type: ignore[arg-type]
                continue
            wholes = [_with_error(run["results"][name], metric, kept) for run in runs]
            items = len({each["doc_id"] for each in runs[0]["samples"].get(name, ())}) or int(row.get("sample_len", 0))
            found.append(TaskScore(name, label, wholes[0], (*wholes, None)[1], None, items, tasks.by))
    return tuple(found)


def _run(tasks: Tasks, model: nn.Module, tokenizer: Any, batch_size: int, seed: int) -> Any:
    """lm-eval's results and samples; random states are as before afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        with _quiet(), evaluating(model), torch.random.fork_rng():
            from lm_eval import evaluate
            from lm_eval.models.huggingface import HFLM

            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            for task in tasks.loaded["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=seed)

            harness = HFLM(
                pretrained=model,
                backend="causal",
                tokenizer=copy.deepcopy(tokenizer),  # it sets a padding token
                softmax_dtype="float32",
                batch_size=batch_size,
            )
            try:
                return evaluate(lm=harness, task_dict=tasks.loaded, log_samples=True)
            except (ActkitError, RuntimeError):  # the model's
                raise
            except Exception as error:  # whatever the templates and functions of a task file raise on an item
                names, what = ", ".join(tasks.loaded["tasks"]), f"{type(error).__name__}: {error}".split("\n")[0]
                raise DataError(f"tasks: lm-eval fails on {names} ({what}); mend the task file or its data.") from error
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _per_item(run: Any, name: str, metric: str, kept: str) -> torch.Tensor | None:
    """float64 [items] in the order of the documents; None if the metric is no mean of a number of each."""
    samples = [each for each in run["samples"].get(name, ()) if each.get("filter", kept) == kept]
    values = [each.get(metric) for each in sorted(samples, key=lambda each: each["doc_id"])]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    found = torch.tensor(values, dtype=torch.float64)
    whole = run["results"][name][f"{metric},{kept}"]
    return found if math.isclose(float(found.mean()), whole, rel_tol=1e-9, abs_tol=1e-12) else None


def _with_error(row: Mapping[str, Any], metric: str, kept: str) -> Estimate:
    """A value with the interval of lm-eval's standard error, if it states one."""
    value, error = float(row[f"{metric},{kept}"]), row.get(f"{metric}_stderr,{kept}")
    margin = NORMAL * error if isinstance(error, int | float) else math.inf
    return Estimate(value, value - margin, value + margin)


# -- files and the hub -------------------------------------------------------------------------------------------------


def _is_file(task: str | Path) -> bool:
    return isinstance(task, Path) or task.endswith(FILES) or os.sep in task


class _Loader(yaml.SafeLoader):
    """Task files as plain values: what a tag of lm-eval's makes of a node is left to lm-eval."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _config(file: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A task file's settings with those that it includes."""
    if not file.is_file():
        raise DataError(f"tasks: there is no file {file}; give a task file of lm-eval, or a task's name.")
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise DataError(f"tasks: {file} is not valid YAML ({what}); give a task file of lm-eval.") from error
    if not isinstance(found, dict) or not (seen or "include" in found or {"task", "group"} & set(found)):
        raise DataError(f"tasks: {file} names no task: or group:; give a task file of lm-eval.")
    included = found.pop("include", ())
    merged: dict[str, Any] = {}
    for each in [included] if isinstance(included, str) else included:
        other = file.parent / each
        if other not in seen:
            merged |= _config(other, (*seen, file))
    return merged | found


def _with_data(file: Path, config: Mapping[str, Any], folder: Path) -> Path:
    """The task file, or one in `folder` that includes it and names data files beside it by their whole path."""
    settings = config.get("dataset_kwargs")
    given = settings.get("data_files") if isinstance(settings, Mapping) else None
    if config.get("dataset_path") not in LOCAL or given is None:
        return file
    beside = _beside(given, file.parent.resolve())
    if beside == given:
        return file
    made = folder / f"{len(list(folder.iterdir()))}-{file.name}"
    content = {
        "include": str(file.resolve()),
        "task": config["task"],
        "dataset_kwargs": {**settings, "data_files": beside},  # type: ignore[dict-item]
    }
    made.write_text(yaml.safe_dump(content), encoding="utf-8")
    return made


def _beside(files: Any, folder: Path) -> Any:
    """Names of files that are not there, but are in the folder, as files in the folder."""
    if isinstance(files, Mapping):
        return {name: _beside(each, folder) for name, each in files.items()}
    if isinstance(files, list):
        return [_beside(each, folder) for each in files]
    if isinstance(files, str) and "://" not in files and not Path(files).exists():
        if not (folder / files).exists() and not any(sign in files for sign in "*?["):
            raise DataError(f"tasks: there is no data file {files}, here or in {folder}; give a path that is there.")
        return str(folder / files)
    return files


def _reach(why: str) -> None:
    """Raise DataError at once if the hub cannot be reached; `datasets` would try for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return  # `datasets` looks into its cache only
    proxy = next((os.environ[name] for name in ("HTTPS_PROXY", "https_proxy") if os.environ.get(name)), None)
    address = urlsplit(proxy or constants.ENDPOINT)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=WAIT).close()
    except OSError as error:
        raise DataError(
            f"tasks: {why}, which cannot be reached ({error}); give a task file with data of your own, or set "
            f"HF_HUB_OFFLINE=1 to use what is in the cache."
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval says a lot; its errors stay, and our own tables say the rest."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
