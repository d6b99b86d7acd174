"""optimize(model): profile it, try recipes, measure them, and keep the best that pays, or say that nothing pays.

    profile -> at most 12 recipes -> each made, measured, saved, reload-proved -> speeds in fresh processes, in turns
    with the original -> front -> verdict -> the best saved with a card, and proved once more -> report

Every finished measurement is in OUT/journal.jsonl before the next one begins, so a search that was stopped in any way
resumes. OUT holds at the end: journal.jsonl, results.json, index.html and, if something pays, best/ and recipe.yaml.
The other candidates are removed; their recipes are in the report and make them again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from actkit.core.edit import changes
from actkit.core.forward.example import Inputs, main_dtype
from actkit.core.ground import processes, registry, whole_folder
from actkit.core.ground.errors import ActkitError, MemoryLimitError
from actkit.core.ground.fingerprint import model_fingerprint
from actkit.core.ground.machine import machine, versions
from actkit.core.ground.memory import parse_bytes, release_memory
from actkit.core.ground.modules import is_pretrained
from actkit.core.ground.offload import refuse_offloaded
from actkit.core.ground.progress import say, step, track
from actkit.core.ground.whole_file import write_whole
from actkit.core.layers.selections import Prefill
from actkit.core.measure.fresh import import_name
from actkit.core.measure.proof import prove
from actkit.core.measure.speed import Speed, measure_speed
from actkit.core.measure.summary import summarise
from actkit.core.model.anatomy import Anatomy, anatomy
from actkit.core.page.templating import check_pages
from actkit.core.recipe.proposals import LeftOut, Shapes
from actkit.core.recipe.recipe import Recipe, transforms_of
from actkit.core.recipe.runner import check_model
from actkit.core.store import checkpoint
from actkit.kernels.compile_cache import nothing_compiled
from actkit.search.answers import ask
from actkit.search.budget import Budget, OutOfTime, check_minutes, out_of_time
from actkit.search.cache import last_level_cache
from actkit.search.candidates import MOST, USUAL, given, propose
from actkit.search.card import model_card
from actkit.search.compile_ahead import CompileAhead
from actkit.search.front import front, point
from actkit.search.journal import JOURNAL, Journal, check_out
from actkit.search.measured import Candidate, speed_from
from actkit.search.mixing.mixing import Aim, Mixing
from actkit.search.mixing.rounds import Rounds
from actkit.search.own_grid import WARNING as OWN_GRID
from actkit.search.profile import profile
from actkit.search.results import Answers, Optimization, Proposal
from actkit.search.speed_row import SpeedRow, measure_speed_row
from actkit.search.splits import ROWS, split_data
from actkit.search.verdict import TARGETS, Limits, Target, Verdict, decide
from actkit.search.workload import BATCH, Workload
from actkit.search.workshop import RANDOM, Workshop, recipe_key, task_for, transforms_key
from actkit.zoo.loading import open_model

RESULTS, REPORT, BEST, CANDIDATES, RECIPE = (
    "results.json",
    "index.html",
    "best",
    "candidates",
    "recipe.yaml",
)
SIDE_BY_SIDE = 4  # candidates timed in turns with one original: each is a process of its own
TWO_ENGINES = (
    "not every candidate goes through the decoder: a ratio of speeds compares with the original through the same "
    "engine, so compare candidates of one engine only"
)
ROUNDS = 5
ROW_SECONDS = 60.0  # of the 0.5B shape, building it included


def optimize(
    model: nn.Module | str | Path,
    *,
    out: str | Path = "actkit-report",
    data: Any = None,
    max_loss: float = 0.02,
    target: Target | None = None,
    min_speedup: float | None = None,
    max_peak: int | str | None = None,
    max_disk: int | str | None = None,
    max_recipes: int = USUAL,
    recipes: Sequence[Any] | None = None,
    minutes: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    speed: bool = True,
    speed_row: bool | None = None,
    mixes: int = 0,
    prompt: int | None = None,
    max_new_tokens: int | None = None,
    batch: int | None = None,
    prefill: Prefill = "sparse",
    max_memory: int | str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    base: Callable[[], nn.Module] | None = None,
    trust_remote_code: bool = False,
    threads: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Optimization:
    """Search for a cheaper model that is as good.

    What a candidate raises is recorded with it. Errors come before the first measurement, except that of minutes that
    are over.

    Args:
        model: a zoo name, a folder, a hub id, or a model in memory (left as it is: candidates are copies).
        out: the folder to write.
        data: as in `load_data`; None for the embedded data.
        max_loss: largest loss of quality, as a share, that the upper bound of its interval may reach.
        target: what the best is chosen for among those that pay: 'latency', 'throughput' (speed too, of 8 rows at a
            time unless `batch` says otherwise), 'memory', 'disk' or 'quality'; None for latency if that pays, else
            disk, else memory.
        min_speedup: least ratio of speeds that the lower bound of its interval must reach, such as 1.5; None for none.
            Mixes then lose as little as that allows.
        max_peak: most that a process that runs it may take at its peak, bytes or '300MB'; None for no limit.
        max_disk: most that its folder may hold, bytes or '100MB'; None for no limit.
        max_recipes: 1 to 20.
        recipes: try these instead (whatever `Recipe.of` takes).
        minutes: what the search may take at most; None for no limit. What does not fit by its estimate is left out, and
            noted.
        resume: go on with the journal in `out`.
        overwrite: replace what an earlier search left in `out`.
        speed: measure speed and memory in fresh processes.
        speed_row: measure the 0.5B shape (`speed_row.py`); None to do so if speed is measured and the model is a
            language model that fits in the cache, so that its own speed says little.
        mixes: how many mixes to try, models with another setting for each part (`search/mixing`), such as 2. Only for
            models that decode text, if speed is measured.
        prompt: tokens of the text behind which speed is measured; None for 128, or half of the context if that is less.
            From 1,024 on keys and values in 8 bits are among the candidates.
        max_new_tokens: that are timed for each row, 2 or more; None for 32, or half of the context if that is less.
        batch: rows that are timed together; None for 1 (for 8 if the model decodes no text, or for 'throughput').
        prefill: 'dense' for candidates that select inputs in decoding only, and read all of them in a prompt: the first
            token comes sooner. Quality is measured with every token sparse either way.
        max_memory: hard cap for calibration beside the model.
        device: as in `load`.
        dtype: as in `load`.
        base: builds the unchanged model, for one's own nn.Module, by a function that a fresh process can import.
        trust_remote_code: as in `load`.
        threads: of torch; None for its number now.
        seed: of everything random.
        progress: show bars.

    Returns:
        The original, the candidates, the verdict, and the folder of the best if one pays.

    Raises:
        ProcessError: it is called in one of several processes; its measurements need the machine to themselves.
        ValueError: a setting is out of bounds, or `out` exists.
        DataError: the data do not serve.
        JournalError: resuming is not possible.
        ImportError: jinja2 (the extra `report`) is missing.
        ActkitError: the model does not load, or the minutes were over before one candidate was measured; `resume` then
            goes on.
    """
    started = time.perf_counter()
    processes.refuse(
        "optimize",
        "it measures speed with the machine to itself: run it without torchrun, or apply and evaluate single recipes "
        "under torchrun",
    )
    check_minutes(minutes)
    _check_settings(max_loss, target, max_recipes, seed, threads, speed=speed)
    limits = Limits(max_loss, min_speedup, _bytes("max_peak", max_peak), _bytes("max_disk", max_disk))
    if max_peak is not None and not speed:
        raise ValueError(
            f"max_peak: {max_peak} was given with speed=False (--no-speed), and the peak is measured with the speed; "
            f"leave one of them out."
        )
    if min_speedup is not None and not (speed and 1 < min_speedup < float("inf")):
        raise ValueError(
            f"min_speedup: {min_speedup:g} was given{'' if speed else ' with speed=False (--no-speed)'}; give a ratio "
            f"above 1, such as 1.5, and let the speed be measured."
        )
    if mixes < 0:
        raise ValueError(f"mixes: {mixes} was given; give 0 for none, or how many to try.")
    if batch is None and target == "throughput":
        batch = BATCH
    workload = Workload(prompt, max_new_tokens, batch)
    workload.check(speed=speed)
    if prefill not in get_args(Prefill):
        raise ValueError(f"prefill: {prefill!r} was given, allowed are {', '.join(get_args(Prefill))}.")
    if prefill == "dense" and recipes is not None:
        raise ValueError("prefill: 'dense' was given with recipes=; write it into the recipes, and leave it out here.")
    check_pages()
    out = Path(out)
    check_out(out, resume=resume, overwrite=overwrite)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not isinstance(model, nn.Module):
        options |= {"device": device, "dtype": dtype, "base": base}
    name = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    opened, tokenizer = open_model(model, **options)
    refuse_offloaded(opened, "every candidate is a copy of it in memory")
    check_model(opened)
    checkpoint.check_savable(opened)
    _check_base(opened, base)
    workload.check_model(opened)
    with _threads(threads):
        known = changes.of(opened)
        earlier = transforms_of(known.recipe) if known else ()
        proposals = None if recipes is None else given(recipes, earlier)
        splits = split_data(data, opened, tokenizer, seed=seed)
        settings: dict[str, Any] = {
            "seed": seed,
            "threads": torch.get_num_threads(),
            "dtype": str(main_dtype(opened)).removeprefix("torch."),
            "device": str(device),
            "speed": speed,
            "length": splits.length,
            "batch_size": ROWS,
            **workload.given(),
        }
        header = {
            "model": {"name": name, "class": type(opened).__name__, "fingerprint": model_fingerprint(opened)},
            "data": splits.fingerprints(),
            "settings": settings,
            "versions": versions(),
            "machine": {key: machine()[key] for key in ("processor", "cores")},
        }
        if overwrite and not resume:
            _clear(out)
        again = resume and (out / JOURNAL).exists()
        journal = Journal.resume(out / JOURNAL, header) if again else Journal.start(out / JOURNAL, header)
        budget = Budget(splits, minutes, started)
        task, note = task_for(opened, splits)
        shop = Workshop(opened, tokenizer, task, splits, out / CANDIDATES, base, max_loss, max_memory, seed, progress)
        shop.interrupt = budget.interrupt
        shop.by_divergence = task == "language" and isinstance(data, str) and data == "random"
        search = _Search(out, name, shop, journal, limits, target, trust_remote_code, budget, workload, prefill)
        search.notes += [note] if note else []
        search.notes += [RANDOM] if shop.by_divergence else []
        try:
            found = search.run(proposals, max_recipes, earlier, speed=speed, speed_row=speed_row, mixes=mixes)
        finally:
            search.close()
    settings |= {
        "max_loss": max_loss,
        "target": target,
        "min_speedup": min_speedup,
        "max_peak": limits.max_peak,
        "max_disk": limits.max_disk,
        "max_recipes": max_recipes,
        "minutes": minutes,
        "prefill": prefill,
        "recipes": None if recipes is None else [str(recipe) for recipe in recipes],
        "data": data if data is None or isinstance(data, str | Path) else "given batches",
        "given_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
    }
    settings["data"] = None if settings["data"] is None else str(settings["data"])
    result = replace(found, settings=settings, seconds=time.perf_counter() - started)
    _write_results(result, out)
    return result


class _Search:
    """One search, from the profile to the saved best model."""

    def __init__(
        self,
        out: Path,
        name: str,
        shop: Workshop,
        journal: Journal,
        limits: Limits,
        target: Target | None,
        trust_remote_code: bool,
        budget: Budget,
        workload: Workload,
        prefill: Prefill,
    ) -> None:
        self.budget, self.workload, self.prefill = budget, workload, prefill
        self.out, self.name, self.shop, self.journal = out, name, shop, journal
        self.limits, self.target, self.trust = limits, target, trust_remote_code
        self.notes = list(journal.notes)
        self.cache = last_level_cache()
        self.ahead: CompileAhead | None = None

    def run(
        self,
        proposals: list[Proposal] | None,
        most: int,
        earlier: Sequence[Any],
        *,
        speed: bool,
        speed_row: bool | None,
        mixes: int,
    ) -> Optimization:
        shop = self.shop
        ids = shop.prompt()
        shop.mixes = bool(mixes) and speed and ids is not None
        if speed and ids is not None and nothing_compiled():
            self.ahead = self._compile_ahead(ids)
        view = anatomy(shop.model, shop.splits.calibration[0])
        seen = profile(
            shop.model,
            shop.splits.calibration,
            anatomy=view,
            max_memory=shop.max_memory,
            progress=shop.progress,
        )
        release_memory()  # of its statistics
        shapes = replace(Shapes.of(view), prompt=self._decoded()[0] if speed and ids is not None else 0)
        left: list[LeftOut] = []
        if proposals is None:
            proposals, left = propose(seen, shapes, most=most, earlier=earlier)
            proposals = [self._with_prefill(each) for each in proposals]
        else:
            left = [LeftOut("every recipe of the search", "recipes= was given")]
            left += [LeftOut(each.name, f"more than max_recipes={most}") for each in proposals[most:]]
            proposals = proposals[:most]
        original = self._original()
        self.budget.original(original)
        candidates, unpaid = self._measure(proposals, speed=speed)
        left += unpaid
        self.notes += [f"{c.name}: {note}" for c in candidates for note in c.notes if note.startswith(OWN_GRID)]
        if speed:
            original, candidates = self._speeds(original, candidates)
        mixing: Mixing | None = None
        if shop.mixes:
            mixing, mixed, unpaid = self._mix(view, proposals, original, candidates, mixes)
            left += unpaid
            original, candidates = self._speeds(original, [*candidates, *mixed])
        row, why_not = self._row(original, speed=speed, wanted=speed_row)
        verdict = decide(candidates, original, self.limits, target=self.target, cache=self.cache)
        points = [point(each, original) for each in (original, *candidates)]
        names = [each.name for each in (original, *candidates)]
        on_front = tuple(names[index] for index in front(points))
        prompt = shop.prompt()
        found = Optimization(
            name=self.name,
            profile=seen,
            original=original,
            candidates=tuple(candidates),
            left_out=tuple(left),
            front=on_front,
            verdict=verdict,
            best=None,
            proof=None,
            speed_row=row,
            speed_row_note=why_not,
            prompt=None
            if prompt is None or shop.tokenizer is None
            else shop.tokenizer.decode(prompt[0], skip_special_tokens=True),
            coverage=summarise(shop.model, shop.splits.calibration[0]).coverage,
            settings={},
            data=shop.splits.to_dict(),
            machine={**machine(), "last_level_cache": self.cache},
            versions=versions(),
            notes=tuple(dict.fromkeys(self.notes)),
            seconds=0.0,
            answers=self._answers(candidates, on_front, verdict),
            mixing=mixing,
        )
        found = self._keep_best(found)
        whole_folder.discard(shop.folder)
        return found

    # -- measuring

    def _compile_ahead(self, ids: Tensor) -> CompileAhead:
        """Start compiling, with the original's kernels. ids: int64 [1, length] of any length."""
        prompt, new_tokens = self._decoded()
        ids = ids.repeat(1, -(-prompt // ids.shape[1]))[:, :prompt]
        ahead = CompileAhead(ids, prompt + new_tokens, base=self.shop.base, trust_remote_code=self.trust)
        ahead.add("original", self.shop.saved_original())
        return ahead

    def close(self) -> None:
        """End the processes that are still there."""
        self.shop.close()
        if self.ahead is not None:
            self.ahead.close()
            self.ahead = None

    def _decoded(self) -> tuple[int, int]:
        """Tokens of the prompt and new ones, as they fit the context."""
        return self.workload.tokens(Inputs.of(self.shop.model).context)

    def _with_prefill(self, proposal: Proposal) -> Proposal:
        """The same with prompts that are read dense, if it selects inputs and that is wanted."""
        transforms = proposal.recipe.transforms
        if self.prefill == "sparse" or not any(hasattr(each, "prefill") for each in transforms):
            return proposal
        settings = [{"prefill": self.prefill} if hasattr(each, "prefill") else {} for each in transforms]
        changed = [each.model_copy(update=given) for each, given in zip(transforms, settings, strict=True)]
        return replace(proposal, recipe=Recipe(changed), why=f"{proposal.why}; prompts are read dense")

    def _original(self) -> Candidate:
        for entry in self.journal.find("original"):
            return Candidate.from_dict(entry["measured"])
        found = self.shop.original()
        self.journal.add("original", measured=found.to_dict())
        return found

    def _known(self) -> dict[str, Candidate]:
        """What the journal holds, by recipe. One that was stopped at a lower limit is to be measured again."""
        entries = self.journal.find("candidate")
        found = {
            entry["key"]: (Candidate.from_dict(entry["measured"]), entry.get("max_loss", 0.0)) for entry in entries
        }
        return {
            key: each for key, (each, limit) in found.items() if each.stopped is None or limit >= self.limits.max_loss
        }

    def _measure(self, proposals: Sequence[Proposal], *, speed: bool) -> tuple[list[Candidate], list[LeftOut]]:
        """The candidates, best first, as far as the minutes go; and what they did not pay for."""
        known, budget, left = self._known(), self.budget, []
        keys = {each.name: recipe_key(each.recipe) for each in proposals}
        for each in proposals:
            if keys[each.name] in known:
                self.shop.known(each, known[keys[each.name]])
                budget.seen(known[keys[each.name]])
        todo = [each for each in proposals if keys[each.name] not in known]
        self.shop.share(todo)
        if todo and self.shop.progress:
            say(self._estimates(todo))
        for proposal in track(todo, "Measuring the candidates", len(todo), self.shop.progress):
            seconds = budget.estimate(self.shop.to_compute(proposal))
            passed = sum(each.loss is not None for each in known.values())
            over = budget.over(seconds + (budget.speeds(passed + 1) if speed else budget.rest), proposal.name)
            if over is not None:
                left.append(LeftOut(proposal.name, f"minutes={budget.minutes:g}: {over}"))
                continue
            try:
                found = self.shop.measure(proposal)
            except OutOfTime as error:
                left.append(LeftOut(proposal.name, str(error)))
                continue
            if budget.pass_seconds:
                found = replace(found, passes=found.seconds / budget.pass_seconds)
            known[keys[proposal.name]] = found
            budget.seen(found)
            if self.ahead is not None and found.proof is not None:
                kinds = [f"{t.name} {getattr(t, 'bits', '')}" for t in proposal.recipe]
                self.ahead.add(" ".join(kinds), self.shop.folder_of(proposal.name))
            self.journal.add(
                "candidate",
                key=keys[proposal.name],
                measured=found.to_dict(),
                max_loss=self.limits.max_loss,
                estimated_seconds=seconds,
            )
            step(_told(found, seconds), self.shop.progress)
        self.close()
        if left and not known:
            assert budget.minutes is not None
            raise out_of_time(budget.minutes, str(self.journal.path), left[0].reason.partition(": ")[2])
        made = [each for each in proposals if keys[each.name] in known]
        return [replace(known[keys[each.name]], name=each.name, why=each.why) for each in made], left

    def _estimates(self, todo: Sequence[Proposal]) -> str:
        """What each candidate is thought to take, in one line."""
        held: set[int] = set()
        seconds: dict[str, float] = {}
        for proposal in todo:
            seconds[proposal.name] = self.budget.estimate(self.shop.to_compute(proposal, held))
        unit = f"a pass over the test split takes {self.budget.pass_seconds:.1f} s"
        each = ", ".join(f"{name} {number:.0f} s" for name, number in seconds.items())
        count = "1 candidate" if len(todo) == 1 else f"{len(todo)} candidates"
        return f"{count}, about {sum(seconds.values()):.0f} s at most ({unit}): {each}"

    def _speeds(self, original: Candidate, candidates: list[Candidate]) -> tuple[Candidate, list[Candidate]]:
        """Speeds of what was measured, a few candidates at a time in turns with the original."""
        keys = {each.name: transforms_key(each.recipe) for each in candidates}
        known = {entry["key"]: entry for entry in self.journal.find("speed")}
        whole = [each for each in candidates if each.failed is None and each.stopped is None]
        waiting = [each for each in whole if keys[each.name] not in known]
        groups = [waiting[at : at + SIDE_BY_SIDE] for at in range(0, len(waiting), SIDE_BY_SIDE)]
        over: str | None = None
        for group in track(groups, "Measuring speeds in fresh processes", len(groups), self.shop.progress):
            over = self.budget.over(self.budget.speeds(len(group)), f"timing {len(group)} candidates")
            if over is not None:
                break
            for each, content in self._time(original, group):
                self.journal.add("speed", key=keys[each.name], **content)
                known[keys[each.name]] = self.journal.entries[-1]
        timed = []
        for each in candidates:
            entry = known.get(keys[each.name])
            if entry is not None and entry["speed"] is not None:
                mine, other = speed_from(entry["speed"]), speed_from(entry["original"])
                each = each.with_speed(mine, other)
                if original.speed is None or (original.speed.engine, other.engine) == ("transformers", "decoder"):
                    original = replace(original, speed=other)
            elif entry is not None:
                each = replace(each, speed_failed=entry["failed"])
            elif each in whole:
                each = replace(each, speed_failed=f"minutes={self.budget.minutes:g}: {over}")
            timed.append(each)
        if len({each.speed.engine for each in timed if each.speed is not None}) > 1:
            self.notes.append(TWO_ENGINES)
        return (original if original.speed is None else replace(original, peak_share=1.0)), timed

    def _time(self, original: Candidate, group: Sequence[Candidate]) -> Iterator[tuple[Candidate, dict[str, Any]]]:
        """Each of a group with its speed, or why there is none; in smaller groups if they do not fit together."""
        folders = {each.name: self._folder(each) for each in (original, *group)}
        prompt, new_tokens = self._decoded()
        usual = 1 if Inputs.of(self.shop.model).causal else BATCH
        try:
            speeds: dict[str, Speed] = measure_speed(
                folders,
                batch=self.workload.batch or usual,
                prompt=prompt,
                max_new_tokens=new_tokens,
                rounds=ROUNDS,
                base=self.shop.base,
                trust_remote_code=self.trust,
                example=self.shop.splits.search[0],
                progress=False,
            )
        except (ActkitError, ValueError) as error:
            if len(group) == 1:
                yield group[0], {"speed": None, "original": None, "failed": str(error)}
                return
            middle = len(group) // 2
            yield from self._time(original, group[:middle])
            yield from self._time(original, group[middle:])
            return
        first = speeds[original.name].to_dict()
        for each in group:
            yield each, {"speed": _finite(speeds[each.name].to_dict()), "original": _finite(first), "failed": None}

    def _mix(
        self,
        view: Anatomy,
        proposals: Sequence[Proposal],
        original: Candidate,
        candidates: Sequence[Candidate],
        count: int,
    ) -> tuple[Mixing | None, list[Candidate], list[LeftOut]]:
        """Mixes of what was measured: what they rest on, these as candidates, and what was left out."""
        names = {each.name for each in candidates}
        rounds = Rounds(self.shop, self.journal, self.budget, lambda each: self._measure(each, speed=True), self._time)
        over = self.budget.over(2 * self.budget.estimate([]), "a mix")
        prepared = (
            f"minutes={self.budget.minutes:g}: {over}"
            if over
            else rounds.prepare(view, [each for each in proposals if each.name in names], original, candidates)
        )
        if isinstance(prepared, str):
            return None, [], [LeftOut("mixed recipes", prepared)]
        aim: Aim = "bytes" if self.target in ("disk", "memory") else "time"
        return rounds.run(prepared, count, self.limits.max_loss, aim, self.limits.min_speedup)

    def _folder(self, candidate: Candidate) -> Path:
        folder = self.shop.folder_of(candidate.name)
        if not folder.is_dir():
            if candidate.recipe:
                self.notes.append(f"{candidate.name} was made again: its folder was gone")
            return self.shop.make_again(candidate)
        return folder

    def _row(self, original: Candidate, *, speed: bool, wanted: bool | None) -> tuple[SpeedRow | None, str]:
        if wanted is None:
            if not speed:
                return None, "not measured: speed=False"
            if self.shop.task != "language":
                return None, "not measured: it is a language model's, and this model is none"
            if self.cache is None or (original.weight_bytes or 0) > self.cache:
                return None, "not measured: this model does not fit in the cache, so its own speed is what counts"
            wanted = True
        if not wanted:
            return None, "not measured: speed_row=False"
        over = self.budget.over(ROW_SECONDS, "it")
        for entry in self.journal.find("speed_row"):
            return (None if entry["row"] is None else SpeedRow.from_dict(entry["row"])), entry["note"]
        if over is not None:
            return None, f"not measured: minutes={self.budget.minutes:g}: {over}"
        try:
            row = measure_speed_row(seed=self.shop.seed, progress=self.shop.progress)
        except (MemoryError, MemoryLimitError) as error:
            note = f"not measured: {error}"
            self.journal.add("speed_row", row=None, note=note)
            return None, note
        self.journal.add("speed_row", row=_finite(row.to_dict()), note="")
        return row, ""

    def _answers(self, candidates: Sequence[Candidate], on_front: Sequence[str], verdict: Verdict) -> Answers:
        """The best first, then the rest of the front from the smallest loss on."""
        shown = [each for each in candidates if each.name in on_front and each.loss is not None]
        shown.sort(key=lambda each: (each.name != verdict.best, each.loss.value if each.loss else 0.0))
        return ask(self.shop, shown, self.journal, self.budget, self._folder)

    # -- the best

    def _keep_best(self, found: Optimization) -> Optimization:
        """Save the best with a card in OUT/best, and prove that it loads in a fresh process as it was made."""
        target = self.out / BEST
        if found.verdict.best is None:
            whole_folder.discard(target)
            (self.out / RECIPE).unlink(missing_ok=True)
            return found
        best = found.candidate(found.verdict.best)
        made = checkpoint.load(self._folder(best), base=self.shop.base)
        results = {"candidate": best.to_dict(), "original": found.original.to_dict(), "machine": found.machine}
        results["data"] = found.data["test"]["data"]
        checkpoint.save(
            made,
            target,
            tokenizer=self.shop.tokenizer,
            overwrite=target.exists(),
            card=model_card(found, best),
            results=results,
        )
        proof = prove(made, target, self.shop.example(), base=self.shop.base)
        if not proof.passed:
            raise ActkitError(f"best: {proof.describe()}. The folder does not hold the model; report it.")
        best.methods.save(self.out / RECIPE)
        return replace(found, best=target, proof=proof)


def _finite(content: Any) -> Any:
    """JSON knows no infinity: what is not finite is None already in our dictionaries, or becomes it here."""
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


def _told(candidate: Candidate, estimate: float) -> str:
    """One line on a measured candidate."""
    loss = "" if candidate.loss is None else f"loss {candidate.loss.value:.2%} on the test split"
    passes = "" if candidate.passes is None else f", {candidate.passes:.1f} passes"
    what = candidate.failed or candidate.stopped or loss
    return f"{candidate.name}: {what} ({candidate.seconds:.0f} s{passes}; {estimate:.0f} s were estimated)"


def _write_results(result: Optimization, out: Path) -> None:
    """results.json and index.html, each complete or not there."""
    from actkit.search.report import render

    texts = {RESULTS: json.dumps(_finite(result.to_dict()), indent=1), REPORT: render(result)}
    for name, text in texts.items():
        write_whole(out / name, text)


# -- before it starts --------------------------------------------------------------------------------------------------


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    with ExitStack() as stack:
        if count is not None:
            stack.callback(torch.set_num_threads, before)
            torch.set_num_threads(count)
        yield


def _check_settings(
    max_loss: float, target: str | None, max_recipes: int, seed: int, threads: int | None, *, speed: bool
) -> None:
    if target is not None and target not in TARGETS:
        raise ValueError(f"target: {target!r} was given, allowed are {', '.join(TARGETS)}.")
    if target in ("latency", "throughput", "memory") and not speed:
        raise ValueError(
            f"target: {target!r} was given, which is measured with the speed; leave out speed=False (--no-speed), or "
            f"choose the target 'disk' or 'quality'."
        )
    if not 0 <= max_loss < float("inf"):
        raise ValueError(f"max_loss: {max_loss} was given; give a share of 0 or more, such as 0.02.")
    if not 1 <= max_recipes <= MOST:
        raise ValueError(f"max_recipes: {max_recipes} was given, allowed are 1 to {MOST}.")
    if seed < 0:
        raise ValueError(f"seed: {seed} was given; give 0 or more.")
    if threads is not None and threads < 1:
        raise ValueError(f"threads: {threads} was given; give 1 or more.")


def _bytes(name: str, given: int | str | None) -> int | None:
    """What was given as a size."""
    if given is None:
        return None
    try:
        size = parse_bytes(given)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not size:
        raise ValueError(f"{name}: {given} was given; give more than 0, such as '300MB', or None for no limit.")
    return size


def _check_base(model: nn.Module, base: Callable[[], nn.Module] | None) -> None:
    if base is not None:
        import_name(base)
    elif not is_pretrained(model) and registry.model_name(type(model)) is None:
        raise ValueError(
            f"base: {type(model).__name__} is not a transformers model, nor registered under actkit.models; pass a "
            f"function that builds it unchanged, in a module that can be imported, so that candidates can be loaded in "
            f"a fresh process."
        )


def _clear(out: Path) -> None:
    """Remove what a search leaves, and nothing else."""
    for name in (CANDIDATES, BEST):
        whole_folder.discard(out / name)
    for name in (
        RESULTS,
        REPORT,
        RECIPE,
        JOURNAL,
    ):  # last what makes it a search's folder
        (out / name).unlink(missing_ok=True)
