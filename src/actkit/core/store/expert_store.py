"""A file of experts that are read one at a time, each in its own number of bits.

    store = ExpertStore.create(folder, "experts.bin", bits=4)       # streams: no model is ever in memory
    with ExpertStore.open("experts.bin") as store:
        weights = store.load(layer=3, expert=7, dtype=torch.bfloat16)

    page 0     magic, where the index lies, its SHA-256
    page 1 on  the records, each on pages of its own: gate, up and down, in the layout of the kernels or as codes
    at the end the index, JSON: the source model's digests, sizes, and of each record its place, bits, grid and CRC-32

A record is read by `os.preadv` into pages of its own, which are its memory from then on: nothing is mapped, so that the
page cache is not mistaken for memory, nor counted as the process's. If the file system takes it the file is opened with
O_DIRECT and the page cache has no part in it (`reads` is 'direct'); otherwise the cache is asked to drop each record
behind its read ('dropped'), or there is no way to ask ('cached').
In the layout of the kernels ('kernel') what was read is multiplied as it lies; 2 and 3 bits take 4 then, and 5 to 7
take 8. As codes ('codes') each weight takes its bits, and is widened, a part at a time, whenever it is multiplied,
which takes much longer for one token.
The file is complete or not there. Every read checks that the file is as it was when it was opened, and the record's
checksum.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Event
from typing import Any, Literal, Self

import torch
from torch import Tensor

from actkit.core.grids.grid import Grid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import CheckpointError, UnsupportedModelError
from actkit.core.ground.machine import versions
from actkit.core.ground.memory import format_bytes
from actkit.core.ground.progress import track
from actkit.core.ground.whole_file import flush
from actkit.core.layers.kernel_weight import KernelWeight
from actkit.core.layers.weights import DenseWeight, IntegerWeight, WeightStorage, rounded
from actkit.core.model.expert_places import ExpertShape, expert_places
from actkit.core.store.expert_source import PARTS, ExpertSource, router_digests
from actkit.kernels.quantized import Layout, QuantizedWeight

MAGIC = b"ACTKIT-EXPERTS-1"
PAGE = 4096  # what direct reads are aligned to
ALIGNED = 64  # of a tensor in its record
AS_STORED = 16  # bits that stand for 'as it is in the source'
ROWS = IntegerGrid(8, scale_dtype="float16")  # a scale and a zero point for each row
NAMES = ("codes", "buffer", "scale", "zero", "tensor")
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.uint8, torch.float16, torch.bfloat16, torch.float32)}

PIECE = 1 << 20  # bytes that are read at a time, between which a read can be broken off

StoredLayout = Literal["kernel", "codes"]
LAYOUTS = ("kernel", "codes")
Key = tuple[int, int]  # (index of the block, index of the expert)


class Unwanted(Exception):
    """A read was broken off, as nobody wants the expert any more.

    Args:
        done: bytes that were read.
    """

    def __init__(self, done: int) -> None:
        super().__init__(done)
        self.done = done


@dataclass(frozen=True)
class Record:
    """Where an expert lies in the file.

    Attributes:
        offset: of its first page.
        nbytes: whole pages.
        bits: of a weight; 16 for one that is as it was.
        crc32: of the pages.
        parts: 'gate', 'up' and 'down' -> the spec of its grid or None, its shape, and where its tensors lie.
    """

    offset: int
    nbytes: int
    bits: int
    crc32: int
    parts: Mapping[str, Mapping[str, Any]]


class ExpertStore:
    """An open store; use `create` or `open`. It may be read by several threads at once, and is closed by `close`.

    Attributes:
        path: of the file.
        shape: sizes of the mixture.
        records: by (block, expert).
        dtype: of the source, and of experts that are kept as they were.
        source: what is known of the model that it was made from.
        reads: 'direct', 'dropped' or 'cached': what the page cache has to do with it.
    """

    reads: Literal["direct", "dropped", "cached"]

    def __init__(self, path: Path, index: Mapping[str, Any]) -> None:
        self.path = path
        self.source: dict[str, Any] = index["source"]
        self.dtype: torch.dtype = getattr(torch, index["dtype"])
        self.shape = ExpertShape(**{**index["shape"], "layers": tuple(index["shape"]["layers"])})
        self.records = {
            (entry.pop("layer"), entry.pop("expert")): Record(**entry) for entry in map(dict, index["records"])
        }
        self._file, self.reads = _opened(path, next(iter(self.records.values())))
        self._state = _state(self._file)

    # -- making one

    @classmethod
    def create(
        cls,
        folder: str | Path,
        path: str | Path,
        bits: int | Mapping[str, int] = 4,
        *,
        layout: StoredLayout = "kernel",
        grid: IntegerGrid = ROWS,
        overwrite: bool = False,
        progress: bool = True,
    ) -> ExpertStore:
        """Write the experts of a model's folder to a file, one after the other, and open it.

        Args:
            folder: of transformers, a local one; the model does not have to fit into memory.
            path: of the file.
            bits: of all weights, 2 to 8, or 16 for as they are; or by the path of the expert
                ('model.layers.0.mlp.experts.3'), for every one.
            layout: of the records, 'kernel' or 'codes', see above.
            grid: what shares a scale, and how scales are stored; its bits are those of the expert.
            overwrite: replace the file, once the new one is complete.
            progress: show a bar.

        Returns:
            The open store.

        Raises:
            CheckpointError: the folder is not readable, the file exists, or the disk is too small.
            UnsupportedModelError: the model has no plain gated experts.
            ValueError: another layout, or bits that are not allowed, or that do not name every expert.
        """
        path = Path(path)
        if layout not in LAYOUTS:
            raise ValueError(f"layout: {layout!r} was given; choose one of {', '.join(LAYOUTS)}.")
        if path.exists() and not overwrite:
            raise CheckpointError(f"path: {path} exists already; choose another one, or pass overwrite=True.")
        source = ExpertSource(folder)
        widths = _widths(bits, source)
        _check_space(path, source, widths)
        partial = path.parent / f".{path.name}.{os.getpid()}.partial"
        try:
            with partial.open("wb") as file:
                _write(file, source, widths, grid, layout, progress)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            flush(path.parent)
        except OSError as error:
            raise CheckpointError(f"path: {path} could not be written ({error}); choose another place.") from error
        finally:
            partial.unlink(missing_ok=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> ExpertStore:
        """Open a store; of its records nothing is read.

        Args:
            path: of the file.

        Raises:
            CheckpointError: it is no store, truncated, or its index is damaged.
        """
        path = Path(path)
        if not hasattr(os, "pread"):
            raise CheckpointError(f"{path}: stores of experts are read by pread, which Linux and macOS have.")
        return cls(path, _read_index(path))

    # -- reading

    def load(
        self, layer: int, expert: int, dtype: torch.dtype, unwanted: Event | None = None
    ) -> dict[str, WeightStorage]:
        """Read one expert into pages of its own.

        Args:
            layer: index of its block.
            expert: its index there.
            dtype: that its layers compute in.
            unwanted: if it is set meanwhile, the read is broken off.

        Returns:
            How 'gate', 'up' and 'down' are stored; together they take `nbytes` of the record, until all are gone.

        Raises:
            CheckpointError: the file is closed, not readable, damaged, or was changed since it was opened.
            Unwanted: the read was broken off.
        """
        record = self.record(layer, expert)
        if record.bits == AS_STORED:
            self._check_dtype(dtype)
        return _parts(self._read(record, f"expert {expert} of block {layer}", unwanted), record, dtype)

    def record(self, layer: int, expert: int) -> Record:
        """Where an expert lies.

        Args:
            layer: index of its block.
            expert: its index there.

        Raises:
            ValueError: there is no such expert.
        """
        found = self.records.get((layer, expert))
        if found is None:
            raise ValueError(
                f"layer, expert: {layer} and {expert} were given; the store has experts 0 to {self.shape.experts - 1} "
                f"of the blocks {', '.join(map(str, self.shape.layers))}."
            )
        return found

    def _read(self, record: Record, what: str, unwanted: Event | None = None) -> mmap.mmap:
        if self._file < 0:
            raise CheckpointError(f"{self.path}: the store was closed; open it again.")
        if _state(self._file) != self._state:
            raise CheckpointError(
                f"{self.path}: the file was changed while it was open; open the store again, and what reads from it."
            )
        pages = _pages(record.nbytes)
        try:
            read = _fill(self._file, pages, record.offset, unwanted)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {what} is not readable ({error}); make the store again.") from error
        if self.reads == "dropped":
            os.posix_fadvise(self._file, record.offset, record.nbytes, os.POSIX_FADV_DONTNEED)
        if read != record.nbytes or zlib.crc32(pages) != record.crc32:
            raise CheckpointError(f"{self.path}: {what} is damaged (its checksum differs); make the store again.")
        return pages

    def verify(self) -> None:
        """Read every record and check it.

        Raises:
            CheckpointError: naming the first one that is damaged.
        """
        for layer, expert in track(self.records, f"Checking {self.path.name}", len(self.records)):
            self._read(self.records[layer, expert], f"expert {expert} of block {layer}")

    def check_model(self, model: Any) -> None:
        """Refuse a model that the experts are not of: its routers must be those of the source, bit for bit.

        Args:
            model: with its routers in memory.

        Raises:
            CheckpointError: it is another one.
            UnsupportedModelError: it has no experts, or another dtype than experts that are kept as they were.
        """
        places = expert_places(model)
        routers = {place.router: model.get_submodule(place.router) for place in places}
        named = sorted((f"{p}.{n}", x) for p, router in routers.items() for n, x in router.state_dict().items())
        kind = str(next(iter(routers.values())).weight.dtype).removeprefix("torch.")
        if router_digests(named).get(kind) != self.source["routers"].get(kind):
            raise CheckpointError(
                f"store: {self.path} was made from another model ({self.source['model_type']}, from "
                f"{self.source['name']}): its routers are not those of this {type(model).__name__}. Make a store from "
                f"this model's folder."
            )
        if any(record.bits == AS_STORED for record in self.records.values()):
            self._check_dtype(next(model.parameters()).dtype)

    def _check_dtype(self, dtype: torch.dtype) -> None:
        if dtype != self.dtype:
            raise UnsupportedModelError(
                f"dtype: {self.path} keeps experts as they were, in {self.dtype}, and {dtype} was asked for; load the "
                f"model in {self.dtype}, or make a store with fewer bits."
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(record.nbytes for record in self.records.values())

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest record."""
        return max(record.nbytes for record in self.records.values())

    def describe(self) -> str:
        """Say what it holds: '48 experts of 6 blocks, 6.3 MB: 20 in 8 bits, 28 in 4 bits; read directly'."""
        counts: dict[int, int] = {}
        for record in self.records.values():
            counts[record.bits] = counts.get(record.bits, 0) + 1
        widths = ", ".join(
            f"{count} {'as they were' if bits == AS_STORED else f'in {bits} bits'}"
            for bits, count in sorted(counts.items(), reverse=True)
        )
        how = {
            "direct": "read directly",
            "dropped": "dropped from the page cache",
            "cached": "through the page cache",
        }
        return (
            f"{len(self.records)} experts of {len(self.shape.layers)} blocks, {format_bytes(self.nbytes)}: {widths}; "
            f"{how[self.reads]}"
        )

    def close(self) -> None:
        """Close the file; what was loaded stays. More than once is fine."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()


# -- writing -----------------------------------------------------------------------------------------------------------


def _widths(bits: int | Mapping[str, int], source: ExpertSource) -> dict[Key, int]:
    """The bits of each expert, checked."""
    paths = {f"{place.path}.{e}": (place.layer, e) for place in source.places for e in range(source.shape.experts)}
    given = dict.fromkeys(paths, bits) if isinstance(bits, int) else dict(bits)
    if set(given) != set(paths):
        unknown, lacking = sorted(set(given) - set(paths)), sorted(set(paths) - set(given))
        raise ValueError(
            f"bits: {', '.join(unknown[:3]) or 'nothing'} is unknown, {', '.join(lacking[:3]) or 'nothing'} is "
            f"missing; give one number, or one for each of the {len(paths)} experts, such as {next(iter(paths))}."
        )
    wrong = {name: width for name, width in given.items() if width not in (*range(2, 9), AS_STORED)}
    if wrong:
        name, width = next(iter(wrong.items()))
        raise ValueError(f"bits: {name} has {width}; give 2 to 8, or {AS_STORED} for as it is.")
    return {paths[name]: width for name, width in given.items()}


def _check_space(path: Path, source: ExpertSource, widths: Mapping[Key, int]) -> None:
    weights = 3 * source.shape.hidden * source.shape.intermediate
    needed = sum(weights * width // 8 + PAGE for width in widths.values())
    free = shutil.disk_usage(path.resolve().parent).free if path.resolve().parent.is_dir() else 0
    if needed > free:
        raise CheckpointError(
            f"path: {path} needs some {format_bytes(needed)}, and {format_bytes(free)} are free there; choose fewer "
            f"bits, or an existing folder of a larger disk."
        )


def _write(
    file: Any,
    source: ExpertSource,
    widths: Mapping[Key, int],
    grid: IntegerGrid,
    layout: StoredLayout,
    progress: bool,
) -> None:
    digest = hashlib.sha256()
    records, at = [], PAGE
    file.write(bytes(PAGE))
    for (layer, expert), bits in track(widths.items(), "Storing the experts", len(widths), enabled=progress):
        content, parts = bytearray(), {}
        for part, matrix in source.expert(layer, expert).items():
            digest.update(matrix.view(torch.uint8).numpy())  # type: ignore[arg-type]
            weight = DenseWeight(matrix) if bits == AS_STORED else rounded(matrix, replace(grid, bits=bits))
            parts[part] = _put(content, weight, layout)
        content += bytes(-len(content) % PAGE)
        file.write(content)
        place = {"offset": at, "nbytes": len(content), "bits": bits, "crc32": zlib.crc32(content), "parts": parts}
        records.append({"layer": layer, "expert": expert, **place})
        at += len(content)
    named = {"name": source.folder.resolve().name, "model_type": source.model_type}
    index = {
        "source": {**named, "digest": digest.hexdigest(), "routers": source.routers()},
        "dtype": str(source.dtype).removeprefix("torch."),
        "shape": vars(source.shape),
        "records": records,
        "versions": versions(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(index).encode()
    file.write(text)
    file.seek(0)
    file.write(MAGIC + at.to_bytes(8, "little") + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest())


def _put(content: bytearray, weight: WeightStorage, layout: StoredLayout) -> dict[str, Any]:
    """Append the tensors of a weight; returns what finds them again."""
    tensors = {}
    packed = weight.packed(False) if layout == "kernel" else None
    for name in NAMES:
        tensor = getattr(weight if packed is None else packed, name, None)
        if tensor is not None:
            content += bytes(-len(content) % ALIGNED)
            kind = str(tensor.dtype).removeprefix("torch.")
            tensors[name] = [len(content), kind, list(tensor.shape)]
            content += tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    grid = weight.grid.spec() if isinstance(weight, IntegerWeight) else None
    order = list(packed.layout) if isinstance(packed, QuantizedWeight) else None
    return {"grid": grid, "shape": list(weight.shape), "kernel": order, "tensors": tensors}


# -- reading -----------------------------------------------------------------------------------------------------------


def _read_index(path: Path) -> Mapping[str, Any]:
    damaged = "it is damaged or truncated; make the store again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(len(MAGIC) + 48)
            if not head.startswith(MAGIC):
                raise CheckpointError(f"{path}: it is no store of experts; make one with ExpertStore.create.")
            at, length = (int.from_bytes(head[i : i + 8], "little") for i in (len(MAGIC), len(MAGIC) + 8))
            if at + length != size:
                raise CheckpointError(f"{path}: it has {size} bytes, and should have {at + length}; {damaged}.")
            file.seek(at)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error}); give the file of a store.") from error
    if hashlib.sha256(text).digest() != head[len(MAGIC) + 16 :]:
        raise CheckpointError(f"{path}: its index is not what was written; {damaged}.")
    index: Mapping[str, Any] = json.loads(text)
    return index


def _opened(path: Path, record: Record) -> tuple[int, Literal["direct", "dropped", "cached"]]:
    """Open the file, past the page cache if the file system can do that (tried on one record)."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            file = os.open(path, os.O_RDONLY | direct)
        except OSError:
            file = -1
        if file >= 0:
            try:
                if _fill(file, _pages(PAGE), record.offset) == PAGE:
                    return file, "direct"
            except OSError:
                pass
            os.close(file)
    return os.open(path, os.O_RDONLY), "dropped" if hasattr(os, "posix_fadvise") else "cached"


