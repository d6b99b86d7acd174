"""The tasks that come with actkit: task files of lm-eval, and their questions for a scorer that needs no lm-eval.

`documentation`: which of four summaries belongs to a name of Python's standard library. Its sentences are of the test
split of the embedded text, which no training, calibration or search saw. Docstrings: Python Software Foundation, under
the PSF License.
"""

from __future__ import annotations

import json
from pathlib import Path

from actkit.core.measure.multiple_choice import Question

FOLDER = Path(__file__).parent
TASKS: dict[str, Path] = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def documentation(count: int | None = None) -> list[Question]:
    """The first questions of the task `documentation`, which stand in random order.

    Args:
        count: how many; all 500 if it is None.

    Returns:
        The questions as its task file renders them.
    """
    lines = (FOLDER / "documentation.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    items = [json.loads(line) for line in lines]
    return [
        Question(f"Question: {each['question']}\nAnswer:", tuple(each["choices"]), each["answer"]) for each in items
    ]
