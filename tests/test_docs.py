"""The pages: what they show runs as a reader would run it, links lead somewhere, what is generated is current.

A page is read from top to bottom, in one process and one folder of its own. The language of a block says what is done
with it: `python` runs in one namespace, each command of a `bash` block runs (actkit in this process), a block with a
title is written to the file of that name, `text` is output. `<!-- not run: reason -->` before a block leaves it out.
"""

import importlib
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from actkit.cli.main import main
from actkit.core.ground import registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
# every block of these says what it is
STRICT = [DOCS / "index.md", DOCS / "recipes.md", DOCS / "training.md", *sorted((DOCS / "tutorials").glob("*.md"))]
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
RUN = [page for page in PAGES if page in STRICT or "```python" in page.read_text(encoding="utf-8")]


class Reader:
    """Does what a page says, in the current folder."""

    def __init__(self, page: Path, monkeypatch) -> None:
        self.page, self.monkeypatch = page, monkeypatch
        self.namespace = {"__name__": page.stem}
        monkeypatch.syspath_prepend(Path.cwd())
        monkeypatch.setenv("PYTHONPATH", str(Path.cwd()), prepend=":")  # for the fresh processes

    def read(self, *, strict: bool) -> None:
        """Every block in order; strict: shell commands too, and a block of any other kind is an error."""
        for left_out, about, code in BLOCK.findall(self.page.read_text(encoding="utf-8")):
            title = re.search(r'title="([^"]+)"', about)
            language = about.split(" ")[0]
            if left_out:
                continue
            if title:
                Path(title[1]).write_text(code, encoding="utf-8")
            elif language == "python":
                exec(compile(code, f"{self.page.name}, a block", "exec"), self.namespace)
            elif strict and language == "bash":
                for command in code.replace("\\\n", "").splitlines():
                    self.command(shlex.split(command, comments=True))
            else:
                assert not strict or language == "text", f"{self.page.name}: a block of kind {about!r} is not run"

    def command(self, words: list[str]) -> None:
        if words == ["pip", "install", "-e", "."]:
            self.install()
        elif words[:1] == ["actkit"]:
            self.monkeypatch.setattr(sys, "argv", words)
            try:
                main()
            except SystemExit as ended:
                assert not ended.code, f"{self.page.name}: {shlex.join(words)} ended with {ended.code}"
        else:
            assert not words, f"{self.page.name}: {shlex.join(words)} is no command that this test runs"

    def install(self) -> None:
        """What pip does with the page's pyproject.toml, as far as Python sees it: the names of its entry points."""
        project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
        about = Path(f"{project['name'].replace('-', '_')}-{project['version']}.dist-info")
        about.mkdir()
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        groups = project["entry-points"].items()
        lines = [
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in each.items()) for group, each in groups
        ]
        (about / "entry_points.txt").write_text("".join(lines))
        importlib.invalidate_caches()
        forget_names()


def forget_names() -> None:
    """What the registry read of the installed packages."""
    registry._entries.cache_clear()
    registry._load.cache_clear()


SLOW = {  # page -> what takes more than 20 seconds
    "README": "it changes, measures and saves models of the zoo",
    "docs/index": "it changes and measures models of the zoo",
    "docs/sparsity/cats": "it changes and measures a model of the zoo several times",
    "docs/sparsity/sparsing-law": "it searches for thresholds on a model of the zoo, and measures it",
    "docs/testers": "it runs every tester once, and compiles the decoder's kernels",
    "docs/tutorials/look-inside": "it reads a real model several times",
    "docs/tutorials/make-a-model-cheaper": "it searches for the front of a model",
    "docs/tutorials/narrow-and-heal": "it cuts, trains, rounds and measures a model of the zoo",
    "docs/tutorials/read-longer-texts": "it trains a model of the zoo, and reads long rows of text",
    "docs/tutorials/try-a-method": "it changes, measures, saves and proves two models",
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix()


def runs(page: Path) -> Any:
    reason = SLOW.get(name_of(page))
    return pytest.param(page, id=name_of(page), marks=[] if reason is None else [pytest.mark.slow(reason=reason)])


@pytest.mark.parametrize("page", [runs(page) for page in RUN])
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    try:
        Reader(page, monkeypatch).read(strict=page in STRICT)
    finally:
        forget_names()
        for name in set(sys.modules) - before:  # files that the page wrote
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).with_suffix("").as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(text):
        address, _, anchor = target.partition("#")
        if ":" in address or address.endswith("reference/index.md"):  # elsewhere; made when the site is built
            continue
        file = (page.parent / address).resolve() if address else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(anchor_of, headings), f"{target}: no such heading"


def anchor_of(heading: str) -> str:
    return re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-")


def script(name: str) -> dict:
    """What a file of scripts/ defines."""
    return runpy.run_path(str(ROOT / "scripts" / name))


def test_every_public_name_is_documented():
    missing = [
        f"{name.kind} {name.path}" for name in script("public_names.py")["Source"]().names() if not name.documented
    ]
    assert not missing, "docstrings are missing; see scripts/public_names.py"


def test_family_pages_are_current():
    folder = DOCS / "families"
    pages = script("family_pages.py")["pages"]()
    assert sorted(pages) == sorted(path.name for path in folder.glob("*.md"))
    for name, text in pages.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"{name}: run python scripts/family_pages.py"


def test_every_built_method_says_when_to_use_it_and_what_it_computes():
    made = script("family_pages.py")
    built = [made["modules_of"](entry) for entry in made["papers"]() if entry.entry]
    for modules in [*built, *([module] for module in set(made["methods"]().values()))]:
        headers = [made["header"](module) for module in modules]
        label = made["WHEN"]
        assert any(dict(each.says(label)) for each in headers), f"{modules[0]}: its header has no '{label}: ...'"
        if modules != ["actkit.functions.swap"]:  # no formula: it puts one function in the place of another
            assert any(each.formulas for each in headers), f"{modules[0]}: its header has no formula"


def test_the_page_of_quality_is_what_was_recorded(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # which the benchmarks set
    made = runpy.run_path(str(ROOT / "benchmarks" / "sparsity_quality_page.py"))
    result = made["common"].committed("sparsity_quality")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (DOCS / "sparsity" / "quality.md").read_text(encoding="utf-8") == made["page"](result)
    assert made["readme"](result, readme) == readme
