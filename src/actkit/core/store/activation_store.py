"""Activations on disk: written shard by shard as a model runs, and read back without it.

    store = harvest(model, "blocks.15.block.output", batches, "acts")      # the same call goes on after a kill
    for batch in store.batches("blocks.15.block.output", 4096, seed=0):     # shuffled, [4096, channels]
    record(model, {"block.output": Moments()}, store=store)                 # any statistic, without a forward pass

A folder holds `store.json` (which model, data and sites, and which sequences are in which shard), and for each shard a
safetensors file with the rows of each site [rows, channels], in the model's own dtype, and their keys (document,
sequence, position, place, token id; once for sites with the same rows), beside a JSON file with its size and SHA-256. A
shard counts as there once that second file is; both come by a rename, so that no half of one is ever read. The order of
rows, and what is in which shard, follow from the data alone, not from the batch size, so that a run may go on with
another one. Passes end at the last site if the first pass read each of them once. Several processes
(`core.ground.processes.together`) write shards of their own. Files are mapped when they are read: what is held in
memory is what is asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from os import getpid
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from actkit.core.forward.batch import LABELS, BatchContext, forward, reads_beyond, sequence_of
from actkit.core.forward.hooks import StopForward, evaluating, refuse_compiled_or_sharded
from actkit.core.forward.limits import is_encoder_decoder
from actkit.core.ground import processes
from actkit.core.ground.errors import CheckpointError, DataError
from actkit.core.ground.fingerprint import fingerprint, model_fingerprint
from actkit.core.ground.memory import format_bytes, parse_bytes
from actkit.core.ground.progress import track
from actkit.core.ground.whole_file import flush, write_whole
from actkit.core.model.anatomy import Anatomy
from actkit.core.model.sites import Site
from actkit.core.store.shuffled import Shuffle
from actkit.core.watch.capture import contexts_of, experts_for, observe, resolve, view_of
from actkit.core.watch.streaming import Rows, Statistic, in_order

INDEX, VERSION = "store.json", 1
SHARD_ROWS = 1 << 15  # tokens of a shard; 38 MB of 576 channels in bf16
KEYS = ("documents", "sequences", "positions", "places", "token_ids")
KEY_BYTES = 8 * len(KEYS)
AT_TOKENS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")  # what has one value for each token


class Kept(Statistic):
    """The rows of a site as they come, in memory: the writer's part of a shard."""

    _in_chunks = False

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Rows]] = []
        self.last = 0.0  # when rows came

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        return {}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        if rows is None:
            raise ValueError("rows: a store keeps which tokens its rows are; pass Rows(documents, positions).")
        self.parts.append((x.to("cpu", copy=True), rows))  # the model may change it in place
        self.last = time.perf_counter()

    def _merge(self, other: Self) -> None:
        self.parts += other.parts

    @classmethod
    def joined(cls, others: Iterable[Kept]) -> Self:
        """The rows of several, in their order, whether each has any or not."""
        found = cls()
        for other in others:
            found.parts, found.count = [*found.parts, *other.parts], found.count + other.count
        return found

    def sorted(self, start: int, end: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The rows of sequences from `start` to before `end` with their keys, by sequence and position."""
        x = torch.cat([part for part, _ in self.parts])
        keys = {name: torch.cat([getattr(rows, name).cpu() for _, rows in self.parts]) for name in KEYS}
        order = in_order(keys["sequences"], keys["positions"])
        if not torch.equal(order, torch.arange(len(order))):  # as they come, mostly: no copy
            x, keys = x[order], {name: key[order] for name, key in keys.items()}
        first, behind = torch.searchsorted(keys["sequences"], torch.tensor([start, end])).tolist()
        return x[first:behind], {name: key[first:behind] for name, key in keys.items()}


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One file of a store.

    Attributes:
        path: of the safetensors file.
        rows: of each site; a site that no token of it reached is not named.
        groups: of each site, which keys are those of its rows.
        digest: SHA-256 of the file.
        size: bytes.
    """

    path: Path
    rows: Mapping[str, int]
    groups: Mapping[str, int]
    digest: str
    size: int

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """What the file holds, mapped."""
        try:
            if self.path.stat().st_size != self.size:
                raise CheckpointError(
                    f"{self.path}: it has {self.path.stat().st_size} bytes, not {self.size}, so that the store is "
                    f"damaged; remove the shard and its .json, and harvest again, which makes it anew."
                )
            with safe_open(self.path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path}: not readable ({error}); remove the shard and its .json, and harvest again."
            ) from error

    def keys(self, site: str) -> Rows:
        """Which tokens the rows of a site are.

        Args:
            site: that has rows here.
        """
        found = {name: self.tensors[f"keys.{self.groups[site]}.{name}"] for name in KEYS}
        return Rows(**found)


