"""Docstrings have sections that the reference shows: each parameter and field has its line, and what is returned.

ruff's D rules hold the form; here it is asked that nothing is missing.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import actkit
import actkit.testing

SOURCE = Path(actkit.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FOLDERS = sorted({file.parent for file in FILES})
TAKEN_FOR_GRANTED = {"self", "cls", "typingctx"}  # the last is Numba's


def sections(docstring: str) -> dict[str, set[str]]:
    """The names that each section of a docstring explains, by the section's title."""
    found: dict[str, set[str]] = {}
    title = ""
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Yields|Raises):", line):
            title = line[:-1]
            found[title] = set()
        elif title and (name := re.match(r"    \*{0,2}(\w+): ", line)):
            found[title].add(name[1])
    return found


def parameters(node: ast.FunctionDef) -> set[str]:
    """Of a function, by name."""
    given = node.args
    every = (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg)
    return {each.arg for each in every if each is not None} - TAKEN_FOR_GRANTED


def fields(node: ast.ClassDef) -> set[str]:
    """The public fields of a dataclass or named tuple, by name."""
    marks = [ast.unparse(each) for each in (*node.decorator_list, *node.bases)]
    if not any(mark.startswith(("dataclass", "NamedTuple")) for mark in marks):
        return set()
    return {
        member.target.id
        for member in node.body
        if isinstance(member, ast.AnnAssign)
        and isinstance(member.target, ast.Name)
        and not member.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(member.annotation)
    }


def unexplained(file: Path) -> Iterator[str]:
    """What docstrings of more than one line leave out, of the public names in a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for owner in (tree, *classes):
        where = f"{file.relative_to(SOURCE)}: {f'{owner.name}.' if isinstance(owner, ast.ClassDef) else ''}"
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            docstring = ast.get_docstring(node) or ""
            if "\n" not in docstring:
                continue
            said = sections(docstring)
            if isinstance(node, ast.FunctionDef):
                missing = parameters(node) - said.get("Args", set())
            else:
                missing = fields(node) - said.get("Attributes", set())
                made = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
                if "Args" in said and made:
                    missing |= parameters(made[0]) - said["Args"]
            yield from (f"{where}{node.name} says nothing of {name}" for name in sorted(missing))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(SOURCE).as_posix())
def test_every_parameter_and_field_is_explained(folder):
    missing = [line for file in FILES if file.parent == folder for line in unexplained(file)]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("module", [actkit, actkit.testing], ids=lambda module: module.__name__)
def test_the_public_functions_explain_all(module):
    missing = []
    for name in module.__all__:
        value = getattr(module, name)
        file = Path(importlib.import_module(value.__module__).__file__)
        if file not in FILES or not inspect.isfunction(value):
            continue
        said = sections(inspect.getdoc(value))
        given = inspect.signature(value)
        missing += [f"{name}: {each}" for each in sorted(given.parameters.keys() - said.get("Args", set()))]
        if given.return_annotation not in (None, "None") and not said.keys() & {"Returns", "Yields"}:
            missing.append(f"{name}: what it returns")
    assert not missing, "\n".join(missing)
