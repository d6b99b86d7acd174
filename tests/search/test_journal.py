"""The journal: whole lines come back, a torn last one is dropped, another search is refused by name."""

from __future__ import annotations

import json

import pytest

from actkit.search.journal import Journal, JournalError, differences

HEADER = {"model": {"name": "m", "fingerprint": "ab" * 32}, "settings": {"seed": 0}}


@pytest.fixture
def path(tmp_path):
    journal = Journal.start(tmp_path / "journal.jsonl", HEADER)
    journal.add("candidate", key="a", measured={"loss": 0.25})
    journal.add("speed", key="a", speed=None)
    return journal.path


def test_lines_come_back_and_go_on(path):
    journal = Journal.resume(path, HEADER)
    assert journal.find("candidate") == [{"kind": "candidate", "key": "a", "measured": {"loss": 0.25}}]
    assert not journal.notes
    journal.add("candidate", key="b", measured={})
    assert [entry["key"] for entry in Journal.resume(path, HEADER).find("candidate")] == ["a", "b"]


def test_every_cut_of_the_last_line_is_mended(path):
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(start + 1, len(whole)):
        path.write_bytes(whole[:end])
        journal = Journal.resume(path, HEADER)
        assert len(journal.entries) == 1 and "torn" in journal.notes[0]
        journal.add("speed", key="a", speed=None)
        assert path.read_bytes() == whole


def test_damage_inside_is_an_error_that_names_the_line(path):
    lines = path.read_bytes().split(b"\n")
    for damaged in (b"{not json", b'["a list"]', b'{"kind": 3}'):
        path.write_bytes(b"\n".join([lines[0], damaged, *lines[2:]]))
        with pytest.raises(JournalError, match="line 2"):
            Journal.resume(path, HEADER)


def test_a_journal_without_a_whole_line_or_of_another_schema_is_refused(path):
    header = json.loads(path.read_bytes().split(b"\n")[0])
    path.write_bytes(b'{"kind": "head')
    with pytest.raises(JournalError, match="no whole line"):
        Journal.resume(path, HEADER)
    path.write_bytes(json.dumps({**header, "schema": 99}).encode() + b"\n")
    with pytest.raises(JournalError, match="schema 99"):
        Journal.resume(path, HEADER)
    with pytest.raises(JournalError, match="cannot be read"):
        Journal.resume(path.parent / "none.jsonl", HEADER)


def test_another_search_is_refused_and_what_differs_is_named(path):
    with pytest.raises(JournalError, match=r"settings\.seed was 0 and is 1"):
        Journal.resume(path, {**HEADER, "settings": {"seed": 1}})
    with pytest.raises(JournalError, match=r"model\.fingerprint was \"abab"):
        Journal.resume(path, {**HEADER, "model": {"name": "m", "fingerprint": "cd" * 32}})
    assert differences({"a": 1}, {"b": {"c": 2}}) == ["a was 1 and is null", 'b was null and is {"c": 2}']


def test_nothing_that_json_cannot_hold_is_written(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        Journal.resume(path, HEADER).add("candidate", loss=float("nan"))
    assert path.read_bytes() == before
