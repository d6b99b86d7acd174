"""Reads activations while a model runs: statistics of sites, live tensors for penalties, calls of submodules.

`core/watch/rows.py` says how the tensor of a site becomes rows.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from actkit.core.edit.edits import set_module
from actkit.core.forward.batch import BatchContext, as_batches, check_batch, forward, reads_beyond
from actkit.core.forward.hooks import After, Before, StopForward, evaluating, hooked, refuse_compiled_or_sharded
from actkit.core.ground import processes
from actkit.core.ground.errors import DataError
from actkit.core.ground.fingerprint import fingerprint, model_fingerprint
from actkit.core.ground.memory import MemoryPlan
from actkit.core.ground.offload import refuse_offloaded
from actkit.core.ground.progress import track
from actkit.core.model.anatomy import Anatomy, Site, Tap
from actkit.core.model.anatomy import anatomy as read_anatomy
from actkit.core.model.experts import ExpertList
from actkit.core.model.sites import Joined
from actkit.core.model.transformer_lens_names import our_name
from actkit.core.watch.calls import Call
from actkit.core.watch.joined import End
from actkit.core.watch.merging import merge
from actkit.core.watch.one_pass import update_all
from actkit.core.watch.rows import Keys, as_rows, check_finite
from actkit.core.watch.statistics import Statistic
from actkit.core.watch.streaming import Rows
from actkit.core.watch.tap_hooks import in_turn, tap_hooks, tapped

Wanted = Mapping[Any, Any]  # site, its name, a pattern or two joined sites -> a statistic or several


class Observations(Mapping[Site, Any]):
    """What was recorded: seen[site] or seen["blocks.0.mlp.hidden"]; a list if a site has several statistics.

    Args:
        statistics: by site.
        seconds: what the recording took.
    """

    def __init__(self, statistics: Mapping[Site, Any], seconds: float = 0.0) -> None:
        self._statistics = dict(statistics)
        self.seconds = seconds

    def __getitem__(self, site: Site | Joined | str) -> Any:
        found = Site.parse(site) if isinstance(site, str) else site
        if found not in self._statistics:
            raise KeyError(f"site: {found} was not recorded; recorded are {_listed(self._statistics)}.")
        return self._statistics[found]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)

    @property
    def unseen(self) -> tuple[Site, ...]:
        """Sites that no token reached: experts that were never chosen, layers that the model did not call."""
        return tuple(site for site, value in self.items() if not any(s.count for s in _several(value)))

    def __repr__(self) -> str:
        return f"Observations({len(self)} sites, {self.seconds:.1f} s)"


def record(
    model: nn.Module,
    wanted: Wanted,
    batches: Iterable[Any] | None = None,
    *,
    store: Stored | None = None,
    anatomy: Anatomy | None = None,
    max_memory: int | str | None = None,
    progress: bool = True,
) -> Observations:
    """Record statistics of activations over batches, in evaluation mode without gradients.

    Sites that are one and the same tensor share equal statistics. Several processes (`core.ground.processes.together`)
    are
    given all batches and run their share each; all get the statistics of all batches.

    Args:
        model: neither compiled nor sharded.
        wanted: a site, its text, a bare name ('mlp.hidden': in every block and every expert) or a pattern
            ('layer.input:*.down_proj') -> one statistic or a list; each site gets fresh ones with those settings. A
            `Joined` of two sites is given a statistic that reads the rows of both.
        batches: dicts of the model's keywords (attention_mask [batch, length] tells padding, labels are dropped) or
            single
            arguments; `batches.document_ids` are used if present, else every row is a document.
        store: read the rows from it instead of running the model (`core/store/activation_store.py`).
        anatomy: of the model, if it was read before.
        max_memory: cap for the statistics, bytes or '2GB'.
        progress: show a bar.

    Returns:
        The statistics by site.

    Raises:
        ValueError: a site is unknown or not in the store, or the layout of its tensor is unknown; batches were given
            beside a store.
        DataError: the data cannot be used.
        CheckpointError: the store is of another model, or damaged.
        MemoryLimitError: the statistics would need more than `max_memory`; nothing has begun.
        NonFiniteError: a site holds NaN or Inf.
        UnsupportedModelError: the model is compiled or sharded.
    """
    refuse_compiled_or_sharded(model)
    started = time.perf_counter()
    if store is not None:
        if batches is not None:
            raise ValueError("store: batches were given beside it; give one of the two.")
        view = view_of(model, anatomy, None)
        with experts_for(view, wanted):
            statistics = _from_store(view, resolve(view, wanted), store, max_memory, progress)
        return Observations(statistics, time.perf_counter() - started)
    batches = as_batches(() if batches is None else batches)
    beyond, remaining = reads_beyond(batches), iter(batches)
    first = next(remaining, None)
    if first is None:
        raise DataError("calibration data: 0 batches were given; pass at least one dict of the model's keywords.")
    view = view_of(model, anatomy, first)
    total = len(batches) if isinstance(batches, Sized) else None
    equal = _equal_lengths(model, batches)
    with experts_for(view, wanted):
        sites = resolve(view, wanted)
        if max_memory is not None:
            _plan(view, sites, first, total, equal).check(max_memory)
        with evaluating(model), observe(view, sites, equal_lengths=equal) as observer:
            every = chain([first], remaining)
            documents = getattr(batches, "document_ids", None)
            given = []
            tracked = track(every, "Recording activations", total, progress)
            for index, (batch, context) in enumerate(contexts_of(model, tracked, documents, beyond)):
                if processes.several():
                    given.append(fingerprint(batch))
                if processes.mine(index):
                    observer.begin(context)
                    forward(model, batch)
        if processes.several():
            processes.agree(model=model_fingerprint(model), data=fingerprint(given))
            merge(observer.statistics)
    return Observations(observer.statistics, time.perf_counter() - started)


def plan_memory(
    model: nn.Module, wanted: Wanted, batches: Sequence[Any], *, anatomy: Anatomy | None = None
) -> MemoryPlan:
    """Estimate what `record` would hold and take, from one forward pass of the first batch.

    Args:
        model: as of `record`, and so are the others.
        wanted: site -> statistics.
        batches: at least one.
        anatomy: of the model, if it was read before.

    Returns:
        Bytes by site and statistic, and seconds.

    Raises:
        DataError: there is no batch; otherwise as `record`.
    """
    refuse_compiled_or_sharded(model)
    if not len(batches):
        raise DataError("calibration data: 0 batches were given; pass at least one dict of the model's keywords.")
    view = view_of(model, anatomy, batches[0])
    with experts_for(view, wanted):
        return _plan(view, resolve(view, wanted), batches[0], len(batches), _equal_lengths(model, batches))


class Stored(Protocol):
    """Activations that were kept: what `record` asks of a store."""

    def check(self, model: nn.Module) -> None:
        """Refuse another model than the one that they are of."""

    def read(self, site: Site | str) -> Iterable[tuple[Tensor, Rows]]:
        """The rows of a site in the order of the data, in parts."""

    def count(self, site: Site | str) -> int:
        """How many rows a site has."""


def _from_store(
    view: Anatomy, sites: Mapping[Any, Any], store: Stored, max_memory: int | str | None, progress: bool
) -> dict[Any, Any]:
    """Statistics of the rows that a store keeps."""
    store.check(view.model)
    if joined := [site for site in sites if isinstance(site, Joined)]:
        raise ValueError(f"store: {joined[0]} joins two sites, whose rows come apart there; record with batches.")
    readings = _Readings(view, sites)
    for site, _ in readings.taps.values():
        store.count(site)  # an error says what it holds
    if max_memory is not None:
        widths = {site: next((x.shape[1] for x, _ in store.read(site)), 0) for site, _ in readings.taps.values()}
        each = [(site, statistic) for site, statistics in readings.taps.values() for statistic in statistics]
        MemoryPlan(tuple((str(s), type(o).__name__, o.memory(widths[s])) for s, o in each)).check(max_memory)
    taps = list(readings.taps.values())
    for site, statistics in track(taps, "Reading the store", len(taps), progress):
        for x, rows in store.read(site):
            update_all(statistics, x, rows)
    return readings.statistics


class Observer:
    """Fills statistics while its hooks are in place: `begin(context)` before each forward pass.

    Attributes:
        statistics: site -> its statistic, or a list if several were wanted.

    Args:
        view: of the model.
        wanted: site -> one statistic or a list.
        equal_lengths: as of `observe`.
    """

    def __init__(self, view: Anatomy, wanted: Mapping[Site, Any], equal_lengths: bool = False) -> None:
        self._view, self._readings = view, _Readings(view, wanted)
        self._equal_lengths = equal_lengths
        self._unread: set[Tap] | None = None  # of a pass that ends when all are read
        self._runs: Counter[Tap] = Counter()  # of the pass
        self._context: BatchContext | None = None
        self._keys: dict[torch.device, Keys] = {}  # of the batch, on the devices that its tensors are on
        self._keywords: Mapping[str, Any] = {}
        self.statistics = self._readings.statistics

    def begin(self, context: BatchContext, kwargs: Mapping[str, Any] | None = None, once: Collection[str] = ()) -> None:
        """Say what the rows of the next pass are.

        Args:
            context: of the batch.
            kwargs: those of the call, for rotary tables given only there.
            once: paths of modules that run once in a pass. If all sites are read there, the pass is ended by
                `StopForward` as soon as they were.
        """
        self._context, self._keywords, self._keys = context, kwargs or {}, {}
        self._runs.clear()
        self._unread = set(self._readings.taps) if all(tap.path in once for tap in self._readings.taps) else None

    @property
    def once(self) -> frozenset[str]:
        """What `begin` takes for more passes like the last: modules of all sites if each was read once, else none."""
        taps = self._readings.taps
        return frozenset(tap.path for tap in taps) if all(self._runs[tap] == 1 for tap in taps) else frozenset()

    def hooks(self) -> tuple[dict[str, Before], dict[str, After]]:
        """Return what to call before and after which modules, by path.

        Raises:
            ValueError: a site is inside of attention functions, which only `watching` reads.
        """
        inside = next((site for tap, (site, _) in self._readings.taps.items() if tap.where == "inside"), None)
        if inside is not None:
            raise ValueError(f"site: {inside} cannot be read block by block; record it over the whole model.")
        return tap_hooks(self._readings.taps, self._see, self._tables)

    def watching(self) -> AbstractContextManager[None]:
        """Fill the statistics as long as a context lasts."""
        return tapped(self._view.model, self._readings.taps, self._see, self._tables)

    def _tables(self) -> Any:
        return self._keywords.get("position_embeddings")

    def _see(self, tap: Tap, value: Tensor, tokens: Tensor | None) -> None:
        if self._context is None:
            raise ValueError("observe: begin(context) must be called before the model runs.")
        site, statistics = self._readings.taps[tap]
        self._runs[tap] += 1
        keys = self._keys.get(value.device)
        if keys is None:
            keys = self._keys[value.device] = Keys(self._context, value.device)
        for x, rows in as_rows(site, tap, value, keys, tokens, self._equal_lengths):
            check_finite(site, x, rows)
            update_all(statistics, x, rows)
        if self._unread is not None:
            self._unread.discard(tap)
            if not self._unread:
                raise StopForward


@contextmanager
def observe(view: Anatomy, wanted: Mapping[Site, Any], *, equal_lengths: bool = False) -> Iterator[Observer]:
    """Place hooks that fill fresh statistics of exactly these sites.

    Whoever runs the model calls `observer.begin` before each pass.

    Args:
        view: of the model.
        wanted: site -> one statistic or a list.
        equal_lengths: all batches have one length, so that attention weights can keep their shape
            (`core/watch/rows.py`).

    Yields:
        The observer.
    """
    observer = Observer(view, wanted, equal_lengths)
    with observer.watching():
        yield observer


class Activations(Mapping[Site, list[Tensor]]):
    """Tensors with their graph: activations[site] holds one tensor per call since the last `clear()`.

    Args:
        sites: that are collected.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self._tensors: dict[Site, list[Tensor]] = {site: [] for site in sites}

    def __getitem__(self, site: Site | str) -> list[Tensor]:
        return self._tensors[Site.parse(site) if isinstance(site, str) else site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def clear(self) -> None:
        """Drop all tensors: at the start of each training step, else they and their graphs pile up."""
        for tensors in self._tensors.values():
            tensors.clear()


@contextmanager
def live(
    model: nn.Module, sites: Iterable[Site | str] | Site | str, anatomy: Anatomy | None = None
) -> Iterator[Activations]:
    """Collect the tensors of sites with their graph, for penalties; whole, in the layout of the site's tap.

    Padding is included: whoever adds the penalty knows the mask. Mode and gradients of the model are left alone.
    Experts
    must have been opened (`ExpertList`) to be seen here.

    Args:
        model: neither compiled nor sharded.
        sites: one or several, or patterns.
        anatomy: of the model, if it was read before.

    Yields:
        The tensors by site, as they come.

    Raises:
        ValueError: a site is unknown, or the layout of its tensor is.
        UnsupportedModelError: the model is compiled or sharded.
    """
    refuse_compiled_or_sharded(model)
    view = view_of(model, anatomy, None)
    keys = [sites] if isinstance(sites, Site | str) else list(sites)
    found = resolve(view, dict.fromkeys(keys))
    activations = Activations(found)
    names = {site: view.canonical(site) for site in found}
    taps = view.taps(names.values())
    readers: dict[Tap, list[Site]] = {}
    for site in found:
        readers.setdefault(taps[names[site]], []).append(site)

    def keep(tap: Tap, value: Tensor, tokens: Tensor | None) -> Tensor | None:
        # The model goes on with a view of what was read, so that its gradient is that of this place alone. Attention
        # returns its weights after it has used them, so that these have their gradient as they are.
        used = tap.layout == "weights" and tap.where == "output"
        goes_on = torch.is_grad_enabled() and not used
        value = value.view_as(value) if goes_on else value
        for site in readers[tap]:
            activations[site].append(value)
        in_place = tap.copied or tap.limit is not None  # what the model does with it afterwards
        return (value.clone() if in_place else value) if goes_on else None

    with tapped(model, readers, keep, changes=True, alike=True):
        yield activations


@contextmanager
def calls(
    model: nn.Module, paths: Iterable[str] | str, max_tokens: int | None = None
) -> Iterator[dict[str, list[Call]]]:
    """Record how modules are called while the whole model runs (`hooks.forward(model, batch)`).

    Evaluation mode, no gradients; a decoder keeps no cache.

    Args:
        model: neither compiled nor sharded.
        paths: of the modules.
        max_tokens: record no further batch after that many real tokens.

    Yields:
        path -> list of Call(args, kwargs, context): copies without graph, caches dropped.
    """
    recorded: dict[str, list[Call]] = {path: [] for path in ([paths] if isinstance(paths, str) else paths)}
    context: BatchContext | None = None
    copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # masks and rotary tables are one tensor for all layers
    tokens = first_row = 0

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal context, tokens, first_row
        copies.clear()
        if max_tokens is not None and tokens >= max_tokens:
            context = None
            return
        named = dict(zip(inspect.signature(module.forward).parameters, args))
        context = BatchContext.of({**named, **kwargs}, module, first_row=first_row)
        tokens += context.tokens
        first_row += context.batch_size

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = (id(value), value._version)  # changed in place it is another tensor
            return copies.setdefault(key, (value, value.detach().clone()))[1]
        if isinstance(value, tuple | list) and type(value) in (tuple, list):
            return type(value)(copy(item) for item in value)
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        return None if isinstance(value, Cache) else value

    def keep(path: str) -> Before:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if context is None:
                return
            kept = {k: copy(v) for k, v in kwargs.items() if "past_key_value" not in k and not isinstance(v, Cache)}
            recorded[path].append(Call(copy(args), kept, context))

        return hook

    hooks: dict[str, list[Before]] = {"": [begin]}
    for path in recorded:
        hooks.setdefault(path, []).append(keep(path))
    with (
        evaluating(model),
        _no_cache(model),
        hooked(model, before={path: in_turn(each) for path, each in hooks.items()}),
    ):
        yield recorded


@contextmanager
def opened_experts(view: Anatomy) -> Iterator[None]:
    """Let experts kept as 3-D parameters stand as an ExpertList of views for as long as a context lasts.

    Args:
        view: of the model.
    """
    stock: list[tuple[str, nn.Module]] = []
    try:
        for block in view.blocks:
            experts = None if block.experts is None else view.block(block.index).experts  # as they are now
            if experts is not None and not isinstance(experts.module, ExpertList):
                refuse_offloaded(experts.module, f"{experts.path} holds all experts in one tensor")
                set_module(view.model, experts.path, ExpertList.of(experts.module, experts.row))
                stock.append((experts.path, experts.module))
        yield
    finally:
        for path, module in stock:
            set_module(view.model, path, module)


# -- which sites -------------------------------------------------------------------------------------------------------


def resolve(view: Anatomy, wanted: Wanted) -> dict[Site, Any]:
    """Return the sites that the keys of `wanted` stand for, with their values.

    Args:
        view: of the model.
        wanted: site, its text, a bare name or a pattern -> any value.

    Returns:
        Lists of values if several keys name one site.

    Raises:
        ValueError: no site of this model matches a key.
    """
    listed = _Listed(view)
    found: dict[Any, Any] = {}
    for key, value in wanted.items():
        if isinstance(key, Joined):
            view.taps((view.canonical(key.first), view.canonical(key.second)))  # an error says what this model has
            found[key] = value
            continue
        for site in _matching(view, key, listed):
            found[site] = [*_several(found[site]), *_several(value)] if site in found else value
    return found


class _Listed:
    """The sites of a model, read as far as keys ask for them: listing all reads the whole model."""

    def __init__(self, view: Anatomy) -> None:
        self.view = view
        self._of_blocks: dict[int, frozenset[Site]] = {}

    @cached_property
    def all(self) -> tuple[Site, ...]:
        return self.view.sites()

    def __contains__(self, site: Site) -> bool:
        if site.block is None or not 0 <= site.block < len(self.view.blocks):
            return site in self.all
        if site.block not in self._of_blocks:
            self._of_blocks[site.block] = frozenset(self.view.block(site.block).sites())
        return site in self._of_blocks[site.block]


def _matching(view: Anatomy, key: Site | str, listed: _Listed) -> tuple[Site, ...]:
    if isinstance(key, str):
        key = our_name(key)
    if isinstance(key, str) and any(character in key for character in "*?["):
        found = tuple(site for site in listed.all if fnmatchcase(str(site), key))
        if not found:
            raise ValueError(f"site: no site matches {key!r}; this model has {_listed(listed.all)}.")
        return found
    site = Site.parse(key) if isinstance(key, str) else key
    if site in listed:
        return (site,)
    available = listed.all
    if site.name == "attention.scores":  # the model need not form them
        available = tuple(other for block in view.blocks for other in block.taps)
    found = tuple(other for other in available if _stands_for(site, other))
    if not found:  # a module that is no linear layer, or an error that says what this model has
        view.tap(site if site.is_at_module or site.block is not None else replace(site, block=0))
        return (site,)
    return found


def _stands_for(site: Site, other: Site) -> bool:
    parts = ((site.block, other.block), (site.expert, other.expert), (site.path, other.path))
    return site.name == other.name and all(part in (None, actual) for part, actual in parts)


def _listed(sites: Iterable[Site]) -> str:
    names = [str(site) for site in sites]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value]


