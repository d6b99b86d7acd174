"""actkit.sha256: the digest of every file of a saved folder, so that one flipped byte is an error and no other model.

`sha256sum -c actkit.sha256` reads it too. A folder without it (an older one, a hub model) is read unchecked, as is a
file that it does not list; whoever changes a file by hand removes its line.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.progress import track

NAME = "actkit.sha256"
LINE = re.compile(r"([0-9a-f]{64})  ([^\\\r\n]+)")
COPY = "copy the folder again, or save the model again"
THREADS = 4  # hashing releases Python's lock, so several files are read side by side


def write(folder: Path, leave_out: Iterable[str] = ()) -> None:
    """List all files in and below `folder` but those named.

    Args:
        folder: that is complete.
        leave_out: names of files that may be changed.

    Raises:
        CheckpointError: a name that no line can hold.
    """
    hidden = {NAME, *leave_out}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    named = {name: path for name, path in zip(names, paths) if name not in hidden}
    for name in named:
        if not LINE.fullmatch(f"{'0' * 64}  {name}"):
            raise CheckpointError(f"save: {name!r} holds a line break or a backslash; rename that file.")
    lines = [f"{digest}  {name}\n" for name, digest in zip(named, _digests(list(named.values())))]
    (folder / NAME).write_text("".join(lines), encoding="utf-8")


def verify(folder: Path, wanted: Callable[[str], bool] = lambda name: True, advice: str = COPY) -> None:
    """Check the files that are listed in a folder.

    Args:
        folder: a folder without a list is left unchecked.
        wanted: says of a name whether it is checked.
        advice: what to do about a file that differs.

    Raises:
        CheckpointError: a wanted file is missing, or not as it was saved.
    """
    listed = {name: digest for name, digest in _read(folder, advice).items() if wanted(name)}
    for name in listed:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name}: the file is missing; {advice}. If you removed it yourself, remove its line from "
                f"{NAME}."
            )
    for name, digest in zip(listed, _digests([folder / name for name in listed])):
        if digest != listed[name]:
            raise CheckpointError(
                f"{folder / name}: the file is damaged, truncated or was changed since it was saved (its SHA-256 is "
                f"{digest[:12]}..., {NAME} says {listed[name][:12]}...); {advice}. If you changed it yourself, remove "
                f"its line from {NAME}."
            )


def _read(folder: Path, advice: str) -> dict[str, str]:
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable ({error}); {advice}.") from error
    found: dict[str, str] = {}
    for line in text.removesuffix("\n").split("\n"):
        match = LINE.fullmatch(line)
        name = PurePosixPath(match[2]) if match else PurePosixPath("/")
        if match is None or name.is_absolute() or ".." in name.parts or match[2] in found or not text.endswith("\n"):
            raise CheckpointError(
                f"{path}: the line {line[:80]!r} is malformed, so the folder is damaged; {advice}. Without the file "
                f"{NAME} a folder is read unchecked."
            )
        found[match[2]] = match[1]
    return found


def _digests(paths: list[Path]) -> list[str]:
    """SHA-256 of each file. Raises CheckpointError for one that cannot be read."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(track(pool.map(_digest, paths), "Checking the files", len(paths)))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error}); copy the folder again.") from error
