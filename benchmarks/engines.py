"""Engines that decode, each a process of its own that takes turns with the others (`decode_workers/`).

Each worker runs in the environment of its engine: ours in this one, peers in `.venv-bench`, with the variables that its
script asks for. A peer that does not start, or fails later, is no error: `Engine.missing` says why, for its row.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-bench" / "bin" / "python"


@dataclass
class Engine:
    """A worker process and what was measured of it.

    script, variant: which worker, and what it is asked to load. rows: label -> settings of its rounds. own: whether it
    runs in this environment. about: for the table. missing: why it does not run. loaded: what it said of itself.
    found: label -> what each round measured. resident: bytes.
    """

    label: str
    script: str
    variant: str
    rows: dict[str, dict[str, Any]]
    own: bool = False
    about: str = ""
    missing: str = ""
    loaded: dict[str, Any] = field(default_factory=dict)
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    resident: int = 0
    process: Any = None

    def start(self, **load: Any) -> None:
        """Start and load; if a peer fails, `missing` says why. load: as the worker's `load`, without the variant."""
        python = sys.executable if self.own else str(PEERS)
        if not Path(python).exists():
            self.missing = "its environment is not there; run make bench"
            return
        script = HERE / "decode_workers" / f"{self.script}.py"
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self.process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**environment, **_environment_of(script)},
            text=True,
        )
        try:
            self.loaded = self.ask("load", variant=self.variant, **load)
        except RuntimeError as error:
            self.fail(error)

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """What the worker answers. Raises RuntimeError with its error, or its last words if it died."""
        self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"it died: {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["ok"]

    def fail(self, error: RuntimeError) -> None:
        """Note why a peer does not run, and end it. Raises the error of an engine of our own."""
        self.stop()
        if self.own:
            raise error
        self.missing = str(error)

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _last_words(self) -> str:
        self.log.seek(0)
        return " ".join(self.log.read().decode(errors="replace").split())[-300:]


def _environment_of(script: Path) -> dict[str, str]:
    """The worker's ENVIRONMENT, read from its source, as it cannot be imported here."""
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(getattr(target, "id", None) == "ENVIRONMENT" for target in targets):
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    return {}


def take_turns(
    engines: Sequence[Engine], rounds: int, title: str, after: Callable[[Engine, str, bool], None] | None = None
) -> None:
    """Let each row of the engines that loaded run once a round, in a new order each time; then ask for their memory.

    Args:
        engines: started; what their rounds say goes to `found`, and the memory to `resident`.
        rounds: counted ones; one more warms up.
        title: of the progress bar.
        after: called after each turn with the engine, the row's label and whether the round counts.
    """
    turns = [(engine, label) for engine in engines if not engine.missing for label in engine.rows]
    shuffle = Random(0).shuffle
    for number in track(range(rounds + 1), title, console=Console(stderr=True), transient=True):
        shuffle(turns)
        for engine, label in turns:
            if engine.missing:
                continue
            try:
                measured = engine.ask("round", **engine.rows[label])
            except RuntimeError as error:
                engine.fail(error)
                continue
            if number:
                engine.found.setdefault(label, []).append(measured)
            if after is not None:
                after(engine, label, number > 0)
    for engine in engines:
        if not engine.missing:
            engine.resident = engine.ask("memory")["resident_bytes"]


def start_best(engine: Engine, *, prompt: int, tokens: int, counts: Sequence[int], **load: Any) -> None:
    """Start llama.cpp with the better of memory mapping on and off, and of the numbers of threads.

    Args:
        engine: whose variant is a kind of weights; what was tried goes to its `about`.
        prompt, tokens: of the rounds that are compared.
        counts: numbers of threads to try.
        load: as for `Engine.start`.
    """
    kind = engine.variant
    rates: dict[tuple[str, int], float] = {}
    for variant in (kind, f"{kind}-mapped"):
        engine.variant = variant
        engine.start(**load)
        if engine.missing:
            return
        for count in counts:
            for _ in range(2):  # the first warms up
                seconds = engine.ask("round", prompt=prompt, tokens=tokens, threads=count)["token_seconds"]
            rates[variant, count] = 1 / median(seconds)
        engine.stop()
    engine.variant, count = max(rates, key=lambda found: rates[found])
    engine.rows = {label: {**settings, "threads": count} for label, settings in engine.rows.items()}
    engine.start(**load)
    tried = ", ".join(f"{'mapped' if 'mapped' in v else 'read'} {n} thr. {rate:.1f}" for (v, n), rate in rates.items())
    engine.about = f"tokens/s tried: {tried}; {engine.loaded.get('system', '')}"