@contextmanager
def experts_for(view: Anatomy, wanted: Wanted) -> Iterator[None]:
    """Open the experts, if a key may mean sites inside them.

    Args:
        view: of the model.
        wanted: as of `resolve`.
    """
    inside = ("mlp.", "layer.", "activation.", "experts.", "*")
    if any(part in str(key) for key in wanted for part in inside):
        with opened_experts(view):
            yield
    else:
        yield


class _Readings:
    """taps: how each distinct tensor is read, a site to name it by, and the statistics to fill from it."""

    def __init__(self, view: Anatomy, wanted: Mapping[Any, Any]) -> None:
        self.taps: dict[Tap, tuple[Site, list[Statistic]]] = {}
        self.statistics: dict[Any, Any] = {}
        parts = {site: (site.first, site.second) if isinstance(site, Joined) else (site,) for site in wanted}
        names = {part: view.canonical(part) for both in parts.values() for part in both}
        taps = view.taps(names.values())
        for site, value in wanted.items():
            where = [(taps[names[part]], part) for part in parts[site]]
            fresh = [self._add(where, site, statistic) for statistic in _several(value)]
            self.statistics[site] = fresh if isinstance(value, Sequence) else fresh[0]

    def _add(self, where: list[tuple[Tap, Site]], site: Site | Joined, statistic: Any) -> Statistic:
        if not isinstance(statistic, Statistic):
            kind = type(statistic).__name__
            raise TypeError(
                f"wanted: {kind} was given for {site}; give a statistic, as in {{'mlp.hidden': Moments()}}."
            )
        if isinstance(site, Joined):
            fresh = statistic.empty()
            for (tap, part), end in zip(where, End.both(fresh), strict=True):
                self.taps.setdefault(tap, (part, []))[1].append(end)  # type: ignore[arg-type]
            return fresh
        _, known = self.taps.setdefault(where[0][0], (site, []))
        same = next((other for other in known if other.matches(statistic)), None)
        if same is None:
            same = statistic.empty()
            known.append(same)
        return same


