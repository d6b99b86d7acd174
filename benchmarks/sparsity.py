"""What sparsity gives a decoding step: TEAL, WINA, R-Sparse, CATS and Spark in the decoder, at a 1.1B Llama shape.

    python benchmarks/sparsity.py [--quick] [--json PATH|-]

Random bf16 weights, batch 1, a prompt of 128 random tokens, then single steps; all rows take turns in one process. TEAL
and WINA select the inputs of every linear layer in the blocks, R-Sparse sends the others through a low-rank copy (alpha
0.95, random factors of the size that its budget gives), CATS zeroes half of the gate values and reads the rows of the
up projection and the columns of the down projection, bundled, where the gate is not zero; Spark is a model of its own
with as many weights (8 % of the neurons, at most 256 keys). Thresholds are settled so that a step reads the share that
the row is named by. Masks of random weights are as good as random: these rows say how fast it is, and nothing on
quality, which `benchmarks/sparsity_quality.py` measures.

x dense, of the pure read: the dense step just before each step, and just after it a pure read of as many rows of the
same memory in the fastest way found (`pure_read`), over the step; medians, as the machine's memory changes its speed
all the time. selecting: what a step takes longer than the dense one, in % of it, when it selects and keeps
everything. The output layer is dense.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "decode_workers"))

import common  # isort: skip - sets the waiting policy before torch is imported
import pure_read
import torch
from protocol import SHAPES, prompt_ids
from rich.console import Console
from rich.progress import track
from torch import nn

del sys.path[:2]  # where kernels.py lies, which transformers would take for the package of that name

from actkit.core.layers.activations import Thresholded
from actkit.core.model.anatomy import anatomy
from actkit.core.watch.capture import record
from actkit.core.edit.edits import get_module, set_module
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.selections import Threshold
from actkit.core.watch.statistics import Quantiles
from actkit.runtime.decoder import Decoder
from actkit.sparsity.r_sparse.r_sparse import Budget
from actkit.sparsity.spark.sparkify import spark_lm
from actkit.sparsity.wina.wina import column_norms
from actkit.testing.random_llama import random_llama

PROMPT = 128
DENSITIES = (0.5, 0.7)  # shares of the layers' weights that are read
ALPHA = 0.95  # of R-Sparse; on average 0.96 in the published recipe
CATS = 0.5  # share of the gate values that are 0
FULL = {"shape": "1.1B", "rounds": 9, "tokens": 12}
QUICK = {"shape": "tiny", "rounds": 3, "tokens": 6}
EVERYTHING = 1e-30  # a threshold below which nothing is


@dataclass
class Row:
    """A decoder and the state in which it decodes. choose: puts it into that state."""

    label: str
    decoder: Decoder
    choose: Callable[[], None]
    seconds: list[float] = field(default_factory=list)
    dense: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    density: float | None = None
    bytes_per_token: float = 0.0
    yardstick: pure_read.Yardstick | None = None

    def begin(self, vocabulary: int) -> int:
        """Read the prompt; returns the first token."""
        self.choose()
        self.decoder.follow_selections()
        self.decoder.reset()
        return int(self.decoder(prompt_ids(PROMPT, vocabulary)).argmax())

    def step(self, token: int) -> tuple[float, int]:
        """Seconds of a step, and the token after it."""
        start = time.perf_counter()
        logits = self.decoder([token])
        return time.perf_counter() - start, int(logits.argmax())

    def run(self, vocabulary: int, tokens: int) -> None:
        """Some steps, which show what is read."""
        token = self.begin(vocabulary)
        for _ in range(tokens):
            _, token = self.step(token)
        self.look()

    def look(self) -> None:
        self.density, self.bytes_per_token = self.decoder.density, self.decoder.bytes_per_token or 0.0


class Thresholds:
    """The thresholds of a model's selections or gates, each set to the same quantile of what it sees."""

    def __init__(self, places: list[tuple[Any, Callable[[float], float]]]) -> None:
        self.places = places

    def set(self, share: float) -> None:
        """Drop that share; 0 keeps everything, yet compares."""
        for module, quantile in self.places:
            module.threshold.fill_(quantile(share) if share else EVERYTHING)

    def settle(self, row: Row, share: float, vocabulary: int) -> None:
        """Make the row drop that share of what its decoder may skip."""
        given = share
        for _ in range(4):
            row.choose = lambda at=given: self.set(at)
            row.run(vocabulary, 8)
            given = min(max(given + share - (1 - (row.density or 0.0)), 0.0), 1.0)


