"""500 damaged files: a flipped byte or a cut gives a named error, or exactly what was there before.

Weights, the JSON of a folder, the digests themselves, the state of a training, recipes in YAML and the journal of a
search. Beside them what a file may hold on purpose: YAML with tags, anchors and towers of brackets.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import batches, build, snapshot

from actkit.core.ground.errors import CheckpointError, RecipeError
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.rule import parse_rules
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint, checksums
from actkit.core.store.tensor_files import read_values, write_values
from actkit.search.journal import Journal, JournalError

HEADER = {"model": {"name": "m", "fingerprint": "ab" * 32}, "settings": {"seed": 0, "speed": False}}
STACK = {"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8}}, {"teal": {"sparsity": 0.4}}]}

FAST = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


class Place(NamedTuple):
    """A kind of file: where it is, how it is read, the errors that may be, and what it says as long as it is whole."""

    path: Path
    read: Callable[[], Any]
    errors: type[Exception]
    whole: Any
    cases: int


def bits(value: Any) -> Any:
    """Tensors as bytes, so that NaN equals itself and == means every bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {key: bits(item) for key, item in value.items()} if isinstance(value, dict) else value


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    root = tmp_path_factory.mktemp("damage")
    model = apply(build("llama", num_hidden_layers=1), STACK, batches("llama"), min_coverage=0.0, progress=False).model
    changed = checkpoint.save(model, root / "changed")
    plain = checkpoint.save(build("llama", num_hidden_layers=1), root / "plain")
    (weights,) = changed.glob("*.safetensors")
    values = {"step": 3, "loss": 0.5, "best": {"a": torch.randn(5), "b": None}, "history": [1.5, 2.5]}
    write_values(root / "state", values)
    recipe = Recipe.parse(STACK).save(root / "recipe.yaml")
    journal = Journal.start(root / "journal.jsonl", HEADER)
    journal.add("candidate", key="a", measured={"loss": 0.25, "high": 1e-3, "name": "x"})
    journal.add("candidate", key="b", measured={"loss": None, "high": 2.0, "name": "y"})
    journal.add("speed", key="a", speed={"value": 3.5})

    def place(path: Path, read: Callable[[], Any], errors: type[Exception], cases: int) -> Place:
        return Place(path, read, errors, read(), cases)

    def folder(path: Path) -> Callable[[], Any]:
        return lambda: snapshot(checkpoint.load(path))

    def of_state() -> Any:
        return bits(read_values(root / "state"))

    return {
        "weights": place(weights, folder(changed), CheckpointError, 80),
        "actkit.json": place(changed / checkpoint.MANIFEST, folder(changed), CheckpointError, 60),
        "config.json": place(changed / "config.json", folder(changed), CheckpointError, 40),
        "generation_config.json": place(changed / "generation_config.json", folder(changed), CheckpointError, 20),
        "digests": place(changed / checksums.NAME, folder(changed), CheckpointError, 60),
        "plain weights": place(plain / "model.safetensors", folder(plain), CheckpointError, 30),
        "plain config.json": place(plain / "config.json", folder(plain), CheckpointError, 20),
        "tensors of a training": place(root / "state" / "tensors.safetensors", of_state, CheckpointError, 30),
        "values of a training": place(root / "state" / "values.json", of_state, CheckpointError, 30),
        "recipe": place(recipe, lambda: Recipe.load(recipe).dump(), RecipeError, 60),
        "journal": place(journal.path, lambda: Journal.resume(journal.path, HEADER).entries, JournalError, 70),
    }


KINDS = (
    *("weights", "actkit.json", "config.json", "generation_config.json", "digests", "plain weights"),
    *("plain config.json", "tensors of a training", "values of a training", "recipe", "journal"),
)


def damage(content: bytes, data: st.DataObject) -> bytes:
    """The content with one to three bytes flipped, cut, or both."""
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3), "flips")):
        at = data.draw(st.integers(0, len(content) - 1), "at")
        damaged[at] ^= data.draw(st.integers(1, 255), "mask")
    if damaged == content or data.draw(st.booleans(), "cut"):
        del damaged[data.draw(st.integers(0, len(content) - 1), "length") :]
    return bytes(damaged)


