"""The journal of a search or a comparison: a JSON line per finished measurement, on the disk before the next begins.

The first line says what the measurements depend on (model, data, settings, versions, machine); a search resumes only if
that is the same. A line is written in one piece and flushed to the disk, so that after Ctrl-C, kill -9 or a power cut
every line is whole, except perhaps the last, which is then dropped and measured again. Each line ends with a digest of
its content, so that a damaged number is an error and no other measurement.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from actkit.core.ground.errors import ActkitError
from actkit.core.ground.whole_file import flush

SCHEMA = 2  # since 2 each line ends with a digest of itself
DIGEST = "digest"
JOURNAL = "journal.jsonl"  # in the folder of a search or a comparison


class JournalError(ActkitError):
    """A journal that cannot be read, or is of another search."""


class Journal:
    """The lines of one search, or of one comparison.

    Args:
        path: of the file.
        entries: what was measured, oldest first.
        notes: what was mended while reading.
    """

    def __init__(self, path: Path, entries: list[dict[str, Any]], notes: list[str]) -> None:
        self.path, self.entries, self.notes = path, entries, notes

    @classmethod
    def start(cls, path: str | Path, header: Mapping[str, Any]) -> Self:
        """Start a new journal.

        Args:
            path: of the file; what it held is replaced.
            header: what the measurements depend on.

        Returns:
            The journal, without entries.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        journal = cls(path, [], [])
        journal._write({"kind": "header", "schema": SCHEMA, **header})
        flush(path.parent)
        return journal

    @classmethod
    def resume(cls, path: str | Path, header: Mapping[str, Any], what: str = "search") -> Self:
        """Go on with a journal. A torn last line is cut off, and noted.

        Args:
            path: of the file.
            header: what the measurements depend on.
            what: it is a journal of.

        Returns:
            The journal, with its entries.

        Raises:
            JournalError: there is no journal, a line inside is damaged, or the header is of another search; the error
                says what differs.
        """
        path = Path(path)
        lines, notes = _read(path)
        if not lines:
            raise JournalError(f"resume: {path} holds no whole line; start again with overwrite=True (--overwrite).")
        found, *entries = lines
        if found.get("kind") != "header" or found.get("schema") != SCHEMA:
            raise JournalError(
                f"resume: {path} begins with {found.get('kind')!r} of schema {found.get('schema')!r}, this actkit "
                f"writes 'header' of schema {SCHEMA}; start again with overwrite=True (--overwrite)."
            )
        for number, entry in enumerate(lines, start=1):
            if entry.pop(DIGEST, None) != _digest(entry):
                raise _damaged(path, number)
        differing = differences(found, json.loads(json.dumps({"kind": "header", "schema": SCHEMA, **header})))
        if differing:
            raise JournalError(
                f"resume: {path} is of another {what}: {'; '.join(differing)}. Give what was given then, or start "
                f"again with overwrite=True (--overwrite)."
            )
        return cls(path, entries, notes)

    def add(self, kind: str, **content: Any) -> None:
        """Write one measurement, and wait until it is on the disk."""
        entry = {"kind": kind, **content}
        self._write(entry)
        self.entries.append(json.loads(json.dumps(entry)))

    def find(self, kind: str) -> list[dict[str, Any]]:
        """Return the entries of one kind, oldest first."""
        return [entry for entry in self.entries if entry["kind"] == kind]

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps({**entry, DIGEST: _digest(entry)}, allow_nan=False).encode() + b"\n"
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def check_out(out: Path, *, resume: bool, overwrite: bool, what: str = "search") -> None:
    """Check that a folder can be written, so that nothing is lost in it.

    Args:
        out: the folder.
        resume: its journal is to be gone on with.
        overwrite: what an earlier run left is to be replaced.
        what: leaves journals there.

    Raises:
        ValueError: it is a file, it holds something and neither was asked for, or nothing of ours left it.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"out: {out} is a file; choose a folder.")
    if not any(out.iterdir()):
        return
    if not (resume or overwrite):
        raise ValueError(
            f"out: {out} exists already; choose another folder, pass resume=True (--resume) to go on with its journal, "
            f"or overwrite=True (--overwrite) to replace it."
        )
    if not (out / JOURNAL).is_file():
        raise ValueError(
            f"out: {out} holds no {JOURNAL}, so no {what} left it, and nothing in it is touched; choose another folder."
        )


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All whole lines; a torn last one is cut off the file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JournalError(f"resume: {path} cannot be read ({error}); start without resume (--resume).") from error
    whole, _, torn = content.rpartition(b"\n")
    notes = []
    if torn:
        notes.append(f"the last line of {path.name} was torn ({len(torn)} bytes without an end) and was dropped")
        with path.open("r+b") as file:
            file.truncate(len(content) - len(torn))
            os.fsync(file.fileno())
    lines = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            entry = json.loads(line)
            lines.append(entry)
            known = isinstance(entry, dict) and isinstance(entry.get("kind"), str)
        except (ValueError, RecursionError):
            known = False
        if not known:
            raise _damaged(path, number)
    return lines, notes


def _damaged(path: Path, number: int) -> JournalError:
    return JournalError(
        f"resume: line {number} of {path} is damaged; start again with overwrite=True (--overwrite), or cut the file "
        f"before that line."
    )


def _digest(entry: Mapping[str, Any]) -> str:
    """Of a line's content; JSON gives back numbers and the order of keys as they were."""
    return hashlib.sha256(json.dumps(entry).encode()).hexdigest()[:16]


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], where: str = "") -> list[str]:
    """Say how two JSON objects differ.

    Args:
        found: the one.
        expected: the other.
        where: what the names begin with.

    Returns:
        Texts such as 'seed was 0 and is 1', with dotted names.
    """
    texts: list[str] = []
    for key in dict.fromkeys((*found, *expected)):
        before, now = found.get(key), expected.get(key)
        name = f"{where}{key}"
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            texts += differences(before, now, f"{name}.")
        elif before != now:
            texts.append(f"{name} was {_short(before)} and is {_short(now)}")
    return texts


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:24]}..."
