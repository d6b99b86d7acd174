"""docs/errors.md: every row is raised here, and every error of the sources has a row."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import actkit.catalogue
import actkit.search.journal
from actkit.core.ground import errors
from error_proofs import PROOFS, Place

ROOT = Path(__file__).parents[1]
for path in sorted((ROOT / "tests").rglob("errors_of_*.py")):  # those of each family stand beside its tests
    runpy.run_path(str(path))
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
SOURCES = ROOT / "src" / "actkit"
GAP = "\x00"  # what varies in the text of a raise statement
OWN = {name: found for name, found in vars(errors).items() if isinstance(found, type)} | {
    "JournalError": actkit.search.journal.JournalError,
    "CatalogueError": actkit.catalogue.CatalogueError,
}
# Raised on purpose and never seen: caught inside, turned into another error of the page, or part of Python's protocol.
INTERNAL = {
    "core/ground/processes.py: ProcessError": "the text of a row, built some lines above where it is raised",
    "core/model/anatomy.py: CoverageError": "the text of the row `example: ... cannot run`, built one line above",
    "functions/swap.py: ValueError": "pydantic's own validators, shown as `swap: ...` or `recipe: ...: ...`",
    "runtime/blocks.py: UnsupportedModelError": "the reason in `model: ... cannot be decoded here`",
    "runtime/families.py: UnsupportedModelError": "the reason in `model: ... cannot be decoded here`",
    "runtime/latent.py: UnsupportedModelError": "the reason in `model: ... cannot be decoded here`",
    "runtime/tables.py: UnsupportedModelError": "the reason in `model: ... cannot be decoded here`",
    "core/measure/fresh.py: ValueError": "some are of the worker, shown as `...: the fresh process reports ...`",
    "search/speed_row.py: MemoryError": "a note in the report: why the larger shape was not measured",
    "core/forward/outputs.py: StopForward": "ends a pass before the head",
    "core/train/training.py: KeyboardInterrupt": "Ctrl-C; the command line says how to go on",
    "core/train/staged_run.py: KeyboardInterrupt": "the same",
    "cli/main.py: typer.Exit": "Ctrl-C",
    "cli/options.py: typer.BadParameter": "the command line's own words, with the option's name before them",
    "search/search.py: out_of_time": "ActkitError, the row `minutes: ... were over before one candidate was measured`",
    "search/budget.py: OutOfTime": "a note in the report: which candidate the minutes did not pay for",
    "search/journal.py: _damaged": "JournalError, the row `resume: line ... of ... is damaged`",
    "core/store/quantized_source.py: _unread": "CheckpointError, `...: its weight is stored ..., which is not read`",
    "core/grids/grid.py: ValueError": "the reason in `...: group_size ...`",
    "core/grids/integers.py: ValueError": "the reason in `...: group_size ...`",
    "core/ground/yaml_files.py: yaml.MarkedYAMLError": "the reason in `... is not valid YAML: ...`",
    "core/store/activation_store.py: IndexError": "Python's protocol: an index beyond the shuffled batches",
    "gguf/file.py: IndexError": "the reason in `...: not readable as GGUF (...)`",
    "core/recipe/blockwise.py: StopForward": "ends a forward pass early",
    "core/store/expert_store.py: Unwanted": "ends the read of a preload, and is counted",
    "sparsity/edgemoe/throttled_store.py: Unwanted": "the same",
    "core/store/tensor_source.py: ValueError": "the reason in `...: not readable (...)`",
}
PYDANTIC = (
    "core/recipe/stage.py",
    "functions/af_kan/replace.py",
    "functions/kat/gr_kan.py",
    "sparsity/prosparse/activation_penalty.py",
    "sparsity/cats/cats.py",
    "sparsity/prosparse/prosparse.py",
    "sparsity/sparsing_law/perplexity_sparsity.py",
    "sparsity/edgemoe/expert_bits.py",
    "functions/polycom/ungate.py",
)
QUIET = ("AttributeError", "_Planned", "NotApplicable", "AssertionError")  # Python's protocol, and actkit.testing's


class Row(NamedTuple):
    """error: the class. text: as on the page, with ... for what varies."""

    error: str
    text: str

    def fits(self, message: str) -> bool:
        return re.match(".*".join(map(re.escape, self.text.split("..."))), message, re.DOTALL) is not None


def rows() -> list[Row]:
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        error, _, body = section.partition("\n")
        if error == "Warnings":  # nothing is raised there
            continue
        for text in re.findall(r"^\| `(.+?)` \|", body, re.MULTILINE):
            name, _, rest = text.partition(": ")
            found.append(Row(name, rest) if error == "Other errors" else Row(error, text))
    return found


ROWS = rows()
ARGUMENT = [row for row in ROWS if row.error == "ValueError"]


def template(node: ast.expr) -> str:
    """The text of an f-string with a gap for each value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    return template(node.left) + template(node.right) if isinstance(node, ast.BinOp) else GAP


def raised() -> Iterator[tuple[str, str, str]]:
    """(file, class, text) of every raise statement that makes an error."""
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func)
                text = template(node.exc.args[0]) if node.exc.args else ""
                yield path.relative_to(SOURCES).as_posix(), name, text


def test_the_page_names_every_class():
    assert set(OWN) <= {row.error for row in ROWS}
    for name in set(OWN):
        assert f"## {name}\n" in PAGE


def test_every_error_of_the_sources_is_on_the_page():
    missing = []
    for file, name, text in raised():
        if name in QUIET or file.startswith("testing/") or f"{file}: {name}" in INTERNAL:
            continue
        if file in PYDANTIC and name == "ValueError" and not re.match(r"\w+: ", text):
            continue  # a validator's; shown as `recipe: ...: ...`
        if not any(row.error == name and row.fits(text) for row in ROWS):
            missing.append(f"{file}: {name}: {text.replace(GAP, '...')}")
    assert not missing, "\n".join(missing)


def test_what_is_internal_is_there():
    known = {f"{file}: {name}" for file, name, _ in raised()} | {
        "core/recipe/blockwise.py: StopForward",
        "core/forward/outputs.py: StopForward",
    }
    assert set(INTERNAL) <= known, set(INTERNAL) - known


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.make(tmp_path_factory.mktemp("errors"))


def _place_of(proof: Callable[[Place], Any]) -> str:
    """Where a proof stands, such as 'errors_of_gguf.py, line 30'."""
    return f"{Path(proof.__code__.co_filename).name}, line {proof.__code__.co_firstlineno}"


def collect(place: Place) -> list[tuple[str, str, Callable[[Place], Any]]]:
    found = []
    for number, proof in enumerate(PROOFS):
        with pytest.MonkeyPatch.context() as patch:
            here = place.fresh(number, patch)
            try:
                proof(here)
            except Exception as error:
                found.append((type(error).__name__, str(error), proof))
            else:
                raise AssertionError(f"{_place_of(proof)}: it raised nothing")
    return found


def test_every_row_is_raised(place):
    seen = collect(place)
    proved = {row for row in ROWS for name, text, _ in seen if row.error == name and row.fits(text)}
    strange = [
        f"{_place_of(proof)}: {name}: {text[:300]}"
        for name, text, proof in seen
        if not any(row.error == name and row.fits(text) for row in ROWS)
    ]
    assert not strange, "\n".join(strange)
    assert not set(ROWS) - proved, "\n".join(f"{row.error}: {row.text}" for row in ROWS if row not in proved)
