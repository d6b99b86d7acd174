"""Pairs from a file: equal lengths, one token as an answer, and lines that are none."""

from __future__ import annotations

import json

import pytest

import actkit
from actkit.core.ground.errors import DataError
from actkit.data.pairs import read_pairs

PAIR = {"clean": "If the file is", "corrupted": "If this file is", "right": " the", "wrong": " not"}


@pytest.fixture(scope="module")
def swiglu():
    return actkit.load("swiglu"), actkit.load_tokenizer("swiglu")


def written(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_pairs_are_batches(swiglu, tmp_path, capsys):
    model, tokenizer = swiglu
    other = {**PAIR, "clean": "If the list is", "corrupted": "If this list is"}
    batches = read_pairs(written(tmp_path / "p.jsonl", PAIR, "", other, PAIR), model, tokenizer, batch_size=2)
    assert [len(batch["right"]) for batch in batches] == [2, 1] and batches.rows == 3
    assert batches[0]["input_ids"][1].tolist() == tokenizer.encode("If this list is")
    assert batches[0]["clean_input_ids"][0].tolist() == tokenizer.encode("If the file is")
    assert batches[1]["wrong"].tolist() == tokenizer.encode(" not")
    assert "".join(batches[0]["tokens"]) == "If this file is"
    assert "are read" not in capsys.readouterr().err
    assert len(read_pairs(tmp_path / "p.jsonl", model, tokenizer, sequences=1)[0]["right"]) == 1
    assert "pairs: 1 of 3 are read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "holds no pair"),
        (["{"], "line 1: not a pair"),
        ([{"clean": "a"}], "line 1: not a pair"),
        ([PAIR, {**PAIR, "clean": "If the"}], "line 2: the clean text has"),
        ([PAIR, {**PAIR, "clean": "the file", "corrupted": "this file"}], "line 2: its texts have"),
        ([{**PAIR, "right": "unbelievably"}], '"right" is'),
    ],
)
def test_what_is_no_pair_is_refused(swiglu, tmp_path, rows, says):
    with pytest.raises(DataError, match=says):
        read_pairs(written(tmp_path / "p.jsonl", *rows), *swiglu)


def test_no_file_and_no_language_model(swiglu, tmp_path):
    with pytest.raises(DataError, match="nothing was given and pairs are read"):
        read_pairs(None, *swiglu)
    with pytest.raises(DataError, match="is no file"):
        read_pairs(tmp_path / "absent.jsonl", *swiglu)
    with pytest.raises(DataError, match="takes none"):
        read_pairs(written(tmp_path / "p.jsonl", PAIR), actkit.load("cnn"), None)
