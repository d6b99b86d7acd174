"""The checkpoint of a GGUF file, converted once into the user's cache folder and found there from then on.

A folder is named by the digest of the file and the dtype, so that another file is another folder, whatever it is
called. It is written whole or not at all, by one process at a time; deleting it costs the conversion again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch

from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.progress import track
from actkit.core.ground.user_cache import VARIABLE, cache_folder
from actkit.core.ground.whole_folder import complete_or_nothing
from actkit.core.store import checksums
from actkit.core.store.checkpoint import GRID, write_grid
from actkit.gguf.convert import convert
from actkit.gguf.file import GgufFile

VERSION = 1  # of the conversion: raise it when the same file is to give another folder
CHUNK = 2**24  # bytes


def cached(
    parts: Sequence[Path],
    dtype: torch.dtype | None = None,
    *,
    digest: str | None = None,
    before: Callable[[], None] = lambda: None,
) -> Path:
    """Return the folder of a plain checkpoint with the content of a GGUF file.

    Args:
        parts: the file, or the pieces that it was cut into byte by byte, in order.
        dtype: of the weights; None for bfloat16 for a quantized file and as stored for another.
        digest: the SHA-256 that the file must have.
        before: called before the file is converted, and not if its checkpoint is there already.

    Returns:
        The folder, in the user's cache.

    Raises:
        CheckpointError: the digest is another, the cache folder cannot be written, or what `convert` raises.
    """
    found = _digest(parts)
    if digest is not None and found != digest:
        raise CheckpointError(
            f"{parts[0]}: the file is damaged (its SHA-256 is {found[:12]}..., it should be {digest[:12]}...); install "
            f"its package again."
        )
    dtype = dtype or (stored_dtype(parts[0]) if len(parts) == 1 else torch.bfloat16)
    home = cache_folder() / "gguf"
    name = f"{found[:24]}-v{VERSION}-{str(dtype).removeprefix('torch.')}"
    folder = home / name
    if (folder / checksums.NAME).exists():
        return folder
    from filelock import FileLock

    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home / f".{name}.lock")
        lock.acquire()
    except OSError as error:
        raise CheckpointError(
            f"{home}: the cache folder cannot be written ({error}); set {VARIABLE} to a folder that can."
        ) from error
    try:
        if not (folder / checksums.NAME).exists():
            before()
            _write(parts, folder, dtype)
    finally:
        lock.release()
    return folder


def _write(parts: Sequence[Path], folder: Path, dtype: torch.dtype) -> None:
    with complete_or_nothing(folder) as temporary:
        if len(parts) == 1:
            _convert(parts[0], temporary, dtype)
        else:
            with NamedTemporaryFile(dir=folder.parent, prefix=f".{folder.name}.", suffix=".gguf") as whole:
                for part in parts:
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, whole, CHUNK)
                whole.flush()
                _convert(Path(whole.name), temporary, dtype)
        checksums.write(temporary)


def _convert(path: Path, folder: Path, dtype: torch.dtype) -> None:
    grid = convert(path, folder, dtype)
    if grid.layers:
        write_grid(folder / GRID, grid)


def stored_dtype(path: Path) -> torch.dtype:
    """bfloat16 for a quantized file, else the type that most of its values have."""
    sizes: dict[str, int] = {}
    for entry in GgufFile(path).tensors.values():
        sizes[entry.kind] = sizes.get(entry.kind, 0) + entry.size
    main = max(sizes, key=lambda kind: sizes[kind], default="BF16")
    return {"F32": torch.float32, "F16": torch.float16}.get(main, torch.bfloat16)


def gguf_file(source: str | Path) -> Path | None:
    """Return the GGUF file that a source means: the file itself, or the single one in a folder without other weights.

    Args:
        source: a file or a folder.

    Returns:
        The file; None if the source means none.

    Raises:
        CheckpointError: the folder holds several.
    """
    path = Path(source)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) > 1:
        raise CheckpointError(
            f"{path}: it holds {len(files)} GGUF files ({', '.join(file.name for file in files[:4])}); give one of "
            f"them by its path."
        )
    return files[0] if files else None


def _digest(parts: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for part in parts:
        try:
            with part.open("rb") as file:
                count = -(-part.stat().st_size // CHUNK)
                for _ in track(range(count), f"Checking {part.name}", count):
                    found.update(file.read(CHUNK))
        except OSError as error:
            raise CheckpointError(f"{part}: not readable ({error}); download or copy the file again.") from error
    return found.hexdigest()