@dataclass(frozen=True)
class ActivationStore:
    """Activations of a model that were written to a folder.

    Attributes:
        folder: where.
        sites: whose activations are there, with the name under which their rows are kept (sites may be one tensor).
        shards: in the order of the data.
        model: the fingerprint of the model.
    """

    folder: Path
    sites: Mapping[str, str]
    shards: tuple[Shard, ...] = field(repr=False)
    model: str = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a store that is complete; the files are mapped when they are read.

        Args:
            folder: that `harvest` wrote.

        Raises:
            CheckpointError: it is no store, some of its shards are missing, or a file is damaged.
        """
        folder = Path(folder)
        index = _read_index(folder)
        shards = [_shard(folder, number) for number in range(len(index["shards"]))]
        missing = sum(shard is None for shard in shards)
        if missing:
            raise CheckpointError(
                f"{folder}: {missing} of {len(shards)} shards are not written yet; run the same harvest again, which "
                f"goes on with them."
            )
        return cls(folder, index["sites"], tuple(shard for shard in shards if shard is not None), index["model"])

    def verify(self) -> None:
        """Compare every file with its SHA-256.

        Raises:
            CheckpointError: one was changed or damaged.
        """
        for shard in track(self.shards, "Checking the store", len(self.shards)):
            with shard.path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.digest:
                    raise CheckpointError(
                        f"{shard.path}: the file is not as it was written; remove the shard and its .json, and harvest "
                        f"again, which makes it anew."
                    )

    def check(self, model: nn.Module) -> None:
        """Refuse another model.

        Args:
            model: that the activations should be of.

        Raises:
            CheckpointError: they are of another one.
        """
        if model_fingerprint(model) != self.model:
            raise CheckpointError(
                f"store: {self.folder} holds the activations of another model, or of this one before it was changed; "
                f"harvest those of this model into another folder."
            )

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.size for shard in self.shards)

    def count(self, site: Site | str) -> int:
        """How many rows a site has.

        Args:
            site: one of `sites`.
        """
        name = self._name(site)
        return sum(shard.rows.get(name, 0) for shard in self.shards)

    def read(self, site: Site | str) -> Iterator[tuple[Tensor, Rows]]:
        """The rows of a site in the order of the data, a shard at a time.

        Args:
            site: one of `sites`.

        Yields:
            Rows [n, channels], and which tokens they are.

        Raises:
            ValueError: the site is not in the store.
        """
        name = self._name(site)
        for shard in self.shards:
            if shard.rows.get(name):
                yield shard.tensors[f"rows.{name}"], shard.keys(name)

    def batches(self, site: Site | str, size: int, *, seed: int = 0, rows: Tensor | None = None) -> StoredBatches:
        """The rows of a site in a random order, in batches by their index.

        Args:
            site: one of `sites`.
            size: rows of a batch; rows that fill no batch are left out.
            seed: of the order.
            rows: int64 [n], numbers of rows in the order of the data; None for all.

        Returns:
            A sequence of tensors [size, channels]; batch i is the same in whatever order batches are taken.

        Raises:
            ValueError: the site is not in the store, or has fewer rows than one batch.
        """
        count = self.count(site) if rows is None else len(rows)
        if not 1 <= size <= count:
            raise ValueError(f"size: {size} was given; {site} has {count} rows, give 1 to {count}.")
        return StoredBatches(self, self._name(site), size, Shuffle(count, seed), rows)

    def numbers(self, site: Site | str, *, skip: int = 0, longest: float = math.inf) -> Tensor:
        """Which rows of a site count.

        Args:
            site: one of `sites`.
            skip: leave out so many first tokens of each sequence.
            longest: leave out rows whose norm is more than so many times the median of the others; inf for none.

        Returns:
            Numbers of rows in the order of the data, int64.

        Raises:
            ValueError: the site is not in the store, or a setting is out of bounds.
        """
        if skip < 0 or not longest > 1:
            raise ValueError(f"skip, longest: {skip} and {longest} were given; give 0 or more, and more than 1.")
        places, norms = [], []
        for x, keys in self.read(site):
            places.append(keys.places)
            if longest < math.inf:
                norms.append(torch.linalg.vector_norm(x, dim=1, dtype=torch.float32))
        numbers = (torch.cat(places) >= skip).nonzero()[:, 0]
        if norms and len(numbers):
            found = torch.cat(norms)[numbers]
            numbers = numbers[found <= longest * found.median()]
        return numbers

    def split(
        self, site: Site | str, share: float, *, skip: int = 0, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Which rows of a site to learn from and which to measure on: no document is in both.

        Args:
            site: one of `sites`.
            share: of the rows that are measured on, at the end of the data.
            skip: leave out so many first tokens of each sequence.
            rows: those to split, as `numbers` gives them; None for all that `skip` leaves.

        Returns:
            Numbers of rows, int64, for learning and for measuring.

        Raises:
            ValueError: the site is not in the store, or one of the two would be empty.
        """
        if not 0 < share < 1 or skip < 0:
            raise ValueError(f"share, skip: {share} and {skip} were given; give a share in (0, 1), and 0 or more.")
        numbers = self.numbers(site, skip=skip) if rows is None else rows
        keys = [keys for _, keys in self.read(site)]
        owners = torch.cat([each.documents for each in keys])[numbers]
        if len(owners.unique()) < 2:  # one long text
            owners = torch.cat([each.sequences for each in keys])[numbers]
        first = int(len(numbers) * (1 - share))
        learned = ~torch.isin(owners, owners[first:])
        if not bool(learned.any()) or first == len(numbers):
            raise ValueError(
                f"share, skip: of {len(numbers)} rows of {site} whose tokens count, none would be left to learn from "
                f"or to measure on; harvest more documents, or change share={share} and skip={skip}."
            )
        return numbers[learned], numbers[first:]

    def take(self, site: Site | str, index: Tensor) -> Tensor:
        """Rows of a site by their numbers in the order of the data.

        Args:
            site: one of `sites`.
            index: int64 [n].

        Returns:
            [n, channels].
        """
        name = self._name(site)
        ends = torch.tensor([shard.rows.get(name, 0) for shard in self.shards]).cumsum(0)
        where = torch.searchsorted(ends, index, right=True)
        found: Tensor | None = None
        for number in where.unique().tolist():
            rows = self.shards[number].tensors[f"rows.{name}"]
            chosen = where == number
            part = rows[index[chosen] - (int(ends[number - 1]) if number else 0)]
            if found is None:
                found = part.new_empty(len(index), part.shape[1])
            found[chosen] = part
        if found is None:
            raise ValueError("index: it is empty; give at least one row.")
        return found

    def context(self, site: Site | str, row: int, before: int = 8, after: int = 8) -> tuple[list[int], int]:
        """The tokens around a row, of its own sequence.

        Args:
            site: one of `sites`.
            row: its number in the order of the data.
            before: tokens before it at most.
            after: tokens behind it at most.

        Returns:
            Token ids, and the place of the row's own among them.

        Raises:
            ValueError: there is no such row.
        """
        start = 0
        for shard in self.shards:
            size = shard.rows.get(self._name(site), 0)
            if start <= row < start + size:
                keys, at = shard.keys(self._name(site)), row - start  # a sequence lies in one shard
                window = range(max(0, at - before), min(size, at + after + 1))
                mine = [each for each in window if keys.sequences[each] == keys.sequences[at]]
                return keys.token_ids[mine].tolist(), mine.index(at)
            start += size
        raise ValueError(f"row: {row} was given; {site} has {start} rows, give 0 to {start - 1}.")

    def _name(self, site: Site | str) -> str:
        if str(site) not in self.sites:
            raise ValueError(f"site: {site} is not in the store {self.folder}; it holds {', '.join(self.sites)}.")
        return self.sites[str(site)]


