"""The model card of the best model: what it is, what was measured, on what, and how to make it again."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

import yaml

from actkit.core.memory import format_bytes
from actkit.search.measured import Candidate
from actkit.search.verdict import disk_share, times

if TYPE_CHECKING:
    from actkit.search.search import Optimization


def model_card(result: Optimization, best: Candidate) -> str:
    """The text of README.md."""
    original, info = result.original, result.machine
    rows = [(_plain(name.replace("_", " ")), estimate.text()) for name, estimate in best.metrics.items()]
    if best.loss is not None:
        rows.append(("loss", best.loss.text(".2%")))
    for label, mine, other in (
        ("on disk", best.disk_bytes, original.disk_bytes),
        ("weights in memory", best.weight_bytes, original.weight_bytes),
        ("weights read per token", best.bytes_per_token, original.bytes_per_token),
    ):
        if mine is not None and other:
            rows.append((label, f"{format_bytes(mine)} ({mine / other:.1%} of the original's {format_bytes(other)})"))
    if best.density is not None:
        rows.append(("inputs read where some are chosen", f"{best.density:.1%}"))
    if best.speed is not None and best.speed.ratio is not None:
        rate, ratio = best.speed.rate, best.speed.ratio
        through = f"through {best.speed.engine}"
        rows.append(("speed", f"{rate.value:.4g} {best.speed.unit} {through}, {times(ratio)} the original's"))
    share = disk_share(best, original)
    lines = "\n".join(f"| {label} | {text} |" for label, text in rows)
    recipe = yaml.safe_dump(best.methods.dump(), sort_keys=False)
    fence = "`" * max([3, *(1 + len(run) for run in re.findall("`+", recipe))])
    front = yaml.safe_dump({"library_name": "actkit", "base_model": result.name}, sort_keys=False)
    test = _plain(result.data["test"]["data"])
    return f"""---
{front}---

# {_plain(result.name)}, {_plain(best.name)}

Made by `actkit optimize`{"" if share is None else f": {share:.0%} of the original's disk"}.
It needs `import actkit` to load; without it, loading fails instead of giving wrong weights.

```python
import actkit

model = actkit.load("path/to/this/folder")
```

| measured on the test split | value, 95 % interval |
|---|---|
{lines}

Data: {test}.
Machine: {_plain(info["processor"])}, {info["cores"]} cores, {info["capability"]}, {info["threads"]} threads.
Versions: {", ".join(f"{name} {_plain(version)}" for name, version in result.versions.items())}.

## Recipe

{fence}yaml
{recipe}{fence}
"""


def _plain(text: str) -> str:
    """A name or path as one line of Markdown that is neither HTML nor a link, code or table cell."""
    return re.sub(r"([\\`\[\]|])", r"\\\1", escape(" ".join(text.split()), quote=False))
