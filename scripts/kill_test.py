"""Kill processes (SIGKILL) at random times while they save, search and harvest; nothing half-written may load.

    python scripts/kill_test.py --saves 160 --searches 40 --harvests 100

One process imports everything and forks a child for each kill, so that a kill costs what a save does. After each one:

    save      the folder loads as the old or as the new model, bit for bit; a new folder may also not be there; what the
              killed process left beside it loads exactly, or is refused by name
    search    the journal reads; best/, recipe.yaml, results.json and index.html are whole or not there; the search goes
              on with resume=True through all kills and ends with the verdict, the losses and the best model of one that
              nobody killed
    harvest   a store of activations opens, or is refused by name; the harvest goes on through all kills and ends with
              the files, byte for byte, of one that nobody killed

The search proves its candidates in this process (a fresh one takes seconds to start, and is what other tests are for).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from actkit.core.forward.batch import first_tensor, forward
from actkit.core.ground import whole_folder
from actkit.core.ground.errors import CheckpointError
from actkit.core.measure import proof
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.core.store.activation_store import ActivationStore, harvest
from actkit.core.store.tensor_files import read_values, write_values
from actkit.core.watch import one_pass
from actkit.search import workshop
from actkit.search.results import Optimization
from actkit.search.search import optimize

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
OPTIONS: dict[str, Any] = {"data": "random", "speed": False, "max_recipes": 3, "threads": 1, "progress": False}
ROUNDED = {"actkit": 1, "transforms": [{"rtn": {"bits": 8, "group_size": 64}}]}
State = dict[str, tuple[torch.dtype, bytes]]


def build(scale: float = 1.0) -> nn.Module:
    """A random Llama of two blocks; the same one each time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=128, max_position_embeddings=64)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def state_of(model: nn.Module) -> State:
    """Every saved tensor, bit by bit."""
    return {
        name: (t.dtype, t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in model.state_dict().items()
    }


def killed(work: Callable[[], None], delay: float) -> bool:
    """Do `work` in a forked child that is killed after `delay` seconds; whether it was still at work."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise AssertionError("the child failed by itself")
    return os.WIFSIGNALED(status)


# -- saves -------------------------------------------------------------------------------------------------------------


def kill_saves(count: int, folder: Path, seed: int = 0) -> dict[str, int]:
    """Kill `count` saves: over an existing model, into a new folder, and of the state of a training, in turns.

    Returns how often what was found. Raises AssertionError where something half-written loads.
    """
    generator = random.Random(seed)
    models = [apply(build(scale), ROUNDED, None, min_coverage=0.0, progress=False).model for scale in (1.0, 2.0)]
    states = [state_of(model) for model in models]
    values = [{"step": index, "tensors": dict(model.state_dict())} for index, model in enumerate(models)]
    there = folder / "there"
    checkpoint.save(models[1], there)
    started = time.perf_counter()  # of a second one, as the first is slower
    checkpoint.save(models[0], there, overwrite=True)
    period = time.perf_counter() - started
    found = {"old": 0, "new": 0, "none": 0}

    def overwrite(order: list[nn.Module]) -> None:
        while True:
            for model in order:
                checkpoint.save(model, there, overwrite=True)

    at = 0  # which of the two models is there
    for turn in range(count):
        kind = ("overwrite", "new", "training")[turn % 3]
        delay = generator.uniform(0, 1.6 * period)
        if kind == "overwrite":
            other = [models[1 - at], models[at]]
            killed(lambda order=other: overwrite(order), delay)
            before, at = at, states.index(state_of(checkpoint.load(there)))
            found["old" if at == before else "new"] += 1
        elif kind == "new":
            target = folder / f"new-{turn}"
            killed(lambda target=target: checkpoint.save(models[1], target) and None, delay)
            found[_loaded(target, states[1])] += 1
        else:
            target = folder / f"state-{turn}"
            killed(lambda target=target: _write_state(values[1], target), delay)
            try:
                read = read_values(target)
            except CheckpointError:
                found["none"] += 1
            else:
                assert read["step"] == 1 and all(torch.equal(read["tensors"][k], t) for k, t in _tensors(values[1]))
                found["new"] += 1
    for left in folder.iterdir():
        if left.name.startswith(".") and ".saving-" in left.name and "state" not in left.name:
            try:
                assert state_of(checkpoint.load(left)) in states, f"{left} loads, and is neither model"
            except CheckpointError:
                continue
    checkpoint.save(models[0], there, overwrite=True)
    assert state_of(checkpoint.load(there)) == states[0]
    assert not list(folder.glob(".there*")), "what killed saves left beside a folder is gone after the next save"
    return found


def _loaded(target: Path, state: State) -> str:
    try:
        model = checkpoint.load(target)
    except CheckpointError:
        assert not target.exists(), f"{target} is there and does not load"
        return "none"
    assert state_of(model) == state
    return "new"


def _write_state(values: dict[str, Any], target: Path) -> None:
    with whole_folder.complete_or_nothing(target) as temporary:
        write_values(temporary, values)


def _tensors(values: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return list(values["tensors"].items())


# -- searches ----------------------------------------------------------------------------------------------------------


class InThisProcess:
    """Stands in for `FreshProcess` where a folder is proved."""

    closed = False

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or torch.get_num_threads()

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def use_threads(self, threads: int) -> None:
        self.threads = threads

    def load(self, folder: Any, dtype: Any = None, **_: Any) -> dict[str, Any]:
        self.model = checkpoint.load(folder, dtype=dtype)
        return {"dtype": str(self.model.dtype).removeprefix("torch."), "attention": "sdpa", "unsaved": {}}

    def outputs(self, batch: Any) -> Tensor:
        with torch.no_grad():
            return first_tensor(forward(self.model, batch)).float()


@contextmanager
def proofs_in_this_process() -> Iterator[None]:
    before = workshop.FreshProcess, proof.FreshProcess
    workshop.FreshProcess = proof.FreshProcess = InThisProcess  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        workshop.FreshProcess, proof.FreshProcess = before  # type: ignore[misc]


def summary(result: Optimization) -> dict[str, Any]:
    """What two searches of one model must agree on."""
    losses = {each.name: (each.search_loss, each.loss, each.disk_bytes) for each in result.candidates}
    return {"best": result.verdict.best, "front": result.front, "losses": losses}


def kill_searches(count: int, folder: Path, seed: int = 0) -> dict[str, int]:
    """Kill `count` searches; each goes on where the one before was killed, and a finished one is begun anew.

    Returns how many were killed, and how many ended. Raises AssertionError where a file is half-written or a result
    differs.
    """
    generator = random.Random(seed)
    source = folder / "source"
    one_pass.LEAST = sys.maxsize  # the compiled pass starts OpenMP's threads, which no fork survives
    checkpoint.save(build(), source)
    with proofs_in_this_process():
        started = time.perf_counter()
        whole = optimize(str(source), out=folder / "whole", **OPTIONS)
        period = time.perf_counter() - started
        assert whole.best is not None
        expected, best = summary(whole), state_of(checkpoint.load(whole.best))
        found = {"killed": 0, "ended": 0}
        out = folder / "out"
        for _ in range(count):
            resume = (out / "journal.jsonl").exists() and (out / "journal.jsonl").stat().st_size > 0
            again = {"resume": True} if resume else {"overwrite": True}
            was_killed = killed(
                lambda again=again: optimize(str(source), out=out, **OPTIONS, **again) and None,
                generator.uniform(0, 0.6 * period),
            )
            found["killed" if was_killed else "ended"] += 1
            check_output(out, whole, best)
            if not was_killed:
                shutil.rmtree(out)
        again = {"resume": True} if (out / "journal.jsonl").exists() else {"overwrite": True}
        assert summary(optimize(str(source), out=out, **OPTIONS, **again)) == expected
        check_output(out, whole, best)
        assert (out / "best").is_dir() and not (out / "candidates").exists()
    return found


def check_output(out: Path, whole: Optimization, best: State) -> None:
    """Whatever stands under its final name is whole."""
    if not out.exists():
        return
    whole_folder.recover(out / "best")
    if (out / "best").exists():
        assert state_of(checkpoint.load(out / "best")) == best
    if (out / "recipe.yaml").exists():
        assert whole.verdict.best is not None
        assert Recipe.load(out / "recipe.yaml").dump() == whole.candidate(whole.verdict.best).methods.dump()
    if (out / "results.json").exists():
        assert json.loads((out / "results.json").read_text())["verdict"]["best"] == whole.verdict.best
    if (out / "index.html").exists():
        assert (out / "index.html").read_text().rstrip().endswith("</html>")


# -- harvests ----------------------------------------------------------------------------------------------------------


def kill_harvests(count: int, folder: Path, seed: int = 0) -> dict[str, int]:
    """Kill `count` harvests; each goes on where the one before was killed, and a finished one is begun anew.

    Returns how many were killed, and how many ended. Raises AssertionError where a file is half-written or differs.
    """
    generator = random.Random(seed)
    model = build()
    ids = torch.randint(128, (48, 32), generator=torch.Generator().manual_seed(seed))
    batches = [{"input_ids": part} for part in ids.split(4)]

    def run(out: Path) -> None:
        harvest(model, ["block.output", "mlp.hidden"], batches, out, shard_rows=128, progress=False)

    def files(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix != ".partial"}

    run(folder / "first")  # the first is slower
    started = time.perf_counter()
    run(folder / "whole")
    period = time.perf_counter() - started
    expected, out = files(folder / "whole"), folder / "out"
    found = {"killed": 0, "ended": 0}
    for _ in range(count):
        was_killed = killed(lambda: run(out), generator.uniform(0, 1.2 * period))
        found["killed" if was_killed else "ended"] += 1
        try:
            ActivationStore.open(out).verify()
            assert files(out) == expected
        except CheckpointError:
            assert was_killed
        for name, content in files(out).items() if out.exists() else ():
            assert content == expected[name], name
        if not was_killed:
            shutil.rmtree(out)
    run(out)
    assert files(out) == expected
    assert not list(out.glob(".*")), "a killed harvest left something behind"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=160)
    parser.add_argument("--searches", type=int, default=40)
    parser.add_argument("--harvests", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    kinds = (
        ("save", kill_saves, given.saves),
        ("search", kill_searches, given.searches),
        ("harvest", kill_harvests, given.harvests),
    )
    for name, kill, count in kinds:
        if not count:
            continue
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            found = kill(count, Path(folder), given.seed)
            print(f"{count} kills during {name}: {found}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