def quantiles(model: nn.Module, wanted: dict[Any, Any], vocabulary: int) -> Any:
    """Statistics of sites for one sequence of random tokens."""
    return record(model, wanted, [{"input_ids": torch.tensor([prompt_ids(64, vocabulary)])}], progress=False)


def selecting(shape: dict[str, Any], threads: int, weighted: bool, low_rank: float | None = None) -> tuple[Any, Any]:
    """A decoder whose blocks' linear layers select their inputs, and their thresholds. weighted: by the norms of the
    columns, of each matrix alone where low_rank (the density that R-Sparse spends) is given."""
    model, vocabulary = random_llama(shape), shape["vocab_size"]
    view, generator = anatomy(model), torch.Generator().manual_seed(0)
    groups = []
    for inputs in (each for block in view.blocks for each in block.linear_inputs()):
        groups += [(inputs.site, (x,)) for x in inputs.linears] if low_rank else [(inputs.site, inputs.linears)]
    scores = [column_norms(linears) if weighted else None for _, linears in groups]
    wanted: dict[Any, list[Quantiles]] = {}
    for (site, _), score in zip(groups, scores):
        wanted.setdefault(site, []).append(Quantiles(weight=score))
    seen = quantiles(model, wanted, vocabulary)
    waiting = {site: list(found) if isinstance(found, list) else [found] for site, found in seen.items()}
    places: list[tuple[Any, Callable[[float], float]]] = []
    for (site, linears), score in zip(groups, scores):
        own = waiting[site].pop(0)
        for linear in linears:
            select = Threshold(0.0, score)
            correction = _factors(linear, low_rank, generator) if low_rank else None
            set_module(model, linear.path, ActLinear.of(linear, select=select, correction=correction))
            places.append((select, own.quantile))
    return Decoder(model, capacity=PROMPT + 64, threads=threads, decode_only=True), Thresholds(places)


def _factors(linear: Any, density: float, generator: torch.Generator) -> LowRank:
    """Random factors of the rank that R-Sparse's budget gives."""
    rank = Budget.of(linear.out_features, linear.in_features, 1 - density, ALPHA).rank
    left, right = torch.empty(linear.out_features, rank), torch.empty(rank, linear.in_features)
    both = (each.normal_(std=0.02, generator=generator).bfloat16() for each in (left, right))
    return LowRank(*both, of="dropped")


def gated(shape: dict[str, Any], threads: int) -> tuple[Any, Any]:
    """A decoder whose gates have thresholds, and these."""
    model, vocabulary = random_llama(shape), shape["vocab_size"]
    seen = quantiles(model, {"mlp.gate": Quantiles()}, vocabulary)
    places: list[tuple[Any, Callable[[float], float]]] = []
    for block, (_, statistic) in zip(anatomy(model).blocks, seen.items(), strict=True):
        assert block.mlp is not None
        gate = Thresholded(get_module(model, block.mlp.activation))
        set_module(model, block.mlp.activation, gate)
        places.append((gate, statistic.quantile))
    return Decoder(model, capacity=PROMPT + 64, threads=threads, decode_only=True), Thresholds(places)


def spark(shape: dict[str, Any], threads: int) -> Any:
    from transformers import LlamaConfig

    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        model = spark_lm(LlamaConfig.from_dict({**shape, "dtype": "bfloat16"})).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return Decoder(model, capacity=PROMPT + 64, threads=threads, decode_only=True)


def rows_to_measure(shape: dict[str, Any], threads: int, console: Console) -> list[Row]:
    """All decoders and their states; thresholds are settled."""
    vocabulary, rows = shape["vocab_size"], []

    def nothing() -> None:
        pass

    dense = Decoder(random_llama(shape), capacity=PROMPT + 64, threads=threads, decode_only=True)
    rows.append(Row("dense", dense, nothing))
    named: list[tuple[str, Callable[[], tuple[Any, Any]], tuple[float, ...]]] = [
        ("TEAL", lambda: selecting(shape, threads, False), DENSITIES),
        ("WINA", lambda: selecting(shape, threads, True), DENSITIES),
        ("CATS", lambda: gated(shape, threads), (1 - CATS,)),
    ]
    for density in DENSITIES:
        named.append(("R-Sparse", lambda density=density: selecting(shape, threads, True, density), (density,)))
    for name, build, densities in track(named, "Building decoders", console=console, transient=True):
        decoder, thresholds = build()
        if name != "R-Sparse":
            rows.append(Row(f"{name}, keeps everything", decoder, lambda t=thresholds: t.set(0.0)))
        for density in densities:
            label = f"{name}, {'gates ' if name == 'CATS' else ''}{density:.0%} read"
            rows.append(Row(label, decoder, nothing))
            share = 1 - density
            if name == "R-Sparse":  # the rest of the budget is the low-rank copy
                share = (1 - ALPHA) + ALPHA * share
            thresholds.settle(rows[-1], share, vocabulary)
    rows.append(Row("Spark, 8% of the neurons", spark(shape, threads), nothing))
    return rows


