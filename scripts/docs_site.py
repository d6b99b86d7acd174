"""What mkdocs cannot know by itself: the order of the pages, a page of reference per module, links out of docs/.

A hook of mkdocs.yml. A page under docs/ that no list here names is shown under "How it works", or with the folder that
it lies in; so a new page needs no entry. Any module is in the reference, and after the build each public name must be.
"""

from __future__ import annotations

import logging
import posixpath
import re
import zlib
from pathlib import Path

from mkdocs.structure.files import File

from public_names import Source, modules

LOG = logging.getLogger("mkdocs.plugins.actkit")
ROOT = Path(__file__).parents[1]
TUTORIALS = [
    "make-a-model-cheaper",
    "four-bits",
    "try-a-method",
    "try-an-activation",
    "narrow-and-heal",
    "fine-tune-with-less-memory",
    "read-activations",
    "read-longer-texts",
    "add-a-method",
]
# Pages that lie beside docs/ in the repository, and where the site shows them.
BESIDE = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "LOG.md": "project/log.md",
}
SHOWN = {file.relative_to(ROOT).as_posix(): f"reference/{module}.md" for module, file in modules().items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCED = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_config(config):
    """The navigation: what is named here first, then every other page in the order of its path."""
    pages = sorted(path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).rglob("*.md"))
    families = [page for page in pages if page.startswith("families/")]
    rest = [page for page in pages if "/" not in page and page not in ("index.md", "papers.md", "architecture.md")]
    nav = [
        {"Home": "index.md"},
        {"Tutorials": [f"tutorials/{name}.md" for name in TUTORIALS]},
        {"How it works": ["architecture.md", *rest]},
        {"Methods": ["families/index.md", *families_in_order(families), {"The papers": "papers.md"}]},
    ]
    folders = sorted({page.split("/")[0] for page in pages if "/" in page} - {"families", "tutorials"})
    in_full = [{folder.capitalize(): [page for page in pages if page.startswith(f"{folder}/")]} for folder in folders]
    nav[3]["Methods"].append({"In full": in_full})
    nav += [{"Reference": reference()}, {"Project": [{Path(at).stem.capitalize(): at} for at in BESIDE.values()]}]
    config.nav = nav
    config.watch += [str(ROOT / "src"), *(str(ROOT / name) for name in BESIDE)]
    return config


def families_in_order(pages: list[str]) -> list[str]:
    """The family pages in the order of the catalogue, which is that of the overview's links."""
    overview = (ROOT / "docs" / "families" / "index.md").read_text(encoding="utf-8")
    order = [f"families/{name}" for name in re.findall(r"\]\(([a-z-]+\.md)\)", overview)]
    return [page for page in dict.fromkeys([*order, *pages]) if page in pages and not page.endswith("index.md")]


def reference() -> list:
    """The navigation of the reference: modules of `actkit` first, then a section per package."""
    top: list = ["reference/index.md"]
    packages: dict[str, list] = {}
    for module, file in modules().items():
        parts = module.split(".")
        if len(parts) == 1 or (len(parts) == 2 and file.name != "__init__.py"):
            top.append({module: page_of(module)})
        else:
            packages.setdefault(parts[1], []).append({parts[-1] if len(parts) > 2 else "overview": page_of(module)})
    return top + [{package: pages} for package, pages in packages.items()]


def page_of(module: str) -> str:
    """Where the reference of a module stands."""
    return f"reference/{module}.md"


def on_files(files, config):
    """Add the pages that are not under docs/: of each module, and those beside docs/."""
    for module in modules():
        files.append(File.generated(config, page_of(module), content=f"::: {module}\n"))
    files.append(File.generated(config, "reference/index.md", content=overview()))
    for name, at in BESIDE.items():
        files.append(File.generated(config, at, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def overview() -> str:
    """The first page of the reference: what `import actkit` gives, and every module with the first line about it."""
    source = Source()
    lines = ["# Reference", "", "Made from the docstrings. `import actkit` gives:", "", "| name | |", "|---|---|"]
    for path in sorted(source.exported(), key=lambda path: path.rpartition(".")[2].lower()):
        lines.append(f"| [`{path.rpartition('.')[2]}`][{path}] | {cell(source.first_line(path))} |")
    lines += ["", "Everything else is imported from its module:", "", "| module | |", "|---|---|"]
    for module in modules():
        if module != "actkit":
            lines.append(f"| [`{module}`]({posixpath.basename(page_of(module))}) | {cell(source.first_line(module))} |")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """A text in a cell of a table."""
    return text.replace("|", "\\|").replace("*", "\\*")


def on_page_markdown(markdown, page, config, files):
    """Point links at what the site has: a module at its reference. A link to any other file becomes its text."""
    sources = {at: name for name, at in BESIDE.items()}
    home = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def point(match: re.Match) -> str:
        image, text, target = match.groups()
        address, _, anchor = target.partition("#")
        if not address or ":" in address:
            return match[0]
        place = posixpath.normpath(posixpath.join(home, address))
        shown = place.removeprefix("docs/") if place.startswith("docs/") else {**BESIDE, **SHOWN}.get(place)
        if shown is not None and files.get_file_from_path(shown) is not None:
            there = posixpath.relpath(shown, posixpath.dirname(page.file.src_uri))
            return f"{image}[{text}]({there}{'#' + anchor if anchor else ''})"
        return text if (ROOT / place).exists() else match[0]

    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(point, part) for part in parts)


def on_post_build(config):
    """Every public name must be in the reference: in the inventory that mkdocstrings writes."""
    inventory = (Path(config.site_dir) / "objects.inv").read_bytes().split(b"\n", 4)[4]
    shown = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    source = Source()
    wanted = [name.path for name in source.names() if name.kind in ("module", "class", "function", "method")]
    for path in [*wanted, *source.exported()]:
        if path not in shown:
            LOG.warning("The reference does not show %s.", path)
