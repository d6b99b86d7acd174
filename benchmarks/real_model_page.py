"""The page and the picture of benchmarks/real_model.py, from its recorded result.

python benchmarks/real_model_page.py       # writes docs/real-model.md and real-model.svg again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from svg import COLOURS, circle, line, picture, text

DOCS = Path(__file__).parents[1] / "docs"
SPEEDS, FIRST = (16, 1024), (128, 1024)  # tokens of context, as in the record
KINDS = ("llama.cpp", "transformers", "torchao", "actkit", "actkit, sparse")  # a colour each
WIDTH, HEIGHT, LEFT, TOP, GAP = 380, 300, 60, 40, 70  # of a panel and around it, in pixels
HIGHEST = 1.5  # times the best perplexity; what is worse lies on the upper edge
COLUMNS = {
    "tokens/s, 16 tokens of context": ("tokens/s at 16", "{:.0f}"),
    "1,024 tokens": ("tokens/s at 1024", "{:.0f}"),
    "first token after 128": ("first token s at 128", "{:.2f} s"),
    "after 1,024": ("first token s at 1024", "{:.2f} s"),
    "resident": ("resident MB", "{:,.0f} MB"),
    "disk": ("disk MB", "{:,.0f} MB"),
    "perplexity": ("perplexity", "{:.2f}"),
    "times the file's": ("x the file's perplexity", "{:.3f}"),
}
ABOUT = """# A real model, beside what else would run it

SmolLM2-135M-Instruct (`smollm2` in the zoo) through actkit's decoder and through what a user would take instead, in one
run in which all take turns. The table is printed, and this page written, by

```
python benchmarks/real_model.py            # `make bench` sets up the peers' environment and runs it too
```

- **llama.cpp** reads the packaged Q4_1 file itself (its output layer is Q8_0), and two exports of ours
  (`actkit.export`; output layer bf16): Q8_0, and Q4_0 after AWQ. It runs with the better of mapped and unmapped memory.
- **transformers** and **torchao** have the same weights in bf16. torchao rounds them when it loads, the output layer
  too, so its disk is that of bf16; it runs compiled, with static caches.
- **actkit**: int8 is `rtn`, int4 is `awq`, both in groups of 64, output layer bf16. TEAL and WINA drop {sparsity:.0%}
  of the inputs of every linear layer in the blocks.

All have {threads} threads and the same prompts, cut from one text. Perplexity is each engine's own, over the same
{scored:,} tokens behind the same first ones ({text}); actkit's is that of the model's forward pass, in which every
token is sparse. Resident memory is that of the whole process, libraries included.

**The file's weights were rounded to 4 bits in groups of 32 before**: bf16 stands for these rounded weights, and what
has 4 bits here was rounded a second time, to another grid. That the file itself loses nothing against bf16 says nothing
about 4 bits.
"""


def write(result: Mapping[str, Any], folder: Path = DOCS) -> None:
    """Write real-model.md and real-model.svg."""
    (folder / "real-model.svg").write_text(plot(result["rows"]), encoding="utf-8")
    (folder / "real-model.md").write_text(page(result), encoding="utf-8")


def page(result: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    settings = {name: result[name] for name in ("sparsity", "threads", "scored", "text")}
    parts = [ABOUT.format(**settings)]
    lines = [["", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for row in result["rows"]:
        if "missing" in row:
            lines.append([row["row"], f"missing: {row['missing'].replace('|', '/')}", *[""] * (len(COLUMNS) - 1)])
            continue
        values = [(row.get(name), form) for name, form in COLUMNS.values()]
        lines.append([row["row"], *("" if value is None else form.format(value) for value, form in values)])
    parts.append(_table(lines))
    parts.append("![Tokens per second against perplexity, at 16 and at 1,024 tokens of context](real-model.svg)\n")
    parts.append("## Targets\n\nSet before the run; of several rows the fastest counts.\n")
    lines = [["target", "bound", "measured", ""], ["---"] * 4]
    for each in result["targets"]:
        bound = f"{each['sense']} {each['target']:g}"
        lines.append([each["name"], bound, f"{each['value']:.2f}", "met" if each["met"] else "**missed**"])
    parts.append(_table(lines))
    where = result["machine"]
    parts.append(
        f"Measured on {result['date'][:10]}, {where['processor']}, torch {result['versions']['torch']}, commit "
        f"{result['commit']}. The machine's load before the run was {result['load before']:.1f}. Deciles, intervals, "
        f"every round, settings and versions are in `benchmarks/results/real_model.json`.\n"
    )
    return "\n".join(parts)


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# -- the picture -------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """A panel per context: perplexity over tokens a second; below, which number is what."""
    measured = [row for row in rows if "missing" not in row]
    half = (len(measured) + 1) // 2
    width, height = LEFT + 2 * (WIDTH + GAP), TOP + HEIGHT + 75 + 18 * half
    parts = []
    for index, context in enumerate(SPEEDS):
        parts += _panel(LEFT + index * (WIDTH + GAP), context, measured)
    for index, row in enumerate(measured):
        x, y = LEFT + (WIDTH + GAP) * (index // half), TOP + HEIGHT + 75 + 18 * (index % half)
        parts += [circle(x, y - 4, _colour(row["row"]), 5), text(x + 12, y, f"{index + 1}  {row['row']}", "start")]
    return picture(width, height, parts)


def _panel(left: float, context: int, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    low = min(row["perplexity"] for row in rows)
    low, high = 0.98 * low, HIGHEST * low
    fastest = 1.1 * max(row[f"tokens/s at {context}"] for row in rows)
    step = next(step for step in (5, 10, 20, 25, 50, 100, 200) if fastest / step <= 8)

    def place(rate: float, perplexity: float) -> tuple[float, float]:
        return left + WIDTH * rate / fastest, TOP + HEIGHT * (high - min(perplexity, high)) / (high - low)

    parts = [
        f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>',
        text(left + WIDTH / 2, TOP - 12, f"perplexity (lower is better), {context:,} tokens of context"),
        text(left + WIDTH / 2, TOP + HEIGHT + 40, "tokens a second"),
    ]
    for rate in range(0, int(fastest) + 1, step):
        parts.append(text(place(rate, low)[0], TOP + HEIGHT + 18, str(rate)))
    for tick in range(5):
        value = low + (high - low) * tick / 4
        beyond = "+" if tick == 4 and any(row["perplexity"] > high for row in rows) else ""
        parts.append(text(left - 6, place(0, value)[1] + 4, f"{value:.1f}{beyond}", "end"))
    file = next((row for row in rows if "the file" in row["row"]), None)
    if file is not None:
        y = place(0, file["perplexity"])[1]
        parts.append(line([(left, y), (left + WIDTH, y)], "#888", "2 3", 1))
    for index, row in enumerate(rows):
        x, y = place(row[f"tokens/s at {context}"], row["perplexity"])
        above = 15 if index % 2 else -8  # of neighbours, one number is above and one below
        parts += [circle(x, y, _colour(row["row"]), 5), text(x, y + above, str(index + 1))]
    return parts


def _colour(name: str) -> str:
    kind = next(kind for kind in KINDS if name.startswith(kind))
    return COLOURS[KINDS.index("actkit, sparse" if kind == "actkit" and " + " in name else kind)]


def main() -> None:
    recorded = common.committed("real_model")
    if recorded is None:
        raise SystemExit("No result is recorded; run python benchmarks/real_model.py first.")
    write(recorded)


if __name__ == "__main__":
    main()
