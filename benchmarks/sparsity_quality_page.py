"""The page and the plot of benchmarks/sparsity_quality.py, and README's table, from its recorded result.

python benchmarks/sparsity_quality_page.py       # writes docs/sparsity/quality.md, quality.svg and the table again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import common
from sparsity_quality import DOCS, METHODS, cells, levels_of
from svg import COLOURS, circle, line, picture, text

DASHES = ("none", "7 3", "none", "2 3", "9 3 2 3")  # of the methods' lines, to tell apart those that lie on each other
WIDTH, HEIGHT, LEFT, TOP, GAP = 400, 260, 60, 60, 75  # of a panel and around it, in pixels
COLUMNS = 2
README = DOCS.parents[1] / "README.md"
BEGIN, END = "<!-- by benchmarks/sparsity_quality_page.py -->", "<!-- end -->"
ABOUT = """# Quality at equal bytes: TEAL, WINA, CATS, R-Sparse

How good is a model when a decode step reads only a part of its weights? These tables compare the sparsity methods at
equal bytes on a real language model and on three small ones, with every token sparse, in prefill too. They are written
by

```
python benchmarks/sparsity_quality.py [--only smollm2]
```

(a hub id or a folder of your own model goes into the methods themselves, see their pages; this benchmark is on the
models of the zoo, because each of its numbers takes dozens of runs.)

**Bytes** are those of the weights of the blocks' linear layers that one token reads; embedding and head are not
counted. A weight counts with the share of its inputs, or of its output rows, that are read, and R-Sparse's factors
count in full. The share is *measured*, token by token. Each method's own setting is solved until the saving on the
calibration text meets the level of the column; what it saves on the held-out text stands in each cell.

- **TEAL** drops inputs of every linear layer by magnitude, **WINA** by magnitude times the norm of the weight's column
  (one mask for the layers that share an input), both at one sparsity everywhere.
- **CATS** drops what the gate of the MLP makes small: rows of the up matrix and columns of the down matrix. Gate and
  attention are read in full, so it saves at most half here; MiniLM has no gate, so only the down matrix is left.
