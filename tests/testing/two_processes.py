"""One of two processes: every analysis that says so finds what one finds. Argument: the file for the outcome."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from analyses import ANALYSES
from plotly.graph_objects import Figure, Scatter
from rich.table import Table

from actkit.core import processes
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.analyses import AnalysisCase, several_find_the_same


@dataclass(frozen=True)
class Rows:
    rows: float

    def table(self) -> Table:
        return Table("rows")

    def figure(self) -> Figure:
        return Figure(Scatter(y=[self.rows]))

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}


def forgets_the_others(model: Any, batches: Any) -> Rows:
    """Counts the rows of its own batches alone."""
    return Rows(float(sum(len(batch) for index, batch in enumerate(batches) if processes.mine(index))))


def outcome(run: Any, model: Any, batches: Any) -> str:
    several_find_the_same(AnalysisCase(run, model, batches, several=True))
    return "holds"


def main() -> None:
    dist.init_process_group("gloo")
    found = {name: outcome(made.run, made.model(), made.batches()) for name, made in ANALYSES.items() if made.several}
    try:
        outcome(forgets_the_others, tiny_model("mlp"), tiny_batches("mlp"))
    except AssertionError as error:
        caught = str(error).startswith("in 2 processes: rows is")
        found["forgets the others"] = "is caught" if caught else str(error)
    dist.destroy_process_group()
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
