"""The public names of actkit and whether they have docstrings, read from the source without importing it.

    python scripts/public_names.py      # lists what has none, and fails if there is any

Public are modules, and in them classes, functions, methods and properties, whose names have no leading underscore. A
method that overrides one of a base class shares its docstring. Of what a user sets (the settings of transforms, the
parameters of `actkit.__all__`) each must be named in a docstring too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
# What base classes outside actkit document.
OUTSIDE = {
    "Module": {"forward", "extra_repr"},
    "TrainerCallback": {
        "on_train_begin",
        "on_train_end",
        "on_step_begin",
        "on_pre_optimizer_step",
        "on_optimizer_step",
        "on_epoch_end",
        "on_save",
    },
}
TAKEN_FOR_GRANTED = {"self", "cls", "args", "kwargs"}


@dataclass(frozen=True)
class Name:
    """A public name. path: dotted, from `actkit` on. kind: 'module', 'class', 'function', 'method', 'override' (of a
    method that a library documents), 'setting' or 'parameter'."""

    path: str
    kind: str
    documented: bool


class Source:
    """The syntax trees of all public modules."""

    def __init__(self, source: Path = SOURCE) -> None:
        self.trees = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in modules(source).items()}
        self.classes = {
            (module, node.name): node
            for module, tree in self.trees.items()
            for node in tree.body
            if isinstance(node, ast.ClassDef)
        }

    def names(self) -> list[Name]:
        """Every public name."""
        return [name for module in self.trees for name in self._of(module)]

    def exported(self) -> list[str]:
        """What the names of `actkit.__all__` stand for: dotted paths."""
        for node in self.trees["actkit"].body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
                return [f"actkit.{home}.{name}" for name, home in ast.literal_eval(node.value).items()]
        raise LookupError("actkit/__init__.py: the table _HOMES of public names is gone; teach this file the new one.")

    def first_line(self, path: str) -> str:
        """The first sentence or line that the docstring at a dotted path says; '' if there is none."""
        module, _, name = (path, "", "") if path in self.trees else path.rpartition(".")
        body = self.trees[module].body
        node = next((each for each in body if getattr(each, "name", None) == name), self.trees[module])
        text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        return re.split(r"(?<=\.) ", text)[0]

    def _of(self, module: str) -> Iterator[Name]:
        tree, exported = self.trees[module], self.exported()
        yield Name(module, "module", bool(ast.get_docstring(tree)))
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            path = f"{module}.{node.name}"
            if isinstance(node, ast.FunctionDef):
                yield Name(path, "function", bool(ast.get_docstring(node)))
                if path in exported:
                    yield from _parameters(path, node)
                continue
            yield Name(path, "class", bool(ast.get_docstring(node)))
            yield from self._members(module, node)

    def _members(self, module: str, node: ast.ClassDef) -> Iterator[Name]:
        line = list(self._line(module, node.name))
        words = {word for each in line for word in re.findall(r"\w+", ast.get_docstring(each) or "")}
        is_transform = "Transform" in [each.name for each in line]
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                documented = any(_documents(each, member.name) for each in line)
                kind = "override" if not documented and _outside(node, member.name) else "method"
                yield Name(f"{module}.{node.name}.{member.name}", kind, documented or kind == "override")
            elif is_transform and isinstance(member, ast.AnnAssign) and "ClassVar" not in ast.unparse(member):
                setting = ast.unparse(member.target)
                if not setting.startswith("_"):
                    yield Name(f"{module}.{node.name}.{setting}", "setting", setting in words)

    def _line(self, module: str, name: str) -> Iterator[ast.ClassDef]:
        """A class and the classes of actkit that it comes from."""
        node = self.classes.get((module, name))
        if node is None:
            for each in self.trees[module].body if module in self.trees else ():
                if isinstance(each, ast.ImportFrom) and name in [alias.name for alias in each.names]:
                    yield from self._line(each.module or "", name)
            return
        yield node
        for base in node.bases:
            yield from self._line(module, _last(base))


def modules(source: Path = SOURCE) -> dict[str, Path]:
    """Every public module, with its file."""
    found = {}
    for file in sorted((source / "actkit").rglob("*.py")):
        parts = file.relative_to(source).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = file
    return found


def _documents(owner: ast.ClassDef, method: str) -> bool:
    return any(
        isinstance(member, ast.FunctionDef) and member.name == method and ast.get_docstring(member)
        for member in owner.body
    )


def _outside(owner: ast.ClassDef, method: str) -> bool:
    bases = [_last(base) for base in owner.bases]
    return any(method in OUTSIDE.get(base, OUTSIDE["Module"]) for base in bases)


def _parameters(path: str, node: ast.FunctionDef) -> Iterator[Name]:
    words = set(re.findall(r"\w+", ast.get_docstring(node) or ""))
    for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
        if argument.arg not in TAKEN_FOR_GRANTED:
            yield Name(f"{path}.{argument.arg}", "parameter", argument.arg in words)


def _last(node: ast.expr) -> str:
    """The name of a base class, without its module and type arguments."""
    return ast.unparse(node).split("[")[0].split(".")[-1]


if __name__ == "__main__":
    names = Source().names()
    missing = [name for name in names if not name.documented]
    for name in missing:
        print(f"{name.kind:9} {name.path}")
    print(f"{len(missing)} of {len(names)} public names are not documented")
    sys.exit(bool(missing))
