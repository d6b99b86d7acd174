"""Write the multiple-choice task `documentation`: which summary belongs to which name of the standard library.

    python scripts/make_documentation_task.py [--out src/actkit/data/tasks/documentation.jsonl]

Right and wrong choices are the first sentences of docstrings of the test split (`actkit.data.text`): no training and no
calibration saw them, and a sentence that any document of another split holds is left out. The wrong choices of a
question are answers of other questions, and every answer is a wrong choice equally often. The same Python gives the
same file; docs/tasks.md says which one made the one in the package.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actkit.data import text

OUT = Path(__file__).parents[1] / "src" / "actkit" / "data" / "tasks" / "documentation.jsonl"
ITEMS, CHOICES = 500, 4
SHORTEST, LONGEST = 16, 160  # characters of a summary
KINDS = {"FunctionDef": "function", "AsyncFunctionDef": "function", "ClassDef": "class", "Module": "module"}


def summary(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join(docstring.split("\n\n", 1)[0].split())
    found = re.match(r"(.+?[.!?])(?=\s+[A-Z]|$)", paragraph)
    return found[1] if found else paragraph


def candidates() -> Iterator[tuple[str, str, str]]:
    """kind, qualified name and summary of what the test split documents."""
    wanted = {document.name for document in text.documents("test")}
    seen = "\n".join(
        " ".join(document.text.split()).lower()
        for split in text.SPLITS
        if split != "test"
        for document in text.documents(split)
    )
    used: set[str] = set()  # names, of which some are defined twice, and summaries
    for kind, name, docstring in definitions():
        said = summary(docstring)
        signature = re.match(r"[\w.]+\(", said)  # "name(arguments) -> result" gives the answer away
        if name not in wanted or signature or not SHORTEST <= len(said) <= LONGEST:
            continue
        if said.lower() not in seen and not used & {name, said.lower()}:
            used |= {name, said.lower()}
            yield kind, name, said


def definitions() -> Iterator[tuple[str, str, str]]:
    """kind, qualified name and docstring of everything in the standard library that has one."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if "site-packages" in parts or "test" in parts:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for name, node in text._definitions(tree, module):
            docstring = ast.get_docstring(node)
            if docstring:
                yield KINDS[type(node).__name__], name, docstring


def questions(generator: random.Random) -> list[dict[str, Any]]:
    """ITEMS questions in random order, so that any first few of them are a sample of all."""
    found = sorted(candidates())  # classes, functions, modules
    if len(found) < ITEMS:
        raise SystemExit(f"the test split of this Python documents {len(found)} names, {ITEMS} are needed")
    generator.shuffle(found)
    found = found[:ITEMS]
    shifts = generator.sample(range(1, ITEMS), CHOICES - 1)  # an answer stands once for each shift in another question
    items = []
    for index, (kind, name, said) in enumerate(found):
        choices = [found[(index + shift) % ITEMS][2] for shift in shifts]
        answer = generator.randrange(CHOICES)
        choices.insert(answer, said)
        items.append({"question": f"What does Python's {kind} {name} do?", "choices": choices, "answer": answer})
    return items


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    items = questions(random.Random(0))
    out.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    print(f"{len(items)} questions in {out}")


if __name__ == "__main__":
    main()