def _state(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_mtime_ns, found.st_size


def _pages(size: int) -> mmap.mmap:
    """Pages of their own, given back when nothing refers to them; they lie as direct reads want them."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # neighbours would share huge ones, which stay whole until both are gone
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages


def _fill(file: int, pages: mmap.mmap, offset: int, unwanted: Event | None = None) -> int:
    """Read whole pages; one call may give less than was asked. It holds no lock of Python's."""
    view, done = memoryview(pages), 0
    while done < len(view):
        if unwanted is not None and unwanted.is_set():
            raise Unwanted(done)
        count = _read_into(file, view[done : done + PIECE], offset + done)
        if not count:
            break
        done += count
    return done


def _read_into(file: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [view], offset)
    found = os.pread(file, len(view), offset)
    view[: len(found)] = found
    return len(found)


def _parts(pages: mmap.mmap, record: Record, dtype: torch.dtype) -> dict[str, WeightStorage]:
    found: dict[str, WeightStorage] = {}
    for part in PARTS:
        entry = record.parts[part]
        tensors = dict(_tensors(pages, entry["tensors"]))
        if entry["grid"] is None:
            found[part] = DenseWeight(tensors["tensor"])
            continue
        grid = Grid.from_spec(entry["grid"])
        rows, columns = entry["shape"]
        if entry["kernel"] is not None:
            order = Layout(*entry["kernel"])
            packed = QuantizedWeight(tensors["buffer"], tensors.get("scale"), tensors.get("zero"), order)
            found[part] = KernelWeight(packed, grid, dtype)
            continue
        codes, scale, zero = tensors["codes"], tensors["scale"], tensors.get("zero")
        found[part] = IntegerWeight(grid, (rows, columns), codes, scale, zero, dtype)
    return found


def _tensors(pages: mmap.mmap, entries: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Views of the pages, which they keep."""
    for name, (offset, kind, shape) in entries.items():
        dtype = DTYPES[kind]
        values = torch.frombuffer(pages, dtype=torch.uint8, count=prod(shape) * dtype.itemsize, offset=offset)
        yield name, values.view(dtype).reshape(shape)