class StoredBatches(Sequence[Tensor]):
    """Batches of a store in a random order that takes no memory; index by index, so that a training can go on.

    Args:
        store: that they are read from.
        site: under which name the rows are kept.
        size: rows of a batch.
        order: of the rows.
        rows: which ones, by their numbers; None for all.
    """

    def __init__(
        self, store: ActivationStore, site: str, size: int, order: Shuffle, rows: Tensor | None = None
    ) -> None:
        self.store, self.site, self.size, self.order, self.rows = store, site, size, order, rows

    @cached_property
    def fingerprint(self) -> str:
        """By which a training that goes on knows its data."""
        shards = [shard.digest for shard in self.store.shards]
        return fingerprint([shards, self.site, self.size, self.order.seed, self.rows])

    def __len__(self) -> int:
        return len(self.order) // self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch: {index} was given, there are {len(self)}.")
        start = index % len(self) * self.size
        chosen = self.order(torch.arange(start, start + self.size))
        return self.store.take(self.site, chosen if self.rows is None else self.rows[chosen])


# -- writing -----------------------------------------------------------------------------------------------------------


def harvest(
    model: nn.Module,
    sites: Iterable[Site | str] | Site | str,
    batches: Iterable[Any],
    out: str | Path,
    *,
    shard_rows: int = SHARD_ROWS,
    max_disk: int | str | None = None,
    anatomy: Anatomy | None = None,
    progress: bool = True,
    announce: Callable[[str], None] | None = None,
) -> ActivationStore:
    """Write the activations of sites to a folder; the same call goes on where one was killed.

    Args:
        model: neither compiled nor sharded; run in evaluation mode without gradients.
        sites: as the keys of `record`: sites, bare names, patterns.
        batches: dicts of the model's keywords, or tensors.
        out: the folder.
        shard_rows: tokens from which a shard is closed.
        max_disk: cap for the folder, bytes or '2GB'.
        anatomy: of the model, if it was read before.
        progress: show a bar.
        announce: called with a line that says bytes and seconds, before anything is written.

    Returns:
        The store, complete.

    Raises:
        ValueError: a site is unknown, or a setting is out of bounds.
        DataError: the data cannot be used.
        CheckpointError: the folder holds something else, or a store of another model, data or sites; the disk is too
            full, or `max_disk` too small.
        NonFiniteError: a site holds NaN or Inf.
        UnsupportedModelError: the model is compiled or sharded.
    """
    refuse_compiled_or_sharded(model)
    if shard_rows < 1:
        raise ValueError(f"shard_rows: {shard_rows} was given; give at least 1 token.")
    batches, folder = sequence_of(batches), Path(out)
    if not len(batches):
        raise DataError("batches: 0 were given; pass at least one dict of the model's keywords.")
    documents = getattr(batches, "document_ids", None)
    given = list(contexts_of(model, batches, documents, reads_beyond(batches)))
    view = view_of(model, anatomy, batches[0])
    wanted = dict.fromkeys([sites] if isinstance(sites, Site | str) else sites, Kept())
    with experts_for(view, wanted):
        found = resolve(view, wanted)
        if any(not isinstance(site, Site) for site in found):
            raise ValueError("sites: two joined sites were given; a store keeps the rows of single ones.")
        started = time.perf_counter()
        first, once = _run(view, found, given[:1])
        ended = max(kept.last for kept in first.values()) if once else time.perf_counter()
        seconds = (ended - started) * sum(c.tokens for _, c in given) / given[0][1].tokens
        names = _names(first)
        tokens = torch.cat([context.tokens_per_row for _, context in given]).tolist()
        shards = _plan(tokens, shard_rows)
        index: dict[str, Any] = {
            "actkit": VERSION,
            "model": model_fingerprint(model),
            "data": _data_fingerprint(model, given),
            "sites": names,
            "shards": [list(each) for each in shards],
        }
        if processes.several():
            processes.agree(model=index["model"], data=index["data"])
        processes.on_first("the store", lambda: _begin(folder, index))
        todo = [number for number in range(len(shards)) if _shard(folder, number) is None]
        share = sum(sum(tokens[slice(*shards[number])]) for number in todo) / given[0][1].tokens
        size = sum(_bytes(kept) for kept in {id(each): each for each in first.values()}.values()) * share
        _check_disk(folder, size, max_disk)
        if announce is not None and todo:
            announce(f"{format_bytes(size)} in {len(todo)} shards, about {seconds * len(todo) / len(shards):.0f} s")
        mine = [number for number in todo if processes.mine(number)]
        held = {0: first}  # by number: batches that were read already
        ends = list(accumulate(context.batch_size for _, context in given))
        for number in track(mine, "Harvesting activations", len(mine), progress):
            start, end = shards[number]
            one, last = bisect_right(ends, start), bisect_left(ends, end)  # a batch may have sequences of two shards
            if ends[last] > end and last not in held:
                held[last] = _run(view, found, [given[last]], once)[0]
            between = [given[at] for at in range(one, last + 1) if at not in held]
            parts = [held.get(one), _run(view, found, between, once)[0], held.get(last) if last > one else None]
            kept = {site: Kept.joined(part[site] for part in parts if part) for site in set(names.values())}
            _write(folder, number, kept, names, start, end)
            held = {last: held[last]} if ends[last] > end else {}
    processes.on_first("the shards", lambda: None)  # all are there before anyone reads
    return ActivationStore.open(folder)


