"""Plug-ins: the example is installed and used as a user would; broken ones are named and break nothing else."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from actkit.core.ground import registry
from actkit.core.ground.errors import CheckpointError, RecipeError
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "plugin"
# What a user does with an installed plug-in, in a process that never saw this one.
USED = """
import sys
from pathlib import Path
import pytest, torch
import actkit
from actkit.cli.main import main
from actkit.core.ground import registry

assert "actkit_clip" not in sys.modules and "clip" in registry.method_names() and "actkit_clip" not in sys.modules
source, out, tests = sys.argv[1:]
sys.argv = ["actkit", "apply", source, "--recipe", "clip", "--out", out, "--data", "random", "--sequences", "4",
            "--length", "8", "--threads", "1"]
try:
    main()
except SystemExit as ended:
    assert not ended.code
import actkit_clip
assert Path(actkit_clip.__file__).parents[1] == Path(sys.path[0])
ids = {"input_ids": torch.arange(10)[None]}
loaded, model = actkit.load(out), actkit.load(source)
assert type(loaded.model.layers[0].mlp.act_fn).__name__ == "Clipped"
before = model(**ids).logits
batches = actkit.load_data("random", model, None, split="calibration", sequences=4, length=8)
applied = actkit.apply(model, "clip", batches, progress=False)
assert torch.equal(model(**ids).logits, loaded(**ids).logits) and not torch.equal(model(**ids).logits, before)
assert torch.equal(applied.undo()(**ids).logits, before)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", tests]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example plug-in, as pip installs it; no package index is asked."""
    place = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(EXAMPLE, place / "source", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(place / "site"), str(source)], check=True, timeout=300)
    return place / "site"


@pytest.mark.slow(reason="pip installs the example, and a user's process runs the command line and its tests")
def test_the_example_is_installed_and_used(installed, tmp_path):
    source = tmp_path / "model"
    tiny_models.build("llama").save_pretrained(source)
    path = os.pathsep.join([str(installed), *(folder for folder in sys.path if folder.endswith("src"))])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    arguments = [str(source), str(tmp_path / "out"), str(EXAMPLE / "tests")]
    ended = subprocess.run(
        [sys.executable, "-P", "-c", USED, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "reloads: the outputs are equal bit for bit" in " ".join(ended.stdout.split())
    with pytest.raises(CheckpointError, match=r"'clipped' is not known\..*if the plug-in's package is installed"):
        checkpoint.load(tmp_path / "out")  # here it is not


BROKEN = {
    "no_import": "import a_package_that_is_not_there\n",
    "no_syntax": "def broken(:\n",
    "ends": "import sys\nsys.exit('at import')\n",
    "empty": "",
    "odd": "class Other: ...\nvalue = 3\nclass Bare(__import__('torch').nn.Module): ...\n",
}
POINTS = """[actkit.methods]
gone = no_such_module:Method
import_fails = no_import:Method
syntax_fails = no_syntax:Method
exits = ends:Method
missing = empty:Method
other_class = odd:Other
no_class = odd:value
teal = odd:Other

[actkit.modules]
bare = odd:Bare
"""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Two installed packages: one that is broken in every way, and one that claims a name of the first."""
    for name, text in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(text)
    for package, points in (("broken-plugin", POINTS), ("rival", "[actkit.methods]\ngone = rival_module:Method\n")):
        folder = tmp_path / f"{package.replace('-', '_')}-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (folder / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    registry._entries.cache_clear(), registry._load.cache_clear()
    yield
    monkeypatch.undo()
    registry._entries.cache_clear(), registry._load.cache_clear()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("import_fails", "does not import: No module named 'a_package_that_is_not_there'"),
        ("syntax_fails", "does not import: SyntaxError"),
        ("exits", "does not import: SystemExit: at import"),
        ("missing", "does not import: AttributeError: module 'empty' has no attribute 'Method'"),
        ("other_class", "is the class Other, not a Transform"),
        ("no_class", "is a int, not a Transform"),
        (
            "gone",
            "claimed by no_such_module:Method, of the package broken-plugin 1.2 and by rival_module:Method, of the",
        ),
        ("teal", "odd:Other, of the package broken-plugin 1.2"),
    ],
)
def test_a_broken_one_is_named(broken, name, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.of(name)
    text = str(caught.value)
    assert words in text and f"actkit.methods: {name!r}" in text and "broken-plugin 1.2" in text, text
    assert "uninstall" in text and "author" in text


def test_all_others_work_beside_broken_ones(broken):
    assert {"gone", "missing", "wina", "rtn"} <= set(registry.method_names())
    model = tiny_models.build("llama")
    apply(model, "wina", tiny_models.batches("llama"), progress=False)
    with pytest.raises(RecipeError, match=r"'bare' \(odd:Bare, .*is the class Bare, not a torch.nn.Module with spec"):
        registry.module_class("bare")
    with pytest.raises(RecipeError, match=r"'teal' is claimed by .*actkit.sparsity.teal:Teal, of the package actkit "):
        Recipe.of("rtn,teal")


def test_a_class_may_be_named_where_its_package_imports_it(tmp_path, monkeypatch):
    """`package:Class`, while it is written in `package.inner`; another class of that name is not taken for it."""
    (tmp_path / "short_paths").mkdir()
    (tmp_path / "short_paths" / "inner.py").write_text("class Inner: ...\n")
    (tmp_path / "short_paths" / "other.py").write_text("class Inner: ...\n")
    (tmp_path / "short_paths" / "__init__.py").write_text("from short_paths.inner import Inner\n")
    about = tmp_path / "short_paths-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: short-paths\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[actkit.modules]\ninner = short_paths:Inner\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry._entries.cache_clear()
    try:
        written, other = (importlib.import_module(f"short_paths.{name}").Inner for name in ("inner", "other"))
        assert registry.module_name(written) == "inner"
        with pytest.raises(RecipeError, match=r'Inner is not registered: add `name = "short_paths.other:Inner"`'):
            registry.module_name(other)
    finally:
        registry._entries.cache_clear()
        for name in [name for name in sys.modules if name.startswith("short_paths")]:
            del sys.modules[name]


def test_a_rule_is_no_transform():
    with pytest.raises(RecipeError, match=r"'prosparse' \(actkit\.sparsity.* is not a transform.*actkit\.train"):
        Recipe.of("prosparse")
