"""A corpus that needs no download: what the running Python says about itself.

The documents are the docstrings and comments of the standard library's modules, classes and functions, read from the
sources with `ast` (nothing is imported), and the reference pages of `pydoc_data.topics`. Each is keyed by the qualified
name of what it documents (`json.decoder.JSONDecoder.decode`, `topics.lambda`), and a hash of that *name* decides its
split: the splits do not move when another Python version changes, adds or drops documents.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from actkit.core.ground.errors import DataError
from actkit.core.ground.progress import track

Split = Literal["train", "calibration", "search", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# Cumulative shares of the hash range: train 84 %, calibration 4 %, search 4 %, test 8 %.
BOUNDS = (0.84, 0.88, 0.92, 1.0)
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"})
_SHORTEST = 40  # characters; below it a docstring says next to nothing ("See base class.")


_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Document(NamedTuple):
    """One text and the qualified name of the object that it documents."""

    name: str
    text: str


def split_of(name: str, bounds: tuple[float, ...] = BOUNDS) -> Split:
    """The split of a document, from the SHA-256 of its name alone.

    Args:
        name: of the document.
        bounds: the cumulative shares of SPLITS.
    """
    position = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    return SPLITS[sum(position >= bound for bound in bounds)]


def check_split(split: str) -> None:
    """Raise DataError if `split` is not one of SPLITS."""
    if split not in SPLITS:
        raise DataError(f"split={split!r} is not known; choose one of {', '.join(SPLITS)}.")


def documents(split: Split) -> list[Document]:
    """The documents of one split, sorted by name; no text occurs in two splits.

    Args:
        split: which part.

    Raises:
        DataError: the split is unknown, or Python came without the sources of its standard library.
    """
    check_split(split)
    return [document for document in _corpus() if split_of(document.name) == split]


def sentences(split: Split) -> list[str]:
    """The first paragraph of every document of the split on one line, without repeats: short inputs for encoders."""
    check_split(split)
    owners: dict[str, str] = {}
    for name, text in _corpus():  # of all splits: the same sentence must not be in two of them
        owners.setdefault(" ".join(text.split("\n\n", 1)[0].split()), name)
    return [text for text, name in owners.items() if len(text) >= _SHORTEST and split_of(name) == split]


@cache
def _corpus() -> tuple[Document, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in sorted([*_library(root), *_topics()]):
        # The same words under two names could fall into two splits, so only the first name keeps them.
        words = " ".join(text.split())
        if len(words) >= _SHORTEST and words not in seen and name not in found:
            seen.add(words)
            found[name] = text
    if not found:
        raise DataError(
            f"the embedded text is empty: no Python sources under {root}. Use a Python that ships its standard library "
            "as .py files, or pass your own text (a .txt or .jsonl file)."
        )
    return tuple(Document(name, text) for name, text in found.items())


def _library(root: Path) -> Iterator[Document]:
    for path in track(sorted(root.rglob("*.py")), "Reading the standard library"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.intersection(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_bytes()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old sources are not the reader's business
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue  # the standard library ships a few templates and bad examples that are not Python
        owners = list(_definitions(tree, module))
        remarks = _comments(source.decode("utf-8", "replace").splitlines(), owners)
        for name, node in owners:
            text = "\n\n".join([ast.get_docstring(node) or "", *remarks.get(node, ())]).strip()
            yield Document(name, text)


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, _Definition]]:
    if isinstance(node, _Definition):
        yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child, f"{name}.{child.name}")
        elif not isinstance(child, ast.expr):
            yield from _definitions(child, name)  # what is defined under `if` and `try`


def _comments(lines: list[str], owners: list[tuple[str, _Definition]]) -> dict[_Definition, list[str]]:
    """The blocks of whole-line comments, each given to the innermost definition around it."""
    inside: list[_Definition] = [owners[0][1]] * (len(lines) + 1)
    for _, node in owners[1:]:  # outer before inner
        assert not isinstance(node, ast.Module)
        last = node.end_lineno or node.lineno
        inside[node.lineno : last + 1] = [node] * (last + 1 - node.lineno)
    found: dict[_Definition, list[str]] = {}
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        comment = re.match(r"\s*#+ ?(.*)", line)
        if comment:
            block.append(comment[1].rstrip())
        elif block:
            text = "\n".join(line for line in block if not line or re.search(r"\w", line)).strip()  # no rulers
            if len(text) >= _SHORTEST:
                found.setdefault(inside[number - 1], []).append(text)
            block = []
    return found


def _topics() -> Iterator[Document]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in topics.items():
        # The pages carry Sphinx's underlines and padding; runs of either would fill whole windows with one token.
        yield Document(f"topics.{name}", re.sub(r"([*=~^-])\1{3,}", r"\1\1\1", inspect.cleandoc(text)).strip())