- **R-Sparse** sends the small inputs through a low-rank copy of the weight instead of dropping them. *One alpha*: the
  best of a grid, the same for all layers; *searched*: one per layer, by a small evolutionary search on the calibration
  text ({evaluations} evaluations of the loss at most; the paper's scale is 134).

Nothing is trained after the change. Each number is the mean over the calibration seeds (other texts each: {seeds}),
with the range; quality is measured on text that neither calibration nor search saw.
"""
MEASURES = {
    "smollm2": "SmolLM2-135M-Instruct, a real language model: perplexity, lower is better (dense {dense:.2f})",
    "swiglu": "SwiGLU language model: perplexity, lower is better (dense {dense:.2f})",
    "relu": "ReLU language model, gated: perplexity, lower is better (dense {dense:.2f})",
    "minilm": "MiniLM, sentence encoder: mean cosine with the original's embeddings, higher is better (dense 1)",
}


def write(result: Mapping[str, Any], folder: Path) -> None:
    """Write quality.md and quality.svg, and the table in README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.svg").write_text(plot(result["rows"], result["dense"]), encoding="utf-8")
    (folder / "quality.md").write_text(page(result), encoding="utf-8")
    README.write_text(readme(result, README.read_text(encoding="utf-8")), encoding="utf-8")


def readme(result: Mapping[str, Any], text: str) -> str:
    """README with what each method costs a real model, between its two marks."""
    model = "smollm2"
    rows, levels = [row for row in result["rows"] if row["model"] == model], levels_of(result["rows"], model)
    lines = [["method", *(f"{level:.0%} saved" for level in levels)], ["---"] * (1 + len(levels))]
    for method in METHODS:
        losses: dict[float, list[float]] = {level: [] for level in levels}
        for row in rows:
            if row["method"] == method and row["loss"] is not None:
                losses[row["level"]].append(row["loss"] / result["dense"][model] - 1)
        lines.append([method, *(f"{mean(losses[level]):.1%}" if losses[level] else "out of reach" for level in levels)])
    before, rest = text.split(BEGIN)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def page(result: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    rows, measured = result["rows"], result["measured"]
    evaluations = told({model: _evaluations(run["search"]) for model, run in measured.items()})
    parts = [ABOUT.format(evaluations=evaluations, seeds=told({m: len(run["seeds"]) for m, run in measured.items()}))]
    for model in measured:
        levels = levels_of(rows, model)
        parts.append(f"## {MEASURES[model].format(dense=result['dense'][model])}\n")
        table = [["method", *(f"{level:.0%} saved" for level in levels)], ["---"] * (1 + len(levels))]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in (*table, *cells(rows, model))) + "\n")
    parts.append("![Quality over measured savings, one panel per model](quality.svg)\n")
    parts.append("## Does the published order hold?\n")
    parts.append(
        "The papers say that WINA is better than TEAL, and R-Sparse better than CATS at equal savings. Counted here "
        "over runs, each a level and a calibration seed that both methods reach:\n"
    )
    head = ["model", "order", "better in", "equal in", "loss of the first against the second, on average"]
    lines = [head, ["---"] * len(head)]
    for each in result["order"]:
        order = f"{each['better']} better than {each['worse']}"
        wins, change = f"{each['wins']} of {each['runs']} runs", f"{each['mean change of the loss']:+.2%}"
        lines.append([each["model"], order, wins, str(each["ties"]), change])
    parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    off = max(abs(row["saved, held-out"] - row["level"]) for row in rows if row["outcome"] == "met")
    parts.append(
        "The loss is the perplexity, for MiniLM 1 - mean cosine. Savings meet their level within 0.2 points on the "
        f"calibration text and within {100 * off:.1f} on held-out text, which matters most at the highest one: "
        "differences of the loss below half a percent say little, on smollm2 (one seed, little calibration) those "
        "below two.\n"
    )
    natural = [row for row in rows if row["outcome"] == "natural"]
    if natural:
        saved = mean(row["saved, held-out"] for row in natural)
        models = " and ".join(dict.fromkeys(row["model"] for row in natural))
        parts.append(
            f"On {models}, CATS saves {saved:.0%} without any loss, through zeros that the model has by itself. "
            f"Runs at lower levels count as not won against it.\n"
        )
    parts.append(f"{verdict(result)}\n")
    calibration, held_out = (told({m: run["rows"][i] for m, run in measured.items()}) for i in (0, 1))
    when = told({m: run["date"][:10] for m, run in measured.items()})
    where = told({m: f"{run['machine']['processor']}, torch {run['versions']['torch']}" for m, run in measured.items()})
    parts.append(
        f"Rows (256 tokens; MiniLM: sentences) of calibration: {calibration}; of held-out text: {held_out}. Measured "
        f"on {when}; {where}. Every run is in `benchmarks/results/sparsity_quality.json`, with the settings that were "
        f"solved for.\n"
    )
    return "\n".join(parts)