def test_there_are_500_cases(places):
    assert tuple(places) == KINDS and sum(place.cases for place in places.values()) == 500


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_an_error_or_as_it_was(kind, places):
    place = places[kind]
    content, errors = place.path.read_bytes(), []

    @settings(
        max_examples=place.cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        damaged = damage(content, data)
        place.path.write_bytes(damaged)
        try:
            found = place.read()
        except place.errors as error:
            errors.append(str(error))
            return
        if kind == "recipe":  # another text may be another recipe, which nothing tells from a wanted one
            assert set(found) == {"actkit", "transforms"}
        elif kind == "journal":  # what was cut off is measured again
            assert found == place.whole[: len(found)]
        else:
            assert found == place.whole

    try:
        run()
    finally:
        place.path.write_bytes(content)
    assert errors and all(len(text) < 4000 for text in errors)
    assert place.read() == place.whole


# -- YAML that is meant to harm ----------------------------------------------------------------------------------------

HEAD = "actkit: 1\ntransforms:\n"
LAUGHS = "\n".join(
    f"{'abcdefghij'[i]}: &{'abcdefghij'[i]} [{', '.join(['*' + 'abcdefghij'[i - 1]] * 10)}]" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!python/object/apply:os.system ['touch harmed']", "line 1"),
        (HEAD + "- teal: !!python/name:os.system\n", "the tag 'tag:yaml.org,2002:python/name:os.system'"),
        (HEAD + "- teal: {sparsity: !!float 0.5}\n", "the tag 'tag:yaml.org,2002:float'"),
        (HEAD + "- !mine {sparsity: 0.5}\n", "the tag '!mine'"),
        ("a: &a [x, x]\n" + LAUGHS + HEAD + "- teal: {skip: *j}\n", "an anchor or alias"),
        (HEAD + "- teal: &x {skip: [*x]}\n", "an anchor or alias"),
        (HEAD + "- teal: {sparsity: 0.5, sparsity: 0.6}\n", "the key 'sparsity' twice"),
        ("actkit: 1\n" + HEAD + "- teal\n", "the key 'actkit' twice"),
        ("[" * 100_000, "more than 20 levels"),
        ("{a: " * 50_000, "more than 20 levels"),
        ("- " * 100_000, "more than 20 levels"),
        ("? " * 100_000, "more than 20 levels"),
        (HEAD + "- teal: {sparsity: 2024-99-99}\n", "not valid YAML: month must be in"),
        (HEAD + f"- teal: {{sparsity: {'9' * 5000}}}\n", "not valid YAML: Exceeds the limit"),
        (HEAD + f"- teal: {{sparsity: '{'9' * 200_000}'}}\n", "sparsity: '999"),
        (HEAD + "- teal: {sparsity: .nan}\n", "sparsity: nan was given"),
        (HEAD + "- teal\n" * 30_000, "more than 10000 names and values"),
        (HEAD + "#" * 300_000, "bytes, allowed are 262144"),
        ("\x00", "not valid YAML"),
        ("- {[a]: 1}\n", "not valid YAML"),
        ("", "expected the keys"),
    ],
    ids=range(21),
)
def test_hostile_yaml_is_refused_at_once(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    started = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert time.perf_counter() - started < 5
    assert words in str(caught.value) and len(str(caught.value)) < 4000, str(caught.value)[:2000]
    assert not (tmp_path / "harmed").exists()
    path.write_text(text.replace("transforms", "rules"), encoding="utf-8")
    if "twice" in words or "tag" in words or "alias" in words:
        with pytest.raises(RecipeError, match=r"^rules: "):
            parse_rules(path)


def test_a_bomb_of_anchors_takes_no_memory(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"a: &a [x, x]\n{LAUGHS}{HEAD}- teal: {{skip: *j}}\n")
    tracemalloc.start()
    try:
        with pytest.raises(RecipeError, match="an anchor or alias"):
            Recipe.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
