"""Texts from the user's own files: a .txt or .md file is a document, each line of a .jsonl one, a folder all of these.

They are cut in splits like the embedded text: by a hash of a line of a .jsonl file, or of a file's name in a folder; a
single .txt or .md file by position.
"""

from __future__ import annotations

import json
from pathlib import Path

from actkit.core.forward.texts import check_text
from actkit.core.ground.errors import DataError
from actkit.core.ground.progress import track
from actkit.data.text import BOUNDS, SPLITS, Split, split_of

PLAIN, LINES = frozenset({".txt", ".md"}), ".jsonl"
SUFFIXES = PLAIN | {LINES}


def text_files(folder: Path) -> list[Path]:
    """The files of a folder, and of those inside it, that hold texts; sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def read_texts(path: Path, split: Split | None) -> list[str]:
    """The documents of a file or folder. Raises DataError for a file that cannot be read, or if there is no text."""
    if path.is_dir():
        texts = _folder(path, split)
    elif path.suffix.lower() in PLAIN:
        texts = [_part(_content(path), split)]
    else:
        texts = _lines(path, split)
    texts = [text for text in texts if text.strip()]
    if not texts:
        part = f"nothing for split={split!r}" if split else "no text"
        raise DataError(f"source={str(path)!r} holds {part}; give more text{', or no split' if split else ''}.")
    return texts


def _folder(folder: Path, split: Split | None) -> list[str]:
    texts: list[str] = []
    for path in track(text_files(folder), "Reading the files"):
        if path.suffix.lower() == LINES:
            texts += _lines(path, split)
        elif split is None or split_of(path.relative_to(folder).as_posix()) == split:
            texts.append(_content(path))
    return texts


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"source={str(path)!r} is not UTF-8 text ({error}); convert it.") from error
    except OSError as error:
        raise DataError(f"source={str(path)!r} could not be read ({error.strerror}); check the file.") from error


def _part(content: str, split: Split | None) -> str:
    if split is None:
        return content
    bounds, index = (0.0, *BOUNDS), SPLITS.index(split)
    return content[int(bounds[index] * len(content)) : int(bounds[index + 1] * len(content))]


def _lines(path: Path, split: Split | None) -> list[str]:
    texts = []
    for number, line in enumerate(_content(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f'{path}, line {number}: not a JSON object with a field "text" ({error}); correct the line.'
            ) from error
        check_text(text, f'{path}, line {number}: "text"')
        if split is None or split_of(text) == split:
            texts.append(text)
    return texts