# -- batches -----------------------------------------------------------------------------------------------------------


def view_of(model: nn.Module, anatomy: Anatomy | None, example: Any) -> Anatomy:
    """Return the anatomy that was given, or one read now.

    Args:
        model: it is of.
        anatomy: None reads it.
        example: one batch, for a model without a row.

    Raises:
        ValueError: the anatomy is of another model.
    """
    if anatomy is not None and anatomy.model is not model:
        raise ValueError("anatomy: it was read off another model; pass anatomy(model), or leave it out.")
    return read_anatomy(model, example) if anatomy is None else anatomy


def contexts_of(
    model: nn.Module, batches: Iterable[Any], documents: Sequence[Tensor] | None, beyond_context: bool
) -> Iterator[tuple[Any, BatchContext]]:
    """Each batch with what its rows are. Raises DataError if the model cannot be called with it."""
    row = 0
    for index, batch in enumerate(batches):
        if documents is not None and index >= len(documents):
            raise DataError(f"document_ids: {len(documents)} tensors were given for more batches; give one per batch.")
        check_batch(model, batch, beyond_context=beyond_context)
        owners = None if documents is None else documents[index]
        context = BatchContext.of(batch, model, first_row=row, documents=owners)
        row += context.batch_size
        yield batch, context


def _equal_lengths(model: nn.Module, batches: Iterable[Any]) -> bool:
    """Whether all batches are known to have sequences of one length; not known of what can be read only once."""
    return isinstance(batches, Sequence) and len({BatchContext.of(batch, model).length for batch in batches}) == 1


