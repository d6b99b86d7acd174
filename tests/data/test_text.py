"""The embedded text: stable, disjoint splits; and the digits."""

import builtins
import hashlib
import subprocess
import sys

import pytest

from actkit.core.ground.errors import DataError
from actkit.data import SPLITS, digits, documents, sentences
from actkit.data.text import split_of


def test_split_depends_on_the_name_alone():
    # Written down once: another Python version must give the same.
    assert split_of("json.decoder.JSONDecoder.decode") == "train"
    assert split_of("topics.debugger") == "test"
    assert split_of("topics.specialnames") == "calibration"
    assert split_of("topics.string-methods") == "search"


def test_split_is_the_position_of_the_hash():
    for name in ("a", "os.path.join", "topics.lambda"):
        share = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16
        expected = "train" if share < 0.84 else "calibration" if share < 0.88 else "search" if share < 0.92 else "test"
        assert split_of(name) == expected


def test_splits_share_neither_names_nor_texts():
    parts = {split: documents(split) for split in SPLITS}
    names = [document.name for part in parts.values() for document in part]
    texts = [" ".join(document.text.split()) for part in parts.values() for document in part]
    assert len(set(names)) == len(names) and len(set(texts)) == len(texts)
    shares = {split: len(part) / len(names) for split, part in parts.items()}
    assert shares == pytest.approx({"train": 0.84, "calibration": 0.04, "search": 0.04, "test": 0.08}, abs=0.01)
    for part in parts.values():
        assert part == sorted(part) and len(part) > 100


def test_documents_are_what_python_says_of_itself():
    found = {document.name: document.text for split in SPLITS for document in documents(split)}
    assert found["json.decoder.JSONDecoder.decode"].startswith("Return the Python representation of ``s``")
    assert "topics.lambda" in found
    assert not any(name.startswith("test.") or "site-packages" in name for name in found)


def test_comments_go_to_the_innermost_definition():
    import ast

    from actkit.data.text import _comments, _definitions

    source = (
        "# about the module, which is long enough to be kept here\n"
        "class A:\n"
        "    def f(self):\n"
        "        # about the method, which is long enough to be kept\n"
        "        # and goes on\n"
        "        return 1\n"
        "# short\n"
    )
    owners = list(_definitions(ast.parse(source), "m"))
    found = _comments(source.splitlines(), owners)
    named = {name: found.get(node) for name, node in owners}
    assert named["m"] == ["about the module, which is long enough to be kept here"]
    assert named["m.A"] is None
    assert named["m.A.f"] == ["about the method, which is long enough to be kept\nand goes on"]


def test_sentences_are_single_lines_without_repeats():
    found = sentences("test")
    assert len(found) == len(set(found)) > 100
    assert not any("\n" in sentence for sentence in found)
    assert not set(found) & {*sentences("train"), *sentences("calibration"), *sentences("search")}


def test_unknown_split_is_refused():
    for function in (documents, sentences, digits):
        with pytest.raises(DataError, match=r"split='validation'.*train, calibration, search, test"):
            function("validation")


def test_digits_are_split_once():
    parts = {split: digits(split) for split in SPLITS}
    assert sum(len(images) for images, _ in parts.values()) == 1797
    assert len(parts["test"][0]) == 338
    images, labels = parts["train"]
    assert images.shape[1:] == (1, 8, 8) and len(images) == len(labels)
    assert images.min() == 0 and images.max() == 1
    assert labels.unique().tolist() == list(range(10))


def test_digits_without_scikit_learn(monkeypatch):
    from actkit.data.images import _all

    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    _all.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"actkit\[zoo\]"):
        digits("test")


def test_the_corpus_costs_no_import_of_torch():
    code = "import sys; from actkit.data import documents; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