def _evaluations(search: Mapping[str, int]) -> int:
    """The most that a search of R-Sparse's alphas takes: seven shared ones, then the generations."""
    generations, population = search["generations"], search["population"]
    return 7 + population - 1 + (generations - 1) * (population - max(2, population // 4))


def told(by_model: Mapping[str, Any]) -> str:
    """'3, smollm2: 1': what most models have, and which differ."""
    values = list(by_model.values())
    usual = max(values, key=values.count)
    if values.count(usual) == 1 < len(values):
        return ", ".join(f"{model} {value}" for model, value in by_model.items())
    return ", ".join([f"{usual}", *(f"{model}: {value}" for model, value in by_model.items() if value != usual)])


def verdict(result: Mapping[str, Any]) -> str:
    """Whether each order holds in every run, in some or in none: a sentence each."""
    sentences = []
    for better, worse in dict.fromkeys((each["better"], each["worse"]) for each in result["order"]):
        found = [each for each in result["order"] if (each["better"], each["worse"]) == (better, worse)]
        wins, runs = sum(each["wins"] for each in found), sum(each["runs"] for each in found)
        ties = sum(each["ties"] for each in found)
        whole = [each["model"] for each in found if each["wins"] == each["runs"]]
        holds = "holds everywhere" if wins == runs else "does not hold" if wins == 0 else "holds in part"
        text = f"- **{better} better than {worse}: {holds}**, in {wins} of {runs} runs"
        text += f" ({ties} are equal)" if ties else ""
        sentences.append(text + (f"; in every run on {' and '.join(whole)}." if whole and wins < runs else "."))
    return "\n".join(sentences)


# -- the plot ----------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> str:
    """A panel per model, two in a row: loss over the saving on held-out text, with the range over seeds."""
    width = LEFT + max(COLUMNS * (WIDTH + GAP), 190 * len(METHODS))
    height = -(-len(dense) // COLUMNS) * (TOP + HEIGHT + 55)
    parts = []
    for index, method in enumerate(METHODS):
        x = LEFT + index * 190
        parts.append(line([(x, 18), (x + 24, 18)], COLOURS[index], DASHES[index]) + text(x + 30, 22, method, "start"))
    for index, model in enumerate(dense):
        row, column = divmod(index, COLUMNS)
        corner = LEFT + column * (WIDTH + GAP), TOP + row * (TOP + HEIGHT + 55)
        parts.append(_panel(*corner, model, [row for row in rows if row["model"] == model], dense))
    return picture(width, height, parts)


def _panel(left: float, top: float, model: str, rows: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> str:
    title = "perplexity" if model != "minilm" else "1 - mean cosine with the original"
    reached = [row for row in rows if row["loss"] is not None]
    low = dense[model] if model != "minilm" else 0.0
    # what is far off, such as CATS near its limit, leaves the panel at the top instead of flattening all others
    high = low + 1.15 * (max(row["loss"] for row in reached if row["method"] != "CATS") - low)

    def point(saved: float, loss: float) -> tuple[float, float]:
        return left + WIDTH * saved / 0.75, top + HEIGHT * (1 - (min(loss, high) - low) / (high - low))

    parts = [
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>',
        text(left + WIDTH / 2, top - 10, f"{model}: {title}"),
        text(left + WIDTH / 2, top + HEIGHT + 40, "weight bytes of the layers saved per token"),
    ]
    for share in (0.0, 0.25, 0.5, 0.75):
        parts.append(text(left + WIDTH * share / 0.75, top + HEIGHT + 18, f"{share:.0%}"))
    for step in range(5):
        value = low + (high - low) * step / 4
        form = ".1f" if model != "minilm" else ".2f"
        parts.append(text(left - 6, point(0, value)[1] + 4, f"{value:{form}}", "end"))
    for index, method in enumerate(METHODS):
        groups: dict[float, list[Mapping[str, Any]]] = {}
        for row in reached:
            if row["method"] == method:
                groups.setdefault(row["level"], []).append(row)
        points = [(0.0, low)] if method != "CATS" or model != "relu" else []
        for level in sorted(groups):
            saved = mean(row["saved, held-out"] for row in groups[level])
            losses = [row["loss"] for row in groups[level]]
            points.append((saved, mean(losses)))
            ends = [point(saved, min(losses)), point(saved, max(losses))]
            parts.append(line(ends, COLOURS[index]))
        parts.append(line([point(*each) for each in points], COLOURS[index], DASHES[index]))
        for x, y in (point(*each) for each in points[1:]):
            parts.append(circle(x, y, COLOURS[index]))
    return "\n".join(parts)


def main() -> None:
    recorded = common.committed("sparsity_quality")
    if recorded is None:
        raise SystemExit("No result is recorded; run python benchmarks/sparsity_quality.py first.")
    write(recorded, DOCS)


if __name__ == "__main__":
    main()