def _plan(view: Anatomy, wanted: Mapping[Site, Any], batch: Any, total: int | None, equal: bool) -> MemoryPlan:
    """Reads the channels of every site off one forward pass, which also gives the time."""
    readings = _Readings(view, wanted)
    context = next(contexts_of(view.model, [batch], None, True))[1]
    channels: dict[Tap, int] = {}

    def measure(tap: Tap, value: Tensor, tokens: Tensor | None) -> None:
        if tap not in channels:
            site = readings.taps[tap][0]
            keys = Keys(context, value.device)
            channels[tap] = next(x.shape[1] for x, _ in as_rows(site, tap, value, keys, tokens, equal))

    started = time.perf_counter()
    with evaluating(view.model), tapped(view.model, readings.taps, measure):
        forward(view.model, batch)
    seconds = time.perf_counter() - started
    rows = []
    for tap, (site, statistics) in readings.taps.items():
        # an expert that got no token of this batch is as wide as the others
        alike = [n for other, n in channels.items() if readings.taps[other][0].name == site.name]
        width = channels.get(tap, max(alike, default=0))
        rows += [(str(site), type(statistic).__name__, statistic.memory(width)) for statistic in statistics]
    return MemoryPlan(tuple(rows), None if total is None else seconds * total)


@contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """A decoder that keeps no keys and values meanwhile."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before
