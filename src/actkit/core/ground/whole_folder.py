"""A folder that is complete or not there: what a killed or failed process wrote is never taken for the whole.

It is written under a hidden name beside its place and renamed at the end; what a killed process leaves is removed by
the next one that writes there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.whole_file import flush


@contextmanager
def complete_or_nothing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` if nothing goes wrong, and leaves no trace otherwise.

    Args:
        folder: that is to be written; one that is there is replaced at the end.

    Raises:
        CheckpointError: the disk does not take it.
    """
    folder = folder.resolve()  # of a link, the folder that it points to is replaced
    temporary = _hidden(folder)
    previous = previous_of(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        if folder.exists():
            _remove(previous, folder)
            folder.rename(previous)
        temporary.rename(folder)
        flush(folder.parent)
        _remove(previous, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"save: {folder} could not be written ({error}); nothing was changed there. Free some space or choose "
            f"another folder, then save again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(folder)


def discard(folder: Path) -> None:
    """Remove a folder as one step: it is there whole, or not at all.

    What a kill leaves is hidden, and removed by the next save or `discard` there.

    Args:
        folder: to remove; nothing happens if it is not there.
    """
    folder = folder.resolve()
    if folder.parent.is_dir():
        _remove(folder, folder)
        _sweep(folder)


def _remove(path: Path, folder: Path) -> None:
    if path.exists():
        shutil.rmtree(path.rename(_hidden(folder)), ignore_errors=True)


def _hidden(folder: Path) -> Path:
    """A new name beside `folder`, which says whose it is and which process works there."""
    return folder.parent / f".{folder.name}.saving-{os.getpid()}-{uuid4().hex[:8]}"


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed left beside `folder`."""
    marker = f".{folder.name}.saving-"
    for stale in folder.parent.iterdir():
        if stale.name.startswith(marker) and not _alive(stale.name.removeprefix(marker).partition("-")[0]):
            shutil.rmtree(stale, ignore_errors=True)


def previous_of(folder: Path) -> Path:
    """Where the old folder stands between the two renames of a save."""
    return folder.parent / f".{folder.name}.previous"


def recover(folder: Path) -> None:
    """Put the old folder back if a save was killed between its two renames."""
    folder = folder.resolve()  # a link's target, as in `complete_or_nothing`
    if not folder.exists() and previous_of(folder).is_dir():
        previous_of(folder).rename(folder)


def _alive(pid: str) -> bool:
    """Whether the process runs, whose number a temporary folder's name holds; a name of another kind is left alone."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        return True
    return True