def measure(rows: list[Row], rounds: int, tokens: int, vocabulary: int, console: Console) -> None:
    """In every round each row's steps take turns with the dense ones and its yardstick; the first round warms up."""
    for row in track(rows, "Yardsticks", console=console, transient=True):
        row.run(vocabulary, tokens)
        row.yardstick = pure_read.Yardstick(row.decoder, kept=1)
    order, shuffle = list(rows), Random(0).shuffle
    reference = Row("dense", rows[0].decoder, rows[0].choose)
    for number in track(range(rounds + 1), "Measuring", console=console, transient=True):
        shuffle(order)
        for row in order:
            assert row.yardstick is not None
            before = reference.begin(vocabulary)
            token = before if row is rows[0] else row.begin(vocabulary)
            for _ in range(tokens):
                dense, before = reference.step(before)
                seconds, token = row.step(token)
                read = row.yardstick.measure(1)["seconds"]
                if number:
                    row.dense.append(dense)
                    row.seconds.append(seconds)
                    row.reads.append(read)
            row.look()


def as_dicts(rows: list[Row]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        against = [dense / own for dense, own in zip(row.dense, row.seconds)]
        read = [yardstick / own for yardstick, own in zip(row.reads, row.seconds)]
        keeps = next((x for x in rows if x.label == f"{row.label.split(',')[0]}, keeps everything"), None)
        extra = None if keeps is None else median(own / dense for dense, own in zip(keeps.dense, keeps.seconds)) - 1
        found.append(
            {
                "row": row.label,
                "tokens/s": 1 / median(row.seconds),
                "deciles": [round(value, 1) for value in common.spread([1 / value for value in row.seconds])],
                "x dense": median(against),
                "x dense, deciles": [round(value, 2) for value in common.spread(against)],
                "MB/token": row.bytes_per_token / 1e6,
                "read of what may be skipped": row.density,
                "of the pure read": median(read),
                "of it, deciles": [round(value, 2) for value in common.spread(read)],
                "selecting, %": None if extra is None else 100 * extra,
                "seconds": row.seconds,
                "dense seconds": row.dense,
                "pure read seconds": row.reads,
            }
        )
    return found


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was set before the run."""
    found = []
    for row in rows:
        if row["row"].split(",")[0] in ("TEAL", "WINA", "R-Sparse") and "read" in row["row"]:
            found.append(common.target(f"{row['row']}: of the pure read", row["of the pure read"], at_least=0.75))
        if row["row"].startswith("CATS, gates"):
            found.append(common.target(f"{row['row']}, bundled: over dense", row["x dense"], at_least=1.15))
            found.append(common.target(f"{row['row']}: of the pure read", row["of the pure read"], at_least=0.75))
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="a tiny shape, under a minute; no targets")
    parser.add_argument("--json", metavar="PATH", help="also write the result to PATH, or to standard output for '-'")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    setting: dict[str, Any] = QUICK if chosen.quick else FULL
    torch.set_num_threads(chosen.threads)
    shape, console = SHAPES[setting["shape"]], Console(stderr=True)
    rows = rows_to_measure(shape, chosen.threads, console)
    measure(rows, setting["rounds"], setting["tokens"], shape["vocab_size"], console)
    found = as_dicts(rows)
    return common.report("sparsity", found, [] if chosen.quick else targets_of(found), chosen, show=show)


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """The table."""
    from rich.table import Table

    names = [name for name in rows[0] if name != "row" and "seconds" not in name]
    table = Table("bf16", *names)
    for row in rows:
        table.add_row(row["row"], *(common.cell(row[name]) for name in names))
    console.print(table)


if __name__ == "__main__":
    main()