def _run(
    view: Anatomy, sites: Mapping[Any, Any], given: Sequence[Any], once: Collection[str] = ()
) -> tuple[dict[str, Kept], frozenset[str]]:
    """The rows of some batches, whose passes end early if `once` says so, and what to say for passes like the last."""
    with evaluating(view.model), observe(view, sites) as observer:
        for batch, context in given:
            observer.begin(context, once=once)
            with suppress(StopForward):
                forward(view.model, batch)
    kept = {str(site): each[0] if isinstance(each, list) else each for site, each in observer.statistics.items()}
    return kept, observer.once


def _names(first: Mapping[str, Kept]) -> dict[str, str]:
    """Under which name the rows of each site are kept: sites that are one tensor share them."""
    owners: dict[int, str] = {}
    return {site: owners.setdefault(id(kept), site) for site, kept in first.items()}


def _data_fingerprint(model: nn.Module, given: Sequence[tuple[Any, BatchContext]]) -> str:
    """Of what the model is given, sequence by sequence: neither the batch size nor what stands at padding counts."""
    at_tokens = AT_TOKENS if is_encoder_decoder(model) else (*AT_TOKENS, LABELS)
    lengths: list[int] = []
    tokens: dict[str, list[Tensor]] = {"columns": [], "documents": []}  # columns say where padding stands
    others: dict[str, list[Any]] = {}  # by sequence
    for batch, context in given:
        size, length = context.batch_size, context.length or 1
        real = torch.ones(size, length, dtype=torch.bool) if context.mask is None else context.mask.cpu()
        lengths += real.sum(1).tolist()
        tokens["columns"].append(real.nonzero()[:, 1])
        tokens["documents"].append(context.documents.reshape(size, -1).expand(real.shape)[real])
        items = batch if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, tuple) else [batch]))
        for key, value in items.items():
            if key == "attention_mask" and context.mask is not None:
                continue
            if not isinstance(value, Tensor) or value.shape[:1] != (size,):
                others.setdefault(str(key), []).extend([value] * size)
            elif key in at_tokens and value.shape[:2] == real.shape:
                tokens.setdefault(f"given {key}", []).append(value.cpu()[real])
            else:
                others.setdefault(str(key), []).extend(value)
    return fingerprint([lengths, {key: torch.cat(parts) for key, parts in tokens.items()}, others])


def _plan(tokens: Sequence[int], shard_rows: int) -> list[tuple[int, int]]:
    """Which sequences go into each shard: (first, behind the last)."""
    shards, start, held = [], 0, 0
    for number, count in enumerate(tokens, 1):
        held += count
        if held >= shard_rows or number == len(tokens):
            shards.append((start, number))
            start, held = number, 0
    return shards


def _bytes(kept: Kept) -> int:
    return sum(x.nbytes + KEY_BYTES * len(x) for x, _ in kept.parts)


def _check_disk(folder: Path, size: float, max_disk: int | str | None) -> None:
    there = sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors")
    if max_disk is not None and there + size > parse_bytes(max_disk):
        raise CheckpointError(
            f"max_disk: the store takes {format_bytes(there + size)}, {max_disk} was given; keep fewer sites or "
            f"tokens, or raise it. {format_bytes(there)} are written."
        )
    free = shutil.disk_usage(folder).free
    if size > free:
        raise CheckpointError(
            f"store: {folder} needs {format_bytes(size)} more, {format_bytes(free)} are free there; free some space, "
            f"or keep fewer sites or tokens."
        )


def _begin(folder: Path, index: Mapping[str, Any]) -> None:
    """Make the folder, or go on with the one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in (f".{INDEX}.*.partial", ".shard-*.partial"):  # of a run that was killed
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not any(folder.iterdir()):
        write_whole(folder / INDEX, json.dumps(index, indent=1))
        return
    before = _read_index(folder)
    others = {"model": "another model", "data": "other data", "sites": "other sites", "shards": "another shard_rows"}
    for key, other in others.items():
        if before[key] != index[key]:
            raise CheckpointError(
                f"store: {folder} was begun with {other}; give the same, or another folder. Where padding stands "
                f"counts as data, the batch size does not."
            )


def _write(
    folder: Path, number: int, found: Mapping[str, Kept], names: Mapping[str, str], start: int, end: int
) -> None:
    """Write a shard of sequences from `start` to before `end`: its rows, then the file that says that it is there."""
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Tensor]] = []
    about: dict[str, dict[str, int]] = {"rows": {}, "groups": {}}
    for site in dict.fromkeys(names.values()):
        if not found[site].count:
            continue
        x, keys = found[site].sorted(start, end)
        if not len(x):
            continue
        same = (at for at, each in enumerate(groups) if all(torch.equal(each[name], keys[name]) for name in KEYS))
        group = next(same, len(groups))
        if group == len(groups):
            groups.append(keys)
            tensors |= {f"keys.{group}.{name}": key.contiguous() for name, key in keys.items()}
        tensors[f"rows.{site}"] = x.contiguous()
        about["rows"][site], about["groups"][site] = len(x), group
    path = _path(folder, number)
    partial = folder / f".{path.stem}.{getpid()}.partial"  # a folder: safetensors writes under a name of its own first
    try:
        partial.mkdir(exist_ok=True)
        written = partial / path.name
        save_file(tensors, written)
        flush(written)
        with written.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = written.stat().st_size
        written.replace(path)
        flush(folder)
        write_whole(path.with_suffix(".json"), json.dumps({**about, "sha256": digest, "bytes": size}))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"store: {path} could not be written ({error}); free some space and harvest again, which goes on there."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _shard(folder: Path, number: int) -> Shard | None:
    """A shard that is whole; None if it is not there yet."""
    path = _path(folder, number)
    about = path.with_suffix(".json")
    if not about.exists():
        return None
    try:
        found = json.loads(about.read_text(encoding="utf-8"))
        shard = Shard(path, found["rows"], found["groups"], found["sha256"], found["bytes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{about}: not readable ({error}); remove it, and harvest again.") from error
    if not path.exists():
        raise CheckpointError(f"{path}: the file is missing; remove {about.name}, and harvest again.")
    return shard


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: there is no {INDEX}, so that it is no store; give a folder that harvest wrote."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = found["actkit"] == VERSION and all(key in found for key in ("model", "data", "sites", "shards"))
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: it is damaged, or of another version of actkit; harvest into another folder.")
    return found
